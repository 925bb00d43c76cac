"""SiT, its refiner and the H/P/R sampler stated in PyTorch, as well as we know how.

The parameter names are the official ones, so that what `convert --export` writes loads strictly.
What the library does to be fast is done here too: the conditioning of all steps is computed before
the first one, both branches of guidance are one batch, weights lie in the dtype of the products.
Latents are `[B, C, H, W]`, as PyTorch's convolutions want them. The same sampler over diffusers'
U-Net is in unet_peer.py.

Source: SiT models.py; FlowTurbo models_assemble.py; PAPER of the sampler: arXiv 2409.18128.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

EPSILON = 1e-6  # of SiT's layer norms, which have no parameters
MAX_PERIOD = 10_000.0  # of SiT's time features


class Condition(NamedTuple):
    """What time and label do to a network: `[..., rows, 6 W]` of each block, `[rows, 2 W]`."""

    blocks: Tensor
    final: Tensor


class TimeEmbedder(nn.Module):
    """Flow times `[N]` to `[N, W]`."""

    def __init__(self, width: int, features: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.mlp[0].in_features // 2
        powers = torch.arange(half, device=t.device) / half
        angles = t[:, None] * torch.exp(-math.log(MAX_PERIOD) * powers)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Labels `[rows]` to `[rows, W]`; the last row of the table means "no label"."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class PatchEmbedder(nn.Module):
    """Latents `[rows, C, H, W]` to tokens `[rows, T, W]`."""

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with one projection to queries, keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters, then `x (1 + scale) + shift`."""
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON) * (1 + scale) + shift


class Block(nn.Module):
    """Attention and MLP, each normalised, modulated and gated by the condition."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, six: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = six[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulated_norm(x, shift1, scale1))
        return x + gate2 * self.mlp(modulated_norm(x, shift2, scale2))


class FinalLayer(nn.Module):
    """Modulated layer norm, and each token to its patch of output channels."""

    def __init__(self, width: int, features: int):
        super().__init__()
        self.linear = nn.Linear(width, features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, two: Tensor) -> Tensor:
        shift, scale = two[:, None].chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, scale))


class SiT(nn.Module):
    """Velocity of latents; of a refiner, whose input is (x, v) side by side, the offset.

    Args:
      config: the fields of the library's SiTConfig.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, patch = config["hidden_size"], config["patch_size"]
        self.channels, self.patch = config["in_channels"], patch
        self.side = config["input_size"] // patch
        outputs = self.channels * (2 if config["learn_sigma"] else 1)
        self.x_embedder = PatchEmbedder(self.channels * config["in_channels_scale"], width, patch)
        self.t_embedder = TimeEmbedder(width, config["frequency_embedding_size"])
        self.y_embedder = LabelEmbedder(config["num_classes"] + config["null_class"], width)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.side**2, width))
        hidden = int(width * config["mlp_ratio"])
        self.blocks = nn.ModuleList(
            Block(width, config["num_heads"], hidden) for _ in range(config["depth"])
        )
        self.final_layer = FinalLayer(width, patch**2 * outputs)

    def condition(self, t: Tensor, labels: Tensor) -> Condition:
        """What `forward` takes, for times `[N]` and labels `[rows]`: arrays behind an axis [N]."""
        c = self.t_embedder(t)[:, None] + self.y_embedder(labels)
        blocks = [block.adaLN_modulation(c) for block in self.blocks]
        return Condition(torch.stack(blocks, dim=1), self.final_layer.adaLN_modulation(c))

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        tokens = self.x_embedder(x) + self.pos_embed
        for block, six in zip(self.blocks, condition.blocks.unbind(0), strict=True):
            tokens = block(tokens, six)
        out = self.final_layer(tokens, condition.final)
        out = out.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, (self.side, self.side))
        out = out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return out[:, : self.channels].float()


Conditions = tuple[Any, Any]  # what predictor and refiner take at a time; None without a refiner


class Guided(nn.Module):
    """Both networks under guidance, and the sample steps over them.

    A memory is what a step hands on: both branches' velocities `[2, B, C, H, W]`, the conditional
    one first, or without guidance one branch's, `[1, B, C, H, W]`.

    Args:
      predictor: the big network, `(x, condition) -> velocity`.
      refiner: the small one, over x and velocity side by side, or None.
      mode: "official", "paired" or "none", as in the library's guidance.py.
      scale: of guidance.
      channels: how many channels the official mode guides; None for all.
    """

    def __init__(
        self,
        predictor: nn.Module,
        refiner: nn.Module | None,
        mode: str,
        scale: float,
        channels: int | None,
    ):
        super().__init__()
        self.predictor, self.refiner = predictor, refiner
        self.mode, self.scale, self.channels = mode, scale, channels

    def conditions(self, times: Tensor, labels: Tensor) -> Conditions:
        """What both networks make of all times and the labels of all rows."""
        refiner = None if self.refiner is None else self.refiner.condition(times, labels)
        return self.predictor.condition(times, labels), refiner

    def predict(self, x: Tensor, at: Conditions) -> Tensor:
        """The memory of the predictor's velocities at x."""
        return self._guided(self.predictor(self._branches(x), at[0]))

    def correct(
        self, x: Tensor, memory: Tensor, dt: Tensor, at: Conditions, after: Conditions
    ) -> tuple[Tensor, Tensor]:
        """P, and H once its first velocity is predicted: one evaluation at the predicted point."""
        first = self._drift(memory)
        reached = self.predict(x + dt * first, after)
        return x + dt / 2 * (first + self._drift(reached)), reached

    def refine(
        self, x: Tensor, memory: Tensor, dt: Tensor, at: Conditions, after: Conditions
    ) -> tuple[Tensor, Tensor]:
        """R: two evaluations of the refiner, both beside the remembered velocity."""
        first = memory + self._offset(x, memory, at)
        drift = self._drift(first)
        reached = first + self._offset(x + dt * drift, memory, after)
        return x + dt / 2 * (drift + self._drift(reached)), first

    def _offset(self, x: Tensor, memory: Tensor, at: Conditions) -> Tensor:
        both = torch.cat([self._branches(x), memory.flatten(0, 1)], dim=1)
        return self._guided(self.refiner(both, at[1]))

    def _branches(self, x: Tensor) -> Tensor:
        return x if self.mode == "none" else torch.cat([x, x])

    def _drift(self, memory: Tensor) -> Tensor:
        """The velocity that moves x."""
        if self.mode != "paired":
            return memory[0]
        return memory[1] + self.scale * (memory[0] - memory[1])

    def _guided(self, rows: Tensor) -> Tensor:
        """A network's rows as a memory; the official mode guides the first channels of both."""
        if self.mode == "none":
            return rows[None]
        pair = rows.unflatten(0, (2, -1))
        if self.mode == "paired":
            return pair
        channels = pair.shape[2] if self.channels is None else self.channels
        cond, uncond = pair[:, :, :channels].unbind(0)
        guided = uncond + self.scale * (cond - uncond)
        return torch.cat([torch.stack([guided, guided]), pair[:, :, channels:]], dim=2)


class Plan(NamedTuple):
    """How to sample.

    Attributes:
      steps: a letter for each step, "H", "P" or "R".
      times: the flow times between which they go, one more, float32.
      mode: "official", "paired" or "none".
      scale: of guidance.
    """

    steps: str
    times: np.ndarray
    mode: str
    scale: float


class Peer:
    """The sampler, over files of weights in the official names.

    Each step is compiled whole, its networks, guidance and integration together: that compiles in
    seconds to minutes, where all of the sampler at once takes several times as long and is not
    faster. With the mode max-autotune a step is a CUDA graph on a GPU.

    Args:
      model: the fields of the library's configs under `predictor`, `refiner` and `vae` (None where
        there is none), `guided_channels`, and under `files` the safetensors file of each network.
      device: "cpu" or "cuda".
      dtype: of the matrix products, "float32" or "bfloat16".
      compile_mode: of torch.compile, or "none".
    """

    def __init__(self, model: dict[str, Any], device: str, dtype: str, compile_mode: str):
        # Float32 is to mean float32, as in the library.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self._model, self._compile_mode = model, compile_mode
        self._device, self._dtype = torch.device(device), getattr(torch, dtype)
        self._networks = self._network("predictor"), self._network("refiner")
        self._vae = None if model["vae"] is None else self._autoencoder()
        self._ready: tuple[Any, Any] = (None, None)

    def latents(self, noise: np.ndarray, labels: np.ndarray, plan: Plan) -> np.ndarray:
        """Latents `[B, H, W, C]` float32 from noise of that shape and labels `[B]`."""
        with torch.no_grad(), self._autocast():
            return self._sample(noise, labels, plan).permute(0, 2, 3, 1).cpu().numpy()

    def images(self, noise: np.ndarray, labels: np.ndarray, plan: Plan) -> np.ndarray:
        """Images `[B, H, W, 3]` uint8, as `latents`."""
        with torch.no_grad(), self._autocast():
            x = self._sample(noise, labels, plan)
            return self._compiled(plan, len(labels))["decode"](x).cpu().numpy()

    def _sample(self, noise: np.ndarray, labels: np.ndarray, plan: Plan) -> Tensor:
        do = self._compiled(plan, len(labels))
        x = torch.tensor(noise, device=self._device).permute(0, 3, 1, 2).contiguous()
        times = torch.tensor(plan.times, device=self._device)
        at = self._conditions(do, times, torch.tensor(labels, device=self._device), plan.mode)
        memory = None
        for i, (letter, dt) in enumerate(zip(plan.steps, times.diff(), strict=True)):
            if letter == "H" or memory is None:
                memory = do["predict"](x, at[i])
            step = do["refine" if letter == "R" else "correct"]
            x, memory = step(x, memory, dt, at[i], at[i + 1])
        return x

    def _conditions(
        self, do: dict[str, Callable[..., Any]], times: Tensor, labels: Tensor, mode: str
    ) -> list[Conditions]:
        """What both networks take at each time, for all rows of a batch."""
        if mode != "none":
            null = self._model["predictor"]["num_classes"]  # the table's last row
            labels = torch.cat([labels, torch.full_like(labels, null)])
        return _each(do["conditions"](times, labels), len(times))

    def _compiled(self, plan: Plan, batch_size: int) -> dict[str, Callable[..., Any]]:
        """What sampling calls, by name; that of the latest guidance and batch size is kept."""
        key = (plan.mode, plan.scale, batch_size)
        if self._ready[0] != key:
            torch.compiler.reset()
            channels = self._model["guided_channels"]
            flow = Guided(*self._networks, plan.mode, plan.scale, channels)
            names = ("conditions", "predict", "correct", "refine")
            functions = {name: getattr(flow, name) for name in names} | {"decode": self._decode}
            self._ready = key, {name: self._made(each) for name, each in functions.items()}
        return self._ready[1]

    def _made(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self._compile_mode == "none":
            return function
        compiled = torch.compile(function, mode=self._compile_mode, fullgraph=True, dynamic=False)
        if self._device.type == "cpu":
            return compiled
        # The next replay of a CUDA graph writes where the results of this one are.
        return lambda *given: _cloned(compiled(*given))

    def _autocast(self) -> contextlib.AbstractContextManager:
        enabled = self._dtype != torch.float32
        return torch.autocast(self._device.type, torch.bfloat16, enabled=enabled)

    def _state(self, name: str) -> dict[str, Tensor]:
        # Rounded here, once: autocast would round every weight again in every call.
        tensors = load_file(self._model["files"][name]).items()
        return {key: tensor.to(self._device, self._dtype) for key, tensor in tensors}

    def _network(self, name: str) -> nn.Module | None:
        if self._model[name] is None:
            return None
        with torch.device("meta"):  # its parameters are those of the file
            network = SiT(self._model[name])
        network.load_state_dict(self._state(name), strict=True, assign=True)
        return network.eval().requires_grad_(False)

    def _autoencoder(self) -> nn.Module:
        from diffusers import AutoencoderKL

        config = self._model["vae"]
        levels = len(config["block_out_channels"])
        vae = AutoencoderKL(
            **config,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
        )
        vae.load_state_dict(self._state("vae"), strict=True, assign=True)
        return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def _decode(self, latents: Tensor) -> Tensor:
        config = self._model["vae"]
        z = latents / config["scaling_factor"] + config["shift_factor"]
        z = z.to(self._dtype, memory_format=torch.channels_last)
        pixels = self._vae.decode(z).sample
        pixels = ((pixels.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1)


def _cloned(made: Any) -> Any:
    """A copy of tensors in tuples."""
    if isinstance(made, Condition):
        return Condition(*map(_cloned, made))
    if isinstance(made, tuple):
        return tuple(map(_cloned, made))
    return None if made is None else made.clone()


def _each(conditions: Conditions, count: int) -> list[Conditions]:
    """The conditions of each time."""
    predictor, refiner = (
        None if stacked is None else [Condition(*parts) for parts in zip(*stacked, strict=True)]
        for stacked in conditions
    )
    return list(zip(predictor, refiner or [None] * count, strict=True))

"""The H/P/R sampler over diffusers' U-Net of Stable Diffusion, of a text's states.

The U-Net is diffusers' own, in the dtype of the products and channels last, its attention PyTorch's
`scaled_dot_product_attention`. One thing that the library does is left out, since diffusers' U-Net
does not offer it: the keys and values of the text are computed anew in every evaluation.

Source: diffusers unet_2d_condition.py; the sampler is that of torch_peer.py.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.torch_peer import Conditions, Peer
from flowturbo_jax.models import UNetConfig
from flowturbo_jax.unet_architecture import diffusers_config

TIME_STEPS = 1000  # Stable Diffusion's clock runs from 1000, noise, to 0, data


class TextCondition(NamedTuple):
    """The U-Net's time `[]`, and the text states `[rows, L, text_width]`."""

    time: Tensor
    states: Tensor


class TextUNet(nn.Module):
    """Velocity of latents; of a refiner, whose input is (x, v) side by side, the offset.

    Args:
      config: the fields of the library's UNetConfig.
      state: tensors by diffusers' names, all of one dtype, in which it computes.
    """

    def __init__(self, config: dict[str, Any], state: dict[str, Tensor]):
        super().__init__()
        self.dtype = next(iter(state.values())).dtype
        with torch.device("meta"):  # its parameters are those given
            self.unet = UNet2DConditionModel.from_config(diffusers_config(UNetConfig(**config)))
        self.unet.load_state_dict(state, strict=True, assign=True)
        self.unet.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, condition: TextCondition) -> Tensor:
        x = x.to(self.dtype, memory_format=torch.channels_last)
        v = self.unet(x, condition.time, condition.states, return_dict=False)[0]
        return v.float().contiguous()  # of the strides that x has, or all is compiled once more


class UNetPeer(Peer):
    """The sampler, over files of weights in diffusers' names.

    Args:
      **given: as of `Peer`; the fields are those of the library's UNetConfig.
    """

    def _network(self, name: str) -> nn.Module | None:
        if self._model[name] is None:
            return None
        network = TextUNet(self._model[name], self._state(name))
        return network.eval().requires_grad_(False)

    def _conditions(
        self, do: dict[str, Callable[..., Any]], times: Tensor, labels: Tensor, mode: str
    ) -> list[Conditions]:
        """As of `Peer`, from text states `[B, 2, L, text_width]` in place of labels."""
        wanted, other = labels.to(self._dtype).unbind(1)
        states = wanted if mode == "none" else torch.cat([wanted, other])
        given = [TextCondition(time, states) for time in TIME_STEPS * (1 - times)]
        return [(condition, condition) for condition in given]

    def _autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # all is in the dtype of the products already

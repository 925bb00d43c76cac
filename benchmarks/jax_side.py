"""The library in a process of its own, so that it and PyTorch share no threads and no memory pool.

The other process asks by name and gets an answer; this one works only while it is asked.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from flowturbo_jax import ClassToImage, TextToImage, model_directory, path
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_description import Description
from flowturbo_jax.model_directory import Model
from flowturbo_jax.models import CLIPText, UNetConfig, VAEConfig
from flowturbo_jax.pipelines import exporting, random_model
from flowturbo_jax.pipelines.generation import Generation
from flowturbo_jax.pipelines.plan import resolve

SMALL = "small U-Net"  # no published size: one that compiles in seconds
SMALL_UNET: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "attention_heads": (2, 4),
    "cross_attention": (True, False),
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
SMALL_TEXT = {"hidden_size": 24, "intermediate_size": 32, "num_layers": 1, "num_heads": 2}
SMALL_VAE: dict[str, Any] = {
    "block_out_channels": (8, 8, 8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


class GivenStates(CLIPText):
    """In place of a text encoder: its token ids are the bits of states in float32."""

    def setup(self):
        """Has no parameters."""

    def __call__(self, ids: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(ids, jnp.float32)


class StatesToImage(TextToImage):
    """A model of texts that is given their states, so that no text encoder is measured.

    Wherever `TextToImage` takes prompts, this takes text states `[B, 2, L, text_width]` float32, of
    what is wanted and of what guidance leads away from.
    """

    def __init__(self, model: Model, say: Any = logging.info):
        encoder = GivenStates(model.description.text_encoder)
        given = dataclasses.replace(model, text_encoder=encoder, text_encoder_params={})
        super().__init__(given, say)

    def rows(self, wanted: np.ndarray) -> np.ndarray:
        return wanted.view(np.int32)  # as programs want what images are to show


class JaxSide:
    """What the other process can ask for: a model, and samples of it.

    Args:
      folder: an empty one, for a random model and for exported weights.
      size: such as "SiT-B/2", or SMALL, of a random model; or None.
      model: directory of a model, or the name of a shipped one, where there is no size.
      decode: images are wanted, so that a random model needs a VAE.
      family: of the models that the other side states, "sit" or "unet".
    """

    def __init__(
        self, folder: Path, size: str | None, model: str | None, decode: bool, family: str = "sit"
    ):
        self._folder, self._size, self._decode, self._family = folder, size, decode, family
        self._directory: Any = model if size is None else folder / "model"
        self._loaded: tuple[str | None, Generation | None] = (None, None)

    def open(self) -> dict[str, Any]:
        """Makes the model, exports its weights, and says what the other side is built from.

        Returns:
          `model`, which the PyTorch side takes; `sha256` of each network's parameters; `backend`,
          JAX's name of the device.

        Raises:
          InputError: the model is none that the PyTorch side states, or cannot be read.
        """
        if self._size is not None:
            made = random_model.filled(_described(self._size, self._decode))
            parameters = (made.predictor_params, made.refiner_params, made.vae_params)
            text = (made.text_encoder_params, made.tokenizer)
            model_directory.save(self._directory, made.description, *parameters, *text)
            del made, parameters, text
        description = model_directory.describe(self._directory)
        self._check(description)
        unused = {"text_encoder"} if self._decode else {"text_encoder", "vae"}
        names = [name for name in description.networks if name not in unused]
        configs = {name: dataclasses.asdict(description.networks[name]) for name in names}
        files = {name: str(self._folder / f"{name}.safetensors") for name in names}
        for name in names:
            exporting.export(self._directory, name, files[name])
        family = description.family
        model = {"family": family, "refiner": None, "vae": None, **configs, "files": files}
        found = self._pipe("float32").model.fingerprints
        return {
            "model": {**model, "guided_channels": description.guided_channels},
            "sha256": {name: found[name] for name in names},
            "backend": jax.default_backend(),
        }

    def _check(self, description: Description) -> None:
        """Refuses what the other side does not state."""
        if self._family == "unet":
            if description.family != "unet":
                raise InputError(
                    "this is beside diffusers' U-Net of texts, and the model is none; for a SiT "
                    "take benchmarks/torch_sit.py"
                )
        elif description.family != "sit" or not description.predictor.num_classes:
            raise InputError("the PyTorch side states class-conditional SiT models, and no others")
        elif description.predictor.reversed_time:
            raise InputError("the PyTorch side does not state REPA's reversed clock")
        if self._decode and description.vae is None:
            raise InputError("this model has no VAE to decode with; leave --decode out")

    def guidance(self, how: dict[str, Any]) -> tuple[str, float]:
        """The mode and the scale of guidance that a request comes to.

        Raises:
          InputError: the model cannot be sampled so.
        """
        resolved = resolve(
            model_directory.describe(self._directory),
            how["schedule"],
            how["guidance_scale"],
            how["guidance"],
        )
        return resolved.guidance, float(resolved.scale)

    def start(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Noise `[count, H, W, C]` of the first images of seed 0, and what they are to show.

        That is labels `[count]` int32; of a model of texts, random text states
        `[count, 2, L, text_width]` float32, of a text and of what guidance leads away from.
        """
        description = model_directory.describe(self._directory)
        predictor = description.predictor
        indices = jnp.arange(count, dtype=jnp.uint32)
        noise = path.sample_noise(jnp.zeros_like(indices), indices, predictor.shape)
        if description.takes_text:
            shape = (count, 2, description.text_encoder.max_length, predictor.text_width)
            return np.asarray(noise), np.random.default_rng(0).standard_normal(shape, np.float32)
        return np.asarray(noise), np.arange(count, dtype=np.int32) % predictor.num_classes

    def latents(
        self, dtype: str, how: dict[str, Any], noise: np.ndarray, labels: np.ndarray
    ) -> np.ndarray:
        """Latents `[B, H, W, C]` from what `start` gives."""
        return np.asarray(self._pipe(dtype).sample_latents(jnp.asarray(noise), labels, **how))

    def images(
        self, dtype: str, how: dict[str, Any], noise: np.ndarray, labels: np.ndarray
    ) -> np.ndarray:
        """Images `[B, H, W, 3]` uint8 of seed 0, whose noise the library makes anew."""
        del noise
        return np.asarray(self._pipe(dtype)(labels, **how))

    def seconds(self, what: str, calls: int, *given: Any) -> float:
        """Mean wall time of calls of `latents` or `images`, results on the host, in s."""
        function = getattr(self, what)
        begin = time.perf_counter()
        for _ in range(calls):
            function(*given)
        return (time.perf_counter() - begin) / calls

    def _pipe(self, dtype: str) -> Generation:
        """The model in a dtype; that of the latest one is kept."""
        if self._loaded[0] != dtype:
            self._loaded = (None, None)
            jax.clear_caches()
            kind = StatesToImage if self._family == "unet" else ClassToImage
            self._loaded = (dtype, kind.load(self._directory, dtype))
        return self._loaded[1]


def _described(size: str, vae: bool) -> Description:
    """A model of a published size, or the small one, at the size of images it is made for."""
    if size != SMALL:
        return random_model.describe(size, random_model.default_size(size), vae)
    full = random_model.describe("SD 1.x U-Net", 64, vae)
    predictor = UNetConfig(full.predictor.sample_size, **SMALL_UNET)
    return dataclasses.replace(
        full,
        predictor=predictor,
        refiner=predictor.refiner(),
        vae=VAEConfig(**SMALL_VAE) if vae else None,
        text_encoder=dataclasses.replace(full.text_encoder, **SMALL_TEXT),
    )


class Asked:
    """The other end: starts the process, asks it, and ends it when left.

    Args:
      **given: of `JaxSide`.
    """

    def __init__(self, **given: Any):
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the GPU is shared with PyTorch
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, given), daemon=True)
        self._process.start()
        other.close()

    def __enter__(self) -> "Asked":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()

    def __call__(self, name: str, *given: Any) -> Any:
        """What a method of `JaxSide` returns.

        Raises:
          InputError: as that method, or the process has ended.
        """
        try:
            self._connection.send((name, given))
            value, refusal = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise InputError(
                f"the process that runs the library ended with code {self._process.exitcode}; "
                "what it said stands above, and if nothing, memory was short"
            ) from error
        if refusal is not None:
            raise InputError(refusal)
        return value


def _serve(connection: Connection, given: dict[str, Any]) -> None:
    """Answers until it is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's to answer
    side = JaxSide(**given)
    with contextlib.suppress(EOFError):
        while True:
            name, arguments = connection.recv()
            try:
                connection.send((getattr(side, name)(*arguments), None))
            except InputError as error:
                connection.send((None, str(error)))

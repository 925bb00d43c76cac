"""A predictor without network error: the exact velocity of a flow to a mixture of Gaussians.

Its parameters are fitted to data, not trained (`flowturbo_jax.mixtures.fit`). What a sampler makes
of it differs from the mixture by the sampler's own error alone.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from flowturbo_jax.interfaces import BatchTime, InputError, Labels, Latents, Params, Time, Velocity
from flowturbo_jax.models.sit import SiTConfig


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Size of a class-conditional mixture of Gaussians, validated at construction.

    Attributes:
      input_size: side of the square latents, in latent pixels.
      in_channels: channels of the latents, and of the velocity.
      num_classes: number of labels, 1 or more; `num_classes` itself means "no label".
      components: Gaussians of each class.
    """

    input_size: int
    in_channels: int
    num_classes: int
    components: int

    takes_text: ClassVar[bool] = False  # its condition is labels

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise InputError(
                    f"mixture {field.name} is {value!r}; it must be a positive integer"
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape [H, W, C] of the latents the flow moves."""
        return (self.input_size, self.input_size, self.in_channels)

    @property
    def dimensions(self) -> int:
        """D: values in one sample's latents."""
        return math.prod(self.shape)

    @property
    def gaussians(self) -> int:
        """K: Gaussians of all classes together, in the order of the classes."""
        return self.num_classes * self.components

    @property
    def null_label(self) -> int:
        """The label that means the whole mixture."""
        return self.num_classes

    @property
    def size_name(self) -> None:
        """No published size."""
        return None

    def refiner(self, **fields: Any) -> SiTConfig:
        """The refiner's network: one SiT block over [x, v]; `fields` overrides."""
        own = {
            "input_size": self.input_size,
            "in_channels": self.in_channels,
            "num_classes": self.num_classes,
            "patch_size": math.gcd(self.input_size, 2),
            "hidden_size": 96,  # as wide as the refiner of the shipped digits model
            "num_heads": 3,
            "depth": 1,
            "learn_sigma": False,
            "in_channels_scale": 2,
        }
        return SiTConfig(**{**own, **fields})

    def check_refiner(self, refiner: SiTConfig) -> None:
        """Refuses a refiner that was made for another model.

        Raises:
          InputError: it does not take [x, v] of these latents and classes.
        """
        self.refiner().check_refiner(refiner)


class Mixture(nn.Module):
    """Exact velocity of the flow from standard normal noise to the mixture, under a label.

    Attributes:
      config: the sizes.
      dtype: float32, whatever is given: in less, eigenvectors are not orthogonal, and the velocity
        would not be exact. So a model in bfloat16 has only its refiner in it.
    """

    config: MixtureConfig
    dtype: Any = jnp.float32

    def __post_init__(self):
        self.dtype = jnp.float32
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Latents, t: Time | BatchTime, labels: Labels) -> Velocity:
        """Evaluates the velocity.

        Args:
          x: latents `[B, H, W, C]` float.
          t: flow time, `[]` or `[B]` float32.
          labels: `[B]` int: flow to the Gaussians of that class; `num_classes`: to all of them.

        Returns:
          Velocity `[B, H, W, C]`, dtype of x.
        """
        config = self.config
        count, dimensions = config.gaussians, config.dimensions
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        weights = self.param(
            "log_weights", nn.initializers.constant(-math.log(count)), (count,), jnp.float32
        )
        gaussians = {
            "means": self.param("means", zeros, (count, dimensions), jnp.float32),
            "eigenvalues": self.param("eigenvalues", ones, (count, dimensions), jnp.float32),
            "eigenvectors": self.param(
                "eigenvectors",
                lambda _, shape: jnp.broadcast_to(jnp.eye(dimensions, dtype=jnp.float32), shape),
                (count, dimensions, dimensions),
            ),
        }
        classes = jnp.arange(count, dtype=labels.dtype) // config.components
        wanted = labels[:, None]
        allowed = (classes[None] == wanted) | (wanted == config.null_label)
        with jax.default_matmul_precision("highest"):
            v = mixture_velocity(
                rearrange(x, "b h w c -> b (h w c)").astype(jnp.float32),
                jnp.broadcast_to(t, x.shape[:1]).astype(jnp.float32),
                jnp.where(allowed, weights[None], -jnp.inf),
                **gaussians,
            )
        return v.reshape(x.shape).astype(x.dtype)

    @nn.nowrap
    def initialise(self, key: jax.Array) -> Params:
        """Parameters with which every Gaussian is the noise's own, so that nothing moves."""
        x = jnp.zeros((1, *self.config.shape))
        return self.init(key, x, jnp.zeros(()), jnp.zeros((1,), jnp.int32))["params"]


def mixture_velocity(
    x: Float[Array, "batch values"],
    t: BatchTime,
    log_weights: Float[Array, "batch gaussians"],
    means: Float[Array, "gaussians values"],
    eigenvalues: Float[Array, "gaussians values"],
    eigenvectors: Float[Array, "gaussians values values"],
) -> Float[Array, "batch values"]:
    """The mean of `x1 - x0` among all paths `(1 - t) x0 + t x1` that pass through x at t.

        v   = Σ_k p(k | x) v_k
        v_k = μ_k + (t Σ_k - (1 - t) I) S_k⁻¹ (x - t μ_k),    S_k = (1 - t)² I + t² Σ_k
        p(k | x) ∝ w_k N(x; t μ_k, S_k)

    S_k is diagonal in the eigenvectors of Σ_k at every t, and positive where the eigenvalues are.

    Args:
      x: points on the paths `[B, D]`.
      t: flow time `[B]`, dtype of x, as of all the rest.
      log_weights: log w_k for each sample `[B, K]`, up to a constant; -inf leaves a Gaussian out.
      means: μ_k `[K, D]`.
      eigenvalues: of Σ_k `[K, D]`, above 0.
      eigenvectors: of Σ_k `[K, D, D]`, in columns.

    Returns:
      Velocity `[B, D]`.
    """
    t = t[:, None, None]
    from_mean = x[:, None] - t * means[None]
    y = jnp.einsum("bkd,kde->bke", from_mean, eigenvectors)
    variance = (1 - t) ** 2 + t**2 * eigenvalues[None]
    log_density = -0.5 * (y**2 / variance + jnp.log(variance)).sum(-1)
    nearness = jax.nn.softmax(log_weights + log_density, axis=-1)
    gain = (t * eigenvalues[None] - (1 - t)) / variance
    return nearness @ means + jnp.einsum(
        "bke,kde->bd", nearness[..., None] * gain * y, eigenvectors
    )

"""How steady a model's velocity is along its trajectories, and what keeping or refining it errs.

Source: PAPER section 7, figure 1. The paper draws "the curvature" of the sequence of model outputs
and does not define it exactly; what is measured here is defined in `Stability`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from flowturbo_jax import parallel, path, sampler, stopping
from flowturbo_jax.class_names import label_of
from flowturbo_jax.growing_arrays import GrowingArrays
from flowturbo_jax.interfaces import Flow, InputError, Latents
from flowturbo_jax.model_description import Description
from flowturbo_jax.model_directory import Model
from flowturbo_jax.pipelines import programs
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.evaluation import protocol_card
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.quantization import cast
from flowturbo_jax.schedule import Schedule

LEAST_STEPS = 3  # a second difference needs as many velocities
MOST_STEPS = 1000  # float32 rounds v by 6e-8, of which steps² shows in the curvature
LABELS = 10  # so many classes stand for all of them
CARD = (  # what of the card of an evaluation these numbers depend on
    "steps",
    "guidance",
    "guidance_scale",
    "guidance_interval",
    "guided_channels",
    "dtype",
    "seed",
    "samples",
    "predictor_sha256",
    "refiner_sha256",
    "device",
    "devices",
    "versions",
)


class Stability(NamedTuple):
    """What N Euler steps show; v_i is the velocity that moves x at t_i = i / N, guidance included.

    |.| is the Euclidean norm over a sample and dt = 1 / N. No number has a unit of v.

    Attributes:
      curvature: `[B, N - 2]`, |v_{i+1} - 2 v_i + v_{i-1}| / (|v_i| dt²) at t_i, i = 1 to N - 2: the
        relative second difference per flow time squared; 0 where v changes at a steady rate.
      keep: `[B, N - 1]`, |v_{i-1} - v_i| / |v_i| at t_i, i = 1 to N - 1: the error of the velocity
        of the step before. Where guidance has an interval, as that one counts at t_i.
      refine: `[B, N - 1]`, |v_{i-1} + r(x_i, v_{i-1}, t_i) - v_i| / |v_i| at the same t_i: its
        error once the refiner r has corrected it, guided as in sampling; None without a refiner.
      finite: `[B, N]`, whether v_i is.
    """

    curvature: Float[Array, "batch inner"]
    keep: Float[Array, "batch later"]
    refine: Float[Array, "batch later"] | None
    finite: Bool[Array, "batch steps"]


def trace(flow: Flow, noise: Latents, steps: int) -> Stability:
    """Follows a flow by Euler steps and measures its velocities; pure.

    Args:
      flow: the vector field, guidance and refiner included.
      noise: where to start, `[B, ...]` float.
      steps: N, at least 3. All N points and velocities are held at once.

    Raises:
      InputError: as `sampler.sample`.
    """
    schedule = Schedule.parse(f"E{steps}")
    # Of step i, from t_i to t_{i+1}: the point it reaches, and the memory of v_i.
    _, (reached, memories) = sampler.integrate(
        flow, noise, schedule, observe=lambda state: (state.x, state.memory)
    )
    v = jax.lax.map(flow.drift, memories)
    times = schedule.time_grid(dtype=noise.dtype)[1:-1]
    before = (reached[:-1], times, jax.tree.map(lambda memory: memory[:-1], memories))

    def keep(x, t, memory):
        return flow.drift(flow.recall(memory, t))

    def refine(x, t, memory):
        kept = flow.recall(memory, t)
        return flow.drift(jax.tree.map(jnp.add, kept, flow.refine(x, t, kept)))

    def error_of(guess) -> jax.Array:
        guessed = jax.lax.map(lambda arguments: guess(*arguments), before)
        return _relative(guessed - v[1:], v[1:])

    return Stability(
        curvature=_relative(v[2:] - 2 * v[1:-1] + v[:-2], v[1:-1]) * steps**2,
        keep=error_of(keep),
        refine=None if flow.refine is None else error_of(refine),
        finite=jnp.isfinite(v).all(axis=tuple(range(2, v.ndim))).T,
    )


def _relative(difference: jax.Array, v: jax.Array) -> jax.Array:
    """|difference| / |v| per sample, `[B, times]`; no difference is 0 even where v is."""

    def norm(a: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.square(a).sum(axis=tuple(range(2, a.ndim)))).T

    return norm(difference) / jnp.maximum(norm(v), jnp.finfo(v.dtype).tiny)


class Samples(NamedTuple):
    """Every noise under every label; sample i is noise i // L under labels[i % L].

    Attributes:
      seed: noise n is that of image n of this seed.
      noises: how many.
      labels: `[L]`.
    """

    seed: int
    noises: int
    labels: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many trajectories there are."""
        return self.noises * len(self.labels)

    def name(self, index: int) -> str:
        """A sample in words."""
        noise, label = divmod(index, len(self.labels))
        return f"noise {noise} of seed {self.seed} under label {self.labels[label]}"


def choose_labels(description: Description, text: str | None = None) -> tuple[int, ...]:
    """The labels to measure.

    Args:
      description: of the model.
      text: class numbers or names, separated by commas; None for 10 classes spread over all.

    Raises:
      InputError: the model has no such class.
    """
    classes = description.predictor.num_classes
    if text is None:
        last = max(classes, 1) - 1
        return tuple(dict.fromkeys(round(i) for i in np.linspace(0, last, LABELS).tolist()))
    labels = tuple(dict.fromkeys(label_of(n, description.class_names) for n in text.split(",")))
    if wrong := [label for label in labels if not 0 <= label < max(classes, 1)]:
        has = f"the classes 0 to {classes - 1}" if classes else "no classes: use label 0"
        raise InputError(f"label {wrong[0]} is out of range; this model has {has}")
    return labels


def describe(pipe: ClassToImage, plan: Plan, samples: Samples) -> dict[str, Any]:
    """The protocol card: all that the numbers depend on, and nothing measured."""
    card = protocol_card(
        pipe, plan, seed=samples.seed, samples=samples.count, batch_size=1, judges=None
    )
    return {key: card[key] for key in CARD} | {
        "dt": 1 / plan.schedule.steps,
        "noises": samples.noises,
        "labels": list(samples.labels),
    }


def open_rows(work: Path, card: Mapping[str, Any]) -> GrowingArrays:
    """Where the samples' numbers are kept until all are there, one row each.

    Args:
      work: folder, of this measurement alone.
      card: of `describe`; rows of another are removed.

    Raises:
      InputError: the folder cannot be written to.
    """
    steps = card["steps"]
    columns = {"curvature": (np.float32, (steps - 2,)), "keep": (np.float32, (steps - 1,))}
    if card["refiner_sha256"] is not None:
        columns["refine"] = (np.float32, (steps - 1,))
    return GrowingArrays(work, dict(card), columns)


def measure(
    model: Model,
    plan: Plan,
    samples: Samples,
    rows: GrowingArrays,
    *,
    batch_size: int = 64,
    on_images: Callable[[int, int], Any] = max,
) -> dict[str, np.ndarray]:
    """Traces every sample that has no row yet, on all devices of this process.

    Numbers depend neither on the batch size nor on interruptions, but for rounding.

    Args:
      model: whose velocity it is.
      plan: Euler steps and the guidance, from `ClassToImage.plan`.
      samples: what to trace.
      rows: of `open_rows`; they stay until the caller removes them.
      batch_size: samples at once, over all devices.
      on_images: told how many samples are done, and of how many, first of those done before.

    Returns:
      `curvature` [S, N - 2], `keep` [S, N - 1] and, of a model with a refiner, `refine` [S, N - 1].

    Raises:
      InputError: a velocity is not finite, or the rows cannot be written; what was made is kept.
      KeyboardInterrupt: SIGINT or SIGTERM asked to stop; what was made is kept.
    """
    count, devices = samples.count, parallel.local_devices()
    size = -(-min(batch_size, count) // devices) * devices
    traced = _on_all_devices(model, plan)
    labels = np.asarray(samples.labels, np.int32)
    on_images(rows.rows, count)
    with stopping.requests() as stop:
        while rows.rows < count:
            if stop.is_set():
                raise KeyboardInterrupt
            first = rows.rows
            index = np.minimum(np.arange(first, first + size), count - 1)
            noises, which = np.divmod(index, len(labels))
            seeds = np.full(size, samples.seed, np.uint32)
            batch = (seeds, noises.astype(np.uint32), labels[which])
            new = min(size, count - first)
            found = jax.tree.map(lambda a, new=new: a[:new], jax.device_get(traced(batch)))
            _refuse_not_finite(found, first, samples, plan.schedule.steps)
            values = found._asdict()
            rows.append(**{k: v for k, v in values.items() if k != "finite" and v is not None})
            on_images(rows.rows, count)
    names = ("curvature", "keep") if model.refiner is None else ("curvature", "keep", "refine")
    return {name: np.array(rows.read(name)) for name in names}


def _on_all_devices(model: Model, plan: Plan) -> Callable[[Any], Stability]:
    """`trace` of a batch of (seeds, noises, labels), `[B]` each, as one compiled program."""
    networks, (scale, interval, _) = programs.Networks(model), plan.arguments
    params = cast((model.predictor_params, model.refiner_params), model.predictor.dtype)

    def share(frozen: Any, batch: Any) -> Stability:
        params, scale, interval = frozen
        seeds, noises, labels = batch
        noise = path.sample_noise(seeds, noises, networks.config.shape)
        flow = programs.make_flow(networks, params, labels, scale, interval, plan.guidance)
        return trace(flow, noise, plan.schedule.steps)

    mapped = parallel.map_batch(share)
    frozen = parallel.replicate((params, scale, interval))
    return lambda batch: mapped(frozen, batch)


def _refuse_not_finite(found: Stability, first: int, samples: Samples, steps: int) -> None:
    checks = [("velocity", found.finite, 0), ("curvature", np.isfinite(found.curvature), 1)]
    if found.refine is not None:
        checks.append(("refined velocity", np.isfinite(found.refine), 1))
    for what, finite, start in checks:
        if not finite.all():
            sample, time = np.argwhere(~finite)[0]
            raise InputError(
                f"the {what} at t = {(start + time) / steps:g} is not finite, of "
                f"{samples.name(first + int(sample))}; look at the weights, the guidance scale and "
                "the dtype"
            )


def summarise(values: Float[np.ndarray, "samples times"]) -> dict[str, list[float]]:
    """Mean, standard deviation, and 10 and 90 % quantiles over the samples, one per time."""
    values = values.astype(np.float64)
    low, high = np.quantile(values, [0.1, 0.9], axis=0)
    columns = {"mean": values.mean(axis=0), "std": values.std(axis=0), "q10": low, "q90": high}
    return {name: column.tolist() for name, column in columns.items()}

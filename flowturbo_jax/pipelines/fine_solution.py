"""The solution of a model's flow by a solver of fifth order with an error control, kept on disk."""

import hashlib
import json
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowturbo_jax.interfaces import InputError, Labels, Latents
from flowturbo_jax.pipelines import programs
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.plan import Plan

METHOD = "Tsit5, guided all of the time, in float32"  # in words, for protocol cards
TOLERANCE = 1e-5  # of each step, relative and absolute; float32 networks round at about 1e-6
MAX_STEPS = 2000  # attempted by the solver


@partial(jax.jit, static_argnames=("networks", "guidance", "points"))
def _solve(
    params: Any,
    noise: Latents,
    labels: Labels,
    scale: jax.Array,
    *,
    networks: programs.Networks,
    guidance: str,
    points: int,
) -> tuple[Float[Array, "points batch *point"], jax.Array, jax.Array]:
    """Latents at `points` even times after 0, whether the solver reached 1, and its steps."""
    import diffrax

    flow = programs.make_flow(networks, params, labels, scale, None, guidance)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, x, _: flow.drift(flow.predict(x, jnp.asarray(t, x.dtype)))),
        diffrax.Tsit5(),
        t0=0.0,
        t1=1.0,
        dt0=None,
        y0=noise,
        stepsize_controller=diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE),
        saveat=diffrax.SaveAt(ts=np.linspace(0, 1, points + 1)[1:]),
        max_steps=MAX_STEPS,
        throw=False,
    )
    done = solution.result == diffrax.RESULTS.successful
    return solution.ys, done, solution.stats["num_steps"]


def fine_solution(
    pipe: ClassToImage,
    noise: np.ndarray,
    labels: np.ndarray,
    plan: Plan,
    cache: Path,
    batch_size: int = 64,
    on_images: Any = max,
    points: int = 1,
) -> np.ndarray:
    """The data end of the guided flow from given noise, by Tsit5 with a tight tolerance.

    Guidance acts all of the time, whatever the plan's interval: this is what a schedule is to come
    near. Batches that were solved before, by the same networks from the same noise, are read.

    Args:
      pipe: the model, whose networks compute in float32.
      noise: `[N, H, W, C]` float32.
      labels: `[N]` int32.
      plan: guidance mode and scale; its schedule and interval do not matter.
      cache: folder for solutions, one file per batch.
      batch_size: solved at once; the solver's steps are those the batch as a whole needs.
      on_images: told how many are solved, and of how many.
      points: of the way to be had, at so many even times after 0, the last of which is the end.

    Returns:
      Latents `[N, H, W, C]` float32; for several points `[N, points, H, W, C]`.

    Raises:
      InputError: the solver does not reach the end, or the cache cannot be written.

    Source: Tsitouras 2011, "Runge-Kutta pairs of order 5(4)"; diffrax's implementation.
    """
    parts = []
    for first in range(0, len(noise), batch_size):
        rows = slice(first, first + batch_size)
        key = _key(pipe, noise[rows], labels[rows], plan)
        file = cache / (f"{key}.npz" if points == 1 else f"{key}-{points}.npz")
        shape = noise[rows].shape
        found = _read(file, (shape[0], points, *shape[1:]) if points > 1 else shape)
        if found is None:
            found = _solved(pipe, noise[rows], labels[rows], plan, points)
            _write(file, found)
        parts.append(found)
        on_images(min(first + batch_size, len(noise)), len(noise))
    return np.concatenate(parts)


def _solved(pipe: ClassToImage, noise: Any, labels: Any, plan: Plan, points: int) -> np.ndarray:
    settings: dict[str, Any] = {"networks": programs.Networks(pipe.model)}
    settings |= {"guidance": plan.guidance, "points": points}
    scale = plan.arguments[0]
    found, done, steps = _solve(
        pipe.params, jnp.asarray(noise), jnp.asarray(labels), scale, **settings
    )
    found = np.asarray(found[0] if points == 1 else found.swapaxes(0, 1))
    if not bool(done) or not np.isfinite(found).all():
        raise InputError(
            f"the fine solution failed after {int(steps)} steps: the velocity is not finite or not "
            "smooth; look at the weights and the guidance scale"
        )
    return found


def _key(pipe: ClassToImage, noise: np.ndarray, labels: np.ndarray, plan: Plan) -> str:
    description = pipe.model.description
    identity = {
        "predictor": pipe.model.fingerprints["predictor"],
        "network": repr(pipe.model.predictor),
        "guidance": plan.guidance,
        "scale": float(plan.scale),
        "guided_channels": description.guided_channels if plan.guidance == "official" else None,
        "tolerance": TOLERANCE,
        "labels": np.asarray(labels).tolist(),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(noise).tobytes())
    return digest.hexdigest()[:32]


def _read(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The solution in a file, or None if there is none, or it is damaged: it is made anew."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
            found = stored["latents"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    whole = found.shape == shape and found.dtype == np.float32 and np.isfinite(found).all()
    return found if whole else None


def _write(file: Path, latents: np.ndarray) -> None:
    draft = file.with_name(f".{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as opened:
            np.savez(opened, latents=latents)
        draft.replace(file)
    except OSError as error:
        raise InputError(
            f"cannot write {file.parent}: {error.strerror}; choose another --out"
        ) from error

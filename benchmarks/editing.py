"""What editing, inpainting, removal and inversion are worth, on the real digits.

  python benchmarks/editing.py --out runs/editing.json --pictures runs/editing

Works on every fourth real digit: the classifier that judges the results was not fitted on those.
Prints the tables of docs/tasks.md as it goes, writes all numbers as JSON, and draws the pictures.
Each task is measured with Heun and with FlowTurbo; seeds give mean and standard deviation.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from flowturbo_jax import data, images, inpainting, path, sampler
from flowturbo_jax.pipelines import judging, programs
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.schedule import Schedule

SCHEDULES = ("H24", "H8", "H4", "H1P3", "H1P3R2", "H1P5R3")
STRENGTHS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
TRIES = (1, 2, 4)
INVERSIONS = ("H12", "H1P11", "H12@0.5", "H1P5R3", "H1P3R2", "H6", "H1P5", "H24")
KEPT = ("x", "x and memory", "flow")  # what is put back in the known region
SHIFT = 3  # a digit becomes the one so many further


class Digits:
    """Real digits and what judges them."""

    def __init__(self, count: int | None):
        pixels, labels = data.arrays(data.open_source("digits"))
        chosen = slice(3, None, 4)
        self.images = np.asarray(images.to_uint8(pixels[chosen]))[:count]
        self.labels = np.asarray(labels[chosen], np.int32)[:count]
        self.others = (self.labels + SHIFT) % 10
        self.judges = judging.digits_judges()
        self.lower = np.zeros(self.images.shape[1:3], bool)
        self.lower[4:] = True

    def score(self, made: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Label accuracy and Fréchet distance to all real digits."""
        found = judging.judge(np.asarray(made), labels, self.judges)
        scores = judging.score(found, self.judges)
        return {"accuracy": scores["label_accuracy"], "frechet": scores["frechet_distance"]}


def rmse(made: Any, others: Any) -> float:
    """Root mean square of a difference of bytes, relative to the second's, in [-1, 1]."""
    made, others = (np.asarray(x, np.float64) / 127.5 - 1 for x in (made, others))
    return float(np.sqrt(np.mean((made - others) ** 2) / np.mean(others**2)))


def over_seeds(measure: Callable[[int], dict[str, float]], seeds: range) -> dict[str, Any]:
    """Mean and standard deviation of each number over seeds."""
    found = [measure(seed) for seed in seeds]
    return {
        name: [float(statistic([each[name] for each in found])) for statistic in (np.mean, np.std)]
        for name in found[0]
    }


def counts(text: str, factor: int = 1) -> dict[str, Any]:
    """A schedule and its evaluations."""
    schedule = Schedule.parse(text)
    evaluations = schedule.predictor_evaluations * factor
    return {
        "schedule": text,
        "evaluations": evaluations,
        "refiner": schedule.refiner_evaluations * factor,
    }


def inpainting_rows(pipe: ClassToImage, digits: Digits, seeds: range) -> Iterator[dict[str, Any]]:
    """The lower half of each digit, painted anew under its label."""
    for text in SCHEDULES:
        for tries in TRIES if text in ("H8", "H1P3R2") else TRIES[:1]:

            def measure(seed: int, text: str = text, tries: int = tries) -> dict[str, float]:
                made = pipe.inpaint(
                    digits.images,
                    digits.lower,
                    digits.labels,
                    seeds=seed,
                    schedule=text,
                    tries=tries,
                )
                made = np.asarray(made)
                changed = (made != digits.images)[:, ~digits.lower].sum()
                return digits.score(made, digits.labels) | {"known pixels changed": changed}

            yield counts(text, tries) | {"tries": tries} | over_seeds(measure, seeds)


@partial(jax.jit, static_argnames=("networks", "schedule", "kept"))
def inpainted(params, pixels, free, labels, seeds, indices, networks, schedule, kept):
    """Inpainting with what is put back in the known region after each step as a choice."""
    picture = images.from_uint8(pixels)
    noise = path.sample_noise(seeds, indices, picture.shape[1:])
    known = inpainting.Known(noise, picture, free)
    scale = jnp.float32(1.5)
    flow = programs.make_flow(networks, params, labels, scale, None, "paired")

    def after_step(state, t):
        state = known.after_step(state, t)
        return state if kept == "x" else state._replace(memory=known.remember(state.memory))

    flow = known.pinned(flow) if kept == "flow" else flow
    return images.to_uint8(sampler.sample(flow, noise, schedule, after_step=after_step))


def memory_rows(pipe: ClassToImage, digits: Digits, seeds: range) -> Iterator[dict[str, Any]]:
    """The same with each choice of what is put back in the known region."""
    networks = programs.Networks(pipe.model)
    free = digits.lower[None, ..., None]
    indices = np.arange(len(digits.images), dtype=np.uint32)
    for text in ("H8", "H1P3", "H1P3R2", "H1P5R3"):
        for kept in KEPT:

            def measure(seed: int, text: str = text, kept: str = kept) -> dict[str, float]:
                given = (pipe.params, digits.images, free, digits.labels)
                noise = (np.full_like(indices, seed), indices)
                static = {"networks": networks, "schedule": Schedule.parse(text), "kept": kept}
                return digits.score(inpainted(*given, *noise, **static), digits.labels)

            yield counts(text) | {"put back": kept} | over_seeds(measure, seeds)


def edit_rows(
    pipe: ClassToImage, digits: Digits, seeds: range, inverted: bool
) -> Iterator[dict[str, Any]]:
    """Each digit edited into another one, by strength."""
    given = {"source_labels": digits.labels} if inverted else {}
    seeds = seeds[:1] if inverted else seeds
    for text in ("H8", "H1P3R2", "H1P5R3"):
        strangers = [pipe(digits.others, seeds=seed + 100, schedule=text) for seed in seeds]
        for strength in STRENGTHS:

            def measure(
                seed: int,
                text: str = text,
                strength: float = strength,
                strangers: list[jax.Array] = strangers,
            ) -> dict[str, Any]:
                how = {"seeds": seed, "schedule": text}
                made = pipe.edit(digits.images, digits.others, strength=strength, **how, **given)
                pair = (made, strangers[seed])
                near, far = (
                    np.mean((np.asarray(x, np.float64) - digits.images) ** 2, axis=(1, 2, 3))
                    for x in pair
                )
                return {
                    "change": rmse(made, digits.images),
                    "accuracy": digits.score(made, digits.others)["accuracy"],
                    "still the source": digits.score(made, digits.labels)["accuracy"],
                    "change of a stranger": rmse(strangers[seed], digits.images),
                    "nearer than it": float(np.mean(near < far)),
                }

            yield counts(text) | {"strength": strength} | over_seeds(measure, seeds)


def inversion_rows(pipe: ClassToImage, digits: Digits, seeds: range) -> Iterator[dict[str, Any]]:
    """To the noise and back, under the same label, without guidance and with it."""
    del seeds  # nothing here is drawn
    for text in INVERSIONS:
        schedule = Schedule.parse(text)
        way = text if not schedule.needs_refiner else sampler.INVERSION
        row = {"there": way, **counts(text)}
        for name, scale in (("error", None), ("error, guidance 1.5", 1.5)):
            noise = pipe.invert(digits.images, digits.labels, schedule=way, guidance_scale=scale)
            how = {"guidance": "none"} if scale is None else {"guidance_scale": scale}
            back = pipe.sample_latents(noise, digits.labels, schedule=text, **how)
            row[name] = [rmse(pipe.decode(back), digits.images), 0.0]
        yield row


def removal_rows(pipe: ClassToImage, digits: Digits, seeds: range) -> Iterator[dict[str, Any]]:
    """A patch of noise stuck on each digit, removed without a label and with it."""
    stained, mask = stain(digits)
    wrong = digits.score(stained, digits.labels)["accuracy"]
    for text in SCHEDULES:
        for labelled in (False, True):

            def measure(seed: int, text: str = text, labelled: bool = labelled) -> dict[str, float]:
                labels = digits.labels if labelled else None
                made = pipe.remove(stained, mask, labels, margin=0, seeds=seed, schedule=text)
                accuracy = digits.score(made, digits.labels)["accuracy"]
                return {"accuracy": accuracy, "error": rmse(made, digits.images)}

            row = counts(text) | {"label given": labelled, "accuracy stained": [wrong, 0.0]}
            yield (
                row
                | {"error stained": [rmse(stained, digits.images), 0.0]}
                | over_seeds(measure, seeds)
            )


@cache
def stain(digits: Digits) -> tuple[np.ndarray, np.ndarray]:
    """The digits with a patch of 3 x 3 random pixels in the middle, and where it is."""
    mask = np.zeros(digits.images.shape[1:3], bool)
    mask[3:6, 3:6] = True
    noise = np.random.default_rng(0).integers(0, 256, digits.images.shape, dtype=np.uint8)
    return np.where(mask[..., None], noise, digits.images), mask


TASKS = {
    "inpaint": inpainting_rows,
    "memory": memory_rows,
    "edit": partial(edit_rows, inverted=False),
    "edit by inversion": partial(edit_rows, inverted=True),
    "invert": inversion_rows,
    "remove": removal_rows,
}


def markdown(row: dict[str, Any], head: bool) -> str:
    """A row of a table; with its head in front."""

    def cell(name: str, value: Any) -> str:
        if not isinstance(value, list):
            return str(value)
        percent = name.startswith(("accuracy", "nearer", "still"))
        mean, deviation = (100 * x if percent else x for x in value)
        digits = 1 if percent else 0 if "pixels" in name else 3
        text = f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation else "")
        return text + (" %" if percent else "")

    line = "| " + " | ".join(cell(*item) for item in row.items()) + " |"
    if not head:
        return line
    return f"| {' | '.join(row)} |\n|{' --- |' * len(row)}\n{line}"


def draw(pipe: ClassToImage, digits: Digits, folder: Path) -> None:
    """Pictures of each task: what was given, and the results of two schedules."""
    chosen = [int(np.flatnonzero(digits.labels == digit)[1]) for digit in range(10)]
    given, labels, others = digits.images[chosen], digits.labels[chosen], digits.others[chosen]
    stained, spot = stain(digits)

    def hidden(pictures: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return np.where(mask[..., None], np.uint8(128), pictures)

    def panels(first: tuple[str, np.ndarray], make: Callable[[str], Any]) -> Any:
        both = [([f"{text}: {note}"], np.asarray(make(text))) for text, note in NOTES.items()]
        return images.side_by_side([([first[0]], first[1]), *both], columns=5, zoom=6)

    strengths = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]

    def by_strength(text: str) -> np.ndarray:
        made = [
            pipe.edit(given[:5], others[:5], strength=strength, schedule=text, seeds=1)
            for strength in strengths
        ]
        return np.concatenate(made)

    masked = hidden(given, digits.lower)
    images.save_png(
        folder / "inpaint.png",
        panels(
            ("lower half hidden", masked),
            lambda text: pipe.inpaint(given, digits.lower, labels, schedule=text),
        ),
    )
    images.save_png(
        folder / "edit.png",
        panels(("given", given[:5]), by_strength),
    )
    images.save_png(
        folder / "edit_inverted.png",
        panels(
            ("given", given),
            lambda text: pipe.edit(given, others, strength=1, schedule=text, source_labels=labels),
        ),
    )
    images.save_png(
        folder / "remove.png",
        panels(
            ("stained", stained[chosen]),
            lambda text: pipe.remove(stained[chosen], spot, margin=0, schedule=text),
        ),
    )


NOTES = {"H8": "16 evaluations", "H1P3R2": "5 + 4 refiner"}


def say(line: str) -> None:
    """Prints a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="digits")
    parser.add_argument("--tasks", default=",".join(TASKS), help="with commas between")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=None, help="of digits; all if not given")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    parser.add_argument("--pictures", type=Path, default=None, help="folder")
    flags = parser.parse_args()
    pipe, digits = ClassToImage.load(flags.model, say=lambda line: None), Digits(flags.count)
    tables: dict[str, Any] = {}
    for task in flags.tasks.split(",") if flags.tasks else ():
        say(f"\n{task}, {len(digits.images)} digits, {flags.seeds} seeds\n")
        for row in TASKS[task](pipe, digits, range(flags.seeds)):
            tables.setdefault(task, []).append(row)
            say(markdown(row, len(tables[task]) == 1))
    if flags.out is not None:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        flags.out.write_text(json.dumps(tables, indent=1) + "\n")
    if flags.pictures is not None:
        draw(pipe, digits, flags.pictures)


if __name__ == "__main__":
    main()

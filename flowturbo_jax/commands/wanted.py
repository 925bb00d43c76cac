"""What the images of sample.py are to show: classes or texts, each with its seed."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flowturbo_jax import data, model_directory
from flowturbo_jax.class_names import label_of
from flowturbo_jax.commands.progress import say
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_description import PRESET_NAMES
from flowturbo_jax.pipelines import any_model
from flowturbo_jax.pipelines.generation import Generation
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.sample_config import GENERATE, OF_CLASSES, OF_TEXT, SampleConfig
from flowturbo_jax.schedule import Schedule

SAMPLES = 60  # of classes, if nothing says how many
INSTEAD = {
    "labels": "set prompt in its place",
    "source_label": "set source_prompt in its place",
    "prompt": "set labels in its place",
    "prompts_file": "set labels in its place",
    "source_prompt": "set source_label in its place",
}


class Wanted(NamedTuple):
    """What is asked for.

    Attributes:
      count: of images, N.
      rows: what programs get, one row per image: `[N]` labels or `[N, 2, L]` token ids; None where
        nothing in particular is asked for.
      prompts: the text of each image; () of a model of classes.
      seeds: one for all images, which count on; or `[N]`, each image being the first of its seed.
      source: what an image to edit shows, `[1, ...]` of the same; None where it is not said.
      sampling: which image shows what, in a protocol card's words.
      card: what else the card says of all that.
    """

    count: int
    rows: np.ndarray | None
    prompts: tuple[str, ...]
    seeds: Any
    source: np.ndarray | None
    sampling: str
    card: dict[str, Any]

    def of_image(self, index: int) -> dict[str, Any]:
        """What the card of one image says beside that of all."""
        one = {"prompt": self.prompts[index]} if self.prompts else {}
        if np.ndim(self.seeds):
            return {**one, "seed": int(self.seeds[index]), "index": 0}
        return {**one, "seed": self.seeds, "index": index}


def load(config: SampleConfig) -> Generation:
    """The model of a recipe, for images of its size.

    Raises:
      InputError: a key means nothing to such a model, a text or a size cannot be used, or the model
        cannot be loaded.
    """
    description = model_directory.describe(config.model_dir)
    _refuse_others(description.takes_text, config)
    if description.takes_text:
        if config.quantization:
            any_model.refuse_text(config.model_dir, "quantization")
        _texts(config)
        if config.size is not None:
            description.resized(*config.size)
    pipe = any_model.load(config.model_dir, config.dtype, config.quantization or None, say)
    return pipe if config.size is None else pipe.at_size(*config.size)


def schedules(pipe: Generation, config: SampleConfig, guided: tuple[Any, ...]) -> list[str]:
    """The schedules to sample with, baselines first.

    A learnt baseline that the model has no solver for, so guided, is left out, which is said: a
    recipe's baselines are for every model. So is one of a task that starts from an image.

    Args:
      pipe: the model.
      config: the recipe.
      guided: scale, mode and interval of guidance.
    """
    if config.task == GENERATE:
        pipe.plan(config.schedules[-1], *guided)  # so that its refusal stands alone
    kept = []
    for text in config.schedules[:-1]:
        if text not in PRESET_NAMES and Schedule.parse(text).learnt:
            if config.task != GENERATE:
                continue
            try:
                pipe.plan(text, *guided)
            except InputError as error:
                say(f"baseline {text} is left out: {error}")
                continue
        kept.append(text)
    return [*kept, config.schedules[-1]]


def read(pipe: Generation, config: SampleConfig) -> Wanted:
    """What each image of a recipe is to show.

    Raises:
      InputError: nothing is said of that, or the model does not know it.
    """
    texts, choices, source = _choices(pipe, config)
    seeds = config.each_seed
    which, turn = _turns(pipe, config, 1 if choices is None else len(choices))
    card: dict[str, Any] = {}
    if texts:
        digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        card |= {"prompts_sha256": digest, "negative_prompt": config.negative_prompt}
    if seeds:
        card["seed"] = list(seeds)
    return Wanted(
        len(which),
        None if choices is None else choices[which],
        tuple(texts[i] for i in which) if texts else (),
        np.array(seeds, np.uint32)[turn] if seeds else config.seed,
        source,
        _sampling(config, texts),
        card,
    )


def refuse_idle_negative(config: SampleConfig, plans: Sequence[Plan]) -> None:
    """Refuses a negative prompt that nothing would be guided away from.

    Raises:
      InputError: there is one, and no plan is guided.
    """
    if config.negative_prompt and all(plan.guidance == "none" for plan in plans):
        raise InputError(
            "config key negative_prompt is set, but nothing is guided; set guidance_scale above 1, "
            "or leave it out"
        )


def _refuse_others(takes_text: bool, config: SampleConfig) -> None:
    """Refuses what is set for models of the other kind: a user would wait for its effect."""
    kind = "takes texts" if takes_text else "is a model of classes"
    for key in OF_CLASSES if takes_text else OF_TEXT:
        if getattr(config, key):
            raise InputError(
                f"config key {key} is set, but {config.model_dir} {kind}; "
                f"{INSTEAD.get(key, 'leave it out')}"
            )
    if takes_text and config.data:
        raise InputError(
            f"config key data is set, but {config.model_dir} takes texts, whose images python -m "
            "flowturbo_jax evaluate scores; set --config.data=, or take "
            "--config=configs/rectified_flow_t2i.py"
        )


def _texts(config: SampleConfig) -> list[str]:
    """The prompts of a recipe; of "remove" there can be none."""
    texts = list(config.prompts)
    if config.prompts_file:
        texts = data.read_prompts(config.prompts_file)
        if not texts:
            raise InputError(f"{config.prompts_file} has no prompts; write one a line")
    _refuse_none(texts, config, "prompt=TEXT, or prompts_file=FILE")
    return texts


def _refuse_none(found: Sequence[Any], config: SampleConfig, how: str) -> None:
    if not found and config.task != "remove":
        what = {GENERATE: "images show", "invert": "image shows"}.get(config.task, "result shows")
        raise InputError(f"to {config.task}, say what the {what}: --config.{how}")


def _choices(
    pipe: Generation, config: SampleConfig
) -> tuple[list[str], np.ndarray | None, np.ndarray | None]:
    """The texts that take turns, the rows of those or of classes, and those of the source."""
    if pipe.takes_text:
        texts = _texts(config)
        rows = pipe.tokens(texts, config.negative_prompt) if texts else None
        return texts, rows, pipe.tokens(config.source_prompt) if config.source_prompt else None
    description = pipe.model.description
    names, classes = description.class_names, description.predictor.num_classes
    words = [text.strip() for text in config.labels.split(",")] if config.labels else []
    if config.task != GENERATE:
        words = [word for word in words if word]
    found = [label_of(word, names) for word in words]
    if not found and (config.task == GENERATE or not classes):
        found = list(range(max(classes, 1)))
    _refuse_none(found, config, "labels=CLASS")
    source = label_of(config.source_label.strip(), names) if config.source_label else None
    rows = pipe.rows(found) if found else None
    return [], rows, None if source is None else pipe.rows([source])


def _turns(pipe: Generation, config: SampleConfig, choices: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the choices, and which of the seeds, each image has."""
    generated, seeds = config.task == GENERATE, len(config.each_seed)
    asked = config.samples if generated else config.results or None
    every = choices * max(seeds, 1)
    if config.task == "invert" and choices > 1:
        raise InputError(
            "an image is inverted under one label, of what it shows, or one prompt; give only that"
        )
    if (config.source_label or config.source_prompt) and (asked or every) > choices:
        raise InputError(
            f"{asked or every} results of {choices} label(s) or prompt(s) would repeat themselves: "
            "an inverted image is edited without noise; leave out config.results and config.seeds"
        )
    if asked is not None:
        image = np.arange(asked)
        return image % choices, image % max(seeds, 1)
    if generated and not pipe.takes_text and not (config.labels and seeds):
        every = min(SAMPLES, every) if seeds else SAMPLES
    image = np.arange(every)
    return image % choices, image // choices % max(seeds, 1)


def _sampling(config: SampleConfig, texts: Sequence[str]) -> str:
    """What a protocol card says of which image shows what."""
    if texts:
        return "in turn"
    if config.labels:
        return f"in turn: {config.labels}"
    return "balanced" if config.task == GENERATE else "none"

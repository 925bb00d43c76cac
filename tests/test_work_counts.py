"""What the compiled samplers do, counted: a regression shows on any machine, however slow.

Bounds are what was counted when they were written plus a few percent, but for products, which are
counted by hand. Raise one only with the reason beside it.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from traced_programs import equations

from flowturbo_jax import cost, model_directory
from flowturbo_jax.model_description import Description
from flowturbo_jax.model_directory import Model, abstract_params, modules
from flowturbo_jax.models import SiTConfig
from flowturbo_jax.pipelines import programs
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.plan import resolve
from flowturbo_jax.schedule import Schedule

BATCH = 4
# Programs on the device that need the host: whatever JAX or XLA calls them.
HOST_PRIMITIVES = {"pure_callback", "io_callback", "debug_callback", "debug_print", "infeed"}
HOST_INSTRUCTIONS = re.compile(r"\b(infeed|outfeed|send|recv|copy-start)\(|xla_python|callback")


def small_sit():
    """SiT-S/2 at 256 x 256, of which only the shapes are there."""
    config = SiTConfig.named("SiT-S/2", input_size=32, in_channels=4, num_classes=1000)
    return Description(
        family="sit",
        predictor=config,
        refiner=config.refiner(),
        class_names=tuple(map(str, range(1000))),
        guidance="official",
        guidance_scale=1.5,
        guided_channels=3,
        source={},
    )


DESCRIPTIONS = {
    "digits": lambda: model_directory.describe("digits"),
    "SiT-S/2": small_sit,
}


def sampler(name, schedule, interval=None, batch=BATCH):
    """The whole sampler, from seeds to bytes, and the shapes of its arguments."""
    description = DESCRIPTIONS[name]()
    built = modules(description)
    shapes = {network: abstract_params(module) for network, module in built.items()}
    model = Model(
        description, built["predictor"], shapes["predictor"], built["refiner"], shapes["refiner"]
    )
    plan = resolve(description, schedule, interval=interval)
    words = jax.ShapeDtypeStruct((batch,), jnp.uint32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    params = (shapes["predictor"], shapes["refiner"])
    arguments = (params, {}, words, words, labels, *plan.arguments)
    static = {"networks": programs.Networks(model), "schedule": plan.schedule}
    return partial(programs.sample_images, **static, guidance=plan.guidance), arguments


def products(config: SiTConfig, rows: int, times: int, evaluations: int) -> int:
    """Multiply-adds of a SiT in a sampler, by hand; conditioning counts once per time."""
    width, depth = config.hidden_size, config.depth
    hidden = int(width * config.mlp_ratio)
    tokens = (config.input_size // config.patch_size) ** 2
    patch = config.patch_size**2 * config.in_channels
    conditioning = times * (config.frequency_embedding_size * width + width * width)
    conditioning += times * rows * (depth * 6 + 2) * width * width
    block = 4 * width * width + 2 * width * hidden + 2 * tokens * width  # attention: q k^T, times v
    outputs = patch * (2 if config.learn_sigma else 1)
    each = depth * block + patch * config.in_channels_scale * width + width * outputs
    return conditioning + evaluations * rows * tokens * each


@pytest.mark.parametrize("name", DESCRIPTIONS)
@pytest.mark.parametrize("schedule", ["H1P5R3", "H8", "H2P4R2"])
def test_the_sampler_multiplies_what_its_evaluations_need_and_no_more(name, schedule):
    description = DESCRIPTIONS[name]()
    parsed = Schedule.parse(schedule)
    rows, times = 2 * BATCH, parsed.steps + 1
    needed = products(description.predictor, rows, times, parsed.predictor_evaluations)
    if parsed.needs_refiner:
        needed += products(description.refiner, rows, times, parsed.refiner_evaluations)
    function, arguments = sampler(name, schedule)
    assert cost.multiply_adds(function, *arguments) == needed


@pytest.mark.parametrize(("name", "bound"), [("digits", 1030), ("SiT-S/2", 1060)])
def test_the_traced_program_is_small_and_does_not_grow_with_the_schedule(name, bound):
    short, long = (
        len(equations(function, *arguments))
        for function, arguments in (sampler(name, "H1P5R3"), sampler(name, "H8P9R5"))
    )
    assert short == long
    assert short <= bound


@pytest.mark.parametrize("name", DESCRIPTIONS)
@pytest.mark.parametrize("interval", [None, "0.2:0.8"])
def test_nothing_between_noise_and_image_needs_the_host(name, interval):
    function, arguments = sampler(name, "H1P5R3", interval)
    used = {e.primitive.name for e in equations(function, *arguments)}
    assert not used & HOST_PRIMITIVES
    if name == "digits":  # compiled too
        text = jax.jit(function).lower(*arguments).compile().as_text()
        assert not HOST_INSTRUCTIONS.findall(text)


def test_guidance_scale_one_evaluates_one_branch():
    description = DESCRIPTIONS["digits"]()
    plans = [resolve(description, "H2", scale, "paired") for scale in (1.0, 1.5)]
    assert [plan.guidance for plan in plans] == ["none", "paired"]


def test_the_first_batch_compiles_one_program_and_the_next_ones_none():
    jax.clear_caches()  # another test may have compiled it
    pipe = ClassToImage.load("digits")
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    first = np.asarray(pipe([1, 2], seeds=1, schedule="H1P1R1"))
    assert len(compiled) == 1
    again = np.asarray(pipe([3, 4], seeds=2, schedule="H1P1R1", guidance_scale=2.5))
    assert len(compiled) == 1
    assert first.shape == again.shape

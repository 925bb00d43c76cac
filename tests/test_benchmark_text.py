"""Speed of models of texts: the same parts, counts and tables as for models of classes."""

from functools import partial

import jax
import numpy as np
import pytest
import tiny_text
from test_benchmark import parts_of, whole_program
from test_commands import run

from flowturbo_jax import TextToImage, cost
from flowturbo_jax.__main__ import main as package_main
from flowturbo_jax.pipelines import ablation, benchmark, ceiling, part_programs, programs
from flowturbo_jax.pipelines.batch_call import BatchCall
from flowturbo_jax.pipelines.random_model import random_model
from flowturbo_jax.pipelines.subject import Subject
from flowturbo_jax.pipelines.timing import Stopwatch
from flowturbo_jax.schedule import Schedule

FIELDS = {"vae": False, "in_channels": 3}


@pytest.fixture(scope="module")
def pipe():
    return TextToImage(tiny_text.model(**FIELDS))


@pytest.fixture(autouse=True)
def compiled_quickly():
    """What is timed only to see that it runs is compiled as fast as can be."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("guidance", ["paired", "official", "none"])
@pytest.mark.parametrize("schedule", ["H2", "H1P1R1"])
def test_the_parts_multiply_as_much_as_the_whole(pipe, schedule, guidance):
    call = BatchCall(pipe, pipe.plan(schedule, None, guidance), 2)
    parts = {part.name: part.multiply_adds for part in parts_of(call)}
    assert sum(parts.values()) == whole_program(call) > 0
    encoder = pipe.model.text_encoder
    ids = call.labels.reshape(-1, call.labels.shape[-1])[: 2 if guidance == "none" else 4]
    encoding = cost.multiply_adds(encoder.apply, {"params": pipe.params[2]}, ids)
    assert parts["conditioning"] > encoding > 0  # each text once, and its keys and values


def test_both_branches_have_their_texts(pipe):
    call = BatchCall(pipe, pipe.plan("H1"), 2)
    call.labels = pipe.tokens(["a red circle", "a blue cross"], "a grey square")
    rows = np.asarray(part_programs._labels(call, 2))
    np.testing.assert_array_equal(rows[:2], call.labels)
    np.testing.assert_array_equal(rows[2:, 0], call.labels[:, 1])
    assert part_programs._labels(call, 1).shape == call.labels.shape


def test_a_row_is_measured_part_by_part(pipe):
    call = BatchCall(pipe, pipe.plan("H1R1"), 2)
    row, split = benchmark.measure_row(call, Stopwatch(repeats=1), None)
    measured = ("predictor", "refiner", "conditioning", "guidance_and_steps")
    assert all(split.seconds[part] > 0 for part in measured)
    assert sum(row["split_ms_per_batch"].values()) == pytest.approx(row["ms_per_batch"])
    description = pipe.model.description
    assert row["gmac"] == benchmark.paper_gmac(description, Schedule.parse("H1R1")) > 0


def test_the_sampler_in_pieces_gives_the_same_latents(pipe):
    plan, rows = pipe.plan("H1P1R1"), pipe.tokens(["a red circle"], "a grey square")
    noise = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    wanted = pipe.sample_latents(noise, rows, schedule="H1P1R1")
    networks = ablation.networks_apart(pipe, ablation.JittedNetwork)
    found = ablation.step_by_step(pipe, networks, noise, jax.numpy.asarray(rows), plan)
    np.testing.assert_allclose(found, wanted, atol=1e-4)  # float32, other orders of sums


def test_the_ablation_runs_in_every_way(pipe):
    found = ablation.measure(pipe, pipe.plan("E1"), 1, Stopwatch(1))
    assert list(found) == list(ablation.WAYS)


def test_the_command_takes_a_model_of_texts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ceiling, "SIZES", (64,))
    model = str(tiny_text.save(tmp_path / "m", refiner=False, **FIELDS))
    given = ["--schedules=E1", "--batch-sizes=1", "--repeats=1", "--no-cold-start"]
    assert run(package_main, "benchmark", model, *given) == 0
    assert "| E1 | paired 1.5 | 1 |" in capsys.readouterr().out
    assert run(package_main, "benchmark", model, *given, "--quantization=int8") == 2
    assert "--quantization is for models of classes" in capsys.readouterr().err


def test_published_sizes_are_described_without_weights():
    description = Subject(None, "SD 1.x U-Net", 512).describe()
    assert (description.predictor.size_name, description.image_shape) == (
        "SD 1.x U-Net",
        (512, 512, 3),
    )
    assert benchmark.paper_gmac(description, Schedule.parse("H1")) == pytest.approx(769, abs=1)
    other = Subject(None, "SD 2.x U-Net", 768).describe()
    assert (other.predictor.text_width, other.image_shape[0]) == (1024, 768)


def test_a_size_is_made_as_it_is_described(monkeypatch):
    fields = {**tiny_text.UNET, "in_channels": 4}
    del fields["sample_size"]
    encoder = {"hidden_size": tiny_text.WIDTH, "intermediate_size": 32, "num_layers": 1}
    encoder |= {"num_heads": 2, "activation": "gelu"}
    name = "SD 1.x U-Net"
    monkeypatch.setattr("flowturbo_jax.pipelines.random_model.TEXT_SIZES", {name: fields})
    monkeypatch.setattr("flowturbo_jax.pipelines.random_model.TEXT_ENCODERS", {name: encoder})
    monkeypatch.setattr("flowturbo_jax.pipelines.random_model.VOCABULARY", 1200)
    subject = Subject(None, name, 64, vae=False)
    made = random_model(name, 64, vae=False)
    assert subject.describe() == made.description
    pipe = TextToImage(made)
    call = BatchCall(pipe, pipe.plan("H1R1"), 1)
    traced = partial(programs.sample_latents, networks=programs.Networks(made))
    latents = jax.eval_shape(
        partial(traced, schedule=call.plan.schedule, guidance="paired"),
        pipe.params,
        call.start,
        call.labels,
        *call.plan.arguments,
    )
    assert latents.shape == (1, 8, 8, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size=SD 1.x U-Net", "--image-size=100"], "a multiple of 64"),
        (["--size=SD 3"], "unknown size 'SD 3'; known are SiT's, such as SiT-XL/2, and SD 1.x"),
        (["--size=SD 1.x U-Net", "--quantization=fp8"], "--quantization is for models of classes"),
    ],
)
def test_bad_sizes_are_one_clear_line(capsys, arguments, message):
    assert run(package_main, "benchmark", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line

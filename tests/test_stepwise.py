"""Block by block: the same samples as one program, no compilation per schedule, and times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import flowturbo_jax as ft
from flowturbo_jax.pipelines import stepwise

LABELS = np.asarray([3, 1, 4], np.int32)
NOISE = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8, 8, 1)), jnp.float32)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return ft.ClassToImage.load(tiny.save_model(tmp_path_factory.mktemp("model") / "m"))


@pytest.mark.parametrize("schedule", ["H1P2R2", "P2R1", "E2H1@0.5", "H1P1Rc2@2", "P1H1R1"])
@pytest.mark.parametrize("guidance", ["paired", "official", "none"])
def test_block_by_block_is_the_compiled_sampler(pipe, schedule, guidance):
    plan = pipe.plan(schedule, None if guidance == "none" else 2.0, guidance)
    whole = pipe.sample_latents(
        NOISE, LABELS, schedule=schedule, guidance_scale=plan.scale, guidance=guidance
    )
    np.testing.assert_allclose(stepwise.sample_latents(pipe, NOISE, LABELS, plan), whole, atol=1e-4)


def test_block_by_block_knows_intervals(pipe):
    plan = pipe.plan("H1P2R1", 3.0, "paired", (0.2, 0.6))
    whole = pipe.sample_latents(
        NOISE, LABELS, schedule="H1P2R1", guidance_scale=3.0, guidance_interval=(0.2, 0.6)
    )
    stepped = stepwise.sample_latents(pipe, NOISE, LABELS, plan)
    np.testing.assert_allclose(stepped, whole, atol=1e-4)


def test_another_schedule_of_the_same_blocks_compiles_nothing(pipe, caplog):
    stepwise.sample_latents(pipe, NOISE, LABELS, pipe.plan("H1P1R1"))
    plans = [pipe.plan(text, 3.0) for text in ("H3P2R4", "H1R1P5@0.3", "(H1P1R1)x3")]
    with jax.log_compiles():
        for plan in plans:
            stepwise.sample_latents(pipe, NOISE, LABELS, plan)
    assert not [record for record in caplog.records if "ompiling" in record.getMessage()]


def test_costs_add_up_over_blocks(pipe, monkeypatch):
    seconds = {"H": 4.0, "P": 2.0, "R": 1.0, "E": 2.5}
    monkeypatch.setattr(stepwise.Costs, "_measure", lambda self, block, plan, t: seconds[block])
    costs = stepwise.Costs(pipe, 2)
    assert costs.of(pipe.plan("H1P3R2")) == 4 + 6 + 2
    assert costs.of(pipe.plan("P3")) == 2.5 + 6  # and the evaluation it begins with


def test_costs_of_guided_and_unguided_evaluations_are_measured_apart(pipe, monkeypatch):
    # Half as dear where the unconditional branch is left out; 2.0 is no point of an interval.
    monkeypatch.setattr(
        stepwise.Costs, "_measure", lambda self, block, plan, t: 2.0 if t <= 0.5 else 1.0
    )
    costs = stepwise.Costs(pipe, 2)
    # H4 evaluates at 0, 1/4 | 1/4, 1/2 | 1/2, 3/4 | 3/4, 1; those up to 1/2 are guided.
    assert costs.of(pipe.plan("H4", 2.0, "paired", (0.0, 0.5))) == 2 + 2 + 1.5 + 1
    # Evaluations of E and P are at the start and at the end of their step.
    assert costs.of(pipe.plan("E2", 2.0, "paired", (0.0, 0.4))) == 2 + 1
    assert costs.of(pipe.plan("E1P1", 2.0, "paired", (0.0, 0.4))) == 2 + 1


@pytest.mark.parametrize("schedule", ["H5", "H10", "E5", "P10"])
def test_costs_know_a_grid_point_at_an_end_of_the_interval_to_be_inside(
    pipe, monkeypatch, schedule
):
    monkeypatch.setattr(
        stepwise.Costs, "_measure", lambda self, block, plan, t: 1.0 if t > 0.2 else 100.0
    )
    steps = stepwise.Costs(pipe, 2).of(pipe.plan(schedule, 2.0, "paired", (0.2, 1.0)))
    plan = pipe.plan(schedule)
    times = np.linspace(0, 1, plan.schedule.steps + 1)
    outside = {
        "H5": 0.5 + 0.0,  # of the first step one evaluation is at 0, one at 0.2
        "H10": 1 + 0.5,
        "E5": 1,
        "P10": 2,  # its own start, and the end of its first step
    }[schedule]
    total = plan.schedule.steps + (1 if schedule.startswith("P") else 0)
    assert times[1] <= 0.2 + 1e-9
    assert steps == pytest.approx(100 * outside + (total - outside))


def test_known_costs_are_not_measured_again(pipe, monkeypatch):
    known = {}
    first = stepwise.Costs(pipe, 2, known, repeats=1).of(pipe.plan("H1P2"))
    assert first > 0
    assert len(known) == 2
    monkeypatch.setattr(stepwise.Costs, "_measure", lambda *_: pytest.fail("measured again"))
    assert stepwise.Costs(pipe, 2, known).of(pipe.plan("H1P2")) == first

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
    with jax.log_compiles():
        for schedule in ("H3P2R4", "H1R1P5@0.3", "(H1P1R1)x3"):
            stepwise.sample_latents(pipe, NOISE, LABELS, pipe.plan(schedule, 3.0))
    assert not [r for r in caplog.records if "_step" in r.getMessage()]


def test_costs_add_up_over_blocks(pipe, monkeypatch):
    seconds = {"H": 4.0, "P": 2.0, "R": 1.0, "E": 2.0}
    monkeypatch.setattr(stepwise.Costs, "_measure", lambda self, block, plan, t: seconds[block])
    costs = stepwise.Costs(pipe, 2)
    assert costs.of(pipe.plan("H1P3R2")) == 4 + 6 + 2
    assert costs.of(pipe.plan("P3")) == 2 + 6  # and the evaluation it begins with


def test_costs_of_guided_and_unguided_steps_are_measured_apart(pipe, monkeypatch):
    asked = []
    monkeypatch.setattr(
        stepwise.Costs, "_measure", lambda self, block, plan, t: asked.append(float(t)) or 1.0
    )
    assert stepwise.Costs(pipe, 2).of(pipe.plan("H4", 2.0, "paired", (0.0, 0.5))) == 4
    assert asked == [0.25, 0.75]


def test_measured_costs_are_times(pipe):
    costs = stepwise.Costs(pipe, 2, repeats=2)
    assert 0 < costs.of(pipe.plan("H1")) < costs.of(pipe.plan("H3")) < 10

"""The space a search starts from, and what it tries beside a plan."""

import dataclasses

import pytest

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines.candidates import Space
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.schedule import Schedule

SPACE = Space(max_evaluations=6, max_refiner_steps=2, modes=("paired", "official"))


def plan(text: str, mode: str = "paired") -> Plan:
    return Plan(Schedule.parse(text), mode, 1.5, None)


def test_the_start_is_every_count_within_the_limits_once():
    start = dataclasses.replace(SPACE, adams=()).start(1.5)
    texts = [str(one.schedule) for one in start]
    assert len(texts) == len(set(texts)) == 27
    assert {"H1", "H3", "H1P4R2", "H2P2R1"} <= set(texts)
    assert max(one.schedule.predictor_evaluations for one in start) == 6
    assert max(one.schedule.refiner_evaluations for one in start) == 4
    assert {one.guidance for one in start} == {"paired"}


def test_the_start_has_adams_bashforth_alone_and_after_an_h():
    without = {str(one.schedule) for one in dataclasses.replace(SPACE, adams=()).start(1.5)}
    added = {str(one.schedule) for one in SPACE.start(1.5)} - without
    assert added == {
        *(f"A{order}x{steps}" for order in (2, 3) for steps in range(2, 7)),
        *(f"H1A{order}x{steps}" for order in (2, 3) for steps in range(1, 5)),
    }


def test_a_leading_p_is_left_out_because_it_is_a_heun_step():
    assert not [one for one in SPACE.start(1.5) if one.schedule.runs[0].block == "P"]


def test_beside_a_plan_is_each_thing_changed_alone():
    beside = list(SPACE.beside(plan("H1P2R1")))
    texts = {str(one.schedule) for one in beside}
    assert {"H1P2R1@cosine", "H1P2R1@sigmoid"} <= texts
    assert {"H1P2R1@0.5", "H1P2R1@2", "H1P2Rc1", "P2H1R1", "H1R1P2"} <= texts
    assert not any(text.startswith("R") for text in texts)
    assert {one.guidance for one in beside} == {"paired", "official"}
    assert {one.interval for one in beside} == {None, (0, 0.8), (0.1, 1), (0.2, 1)}
    for one in beside:
        changed = [
            one.schedule.shift != 1 or one.schedule.spacing != "shifted",
            [run.steps for run in one.schedule.runs] != [1, 2, 1]
            or [run.block for run in one.schedule.runs] != ["H", "P", "R"],
            one.guidance != "paired",
            one.interval is not None,
        ]
        assert sum(changed) <= 1


def test_a_shift_is_refined_around_the_one_found():
    shifts = {one.schedule.shift for one in SPACE.beside(plan("H1P2@0.5"))}
    assert {0.42, 0.595, 1.0} <= shifts


def test_other_orders_stay_within_the_limit():
    for one in Space(max_evaluations=4, modes=("paired",)).beside(plan("H1P2")):
        assert one.schedule.predictor_evaluations <= 4


def test_what_is_switched_off_is_not_tried():
    small = Space(
        modes=("none",),
        shifts=(),
        spacings=(),
        intervals=(),
        orders=False,
        refiner_rules=("R",),
    )
    beside = {str(one.schedule) for one in small.beside(plan("H1P2R1", "none")._replace(scale=1.0))}
    assert beside == {"H1P2R1"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_evaluations": 1}, "max_evaluations is 1"),
        ({"max_refiner_steps": -1}, "max_refiner_steps is -1"),
        ({"refiner_rules": ("X",)}, "refiner rules"),
        ({"refiner_rules": ()}, "refiner rules"),
        ({"shifts": (0.0,)}, "shift"),
        ({"intervals": ("0.5",)}, "guidance_interval"),
        ({"modes": ("none", "paired")}, "search them apart"),
        ({"modes": ("paired", "loud")}, "guidance modes"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Space(**fields)

"""Which plans are near the front of cost and error, and what is recommended of them."""

import pytest

from flowturbo_jax.pipelines import fronts
from flowturbo_jax.pipelines.fronts import Finalist, Screened
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.schedule import Schedule


def plan(text: str) -> Plan:
    return Plan(Schedule.parse(text), "paired", 1.5, None)


def screened(*pairs) -> list[Screened]:
    return [Screened(plan(f"H{i + 1}"), cost, error, 8) for i, (cost, error) in enumerate(pairs)]


def costs(found) -> list[float]:
    return [one.cost for one in found]


def test_the_front_is_what_nothing_cheaper_beats():
    points = screened((3, 0.3), (1, 1.0), (2, 0.5), (2.5, 0.6), (4, 0.35))
    assert costs(fronts.near_front(points, 1.0)) == [1, 2, 3]


def test_a_margin_keeps_what_is_nearly_as_good():
    points = screened((1, 1.0), (2, 0.5), (2.5, 0.55), (4, 0.9))
    assert costs(fronts.near_front(points, 1.2)) == [1, 2, 2.5]


def test_of_equal_costs_the_front_has_the_least_error():
    points = screened((1, 0.7), (1, 0.4))
    assert [one.error for one in fronts.near_front(points, 1.0)] == [0.4]


def test_what_diverged_is_on_no_front():
    assert costs(fronts.near_front(screened((1, float("inf")), (2, 0.5)), 9.0)) == [2]


def test_a_thinned_front_keeps_its_ends():
    front = screened(*((1.3**i, 2.0**-i) for i in range(20)))
    few = fronts.thinned(front, 5)
    assert len(few) == 5
    assert (few[0], few[-1]) == (front[0], front[-1])
    assert fronts.thinned(front, 30) == front


def finalist(text: str, ms: float, error: float) -> Finalist:
    return Finalist(plan(text), ms, error, {}, error)


def test_recommended_are_the_cheapest_good_one_the_best_and_one_between():
    measured = [
        finalist("H1", 1.0, 0.5),
        finalist("H2", 2.0, 0.1),
        finalist("H3", 3.0, 0.04),
        finalist("H4", 9.0, 0.03),
    ]
    found = fronts.recommend(measured, baseline=finalist("H8", 16.0, 0.1))
    assert {name: str(one.plan.schedule) for name, one in found.items()} == {
        "fast": "H2",
        "balanced": "H3",
        "best": "H4",
    }


def test_without_any_as_good_as_the_baseline_all_are_considered():
    measured = [finalist("H1", 1.0, 0.5), finalist("H2", 2.0, 0.3)]
    found = fronts.recommend(measured, baseline=finalist("H8", 16.0, 0.01))
    assert str(found["fast"].plan.schedule) == "H1"
    assert str(found["best"].plan.schedule) == "H2"


def test_recommended_are_never_slower_from_best_to_fast():
    import random

    rng = random.Random(0)
    for _ in range(200):
        measured = [
            finalist(f"H{i + 1}", rng.uniform(1, 9), rng.uniform(0.01, 1)) for i in range(6)
        ]
        found = fronts.recommend(measured, measured[rng.randrange(6)])
        ms = [found[name].ms_per_image for name in ("fast", "balanced", "best")]
        assert ms == sorted(ms)
        badness = [found[name].badness for name in ("fast", "best")]
        assert badness[1] <= badness[0]


def test_rank_correlation_is_one_for_equal_and_minus_one_for_opposite_ranks():
    same = [Finalist(plan("H1"), 1.0, e, {}, e**2) for e in (0.1, 0.2, 0.5)]
    assert fronts.rank_correlation(same) == pytest.approx(1)
    opposite = [one._replace(badness=1 / one.error) for one in same]
    assert fronts.rank_correlation(opposite) == pytest.approx(-1)


def test_a_preset_says_all_but_the_scale():
    wanted = plan("H1P3R2@0.5")._replace(interval=(0.1, 0.8))
    preset = fronts.preset(wanted)
    assert (preset.schedule, preset.guidance, preset.guidance_interval) == (
        "H1P3R2@0.5",
        "paired",
        (0.1, 0.8),
    )


def test_plans_are_described_in_words():
    assert fronts.described(plan("H1P3")) == "H1P3 paired 1.5"
    interval = plan("H1")._replace(interval=(0.1, 0.8))
    assert fronts.described(interval) == "H1 paired 1.5 in 0.1:0.8"
    assert fronts.described(plan("H1")._replace(guidance="none")) == "H1 none"

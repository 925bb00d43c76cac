"""Schedules: what can be written, what it costs, and when its steps happen."""

import random
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.schedule import Run, Schedule


def letters(text):
    """The blocks of a schedule one by one, as in HHPPR."""
    return [run.block for run in Schedule.parse(text).runs for _ in range(run.steps)]


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("H1P5R3", "H P P P P P R R R"),
        ("P5H2R1", "P P P P P H H R"),
        ("E3", "E E E"),
        ("H1R1Rc2P1Rc1", "H R Rc Rc P Rc"),
        ("(H1P1R1)x2", "H P R H P R"),
        ("H2(P1R1)x2E1", "H H P R P R E"),
        ("((H1P1)x2R1)x2", "H P H P R H P H P R"),
        ("(H1)x3", "H H H"),
        ("  H1 P2  ( R1 )x1  ", "H P P R"),
        ("H0P3R0", "P P P"),
        ("R0H1", "H"),
        ("(R1P1)x0E1", "E"),
        ("H010", "H " * 10),
        ("H10000", "H " * 10_000),
        ("A2x8", "A2 " * 8),
        ("H1A3x2A4x1", "H A3 A3 A4"),
        ("A2x0H1", "H"),
        ("(A2x2H1)x2", "A2 A2 H A2 A2 H"),
        ("S5", "S S S S S"),
        ("H1S4", "H S S S S"),
        ("S4R1", "S S S S Rs"),
        ("(S1R1)x2", "S Rs S Rs"),
        ("H1R1S1", "H Rs S"),
        ("H1R1A2x1", "H R A2"),
    ],
)
def test_text_means_these_blocks(text, blocks):
    assert letters(text) == blocks.split()


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("H1H1P1", "H2P1"),
        ("(H1)x3", "H3"),
        ("H1P1R1H1P1R1", "(H1P1R1)x2"),
        ("((H1P1)x2)x3", "(H1P1)x6"),
        ("((H1P1)x2R1)x2", "(H1P1H1P1R1)x2"),
        ("(H1P1H1)x2", "H1P1H2P1H1"),
        ("H2P0R2", "H2R2"),
        ("H1 Rc2", "H1Rc2"),
        ("(A2x4)x2", "A2x8"),
        ("A2x1A2x7", "A2x8"),
        (" A2x8 ", "A2x8"),
        ("H1A3x6 @ cosine", "H1A3x6@cosine"),
        ("S5@learnt", "S5"),
        ("S2S3", "S5"),
        ("S5@1", "S5"),
        ("S4Rs1", "S4R1"),
        ("S1R1S1R1", "(S1R1)x2"),
        ("(S1A2x1)x3", "(S1A2x1)x3"),
        ("H1P3@learnt", "H1P3@learnt"),
        ("H4H4@sigmoid", "H8@sigmoid"),
    ],
)
def test_equal_schedules_have_one_text(text, canonical):
    schedule = Schedule.parse(text)
    assert str(schedule) == canonical
    assert schedule == Schedule.parse(canonical)
    assert hash(schedule) == hash(Schedule.parse(canonical))


def written_out(schedule):
    """Its text without repetitions."""
    runs = "".join(
        f"{'R' if run.block == 'Rs' else run.block}{'x' * run.block.startswith('A')}{run.steps}"
        for run in schedule.runs
    )
    return runs + f"@{schedule.spacing}" * (schedule.spacing == "cosine")


def test_any_schedule_survives_its_own_text():
    rng = random.Random(0)

    def text(depth):
        parts = []
        for _ in range(rng.randint(1, 4)):
            if depth and rng.random() < 0.4:
                parts.append(f"({text(depth - 1)})x{rng.randint(1, 3)}")
            else:
                parts.append(f"{rng.choice(blocks)}{rng.randint(1, 3)}")
        return "".join(parts)

    for number in range(450):
        learnt = number % 3 == 2
        blocks = ["E", "H", "P", "R", "A2x", "A4x", "S" if learnt else "Rc"]
        written = "H1" + text(2) + ["", "@cosine", ""][number % 3]
        schedule = Schedule.parse(written)
        assert Schedule.parse(str(schedule)) == schedule, written
        assert len(str(schedule)) <= len(written_out(schedule))
        assert schedule.steps == len(letters(written))
        assert all(
            a.block != b.block for a, b in zip(schedule.runs, schedule.runs[1:], strict=False)
        )


def test_schedule_is_given_back_as_it_is():
    schedule = Schedule((Run("H", 1), Run("H", 2), Run("P", 1)))
    assert schedule.runs == (Run("H", 3), Run("P", 1))
    assert Schedule.parse(schedule) is schedule


@pytest.mark.parametrize(
    ("heun", "corrector", "refiner"),
    [(0, 3, 0), (1, 0, 0), (1, 0, 2), (1, 2, 0), (1, 2, 1), (1, 5, 3), (2, 1, 3), (3, 0, 0)],
)
def test_counts_are_the_official_samplers(heun, corrector, refiner):
    schedule = Schedule.parse(f"H{heun}P{corrector}R{refiner}")
    leading = 1 if heun == 0 and corrector > 0 else 0
    assert schedule.predictor_evaluations == 2 * heun + corrector + leading
    assert schedule.refiner_evaluations == 2 * refiner
    assert schedule.needs_refiner == (refiner > 0)
    assert schedule.steps == heun + corrector + refiner
    letters = zip("HPR", (heun, corrector, refiner), strict=True)
    assert schedule.blocks == {letter for letter, steps in letters if steps}


@pytest.mark.parametrize(
    ("text", "predictor", "refiner"),
    [
        ("P5H7R3", 20, 6),  # the leading P evaluates its own start
        ("E4", 4, 0),
        ("E1P3", 4, 0),
        ("H1Rc3", 2, 6),
        ("(H1P1R1)x3", 9, 6),
        ("H1R1P2", 4, 2),
        ("A2x8", 8, 0),
        ("H1A4x5", 7, 0),
        ("S5", 5, 0),
        ("H1S4", 6, 0),
        ("S4R1", 4, 1),  # one evaluation for R in the company of S
        ("(S1R2)x3", 3, 6),
        ("P1S3R1", 5, 1),
        ("H1P3@learnt", 5, 0),
        ("A2x3R1", 3, 2),
    ],
)
def test_counts_of_other_orders(text, predictor, refiner):
    schedule = Schedule.parse(text)
    assert (schedule.predictor_evaluations, schedule.refiner_evaluations) == (predictor, refiner)


def test_intervals_tile_the_time_grid():
    intervals = Schedule.parse("H1P5R3").intervals()
    assert [(run.block, first, last) for run, first, last in intervals] == [
        ("H", 0, 1),
        ("P", 1, 6),
        ("R", 6, 9),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no steps"),
        ("   ", "has no steps"),
        ("H0", "has no steps"),
        ("H0P0R0", "has no steps"),
        ("()x2", "has no steps"),
        ("(H1P1)x0", "has no steps"),
        ("R3", "starts with R, but there is no velocity to refine yet; begin with H, P or E"),
        ("Rc1H1", "starts with Rc"),
        ("H0R3", "starts with R"),
        ("(R1H1)x2", r"schedule \(R1H1\)x2 starts with R"),
        ("X3", "unknown block 'X' in schedule 'X3'"),
        ("h1", "unknown block 'h'"),
        ("HP5", "unknown block 'HP'"),
        ("H1rc2", "unknown block 'rc'"),
        ("H1P5R3x2", "unknown block 'x'"),
        ("H", "cannot be read at 'H'"),
        ("3H", "cannot be read at '3H'"),
        ("H-1", "cannot be read at 'H-1'"),
        ("H1.5", r"cannot be read at '\.5'"),
        ("H\u0663", "cannot be read at"),  # a three, but not an ASCII one
        ("H1,P5", "cannot be read at ',P5'"),
        ("H1 P", "cannot be read at 'P'"),
        ("E 1", "cannot be read at 'E 1'"),
        ("[H1P1]x2", "cannot be read at"),
        ("(H1P1R1", "has an open bracket; close it"),
        ("((H1)x2", "has an open bracket"),
        ("H1P1)x2", r"cannot be read at '\)x2'"),
        ("(H1P1)", r"cannot be read at '\)'"),
        ("(H1P1)x", r"cannot be read at '\)x'"),
        ("H1(", "has an open bracket"),
        ("A5x2", "unknown block 'A5'"),
        ("A1x2", "unknown block 'A1'"),
        ("a2x8", "unknown block 'a'"),
        ("A2", "unknown block 'A'"),
        ("A2 8", "unknown block 'A' in schedule 'A2 8'"),
        ("A28", "unknown block 'A'"),
        ("A2x", "unknown block 'A'"),
        ("Ax8", "cannot be read at 'Ax8'|unknown block 'Ax'"),
        ("E2x8", "unknown block 'x'"),
        ("S", "cannot be read at 'S'"),
        ("S0", "has no steps"),
        ("s5", "unknown block 's'"),
        ("S4Rc1", "beside S the refiner has no chained rule; write R"),
        ("H1Rs1", "Rs is the refiner of schedules with S, and there is no S"),
        ("R1S4", "schedule R1S4 starts with R, but there is no velocity to refine"),
        ("R12S4", "schedule R12S4 starts with R, but"),
        ("S5@0.5", "the time grid of S5@0.5 is learnt with S; leave out what follows @"),
        ("S5@cosine", "the time grid of S5 is learnt with S"),
        ("S4R1@sigmoid", "the time grid of S4R1 is learnt with S"),
        ("H8@0.5@cosine", "has the shift '0.5@cosine'"),
        ("H8@cosine0.5", "has the shift 'cosine0.5'"),
        ("H8@shifted", "has the shift 'shifted'; write a number such as @0.5, or @cosine"),
        ("H8@Cosine", "has the shift 'Cosine'"),
    ],
)
def test_unusable_text_is_refused_with_its_reason(text, message):
    with pytest.raises(InputError, match=message):
        Schedule.parse(text)


def test_message_about_text_explains_the_grammar():
    with pytest.raises(InputError) as error:
        Schedule.parse("Q3")
    assert "H1P5R3" in str(error.value)
    assert all(
        name in str(error.value) for name in ("Heun", "pseudo corrector", "refiner", "Euler")
    )


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ((), "the schedule is empty"),
        ((Run("Q", 1),), "unknown block 'Q'"),
        ((Run("H", 0),), r"block H has \[0\] steps"),
        ((Run("H", 2), Run("P", -1)), r"block P has \[-1\] steps"),
        ((Run("R", 2),), "starts with R"),
        ((Run("A5", 2),), "unknown block 'A5'"),
        ((Run("S", 2), Run("Rc", 1)), "beside S the refiner has no chained rule"),
    ],
)
def test_unusable_runs_are_refused(runs, message):
    with pytest.raises(InputError, match=message):
        Schedule(runs)


@pytest.mark.parametrize(
    "text",
    [
        "H10001",
        "H9999P2",
        "H999999999",
        "(H9)x9999",
        "((((H1P1)x9999)x9999)x9999)x9999",
        "((H1)x10000)x10000",
        "H1P1" * 10_000,
        "H1" * 20_000 + " " * 1_000_000,
        "(" * 20_000 + "H1",
        "H1" + ")x9" * 20_000,
        "H" * 200_000,
        "H" + "1" * 200_000,
        " " * 1_000_000 + "?",
        "H1(P1R1)x" + "9" * 50,
    ],
    ids=range(14),
)
def test_absurd_lengths_are_refused_quickly(text):
    start = time.perf_counter()
    with pytest.raises(InputError):
        Schedule.parse(text)
    # Under a second if the work grows with the text; much longer if with its square or its meaning.
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 9, 250, 10_000])
def test_time_grid_is_uniform_and_ends_at_exactly_one(steps):
    grid = np.asarray(Schedule.parse(f"H{steps}").time_grid())
    assert (grid.shape, grid.dtype) == ((steps + 1,), np.float32)
    assert (grid[0], grid[-1]) == (0.0, 1.0)
    assert (np.diff(grid) > 0).all()
    # Half a unit in the last place of 1, for the division and for the difference each.
    np.testing.assert_allclose(grid, np.linspace(0, 1, steps + 1), rtol=0, atol=1.2e-7)


@pytest.mark.parametrize("t_start", [0.3, 0.7, 0.999])
@pytest.mark.parametrize("traced", [False, True])
def test_time_grid_starts_where_told(t_start, traced):
    schedule = Schedule.parse("H2P5R3")
    grid = jax.jit(schedule.time_grid)(t_start) if traced else schedule.time_grid(t_start)
    grid = np.asarray(grid)
    assert grid[0] == pytest.approx(t_start, abs=6e-8)  # one rounding of 1 - (1 - t)
    assert grid[-1] == 1.0
    assert (np.diff(grid) > 0).all()
    np.testing.assert_allclose(grid, np.linspace(t_start, 1, 11), rtol=0, atol=1.8e-7)


def test_time_grid_has_the_dtype_asked_for():
    grid = Schedule.parse("H4P4").time_grid(0.2, jnp.bfloat16)
    assert grid.dtype == jnp.bfloat16
    assert float(grid[-1]) == 1.0
    with jax.enable_x64(True):
        exact = np.asarray(Schedule.parse("H1P5R3").time_grid(0.1, jnp.float64))
    np.testing.assert_allclose(exact, np.linspace(0.1, 1, 10), rtol=0, atol=3e-16)


@pytest.mark.parametrize("t_start", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_time_grid_refuses_a_start_off_the_path(t_start):
    with pytest.raises(InputError, match=re.escape(f"t_start is {t_start}; it must lie in [0, 1)")):
        Schedule.parse("H1").time_grid(t_start)
    with pytest.raises(InputError, match="t_start"):
        Schedule.parse("H1").time_grid(jnp.asarray(t_start))


@pytest.mark.parametrize("shift", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("t_start", [0.0, 0.4])
def test_shift_bends_the_time_grid_by_its_formula(shift, t_start):
    schedule = Schedule.parse(f"H4P4@{shift}")
    grid = np.asarray(schedule.time_grid(t_start, jnp.float32), np.float64)
    left = 1 - np.arange(9) / 8
    noise_share = shift * left / (1 + (shift - 1) * left)  # Esser et al. 2024, eq. 23, for 1 - t
    np.testing.assert_allclose(grid, 1 - (1 - t_start) * noise_share, atol=1e-6)
    assert grid[-1] == 1
    assert (np.diff(grid) > 0).all()


def test_shift_refines_the_end_it_says():
    first, last = (np.diff(np.asarray(Schedule.parse(f"H8@{s}").time_grid())) for s in (3, 0.3))
    assert first[0] < first[-1]
    assert last[0] > last[-1]


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("H8@1", "H8"),
        ("H1P5R3@0.50", "H1P5R3@0.5"),
        ("(H1P1)x2 @ 2", "(H1P1)x2@2"),
        ("H1@1.4142135", "H1@1.414214"),
        ("H1@0.01", "H1@0.01"),
    ],
)
def test_shift_is_part_of_the_text_and_parses_back(text, written):
    schedule = Schedule.parse(text)
    assert str(schedule) == written
    assert Schedule.parse(written) == schedule


def test_any_shift_survives_its_text():
    for shift in np.geomspace(0.01, 100, 57):
        schedule = Schedule((Run("H", 2),), shift)
        assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize(
    "text",
    ["H8@", "H8@x", "H8@-1", "H8@0", "H8@0.001", "H8@1000", "@2", "H8@nan", "H8@1e1", "H8@2@3"],
)
def test_nonsense_for_a_shift_is_refused(text):
    with pytest.raises(InputError, match=r"shift|no steps"):
        Schedule.parse(text)


@pytest.mark.parametrize("shift", [True, float("nan"), float("inf"), 0])
def test_a_shift_that_is_no_number_in_range_is_refused(shift):
    with pytest.raises(InputError, match="shift"):
        Schedule((Run("H", 2),), shift)


@pytest.mark.parametrize("text", ["H1", "H3", "H7P6", "H8@0.35", "H11@3", "E100@0.71"])
def test_times_are_the_grid_bit_for_bit(text):
    schedule = Schedule.parse(text)
    np.testing.assert_array_equal(schedule.times(), schedule.time_grid())


@pytest.mark.parametrize("t_start", [0.0, 0.3])
def test_a_shifted_grid_starts_and_ends_exactly(t_start):
    for shift in np.geomspace(0.02, 50, 40):
        for steps in (1, 13):
            grid = np.asarray(Schedule((Run("H", steps),), float(shift)).time_grid(t_start))
            assert (grid[0], grid[-1]) == (np.float32(1) - (np.float32(1) - np.float32(t_start)), 1)


@pytest.mark.parametrize("spacing", ["cosine", "sigmoid"])
@pytest.mark.parametrize("t_start", [0.0, 0.4])
@pytest.mark.parametrize("steps", [1, 2, 5, 8, 500])
def test_a_curved_grid_is_its_formula(spacing, t_start, steps):
    schedule = Schedule.parse(f"H{steps}@{spacing}")
    grid = np.asarray(schedule.time_grid(t_start, jnp.float32))
    u = np.linspace(0, 1, steps + 1)
    if spacing == "cosine":
        share = np.sin(np.pi * u / 2) ** 2
    else:  # the logistic curve on [-3, 3], from 0 to 1; a hyperbolic tangent
        share = (1 + np.tanh(3 * (u - 0.5)) / np.tanh(1.5)) / 2
    np.testing.assert_allclose(grid, t_start + (1 - t_start) * share, rtol=0, atol=2e-7)
    assert (grid[0], grid[-1]) == (np.float32(1) - (np.float32(1) - np.float32(t_start)), 1)
    assert (np.diff(grid) > 0).all()
    if t_start == 0:
        np.testing.assert_array_equal(schedule.times(), grid)
        # The same seen from both ends: finer at each than in the middle.
        np.testing.assert_allclose(grid, 1 - grid[::-1], rtol=0, atol=1.2e-7)
        lengths = np.diff(grid)
        assert steps < 3 or lengths[0] == pytest.approx(lengths.min(), abs=1e-6)


@pytest.mark.parametrize("t_start", [0.0, 0.25])
def test_a_learnt_grid_is_the_times_it_is_given(t_start):
    times = np.float32([0, 0.2, 0.3, 0.75, 1])
    for text in ("S4", "H1P3@learnt", "H1S2R1"):
        schedule = Schedule.parse(text)
        grid = np.asarray(jax.jit(schedule.time_grid)(t_start, times=times))
        wanted = t_start + (1 - t_start) * times.astype(np.float64)
        np.testing.assert_allclose(grid, wanted, rtol=0, atol=1.2e-7)
        assert (grid[0], grid[-1]) == (t_start, 1)
        for ask in (schedule.time_grid, schedule.times, schedule.left):
            with pytest.raises(
                InputError, match=re.escape(f"time grid of {text} is learnt: it is")
            ):
                ask()


@pytest.mark.parametrize(
    ("text", "learnt", "weights", "remembered", "rows", "orders"),
    [
        ("S3", True, True, 3, (True,) * 3, (0, 0, 0)),
        ("H1S2R1", True, True, 4, (False, True, True, True), (0,) * 4),
        ("S2H2", True, True, 2, (True, True, False, False), (0,) * 4),
        ("H1P2@learnt", True, False, 0, (False,) * 3, (0, 0, 0)),
        ("H1A3x2@learnt", True, False, 3, (False,) * 3, (0, 3, 3)),
        ("A4x2", False, False, 2, (False,) * 2, (4, 4)),
        ("A2x8", False, False, 2, (False,) * 8, (2,) * 8),
        ("E4A2x1S1", True, True, 6, (False,) * 5 + (True,), (0, 0, 0, 0, 2, 0)),
        ("H1P2R1", False, False, 0, (False,) * 4, (0,) * 4),
    ],
)
def test_a_schedule_says_what_its_solver_is_to_hold(
    text, learnt, weights, remembered, rows, orders
):
    schedule = Schedule.parse(text)
    assert (schedule.learnt, schedule.learns_weights) == (learnt, weights)
    assert (schedule.remembered, schedule.learnt_rows, schedule.orders) == (
        remembered,
        rows,
        orders,
    )


def test_a_grid_is_shifted_or_curved():
    with pytest.raises(InputError, match="shifted or cosine, not both; leave one out"):
        Schedule((Run("H", 4),), 0.5, "cosine")
    with pytest.raises(InputError, match="shifted or learnt, not both"):
        Schedule((Run("H", 4),), 0.5, "learnt")
    with pytest.raises(InputError, match="the spacing is 'even'; known are shifted, cosine"):
        Schedule((Run("H", 4),), spacing="even")
    assert Schedule((Run("S", 2), Run("R", 1))) == Schedule.parse("S2R1")
    assert Schedule((Run("S", 2),), spacing="learnt") == Schedule.parse("S2")
    assert len({Schedule.parse(f"H4{grid}") for grid in ("", "@0.5", "@cosine", "@sigmoid")}) == 4

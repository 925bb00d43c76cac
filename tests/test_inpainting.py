"""Keeping what is known while the rest is sampled, on flows that can be solved by hand."""

from functools import partial

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowturbo_jax import blocks, guidance, path, sampler
from flowturbo_jax.inpainting import Known, latent_mask
from flowturbo_jax.interfaces import Flow, State
from flowturbo_jax.multistep import Solver
from flowturbo_jax.schedule import Schedule

RNG = np.random.default_rng(0)
NOISE, DATA = (jnp.asarray(RNG.standard_normal((2, 3, 4)), jnp.float32) for _ in range(2))
FREE = jnp.asarray(RNG.random((2, 3, 1)) < 0.5)
KNOWN = Known(NOISE, DATA, FREE)
EVERY_BLOCK = "H1P1R1Rc1E1"
ROUNDING = 2e-6  # of a few steps with numbers of about 1


def velocity(x, t, label):
    """Mixes all positions, so that the free part sees the known one."""
    mixed = jnp.mean(x, axis=1, keepdims=True) - 0.5 * x
    return mixed * jnp.cos(2 * t) + label.reshape(-1, 1, 1)


def offset(x, v, t, label):
    return 0.3 * jnp.sin(v + x) * t + 0.1 * label.reshape(-1, 1, 1)


LABELS, NULL = jnp.asarray([0.7, -0.4]), jnp.asarray([0.1, 0.1])
FLOWS = {
    "none": guidance.unguided(velocity, offset, LABELS),
    "paired": guidance.paired(velocity, offset, LABELS, NULL, 2.0),
    "official": guidance.official(velocity, offset, LABELS, NULL, 2.0, 3),
    "interval": guidance.paired(velocity, offset, LABELS, NULL, 2.0, (0.2, 0.7)),
}


quick = partial(jax.jit, compiler_options=golden.QUICK_COMPILE)


def fresh(number):
    return jax.random.normal(jax.random.fold_in(jax.random.key(3), number), NOISE.shape)


def repainted(known, flow, schedule, tries=1, pinned=True, merged=True):
    """The last state, and x after each step."""
    return sampler.integrate(
        known.pinned(flow) if pinned else flow,
        known.noise,
        schedule,
        after_step=known.after_step if merged else None,
        observe=lambda state: state.x,
        rewind=lambda state, t, before, number: known.rewound(state, t, before, fresh(number)),
        tries=tries,
    )


def repaint(flow, schedule, known=KNOWN, tries=1, **parts):
    """The same, compiled."""
    run = partial(repainted, flow=flow, schedule=schedule, tries=tries, **parts)
    return quick(run)(known)


def fixed(x, free=FREE):
    """The known part alone."""
    return np.where(free, 0, x)


@pytest.mark.parametrize(
    ("mode", "tries"), [("none", 2), ("paired", 2), ("official", 2), ("interval", 1)]
)
def test_the_known_part_is_on_its_path_after_every_step(mode, tries):
    state, points = repaint(FLOWS[mode], EVERY_BLOCK, tries=tries)
    grid = Schedule.parse(EVERY_BLOCK).time_grid()
    for t, x in zip(grid[1:], points, strict=True):
        wanted = path.interpolate(NOISE, DATA, t)
        np.testing.assert_allclose(fixed(x), fixed(wanted), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(fixed(state.x), fixed(DATA))
    assert np.isfinite(state.x).all()
    # What the last block remembers is of the path, too, in every branch.
    wanted = np.broadcast_to(path.velocity(NOISE, DATA), state.memory.shape)
    np.testing.assert_allclose(fixed(state.memory), fixed(wanted), rtol=0, atol=1e-6)


@pytest.mark.parametrize("part", ["pinned", "merged"])
def test_a_pinned_flow_alone_and_the_merge_alone_keep_the_known_part(part):
    off = "merged" if part == "pinned" else "pinned"
    state, _ = repaint(FLOWS["paired"], EVERY_BLOCK, **{off: False})
    np.testing.assert_allclose(fixed(state.x), fixed(DATA), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("mode", ["none", "interval"])
def test_where_nothing_is_known_sampling_is_as_without(mode):
    known = KNOWN._replace(free=jnp.ones_like(FREE))
    state, _ = repaint(FLOWS[mode], EVERY_BLOCK, known)
    plain = quick(lambda noise: sampler.sample(FLOWS[mode], noise, EVERY_BLOCK))(NOISE)
    np.testing.assert_allclose(state.x, plain, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("tries", [1, 3])
def test_where_all_is_known_the_data_come_back_to_the_last_bit(tries):
    known = KNOWN._replace(free=jnp.zeros_like(FREE))
    state, _ = repaint(FLOWS["none"], "H2P2", known, tries)
    np.testing.assert_array_equal(state.x, DATA)


@pytest.mark.parametrize("schedule", ["H4", "H1P3", "P4", "H1R3", "H1Rc3", "H3@0.5"])
def test_the_free_part_is_moved_by_the_known_one_as_it_is_on_its_path(schedule):
    """Of a velocity that is the known part itself, which is linear in t, each block is exact."""
    known = Known(NOISE[:, :2], DATA[:, :2], jnp.asarray([True, False]).reshape(1, 2, 1))

    def neighbour(x, t):
        return jnp.concatenate([x[:, 1:], 100 * jnp.ones_like(x[:, 1:])], axis=1)

    flow = Flow(neighbour, lambda x, t, m: neighbour(x, t) - m)
    state, _ = sampler.integrate(
        known.pinned(flow), known.noise, schedule, after_step=known.after_step
    )
    wanted = NOISE[:, 0] + (NOISE[:, 1] + DATA[:, 1]) / 2
    if schedule == "H1R3":  # the published rule refines the remembered velocity twice: not exact
        assert np.abs(state.x[:, 0] - wanted).max() < 3
    else:
        np.testing.assert_allclose(state.x[:, 0], wanted, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("block", ["H", "P", "R", "Rc"])
def test_a_block_evaluates_at_points_of_the_path(block):
    seen = []

    def recorded(x, t, *rest):
        seen.append((fixed(x), float(t)))
        return velocity(x, t, LABELS)

    flow = KNOWN.pinned(Flow(recorded, recorded))
    t, t_next = jnp.float32(0.25), jnp.float32(0.75)
    x = KNOWN.at(NOISE, t)
    memory = KNOWN.remember(velocity(x, t, LABELS))
    state = sampler.BLOCKS[block](flow, State(x, memory), t, t_next)
    assert {t for _, t in seen} == ({0.75} if block == "P" else {0.25, 0.75})
    for point, time in seen:
        wanted = fixed(path.interpolate(NOISE, DATA, jnp.float32(time)))
        np.testing.assert_allclose(point, wanted, rtol=0, atol=1e-6)
    wanted = fixed(path.interpolate(NOISE, DATA, t_next))
    np.testing.assert_allclose(fixed(state.x), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", FLOWS)
def test_the_networks_alone_say_what_moves_the_free_part(mode):
    flow, pinned = FLOWS[mode], KNOWN.pinned(FLOWS[mode])
    x, t = KNOWN.at(NOISE, jnp.float32(0.5)), jnp.float32(0.5)
    ours, plain = pinned.predict(x, t), flow.predict(x, t)
    np.testing.assert_array_equal(np.where(FREE, ours, 0), np.where(FREE, plain, 0))
    refined, raw = pinned.refine(x, t, plain), flow.refine(x, t, plain)
    np.testing.assert_array_equal(np.where(FREE, refined, 0), np.where(FREE, raw, 0))
    assert not fixed(refined).any()
    assert ours.shape == plain.shape
    drift = np.where(FREE, flow.drift(plain), path.velocity(NOISE, DATA))
    # Both branches are the path's there, so that guidance of any scale leaves it.
    np.testing.assert_allclose(pinned.drift(ours), drift, rtol=0, atol=1e-6)


def test_a_flow_without_a_refiner_stays_without():
    assert KNOWN.pinned(Flow(lambda x, t: x)).refine is None


def test_conditions_are_prepared_for_a_pinned_flow_too():
    flow = Flow(lambda x, moment: x * moment.prepared, prepare=lambda times: 2 * times)
    pinned = KNOWN.pinned(flow)
    assert pinned.prepare is flow.prepare
    assert np.isfinite(sampler.sample(pinned, NOISE, "H2")).all()


@pytest.mark.parametrize(("t", "before"), [(0.5, 0.25), (1.0, 0.75), (0.25, 0.0), (1.0, 0.0)])
@pytest.mark.parametrize("mode", ["none", "paired"])
def test_what_is_remembered_leads_to_the_same_data_after_rewinding(mode, t, before):
    t, before = jnp.float32(t), jnp.float32(before)
    x = KNOWN.at(NOISE + 0.3, t)
    memory = KNOWN.remember(FLOWS[mode].predict(x, t))
    state = KNOWN.rewound(State(x, memory), t, before, fresh(0))
    there = np.asarray(x) + np.asarray(1 - t) * np.asarray(memory)
    here = np.asarray(state.x) + np.asarray(1 - before) * np.asarray(state.memory)
    assert state.memory.shape == memory.shape
    np.testing.assert_allclose(here, there, rtol=0, atol=ROUNDING)
    moved = path.renoise(x, fresh(0), t, before)
    np.testing.assert_array_equal(np.where(FREE, state.x, 0), np.where(FREE, moved, 0))
    wanted = path.interpolate(NOISE, DATA, before)
    np.testing.assert_allclose(fixed(state.x), fixed(wanted), rtol=0, atol=1e-6)
    wanted = np.broadcast_to(path.velocity(NOISE, DATA), memory.shape)
    np.testing.assert_allclose(fixed(state.memory), fixed(wanted), rtol=0, atol=ROUNDING)


def gaussian(mean, deviation):
    """The flow from standard normal noise to a normal distribution, exactly."""

    def predict(x, t):
        variance = (1 - t) ** 2 + (t * deviation) ** 2
        return mean + (t * deviation**2 - (1 - t)) / variance * (x - t * mean)

    return Flow(predict, lambda x, t, m: predict(x, t) - m)


@pytest.mark.parametrize("schedule", ["H8", "P16", "H1P3Rc12"])
def test_tries_keep_the_distribution_that_the_flow_leads_to(schedule):
    shape = (20_000, 1)
    noise = jax.random.normal(jax.random.key(0), shape)
    known = Known(noise, jnp.zeros(shape), jnp.ones((1, 1), bool))

    def rewind(state, t, before, number):
        again = jax.random.normal(jax.random.fold_in(jax.random.key(1), number), shape)
        return known.rewound(state, t, before, again)

    flow = known.pinned(gaussian(2.0, 0.5))
    once = quick(lambda noise: sampler.sample(flow, noise, schedule))(noise)
    often, _ = quick(
        lambda noise: sampler.integrate(flow, noise, schedule, rewind=rewind, tries=3)
    )(noise)
    # Four standard errors of 20,000 samples, beside what the steps themselves err.
    for x in (once, often.x):
        assert float(x.mean()) == pytest.approx(2.0, abs=0.02)
        assert float(x.std()) == pytest.approx(0.5, abs=0.04)
    assert np.corrcoef(np.ravel(once), np.ravel(often.x))[0, 1] < 0.1  # the noise is another


def test_tries_of_a_flow_to_one_picture_lead_to_that_picture():
    target = jnp.asarray(RNG.standard_normal(NOISE.shape), jnp.float32)
    straight = Flow(lambda x, t: (target - x) / (1 - jnp.minimum(t, 1 - 1e-3)))
    known = KNOWN._replace(data=target)
    state, _ = repaint(straight, "E4", known, tries=3)
    np.testing.assert_allclose(state.x, target, rtol=0, atol=1e-5)


def test_a_part_that_two_tries_made_fits_what_is_known_better():
    """Two equal values, one of which is known: the other one is to become the same.

    The flow is exact for data (a, a) with a of unit variance, which a merge alone does not honour.
    """
    count = 4000
    noise = jax.random.normal(jax.random.key(0), (count, 2))
    data = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (count, 1)), (count, 2))

    def predict(x, t):
        mean = jnp.mean(x, axis=1, keepdims=True)
        shared = (2 * t - (1 - t)) / ((1 - t) ** 2 + 2 * t**2) * mean
        return shared - (x - mean) / jnp.maximum(1 - t, 1e-3)

    known = Known(noise, data, jnp.asarray([[True, False]]))

    def error(tries):
        def rewind(state, t, before, number):
            key = jax.random.fold_in(jax.random.key(2), number)
            return known.rewound(state, t, before, jax.random.normal(key, noise.shape))

        state, _ = sampler.integrate(
            known.pinned(Flow(predict)),
            noise,
            "E8",
            after_step=known.after_step,
            rewind=rewind,
            tries=tries,
        )
        return float(jnp.std(state.x[:, 0] - data[:, 0]))

    assert error(4) < 0.8 * error(1)


@pytest.mark.parametrize(("height", "width", "factor"), [(6, 10, 2), (8, 8, 1), (9, 6, 3)])
def test_a_latent_is_repainted_where_any_pixel_it_covers_is(height, width, factor):
    mask = np.random.default_rng(1).random((3, height, width)) < 0.1
    mask[0], mask[0, -1, 0] = False, True  # one corner alone
    found = np.asarray(latent_mask(jnp.asarray(mask), factor))
    assert found.shape == (3, height // factor, width // factor, 1)
    assert found.dtype == bool
    for b, i, j in np.ndindex(found.shape[:3]):
        rows, columns = (slice(k * factor, (k + 1) * factor) for k in (i, j))
        assert found[b, i, j, 0] == mask[b, rows, columns].any()


def test_repainting_compiles_maps_and_differentiates():
    flow = FLOWS["official"]

    def run(noise, data, free):
        state, _ = repainted(Known(noise, data, free), flow, "H1R1", tries=2)
        return state.x

    several = [jnp.stack([a, b]) for a, b in ((NOISE, -NOISE), (DATA, DATA), (FREE, ~FREE))]
    mapped, one = quick(jax.vmap(run))(*several), quick(run)
    for i in range(2):
        alone = one(*(a[i] for a in several))
        np.testing.assert_allclose(mapped[i], alone, rtol=0, atol=ROUNDING)

    @quick
    def slopes(data):
        """Of the sum over the known part, and of that over the free one."""
        _, pull = jax.vjp(lambda data: run(NOISE, data, FREE), data)
        both = (jnp.broadcast_to(part, DATA.shape).astype(DATA.dtype) for part in (~FREE, FREE))
        return [pull(weights)[0] for weights in both]

    known, free = map(np.asarray, slopes(DATA))
    np.testing.assert_array_equal(known, np.broadcast_to(~FREE, DATA.shape).astype(np.float32))
    assert np.isfinite(free).all()
    assert np.abs(fixed(free)).max() > 1e-3  # the free part answers to the known one
    assert not np.where(FREE, free, 0).any()  # and to nothing that it has to make itself


def test_a_known_part_in_float64_stays_so():
    with jax.enable_x64(True):
        known = Known(*(jnp.asarray(np.float64(a)) for a in (NOISE, DATA)), FREE)
        labels, null = (jnp.asarray(np.float64(a)) for a in (LABELS, NULL))
        flow = guidance.paired(velocity, offset, labels, null, 2.0)
        state = known.after_step(
            blocks.heun(
                known.pinned(flow),
                State(known.noise, flow.predict(known.noise, jnp.float64(0))),
                jnp.float64(0),
                jnp.float64(0.5),
            ),
            jnp.float64(0.5),
        )
        moved = partial(known.rewound, state, jnp.float64(0.5), jnp.float64(0.25))
        state = moved(jnp.asarray(np.float64(fresh(1))))
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {np.dtype(np.float64)}


@pytest.mark.parametrize("text", ["E4", "A2x4", "A3x6", "H1A2x4", "S4"])
@pytest.mark.parametrize("tries", [1, 3])
def test_what_is_remembered_leads_to_the_same_data_after_steps_made_again(text, tries):
    # All noise leads straight to one point, so that any method of consistent velocities is exact.
    end = jnp.asarray([2.0, -1.0, 0.5, 1.0]).reshape(1, 1, 4)
    flow = Flow(lambda x, t: (end - x) / (1 - t))
    weights = np.zeros((4, 4), np.float32)
    weights[0, 3], weights[1:, 2:] = 1, (-0.5, 1.5)
    solver = Solver(np.linspace(0, 1, 5, dtype=np.float32), weights) if text == "S4" else None
    free = jnp.ones(NOISE.shape, bool)
    known = Known(NOISE, DATA, free)

    def run(known):
        return sampler.integrate(
            flow,
            known.noise,
            text,
            rewind=lambda state, t, before, number: known.rewound(state, t, before, fresh(number)),
            tries=tries,
            solver=solver,
        )[0].x

    made = quick(run)(known)
    np.testing.assert_allclose(made, jnp.broadcast_to(end, made.shape), atol=20 * ROUNDING)

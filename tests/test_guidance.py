"""Guidance modes against the reference, and what they promise about cost and conditions."""

from functools import cache, partial
from itertools import pairwise

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowturbo_jax import blocks, guidance
from flowturbo_jax.interfaces import State
from flowturbo_jax.sampler import BLOCKS, integrate, sample
from flowturbo_jax.schedule import Schedule

MODES = {
    "q3": lambda *arguments: guidance.official(*arguments, guided_channels=3),
    "all": guidance.official,
    "two": guidance.paired,
}
SCALES = ("1.0", "1.5", "4.0")


@pytest.fixture(scope="module")
def networks():
    return (
        golden.predictor(golden.params("sit/sit", golden.SIT)),
        golden.refiner(golden.params("refiner/refiner", golden.REFINER)),
    )


@cache
def compiled(mode, schedule):
    """The sampler of one mode and schedule, for any scale and both sets of weights."""

    # The trajectories in test_sampler.py are compiled as users do.
    @partial(jax.jit, compiler_options=golden.QUICK_COMPILE)
    def run(params, refiner_params, z, labels, null_labels, scale):
        networks = golden.predictor(params), golden.refiner(refiner_params)
        state, _ = integrate(MODES[mode](*networks, labels, null_labels, scale), z, schedule)
        return state.x, state.memory

    return run


def run(mode, schedule, stored, labels, null_labels):
    return compiled(mode, Schedule.parse(schedule))(
        golden.params("sit/sit", golden.SIT),
        golden.params("refiner/refiner", golden.REFINER),
        stored["z"],
        labels,
        null_labels,
        jnp.asarray(stored["cfg_scale"], jnp.float32),
    )


def one_by_one(letters, refiner="R"):
    """The schedule that makes these steps, as in HPPR, with R replaced by the rule wanted."""
    return "".join(f"{refiner if letter == 'R' else letter}1" for letter in letters)


OFFICIAL = [
    f"H{h}P{p}R{r}"
    for h, p, r in (
        (0, 3, 0),
        (1, 0, 0),
        (1, 0, 2),
        (1, 2, 0),
        (1, 2, 1),
        (1, 5, 3),
        (2, 1, 3),
        (3, 0, 0),
    )
]


@pytest.mark.parametrize("scale", ["1.5", "4.0"])
@pytest.mark.parametrize("schedule", OFFICIAL)
def test_samples_match_the_official_sampler(schedule, scale):
    stored = golden.arrays(f"sampling/{schedule}_cfg{scale}")
    x, memory = run("q3", schedule, stored, stored["y"][:2], stored["y"][2:])
    assert Schedule.parse(schedule) == Schedule.parse(one_by_one(str(stored["kinds"])))
    assert golden.deviation(x, stored["x_final"][:2]) < golden.SAMPLES
    assert golden.deviation(x, stored["x_final_f64"][:2]) < golden.SAMPLES
    assert golden.deviation(memory.reshape(4, 8, 8, 4), stored["v_final"]) < golden.SAMPLES


@pytest.mark.parametrize("letters", ["HPRHPR", "HRP", "PHR"])
def test_samples_of_other_orders_match_the_official_blocks(letters):
    stored = golden.arrays(f"sampling/order_{letters}_cfg4.0")
    x, memory = run("q3", one_by_one(letters), stored, stored["y"][:2], stored["y"][2:])
    assert golden.deviation(x, stored["x_final"][:2]) < golden.SAMPLES
    assert golden.deviation(x, stored["x_final_f64"][:2]) < golden.SAMPLES
    assert golden.deviation(memory.reshape(4, 8, 8, 4), stored["v_final"]) < golden.SAMPLES


@pytest.mark.parametrize("schedule", ["H1P0R2", "H1P2R0", "H1P2R1", "H2P1R3"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rule", "refiner"), [("code", "R"), ("chained", "Rc")])
def test_samples_of_every_mode_and_rule_match_their_formula(schedule, mode, rule, refiner):
    name = f"{mode}_{rule}"
    for scale in ("1.5", "4.0"):
        stored = golden.arrays(f"sampling/variants_{schedule}_cfg{scale}")
        if schedule == "H1P2R0" and rule == "chained":  # nothing to refine, so no rule
            assert name not in stored
            continue
        labels = stored["y"]
        null_labels = np.full_like(labels, stored["null_label"])
        text = one_by_one(str(stored["kinds"]), refiner)
        x, _ = run(mode, text, stored, labels, null_labels)
        assert golden.deviation(x, stored[name][:2]) < golden.SAMPLES
        assert golden.deviation(x, stored[f"{name}_f64"][:2]) < golden.SAMPLES


def test_modes_and_rules_differ_by_more_than_rounding():
    stored = golden.arrays("sampling/variants_H1P0R2_cfg4.0")
    names = [f"{mode}_{rule}" for mode in MODES for rule in ("code", "chained")]
    for i, a in enumerate(names):
        for b in names[:i]:
            assert golden.deviation(stored[a][:2], stored[b][:2]) > 100 * golden.SAMPLES


def forward_flow(mode, networks, name, scale):
    """A flow over the stored rows, whose times differ while a flow's clock is one number."""
    stored = golden.arrays(name)
    t = jnp.asarray(stored["t_cfg"])
    predictor, refiner = networks
    return stored, MODES[mode](
        lambda x, _, y: predictor(x, t, y),
        lambda x, v, _, y: refiner(x, v, t, y),
        jnp.asarray(stored["y_cfg"][:4]),
        jnp.asarray(stored["y_cfg"][4:]),
        float(scale),
    )


@pytest.mark.parametrize("scale", SCALES)
def test_guided_prediction_matches_the_reference(networks, scale):
    stored, flow = forward_flow("q3", networks, "sit/sit_forward", scale)
    x, t = jnp.asarray(stored["x_cfg"][:4]), jnp.asarray(0.0)
    memory = flow.predict(x, t)
    assert golden.deviation(memory.reshape(8, 8, 8, 4), stored[f"cfg3_{scale}"]) < golden.GUIDED
    np.testing.assert_array_equal(flow.drift(memory), memory[0])
    for mode in ("all", "two"):
        _, flow = forward_flow(mode, networks, "sit/sit_forward", scale)
        velocity = flow.drift(flow.predict(x, t))
        assert golden.deviation(velocity, stored[f"cfgall_{scale}"]) < golden.GUIDED


@pytest.mark.parametrize("scale", SCALES)
def test_guided_offset_matches_the_reference(networks, scale):
    stored, flow = forward_flow("q3", networks, "refiner/refiner_forward", scale)
    x, v = jnp.asarray(stored["x_cfg"][:4]), jnp.asarray(stored["v_cfg"])
    offset = flow.refine(x, jnp.asarray(0.0), v.reshape(2, 4, 8, 8, 4))
    assert golden.deviation(offset.reshape(8, 8, 8, 4), stored[f"cfg3_{scale}"]) < golden.GUIDED


def test_paired_branches_are_the_unguided_networks(networks):
    stored, flow = forward_flow("two", networks, "sit/sit_forward", "4.0")
    x, t = jnp.asarray(stored["x_cfg"][:4]), jnp.asarray(0.0)
    memory = flow.predict(x, t)
    assert golden.deviation(memory.reshape(8, 8, 8, 4), stored["cfg_raw"]) < golden.FORWARD
    stored, flow = forward_flow("two", networks, "refiner/refiner_forward", "4.0")
    x, v = jnp.asarray(stored["x_cfg"][:4]), jnp.asarray(stored["v_cfg"])
    offset = flow.refine(x, t, v.reshape(2, 4, 8, 8, 4))
    assert golden.deviation(offset.reshape(8, 8, 8, 4), stored["cfg_raw"]) < golden.FORWARD


@pytest.mark.parametrize("scale", ["1.5", "4.0"])
def test_every_guided_evaluation_is_that_of_the_official_sampler(networks, scale):
    stored = golden.arrays(f"sampling/H1P2R1_cfg{scale}")
    y, grid = jnp.asarray(stored["y"]), jnp.asarray(stored["t_grid"])
    flow = guidance.official(*networks, y[:2], y[2:], float(scale), guided_channels=3)
    outputs = []

    def recorded(function):
        def call(*arguments):
            outputs.append(function(*arguments))
            return outputs[-1]

        return call

    flow = flow._replace(predict=recorded(flow.predict), refine=recorded(flow.refine))
    state = State(jnp.asarray(stored["z"]), None)
    for letter, times in zip(str(stored["kinds"]), pairwise(grid), strict=True):
        state = BLOCKS[letter](flow, state, *times)
    ours = jnp.stack(outputs).reshape(6, 4, 8, 8, 4)
    assert golden.deviation(ours, stored["guided_network_outputs"]) < golden.SAMPLES


def first_velocity_heun(flow, state, t, t_next):
    """Heun's method as in transport/integrators.py, which hands on the velocity at its start."""
    return blocks.heun(flow, state, t, t_next)._replace(memory=flow.predict(state.x, t))


@pytest.mark.parametrize("letters", ["HHR", "HRR"])
def test_chained_rule_is_that_of_the_second_official_sampler(networks, letters):
    stored = golden.arrays(f"sampling/integrators_{letters}_cfg4.0")
    y, grid = jnp.asarray(stored["y"]), jnp.asarray(stored["t_grid"])
    flow = guidance.official(*networks, y[:2], y[2:], 4.0, guided_channels=3)

    def trajectory(**rule):
        state = State(jnp.asarray(stored["z"]), None)
        for letter, times in zip(letters, pairwise(grid), strict=True):
            if letter == "H":
                state = first_velocity_heun(flow, state, *times)
            else:
                state = blocks.refine(flow, state, *times, **rule)
            yield state.x

    chained = jnp.stack(list(trajectory(chained=True)))
    assert golden.deviation(chained, stored["x_traj"][1:, :2]) < golden.SAMPLES
    assert golden.deviation(chained[-1], stored["x_final_f64"][:2]) < golden.SAMPLES
    *_, end = trajectory(chained=False)
    assert golden.deviation(end, stored["x_final"][:2]) > 100 * golden.SAMPLES


# Small smooth networks, for what does not need the real ones.
def predictor(x, t, condition):
    return jnp.sin(x * condition[:, None]) + t


def refiner(x, v, t, condition):
    return 0.3 * jnp.cos(x + v * condition[:, None] - t)


X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)
LABELS, NULL = jnp.asarray([0.5, 1.0, 1.5]), jnp.asarray([0.0, 0.1, 0.2])


def samples(schedule, scale, networks):
    """Of the modes that guide all channels, and unguided under either condition."""
    flows = [guide(*networks, LABELS, NULL, scale) for guide in MODES.values()]
    flows += [guidance.unguided(*networks, condition) for condition in (LABELS, NULL)]
    ends = jax.jit(lambda x: [sample(flow, x, schedule) for flow in flows])(X)
    return dict(zip([*MODES, "conditional", "unconditional"], ends, strict=True))


@pytest.mark.parametrize("schedule", ["E1P2R2", "H2Rc2"])
def test_scale_one_is_no_guidance(schedule):
    ends = samples(schedule, 1.0, (predictor, refiner))
    # u + (c - u) is c but for rounding of values near 1; so are the few steps.
    for mode in MODES:
        np.testing.assert_allclose(ends[mode], ends["conditional"], rtol=0, atol=2e-6)
    assert golden.deviation(ends["conditional"], ends["unconditional"]) > 0.1


def test_scale_zero_is_the_null_condition():
    ends = samples("E1H1P2", 0.0, (predictor, None))
    for mode in ("all", "two"):
        np.testing.assert_allclose(ends[mode], ends["unconditional"], rtol=0, atol=2e-6)
    assert golden.deviation(ends["q3"], ends["unconditional"]) > 0.1  # one channel is conditional


def test_official_on_all_channels_and_paired_agree_without_refiner():
    ends = samples("E1H1P2", 4.0, (predictor, None))
    # Guidance is linear, so that guiding before or after remembering is the same but for rounding.
    np.testing.assert_allclose(ends["all"], ends["two"], rtol=0, atol=1e-5)
    ends = samples("E1H1P2R1", 4.0, (predictor, refiner))
    assert golden.deviation(ends["all"], ends["two"]) > 0.1


def test_official_moves_unguided_channels_by_the_conditional_branch():
    flow = guidance.official(predictor, refiner, LABELS, NULL, 4.0, guided_channels=3)
    t = jnp.asarray(0.2)
    cond, uncond = predictor(X, t, LABELS), predictor(X, t, NULL)
    memory = flow.predict(X, t)
    # The same operations, over a doubled batch.
    close = {"rtol": 0, "atol": 1e-6}
    np.testing.assert_allclose(memory[0, :, :3], (uncond + 4 * (cond - uncond))[:, :3], **close)
    np.testing.assert_array_equal(memory[0, :, :3], memory[1, :, :3])
    np.testing.assert_allclose(memory[:, :, 3], jnp.stack([cond, uncond])[:, :, 3], **close)
    np.testing.assert_array_equal(flow.drift(memory), memory[0])


@pytest.mark.parametrize("mode", MODES)
def test_each_network_is_evaluated_once_per_call_on_a_doubled_batch(mode):
    calls = []

    def counted_predictor(x, t, condition):
        calls.append(("predictor", x.shape, condition.shape))
        return predictor(x, t, condition)

    def counted_refiner(x, v, t, condition):
        calls.append(("refiner", x.shape, v.shape, condition.shape))
        return refiner(x, v, t, condition)

    flow = MODES[mode](counted_predictor, counted_refiner, LABELS, NULL, 2.0)
    memory = flow.predict(X, jnp.asarray(0.0))
    assert calls == [("predictor", (6, 4), (6,))]
    flow.drift(flow.refine(X, jnp.asarray(0.0), memory))
    assert calls[1:] == [("refiner", (6, 4), (6, 4), (6,))]


def test_no_guidance_evaluates_the_batch_as_it_is():
    shapes = []

    def counted(x, t, condition):
        shapes.append((x.shape, condition.shape))
        return predictor(x, t, condition)

    flow = guidance.unguided(counted, refiner, LABELS)
    velocity = flow.predict(X, jnp.asarray(0.5))
    assert shapes == [((3, 4), (3,))]
    np.testing.assert_array_equal(flow.drift(velocity), velocity)
    offset = flow.refine(X, jnp.asarray(0.5), velocity)
    np.testing.assert_array_equal(offset, refiner(X, velocity, jnp.asarray(0.5), LABELS))


def test_flow_without_a_refiner_network_has_none():
    assert guidance.unguided(predictor, None, LABELS).refine is None
    for guide in MODES.values():
        assert guide(predictor, None, LABELS, NULL, 2.0).refine is None


@pytest.mark.parametrize("mode", MODES)
def test_condition_may_be_any_pytree(mode):
    def tree(labels):
        return {"text": jnp.broadcast_to(labels[:, None, None], (3, 5, 2)), "more": (labels,)}

    def text_predictor(x, t, condition):
        return predictor(x, t, condition["text"].mean((1, 2)))

    def text_refiner(x, v, t, condition):
        return refiner(x, v, t, condition["more"][0])

    flow = MODES[mode](text_predictor, text_refiner, tree(LABELS), tree(NULL), 3.0)
    plain = MODES[mode](predictor, refiner, LABELS, NULL, 3.0)
    # The mean of equal numbers may be off by a rounding.
    np.testing.assert_allclose(
        sample(flow, X, "H1P1R1"), sample(plain, X, "H1P1R1"), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("mode", MODES)
def test_new_scale_does_not_trace_again(mode):
    traces = []

    @jax.jit
    def run(x, scale):
        traces.append(scale)
        return sample(MODES[mode](predictor, refiner, LABELS, NULL, scale), x, "H1P1R1")

    outputs = [run(X, scale) for scale in (1.5, 4.0, jnp.asarray(7.0))]
    assert len(traces) <= 2  # Python numbers and arrays have a type each
    assert golden.deviation(outputs[0], outputs[1]) > 0.1
    fixed = sample(MODES[mode](predictor, refiner, LABELS, NULL, 4.0), X, "H1P1R1")
    np.testing.assert_allclose(outputs[1], fixed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_samples_of_a_batch_do_not_see_each_other(mode):
    together = MODES[mode](predictor, refiner, LABELS, NULL, 3.0)
    alone = MODES[mode](predictor, refiner, LABELS[1:2], NULL[1:2], 3.0)
    t = jnp.asarray(0.4)
    memory = together.predict(X, t)
    offset = together.refine(X, t, memory)
    np.testing.assert_allclose(memory[:, 1:2], alone.predict(X[1:2], t), rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        offset[:, 1:2], alone.refine(X[1:2], t, memory[:, 1:2]), rtol=0, atol=1e-6
    )

"""What depends on times alone is computed once for all of them, and changes no result."""

from functools import partial

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

import flowturbo_jax as ft
from flowturbo_jax import sampler
from flowturbo_jax.interfaces import Moment, Timeless
from flowturbo_jax.model_directory import Model, modules
from flowturbo_jax.models import Refiner
from flowturbo_jax.pipelines import programs

LABELS = jnp.array([1, 2, 3], jnp.int32)
MODES = ("none", "official", "paired")


def model(**fields):
    description = tiny.description(**fields)
    built = modules(description)
    params = {name: tiny.random_params(module, 3) for name, module in built.items()}
    return Model(
        description, built["predictor"], params["predictor"], built["refiner"], params["refiner"]
    )


@pytest.fixture(scope="module")
def digits_like():
    return model()


def flow_of(given, mode, interval=None):
    params = (given.predictor_params, given.refiner_params)
    interval = None if interval is None else jnp.asarray(interval, jnp.float32)
    return programs.make_flow(
        programs.Networks(given), params, LABELS, jnp.float32(1.7), interval, mode
    )


def noise_of(given):
    shape = (len(LABELS), *given.description.predictor.shape)
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def plain_of(flow):
    return flow._replace(prepare=None)


def sampled(flow, noise, schedule):
    function = partial(ft.sample, flow, schedule=schedule)
    return jax.jit(function, compiler_options=golden.QUICK_COMPILE)(noise)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("interval", [None, (0.3, 0.8)])
def test_prepared_conditions_change_no_latents(digits_like, mode, interval):
    """To rounding: the same products, of more rows at once."""
    if mode == "none" and interval:
        return
    flow = flow_of(digits_like, mode, interval)
    given = [sampled(f, noise_of(digits_like), "P2R1Rc1E1") for f in (flow, plain_of(flow))]
    np.testing.assert_allclose(*given, atol=2e-6)


def test_an_unconditional_model_and_a_reversed_clock_prepare_too():
    for fields in ({"num_classes": 0}, {"reversed_time": True}, {"null_class": False}):
        given = model(**fields)
        flow = flow_of(given, "none")
        noise = noise_of(given)
        results = [sampled(f, noise, "H1R1") for f in (flow, plain_of(flow))]
        np.testing.assert_allclose(*results, atol=2e-6)


def test_every_evaluation_gets_what_was_prepared_for_its_time():
    seen = []

    def predict(x, t):
        assert isinstance(t, Moment)
        return jnp.full_like(x, 0.0) + t.prepared - t.t  # zero if it is that of t

    def prepare(times):
        seen.append(times.shape)
        return times

    flow = ft.Flow(predict, lambda x, t, m: jnp.zeros_like(m) + t.prepared - t.t, prepare=prepare)
    x = jnp.ones((2, 3))
    for schedule in ("E2", "H2", "P3", "H1P1R2", "H1Rc1"):
        np.testing.assert_array_equal(ft.sample(flow, x, schedule), x)
    assert set(seen) == {(3,), (4,), (5,)}  # steps + 1


def test_what_is_the_same_at_all_times_is_prepared_once_and_handed_on_as_it_is():
    big, shapes = jnp.arange(6.0).reshape(2, 3), []

    def prepare(times):
        return {"time": times, "text": Timeless((big, jnp.ones(7)))}

    def predict(x, t):
        shapes.append(jax.tree.map(jnp.shape, t.prepared))
        return jnp.zeros_like(x) + t.prepared["text"][0] + t.prepared["time"] - t.t

    x = jnp.ones((2, 3))
    out = ft.sample(ft.Flow(predict, prepare=prepare), x, "H1P2")
    np.testing.assert_allclose(out, x + big, rtol=1e-6)
    assert all(found == {"time": (), "text": ((2, 3), (7,))} for found in shapes)
    program = jax.make_jaxpr(
        lambda text: ft.sample(
            ft.Flow(
                lambda x, t: x + t.prepared,
                prepare=lambda times: Timeless(text),
            ),
            x,
            "H9",
        )
    )(big)
    assert "[10,2,3]" not in str(program), "copied for every time"


def test_after_step_is_given_plain_times():
    times = []

    def after(state, t):
        times.append(t.shape)
        return state

    flow = ft.Flow(lambda x, t: x, prepare=lambda times: times)
    ft.sample(flow, jnp.ones((1, 2)), "H2", after_step=after)
    assert times == [()]


def test_what_would_take_too_much_memory_is_made_step_by_step(digits_like, monkeypatch):
    flow, noise = flow_of(digits_like, "paired"), noise_of(digits_like)
    kinds = []

    def watched(x, t):
        kinds.append(type(t))
        return flow.predict(x, t)

    watching = flow._replace(predict=watched)
    first = ft.sample(watching, noise, "H2")
    assert set(kinds) == {Moment}
    kinds.clear()
    monkeypatch.setattr(sampler, "PREPARED_BYTES", 1000)
    second = ft.sample(watching, noise, "H2")
    assert Moment not in kinds
    np.testing.assert_allclose(first, second, atol=2e-6)


def test_gradients_and_vmap_go_through_prepared_conditions(digits_like):
    flow, noise = flow_of(digits_like, "paired"), noise_of(digits_like)

    def loss(flow, t_start):
        return jnp.sum(ft.sample(flow, noise, "H1R1", t_start=t_start) ** 2)

    for kind in (jax.grad, lambda f: jax.vmap(f, in_axes=0)):
        at = jnp.float32(0.2) if kind is jax.grad else jnp.array([0.1, 0.3])
        found = [jax.jit(kind(partial(loss, f)))(at) for f in (flow, flow._replace(prepare=None))]
        np.testing.assert_allclose(*found, rtol=1e-4)


def test_an_evaluation_with_prepared_conditions_reads_no_conditioning_weights(digits_like):
    """A third of SiT-XL/2: adaLN, and the embeddings of time and label."""
    network, params = digits_like.predictor, digits_like.predictor_params
    x = noise_of(digits_like)
    made = network.apply({"params": params}, jnp.array([0.3]), LABELS, 3, method="prepare")
    condition = jax.tree.map(lambda leaf: leaf[0], made)
    plain = network.apply({"params": params}, x, jnp.float32(0.3), LABELS)

    def spoilt(path, leaf):
        name = jax.tree_util.keystr(path)
        unread = ("modulation", "time_embedding", "label_embedding")
        return jnp.full_like(leaf, jnp.nan) if any(part in name for part in unread) else leaf

    broken = jax.tree_util.tree_map_with_path(spoilt, params)
    out = network.apply({"params": broken}, x, jnp.float32(0.3), condition)
    np.testing.assert_allclose(out, plain, atol=2e-6)
    assert not np.isfinite(network.apply({"params": broken}, x, jnp.float32(0.3), LABELS)).any()


@pytest.mark.parametrize(
    "prepare",
    [lambda times: times[:1], lambda times: jnp.zeros(()), lambda times: (times, times.T[1:])],
)
def test_what_is_not_prepared_for_every_time_is_refused(prepare):
    flow = ft.Flow(lambda x, t: x, prepare=prepare)
    with pytest.raises(ft.InputError, match="for 3 times; every array needs a first axis"):
        ft.sample(flow, jnp.ones((1, 2)), "E2")


def test_a_refiner_around_a_network_that_prepares_nothing():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, t, condition):
            return nn.Dense(1)(x) * t

    x, times = jnp.ones((3, 4, 4, 1)), jnp.array([0.2, 0.7])
    refiner = Refiner(Net())
    variables = refiner.init(jax.random.key(0), x, x, times[0], LABELS)
    made = refiner.apply(variables, times, LABELS, 3, method="prepare")
    np.testing.assert_array_equal(made, jnp.broadcast_to(LABELS, (2, 3)))

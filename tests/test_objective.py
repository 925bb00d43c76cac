"""Objectives and their gradients against the reference; random draws."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowturbo_jax import convert, objective

# Absolute; float32 against float64 in the reference itself is 1e-6, for gradients of up to 1.6.
GRADIENTS = 2e-5
LOSSES = 1e-5  # relative

HANDLINGS = [("code", "official"), ("paper", "paper")]


@pytest.fixture(scope="module")
def teacher_params():
    return golden.params("sit/sit", golden.SIT)


@pytest.fixture(scope="module")
def refiner_params():
    return golden.params("refiner/refiner", golden.REFINER)


@pytest.fixture(scope="module")
def refiner_batches():
    """The two stored cases, as the loss takes them."""
    stored = golden.arrays("train/refiner_loss")

    def batch(case):
        y, dt = stored[f"{case}_y"], np.float32(stored[f"{case}_dt"])
        return {
            "data": stored[f"{case}_x1"],
            "noise": stored[f"{case}_x0"],
            "t": stored[f"{case}_t"],
            "dt": np.full(len(y), dt, np.float32),
            "condition": y,
            "dropped": np.where(stored[f"{case}_drop"], stored["null_label"], y),
        }

    return stored, [jax.tree.map(jnp.asarray, batch(case)) for case in (0, 1)]


@pytest.fixture(scope="module")
def loss_and_gradients():
    """`(refiner params, teacher params, batch, label handling) -> losses, both gradients`."""

    def mean_loss(refiner_params, teacher_params, batch, label_handling):
        losses = objective.refiner_loss(
            golden.refiner(refiner_params),
            golden.predictor(teacher_params),
            **batch,
            label_handling=label_handling,
        )
        return jnp.mean(losses), losses

    return jax.jit(
        jax.value_and_grad(mean_loss, argnums=(0, 1), has_aux=True),
        static_argnums=3,
        compiler_options=golden.QUICK_COMPILE,
    )


@pytest.mark.parametrize(("name", "label_handling"), HANDLINGS)
@pytest.mark.parametrize("case", [0, 1])
def test_refiner_loss_matches_the_official_training(
    teacher_params, refiner_params, refiner_batches, loss_and_gradients, case, name, label_handling
):
    stored, batches = refiner_batches
    (mean, losses), _ = loss_and_gradients(
        refiner_params, teacher_params, batches[case], label_handling
    )
    for suffix in ("", "_f64"):
        expected = stored[f"{case}_{name}_per_sample{suffix}"]
        np.testing.assert_allclose(losses, expected, rtol=LOSSES)
        np.testing.assert_allclose(mean, stored[f"{case}_{name}_mean{suffix}"], rtol=LOSSES)
    assert losses.shape == (5,)


@pytest.mark.parametrize(("name", "label_handling"), HANDLINGS)
def test_refiner_gradients_match_the_official_training(
    teacher_params, refiner_params, refiner_batches, loss_and_gradients, name, label_handling
):
    stored, batches = refiner_batches
    _, (gradients, _) = loss_and_gradients(
        refiner_params, teacher_params, batches[0], label_handling
    )
    ours = convert.state_from_params("sit", golden.REFINER, gradients)
    assert not ours.pop("pos_embed").any()
    theirs = golden.weights(f"train/refiner_grads_{name}")
    assert set(ours) == set(theirs)
    assert max(golden.deviation(ours[key], theirs[key]) for key in theirs) < GRADIENTS
    norm = sum(float(np.square(leaf).sum()) for leaf in ours.values()) ** 0.5
    assert norm == pytest.approx(float(stored[f"0_{name}_gradnorm_f64"]), rel=1e-5)


def test_label_handlings_differ_where_labels_are_dropped_only(refiner_batches):
    stored, batches = refiner_batches
    drop = stored["0_drop"]
    difference = np.abs(stored["0_code_per_sample"] - stored["0_paper_per_sample"])
    assert difference[drop].min() > 0.1
    assert difference[~drop].max() < 1e-5
    assert not stored["1_drop"].any()
    assert (np.asarray(batches[0]["t"] + batches[0]["dt"]) <= 1.12).all()


@pytest.mark.parametrize("label_handling", objective.LABEL_HANDLING)
def test_teacher_gets_no_gradient(
    teacher_params, refiner_params, refiner_batches, loss_and_gradients, label_handling
):
    _, batches = refiner_batches
    _, (gradients, teacher_gradients) = loss_and_gradients(
        refiner_params, teacher_params, batches[0], label_handling
    )
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(teacher_gradients))
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))


def test_unknown_label_handling_is_refused(refiner_batches):
    _, batches = refiner_batches
    with pytest.raises(ValueError, match="'code', not one of"):
        objective.refiner_loss(
            lambda x, v, t, y: x, lambda x, t, y: x, **batches[0], label_handling="code"
        )


def test_perfect_refiner_has_no_loss(refiner_batches):
    _, batches = refiner_batches

    def teacher(x, t, labels):
        return jnp.sin(x) + (t * labels.astype(jnp.float32)).reshape(-1, 1, 1, 1)

    def perfect(x, v, t, labels):
        return teacher(x, t, labels) - v

    for label_handling in objective.LABEL_HANDLING:
        losses = objective.refiner_loss(
            perfect, teacher, **batches[0], label_handling=label_handling
        )
        assert float(losses.max()) < 1e-10  # the square of rounding 1e-5


def test_refiner_loss_is_one_euler_step_of_the_teacher(refiner_batches):
    _, batches = refiner_batches
    batch = batches[0]
    seen = []

    def teacher(x, t, labels):
        seen.append((x, t))
        return 2 * x

    def refiner(x, v, t, labels):
        seen.append((x, t, v))
        return jnp.zeros_like(x)

    losses = objective.refiner_loss(refiner, teacher, **batch)
    t, dt = batch["t"].reshape(-1, 1, 1, 1), batch["dt"].reshape(-1, 1, 1, 1)
    x = (1 - t) * batch["noise"] + t * batch["data"]
    (x_first, t_first), (x_next, t_next), (x_refined, t_refined, v) = seen
    close = {"rtol": 0, "atol": 2e-6}  # a few roundings of values near 4
    np.testing.assert_allclose(x_first, x, **close)
    np.testing.assert_allclose(v, 2 * x, **close)
    np.testing.assert_allclose(x_next, x + dt * 2 * x, **close)
    np.testing.assert_array_equal(x_refined, x_next)
    np.testing.assert_array_equal(t_first, batch["t"])
    np.testing.assert_array_equal(t_next, batch["t"] + batch["dt"])
    np.testing.assert_array_equal(t_refined, t_next)
    expected = jnp.mean(jnp.square(2 * x - 2 * (x + dt * 2 * x)), (1, 2, 3))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_flow_matching_loss_and_gradients_match_the_official_training():
    stored = golden.arrays("train/flow_matching")
    params = golden.params("sit/sit_micro", golden.MICRO)
    labels = np.where(stored["drop"], stored["null_label"], stored["y"])
    batch = [jnp.asarray(array) for array in (stored["x1"], stored["x0"], stored["t"], labels)]

    def mean_loss(params):
        network = golden.predictor(params, golden.MICRO)
        losses = objective.flow_matching_loss(network, *batch)
        return jnp.mean(losses), losses

    gradients, losses = jax.jit(
        jax.grad(mean_loss, has_aux=True), compiler_options=golden.QUICK_COMPILE
    )(params)
    for suffix in ("", "_f64"):
        np.testing.assert_allclose(losses, stored[f"per_sample{suffix}"], rtol=LOSSES)
        np.testing.assert_allclose(losses.mean(), stored[f"mean{suffix}"], rtol=LOSSES)
    ours = convert.state_from_params("sit", golden.MICRO, gradients)
    assert not ours.pop("pos_embed").any()
    theirs = golden.weights("train/flow_matching_grads")
    assert set(ours) == set(theirs)
    assert max(golden.deviation(ours[key], theirs[key]) for key in theirs) < GRADIENTS


def test_flow_matching_loss_of_the_true_velocity_is_zero():
    data, noise = (jax.random.normal(jax.random.key(i), (3, 4, 4, 2)) for i in (0, 1))
    t = jnp.asarray([0.0, 0.4, 1.0])
    losses = objective.flow_matching_loss(lambda x, t, _: data - noise, data, noise, t, None)
    np.testing.assert_array_equal(losses, np.zeros(3))
    losses = objective.flow_matching_loss(lambda x, t, _: data - noise + 2, data, noise, t, None)
    np.testing.assert_allclose(losses, [4.0, 4.0, 4.0], rtol=1e-5)


KEY = jax.random.key(11)
INDICES = jnp.arange(6)
NULL = {"label": jnp.full(6, 10), "text": jnp.zeros((6, 2, 3))}
CONDITION = {"label": jnp.arange(6), "text": jnp.ones((6, 2, 3))}


@jax.jit
def draws(indices, key=KEY):
    """Everything that training draws for the samples of these places in the batch."""
    keys = objective.sample_keys(key, indices)
    condition = jax.tree.map(lambda leaf: leaf[indices % 6], (CONDITION, NULL))
    return {
        "noise": objective.draw_noise(keys, (2, 3)),
        "t": objective.draw_times(keys),
        "dt": objective.draw_steps(keys, (0.06, 0.12)),
        "condition": objective.drop_condition(keys, *condition, 0.5),
    }


def test_split_batch_draws_what_the_whole_draws():
    parts = [draws(INDICES[:3]), draws(INDICES[3:])]
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    whole = draws(INDICES)
    jax.tree.map(np.testing.assert_array_equal, joined, whole)
    assert whole["noise"].shape == (6, 2, 3)


def test_samples_and_steps_draw_different_numbers():
    whole, next_step = draws(INDICES), draws(INDICES, jax.random.key(12))
    for name in ("noise", "t", "dt"):
        values = np.concatenate([whole[name], next_step[name]])
        assert len(np.unique(values)) == values.size


MANY = objective.sample_keys(KEY, jnp.arange(20_000))


def test_noise_is_standard_normal():
    noise = np.asarray(objective.draw_noise(MANY, (3,)), np.float64)
    # Five standard errors of 60,000 draws.
    assert abs(noise.mean()) < 5 / 60_000**0.5
    assert abs(noise.var() - 1) < 5 * (2 / 60_000) ** 0.5


def test_times_are_uniform_on_the_half_open_unit_interval():
    t = np.asarray(objective.draw_times(MANY), np.float64)
    assert 0 <= t.min() < 0.01
    assert 0.99 < t.max() < 1
    # Five standard errors of a count in a tenth of 20,000 draws: 5 sqrt(1800) = 212.
    assert np.abs(np.histogram(t, 10, (0, 1))[0] - 2000).max() < 212


@pytest.mark.parametrize("dt_range", [(0.0, 0.12), (0.06, 0.12), (0.1, 0.1)])
def test_steps_are_uniform_above_the_lower_end(dt_range):
    low, high = dt_range
    dt = np.asarray(objective.draw_steps(MANY, dt_range))
    assert dt.dtype == np.float32
    assert dt.max() <= np.float32(high)
    if low < high:
        assert dt.min() > low
        assert dt.max() - dt.min() > 0.99 * (high - low)
        # Five standard errors of the mean of 20,000 draws.
        assert dt.mean() == pytest.approx((low + high) / 2, abs=5 * (high - low) / 490)


def test_step_is_never_zero_even_for_the_smallest_draw(monkeypatch):
    monkeypatch.setattr(objective, "draw_times", lambda keys: jnp.zeros(keys.shape))
    assert objective.draw_steps(MANY[:1], (0.0, 0.12)).tolist() == [np.float32(0.12)]
    largest = 1 - 2**-23  # of a float32 uniform draw
    monkeypatch.setattr(objective, "draw_times", lambda keys: jnp.full(keys.shape, largest))
    for low in (0.0, 0.06):
        assert low < float(objective.draw_steps(MANY[:1], (low, 0.12))[0]) < low + 1e-6


def test_one_key_for_all_gives_one_step_size_per_batch():
    keys = jnp.broadcast_to(KEY, (5,))
    assert len(np.unique(objective.draw_steps(keys, (0.0, 0.12)))) == 1


def test_fitted_times_stay_on_the_path():
    t = objective.draw_times(MANY)
    dt = objective.draw_steps(
        objective.sample_keys(jax.random.key(1), jnp.arange(20_000)), (0.0, 0.5)
    )
    fitted = objective.fit_times(t, dt)
    assert float((fitted + dt).max()) <= 1
    assert float(fitted.min()) >= 0
    np.testing.assert_array_equal(fitted, t * (1 - dt))
    latest = jnp.full_like(dt, 1 - 2**-23)  # the largest that a float32 uniform draw gives
    assert float((objective.fit_times(latest, dt) + dt).max()) <= 1


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_condition_is_dropped_with_its_probability(probability):
    condition, null = jnp.arange(20_000), jnp.full(20_000, -1)
    dropped = np.asarray(objective.drop_condition(MANY, condition, null, probability))
    gone = dropped == -1
    np.testing.assert_array_equal(dropped[~gone], np.arange(20_000)[~gone])
    # Five standard errors of a share of 20,000.
    error = (probability * (1 - probability) / 20_000) ** 0.5
    assert gone.mean() == pytest.approx(probability, abs=5 * error)


def test_whole_condition_of_a_sample_is_dropped_or_kept():
    keys = objective.sample_keys(jax.random.key(2), INDICES)
    dropped = objective.drop_condition(keys, CONDITION, NULL, 0.5)
    gone = np.asarray(dropped["label"]) == 10
    assert 0 < gone.sum() < 6
    np.testing.assert_array_equal(dropped["label"], np.where(gone, 10, np.arange(6)))
    np.testing.assert_array_equal(
        dropped["text"], np.where(gone, 0.0, 1.0)[:, None, None] * np.ones((6, 2, 3))
    )


@pytest.mark.parametrize(("probability", "expected"), [(0.0, CONDITION), (1.0, NULL)])
def test_probabilities_zero_and_one_are_exact(probability, expected):
    keys = objective.sample_keys(KEY, INDICES)
    dropped = objective.drop_condition(keys, CONDITION, NULL, probability)
    jax.tree.map(np.testing.assert_array_equal, dropped, expected)
    many = objective.drop_condition(MANY, jnp.ones(20_000), jnp.zeros(20_000), probability)
    assert float(many.mean()) == 1 - probability

"""The mixture family: an exact velocity, exact samples, exact moments, and the commands on it."""

import dataclasses
import json

import digits_mixture
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import flowturbo_jax as ft
from flowturbo_jax import data, mixtures, model_directory, tasks, trainer
from flowturbo_jax.commands.sample import sample as sample_command
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.metrics import frechet_distance
from flowturbo_jax.model_description import Description
from flowturbo_jax.models import Mixture, MixtureConfig, SiTConfig, family
from flowturbo_jax.models.mixture import mixture_velocity
from flowturbo_jax.sample_config import SampleConfig
from flowturbo_jax.train_config import TrainConfig

CONFIG = MixtureConfig(input_size=2, in_channels=1, num_classes=2, components=2)
NULL = CONFIG.null_label


def random_params(config: MixtureConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Gaussians of other sizes, directions and weights each."""
    rng = np.random.default_rng(seed)
    count, dimensions = config.gaussians, config.dimensions
    rotations, _ = np.linalg.qr(rng.standard_normal((count, dimensions, dimensions)))
    params = {
        "log_weights": np.log(rng.dirichlet(np.full(count, 5.0))),
        "means": rng.standard_normal((count, dimensions)),
        "eigenvalues": rng.uniform(0.05, 1.5, (count, dimensions)),
        "eigenvectors": rotations,
    }
    return {name: array.astype(np.float32) for name, array in params.items()}


PARAMS = random_params(CONFIG)


def description(config: MixtureConfig, refiner: SiTConfig | None = None) -> Description:
    return Description(
        family="mixture",
        predictor=config,
        refiner=refiner,
        class_names=tiny.NAMES[: config.num_classes],
        guidance="paired",
        guidance_scale=1.5,
        guided_channels=None,
        source={},
    )


def velocity(x, t, labels, config=CONFIG, params=PARAMS):
    labels = jnp.asarray(labels, jnp.int32)
    t, params = jnp.asarray(t, jnp.float32), jax.tree.map(jnp.asarray, params)
    return Mixture(config).apply({"params": params}, jnp.asarray(x), t, labels)


def noise(count: int, config: MixtureConfig = CONFIG, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (count, *config.shape))


def by_full_matrices(x, t, label, config=CONFIG, params=PARAMS) -> np.ndarray:
    """The posterior mean of data - noise for one sample, with explicit inverses, in float64."""
    identity, terms = np.eye(config.dimensions), []
    for k in range(config.gaussians):
        if label not in (config.null_label, k // config.components):
            continue
        mean, values, vectors = (
            params[name][k].astype(np.float64) for name in ("means", "eigenvalues", "eigenvectors")
        )
        covariance = vectors @ np.diag(values) @ vectors.T
        of_x = (1 - t) ** 2 * identity + t**2 * covariance
        away = np.linalg.inv(of_x) @ (x - t * mean)
        data, noise = mean + t * covariance @ away, (1 - t) * away
        log_density = -0.5 * ((x - t * mean) @ away + np.linalg.slogdet(of_x)[1])
        terms.append((params["log_weights"][k] + log_density, data - noise))
    logs = np.array([log for log, _ in terms])
    shares = np.exp(logs - logs.max())
    return shares / shares.sum() @ np.array([v for _, v in terms])


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 1.0])
def test_velocity_is_the_posterior_mean(t):
    x, labels = noise(6), [0, 1, NULL] * 2
    found = velocity(x, t, labels).reshape(6, -1)
    rows = np.asarray(x, np.float64).reshape(6, -1)
    expected = [by_full_matrices(row, t, label) for row, label in zip(rows, labels, strict=True)]
    # float32, with 1 / eigenvalue up to 20 at t = 1.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_velocity_regresses_data_minus_noise_on_the_point_of_the_path():
    """The residual of a conditional mean is uncorrelated with every function of what is given."""
    count, rng = 100_000, np.random.default_rng(1)
    labels = rng.integers(0, CONFIG.num_classes, count)
    x0 = rng.standard_normal((count, *CONFIG.shape)).astype(np.float32)
    x1 = mixtures.draw(CONFIG, PARAMS, labels, rng)
    t = rng.uniform(size=count).astype(np.float32)
    x = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * x1
    residual = (x1 - x0 - velocity(x, t, labels)).reshape(count, -1)
    points = x.reshape(count, -1)
    given = [np.ones((count, 1)), points, np.tanh(2 * points), points**2, t[:, None]]
    for function in given:
        products = residual[:, :, None] * function[:, None, :]
        errors = products.std(axis=0) / np.sqrt(count)
        # 52 normal variables: one beyond 4.5 has a probability of 4e-4.
        assert np.abs(products.mean(axis=0) / errors).max() < 4.5


def test_one_time_for_all_is_that_time_for_each():
    x, labels = noise(3), [0, 1, NULL]
    np.testing.assert_array_equal(velocity(x, 0.4, labels), velocity(x, [0.4] * 3, labels))


def test_a_label_leaves_only_its_own_gaussians():
    x = noise(5)
    alone = MixtureConfig(input_size=2, in_channels=1, num_classes=1, components=2)
    for label in (0, 1):
        part = {name: array[2 * label : 2 * label + 2] for name, array in PARAMS.items()}
        expected = velocity(x, 0.6, [0] * 5, alone, part)
        # The same numbers, summed with two zeros or without: a few roundings of values near 3.
        np.testing.assert_allclose(velocity(x, 0.6, [label] * 5), expected, rtol=0, atol=5e-6)


def test_the_null_label_is_the_mixture_of_all_by_their_weights():
    x = noise(5)
    one_class = MixtureConfig(input_size=2, in_channels=1, num_classes=1, components=4)
    expected = velocity(x, 0.6, [0] * 5, one_class, PARAMS)
    np.testing.assert_allclose(velocity(x, 0.6, [NULL] * 5), expected, rtol=0, atol=5e-6)
    weights = np.log(np.array([0.5, 0.5, 1e-30, 1e-30], np.float32))
    first = {**PARAMS, "log_weights": weights}
    found = velocity(x, 0.6, [NULL] * 5, params=first)
    expected = velocity(x, 0.6, [0] * 5, params=first)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_velocity_and_its_gradient_are_finite_far_out(t):
    params = {**PARAMS, "eigenvalues": np.full_like(PARAMS["eigenvalues"], mixtures.FLOOR)}
    for scale in (0.0, 1.0, 100.0):
        x = scale * noise(4)

        def total(params, x):
            return velocity(x, t, [0, 1, NULL, NULL], params=params).sum()

        gradients = jax.grad(total, argnums=(0, 1))(params, x)
        assert np.isfinite(velocity(x, t, [0, 1, NULL, NULL])).all()
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_the_flow_to_one_gaussian_ends_where_the_closed_form_does():
    config = MixtureConfig(input_size=2, in_channels=1, num_classes=1, components=1)
    params = random_params(config, 3)
    x0 = noise(20, config)
    labels = np.zeros(20, np.int32)
    flow = ft.Flow(lambda x, t: velocity(x, t, labels, config, params))
    vectors = params["eigenvectors"][0]
    root = vectors @ np.diag(np.sqrt(params["eigenvalues"][0])) @ vectors.T
    expected = params["means"][0] + np.asarray(x0).reshape(20, -1) @ root
    found = ft.sample(flow, x0, "H256").reshape(20, -1)
    # Heun's error falls with the square of the step, and is 2e-4 here.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("block", ["H", "P"])
def test_solvers_are_of_second_order_on_it(block):
    with jax.enable_x64(True):
        params = {name: jnp.asarray(array, jnp.float64) for name, array in PARAMS.items()}
        weights = jnp.broadcast_to(params.pop("log_weights"), (8, CONFIG.gaussians))
        x = jnp.asarray(np.random.default_rng(0).standard_normal((8, CONFIG.dimensions)))

        def predict(x, t):
            return mixture_velocity(x, jnp.broadcast_to(t, (8,)), weights, **params)

        flow = ft.Flow(predict)
        exact = ft.sample(flow, x, "H4096")
        coarse, fine = (
            float(jnp.abs(ft.sample(flow, x, f"{block}{steps}") - exact).max())
            for steps in (128, 256)
        )
    # The slope has an error of the order of the step relative to the flow's own time, near 0.1.
    assert np.log2(coarse / fine) == pytest.approx(2, abs=0.15)


def test_samples_of_a_fine_schedule_and_exact_draws_have_the_exact_moments():
    count, labels = 20_000, np.arange(20_000) % CONFIG.num_classes
    balanced = {**PARAMS, "log_weights": np.log(np.float32([0.1, 0.4, 0.3, 0.2]))}
    mean, covariance = mixtures.moments(CONFIG, balanced)
    flow = ft.Flow(lambda x, t: velocity(x, t, labels, params=balanced))
    rng = np.random.default_rng(2)
    drawn = {
        "flow": np.asarray(jax.jit(lambda x: ft.sample(flow, x, "H128"))(noise(count))),
        "labels": mixtures.draw(CONFIG, balanced, labels, rng),
        "null": mixtures.draw(CONFIG, balanced, np.full(count, NULL), rng),
    }
    for name, samples in drawn.items():
        points = samples.reshape(count, -1).astype(np.float64)
        away = points - mean
        products = away[:, :, None] * away[:, None, :]
        for values, exact in ((away, np.zeros_like(mean)), (products, covariance)):
            scores = (values.mean(axis=0) - exact) / (values.std(axis=0) / np.sqrt(count))
            # 42 normal variables: one beyond 4.5 has a probability of 3e-4.
            assert np.abs(scores).max() < 4.5, name
    apart = frechet_distance(*mixtures.moments(CONFIG, PARAMS, 0), mean, covariance)
    assert apart > 0.1  # so that the wrong class would be seen


def test_moments_of_a_class_are_those_of_its_own_gaussians():
    mean, covariance = mixtures.moments(CONFIG, PARAMS, 1)
    shares = np.exp(PARAMS["log_weights"][2:].astype(np.float64))
    shares /= shares.sum()
    np.testing.assert_allclose(mean, shares @ PARAMS["means"][2:], rtol=1e-6)
    rows = mixtures.draw(CONFIG, PARAMS, np.full(20_000, 1), np.random.default_rng(0))
    found = np.cov(rows.reshape(20_000, -1).T)
    # The standard error of a variance near 2 is 2 sqrt(2 / 20,000) = 0.02.
    np.testing.assert_allclose(found, covariance, rtol=0, atol=0.1)
    with pytest.raises(InputError, match=r"label 3 is out of range; .*classes 0 to 1, and 2"):
        mixtures.moments(CONFIG, PARAMS, 3)


def drawn_images(counts=(60, 240)) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat(np.arange(len(counts)), counts)
    return mixtures.draw(CONFIG, PARAMS, labels, np.random.default_rng(5)), labels


def test_fit_keeps_the_moments_of_each_class_and_gives_every_class_one_weight():
    images, labels = drawn_images()
    config, params = mixtures.fit(images, labels, 2, floor=0.01)
    assert config == CONFIG
    for label in range(2):
        rows = images[labels == label].reshape(-1, config.dimensions).astype(np.float64)
        mean, covariance = mixtures.moments(config, params, label)
        # Expectation maximisation keeps both at every step; the floor comes on top. It stops when
        # its likelihood changes by 1e-3.
        np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=0, atol=1e-3)
        wanted = np.cov(rows.T, bias=True) + 0.01 * np.eye(config.dimensions)
        np.testing.assert_allclose(covariance, wanted, rtol=0, atol=1e-2)
    shares = np.exp(params["log_weights"]).reshape(2, 2).sum(axis=1)
    np.testing.assert_allclose(shares, 0.5, rtol=1e-6)


def test_a_fit_depends_on_its_seed_alone_and_no_direction_is_without_variance():
    images, labels = drawn_images()
    images[:, 0, 0] = -1.0  # a pixel that never changes
    config, params = mixtures.fit(images, labels, 2, seed=3)
    again = mixtures.fit(images, labels, 2, seed=3)[1]
    assert model_directory.fingerprint(params) == model_directory.fingerprint(again)
    assert params["eigenvalues"].min() == np.float32(mixtures.FLOOR)
    flow = ft.Flow(lambda x, t: velocity(x, t, [0, 1, NULL], config, params))
    found = np.asarray(ft.sample(flow, noise(3), "H32"))
    # Three standard deviations of the floor.
    np.testing.assert_allclose(found[:, 0, 0], -1.0, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"components": 0}, "components is 0; it must be a positive integer"),
        ({"components": 2.0}, r"components is 2\.0"),
        ({"components": 61}, "class 0 has 60 images; 61 components need at least 61"),
        ({"floor": 0.0}, r"floor is 0\.0; without variance"),
        ({"images": np.full((300, 2, 2, 1), np.nan)}, "not finite"),
        ({"images": np.zeros((300, 2, 3, 1))}, r"images are \[300, 2, 3, 1\]"),
        ({"images": np.zeros((0, 2, 2, 1))}, r"images are \[0, 2, 2, 1\]"),
        ({"labels": np.zeros(7, int)}, r"labels are int64\[7\] for 300 images"),
        ({"labels": np.zeros(300)}, r"labels are float64\[300\]"),
        ({"labels": np.full(300, -1)}, "label -1 is below 0"),
        ({"labels": np.full(300, 1)}, "class 0 has 0 images"),
    ],
)
def test_what_cannot_be_fitted_is_refused(as_users_run_it, change, message):
    images, labels = drawn_images()
    arguments = {"images": images, "labels": labels, "components": 2, **change}
    with pytest.raises(InputError, match=message):
        mixtures.fit(**arguments)


@pytest.mark.parametrize("field", ["input_size", "in_channels", "num_classes", "components"])
@pytest.mark.parametrize("value", [0, "2", 2.0, True])
def test_sizes_are_validated_at_construction(as_users_run_it, field, value):
    with pytest.raises(InputError, match=f"mixture {field} is {value!r}; it must be a positive"):
        dataclasses.replace(CONFIG, **{field: value})


def test_the_refiner_of_a_mixture_is_a_sit_of_its_shape():
    refiner = CONFIG.refiner(hidden_size=12)
    assert (refiner.shape, refiner.depth, refiner.in_channels_scale) == (CONFIG.shape, 1, 2)
    assert (refiner.hidden_size, refiner.null_label) == (12, NULL)
    kind = family("mixture")
    network = kind.refiner(refiner)
    x, labels = noise(2), jnp.zeros(2, jnp.int32)
    params = jax.jit(network.initialise)(jax.random.key(0))
    offset = network.apply({"params": params}, x, x, jnp.asarray(0.5), labels)
    np.testing.assert_array_equal(offset, jnp.zeros_like(x))
    with pytest.raises(InputError, match="refiner is for another model's shape"):
        description(CONFIG, dataclasses.replace(CONFIG, num_classes=3).refiner())


def save(directory, config=CONFIG, params=PARAMS, refiner: bool = False):
    network = config.refiner(hidden_size=12) if refiner else None
    refiner_params = None
    if refiner:
        fresh = jax.jit(family("mixture").refiner(network).initialise)(jax.random.key(0))
        refiner_params = jax.tree.map(lambda leaf: leaf + 0.05, fresh)
    model_directory.save(directory, description(config, network), params, refiner_params)
    return str(directory)


@pytest.fixture(scope="module")
def refined(tmp_path_factory):
    return save(tmp_path_factory.mktemp("refined") / "m", refiner=True)


def test_a_model_directory_of_a_mixture_loads_bit_for_bit(refined):
    model = model_directory.load(refined)
    assert model.description.predictor == CONFIG
    assert model.description.refiner == CONFIG.refiner(hidden_size=12)
    for name, array in PARAMS.items():
        np.testing.assert_array_equal(model.predictor_params[name], array)


def test_a_mixture_stays_exact_in_a_model_of_half_precision(refined):
    whole, half = (ft.ClassToImage.load(refined, dtype) for dtype in ("float32", "bfloat16"))
    assert half.model.predictor.dtype == jnp.float32
    labels = [0, 1]
    expected, found = (p.sample_latents(noise(2), labels, schedule="H4") for p in (whole, half))
    np.testing.assert_array_equal(found, expected)
    refined = [p.sample_latents(noise(2), labels, schedule="H1R2") for p in (whole, half)]
    assert 0 < np.abs(refined[0] - refined[1]).max() < 0.1  # the refiner is rounded


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    place = tmp_path_factory.mktemp("mixture") / "model"
    return str(place), digits_mixture.write_model(place, components=1, seed=0)


def test_the_digits_mixture_is_close_to_the_digits(digits):
    _, report = digits
    # Classes are not quite equally frequent, and each pixel has the floor's variance more.
    assert report["mixture_to_digits"] < 0.02
    assert report["exact_samples_to_mixture"] < 0.04  # of 5,000 samples


def test_the_sample_command_works_on_the_digits_mixture(digits, tmp_path):
    recipe = SampleConfig(
        "mixture", model_dir=digits[0], schedule="H4", samples=200, data="digits", out=str(tmp_path)
    )
    (row,) = sample_command(recipe.to_config_dict())["schedules"]
    assert row["card"]["guidance"] == "paired"
    assert row["results"]["label_accuracy"] > 0.9
    assert (tmp_path / "mixture.png").exists()


@pytest.mark.slow
def test_a_refiner_is_trained_on_the_digits_mixture(digits, tmp_path):
    recipe = TrainConfig(
        name="refiner",
        objective="refiner",
        data=f"mixture:{digits[0]}",
        model_dir=digits[0],
        model={"hidden_size": 16, "num_heads": 2},
        steps=60,
        batch_size=32,
        learning_rate=3e-3,
        ema_decay=0.9,
        schedule="H1R1",
        evaluate_every=60,
        checkpoint_every=60,
        evaluation_size=64,
    )
    trainer.train_and_evaluate(recipe.to_config_dict(), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if "evaluation/loss" in line]
    assert last["evaluation/loss"] < 0.9 * last["evaluation/keep_velocity"]
    images = ft.ClassToImage.load(tmp_path / "run" / "model")(["three"], schedule="H1P1R1")
    assert images.shape == (1, 8, 8, 1)


def test_a_mixture_is_not_trained_as_a_predictor():
    recipe = tiny.recipe(model={"family": "mixture", **dataclasses.asdict(CONFIG)})
    with pytest.raises(InputError, match="'mixture' is fitted, not trained"):
        tasks.make_task(TrainConfig.create(recipe), data.open_source("digits"))


def test_what_an_evaluation_costs_is_counted():
    gaussians, values = CONFIG.gaussians, CONFIG.dimensions
    # To every Gaussian's own axes and back, and the mean of the means.
    expected = 2 * gaussians * values**2 + gaussians * values
    assert tasks.forward_multiply_adds(Mixture(CONFIG), CONFIG) == expected


def test_samples_of_a_mixture_are_a_data_set(tmp_path):
    source = data.open_source(f"mixture:{save(tmp_path / 'm')}")
    assert isinstance(source.examples, data.Examples)
    assert (source.shape, source.class_names) == (CONFIG.shape, ("zero", "one"))
    example, again = source.examples[7], source.examples[7]
    assert (example["data"].shape, example["data"].dtype) == (CONFIG.shape, np.float32)
    assert (example["label"].shape, example["label"].dtype) == ((), np.int32)
    np.testing.assert_array_equal(example["data"], again["data"])
    count = 4000
    rows = [source.examples[index] for index in range(count)]
    labels = np.array([row["label"] for row in rows])
    assert np.bincount(labels).tolist() == [count // 2, count // 2]
    for label in range(2):
        points = np.array([row["data"].ravel() for row in rows if row["label"] == label])
        mean, covariance = mixtures.moments(CONFIG, PARAMS, label)
        error = np.sqrt(np.diag(covariance) / len(points))
        assert np.abs((points.mean(axis=0) - mean) / error).max() < 4.5
    with pytest.raises(IndexError):
        source.examples[len(source.examples)]
    batch = data.batches(source, 4, seed=0)[2]
    assert batch["data"].shape == (4, *CONFIG.shape)


def test_the_fingerprint_of_a_mixtures_samples_follows_its_parameters(tmp_path):
    names = [f"mixture:{save(tmp_path / name)}" for name in ("a", "b")]
    names += [f"mixture:{save(tmp_path / 'c', params=random_params(CONFIG, 1))}"]
    prints = [data.open_source(name).fingerprint for name in names]
    assert prints[0] == prints[1] != prints[2]


def test_models_whose_samples_are_not_exact_are_refused_as_data(tmp_path):
    with pytest.raises(InputError, match="family 'sit'; only a mixture"):
        data.open_source("mixture:digits")  # the shipped model
    with pytest.raises(InputError, match="needs the name of a model directory"):
        data.open_source("mixture:")
    with pytest.raises(InputError, match="no model directory at 'nowhere'"):
        data.open_source("mixture:nowhere")
    with pytest.raises(InputError, match="images of 2 pixels, not 8"):
        data.open_source(f"mixture:{save(tmp_path / 'm')}", image_size=8)

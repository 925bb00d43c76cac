"""FID's Inception: the reference's answers, both files of its weights, and any number of images."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_file_writer
from einops import rearrange

from flowturbo_jax import convert, metrics
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import Inception, InceptionConfig
from flowturbo_jax.models.inception import resized

CONFIG = InceptionConfig()
SIDE = 40  # of the images given to the feature network, in pixels


@pytest.fixture(scope="module")
def state():
    return golden.inception_weights()


@pytest.fixture(scope="module")
def params(state):
    return convert.params_from_state("inception", CONFIG, state)


@pytest.fixture(scope="module")
def expected():
    return golden.arrays("inception/inception")


@pytest.fixture(scope="module")
def found(params, expected):
    """Our answers to the stored images."""
    images = rearrange(expected["images"], "n c h w -> n h w c")
    return golden.apply(Inception(CONFIG), params, images)


@pytest.fixture(scope="module")
def files(tmp_path_factory, state):
    """The weights as two projects publish them: one counts the batches of its statistics."""
    folder = tmp_path_factory.mktemp("weights")
    counts = {
        name.replace("running_var", "num_batches_tracked"): np.zeros((), np.int64)
        for name in state
        if name.endswith("running_var")
    }
    torch_file_writer.save(folder / "counted.pth", torch_file_writer.Ordered(state | counts))
    torch_file_writer.save(folder / "bare.pth", torch_file_writer.Ordered(state))
    yield folder
    for file in folder.iterdir():
        file.unlink()


@pytest.fixture(scope="module")
def network(files):
    return metrics.inception_network(files / "counted.pth", batch_size=4)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), np.uint8)


@pytest.fixture(scope="module")
def features(network, images):
    return network.extract(images)


def test_recipe_makes_the_weights_of_the_stored_answers(state):
    for name, tensor in golden.inception_tensors().items():
        total = state[name].astype(np.float64).sum()
        # Up to 4 million numbers near 1, summed in float64 in some other order.
        assert total == pytest.approx(tensor["sum_f64"], abs=1e-8), name


def test_pool3_matches_the_reference(found, expected):
    assert (found.pool3.shape, found.pool3.dtype) == ((2, 2048), jnp.float32)
    # The reference's float32 run is off its float64 run by 3.2e-5, ours by 3.1e-5.
    assert golden.deviation(found.pool3, expected["pool3_f64"]) < 1.5e-4


def test_spatial_features_match_the_reference(found, expected):
    wanted = rearrange(expected["spatial"], "n c h w -> n h w c")
    assert found.spatial.shape == wanted.shape == (2, 17, 17, 7)
    # The reference is itself off by 4.3e-5.
    assert golden.deviation(found.spatial, wanted) < 2e-4


def test_logits_match_the_reference(found, expected):
    assert found.logits.shape == (2, 1008)
    # The reference is itself off by 1.7e-5.
    assert golden.deviation(found.logits, expected["logits"]) < 1e-4


def test_network_in_bfloat16_answers_in_float32_nearby(params, expected, found):
    images = rearrange(expected["images"], "n c h w -> n h w c")
    answer = golden.apply(Inception(CONFIG, jnp.bfloat16), params, images)
    assert {leaf.dtype for leaf in answer} == {jnp.dtype(jnp.float32)}
    # 94 roundings to 8 bits, which the recipe's weights amplify; features are about 0.4.
    assert 0 < np.mean(np.abs(answer.pool3 - found.pool3)) < 0.05


def test_images_are_enlarged_between_the_centres_of_pixels():
    ramp = jnp.arange(2.0)[None, :, None, None] * jnp.ones((1, 2, 2, 1))
    rows = resized(ramp)[0, :, 0, 0]
    centres = (np.arange(299) + 0.5) * 2 / 299 - 0.5
    np.testing.assert_allclose(rows, np.clip(centres, 0, 1), atol=1e-5)  # float32 positions


def test_images_are_shrunk_without_antialiasing():
    image = jax.random.uniform(jax.random.key(0), (1, 3 * 299, 3 * 299, 1))
    # Every third pixel: the centre of each new one.
    np.testing.assert_allclose(resized(image), image[:, 1::3, 1::3], atol=1e-4)


def test_weights_survive_the_round_trip_bit_for_bit(state, params):
    back = convert.state_from_params("inception", CONFIG, params)
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_what_only_training_uses_is_left_out_by_name(state):
    training = (
        "Conv2d_1a_3x3.bn.num_batches_tracked",
        "Mixed_5b.branch1x1.bn.num_batches_tracked",
        "AuxLogits.conv0.conv.weight",
        "AuxLogits.conv1.bn.running_var",
        "AuxLogits.conv1.bn.num_batches_tracked",
        "AuxLogits.fc.bias",
    )
    extra = {name: np.zeros(()) for name in training}
    kept, dropped = convert.with_known_names("inception", {**state, **extra})
    assert (kept.keys(), dropped) == (state.keys(), list(training))


@pytest.mark.parametrize(
    "name", ["num_batches_tracked", "AuxLogits.fc.bias.more", "AuxLogits.conv2.conv.weight", "bn"]
)
def test_names_that_resemble_those_of_training_are_refused(state, name):
    kept, dropped = convert.with_known_names("inception", {**state, name: np.zeros(())})
    assert dropped == []
    with pytest.raises(InputError, match=f"{name} is not known"):
        convert.params_from_state("inception", CONFIG, kept)


def test_one_message_names_all_that_does_not_fit(state):
    wrong = dict(state)
    del wrong["Mixed_7c.branch_pool.bn.running_mean"]
    wrong["fc.weight"] = wrong["fc.weight"][:1000]  # torchvision's own weights, of 1000 classes
    with pytest.raises(InputError) as error:
        convert.params_from_state("inception", CONFIG, wrong)
    assert str(error.value) == (
        "the weights do not fit this inception model: Mixed_7c.branch_pool.bn.running_mean is "
        "missing; fc.weight is [1000, 2048], not [1008, 2048]"
    )


@pytest.mark.parametrize("classes", [0, -1, 10.0, "1008", True, 10**9])
def test_impossible_number_of_classes_is_refused(as_users_run_it, classes):
    with pytest.raises(InputError, match="num_classes"):
        InceptionConfig(num_classes=classes)


def test_both_published_files_are_one_network(network, files):
    other = metrics.inception_network(str(files / "bare.pth"), batch_size=8)
    assert other.fingerprint == network.fingerprint
    assert len(network.fingerprint) == 64
    assert (network.name, network.dimensions) == ("Inception v3 (FID), pool3 2048", 2048)


def test_other_weights_have_another_fingerprint(network, files, state):
    changed = {**state, "fc.bias": state["fc.bias"] + 1}
    torch_file_writer.save(files / "changed.pth", changed)
    other = metrics.inception_network(files / "changed.pth", batch_size=4, dtype="bfloat16")
    assert other.fingerprint != network.fingerprint
    assert other.name.endswith("bfloat16")


def test_features_are_those_of_the_network_on_bytes_over_255(network, params, features, images):
    assert (features.pooled.shape, features.pooled.dtype) == ((5, 2048), np.float32)
    assert (features.spatial.shape, features.spatial.dtype) == ((5, 2023), np.float32)
    direct = golden.apply(Inception(CONFIG), params, images[:2].astype(np.float32) / 255)
    # Other batches make other orders of summation, as between reference and ours.
    assert golden.deviation(features.pooled[:2], direct.pool3) < 1.5e-4
    by_pixel = features.spatial[:2].reshape(2, 17, 17, 7)  # row, column, channel
    assert golden.deviation(by_pixel, direct.spatial) < 2e-4


def test_features_of_an_image_do_not_depend_on_how_many_there_are(network, features, images):
    last = network.extract(images[4:])
    np.testing.assert_array_equal(last.pooled, features.pooled[4:])
    np.testing.assert_array_equal(last.spatial, features.spatial[4:])
    none = network.extract(images[:0])
    assert (none.pooled.shape, none.spatial.shape) == ((0, 2048), (0, 2023))


def test_one_program_serves_any_number_of_images_of_a_size(network, features, images):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiled.append(event) if "backend_compile" in event else None
    )
    for count in (1, 4, 5):
        network.extract(images[:count])
    assert compiled == []
    network.extract(images[:1, : SIDE // 2])
    assert len(compiled) >= 1


def test_grey_images_are_those_of_three_equal_channels(network, images):
    grey = images[:2, :, :, :1]
    single, triple = network.extract(grey), network.extract(grey.repeat(3, axis=3))
    np.testing.assert_array_equal(single.pooled, triple.pooled)


def test_probabilities_leave_the_bias_out(network, expected):
    ours = network.probabilities(expected["pool3_f64"].astype(np.float32))
    assert (ours.shape, ours.dtype) == ((2, 1008), np.float64)
    powers = np.exp(expected["logits_no_bias"].astype(np.float64))
    wanted = powers / powers.sum(axis=1, keepdims=True)
    # The stored logits are float32, off by 1e-5.
    np.testing.assert_allclose(ours, wanted, rtol=1e-4)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8, 4), np.uint8), r"\[N, H, W, 1\] or \[N, H, W, 3\]"),
        (np.zeros((2, 0, 8, 3), np.uint8), r"\[N, H, W, 1\] or \[N, H, W, 3\]"),
        (np.zeros((8, 8, 3), np.uint8), "to_uint8"),
        (np.zeros((2, 8, 8, 3), np.float32), "to_uint8"),
    ],
)
def test_feature_network_refuses_anything_but_byte_images(network, images, message):
    with pytest.raises(InputError, match=message):
        network.extract(images)


@pytest.mark.parametrize(
    ("reference", "options", "message"),
    [
        ("nowhere.pth", {}, "inception: .*nowhere.pth"),
        ("hf://owner/name", {}, "inception: .*names no file"),
        ("bare.pth", {"batch_size": 6}, "batch_size 6 does not split over 4 devices"),
        ("bare.pth", {"batch_size": 0}, "batch_size is 0"),
        ("bare.pth", {"dtype": "float16"}, "dtype is 'float16'"),
    ],
)
def test_feature_network_says_what_is_wrong(files, reference, options, message):
    place = reference if reference.startswith("hf:") else files / reference
    with pytest.raises(InputError, match=message):
        metrics.inception_network(place, **options)


def test_weights_of_another_network_are_refused(tmp_path):
    torch_file_writer.save(tmp_path / "sit.pth", {"pos_embed": np.zeros((1, 4, 8), np.float32)})
    with pytest.raises(InputError, match="pos_embed is not known"):
        metrics.inception_network(tmp_path / "sit.pth")

"""Statistics of real images: every source and file format, and what is refused without harm."""

import json
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
from PIL import Image
from test_commands import run

from flowturbo_jax import data, metrics
from flowturbo_jax.__main__ import main as package_main
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.metrics import PIXELS, FeatureNetwork, Features, read_reference
from flowturbo_jax.pipelines import judging, real_images

SHAPE = (4, 4, 3)


def write_images(folder, count=10, size=(4, 4), seed=0):
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return folder


def two_kinds(images):
    """Features as Inception has them, of any images: pooled [N, 3] and spatial [N, 2]."""
    flat = np.asarray(images).reshape(len(images), -1).astype(np.float32)
    return Features(flat[:, :3], flat[:, 3:5])


TWO_KINDS = FeatureNetwork("two kinds", "f00d", two_kinds, dimensions=3)


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images")


def expected_statistics(folder):
    files = sorted(folder.rglob("*.png"))
    rows = np.stack([np.asarray(Image.open(file)).reshape(-1) for file in files]) / 127.5 - 1
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


def test_images_with_captions_are_a_reference_as_those_of_a_folder_are(tmp_path):
    folder = write_images(tmp_path / "captioned", size=(8, 6))  # to be cropped
    for file in list(folder.glob("*.png")):
        file.with_suffix(".txt").write_text("a picture")
    with (
        judging.opened("pixels", f"captions:{folder}", SHAPE, tmp_path / "a") as captioned,
        judging.opened("pixels", f"images:{folder}", SHAPE, tmp_path / "b") as plain,
    ):
        found, wanted = captioned.reference.pooled, plain.reference.pooled
        np.testing.assert_array_equal(found.mean, wanted.mean)
        np.testing.assert_array_equal(found.covariance, wanted.covariance)


@pytest.mark.parametrize("nested", [False, True])
def test_statistics_of_a_folder_are_those_of_its_images(folder, tmp_path, nested):
    if nested:
        (folder / "in").mkdir()
        (folder / "009.png").rename(folder / "in" / "009.png")
    out = tmp_path / "new" / "stats.npz"
    arguments = ["statistics", f"images:{folder}", "--features=pixels", f"--out={out}"]
    assert run(package_main, *arguments, "--batch-size=4") == 0
    found = read_reference(out, PIXELS)
    mean, covariance = expected_statistics(folder)
    np.testing.assert_allclose(found.pooled.mean, mean, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.pooled.covariance, covariance, rtol=0, atol=1e-12)
    assert (found.pooled.count, found.network, found.spatial) == (10, PIXELS.fingerprint, None)
    assert found.features.shape == (10, 48)
    assert [path.name for path in out.parent.iterdir()] == ["stats.npz"]  # no work, no lock
    first = out.read_bytes()
    assert run(package_main, *arguments) == 0  # in other batches
    again = read_reference(out, PIXELS)
    np.testing.assert_array_equal(again.features, found.features)
    assert again.fingerprint == found.fingerprint
    assert out.read_bytes() == first


def test_every_source_of_images_has_statistics(folder, tmp_path, fixtures, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(fixtures / "tfds"))
    write_images(tmp_path / "classes" / "cat", 3)
    write_images(tmp_path / "classes" / "dog", 4, seed=1)
    sources = {"digits": 1797, f"folder:{tmp_path / 'classes'}": 7, "tfds:tiny_shapes": 9}
    for name, count in sources.items():
        source = data.open_source(name, 0 if name == "digits" else 4)
        found = real_images.measure_reference(source, PIXELS, kept=5)
        assert found.pooled.count == count
        assert found.features.shape == (5, np.prod(source.shape))
        assert found.name == name
    nested = data.open_source(f"images:{tmp_path / 'classes'}", 4)
    ours = real_images.measure_reference(nested, PIXELS)
    same = real_images.measure_reference(
        data.open_source(f"folder:{tmp_path / 'classes'}", 4), PIXELS
    )
    np.testing.assert_array_equal(ours.pooled.mean, same.pooled.mean)
    assert ours.fingerprint != same.fingerprint  # other crops and names: another source


def test_the_first_images_alone_can_be_taken(tmp_path):
    digits = data.open_source("digits")
    some = real_images.measure_reference(digits, PIXELS, count=100)
    images, _ = data.arrays(digits)
    expected = images[:100].reshape(100, -1).mean(axis=0)
    np.testing.assert_allclose(some.pooled.mean, expected, rtol=0, atol=1 / 255)  # of bytes
    assert some.pooled.count == len(some.features) == 100
    assert some.fingerprint != real_images.measure_reference(digits, PIXELS).fingerprint
    for wrong in (1, 1798):
        with pytest.raises(InputError, match=f"digits has 1797 images, of which {wrong} are"):
            real_images.measure_reference(digits, PIXELS, count=wrong)


def test_interrupted_statistics_go_on_and_are_the_same(folder, tmp_path):
    source = data.open_source(f"images:{folder}")
    whole = real_images.measure_reference(source, TWO_KINDS, batch_size=4)
    seen = []

    def stop_at(done, total):
        seen.append(done)
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        real_images.measure_reference(
            source, TWO_KINDS, tmp_path / "work", batch_size=4, on_images=stop_at
        )
    with (tmp_path / "work" / "pooled.rows").open("ab") as file:
        file.write(bytes(12 * 3))  # rows of a batch that was not finished
    again = real_images.measure_reference(
        source,
        TWO_KINDS,
        tmp_path / "work",
        batch_size=4,
        on_images=lambda *done: seen.append(done),
    )
    assert seen == [0, 4, (4, 10), (8, 10), (10, 10)]
    assert whole.fingerprint == again.fingerprint
    for ours, theirs in ((again.pooled, whole.pooled), (again.spatial, whole.spatial)):
        np.testing.assert_array_equal(ours.mean, theirs.mean)
        np.testing.assert_array_equal(ours.covariance, theirs.covariance)


def test_our_file_comes_back_whole(tmp_path, folder):
    source = data.open_source(f"images:{folder}")
    made = real_images.measure_reference(source, TWO_KINDS)
    metrics.write_reference(tmp_path / "a.npz", made, {"features": TWO_KINDS.name})
    found = read_reference(tmp_path / "a.npz", TWO_KINDS)
    assert (found.name, found.network) == (made.name, TWO_KINDS.fingerprint)
    np.testing.assert_array_equal(found.features, made.features)
    np.testing.assert_array_equal(found.spatial.covariance, made.spatial.covariance)
    assert found.spatial.count == found.pooled.count == 10
    with np.load(tmp_path / "a.npz") as stored:  # as ADM's evaluator and pytorch-fid read it
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(stored.files)
    with pytest.raises(InputError, match=r"of another feature network \(two kinds\), not of pix"):
        read_reference(tmp_path / "a.npz", PIXELS)


def test_golden_files_are_as_far_apart_as_the_reference_has_it(fixtures):
    folder = fixtures / "golden" / "metrics"
    real, made = (
        read_reference(folder / f"stats_{name}.npz", PIXELS) for name in ("ref", "sample")
    )
    found = metrics.frechet_distance(
        real.pooled.mean, real.pooled.covariance, made.pooled.mean, made.pooled.covariance
    )
    golden = json.loads((folder / "metrics.json").read_text())["d16_fid"]
    assert found == pytest.approx(golden["eig_formula"], abs=1e-7)  # the means are float32
    assert found == pytest.approx(golden["reference"], abs=1e-6)
    assert real.spatial.mean.shape == (7,)
    assert (made.spatial, made.network, made.pooled.count) == (None, None, 0)


def test_a_reference_batch_of_adm_gives_its_images_features(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, *SHAPE), dtype=np.uint8)
    rows = PIXELS.extract(images).pooled
    pooled = metrics.statistics(rows)
    np.savez(tmp_path / "a.npz", mu=pooled.mean, sigma=pooled.covariance, arr_0=images)
    np.testing.assert_array_equal(read_reference(tmp_path / "a.npz", PIXELS).features, rows)


GOOD = {"mu": np.zeros(3), "sigma": np.eye(3)}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": GOOD["mu"]}, r"has no sigma \(it holds mu\)"),
        ({"arr_0": np.zeros((2, *SHAPE), np.uint8)}, r"has no mu and no sigma \(it holds arr_0\)"),
        ({}, "it holds nothing"),
        ({**GOOD, "mu_s": np.zeros(2)}, "has no sigma_s"),
        ({**GOOD, "sigma_s": np.eye(2)}, "has no mu_s"),
        ({**GOOD, "mu": np.zeros(4)}, r"a mean of \[4\] and a covariance of \[3, 3\]"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"must be \[D\] and \[D, D\]"),
        ({"mu": np.zeros(4), "sigma": np.eye(4)}, "statistics of 4 features, two kinds has 3"),
        ({**GOOD, "mu": np.array([0, np.nan, 0])}, "not finite"),
        ({**GOOD, "sigma": np.full((3, 3), np.inf)}, "not finite"),
        ({**GOOD, "sigma": np.triu(np.ones((3, 3)))}, "not symmetric"),
        ({**GOOD, "sigma": np.diag([1.0, 1.0, -0.1])}, "negative eigenvalue"),
        ({**GOOD, "mu": np.zeros(3, int)}, "int64 and float64, no floats"),
        ({**GOOD, "mu": np.array(["a", "b", "c"])}, "no floats"),
        ({**GOOD, "features": np.zeros((5, 2))}, r"float64\[5, 2\], its mean has 3"),
        ({**GOOD, "features": np.zeros((5, 3), int)}, "must be floats"),
        ({**GOOD, "features": np.full((5, 3), np.nan)}, "features that are not finite"),
        ({**GOOD, "arr_0": np.zeros((2, 3))}, r"arr_0 of .* is float64\[2, 3\], not images"),
        ({**GOOD, "info": np.asarray("{")}, "info of .* cannot be read"),
        ({**GOOD, "info": np.asarray("[" * 100_000)}, "info of .* cannot be read"),
        ({**GOOD, "info": np.asarray('{"count": -1}')}, "count is -1"),
        ({**GOOD, "info": np.asarray('{"network": "beef"}')}, r"another feature network \(beef\)"),
    ],
)
def test_a_file_of_other_arrays_is_refused_and_named(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message) as caught:
        read_reference(tmp_path / "a.npz", TWO_KINDS)
    assert "a.npz" in str(caught.value)


class Touch:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def test_a_pickle_is_refused_and_not_run(tmp_path):
    made = tmp_path / "made"
    np.savez(tmp_path / "a.npz", sigma=np.eye(3), mu=np.array([Touch(made)], object))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Touch(made)))
    np.savez(tmp_path / "c.npz", **GOOD, info=np.array([Touch(made)], object))
    for name in "abc":
        with pytest.raises(InputError, match=f"{name}.npz is no .npz file of plain arrays"):
            read_reference(tmp_path / f"{name}.npz", TWO_KINDS)
    assert not made.exists()


def test_what_is_no_npz_is_refused(tmp_path):
    np.savez(tmp_path / "whole.npz", **GOOD)
    content = (tmp_path / "whole.npz").read_bytes()
    file = tmp_path / "a.npz"
    for wrong in (b"", b"text", content[:-30], content[:200], content.replace(b"mu", b"\xff\xff")):
        file.write_bytes(wrong)
        with pytest.raises(InputError, match=r"a\.npz (is no .npz file|has no mu)"):
            read_reference(file, TWO_KINDS)
    np.save(tmp_path / "b.npy", np.zeros(3))
    os.rename(tmp_path / "b.npy", file)
    with pytest.raises(InputError, match=r"is no \.npz file"):
        read_reference(file, TWO_KINDS)
    with zipfile.ZipFile(file, "w") as archive:  # says that it holds 8 TB
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
        header += b" " * (64 - (len(header) + 11) % 64) + b"\n"
        size = len(header).to_bytes(2, "little")
        archive.writestr("mu.npy", b"\x93NUMPY\x01\x00" + size + header)
    with pytest.raises(InputError, match=r"more than fits into memory|is no \.npz file"):
        read_reference(file, TWO_KINDS)
    for place, message in ((tmp_path, "is no file"), (tmp_path / "none.npz", "there is no file")):
        with pytest.raises(InputError, match=message):
            read_reference(place, TWO_KINDS)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, folder):
    made = real_images.measure_reference(data.open_source(f"images:{folder}"), TWO_KINDS)
    (tmp_path / "in the way.npz").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("in the way.npz", "file/a.npz"):
        with pytest.raises(InputError, match=r"cannot write .*choose another --out"):
            metrics.write_reference(tmp_path / name, made, {})
    with pytest.raises(InputError, match=r"must end in \.npz"):
        metrics.write_reference(tmp_path / "a.json", made, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "images", "in the way.npz"]


def test_features_too_many_for_a_covariance_are_refused_at_once(tmp_path):
    large = data.open_source(f"images:{write_images(tmp_path / 'large', 2, (100, 100))}")
    with pytest.raises(InputError, match=r"\[100, 100, 3\] are 30,000 features.*inception:FILE"):
        real_images.measure_reference(large, PIXELS)


def test_networks_by_name():
    assert judging.open_network("pixels") is PIXELS
    assert judging.open_network("digits").dimensions == 45
    for name in ("", "Pixels", "pixels:", "inception", "inception:", "digits:5", "clip"):
        with pytest.raises(InputError, match="they can be pixels, digits or inception:FILE"):
            judging.open_network(name)
    with pytest.raises(InputError, match=r"nowhere\.pth"):
        judging.open_network("inception:nowhere.pth")


def break_one(folder):
    (folder / "004.png").write_bytes((folder / "004.png").read_bytes()[:60])


def clear(folder):
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (clear, [], "images holds no images"),
        (lambda f: f.rename(f.with_name("other")), [], "there is no folder .*images"),
        (
            lambda f: write_images(f / "z", 1, (5, 4)),
            [],
            "z/000.png is 4 x 5, but the first .*4 x 4",
        ),
        (break_one, [], r"004\.png cannot be read \("),
        (lambda f: (f / "000.png").write_text("?"), [], r"000\.png cannot be read"),
        (lambda f: [(f / f"{i:03}.png").unlink() for i in range(9)], [], "has 1 images"),
        (lambda f: None, ["--features=clip"], "features are to be 'clip'"),
        (lambda f: None, ["--features=digits"], r"digits are images \[N, 8, 8, 1\]"),
        (lambda f: None, ["--out=stats.json"], "must end in .npz"),
        (lambda f: None, ["--batch-size=0"], "--batch-size is 0"),
        (lambda f: None, ["--kept=0"], "--kept is 0"),
        (lambda f: None, ["--count=11"], "of which 11 are to be taken"),
        (lambda f: None, ["--image-size=-1"], "--image-size is -1"),
        (lambda f: (f.parent / "stats.npz").write_bytes(b"mine"), [], "holds no statistics"),
        (lambda f: (f.parent / "stats.npz").mkdir(), [], "a folder; it must name a file"),
    ],
)
def test_bad_input_to_statistics_is_one_clear_line(
    folder, tmp_path, capsys, change, arguments, message
):
    change(folder)
    out = tmp_path / "stats.npz"
    before = out.read_bytes() if out.is_file() else None
    given = ["statistics", f"images:{folder}", "--features=pixels", f"--out={out}", *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert run(package_main, *given) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert (out.read_bytes() if out.is_file() else None) == before
    assert not (tmp_path / "stats.json").exists()


def test_few_images_are_warned_of(folder, tmp_path, capsys):
    out = tmp_path / "stats.npz"
    arguments = ["statistics", f"images:{folder}", "--features=pixels", f"--out={out}"]
    assert run(package_main, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"wrote {out}: 10 images, 48 features of pixels"
    assert lines[1].startswith("warning: 10 reference images for 48 feature dimensions")

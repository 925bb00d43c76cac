"""Caches of captioned images: the text states in them, what is refused, and what is drawn."""

import dataclasses
import hashlib
import json
import re
import shutil
import signal
from pathlib import Path

import golden
import jax
import numpy as np
import pytest
import tiny_latents
import tiny_text
from PIL import Image

from flowturbo_jax import data, model_directory
from flowturbo_jax.__main__ import main as package_main
from flowturbo_jax.commands import entry
from flowturbo_jax.data import latent_cache
from flowturbo_jax.data.latent_manifest import Shard, TextStates, pack, unpack
from flowturbo_jax.data.latents import draw_latents
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import CLIPText
from flowturbo_jax.pipelines import encoding

VAE_FOLDER = golden.FOLDER / "vae" / "tiny"
SHA256 = "0123456789abcdef" * 4
COUNT, CAPTIONS = 15, 2
OPTIONS = encoding.Options(batch_size=4, shard_size=6, captions_per_image=CAPTIONS)
TEXT = TextStates(5, 3, CAPTIONS, SHA256, ("a red circle",))
ULP = 2.0**-10  # of float16: where float32 sums round elsewhere, the next one may be taken
pytestmark = pytest.mark.usefixtures("compiled_once")


class Captioned:
    """Images of random pixels by index with one to three captions, some of which are torn."""

    def __init__(self, count: int = COUNT, unreadable: tuple[int, ...] = ()):
        self.count, self.unreadable, self.read = count, unreadable, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        if index in self.unreadable:
            raise data.UnreadableError("it is torn")
        pixels = np.random.default_rng(index).uniform(-1, 1, (8, 8, 3)).astype(np.float32)
        return {"data": pixels, "captions": self.captions(index)}

    def captions(self, index):
        text = tiny_text.captions()[index % 12]
        return (text, f"{text} on white", f"{text} again")[: 1 + index % 3]

    def name(self, index):
        return f"image {index}"


class Labelled(Captioned):
    """The same images, of one class and without captions."""

    def __getitem__(self, index):
        return {"data": super().__getitem__(index)["data"], "label": np.asarray(0, np.int32)}


def source(**options) -> data.DataSource:
    examples = Captioned(**options)
    return data.DataSource("captioned", examples, (8, 8, 3), (), "abc", captioned=True)


def of_classes() -> data.DataSource:
    return data.DataSource("labelled", Labelled(), (8, 8, 3), ("all",), "abc")


@pytest.fixture(scope="module")
def model():
    return tiny_text.model()


@pytest.fixture(scope="module")
def networks(model):
    """An autoencoder, and a text encoder."""
    text = (model.description.text_encoder, model.text_encoder_params, model.tokenizer)
    autoencoder = encoding.Autoencoder(tiny_latents.CONFIG, tiny_latents.params())
    return autoencoder, encoding.TextEncoder(*text)


@pytest.fixture(scope="module")
def encode(networks):
    """`encoding.encode` with these networks; a text encoder given replaces theirs."""

    def run(out, images=None, options=OPTIONS, text=networks[1], **callbacks):
        images = images or source()
        return encoding.encode(images, networks[0], out, options, text=text, **callbacks)

    return run


@pytest.fixture(scope="module")
def cache(encode, tmp_path_factory):
    """15 images in shards of 6, encoded 4 at once, with two captions each."""
    directory = tmp_path_factory.mktemp("caches") / "cache"
    encode(directory)
    return directory


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A model directory that takes text."""
    return tiny_text.save(tmp_path_factory.mktemp("models") / "model", model)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 6 images with captions beside them."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for index in range(6):
        pixels = generator.integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"{tiny_text.captions()[index]}\na picture\n")
    return folder


def read(directory) -> list[data.Example]:
    examples = data.open_source(f"latents:{directory}").examples
    return [examples[index] for index in range(len(examples))]


def states_of(networks, texts) -> np.ndarray:
    """What the text encoder answers, `[N, L, D]` float32."""
    config, params, tokenizer = networks[1]
    ids = tokenizer(list(texts))
    return np.asarray(jax.jit(CLIPText(config).apply)({"params": params}, ids))


def run(*arguments: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as stop:
        entry.run(package_main, ["command", *map(str, arguments)])
    return stop.value.code


def test_cached_states_are_the_text_encoders_of_each_images_first_captions(cache, networks):
    images, examples = source().examples, read(cache)
    own = [images.captions(index) for index in range(COUNT)]
    assert [len(captions) for captions in own[:3]] == [1, 2, 3]
    kept = [(captions * 2)[:CAPTIONS] for captions in own]  # one that is alone is repeated
    wanted = states_of(networks, [text for captions in kept for text in captions])
    found = np.stack([example["states"] for example in examples])
    assert found.shape == (COUNT, CAPTIONS, tiny_text.LENGTH, tiny_text.WIDTH)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found.reshape(wanted.shape), wanted, rtol=ULP, atol=1e-5)
    assert {name for example in examples for name in example} == {"moments", "states"}
    # So the captions differ enough to tell.
    assert np.abs(wanted[0] - wanted[2]).max() > 0.1


def test_the_manifest_says_what_the_states_are_of(cache, networks):
    manifest = latent_cache.read_manifest(cache)
    fingerprint = model_directory.text_fingerprint(networks[1].params, networks[1].tokenizer)
    first = [text for i in range(8) for text in source().examples.captions(i)][:8]
    assert manifest.text == TextStates(16, 16, 2, fingerprint, tuple(first))
    assert (manifest.class_names, manifest.count) == ((), COUNT)
    assert manifest.record_bytes == 4 + 2 * 2 * 4 * 4 * 6 + 2 * 2 * 16 * 16
    assert latent_cache.verify(cache) == []


def test_verify_finds_a_flipped_byte_of_the_states(cache, tmp_path):
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    path = copy / "latents-00001-of-00003.array_record"
    content, states = bytearray(path.read_bytes()), read(cache)[6]["states"].tobytes()
    content[bytes(content).index(states) + 3] ^= 1
    path.write_bytes(content)
    (line,) = latent_cache.verify(copy)
    assert line.startswith(f"{path.name} is damaged")
    with pytest.raises(data.UnreadableError, match="the shard is damaged"):
        data.open_source(f"latents:{copy}").examples[6]


def test_moments_do_not_depend_on_captions(cache, networks, tmp_path):
    options = dataclasses.replace(OPTIONS, captions_per_image=1)
    encoding.encode(of_classes(), networks[0], tmp_path, options)
    for with_text, without in zip(read(cache), read(tmp_path), strict=True):
        np.testing.assert_array_equal(with_text["moments"], without["moments"])


def test_another_batch_size_gives_the_same_states(cache, encode, tmp_path):
    encode(tmp_path, options=dataclasses.replace(OPTIONS, batch_size=8, shard_size=15))
    for one, other in zip(read(tmp_path), read(cache), strict=True):
        np.testing.assert_allclose(one["states"], other["states"], rtol=ULP, atol=1e-5)


@pytest.mark.parametrize("done", [3, 7])
def test_a_stopped_run_goes_on_to_the_same_bytes(cache, encode, tmp_path, done):
    def on_images(count, total):
        if count == done:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path, on_images=on_images)
    assert not (tmp_path / "manifest.json").exists()
    encode(tmp_path)
    assert tiny_latents.contents(tmp_path) == tiny_latents.contents(cache)


def test_a_finished_cache_reads_no_image(cache, encode):
    images, said = source(), []
    assert encode(cache, images, report=said.append).count == COUNT
    assert said == [f"{cache}: 3 of 3 shards are finished"]
    assert images.examples.read == []


def test_images_that_cannot_be_read_are_left_out_with_their_captions(cache, encode, tmp_path):
    options = dataclasses.replace(OPTIONS, unreadable_limit=0.2)
    manifest = encode(tmp_path, source(unreadable=(2, 13)), options)
    assert manifest.unreadable == ("image 2", "image 13")
    kept = [example for index, example in enumerate(read(cache)) if index not in (2, 13)]
    for found, wanted in zip(read(tmp_path), kept, strict=True):
        np.testing.assert_allclose(found["states"], wanted["states"], rtol=ULP, atol=1e-5)


def changed(networks, **fields):
    """A text encoder with other hyper-parameters."""
    config = dataclasses.replace(networks[1].config, **fields)
    return networks[1]._replace(config=config, params=tiny_text.random_params(CLIPText(config)))


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"hidden_size": 8}, {}, "the width of text states was 16, now it is 8"),
        ({"activation": "quick_gelu"}, {}, "the fingerprint of --text-encoder was .*, now it is"),
        ({}, {"captions_per_image": 1}, "--captions-per-image was 2, now it is 1"),
    ],
)
def test_what_changed_since_a_run_began_is_refused(
    cache, encode, networks, tmp_path, fields, options, message
):
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    before = tiny_latents.contents(copy)
    text = changed(networks, **fields) if fields else networks[1]
    with pytest.raises(InputError, match=f"was begun by another command: .*{message}"):
        encode(copy, options=dataclasses.replace(OPTIONS, **options), text=text)
    assert tiny_latents.contents(copy) == before


def test_a_run_without_captions_does_not_go_on_with_them(cache, encode, tmp_path):
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    options = dataclasses.replace(OPTIONS, captions_per_image=1)
    with pytest.raises(InputError, match="--captions-per-image was 2, now it is none"):
        encode(copy, of_classes(), options, text=None)


def test_captions_and_text_encoder_come_together(encode, networks, tmp_path):
    place = tmp_path / "cache"
    with pytest.raises(InputError, match="captioned has captions; give the text encoder"):
        encode(place, text=None)
    options = dataclasses.replace(OPTIONS, captions_per_image=1)
    for given in ({"options": options}, {"text": None}):
        with pytest.raises(InputError, match=r"labelled has no captions, .* mean nothing to it"):
            encode(place, of_classes(), **given)
    assert not place.exists()


def test_states_that_are_not_finite_are_refused(encode, networks, tmp_path):
    params = jax.tree.map(lambda a: a * 1e5, networks[1].params)
    with pytest.raises(InputError, match=r"text states of image \d are not finite in float16; try"):
        encode(tmp_path, text=networks[1]._replace(params=params))


def test_a_source_draws_one_caption_after_all_that_is_drawn_without(cache):
    opened = data.open_source(f"latents:{cache}")
    assert (opened.label, opened.captioned) == (((16, 16), "float16"), False)
    assert opened.class_names == ()
    example, taken = opened.examples[1], []
    plain = {"moments": example["moments"], "label": np.asarray(0, np.int32)}
    for seed in range(40):
        one, other = (
            draw_latents(opened.latents.vae, e, np.random.default_rng(seed), True)
            for e in (example, plain)
        )
        np.testing.assert_array_equal(one["data"], other["data"])
        assert (one["label"].shape, one["label"].dtype) == opened.label
        taken.append(np.array_equal(one["label"], example["states"][1]))
        assert taken[-1] or np.array_equal(one["label"], example["states"][0])
    assert 8 < sum(taken) < 32  # four standard deviations, sqrt(40) / 2 each, around the half


def test_batches_depend_on_seed_and_step_alone(cache):
    def batch(seed, step):
        return data.batches(data.open_source(f"latents:{cache}"), 6, seed, flip=True)[step]

    first, again, other = batch(1, 2), batch(1, 2), batch(2, 2)
    assert set(first) == {"data", "label", "unreadable"}
    assert (first["label"].shape, first["label"].dtype) == ((6, 16, 16), np.float16)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert not np.array_equal(first["label"], other["label"])


def test_a_record_holds_states_after_the_moments(tmp_path):
    plan = tiny_latents.plan(tmp_path, class_names=(), text=TEXT)
    generator = np.random.default_rng(0)
    moments = generator.normal(size=plan.moments_shape).astype(np.float16)
    states = generator.normal(size=TEXT.shape).astype(np.float32)
    record = pack(plan, 0, moments, states)
    assert len(record) == plan.record_bytes
    assert record[4:] == moments.astype("<f2").tobytes() + states.astype("<f2").tobytes()
    back = unpack(plan, record)
    np.testing.assert_array_equal(back.moments, moments)
    np.testing.assert_array_equal(back.states, states.astype(np.float16))
    with pytest.raises(ValueError, match="bytes, not"):
        unpack(plan, pack(plan, 0, moments))
    with pytest.raises(ValueError, match="the label is 1, of 0 classes"):
        unpack(plan, pack(plan, 1, moments, states))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([], "text must be an object"),
        (None, "text must be an object"),
        ({"length": 5}, "text: it has the wrong keys"),
        ({**dataclasses.asdict(TEXT), "width": 0}, "text: width is 0"),
        ({**dataclasses.asdict(TEXT), "captions": "2"}, "text: captions is '2'"),
        ({**dataclasses.asdict(TEXT), "fingerprint": "abc"}, "text: fingerprint is 'abc'"),
        ({**dataclasses.asdict(TEXT), "samples": [1]}, "text: samples must be a list"),
        (dataclasses.asdict(TEXT), "its sha256 does not fit"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_a_manifest_of_texts_is_read_strictly(cache, tmp_path, text, message):
    fields = json.loads((cache / "manifest.json").read_text()) | {"text": text}
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=rf"cannot use .*manifest\.json: .*{message}"):
        latent_cache.read_manifest(tmp_path)


def test_caches_without_text_are_as_they_were_before_there_was_any():
    shard = Shard("latents-00000-of-00003.array_record", 3, 1000, SHA256, ("image 2",))
    plan = tiny_latents.plan(Path(), vae_fingerprint=SHA256, shards=(shard,))
    moments = np.arange(np.prod(plan.moments_shape), dtype=np.float32) / 8
    record = pack(plan, 1, moments.reshape(plan.moments_shape))
    # As the last version without text states wrote them.
    assert [
        hashlib.sha256(content).hexdigest()[:16] for content in (plan.to_json().encode(), record)
    ] == [
        "98da2d529cd33a83",
        "6fc741299b7c0c28",
    ]
    assert plan.fingerprint[:16] == "c5800a060a5b5a74"


def test_the_command_encodes_images_and_captions(saved, photos, tmp_path, capsys):
    out = tmp_path / "cache"
    arguments = [f"--data=captions:{photos}", "--image-size=8", f"--vae={saved}", "--batch-size=4"]
    assert run("encode", *arguments, f"--out={out}", "--captions-per-image=2") == 0
    assert re.fullmatch(
        rf"wrote {out}: 6 images and their mirror images, 2 caption\(s\) of each, in 1 files, "
        rf"\d\.\d MB in all; train on them with --config\.data=latents:{out}",
        capsys.readouterr().out.strip(),
    )
    manifest = latent_cache.read_manifest(out)
    assert (manifest.crop, manifest.text.captions) == ("adm", 2)
    assert manifest.text.samples[:3] == ("a red circle", "a picture", "a green circle")
    assert run("encode", f"--verify={out}") == 0
    assert "is whole: 6 images" in capsys.readouterr().out
    # The text encoder of its own model, and the VAE of another place.
    arguments = [*arguments[:2], f"--vae={VAE_FOLDER}", "--batch-size=4"]
    assert run("encode", *arguments, f"--text-encoder={saved}", f"--out={tmp_path / 'other'}") == 0
    other = latent_cache.read_manifest(tmp_path / "other")
    assert other.text.fingerprint == manifest.text.fingerprint
    assert other.vae_fingerprint != manifest.vae_fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data={photos}", "--vae={vae}"],
            "is no model directory; give a model directory that takes text as --text-encoder",
        ),
        (["--data={photos}", "--vae=digits"], "is a model of classes; give a model directory"),
        (["--data={photos}", "--vae={saved}", "--text-encoder=digits"], "is a model of classes"),
        (["--data={photos}", "--vae={saved}", "--text-encoder=nowhere"], "no model directory at"),
        (["--data={photos}", "--vae={saved}", "--text-encoder="], "--text-encoder is empty"),
        (
            ["--data={photos}", "--vae={saved}", "--captions-per-image=0"],
            "captions_per_image is 0; it must be at least 1",
        ),
        (
            ["--data=digits", "--vae={saved}", "--text-encoder={saved}"],
            "--text-encoder means nothing to digits, which has no captions; leave it out",
        ),
        (
            ["--data=digits", "--vae={saved}", "--captions-per-image=1"],
            "--captions-per-image means nothing to digits",
        ),
    ],
)
def test_bad_input_is_one_clear_line(
    saved, photos, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    names = {"photos": f"captions:{photos}", "vae": str(VAE_FOLDER), "saved": str(saved)}
    size = [] if "--data=digits" in arguments else ["--image-size=8"]
    given = [*(argument.format(**names) for argument in arguments), *size, "--out=x"]
    assert run("encode", *given) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_cache_inside_the_captions_folder_is_refused(saved, photos, capsys):
    arguments = [f"--data=captions:{photos}", "--image-size=8", f"--vae={saved}", "--batch-size=4"]
    assert run("encode", *arguments, f"--out={photos / 'cache'}") == 2
    assert "the images' own folder; give another --out" in capsys.readouterr().err


def test_captions_that_are_too_long_are_said(encode, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Captioned, "captions", lambda self, index: (f"{index} " * 40,))
    with caplog.at_level("WARNING"):
        encode(tmp_path, source(count=2))
    assert "a text of 42 tokens is cut to the 16 that the text encoder takes" in caplog.text

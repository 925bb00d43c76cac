"""Captioned data sets prepared by TFDS: the texts found, drawn, and refused in one line."""

import io
import json

import numpy as np
import PIL.Image
import pytest

from flowturbo_jax import data
from flowturbo_jax.data import pixels, tfds_captions
from flowturbo_jax.interfaces import InputError

# As TFDS 4.9.10 writes them to features.json.
IMAGE = {
    "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
    "image": {"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8"},
}
TEXT = {
    "pythonClassName": "tensorflow_datasets.core.features.text_feature.Text",
    "text": {},
}
STRING = {
    "pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor",
    "tensor": {"shape": {}, "dtype": "string", "encoding": "none"},
}
STRINGS = {**STRING, "tensor": {**STRING["tensor"], "shape": {"dimensions": ["-1"]}}}
NUMBER = {**STRING, "tensor": {**STRING["tensor"], "dtype": "int64"}}


def features_dict(**fields):
    return {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {"features": fields},
    }


def sequence(of):
    return {
        "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
        "sequence": {"feature": of, "length": "-1"},
    }


def image(seed):
    generator = np.random.default_rng(seed)
    stream = io.BytesIO()
    PIL.Image.fromarray(generator.integers(0, 256, (9, 12, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def record(**fields):
    """A serialized record; two low lines in a name stand for a slash."""
    from tensorflow_datasets.proto import tf_example_pb2

    proto = tf_example_pb2.Example()
    for name, value in fields.items():
        feature = proto.features.feature[name.replace("__", "/")]
        for one in value if isinstance(value, list) else [value]:
            is_bytes = isinstance(one, bytes)
            (feature.bytes_list if is_bytes else feature.int64_list).value.append(one)
    return proto.SerializeToString()


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Writes a data set called "pets" of fields and records, as TFDS would."""
    from array_record.python.array_record_module import ArrayRecordWriter

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))

    def write(fields, records, supervised=()):
        place = tmp_path / "pets/1.0.0"
        place.mkdir(parents=True, exist_ok=True)
        (place / "features.json").write_text(json.dumps(features_dict(**fields)))
        split = {
            "name": "train",
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "numBytes": str(sum(map(len, records))),
            "shardLengths": [str(len(records))],
        }
        info = {"name": "pets", "version": "1.0.0", "moduleName": "pets", "splits": [split]}
        info["fileFormat"] = "array_record"
        if supervised:
            keys = [{"featureKey": key} for key in supervised]
            info["supervisedKeys"] = {"tuple": {"items": keys}}
        (place / "dataset_info.json").write_text(json.dumps(info))
        path = str(place / "pets-train.array_record-00000-of-00001")
        writer = ArrayRecordWriter(path, "group_size:1")
        for one in records:
            writer.write(one)
        writer.close()
        return place

    return write


COCO = {
    "image": IMAGE,
    "image/filename": TEXT,
    "captions": sequence(features_dict(id=NUMBER, text=TEXT)),
}
COCO_RECORDS = [
    record(
        image=image(i),
        image__filename=b"%d.png" % i,
        captions__id=list(range(i + 1)),
        captions__text=[b" %d of %d " % (k, i) for k in range(i + 1)],
    )
    for i in range(4)
]
COCO_TEXTS = [tuple(f"{k} of {i}" for k in range(i + 1)) for i in range(4)]


def open_pets(tail="", size=8):
    return data.open_source(f"tfds_captions:pets{tail}", size)


def captions_in(source):
    return [source.examples.captions(index) for index in range(len(source.examples))]


def test_captions_of_several_people_are_found_by_their_field(prepare):
    prepare(COCO, COCO_RECORDS)
    source = open_pets("@train#captions/text")
    assert source.name == "tfds_captions:pets@train#captions/text"
    assert (source.shape, source.class_names, source.captioned) == ((8, 8, 3), (), True)
    assert isinstance(source.examples, data.CaptionedExamples)
    assert captions_in(source) == COCO_TEXTS
    for index in range(4):
        example = source.examples[index]
        assert example["captions"] == COCO_TEXTS[index]
        np.testing.assert_array_equal(example["data"], pixels.decode(image(index), 8))
    with pytest.raises(IndexError, match="example 4 of 4"):
        source.examples[4]
    assert source.examples.name(1) == "example 1 of tfds_captions:pets@train#captions/text"
    assert captions_in(open_pets("@train[1:3]#captions/text")) == COCO_TEXTS[1:3]
    assert captions_in(open_pets("#image/filename"))[2] == ("2.png",)


@pytest.mark.parametrize(
    ("feature", "given", "expected"),
    [
        (TEXT, " ein Hund, größer ".encode(), ("ein Hund, größer",)),
        (STRING, b"a dog", ("a dog",)),
        (STRINGS, [b"a dog", b" ", b"two"], ("a dog", "two")),
        (sequence(TEXT), [b"a dog", b"two"], ("a dog", "two")),
        (sequence(STRING), [b"a dog"], ("a dog",)),
    ],
)
def test_texts_of_every_kind_are_captions(prepare, feature, given, expected):
    prepare({"image": IMAGE, "text": feature}, [record(image=image(0), text=given)])
    assert captions_in(open_pets()) == [expected]
    assert open_pets().examples[0]["captions"] == expected


def test_of_several_texts_the_supervised_one_is_taken(prepare):
    prepare(COCO, COCO_RECORDS, supervised=("image", "image/filename"))
    assert captions_in(open_pets())[0] == ("0.png",)
    assert captions_in(open_pets("#captions/text"))[0] == ("0 of 0",)


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (
            "",
            "pets has more than one field of text; say which, such as tfds_captions:pets#captions/"
            "text; there are captions/text, image/filename",
        ),
        ("@train#text", "pets@train has no field of text 'text'; say which, such as tfds_capt"),
        ("#captions", "no field of text 'captions'"),
        ("#captions/id", "no field of text 'captions/id'"),
        ("#image", "no field of text 'image'"),
        ("#\n", r"no field of text '.n'"),
        ("@val#captions/text", r"no split 'val'; its splits are train \(4 examples\)"),
        (":2.0.0", "pets:2.0.0 is not prepared in"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(prepare, tail, message):
    prepare(COCO, COCO_RECORDS)
    with pytest.raises(InputError, match=message) as caught:
        open_pets(tail)
    assert str(caught.value).isprintable()


def test_data_without_images_or_texts_are_refused(prepare, fixtures, monkeypatch):
    prepare({"image": IMAGE, "id": NUMBER}, COCO_RECORDS)
    with pytest.raises(InputError, match="pets has no field of text; its fields are id, image"):
        open_pets()
    prepare({"text": TEXT}, COCO_RECORDS)
    with pytest.raises(InputError, match="pets has no field that is an image; its fields are text"):
        open_pets()
    prepare({"image": IMAGE, "other": IMAGE, "text": TEXT}, COCO_RECORDS)
    with pytest.raises(InputError, match="more than one field that is an image"):
        open_pets()
    prepare({"image": IMAGE, "text": TEXT}, COCO_RECORDS)
    with pytest.raises(InputError, match="no squares of one size: give image_size"):
        open_pets(size=0)
    with pytest.raises(InputError, match="TFDS's names are NAME"):
        data.open_source("tfds_captions:#text", 8)
    # The one text of the data set with labels is taken, since that is all one can know of it.
    monkeypatch.setenv("TFDS_DATA_DIR", str(fixtures / "tfds"))
    assert len(captions_in(data.open_source("tfds_captions:tiny_shapes", 8))) == 9


def test_missing_files_and_foreign_code_are_refused(prepare):
    place = prepare(COCO, COCO_RECORDS)
    next(place.glob("*.array_record*")).unlink()
    with pytest.raises(InputError, match="1 of 1 files of pets are missing"):
        open_pets("#captions/text")
    hostile = {"pythonClassName": "hostile.Feature", "text": {}}
    prepare({"image": IMAGE, "text": hostile}, COCO_RECORDS)
    with pytest.raises(InputError, match=r"names 'hostile\.Feature', code that is not TFDS's own"):
        open_pets()


def test_fingerprint_follows_field_split_crop_and_kind(prepare):
    prepare(COCO | {"label": NUMBER}, COCO_RECORDS)
    found = {
        open_pets("#captions/text").fingerprint,
        open_pets("@train#captions/text").fingerprint,
        open_pets("#image/filename").fingerprint,
        open_pets("#captions/text", 9).fingerprint,
        open_pets("@train[:2]#captions/text").fingerprint,
    }
    assert len(found) == 4  # without a split, it is train


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": b"a"}, "the record has no image"),
        ({"image": b"x"}, "the record has no caption"),
        ({"image": b"x", "text": b" "}, "the record has no caption"),
        ({"image": b"x", "text": 3}, "the record has no caption"),
        ({"image": b"x", "text": [b"a", b"b"]}, "the record is damaged"),
        ({"image": b"x", "text": b"caf\xe9"}, "caption is no text in UTF-8"),
        ({"image": b"x", "text": b"a"}, "it is no JPEG"),
        ({"image": b"", "text": b"a"}, "the file is empty"),
    ],
)
def test_records_that_hold_something_else_are_unreadable(fields, message):
    import tensorflow_datasets

    kinds = tensorflow_datasets.features
    features = kinds.FeaturesDict({"image": kinds.Image(), "text": kinds.Text()})
    examples = tfds_captions.TfdsCaptions("x", [record(**fields)], features, "image", "text", 8)
    with pytest.raises(data.UnreadableError, match=message):
        examples[0]


def test_lists_without_a_caption_are_unreadable(prepare):
    prepare(COCO, [record(image=image(0)), *COCO_RECORDS[1:], b"\xff\xff"])
    source = open_pets("#captions/text")
    for index in (0, 4):
        with pytest.raises(data.UnreadableError, match="the record is damaged"):
            source.examples[index]
    assert list(data.captions_of(source)) == [one for given in COCO_TEXTS[1:] for one in given]


def test_threads_read_the_same_batches(prepare):
    prepare(COCO, COCO_RECORDS)

    def tokenised():
        def tokenize(given):
            return np.array([[len(text), ord(text[0]) if text else 0] for text in given], np.int32)

        return data.tokenised(open_pets("#captions/text"), tokenize, "lengths")

    batches = data.batches(tokenised(), 4, seed=3, flip=True)
    stream = data.stream(tokenised(), 4, 3, flip=True, first_step=2, threads=4)
    for step in range(2, 8):
        batch = next(stream)
        assert batch["label"].shape == (4, 2)
        for name, array in batches[step].items():
            np.testing.assert_array_equal(batch[name], array)

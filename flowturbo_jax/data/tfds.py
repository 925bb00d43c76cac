"""Data sets that TensorFlow Datasets (TFDS) has prepared, read without TensorFlow.

TFDS writes what it prepares as NAME/VERSION or NAME/CONFIG/VERSION below its data folder, which is
TFDS_DATA_DIR or ~/tensorflow_datasets. Only that is read here: no data set's own code runs, nor any
that its notes name outside TFDS, and nothing is downloaded.
"""

import difflib
import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flowturbo_jax.class_names import readable_names
from flowturbo_jax.data import pixels
from flowturbo_jax.data.source import (
    DataSource,
    Example,
    UnreadableError,
    refuse_failing_machine,
)
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights.regular_file import open_unnamed

NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[\w.+-]+))?(:(?P<version>[\d*]+(\.[\d*]+){2}))?")
VERSION = re.compile(r"\d+\.\d+\.\d+")
FORMAT = "array_record"  # the one of TFDS's file formats that is read in any order
LISTED = 5  # prepared variants named in full
MAX_NOTES = 64 << 20  # bytes of features.json
# Under which features.json names classes, which TFDS imports: now, as protobuf calls the same, and
# before TFDS 4.5. That old "content" may be JSON within a string.
CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
OURS = "tensorflow_datasets."


def open_tfds(argument: str, image_size: int) -> DataSource:
    """Opens a data set that TFDS has prepared as ArrayRecord.

    Args:
      argument: what follows "tfds:" in a name: "NAME" or "NAME@SPLIT". NAME is as TFDS writes it,
        such as "cifar10", "imagenet2012:5.1.0" or "mnist_corrupted/fog:1.0.0"; without a version
        it is the latest prepared one. SPLIT is "train" if not given, and may be a part, such as
        "train[:90%]".
      image_size: side of the square that is cropped from the middle, by `pixels.centre_crop`; 0
        where all images are squares of one size.

    Returns:
      Images `[image_size, image_size, 3]`; grey ones get three channels. The classes are called as
      TFDS calls them, or by ImageNet's names if these are its 1000 WordNet ids. The fingerprint is
      a sha256 over the name with configuration and version, the split, what TFDS noted of every
      split (examples per file, bytes), and the crop, not over what the files hold.

    Raises:
      InputError: the name cannot be one of TFDS's; the data set is unknown, or not prepared, not as
        ArrayRecord or not completely; there is no such split; no images with labels are in it; or
        image_size is missing.
    """
    import tensorflow_datasets as tfds  # here, because it takes a second

    name, at, split = argument.partition("@")
    split = split if at else "train"
    folder = _find(name)
    with _notes(name, folder):
        _refuse_foreign_classes(folder / "features.json")
        builder = _open_builder(name, folder)
        info = builder.info
        _refuse_split(name, info, split)
        image, label = _image_and_label(name, info)
        image_size = image_size or _common_size(name, info.features[image].shape)
        if image_size < 1:
            raise InputError(f"image_size must be at least 1, got {image_size}.")
        records = builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES, file_format=FORMAT
        )
        files = info.splits[split].filepaths
        label_names = info.features[label].names
        fingerprint = _fingerprint(info, split, image_size)
    if missing := [file for file in files if not file.exists()]:
        raise InputError(
            f"{len(missing)} of {len(files)} files of {name} are missing, such as {missing[0]}; "
            "copy or prepare them again"
        )
    full_name = f"tfds:{argument}"
    examples = TfdsExamples(full_name, records, info.features, image, label, image_size)
    shape = (image_size, image_size, 3)
    class_names = readable_names(label_names)
    return DataSource(full_name, examples, shape, class_names, fingerprint)


class TfdsExamples:
    """Records of TFDS by index, their images decoded here.

    Args:
      name: what the data set was opened as.
      records: undecoded records, safe to read from several threads.
      features: TFDS's description of them.
      image: the image's key in them.
      label: the label's key in them.
      image_size: side of the square that is cropped from each image.
    """

    def __init__(
        self, name: str, records: Sequence, features: Any, image: str, label: str, image_size: int
    ) -> None:
        import tensorflow_datasets as tfds
        from google.protobuf.message import DecodeError

        self._name, self._records, self._image_size = name, records, image_size
        self._image, self._label, self._classes = image, label, features[label].num_classes
        # TFDS's own decoding of images wants OpenCV, and differs from that of image folders.
        self._decoders = {image: tfds.decode.SkipDecoding()}
        # Of everything else in a record nothing is parsed.
        self._features = tfds.features.FeaturesDict({k: features[k] for k in (image, label)})
        self._damage = (DecodeError, ValueError, TypeError, KeyError, AttributeError)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        record = self._record(index)
        try:
            parsed = self._features.deserialize_example_np(record, decoders=self._decoders)
        except self._damage as error:
            raise UnreadableError("the record is damaged") from error
        image, label = parsed[self._image], parsed[self._label]
        if not isinstance(image, bytes):
            raise UnreadableError("the record has no image")
        if not isinstance(label, int) or not 0 <= label < self._classes:
            raise UnreadableError(f"the record's label is {label}, not 0 to {self._classes - 1}")
        data = pixels.decode(image, self._image_size)
        return {"data": data, "label": np.asarray(label, np.int32)}

    def name(self, index: int) -> str:
        return f"example {index} of {self._name}"

    def _record(self, index: int) -> bytes:
        try:
            return self._records[index]
        except RuntimeError as error:  # all that ArrayRecord raises
            refuse_failing_machine(self.name(index), error)
            reason = str(error).split(";")[0]
            raise UnreadableError(f"the record cannot be read ({reason})") from error


def _find(name: str) -> Path:
    """The folder of a prepared data set."""
    match = NAME.fullmatch(name)
    if match is None:
        raise InputError(
            f"TFDS's names are NAME, NAME/CONFIG, or one of these and :VERSION, got {name!r}."
        )
    data_dir = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    try:
        prepared = _prepared(data_dir / match["name"])
    except OSError as error:  # such as a name longer than a folder's may be
        reason = error.strerror or type(error).__name__
        raise InputError(f"cannot look for {name:.100} in {data_dir}: {reason}") from error
    fitting = [
        folder
        for config, version, folder in prepared
        if config == match["config"] and fnmatch.fnmatchcase(version, match["version"] or "*")
    ]
    if fitting:
        return fitting[-1]
    if not prepared:
        _refuse_unknown(match["name"], data_dir)
    variants = [
        f"{match['name']}{f'/{config}' if config else ''}:{version}"
        for config, version, _ in prepared
    ]
    there = ", ".join(variants[:LISTED]) + (", ..." if len(variants) > LISTED else "")
    also = f", but there is {there}" if prepared else ""
    # Not `tfds build`, which wants two more packages than this does.
    raise InputError(
        f"{name} is not prepared in {data_dir}{also}; set TFDS_DATA_DIR to where it is, or run "
        'this where TensorFlow is installed: python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}').download_and_prepare(file_format='{FORMAT}')\""
    )


def _prepared(folder: Path) -> list[tuple[str | None, str, Path]]:
    """The configuration, version and folder of all that is prepared of a data set, oldest first."""
    found = []
    for depth in ("*", "*/*"):
        for file in folder.glob(f"{depth}/features.json"):
            *config, version = file.parent.relative_to(folder).parts
            if VERSION.fullmatch(version):  # an interrupted preparation is called otherwise
                found.append((config[0] if config else None, version, file.parent))
    return sorted(found, key=lambda variant: [int(part) for part in variant[1].split(".")])


def _refuse_unknown(name: str, data_dir: Path) -> None:
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)  # the others are listed on the web
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise InputError(
            f"TFDS knows no data set {name!r}, and none is prepared in {data_dir}"
            + (f"; is it {near[0]!r}?" if near else "; check the name, or set TFDS_DATA_DIR")
        )


@contextmanager
def _notes(name: str, folder: Path) -> Iterator[None]:
    """Says in a line what TFDS makes of notes that are damaged."""
    try:
        yield
    except InputError:
        raise
    # Whatever it is: TFDS trusts its own files, and ends the program over some.
    except (Exception, SystemExit) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"cannot read TFDS's notes on {name} in {folder} ({reason:.200}); prepare it again"
        ) from error


def _refuse_foreign_classes(file: Path) -> None:
    """Refuses a features.json that would make TFDS import other code than its own."""
    with open_unnamed(file) as opened:
        content = opened.read(MAX_NOTES + 1)
    if len(content) > MAX_NOTES:
        raise ValueError(f"features.json has more than {MAX_NOTES} bytes")
    pending = [json.loads(content)]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()
            if isinstance(old := value.get("content"), str) and "type" in value:
                pending.append(json.loads(old))
            named = [value[key] for key in CLASS_KEYS if isinstance(value.get(key), str)]
            if foreign := [one for one in named if not one.startswith(OURS)]:
                raise InputError(
                    f"{file} names {foreign[0]!a:.100}, code that is not TFDS's own and is not "
                    "run; prepare the data set with the features that TFDS has"
                )


def _open_builder(name: str, folder: Path) -> Any:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    formats = sorted(found.value for found in builder.info.available_file_formats())
    if FORMAT not in formats:
        raise InputError(
            f"{name} is prepared as {', '.join(formats)}, which is not read in any order; run this "
            "where tensorflow, apache-beam and mlcroissant are installed: tfds convert_format "
            f"--dataset_version_dir={folder} --out_file_format={FORMAT}"
        )
    return builder


def _refuse_split(name: str, info: Any, split: str) -> None:
    try:
        count = info.splits[split].num_examples
    except (KeyError, ValueError, AssertionError, NotImplementedError):
        count = None
    if count is None or count < 1:
        there = ", ".join(f"{s.name} ({s.num_examples} examples)" for s in info.splits.values())
        fault = "no split" if count is None else "nothing in"
        raise InputError(f"{name} has {fault} {split!r}; its splits are {there or 'none'}")


def _image_and_label(name: str, info: Any) -> tuple[str, str]:
    """The keys of the image and of the label in a record."""
    import tensorflow_datasets as tfds

    features = info.features
    kinds = {
        # float32 ones are no pictures: depth, stored as the bytes of four channels.
        "an image": lambda f: isinstance(f, tfds.features.Image) and f.np_dtype != np.float32,
        "a class label": lambda f: isinstance(f, tfds.features.ClassLabel) and f.num_classes,
    }
    fields = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {}
    keys = []
    for kind, fits in kinds.items():
        fitting = [key for key, feature in fields.items() if fits(feature)]
        marked = [key for key in fitting if key in (info.supervised_keys or ())]
        if len(marked or fitting) != 1:
            count = "more than one" if fitting else "no"
            there = ", ".join(sorted(fields)) or "without names"
            raise InputError(f"{name} has {count} field that is {kind}; its fields are {there}")
        keys += marked or fitting
    return keys[0], keys[1]


def _common_size(name: str, shape: tuple[int | None, ...]) -> int:
    height, width = shape[-3:-1]
    if height is None or height != width:
        raise InputError(f"{name} holds images that are no squares of one size: give image_size.")
    return height


def _fingerprint(info: Any, split: str, image_size: int) -> str:
    noted = {s.name: [list(s.shard_lengths), int(s.num_bytes)] for s in info.splits.values()}
    parts = [info.full_name, split, noted, "centre crop", image_size]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

"""What TensorFlow Datasets (TFDS) has prepared: found, checked and opened without TensorFlow.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowturbo_jax.data.source import UnreadableError, refuse_failing_machine
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


class Prepared(NamedTuple):
    """A split of a prepared data set.

    Attributes:
      info: what TFDS noted of the data set.
      split: the split, or part of one.
      records: its records, undecoded, safe to read from several threads.
      files: those that hold them.
    """

    info: Any
    split: str
    records: Sequence
    files: list


class Records:
    """Records of TFDS by index, of which some features are parsed: `{key: value}`.

    Args:
      name: what the data set was opened as.
      records: undecoded records, safe to read from several threads.
      features: TFDS's description of what is parsed, by key; of everything else nothing is.
      image: the image's key, which stays an undecoded file.
    """

    def __init__(
        self, name: str, records: Sequence, features: Mapping[str, Any], image: str
    ) -> None:
        import tensorflow_datasets as tfds
        from google.protobuf.message import DecodeError

        self._name, self._records, self._image = name, records, image
        # TFDS's own decoding of images wants OpenCV, and differs from that of image folders.
        self._decoders = {image: tfds.decode.SkipDecoding()}
        self._features = tfds.features.FeaturesDict(dict(features))
        self._damage = (DecodeError, ValueError, TypeError, KeyError, AttributeError)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        record = self._record(index)
        try:
            parsed = self._features.deserialize_example_np(record, decoders=self._decoders)
        except self._damage as error:
            raise UnreadableError("the record is damaged") from error
        if not isinstance(parsed[self._image], bytes):
            raise UnreadableError("the record has no image")
        return parsed

    def name(self, index: int) -> str:
        return f"example {index} of {self._name}"

    def _record(self, index: int) -> bytes:
        try:
            return self._records[index]
        except RuntimeError as error:  # all that ArrayRecord raises
            refuse_failing_machine(self.name(index), error)
            reason = str(error).split(";")[0]
            raise UnreadableError(f"the record cannot be read ({reason})") from error


def open_prepared(name: str, folder: Path, split: str) -> Prepared:
    """Opens a split of the data set in a folder, within `notes`; InputError as `open_tfds`."""
    import tensorflow_datasets as tfds  # here, because it takes a second

    _refuse_foreign_classes(folder / "features.json")
    builder = _open_builder(name, folder)
    info = builder.info
    _refuse_split(name, info, split)
    records = builder.as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES, file_format=FORMAT
    )
    return Prepared(info, split, records, list(info.splits[split].filepaths))


def find(name: str) -> Path:
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
def notes(name: str, folder: Path) -> Iterator[None]:
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


def image_field(name: str, info: Any) -> str:
    """The key of the one image in a record."""
    return only_field(name, info, "an image", _is_image)


def only_field(name: str, info: Any, kind: str, fits: Callable[[Any], bool]) -> str:
    """The key of the one field of a kind, or of the one among those that is for training."""
    fields = fields_of(info)
    fitting = [key for key, feature in fields.items() if fits(feature)]
    marked = [key for key in fitting if key in (info.supervised_keys or ())]
    if len(marked or fitting) != 1:
        count = "more than one" if fitting else "no"
        there = ", ".join(sorted(fields)) or "without names"
        raise InputError(f"{name} has {count} field that is {kind}; its fields are {there}")
    return (marked or fitting)[0]


def fields_of(info: Any) -> dict[str, Any]:
    """TFDS's description of each field of a record, by key; none where fields have no names."""
    import tensorflow_datasets as tfds

    features = info.features
    return dict(features) if isinstance(features, tfds.features.FeaturesDict) else {}


def _is_image(feature: Any) -> bool:
    import tensorflow_datasets as tfds

    # float32 ones are no pictures: depth, stored as the bytes of four channels.
    return isinstance(feature, tfds.features.Image) and feature.np_dtype != np.float32


def image_size_of(name: str, feature: Any, image_size: int) -> int:
    """The side of the square images: as asked for, or, for 0, that which all have."""
    height, width = feature.shape[-3:-1]
    if not image_size and (height is None or height != width):
        raise InputError(f"{name} holds images that are no squares of one size: give image_size.")
    image_size = image_size or height
    if image_size < 1:
        raise InputError(f"image_size must be at least 1, got {image_size}.")
    return image_size


def refuse_missing(name: str, prepared: Prepared) -> None:
    """Refuses a split of which files are missing."""
    if missing := [file for file in prepared.files if not file.exists()]:
        raise InputError(
            f"{len(missing)} of {len(prepared.files)} files of {name} are missing, such as "
            f"{missing[0]}; copy or prepare them again"
        )


def fingerprint_of(prepared: Prepared, image_size: int, *more: str) -> str:
    """What `open_tfds` says of the fingerprint; `more` is what else tells data sets apart."""
    info = prepared.info
    noted = {s.name: [list(s.shard_lengths), int(s.num_bytes)] for s in info.splits.values()}
    parts = [info.full_name, prepared.split, noted, "centre crop", image_size, *more]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

"""Images with captions that TensorFlow Datasets (TFDS) has prepared, read without TensorFlow."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flowturbo_jax.data import pixels
from flowturbo_jax.data.source import CaptionedExample, DataSource, UnreadableError
from flowturbo_jax.data.tfds_prepared import (
    Records,
    fields_of,
    find,
    fingerprint_of,
    image_field,
    image_size_of,
    notes,
    open_prepared,
    refuse_missing,
)
from flowturbo_jax.interfaces import InputError


def open_tfds_captions(argument: str, image_size: int) -> DataSource:
    """Opens a data set of images with texts that TFDS has prepared as ArrayRecord.

    Args:
      argument: what follows "tfds_captions:" in a name: "NAME" or "NAME@SPLIT", as for
        `open_tfds`, and where a record has several fields of text, "#FIELD", such as
        "coco_captions@train#captions/text". A field is a text, a list of texts, or a text in the
        objects of a list, which is called LIST/TEXT.
      image_size: side of the square that is cropped from the middle, by `pixels.centre_crop`; 0
        where all images are squares of one size.

    Returns:
      Images `[image_size, image_size, 3]`, captioned; grey ones get three channels. The fingerprint
      is as that of `open_tfds`, and follows the field of the texts.

    Raises:
      InputError: as `open_tfds`, but that there must be texts and no labels; or there are several
        fields of text, or none of the given name.
    """
    named, _, field = argument.partition("#")
    name, at, split = named.partition("@")
    folder = find(name)
    with notes(name, folder):
        prepared = open_prepared(name, folder, split if at else "train")
        image = image_field(name, prepared.info)
        field = _text_field(named, prepared.info, field)
        features = prepared.info.features
        image_size = image_size_of(name, features[image], image_size)
        fingerprint = fingerprint_of(prepared, image_size, "captions", field)
    refuse_missing(name, prepared)
    full_name = f"tfds_captions:{argument}"
    examples = TfdsCaptions(full_name, prepared.records, features, image, field, image_size)
    shape = (image_size, image_size, 3)
    return DataSource(full_name, examples, shape, (), fingerprint, captioned=True)


class TfdsCaptions:
    """Records of TFDS by index, with texts; their images are decoded here.

    Args:
      name: what the data set was opened as.
      records: undecoded records, safe to read from several threads.
      features: TFDS's description of them.
      image: the image's key in them.
      field: of the texts, their key, or LIST/TEXT.
      image_size: side of the square that is cropped from each image.
    """

    def __init__(
        self, name: str, records: Sequence, features: Any, image: str, field: str, image_size: int
    ) -> None:
        import tensorflow_datasets

        self._image, self._image_size = image, image_size
        self._path = [field] if field in features else field.rsplit("/", 1)
        key, *inner = self._path
        texts = features[key]
        if inner:  # of the objects in the list, the texts alone are parsed
            texts = tensorflow_datasets.features.Sequence({inner[0]: texts.feature[inner[0]]})
        self._records = Records(name, records, {image: features[image], key: texts}, image)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> CaptionedExample:
        parsed = self._records[index]
        captions = self._captions(parsed)
        data = pixels.decode(parsed[self._image], self._image_size)
        return {"data": data, "captions": captions}

    def name(self, index: int) -> str:
        return self._records.name(index)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions(self._records[index])

    def _captions(self, parsed: dict[str, Any]) -> tuple[str, ...]:
        for key in self._path:
            parsed = parsed[key]
        values = list(parsed) if isinstance(parsed, (list, np.ndarray)) else [parsed]
        if not all(isinstance(value, bytes) for value in values):
            raise UnreadableError("the record has no caption")
        try:
            texts = [value.decode().strip() for value in values]
        except UnicodeDecodeError as error:
            raise UnreadableError("the record's caption is no text in UTF-8") from error
        captions = tuple(text for text in texts if text)
        if not captions:
            raise UnreadableError("the record has no caption")
        return captions


def _text_field(named: str, info: Any, wanted: str) -> str:
    """The field of the texts: the wanted one, the only one, or the one that is for training."""
    found = sorted(field for key, one in fields_of(info).items() for field in _fields(key, one))
    marked = [field for field in found if field in (info.supervised_keys or ())]
    fitting = [field for field in found if field == wanted] if wanted else marked or found
    if len(fitting) == 1:
        return fitting[0]
    if not found:
        raise InputError(f"{named} has no field of text; its fields are {_listed(info)}")
    fault = f"no field of text {wanted!a:.100}" if wanted else "more than one field of text"
    raise InputError(
        f"{named} has {fault}; say which, such as tfds_captions:{named}#{found[0]}; there are "
        f"{', '.join(found)}"
    )


def _fields(key: str, feature: Any) -> list[str]:
    """The names of the texts in a field of a record."""
    import tensorflow_datasets

    is_list = isinstance(feature, tensorflow_datasets.features.Sequence)
    inner = feature.feature if is_list else feature
    if _is_text(inner):
        return [key]
    if is_list and isinstance(inner, tensorflow_datasets.features.FeaturesDict):
        return [f"{key}/{one}" for one in inner if "/" not in one and _is_text(inner[one])]
    return []


def _is_text(feature: Any) -> bool:
    import tensorflow_datasets

    is_tensor = isinstance(feature, tensorflow_datasets.features.Tensor)
    return is_tensor and feature.np_dtype == np.object_ and len(feature.shape) < 2


def _listed(info: Any) -> str:
    return ", ".join(sorted(fields_of(info))) or "without names"

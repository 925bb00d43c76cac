"""Labelled images that TensorFlow Datasets (TFDS) has prepared, read without TensorFlow."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flowturbo_jax.class_names import readable_names
from flowturbo_jax.data import pixels
from flowturbo_jax.data.source import DataSource, Example, UnreadableError
from flowturbo_jax.data.tfds_prepared import (
    Records,
    find,
    fingerprint_of,
    image_field,
    image_size_of,
    notes,
    only_field,
    open_prepared,
    refuse_missing,
)


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
    name, at, split = argument.partition("@")
    folder = find(name)
    with notes(name, folder):
        prepared = open_prepared(name, folder, split if at else "train")
        features = prepared.info.features
        image = image_field(name, prepared.info)
        label = only_field(name, prepared.info, "a class label", _is_label)
        image_size = image_size_of(name, features[image], image_size)
        label_names = features[label].names
        fingerprint = fingerprint_of(prepared, image_size)
    refuse_missing(name, prepared)
    full_name = f"tfds:{argument}"
    examples = TfdsExamples(full_name, prepared.records, features, image, label, image_size)
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
        parsed = {key: features[key] for key in (image, label)}
        self._records = Records(name, records, parsed, image)
        self._image, self._image_size = image, image_size
        self._label, self._classes = label, features[label].num_classes

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        parsed = self._records[index]
        label = parsed[self._label]
        if not isinstance(label, int) or not 0 <= label < self._classes:
            raise UnreadableError(f"the record's label is {label}, not 0 to {self._classes - 1}")
        data = pixels.decode(parsed[self._image], self._image_size)
        return {"data": data, "label": np.asarray(label, np.int32)}

    def name(self, index: int) -> str:
        return self._records.name(index)


def _is_label(feature: Any) -> bool:
    import tensorflow_datasets as tfds

    return isinstance(feature, tfds.features.ClassLabel) and bool(feature.num_classes)

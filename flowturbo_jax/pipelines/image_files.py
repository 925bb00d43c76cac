"""Where the images of a measurement go: a folder of PNGs and an .npz, each with their card."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowturbo_jax import images
from flowturbo_jax.interfaces import InputError

CARD = "card.json"
# Of these an image depends as rounding does: other ones may be written over.
ROUNDING = frozenset({"batch_size", "device", "devices", "versions"})


class ImageFiles:
    """Files of the images of one measurement.

    Args:
      card: of `protocol_card` without judges, which is all that images depend on.
      png: folder for 000000.png, 000001.png, ... and card.json; None for none.
      npz: file for all images, `arr_0` [N, H, W, C] uint8 as ADM's evaluator reads it, with the
        card beside it in a file of the same name that ends in .json; None for none.
    """

    def __init__(self, card: Mapping[str, Any], png: Path | None = None, npz: Path | None = None):
        self._card, self._png, self.npz = dict(card), png, npz

    def whole(self) -> bool:
        """Whether all images are there, of this card."""
        count = self._card["samples"]
        if any(_read(path) != self._card for path in self._cards()):
            return False
        return self._count(count) == count and (self.npz is None or self.npz.is_file())

    def begin(self) -> int:
        """Makes the places ready, and what was left by a kill go.

        Returns:
          How many images are there already; all of them if there is no folder for any.

        Raises:
          InputError: a place cannot be written to, or holds other images.
        """
        places = [path for path in (self._png, self.npz) if path is not None]
        for place, card in zip(places, self._cards(), strict=True):
            self._refuse_others(place, card)
        same = all(_read(path) == self._card for path in self._cards())
        for place, card in zip(places, self._cards(), strict=True):
            try:
                card.parent.mkdir(parents=True, exist_ok=True)
                drafts = ".*.png.*.tmp" if place == self._png else f".{place.name}.*.tmp"
                for draft in card.parent.glob(drafts):
                    draft.unlink()
                draft = card.with_name(f".{card.name}.draft")
                draft.write_text(json.dumps(self._card, indent=1) + "\n")
                os.replace(draft, card)
            except OSError as error:
                raise _cannot_write(place, error) from error
        return self._count(self._card["samples"]) if same else 0

    def add(self, first: int, made: np.ndarray) -> None:
        """Writes PNGs.

        Args:
          first: index of the first of these images.
          made: `[B, H, W, C]` uint8, C = 1 or 3; grey ones are written in RGB.

        Raises:
          InputError: they cannot be written.
        """
        if self._png is None:
            return
        colour = np.broadcast_to(made, (*made.shape[:3], 3))
        try:
            for index, image in enumerate(colour, first):
                images.save_png(self._path(index), image)
        except OSError as error:
            raise _cannot_write(self._png, error) from error

    def finish(self, made: np.ndarray) -> None:
        """Writes the .npz.

        Args:
          made: all images `[N, H, W, C]` uint8, which may lie on disk.

        Raises:
          InputError: it cannot be written.
        """
        if self.npz is not None:
            images.save_npz(self.npz, made)

    def _cards(self) -> list[Path]:
        """Where the card of each place is."""
        png = [] if self._png is None else [self._png / CARD]
        return png + ([] if self.npz is None else [self.npz.with_suffix(".json")])

    def _refuse_others(self, place: Path, path: Path) -> None:
        stored = _read(path)
        if stored is None:
            taken = any(place.glob("*")) if place == self._png else place.exists()
            if taken:
                raise InputError(
                    f"{place} is there already and has no card of an evaluation; remove it, or "
                    "choose another place"
                )
            return
        keys = (stored.keys() | self._card.keys()) - ROUNDING
        differing = sorted(key for key in keys if stored.get(key) != self._card.get(key))
        if differing:
            raise InputError(
                f"{place} holds images of another measurement (other {', '.join(differing)}); "
                "remove it, or choose another place"
            )

    def _count(self, limit: int) -> int:
        """How many PNGs there are before the first that is missing."""
        if self._png is None:
            return limit
        return next((i for i in range(limit) if not self._path(i).is_file()), limit)

    def _path(self, index: int) -> Path:
        return self._png / f"{index:06d}.png"


def _read(path: Path) -> dict[str, Any] | None:
    """A card; None where there is none."""
    try:
        card = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return card if isinstance(card, dict) else None


def _cannot_write(place: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot write images to {place}: {error.strerror or error}; what was measured is kept, "
        "and the same command goes on once this is mended"
    )

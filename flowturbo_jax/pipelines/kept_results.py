"""Numbers of long work by name, kept in a file, so that what was measured is not measured again."""

import hashlib
import json
from pathlib import Path
from typing import Any

from flowturbo_jax.interfaces import InputError

UNWRITTEN = 20  # new numbers that an interruption may cost


class KeptResults:
    """Results by key in a JSON file of their own for each identity.

    Args:
      directory: where the file lives.
      name: its name begins so; a digest of the identity follows.
      identity: all that the results depend on beside their keys, anything JSON holds.

    Attributes:
      costs: more numbers by key, kept likewise.
    """

    def __init__(self, directory: Path, name: str, identity: Any):
        self._identity = json.loads(json.dumps(identity))
        digest = hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()
        self._file = Path(directory) / f"{name}-{digest[:12]}.json"
        self._known: dict[str, Any] = {}
        self.costs: dict[str, float] = {}
        self._unwritten = 0
        try:
            stored = json.loads(self._file.read_text())
            if stored["identity"] == self._identity:
                self._known, self.costs = dict(stored["results"]), dict(stored["costs"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # nothing was measured yet, or nothing that can be used

    def get(self, key: str) -> Any:
        """The result of a key, or None."""
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keeps a result, anything JSON holds; on disk soon, or after `write`.

        Raises:
          InputError: the file cannot be written.
        """
        self._known[key] = value
        self._unwritten += 1
        if self._unwritten >= UNWRITTEN:
            self.write()

    def write(self) -> None:
        """Sees to it that all is on disk.

        Raises:
          InputError: the file cannot be written.
        """
        if not self._unwritten:
            return
        draft = self._file.with_name(f".{self._file.name}")
        stored = {"identity": self._identity, "results": self._known, "costs": self.costs}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(stored, indent=1) + "\n")
            draft.replace(self._file)
        except OSError as error:
            raise InputError(
                f"cannot write {self._file}: {error.strerror}; choose another --out"
            ) from error
        self._unwritten = 0

"""Files named by a local path or an `hf://` reference, downloaded to the Hugging Face cache."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import quote, unquote

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights.files import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, sha256_of
from flowturbo_jax.weights.json_file import read_index
from flowturbo_jax.weights.tensor import quoted

FORM = "hf://owner/name/path/to/file or hf://owner/name@revision/path/to/file"
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
REFERENCE = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w.%-]+))?(?:/(.*))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
NOT_MODELS = ("datasets/", "spaces/")  # what the hub also names in this way
SHOWN = 300  # characters of another's message
INDEX = ".index.json"  # end of the name of the file that lists the shards of large weights

# The files of one network, whose weights are in one of several forms.
DIFFUSERS_FILES = ("config.json", DIFFUSERS_WEIGHTS)
TRANSFORMERS_FILES = ("config.json", TRANSFORMERS_WEIGHTS)
Names = Sequence[str | Sequence[str | Sequence[str]]]


class Place(NamedTuple):
    """A file or folder on the hub.

    Attributes:
      repository: "owner/name".
      revision: branch, tag or commit; None for the main branch. A "/" in it is %2F in a reference.
      path: inside the repository; "" for its root.
    """

    repository: str
    revision: str | None
    path: str

    def __str__(self):
        """The reference that means this place."""
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"hf://{self.repository}{revision}" + (f"/{self.path}" if self.path else "")


def fetch(
    reference: str | Path, *, endpoint: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """The local path of a file; one on the hub is downloaded unless the cache has it.

    Args:
      reference: a local path, which is returned as it is and need not exist, or
        `hf://owner/name/path/to/file`, with `@revision` after the name for other than main.
      endpoint: address of the hub; by default that of `huggingface_hub`.
      cache_dir: where downloads are kept; by default the cache of `huggingface_hub`.

    Raises:
      InputError: the reference is malformed, or its file cannot be had.
    """
    place = _parse(reference)
    if place is None:
        return Path(reference)
    if not place.path:
        raise InputError(f"{reference} names no file; write {FORM}")
    return _Downloads(endpoint, cache_dir).file(place)


def fetch_folder(
    reference: str | Path,
    names: Names = DIFFUSERS_FILES,
    *,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The local path of a folder that holds the named files, all of one commit.

    Args:
      reference: a local path, which is returned as it is and need not exist, or `hf://owner/name`
        or `hf://owner/name/path/to/folder`, with `@revision` after the name for other than main.
      names: the wanted files, the first of which must be a name. A tuple stands for the first of
        its choices that exists; a choice is a name, a tuple of names that belong together, of which
        the first is looked for, or () for none of the choices. A name that ends in ".index.json"
        brings the shards it lists.
      endpoint: as in `fetch`.
      cache_dir: as in `fetch`.

    Raises:
      InputError: the reference is malformed, or a file cannot be had.
    """
    folder = _parse(reference)
    if folder is None:
        return Path(reference)
    downloads = _Downloads(endpoint, cache_dir)
    first = downloads.file(_inside(folder, names[0]))
    local = first.parent
    # The cache keeps a file under snapshots/COMMIT/path: what follows is to be of that commit.
    commit = local.parents[len(PurePosixPath(folder.path).parts) - 1] if folder.path else local
    folder = folder._replace(revision=commit.name)
    for name in names[1:]:
        choices = (name,) if isinstance(name, str) else name
        groups = [(choice,) if isinstance(choice, str) else tuple(choice) for choice in choices]
        places = [_inside(folder, group[0]) if group else None for group in groups]
        file = downloads.first_file(places)
        if file is None:
            continue
        further = next((group[1:] for group in groups if group[:1] == (file.name,)), ())
        if file.name.endswith(INDEX):
            further = read_index(file)
        for other in further:
            downloads.file(_inside(folder, other))
    return local


def fetch_parts(
    reference: str | Path,
    first: str,
    parts: Mapping[str, Names],
    *,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The local path of a folder of folders, such as a whole pipeline's, all of one commit.

    Args:
      reference: as in `fetch_folder`.
      first: a file in the folder itself, such as "model_index.json".
      parts: the wanted files of each sub-folder, as the `names` of `fetch_folder`.
      endpoint: as in `fetch`.
      cache_dir: as in `fetch`.

    Raises:
      InputError: as `fetch_folder`.
    """
    local = fetch_folder(reference, (first,), endpoint=endpoint, cache_dir=cache_dir)
    place = _parse(reference)
    if place is None:
        return local
    commit = local.parents[len(PurePosixPath(place.path).parts) - 1] if place.path else local
    for part, names in parts.items():
        path = f"{place.path}/{part}" if place.path else part
        inside = str(place._replace(revision=commit.name, path=path))
        fetch_folder(inside, names, endpoint=endpoint, cache_dir=cache_dir)
    return local


def check_sha256(path: str | Path, expected: str) -> None:
    """Refuses a file whose sha256 is not the expected one, given in hexadecimal.

    Raises:
      InputError: it is another, or the file cannot be read.
    """
    if not re.fullmatch(r"\s*[0-9a-fA-F]{64}\s*", expected):
        raise InputError(f"{expected[:80]!r} is no sha256; it has 64 hexadecimal digits")
    found = sha256_of(path)
    if found != expected.strip().lower():
        raise InputError(
            f"{path} has sha256 {found}, expected {expected}: it is damaged or another file; "
            "download it again"
        )


def _parse(reference: str | Path) -> Place | None:
    """What an `hf://` reference means; None for a local path."""
    if isinstance(reference, Path) or not SCHEME.match(reference):
        return None
    match = REFERENCE.fullmatch(reference)
    path = (match[3] or "").removesuffix("/") if match else ""
    if (
        match is None
        or match[1].startswith(NOT_MODELS)
        or (path and any(part in ("", ".", "..") for part in path.split("/")))
        or "\\" in path
    ):
        raise InputError(f"{reference} is no reference to a file of a model; write {FORM}")
    return Place(match[1], match[2] and unquote(match[2]), path)


def _inside(folder: Place, name: str) -> Place:
    return folder._replace(path=f"{folder.path}/{name}" if folder.path else name)


class _Downloads:
    """Downloads to one cache; every failure is an InputError of one line."""

    def __init__(self, endpoint: str | None, cache_dir: str | Path | None):
        try:
            import huggingface_hub  # here, since only these references need it
        except ImportError as error:
            raise InputError(
                "hf:// references need huggingface_hub; install it with  pip install "
                "huggingface_hub  or give a local path"
            ) from error
        self._hub = huggingface_hub
        self._options = {"endpoint": endpoint, "cache_dir": cache_dir}

    def file(self, place: Place) -> Path:
        return self.first_file([place])

    def first_file(self, places: Sequence[Place | None]) -> Path | None:
        """The first of several files that exists; None in its place where it need not."""
        for place in places:
            if place is None:
                return None
            try:
                if not self._is_known_to_lack(place):
                    return self._download(place)
            except self._hub.errors.LocalEntryNotFoundError as error:  # an EntryNotFoundError too
                raise InputError(self._reason(place, error)) from error
            except self._hub.errors.EntryNotFoundError:
                pass
            except Exception as error:  # of many kinds, HTTP libraries' own among them
                raise InputError(self._reason(place, error)) from error
        folder, wanted = places[0]._replace(path=""), " or ".join(place.path for place in places)
        raise InputError(f"{folder} has no file {wanted}; look there for the right name")

    def _download(self, place: Place) -> Path:
        options = {**self._options, "revision": place.revision}
        return Path(self._hub.hf_hub_download(place.repository, place.path, **options))

    def _is_known_to_lack(self, place: Place) -> bool:
        """Whether the cache remembers that a commit, which never changes, has no such file."""
        if not COMMIT.fullmatch(place.revision or ""):
            return False
        cached = self._hub.try_to_load_from_cache(
            place.repository,
            place.path,
            cache_dir=self._options["cache_dir"],
            revision=place.revision,
        )
        return not (cached is None or isinstance(cached, str))  # neither unknown nor a path

    def _reason(self, place: Place, error: Exception) -> str:
        """One line on why a download failed, and what to do about it."""
        errors, cause = self._hub.errors, error.__cause__ or error
        said = f"{type(cause).__name__}: {_one_line(str(cause))}"
        if isinstance(error, errors.GatedRepoError):
            return (
                f"cannot download {place}: {place.repository} is open to those only who asked for "
                "access on its page; do that, then log in with  hf auth login"
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"cannot download {place}: there is no model {place.repository}, or it is private; "
                "check the name, or log in with  hf auth login"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"cannot download {place}: {place.repository} has no such revision"
        if isinstance(error, errors.LocalEntryNotFoundError):
            return (
                f"cannot download {place}: it is not in the cache and the hub cannot be reached "
                f"({said}); check the connection, or give a local path"
            )
        return f"cannot download {place}: {said}"


def _one_line(message: str) -> str:
    """What a server or a library said, as far as it can be shown."""
    line = " ".join(message.split())
    return line if line.isprintable() and len(line) <= SHOWN else quoted(line)

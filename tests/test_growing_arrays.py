"""Arrays that grow on disk: what is appended stays, whatever ends the process in between."""

import errno
import json

import numpy as np
import pytest

from flowturbo_jax import growing_arrays
from flowturbo_jax.growing_arrays import GrowingArrays
from flowturbo_jax.interfaces import InputError

COLUMNS = {"a": (np.float32, (3,)), "b": (np.uint8, ()), "nothing": (np.float64, (0,))}


def rows(first: int, count: int) -> dict[str, np.ndarray]:
    index = np.arange(first, first + count)
    return {
        "a": np.repeat(index[:, None], 3, axis=1).astype(np.float32),
        "b": index.astype(np.uint8),
        "nothing": np.zeros((count, 0)),
    }


@pytest.fixture
def folder(tmp_path):
    """Five rows."""
    arrays = GrowingArrays(tmp_path / "rows", {"seed": 1}, COLUMNS)
    arrays.append(**rows(0, 2))
    arrays.append(**rows(2, 3))
    return tmp_path / "rows"


def opened(folder, identity=None, columns=COLUMNS):
    return GrowingArrays(folder, {"seed": 1} if identity is None else identity, columns)


def assert_holds(arrays, count):
    assert arrays.rows == count
    for name, expected in rows(0, count).items():
        found = arrays.read(name)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype


def test_rows_are_there_after_another_process_opens_them(folder):
    assert_holds(opened(folder), 5)
    arrays = opened(folder)
    arrays.append(**rows(5, 0))
    arrays.append(**rows(5, 1))
    assert_holds(arrays, 6)
    assert_holds(opened(folder), 6)


def test_rows_are_read_from_disk(folder):
    found = opened(folder).read("a")
    assert isinstance(found, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


def test_a_torn_row_is_cut_off_everywhere(folder):
    for torn in (1, 7, 12, 13):  # of 12 bytes a row
        with (folder / "a.rows").open("ab") as file:
            file.write(bytes(torn))
        assert_holds(opened(folder), 5)
        assert (folder / "a.rows").stat().st_size == 60
    with (folder / "b.rows").open("r+b") as file:
        file.truncate(3)
    arrays = opened(folder)
    assert_holds(arrays, 3)
    arrays.append(**rows(3, 1))
    assert_holds(arrays, 4)
    (folder / "b.rows").unlink()
    assert_holds(opened(folder), 0)


@pytest.mark.parametrize(
    "changed",
    [
        {"identity": {"seed": 2}},
        {"identity": {"seed": 1, "more": None}},
        {"columns": {**COLUMNS, "a": (np.float32, (4,))}},
        {"columns": {**COLUMNS, "a": (np.int32, (3,))}},
        {"columns": {"a": COLUMNS["a"]}},
    ],
)
def test_other_rows_begin_anew(folder, changed):
    (folder / "left.rows").write_bytes(b"of other columns")
    assert opened(folder, **changed).rows == 0
    assert not (folder / "left.rows").exists()
    assert opened(folder).rows == 0


@pytest.mark.parametrize("content", [b"", b"\xff", b"{}", None])
def test_a_damaged_identity_begins_anew(folder, content):
    file = folder / growing_arrays.IDENTITY
    file.unlink() if content is None else file.write_bytes(content)
    assert opened(folder).rows == 0
    assert json.loads(file.read_text())["identity"] == {"seed": 1}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a": np.zeros((2, 4), np.float32)}, r"a has rows float32\[3\], not float32\[4\]"),
        ({"nothing": np.zeros((2, 3))}, r"nothing has rows float64\[0\], not float64\[3\]"),
        ({"b": np.zeros(2, np.int64)}, r"b has rows uint8\[\], not int64\[\]"),
        ({"b": np.zeros(3, np.uint8)}, "all of"),
        ({"c": np.zeros(2, np.uint8)}, "all of"),
    ],
)
def test_what_is_no_row_is_refused_and_nothing_is_appended(folder, changed, message):
    arrays = opened(folder)
    with pytest.raises(ValueError, match=message):
        arrays.append(**{**rows(5, 2), **changed})
    with pytest.raises(ValueError, match="all of"):
        arrays.append(a=rows(5, 2)["a"])
    arrays.append(**rows(5, 2))
    assert_holds(arrays, 7)


def test_columns_without_any_size_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has a size"):
        GrowingArrays(tmp_path / "rows", {}, {"nothing": (np.uint8, (0,))})


def test_the_first_rows_can_be_kept(folder):
    arrays = opened(folder)
    arrays.keep(4)
    assert_holds(arrays, 4)
    assert_holds(opened(folder), 4)
    for wrong in (5, -1):
        with pytest.raises(ValueError, match=f"{wrong} rows of 4"):
            arrays.keep(wrong)


def test_a_full_disk_loses_no_row(folder, monkeypatch):
    import resource

    arrays = opened(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80, hard))  # bytes; seven rows of a have 84
    try:
        with pytest.raises(InputError, match=r"cannot write to .*what is there is kept, and"):
            arrays.append(**rows(5, 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_holds(arrays, 5)
    arrays.append(**rows(5, 2))
    assert_holds(opened(folder), 7)
    real = growing_arrays.Path.open

    def full(path, *mode):
        if path.name == "b.rows":  # after a was written
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *mode)

    with monkeypatch.context() as patch:
        patch.setattr(growing_arrays.Path, "open", full)
        with pytest.raises(InputError, match="No space left on device"):
            arrays.append(**rows(7, 1))
    assert (folder / "a.rows").stat().st_size == 84
    assert_holds(opened(folder), 7)


def test_a_place_that_is_no_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "rows"):
        with pytest.raises(InputError, match=r"cannot write to .*file.*: Not a directory"):
            opened(place)
    assert (tmp_path / "file").read_text() == "in the way"


def test_removed_rows_are_gone(folder):
    opened(folder).remove()
    assert not folder.exists()
    assert opened(folder).rows == 0

"""PyTorch zip files that are damaged or made to mislead: refused, and each with its reason."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch_file_writer as writer
from torch_file_writer import Call, Ordered, Raw, Stored, View

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights import archive, open_weights
from flowturbo_jax.weights.torch_file import open_torch_file

FLAT = np.random.default_rng(0).standard_normal(60).astype(np.float32)


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "weights.pt"


WHOLE = ("0", "float32", 60)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (Stored(*WHOLE, (61,), (1,)), "reaches beyond the 60 numbers"),
        (Stored(*WHOLE, (60,), (1,), 1), "reaches beyond"),
        (Stored(*WHOLE, (2, 2), (59, 1)), "reaches beyond"),
        (Stored(*WHOLE, (2,), (2**63,)), "reaches beyond"),
        (Stored(*WHOLE, (2**31, 2**31, 2**31), (0, 0, 0)), "reaches beyond"),
        (Stored(*WHOLE, (0, 2**62), (0, 0)), "reaches beyond"),
        (Stored(*WHOLE, (2**24 + 1,), (0,)), "expanded from 60 numbers"),
        (Stored(*WHOLE, (-1,), (1,)), "not made of whole numbers"),
        (Stored(*WHOLE, (3,), (-1,), 10), "not made of whole numbers"),
        (Stored(*WHOLE, (3,), (1,), -1), "not made of whole numbers"),
        (Stored(*WHOLE, (True,), (1,)), "not made of whole numbers"),
        (Stored(*WHOLE, (2.0,), (1,)), "not made of whole numbers"),
        (Stored(*WHOLE, (1, 2), (1,)), "2 axes and 1 strides"),
        (Stored(*WHOLE, (1,) * 17, (1,) * 17), "17 axes"),
        (Stored("0", "float32", 59, (1,), (1,)), "240 bytes, not 59 float32 numbers"),
        (Stored("0", "float64", 60, (1,), (1,)), "240 bytes, not 60 float64 numbers"),
        (Stored("0", "float32", -60, (1,), (1,)), "not -60 float32 numbers"),
        (Stored("7", "float32", 60, (1,), (1,)), "record 'archive/data/7' is missing"),
        (Stored("../data/0", "float32", 60, (1,), (1,)), "is missing"),
        ([View(FLAT, (1,), (1,)), Stored("0", "int32", 60, (1,), (1,))], "two different ways"),
        (Call("torch._utils._rebuild_tensor_v2", (1, 2)), "not rebuilt of a storage"),
        (Call("torch._utils._rebuild_parameter", (1, 2, 3)), "not made of a tensor"),
        (Call("torch.Size", (3,)), "not made of a tuple"),
        (Call("torch.device", (0,)), "not made of a name and a number"),
        (Raw(b"(X\x07\x00\x00\x00storageK\x01K\x02K\x03K\x04tQ"), "no known kind of storage"),
        (Raw(b"ctorch.storage\nUntypedStorage\n"), r"asks for 'torch\.storage\.UntypedStorage'"),
    ],
)
def test_a_tensor_that_does_not_fit_its_storage_is_refused(file, tensor, message):
    writer.save(file, {"wrong": tensor, "real": FLAT})
    with pytest.raises(InputError, match=message):
        open_weights(file)


def test_a_negated_tensor_is_refused(file):
    storage = writer.Pickler().value(Stored(*WHOLE, (1,), (1,)))
    storage = Raw(storage[storage.index(b"((") + 1 : storage.index(b"Q") + 1])
    arguments = (storage, 0, (1,), (1,), False, Ordered({}))
    writer.save(file, {"real": FLAT, "n": Call("torch._utils._rebuild_tensor_v2", arguments)})
    open_weights(file)
    negated = Call("torch._utils._rebuild_tensor_v2", (*arguments, {"neg": True}))
    writer.save(file, {"real": FLAT, "n": negated})
    with pytest.raises(InputError, match="conjugated or negated"):
        open_weights(file)


def test_a_small_file_cannot_fill_the_memory(file):
    wide = {f"w{i}": View(FLAT, (2**22,), (0,)) for i in range(5)}
    writer.save(file, wide)
    with pytest.raises(InputError, match="they share storages far more than tied weights do"):
        open_weights(file)


def test_one_tensor_under_many_names_cannot_fill_the_memory(file):
    large = np.zeros(100_000, np.float16)
    pickler = writer.Pickler()
    names = b"".join(pickler.value(f"w{i}") + b"h\x00" for i in range(1000))
    pickle = b"\x80\x02}(" + pickler.value("w") + pickler.value(large) + b"q\x00" + names + b"u."
    writer.write_zip(file, {"data.pkl": pickle, "data/0": large.tobytes()})
    with pytest.raises(InputError, match=r"its tensors take 400400000: they share"):
        open_weights(file)


def test_tied_weights_are_read(file):
    large = np.arange(10_000_000, dtype=np.float16)
    writer.save(file, {f"w{i}": View(large, large.shape, (1,)) for i in range(3)})
    assert all(np.array_equal(np.asarray(w), large) for w in open_weights(file).tensors.values())


def test_scattered_tensors_cannot_make_reading_endless(file):
    large = np.zeros(2_000_000, np.float32)
    ends = View(large, (2,), (large.size - 1,))
    writer.save(file, {f"w{i}": ends for i in range(20)})
    open_weights(file)
    writer.save(file, {f"w{i}": ends for i in range(30)})
    with pytest.raises(InputError, match=r"240000000 must be read for its tensors.*contiguous"):
        open_weights(file)


def test_a_storage_is_described_once_however_often_it_is_named(file):
    pickler = writer.Pickler()
    storage = ("storage", Raw(pickler.name("torch", "FloatStorage")), "0", "cpu", 60)
    pickle = b"\x80\x02](" + pickler.value(storage) + b"q\x00Q" + b"h\x00Q" * 99 + b"e."
    writer.write_zip(file, {"data.pkl": pickle, "data/0": FLAT.tobytes()})
    assert len({id(found) for found in open_torch_file(file)}) == 1
    writer.write_zip(file, {"data.pkl": pickle, "data/0": FLAT.tobytes()}, prefix="a" * 2000)
    with pytest.raises(InputError, match="has a name of 20"):
        open_weights(file)


def test_a_tensor_larger_than_the_memory_is_refused(file, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    writer.save(file, {"w": FLAT})
    tensor = open_weights(file).tensors["w"]
    monkeypatch.setattr(archive.Archive, "read_into", no_memory)
    with pytest.raises(InputError, match="dtype float32 does not fit in memory"):
        tensor.read()


def patch(file: Path, name: str, place: int, value: bytes) -> None:
    """Overwrites bytes of a record's entry in the directory at the end of a zip file."""
    content = bytearray(file.read_bytes())
    entry = content.rindex(f"archive/{name}".encode()) - 46
    assert content[entry : entry + 4] == b"PK\x01\x02"
    content[entry + place : entry + place + len(value)] = value
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (8, b"\x01\x08", "is encrypted"),
        (10, b"\x08\x00", "is compressed"),
        (10, b"\x63\x00", "is compressed"),
        (20, b"\x00\x00\x00\x00", "is compressed"),
        (20, b"\xff\xff\xff\x7f" * 2, "lies outside of the file"),
        (42, b"\x00\xff\xff\x00", "lies outside of the file"),
        (46, b"archive/data/1", "occurs twice"),
    ],
)
def test_records_that_cannot_be_read_in_place_are_refused(file, place, value, message):
    writer.save(file, {"a": FLAT[:20].copy(), "b": FLAT[20:].copy()})
    patch(file, "data/0", place, value)
    with pytest.raises(InputError, match=message):
        open_weights(file)


def test_overlapping_records_are_refused(file):
    writer.save(file, {f"w{i}": FLAT.copy() for i in range(30)})
    content = file.read_bytes()
    patch(file, "data/0", 20, (len(content) // 2).to_bytes(4, "little") * 2)
    with pytest.raises(InputError, match="records overlap"):
        open_weights(file)


def test_a_directory_of_absurd_size_is_refused(file, monkeypatch):
    writer.save(file, {f"w{i}": FLAT[:1].copy() for i in range(50)})
    monkeypatch.setattr(archive, "MAX_RECORDS", 40)
    with pytest.raises(InputError, match="lists 53 records; at most 40"):
        open_weights(file)
    monkeypatch.setattr(archive, "MAX_DIRECTORY", 2_000)
    with pytest.raises(InputError, match=r"directory has \d+ bytes; at most 2000"):
        open_weights(file)


@pytest.mark.parametrize("name", ["a", "shared_1", "shared_2"])
def test_damaged_numbers_are_found_when_they_are_read(file, name):
    other = FLAT[::-1].copy()
    views = {"shared_1": View(other, (10,), (1,)), "shared_2": View(other, (5, 5), (1, 5), 30)}
    writer.save(file, {"a": FLAT, **views, "intact": np.arange(5)})
    content = bytearray(file.read_bytes())
    for array in (FLAT, other):  # the last number, which shared_1 and shared_2 do not contain
        content[content.index(array.tobytes()) + array.nbytes - 1] ^= 1
    file.write_bytes(content)
    tensors = open_weights(file).tensors
    np.testing.assert_array_equal(np.asarray(tensors["intact"]), np.arange(5))
    for _ in range(2):
        with pytest.raises(InputError, match="does not have the checksum"):
            tensors[name].read()


def test_a_damaged_description_is_refused(file):
    writer.save(file, {"weight": FLAT})
    content = bytearray(file.read_bytes())
    content[content.index(b"weight")] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"data\.pkl' does not have the checksum"):
        open_weights(file)


def test_a_file_that_changes_after_opening_is_refused(file):
    writer.save(file, {"w": FLAT})
    tensor = open_weights(file).tensors["w"]
    sound = file.read_bytes()
    for content in (b"", sound[:100], bytes(len(sound))):
        file.write_bytes(content)
        with pytest.raises(InputError, match=f"cannot read {file}: it changed after it was opened"):
            tensor.read()
    file.unlink()
    with pytest.raises(InputError, match=f"cannot read {file}"):
        tensor.read()


@pytest.mark.parametrize(
    ("record", "message"),
    [("constants.pkl", "TorchScript"), ("byteorder", "must be little or big")],
)
def test_files_of_another_making_are_refused(file, record, message):
    writer.save(file, {"w": FLAT}, **{record: b"middle"})
    with pytest.raises(InputError, match=message):
        open_weights(file)


def test_a_program_is_refused_as_such_though_its_code_is_compressed(file):
    writer.save(file, {"w": FLAT})
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as stored:
        stored.writestr("archive/code/__torch__.py", b"class Net: pass\n" * 9)
    with pytest.raises(InputError, match="is a TorchScript program"):
        open_weights(file)


def test_two_descriptions_in_a_file_are_refused(file):
    writer.save(file, {"w": FLAT})
    with zipfile.ZipFile(file, "a") as stored:
        stored.writestr("other/data.pkl", b"\x80\x02N.")
    with pytest.raises(InputError, match=r"several data\.pkl"):
        open_weights(file)

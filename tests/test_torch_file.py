"""PyTorch zip files: every form that torch.save gives tensors, bit for bit, one at a time."""

import re
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch_file_writer as writer
from safetensors.numpy import load_file
from torch_file_writer import Call, Ordered, Parameter, Raw, View

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights import open_weights
from flowturbo_jax.weights.pickled_values import Namespace
from flowturbo_jax.weights.torch_file import open_torch_file

FLAT = np.random.default_rng(0).standard_normal(60).astype(np.float32)


@pytest.fixture
def golden(fixtures) -> Path:
    return fixtures / "golden"


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "weights.pt"


def assert_same(found, wanted) -> None:
    """The same names, shapes, dtypes and bits."""
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        read = np.asarray(found[name])
        assert (read.shape, read.dtype) == (array.shape, array.dtype)
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        assert read.tobytes() == array.tobytes()


def test_golden_weights_are_bit_identical(golden):
    micro = load_file(golden / "sit" / "sit_micro.safetensors")
    assert_same(open_weights(golden / "sit" / "sit_micro_train.pt", "model").tensors, micro)
    assert_same(open_weights(golden / "edge" / "ddp_prefix.pt").tensors, micro)
    train = golden / "refiner" / "refiner_train.pt"
    for part, name in (("model", "refiner"), ("ema", "refiner_ema")):
        weights = open_weights(train, part)
        assert weights.origin == part
        assert_same(weights.tensors, load_file(golden / "refiner" / f"{name}.safetensors"))
    ema = open_weights(train).tensors
    assert any(
        np.any(np.asarray(ema[name]) != np.asarray(tensor))
        for name, tensor in open_weights(train, "model").tensors.items()
    )


def test_the_rest_of_a_training_checkpoint_is_read_over(golden):
    tree = open_torch_file(golden / "sit" / "sit_micro_train.pt")
    assert sorted(tree) == ["args", "ema", "model", "opt"]
    moments = tree["opt"]["state"][1]
    assert {"step", "exp_avg", "exp_avg_sq"} <= moments.keys()
    assert np.asarray(moments["exp_avg"]).shape == moments["exp_avg"].shape
    assert isinstance(tree["args"], Namespace)


def test_a_file_that_would_run_a_command_is_refused(golden):
    marker = Path("/tmp/pwned_flowturbo")  # as the file has it
    assert not marker.exists()
    with pytest.raises(InputError, match=r"asks for 'posix\.system'"):
        open_weights(golden / "edge" / "malicious_args.pt")
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_and_container_is_read(file, protocol):
    fields = {"lr": 1e-4, "sizes": [1, (2, None)], "big": 2**40, "minus": -3}
    value = {
        "model": Ordered({"w": Parameter(FLAT.reshape(6, 10))}, {"": {"version": 1}}),
        "p": Parameter(FLAT, {"note": "an attribute"}),
        "args": writer.Namespace(fields),
        "size": Call("torch.Size", ((1, 2),)),
        "devices": [Call("torch.device", ("cpu",)), Call("torch.device", ("cuda", 1))],
        "dtype": Raw(writer.Pickler(protocol).name("torch", "bfloat16")),
    }
    writer.save(file, value, protocol)
    tree = open_torch_file(file)
    assert_same(tree["model"], {"w": FLAT.reshape(6, 10)})
    assert_same({"p": tree["p"]}, {"p": FLAT})
    assert tree["args"].fields == fields
    assert tree["size"] == (1, 2)
    assert tree["devices"] == ["cpu", "cuda:1"]
    assert tree["dtype"] == "torch.bfloat16"


def test_every_dtype_is_read(file):
    numbers = np.array([0, 1, 2, 100])
    state = {name: numbers.astype(name) for name in writer.STORAGES if name != "bfloat16"}
    state["bfloat16"] = np.array([1.5, -0.0, np.inf, 3e38]).astype(ml_dtypes.bfloat16)
    writer.save(file, state)
    assert_same(open_weights(file).tensors, state)


def at_each_index(view: View) -> np.ndarray:
    """The numbers of a view, by the definition of offset and strides."""
    places = np.full(view.shape, view.offset, np.int64)
    for axis, stride in enumerate(view.strides):
        steps = stride * np.arange(view.shape[axis])
        places += np.expand_dims(steps, tuple(range(1, len(view.shape) - axis)))
    return view.storage[places]


def test_views_of_a_shared_storage_are_read_through_their_strides(file):
    half = FLAT.astype(ml_dtypes.bfloat16)
    views = {
        "whole": View(FLAT, (3, 4, 5), (20, 5, 1)),
        "part": View(FLAT, (2, 3), (3, 1), 7),
        "transposed": View(FLAT, (5, 4), (1, 5), 20, "cuda:3"),
        "channels_last": View(FLAT, (2, 3, 2, 2), (12, 1, 6, 3)),
        "every_other": View(FLAT, (10,), (3,), 1),
        "expanded": View(FLAT, (4, 3), (0, 1), 57),
        "one_long_axis": View(FLAT, (1, 3), (2**60, 1), 2),
        "scalar": View(FLAT, (), (), 59),
        "nothing": View(FLAT, (0, 40), (1, 1), 2**50),
        "half": View(half, (4, 5), (1, 4), 3),
    }
    writer.save(file, views)
    wanted = {name: at_each_index(view) for name, view in views.items()}
    assert_same(open_weights(file).tensors, wanted)
    with zipfile.ZipFile(file) as stored:
        assert sum("/data/" in name for name in stored.namelist()) == 2


def test_each_read_gives_a_new_array(file):
    writer.save(file, {"w": FLAT, "t": View(FLAT, (6, 10), (1, 6))})
    for tensor in open_weights(file).tensors.values():
        first = tensor.read()
        first[...] = 0
        assert np.any(np.asarray(tensor))
        assert np.asarray(tensor, np.float64).dtype == np.float64
        with pytest.raises(ValueError, match="without being read"):
            np.array(tensor, copy=False)


def test_bytes_of_the_other_order_are_swapped(file):
    state = {"w": FLAT.reshape(6, 10), "half": FLAT.astype(ml_dtypes.bfloat16), "i": np.arange(9)}
    pickler = writer.Pickler()
    records = {"data.pkl": pickler.dump(state), "byteorder": b"big"}
    for key, array in pickler.arrays.items():
        swapped = array.view(f"u{array.itemsize}").byteswap()
        records[f"data/{key}"] = swapped.tobytes()
    writer.write_zip(file, records)
    assert_same(open_weights(file).tensors, state)


def test_a_file_written_without_checksums_is_read(file):
    writer.save(file, {"w": FLAT})
    sound = file.read_bytes()

    def without(*places: int) -> None:
        content = bytearray(sound)
        for place in places:
            content[place + 16 : place + 20] = bytes(4)
        file.write_bytes(content)

    entries = [match.start() for match in re.finditer(rb"PK\x01\x02", sound)]
    without(*entries)  # as set_crc32_options(False) has PyTorch write it
    for _ in range(2):
        assert_same(open_weights(file).tensors, {"w": FLAT})
    without(*entries[1:])  # one checksum is left: the others are damaged
    with pytest.raises(InputError, match="does not have the checksum"):
        open_weights(file)


def test_reading_holds_one_tensor_at_a_time(file):
    shape, size = (256, 1024), 1 << 20
    entries = [(f"w{i}", shape, lambda i=i: np.full(shape, i, np.float32)) for i in range(12)]
    writer.stream(file, entries, "ema")
    weights = open_weights(file)
    assert weights.origin == "ema"
    weights.tensors["w0"].read()
    tracemalloc.start()
    try:
        for i, tensor in enumerate(weights.tensors.values()):
            assert np.all(np.asarray(tensor) == i)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # One tensor, a quarter of that for the comparison, and small change; the file has 12.
    assert peak < 1.5 * size

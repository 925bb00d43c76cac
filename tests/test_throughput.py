"""Rates of a run, and the peaks they are held against."""

import time

import pytest

from flowturbo_jax import throughput
from flowturbo_jax.throughput import Meter


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told to."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_rates_are_those_since_begin(clock):
    meter = Meter(samples_per_step=8, flop_per_step=5e12, peak_flop=20e12)
    assert meter.rates() == {}
    meter.step()  # the one that compiles
    clock[0] += 60
    meter.begin()
    for _ in range(4):
        with meter.waiting():
            clock[0] += 0.1
        clock[0] += 0.4
        meter.step()
    rates = meter.rates()
    assert rates == pytest.approx(
        {"images_per_second": 16, "ms_per_step": 500, "input_wait": 0.2, "mfu": 0.5}
    )
    meter.begin()
    assert meter.rates() == {}


def test_utilisation_is_left_out_where_the_peak_is_unknown(clock):
    meter = Meter(8, 1e12, None)
    meter.begin()
    meter.step()
    clock[0] += 1
    assert "mfu" not in meter.rates()


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5p", "bfloat16", 459e12),
        ("TPU v4", "float32", None),
        ("cpu", "float32", None),
        ("NVIDIA Something", "bfloat16", None),
    ],
)
def test_peak_is_that_of_the_device_or_unknown(kind, dtype, expected):
    assert throughput.peak(kind, dtype) == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (7500, "2 h 05 min")],
)
def test_a_duration_reads_well(seconds, text):
    assert throughput.duration(seconds) == text

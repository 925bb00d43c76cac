"""benchmark as users run it: what it prints and writes, and how it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from test_benchmark import save_tiny_model
from test_commands import run

from flowturbo_jax import plots
from flowturbo_jax.__main__ import main as package_main
from flowturbo_jax.commands import benchmark_plot, benchmark_tables
from flowturbo_jax.pipelines import ablation, benchmark, ceiling, cold_start
from flowturbo_jax.pipelines.cold_start import Start
from flowturbo_jax.pipelines.subject import Subject
from flowturbo_jax.pipelines.time_split import PARTS
from flowturbo_jax.pipelines.timing import Times

ROOT = Path(__file__).parents[1]
QUICK = ("--schedules=H1,H1R1", "--batch-sizes=2", "--repeats=1")
ALONE = (*QUICK, "--no-cold-start")


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """A ceiling that is measured in no time."""
    monkeypatch.setattr(ceiling, "SIZES", (64,))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "m"))


def rows(*, batch_sizes=(1, 8), schedules=("H8", "H1P5R3")):
    """Rows as a report has them, without measuring."""
    found = []
    for size in batch_sizes:
        for schedule in schedules:
            split = dict.fromkeys(PARTS, 1.5) | {"rest": -0.5 if schedule == "H8" else 0.75}
            found.append(
                {
                    "schedule": schedule,
                    "batch_size": size,
                    "predictor_evaluations": 16,
                    "refiner_evaluations": 0,
                    "guidance": "paired",
                    "guidance_scale": 1.5,
                    "guidance_interval": None,
                    "gmac": 0.241,
                    "ms_per_batch": sum(split.values()),
                    "ms_per_image": sum(split.values()) / size,
                    "images_per_second": 123.4,
                    "speed_up": 2.0,
                    "split_ms_per_batch": split,
                    "utilisation": {"whole": 0.31, "networks": 0.35, "decode": None},
                    "memory_bytes": 12_000_000,
                    "memory_source": "compiler",
                    "trace_seconds": 0.5,
                    "compile_seconds": 1.25,
                }
            )
    return found


def report(**options):
    return {
        "model": "digits",
        "card": {"dtype": "float32", "device": "cpu"},
        "ceiling": {"flop_per_second": 123.4e9},
        "rows": rows(**options),
        "ablation": [],
        "cold_start": None,
    }


def test_benchmark_prints_tables_and_writes_numbers_and_a_picture(
    model, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "new" / "speed.json"
    ablated = dict.fromkeys(ablation.WAYS, Times(0.5, 0.25, 3))
    monkeypatch.setattr(ablation, "measure", lambda *_: ablated)
    assert run(package_main, "benchmark", model, f"--out={out}", "--ablation", *ALONE) == 0
    said = capsys.readouterr().out
    found = json.loads(out.read_text())
    named = [(row["schedule"], row["batch_size"]) for row in found["rows"]]
    assert named == [("H1", 2), ("H1R1", 2)]
    assert found["cold_start"] is None
    assert [row["schedule"] for row in found["ablation"]] == ["H1", "H1R1"]
    for text in ("| H1R1 | paired 1.5 | 2 |", "conditioning", "the whole sampler", "GFLOP/s"):
        assert text in said
    with Image.open(out.with_suffix(".png")) as picture:
        assert min(picture.size) > 300
    assert sorted(file.name for file in out.parent.iterdir()) == [
        "speed.json",
        "speed.png",
        "speed.svg",
    ]


def test_without_out_it_only_prints(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["--schedules=H1", "--batch-sizes=2,2", "--guidance=none", "--repeats=1"]
    assert run(package_main, "benchmark", model, "--no-cold-start", *given) == 0
    said = capsys.readouterr().out
    assert said.count("| H1 | none | 2 |") == 1
    assert "wrote" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_size_is_measured_with_random_weights(capsys):
    given = ["--size=SiT-S/8", "--image-size=64", "--no-vae", "--schedules=H1", "--batch-sizes=1"]
    assert run(package_main, "benchmark", *given, "--repeats=1", "--no-cold-start") == 0
    assert "SiT-S/8 at 64, random weights, no VAE, float32" in capsys.readouterr().out


def test_fresh_processes_start_before_this_one_loads_the_model(
    model, tmp_path, monkeypatch, capsys
):
    seconds, loaded, load = dict.fromkeys(cold_start.STAGES, 0.5), [], Subject.load
    monkeypatch.setattr(
        Subject, "load", lambda self, *given: loaded.append(given) or load(self, *given)
    )

    def measured(request):
        assert not loaded
        assert request == cold_start.Request(
            Subject(model), "float32", 2, "H1R1", 2.0, None, "0:0.5"
        )
        return Start(seconds, 3, 0), Start({**seconds, "program": 0.0}, 0, 3)

    monkeypatch.setattr(cold_start, "measure", measured)
    monkeypatch.setattr(benchmark, "measure", lambda *_, **__: report())
    asked = ["--guidance-scale=2", "--guidance-interval=0:0.5", f"--out={tmp_path / 'x.json'}"]
    assert run(package_main, "benchmark", model, *QUICK, *asked) == 0
    assert json.loads((tmp_path / "x.json").read_text())["cold_start"]["warm_over_cold"] == 0.5
    assert "after 50 % of the time" in capsys.readouterr().out


def test_no_device_is_touched_before_the_fresh_processes_have_theirs(model):
    command = [sys.executable, "-m", "flowturbo_jax", "benchmark", model, "--schedules=H1"]
    environment = {**os.environ, "JAX_PLATFORMS": "nowhere"}  # who touches a device there, fails
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 2
    assert "error: a fresh process failed: " in done.stderr
    assert "nowhere" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "--size=SiT-S/2"], "give a model directory or --size"),
        ([], "give a model directory or --size"),
        (["{model}", "--no-vae"], "mean nothing without --size"),
        (["{model}", "--image-size=64"], "mean nothing without --size"),
        (["--size=SiT-Q/2"], "unknown SiT size 'SiT-Q/2'"),
        (["--size=SiT-S/8", "--image-size=100"], "a multiple of 8"),
        (["nowhere"], "no model directory at 'nowhere'"),
        (["{model}", "--schedules=H8,Q3"], "unknown block 'Q'"),
        (["{model}", "--schedules=fast"], "no schedule 'fast' yet"),
        (["{model}", "--batch-sizes=1,x"], "--batch-sizes is '1,x'"),
        (["{model}", "--batch-sizes=0"], "--batch-sizes is '0'"),
        (["{model}", "--batch-sizes="], "--batch-sizes is ''"),
        (["{model}", "--dtype=int4"], "dtype is 'int4'"),
        (["{model}", "--quantization=int3"], "quantization is 'int3'"),
        (["{model}", "--repeats=0"], "--repeats is 0"),
        (["{model}", "--guidance=loud"], "guidance is 'loud'"),
        (["{model}", "--guidance-interval=0.9:0.1"], "must rise"),
        (["{model}", "--ablation", "--guidance-interval=0:0.5"], "leave out --ablation"),
        (["{model}", "--out={tmp}/speed.txt"], "must end in .json"),
        (["{model}", "--out={tmp}"], "a folder"),
        (["{model}", "--out={tmp}/taken.json"], "is a folder; choose another --out"),
        (["{model}", "--out={model}/model.json/x.json"], "cannot write"),
        (["{model}", "--turbo"], "--turbo"),
    ],
)
def test_bad_input_is_one_clear_line_before_anything_starts(
    model, tmp_path, monkeypatch, capsys, arguments, message
):
    for late in ("load", "nothing"):
        monkeypatch.setattr(Subject, late, lambda *_: pytest.fail("began"), raising=False)
    monkeypatch.setattr(cold_start, "measure", lambda *_: pytest.fail("began"))
    (tmp_path / "taken.png").mkdir()
    given = [text.format(model=model, tmp=tmp_path) for text in arguments]
    assert run(package_main, "benchmark", *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert [file.name for file in tmp_path.iterdir()] == ["taken.png"]


def test_what_fails_leaves_nothing_half_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "measure", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        package_main(["x", "benchmark", model, f"--out={tmp_path / 'speed.json'}", *ALONE])
    assert list(tmp_path.iterdir()) == []


def test_the_picture_has_a_bar_for_each_row_and_a_colour_for_each_part():
    figure = benchmark_plot.draw(report())
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "H8, batch 1",
        "H1P5R3, batch 1",
        "H8, batch 8",
        "H1P5R3, batch 8",
    ]
    assert len(set(benchmark_plot.COLOURS.values())) == len(PARTS)
    longest = max(bar.get_x() + bar.get_width() for bar in axes.patches)
    assert (
        longest == 6 * 1.5 + 0.75
    )  # a negative rest is not drawn; the line is at what was measured
    (line,) = axes.collections
    ends = [segment[0][0] for segment in line.get_segments()]
    assert ends == [row["ms_per_image"] for row in report()["rows"]]


def test_the_picture_s_words_do_not_overlap():
    schedules = ("H8", "H1P5R3", "(H1P1R1)x3@0.35")
    found = report(batch_sizes=(1, 2, 8, 64), schedules=schedules)
    found["model"] = "experiments/" * 20 + "sit-xl-2-256"
    found["card"] = {"dtype": "bfloat16", "device": "NVIDIA GeForce RTX 4090 Laptop GPU"}
    figure = benchmark_plot.draw(found)
    with plots.style():
        FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    texts = [child for child in axes.get_children() if isinstance(child, Text)]
    texts += [*figure.texts, *axes.get_yticklabels(), axes.xaxis.label]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert len(boxes) == 12 + 12 + 2  # of bars their names and numbers, a title, a label
    boxes += [legend.get_window_extent() for legend in figure.legends]
    inside = figure.bbox
    for i, box in enumerate(boxes):
        assert inside.x0 <= box.x0 < box.x1 <= inside.x1
        assert inside.y0 <= box.y0 < box.y1 <= inside.y1
        assert not [other for other in boxes[:i] if box.overlaps(other)]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.00512, "0.0051"),
        (0.0123, "0.0123"),
        (0.123, "0.123"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (123.4, "123"),
        (12345.6, "12,346"),
        (-0.5, "-0.500"),
        (-12.34, "-12.3"),
    ],
)
def test_numbers_have_three_digits_that_count(number, text):
    assert benchmark_tables.short(number) == text

"""tune as users run it: what it writes, what it puts into a model, and how it refuses."""

import json
import shutil

import numpy as np
import pytest
import tiny
from PIL import Image
from test_commands import run

import flowturbo_jax as ft
import sample as sample_script
from flowturbo_jax import model_directory
from flowturbo_jax.__main__ import main as package_main
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_description import Preset
from flowturbo_jax.pipelines import tuning

QUICK = (
    "--max-evaluations=3",
    "--max-refiner-steps=1",
    "--noises=8",
    "--batch-size=8",
    "--latency-batch=2",
    "--finalists=2",
    "--modes=paired",
    "--rules=R",
    "--shifts=0.5",
    "--intervals=",
    "--one-order",
    "--spacings=cosine",
    "--adams=A2",
    "--baselines=H2",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def tuned(model, tmp_path_factory):
    """A folder of results, and the model the schedules were put into."""
    out = tmp_path_factory.mktemp("tuned")
    copy = out / "model"
    shutil.copytree(model, copy)
    assert run(package_main, "tune", str(copy), f"--out={out / 'found'}", "--write", *QUICK) == 0
    return out / "found", copy


def test_tune_writes_what_it_found_and_a_picture(tuned):
    out, _ = tuned
    report = json.loads((out / "tune.json").read_text())
    assert set(report["recommended"]) == {"fast", "balanced", "best"}
    assert "H2" in [row["schedule"] for row in report["finalists"]]
    for row in report["finalists"]:
        assert row["ms_per_image"] > 0
        assert 0 < row["error"] < 10
    card = report["card"]
    assert {"predictor_sha256", "device", "versions", "dtype", "seed", "samples"} <= card.keys()
    assert "schedule" not in card
    with Image.open(out / "tune.png") as picture:
        assert min(picture.size) > 300
    assert (out / "tune.svg").read_text().startswith("<?xml")


def test_what_was_found_is_sampled_by_its_name(tuned, capsys):
    out, model = tuned
    found = json.loads((out / "tune.json").read_text())["recommended"]
    pipe = ft.ClassToImage.load(model)
    for name, row in found.items():
        plan = pipe.plan(name)
        assert str(plan.schedule) == row["schedule"]
        assert plan.guidance == row["guidance"]
        by_name = np.asarray(pipe([1, 2], schedule=name))
        spelled = np.asarray(pipe([1, 2], schedule=row["schedule"], guidance=row["guidance"]))
        np.testing.assert_array_equal(by_name, spelled)
    arguments = [f"--config.model_dir={model}", f"--config.out={out}", "--config.schedule=fast"]
    arguments += ["--config.baseline=best", "--config.samples=4", "--config.data="]
    assert run(sample_script.main, *arguments) == 0
    assert found["fast"]["schedule"] in capsys.readouterr().out


def test_the_same_command_measures_nothing_twice(tuned, model, monkeypatch):
    out, _ = tuned
    monkeypatch.setattr(tuning.Tuner, "error", lambda *_: pytest.fail("measured again"))
    assert run(package_main, "tune", str(model), f"--out={out}", *QUICK) == 0


def test_without_write_the_model_stays_as_it_is(model):
    assert ft.ClassToImage.load(model).model.description.schedules == {}
    with pytest.raises(InputError, match=r"no schedule 'best' yet: find it with .* tune"):
        ft.ClassToImage.load(model).plan("best")


def test_a_metric_ranks_finalists_and_its_correlation_is_reported(model, tmp_path, capsys):
    arguments = ["tune", str(model), f"--out={tmp_path}", *QUICK, "--metric=frechet_distance"]
    # Three that are always measured: how many the search finds depends on the clock.
    assert run(package_main, *arguments, "--baselines=H1,H2,H3", "--samples=40") == 0
    report = json.loads((tmp_path / "tune.json").read_text())
    metrics = [row["frechet_distance"] for row in report["finalists"]]
    best = report["recommended"]["best"]["frechet_distance"]
    assert best == min(metrics)
    assert not list(tmp_path.glob("scores/*/*.rows"))
    assert len(set(metrics)) > 1
    assert -1 <= report["rank_correlation"] <= 1
    assert "rank correlation of error and frechet_distance" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-evaluations=1"], "max_evaluations is 1"),
        (["--shifts=a"], "--shifts is 'a'"),
        (["--intervals=0.9:0.1"], "guidance_interval is (0.9, 0.1)"),
        (["--modes=loud"], "guidance modes"),
        (["--rules=X"], "refiner rules"),
        (["--spacings=wide"], "spacings are to be"),
        (["--adams=A7"], "adams is to be"),
        (["--metric=beauty"], "--metric is 'beauty'"),
        (["--noises=2"], "at least 8 noises"),
        (["--baselines=Q3"], "unknown block 'Q'"),
        (["--finalists=1"], "at least 2"),
        (["--dtype=int4"], "dtype is 'int4'"),
        (["--seed=-1"], "seed is -1"),
        (["--modes=none,paired"], "search them apart"),
        (["--samples=40"], "mean nothing without --metric"),
        (["--reference=digits"], "mean nothing without --metric"),
    ],
)
def test_bad_input_is_one_clear_line(model, tmp_path, capsys, arguments, message):
    given = ["tune", str(model), f"--out={tmp_path / 'x'}", *QUICK, *arguments]
    assert run(package_main, *given) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line


def test_a_place_that_cannot_be_written_is_one_clear_line(model, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert run(package_main, "tune", str(model), f"--out={tmp_path / 'file' / 'x'}", *QUICK) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "X1", "guidance": "none"}, "unknown block"),
        ({"schedule": "H1", "guidance": "loud"}, "guidance is 'loud'"),
        ({"schedule": "H1", "guidance": "none", "guidance_interval": (0, 0.5)}, "leave one out"),
        ({"schedule": "H1", "guidance": "paired", "guidance_interval": (0.5, 0.1)}, "must rise"),
    ],
)
def test_a_preset_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Preset(**fields)


def test_presets_a_model_cannot_do_are_refused(tmp_path):
    with pytest.raises(InputError, match="refines, but there is no refiner"):
        tiny.description(refiner=False).__class__(
            **{
                **vars(tiny.description(refiner=False)),
                "schedules": {"fast": Preset("H1R1", "none")},
            }
        )
    with pytest.raises(InputError, match="schedules has 'quick'"):
        tiny.description().__class__(
            **{**vars(tiny.description()), "schedules": {"quick": Preset("H1", "none")}}
        )


def test_a_preset_says_how_to_guide_unless_another_mode_is_asked_for(model, tmp_path):
    copy = tmp_path / "m"
    shutil.copytree(model, copy)
    presets = {"fast": Preset("H1P1", "official", (0.0, 0.5)), "best": Preset("H2", "paired")}
    model_directory.write_schedules(copy, presets)
    pipe = ft.ClassToImage.load(copy)
    assert pipe.plan("fast")[1:4] == ("official", 1.5, (0.0, 0.5))
    assert pipe.plan("fast", guidance="official") == pipe.plan("fast")
    assert pipe.plan("fast", guidance="paired")[1:4] == ("paired", 1.5, None)
    assert pipe.plan("fast", guidance_interval="0.2:0.4").interval == (0.2, 0.4)
    assert pipe.plan("fast", 3.0).scale == 3.0
    assert pipe.plan("best").interval is None
    cut = np.asarray(pipe([1, 2], schedule="fast", guidance_scale=9.0), np.int32)
    whole = np.asarray(pipe([1, 2], schedule="H1P1", guidance="official", guidance_scale=9.0))
    assert np.abs(cut - whole).max() > 0


def test_scores_of_which_more_is_better_rank_the_other_way(model, tmp_path):
    arguments = ["tune", str(model), f"--out={tmp_path}", *QUICK, "--metric=precision"]
    assert run(package_main, *arguments, "--samples=40") == 0
    report = json.loads((tmp_path / "tune.json").read_text())
    best = report["recommended"]["best"]["precision"]
    assert best == max(row["precision"] for row in report["finalists"])

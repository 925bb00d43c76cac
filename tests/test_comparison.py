"""Results side by side: only what was measured alike, and what the table says of it."""

import copy
import json

import numpy as np
import pytest
from test_commands import run

from flowturbo_jax import ClassToImage
from flowturbo_jax.__main__ import main as package_main
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import comparison, evaluation, judging

VERSIONS = {"jax": "0.0.1"}


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """All that a card can have, but for an autoencoder."""
    work = tmp_path_factory.mktemp("comparison")
    pipe = ClassToImage.load("digits")
    plan = pipe.plan("H1P1R1", guidance_interval=(0.1, 0.8))
    with judging.opened("digits", None, (8, 8, 1), work / "reference") as judges:
        found = evaluation.protocol_card(
            pipe, plan, seed=0, samples=20, batch_size=10, judges=judges
        )
    return found | {"vae_sha256": "f00d"}


def row(card, distance=1.0, **changed):
    return {"card": card | changed, "results": {"frechet_distance": distance}}


def written(path, rows):
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.fixture
def files(card, tmp_path):
    """Writes two files, the second changed, and compares them."""

    def compare(*more, **changed):
        other = {key: value for key, value in (card | changed).items() if value is not ...}
        a = written(tmp_path / "a.json", [row(card)])
        b = written(tmp_path / "b.json", [row(other, 2.0)])
        return run(package_main, "evaluate", "--compare", a, b, *more)

    return compare


KEYS = (
    "dtype",
    "feature_network",
    "feature_network_sha256",
    "guidance",
    "guidance_interval",
    "guidance_scale",
    "guided_channels",
    "inception_score_split",
    "label_classifier_held_out_accuracy",
    "label_classifier_sha256",
    "label_sampling",
    "precision_recall",
    "predictor_sha256",
    "reference",
    "reference_network_sha256",
    "reference_samples",
    "reference_sha256",
    "refiner_sha256",
    "samples",
    "vae_sha256",
)


def test_every_key_of_a_card_is_free_or_tested_here(card):
    assert card.keys() == {*KEYS} | comparison.FREE


def another(value):
    """A value of the same kind."""
    if isinstance(value, str):
        return value[::-1] + "x"
    if isinstance(value, list):
        return [end / 2 for end in value]
    if isinstance(value, dict):
        return {**value, "more": 1}
    return 7 if value is None else value + 1


@pytest.mark.parametrize("key", KEYS)
def test_what_matters_must_be_equal_or_allowed(files, card, capsys, key):
    assert files(**{key: another(card[key])}) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: these were not measured alike: {key} is " in line
    assert "a.json and " in line
    assert line.count("; ") == 1  # nothing else
    assert files(f"--allow={key}", **{key: another(card[key])}) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize("key", sorted({*KEYS} - {"guidance", "guidance_scale", "guided_channels"}))
def test_what_matters_must_not_be_missing(files, capsys, key):
    assert files(**{key: ...}) == 2
    assert f"{key} is " in capsys.readouterr().err


def test_what_is_compared_and_what_says_nothing_may_differ(files, card, capsys):
    changed = {
        "schedule": "H8",
        "steps": 8,
        "predictor_evaluations": 16,
        "refiner_evaluations": 0,
        "seed": 5,
        "batch_size": 7,
        "device": "abacus",
        "devices": 100,
        "versions": VERSIONS,
        "warnings": ["few"],
    }
    assert changed.keys() == comparison.FREE
    assert files(**changed) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "| H8 | paired 1.5 in 0.1:0.8 | 16 | 0 | 7 | abacus | 100 |" in lines[3]
    assert lines[3].endswith("| 2.0000 |")


def test_all_differences_are_said_and_several_can_be_allowed(files, capsys):
    changed = {"samples": 5, "dtype": "bfloat16"}
    assert files(**changed) == 2
    error = capsys.readouterr().err
    assert "dtype is float32 in " in error
    assert "; samples is 20 in " in error
    assert files("--allow=samples", **changed) == 2
    assert "samples" not in capsys.readouterr().err.replace("--allow", "")
    assert files("--allow=samples, dtype", **changed) == 0
    heading, _, first, second = capsys.readouterr().out.splitlines()
    assert "| dtype | samples |" in heading
    assert "| float32 | 20 |" in first
    assert "| bfloat16 | 5 |" in second


def test_the_table_has_means_and_deviations_over_seeds(card):
    values = (1.0, 2.0, 4.0)
    rows = [row(card, value, seed=seed) for seed, value in enumerate(values)]
    rows += [row(card, 3.0, schedule="H8")]
    rows[0]["results"] |= {"ms_per_image": 3.0, "precision": 0.5}
    rows[1]["results"] |= {"ms_per_image": 9.0}
    heading, _, first, second = comparison.table(rows).splitlines()
    assert heading.endswith("| + refiner | Fréchet distance | precision | ms/image |")
    spread = f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
    assert first == f"| H1P1R1 | paired 1.5 in 0.1:0.8 | 3 | 2 | {spread} | 0.500 | 6.00 |"
    assert second == "| H8 | paired 1.5 in 0.1:0.8 | 3 | 2 | 3.0000 |  |  |"
    named = comparison.table(rows, ["a", "a", "b", "b"]).splitlines()
    assert [line.split(" | ")[0] for line in named[2:]] == ["| a", "| b", "| b"]


def test_no_cell_breaks_the_table_or_commands_the_terminal(files, capsys):
    assert files("--allow=reference", reference="a|b\x1b[2J\nc") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)
    assert r"a\|b\x1b" in lines[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.json", "a.json"], "--compare names a.json twice; give two files"),
        (["a.json", "./a.json"], "--compare names a.json twice"),
        (["a.json", "none.json"], "there is no file none.json; check the name"),
        (["none.json", "a.json"], "there is no file none.json; check the name"),
        (["a.json", "."], ". holds no results of evaluate"),
        (["a.json", "empty.json"], "empty.json holds no results yet"),
        (["a.json", "text.json"], "text.json holds no results of evaluate"),
        (["a.json", "deep.json"], "deep.json holds no results of evaluate"),
        (["a.json", "bare.json"], "bare.json holds no results of evaluate"),
        (["a.json", "words.json"], "words.json holds no results of evaluate"),
        (["a.json", "odd.json"], "odd.json holds no results of evaluate"),
        (["a.json"], "--compare: expected 2 arguments"),
        (["a.json", "b.json", "--allow=sample"], "--allow names 'sample', which no card has"),
        (["a.json", "b.json", "--samples=5"], "--samples means nothing to --compare"),
        (["a.json", "b.json", "--out=c.json"], "--out means nothing to --compare"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_line(
    card, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        written(tmp_path / f"{name}.json", [row(card)])
    contents = {
        "empty": "[]",
        "text": "Fréchet",
        "deep": "[" * 100_000,
        "bare": '[{"card": {}, "results": {}}]',
        "words": json.dumps([row(card, "small")]),
        "odd": json.dumps([row(card, guidance_interval=3)]),
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(content)
    assert run(package_main, "evaluate", "--compare", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "c.json").exists()


def test_results_of_sample_py_can_be_compared_and_are_not_continued(card, tmp_path):
    report = {"picture": "a.png", "schedules": [row(card)]}
    file = written(tmp_path / "digits.json", report)
    assert comparison.read_rows(file) == report["schedules"]
    with pytest.raises(InputError, match="holds no results of evaluate"):
        comparison.read_rows(file, own=True)
    assert comparison.read_rows(written(tmp_path / "new.json", []), own=True) == []
    more = [copy.deepcopy(row(card)) | {"note": "mine"}]
    assert comparison.read_rows(written(tmp_path / "note.json", more), own=True) == more

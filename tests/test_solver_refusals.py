"""Files of solvers that are wrong: each is refused in one line that says what is wrong."""

import pytest
from learnt_solvers import FIRST, drop, edited, put

from flowturbo_jax import solver_files
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.schedule import Schedule

NAN, INF = float("nan"), float("inf")
WRONG_FILES = {
    "sum": (
        put(*FIRST, "weights", 2, [0.5, 0.5, 0.5]),
        "the weights of step 3 sum to 1.5, not to 1",
    ),
    "sum of the second scale": (
        put("numbers", 1, "weights", 0, [0.99]),
        "at guidance scale 3.0 the weights of step 1 sum to 0.99",
    ),
    "times fall": (put(*FIRST, "times", [0, 0.6, 0.4, 1]), "do not rise from 0 to 1"),
    "times stand": (put(*FIRST, "times", [0, 0.5, 0.5, 1]), "do not rise from 0 to 1"),
    "times stand in float32": (put(*FIRST, "times", [0, 0.5, 0.50000001, 1]), "do not rise"),
    "start": (put(*FIRST, "times", 0, 0.01), "do not rise from 0 to 1"),
    "end": (put(*FIRST, "times", 3, 0.99), "do not rise from 0 to 1"),
    "few times": (
        put(*FIRST, "times", [0, 0.5, 1]),
        "has 3 times and 3 rows of weights; .* needs 4",
    ),
    "many times": (put(*FIRST, "times", [0, 0.2, 0.5, 0.7, 1]), "has 5 times"),
    "few rows": (drop(*FIRST, "weights", 2), "4 times and 2 rows of weights"),
    "many rows": (put(*FIRST, "weights", [[1]] * 4), "4 times and 4 rows"),
    "long row": (put(*FIRST, "weights", 1, [0, 0, 1]), "step 2 of S3 needs 2 weights"),
    "short row": (put(*FIRST, "weights", 2, [0, 1]), "step 3 of S3 needs 3 weights"),
    "empty row": (put(*FIRST, "weights", 0, []), "step 1 of S3 needs 1 weights"),
    "no row": (put(*FIRST, "weights", 0, None), "step 1 of S3 needs 1 weights, not None"),
    "number for a row": (put(*FIRST, "weights", 0, 1), "not iterable"),
    "NaN weight": (put(*FIRST, "weights", 2, [NAN, 0, 1]), "not all .* are finite numbers"),
    "infinite weight": (put(*FIRST, "weights", 2, [INF, -INF, 1]), "not all .* are finite"),
    "NaN time": (put(*FIRST, "times", 1, NAN), "not all .* are finite"),
    "infinite scale": (put(*FIRST, "guidance_scale", INF), "not all .* are finite"),
    "bool weight": (put(*FIRST, "weights", 0, [True]), "not all .* are finite"),
    "bool time": (put(*FIRST, "times", 0, False), "not all .* are finite"),
    "text weight": (put(*FIRST, "weights", 0, ["1"]), "not all .* are finite"),
    "text row": (put(*FIRST, "weights", 0, "1"), "not all .* are finite"),
    "text scale": (put("numbers", [{}]), "need the keys guidance_scale, times, weights, results"),
    "huge weights": (put(*FIRST, "weights", 2, [1e39, -1e39, 1]), "not all .* below 1e6"),
    "huge integer": (put(*FIRST, "guidance_scale", 10**400), "not all .* below 1e6"),
    "scales fall": (
        put(*FIRST, "guidance_scale", 5),
        "scales are .*; one or more are needed, rising",
    ),
    "scales twice": (put(*FIRST, "guidance_scale", 3.0), "scales are .*rising"),
    "no numbers": (put("numbers", []), "one or more are needed"),
    "numbers are null": (put("numbers", None), "not iterable"),
    "numbers is text": (put("numbers", "S3"), "need the keys"),
    "numbers miss a key": (drop(*FIRST, "weights"), "need the keys guidance_scale, times"),
    "numbers with more": (put(*FIRST, "grid", 1), "need the keys guidance_scale, times"),
    "results": (put(*FIRST, "results", 3), "results must be a JSON object"),
    "card": (put("card", [1]), "card must be a JSON object"),
    "missing": (drop("guidance"), r"wrong keys: missing \['guidance'\], unknown \[\]"),
    "unknown": (put("grid", "fine"), r"wrong keys: missing \[\], unknown \['grid'\]"),
    "format": (put("format", 2), "not of format 1"),
    "no format": (drop("format"), "not of format 1"),
    "mode": (put("guidance", "strong"), "guidance is 'strong'; it must be one of"),
    "mode is a list": (put("guidance", []), "guidance is"),
    "interval": (put("guidance_interval", [0.5, 0.2]), "must rise within"),
    "interval of one": (put("guidance_interval", [0.5]), "two flow times"),
    "schedule": (put("schedule", "Q3"), "unknown block 'Q'"),
    "schedule is a number": (put("schedule", 3), "schedule is 3, not text"),
    "plain schedule": (put("schedule", "H3"), "schedule H3 is not learnt"),
    "longer schedule": (put("schedule", "S4"), "needs 5 and 4"),
    "refining schedule": (put("schedule", "S2R1"), "refiner_sha256 is None; it must be the text"),
    "no fingerprint": (put("predictor_sha256", None), "predictor_sha256 is None; it must be"),
    "number for a fingerprint": (put("predictor_sha256", 7), "predictor_sha256 is 7; it must be"),
}


@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_a_file_edited_wrongly_is_refused_in_a_line(tmp_path, as_users_run_it, wrong):
    change, message = WRONG_FILES[wrong]
    file = tmp_path / "solvers" / "S3.json"
    file.parent.mkdir()
    file.write_text(edited(lambda fields: None))
    solver_files.of_model(tmp_path, Schedule.parse("S3"))  # as it was, it is good
    file.write_text(edited(change))
    with pytest.raises(InputError, match=message) as error:
        solver_files.of_model(tmp_path, Schedule.parse("S3"))
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is not JSON"),
        (b"{", "it is not JSON"),
        (b"S3", "it is not JSON"),
        (b"[1, 2]", "must hold a JSON object"),
        (b"null", "must hold a JSON object"),
        (b'[["format", 1]]', "must hold a JSON object"),
        (b"\x93NUMPY\x01\x00\xff\xfe", "it is no text"),
        (b"[" * 100_000, "it is not JSON"),
        (b'{"format": ' + b"1" * 5000 + b"}", "it is not JSON"),
        (b'{"format": 1}', "wrong keys: missing"),
    ],
    ids=["empty", "cut", "word", "list", "null", "pairs", "binary", "deep", "digits", "bare"],
)
def test_what_is_no_such_file_is_refused_in_a_line(tmp_path, as_users_run_it, content, message):
    file = tmp_path / "solvers" / "S3.json"
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        solver_files.of_model(tmp_path, Schedule.parse("S3"))
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)

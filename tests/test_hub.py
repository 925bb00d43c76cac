"""Downloads by `hf://` reference, from a small server on this machine that speaks like the hub."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest

from flowturbo_jax.hub import (
    DIFFUSERS_FILES,
    TRANSFORMERS_FILES,
    check_sha256,
    fetch,
    fetch_folder,
)
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines.text_conversion import TOKENIZER_FILES

NOWHERE = "http://127.0.0.1:9"  # nothing listens there
OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"
SAFE, SAFE_INDEX, PICKLE, _, HALF = DIFFUSERS_FILES[1]
SHARDS = ("weights-1-of-2.safetensors", "weights-2-of-2.safetensors")
WEIGHT_MAP = {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]}
INDEX_JSON = json.dumps({"metadata": {}, "weight_map": WEIGHT_MAP})

REPOSITORIES = {  # repository -> commit -> file -> content
    "some/vae": {NEW: {"config.json": "{}", SAFE: "safe", PICKLE: "pickle", "huge.bin": "huge"}},
    "some/old-vae": {NEW: {"config.json": "{}", PICKLE: "pickle"}},
    "some/large-vae": {
        NEW: {"vae/config.json": "{}", f"vae/{SAFE_INDEX}": INDEX_JSON}
        | {f"vae/{shard}": shard for shard in SHARDS}
    },
    "some/lost-shard": {NEW: {"config.json": "{}", SAFE_INDEX: INDEX_JSON, SHARDS[0]: ""}},
    "some/odd-index": {NEW: {"config.json": "{}", SAFE_INDEX: "[]"}},
    "some/far-index": {
        NEW: {"config.json": "{}", SAFE_INDEX: '{"weight_map": {"a": "../../secret"}}'}
    },
    "some/half-vae": {NEW: {"config.json": "{}", HALF: "half"}},
    "some/half-clip": {NEW: {"config.json": "{}", "model.fp16.safetensors": "half"}},
    "some/large-clip": {
        NEW: {"config.json": "{}", "model.safetensors.index.json": INDEX_JSON}
        | {shard: shard for shard in SHARDS}
    },
    "some/fast-tokenizer": {NEW: {"tokenizer_config.json": "{}", "tokenizer.json": "{}"}},
    "some/slow-tokenizer": {
        NEW: {"tokenizer_config.json": "{}", "vocab.json": "{}", "merges.txt": ""}
        | {"special_tokens_map.json": "{}"}
    },
    "some/no-merges": {NEW: {"tokenizer_config.json": "{}", "vocab.json": "{}"}},
    "some/weightless": {NEW: {"config.json": "{}"}},
    "some/moving": {
        OLD: {"config.json": "old", SAFE: "old"},
        NEW: {"config.json": "new", SAFE: "new"},
    },
}
REVISIONS = {"main": NEW, "v1": OLD, "refs/pr/1": OLD, OLD: OLD, NEW: NEW}


class Hub(NamedTuple):
    """The server, and a log of what it was asked for: (method, repository, revision, file)."""

    endpoint: str
    requests: list[tuple[str, ...]]
    revisions: dict[str, str]


@pytest.fixture(scope="module", autouse=True)
def nothing_of_the_user(tmp_path_factory):
    """The settings huggingface_hub reads when it is first imported, which is in this module."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
            patch.delenv(name)
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            patch.delenv(name)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf_home")))
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        import huggingface_hub

        yield
        huggingface_hub.close_session()


@pytest.fixture
def hub():
    requests, revisions = [], dict(REVISIONS)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def answer(self):
            owner, name, resolve, revision, file = self.path.lstrip("/").split("/", 4)
            repository, revision = f"{owner}/{name}", unquote(revision)
            requests.append((self.command, repository, revision, file))
            assert resolve == "resolve"
            if repository == "some/gated":
                return self.refuse(403, "GatedRepo")
            if repository == "some/broken":
                return self.refuse(500, "")
            if repository not in REPOSITORIES:
                return self.refuse(404, "RepoNotFound")
            commit = revisions.get(revision)
            if commit not in REPOSITORIES[repository]:
                return self.refuse(404, "RevisionNotFound")
            if file not in REPOSITORIES[repository][commit]:
                return self.refuse(404, "EntryNotFound", commit)
            content = REPOSITORIES[repository][commit][file].encode()
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)
                revisions["main"] = NEW  # someone pushes a commit

        def refuse(self, status, code, commit=""):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            if commit:
                self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", "0")
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Hub(f"http://127.0.0.1:{server.server_port}", requests, revisions)
        server.shutdown()
        thread.join()


@pytest.fixture
def options(hub, tmp_path):
    return {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}


@pytest.mark.parametrize("path", ["weights.pt", "/no/such/place", "hf/owner/name", "C:\\x", ""])
def test_a_local_path_is_returned_as_it_is(path):
    assert fetch(path) == fetch_folder(path) == Path(path)
    assert fetch(Path(path)) == Path(path)


def test_a_file_is_downloaded_once(hub, options):
    path = fetch("hf://some/vae/huge.bin", **options)
    assert path.read_text() == "huge"
    assert path.name == "huge.bin"
    assert path.is_relative_to(options["cache_dir"])
    assert fetch("hf://some/vae/huge.bin", **options) == path
    assert [request[0] for request in hub.requests] == ["HEAD", "GET", "HEAD"]


def test_a_revision_is_a_branch_a_tag_or_a_commit(options):
    for revision in ("v1", OLD, "refs%2Fpr%2F1"):
        assert fetch(f"hf://some/moving@{revision}/config.json", **options).read_text() == "old"
    assert fetch("hf://some/moving/config.json", **options).read_text() == "new"


def test_a_folder_has_its_config_and_the_first_weights_that_exist(hub, options):
    folder = fetch_folder("hf://some/vae", **options)
    assert {path.name for path in folder.iterdir()} == {"config.json", SAFE}
    assert "huge.bin" not in {request[-1] for request in hub.requests}
    folder = fetch_folder("hf://some/old-vae/", **options)
    assert {path.name for path in folder.iterdir()} == {"config.json", PICKLE}


@pytest.mark.parametrize(
    ("repository", "names"),
    [
        ("half-vae", DIFFUSERS_FILES),
        ("half-clip", TRANSFORMERS_FILES),
        ("large-clip", TRANSFORMERS_FILES),
        ("fast-tokenizer", TOKENIZER_FILES),
        ("slow-tokenizer", TOKENIZER_FILES),
    ],
)
def test_a_part_of_a_pipeline_is_had_in_every_form_that_can_be_read(options, repository, names):
    folder = fetch_folder(f"hf://some/{repository}", names, **options)
    assert {path.name for path in folder.iterdir()} == set(REPOSITORIES[f"some/{repository}"][NEW])


def test_a_vocabulary_without_its_merges_is_refused(options):
    with pytest.raises(InputError, match=r"some/no-merges@.* has no file merges\.txt"):
        fetch_folder("hf://some/no-merges", TOKENIZER_FILES, **options)


def test_a_folder_inside_a_repository_has_the_shards_of_its_weights(options):
    folder = fetch_folder("hf://some/large-vae/vae", **options)
    assert {path.name for path in folder.iterdir()} == {"config.json", SAFE_INDEX, *SHARDS}
    assert all((folder / shard).read_text() == shard for shard in SHARDS)


def test_the_files_of_a_folder_are_of_one_commit_even_while_it_moves(hub, options):
    hub.revisions["main"] = OLD
    folder = fetch_folder("hf://some/moving", **options)
    assert hub.revisions["main"] == NEW
    assert [(folder / name).read_text() for name in ("config.json", SAFE)] == ["old", "old"]
    assert {request[2] for request in hub.requests} == {"main", OLD}


def test_other_names_can_be_wanted(options):
    folder = fetch_folder("hf://some/vae", ["huge.bin", ["none", PICKLE]], **options)
    assert {path.name for path in folder.iterdir()} == {"huge.bin", PICKLE}


def test_what_is_in_the_cache_needs_no_hub(hub, options):
    online = fetch_folder("hf://some/old-vae", **options)
    assert fetch_folder("hf://some/old-vae", **{**options, "endpoint": NOWHERE}) == online


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("hf://some/vae/none.bin", "hf://some/vae has no file none.bin; look"),
        ("hf://nobody/nothing/a.bin", "there is no model nobody/nothing, or it is private"),
        ("hf://some/gated/a.bin", "some/gated is open to those only who .* hf auth login"),
        ("hf://some/vae@v9/config.json", "@v9/config.json: some/vae has no such revision"),
        ("hf://some--odd/name./a.bin", "HFValidationError"),
    ],
)
def test_a_file_that_cannot_be_had_is_refused_in_one_line(options, reference, message):
    with pytest.raises(InputError, match=message) as error:
        fetch(reference, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("hf://some/weightless", f"hf://some/weightless@{NEW} has no file {SAFE} or .* or "),
        ("hf://some/vae/none", "hf://some/vae has no file none/config.json"),
        ("hf://some/lost-shard", f"has no file {SHARDS[1]}"),
        ("hf://some/odd-index", f"{SAFE_INDEX} must hold a JSON object"),
        ("hf://some/far-index", "names '../../secret' as a shard; wanted is a file name"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused_in_one_line(options, reference, message):
    with pytest.raises(InputError, match=message) as error:
        fetch_folder(reference, **options)
    assert "\n" not in str(error.value)


def test_without_a_hub_the_refusal_says_so(options, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub tries several times
    message = r"not in the cache and the hub cannot be reached \(ConnectError: .*\); check the"
    with pytest.raises(InputError, match=message) as error:
        fetch("hf://some/vae/a.bin", **{**options, "endpoint": NOWHERE})
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"cannot be reached \(HfHubHTTPError: .*500") as error:
        fetch_folder("hf://some/broken", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "reference",
    [
        "hf://",
        "hf://vae",
        "hf://some/",
        "hf://some/vae@/a.bin",
        "hf://some/vae//a.bin",
        "hf://some/vae/../a.bin",
        "hf://some/vae/a\\b.bin",
        "hf://datasets/some/images/a.bin",
        "HF://some/vae/a.bin",
        "https://somewhere/a.bin",
    ],
)
def test_a_malformed_reference_is_refused_before_any_download(reference):
    for function in (fetch, fetch_folder):
        with pytest.raises(InputError, match="write hf://owner/name/path/to/file or "):
            function(reference)


def test_a_reference_to_a_file_names_one():
    with pytest.raises(InputError, match="hf://some/vae names no file; write hf://"):
        fetch("hf://some/vae")


def test_without_huggingface_hub_the_refusal_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        fetch("hf://some/vae/a.bin")
    assert fetch("a.bin") == Path("a.bin")


def test_huggingface_hub_is_not_imported_before_it_is_needed():
    code = "import sys, flowturbo_jax.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_sha256_is_compared_with_the_whole_file(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"abc" * 100_000)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    check_sha256(path, digest)
    check_sha256(str(path), f" {digest.upper()}\n")
    path.write_bytes(b"abc" * 99_999 + b"abd")
    with pytest.raises(
        InputError, match=f"has sha256 [0-9a-f]{{64}}, expected {digest}: "
    ) as error:
        check_sha256(path, digest)
    assert hashlib.sha256(path.read_bytes()).hexdigest() in str(error.value)


def test_sha256_of_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nothing: No such file"):
        check_sha256(tmp_path / "nothing", "0" * 64)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is no regular file"):
        check_sha256(tmp_path / "pipe", "0" * 64)

"""python -m flowturbo_jax convert --pipeline: what it writes and prints, and how it refuses."""

import json
import re
import shlex
import shutil
from pathlib import Path

import golden
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sample as sample_script
from flowturbo_jax import hub, model_directory
from flowturbo_jax.__main__ import main as package_main
from flowturbo_jax.clip_architecture import clip_config
from flowturbo_jax.commands import entry
from flowturbo_jax.convert import official_shapes
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import text_conversion, velocity_check
from flowturbo_jax.unet_architecture import unet_config
from flowturbo_jax.weights import open_folder

PIPELINE = golden.FOLDER / "instaflow" / "pipeline"
REFINER = golden.FOLDER / "unet" / "unet_8ch"
ROOT = Path(__file__).parents[1]
SCHEDULER = Path("scheduler", "scheduler_config.json")


def run(main, *arguments: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as stop:
        entry.run(main, ["command", *arguments])
    return stop.value.code


@pytest.fixture
def pipeline(tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(PIPELINE, tmp_path / "pipeline"))


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(file: Path, change) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file)


def another_text_encoder(folder: Path, **changes) -> None:
    """Puts one of other hyper-parameters in place, whole and with a config of its own."""
    edit_json(folder / "config.json", **changes)
    config = clip_config(json.loads((folder / "config.json").read_text()))
    shapes = official_shapes("clip", config)
    state = {name: np.full(shape, 0.1, np.float32) for name, shape in shapes.items()}
    save_file(state, folder / "model.safetensors")


def test_a_converted_pipeline_makes_a_picture_as_the_command_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [f"--pipeline={PIPELINE}", f"--refiner={REFINER}", "--out=model"]
    assert run(package_main, "convert", *given, "--skip-direction-check") == 0
    printed = capsys.readouterr().out
    for network in ("predictor", "refiner", "vae decode", "text encoder"):
        assert re.search(rf"^{network}.* +\d+\.\d\d [kM] +\d+\.\d\d [MG]MAC", printed, re.M)
    (hint,) = re.findall(r"sample it with python sample.py (.*)", printed)
    hint = hint.replace("configs/", f"{ROOT}/configs/").replace("...", "a photo of a cat")
    assert run(sample_script.main, *shlex.split(hint), "--config.schedule=E1") == 0
    assert Path("outputs/rectified_flow_t2i_0.png").is_file()


def test_a_networks_folder_is_exported_as_it_was(tmp_path, capsys):
    given = [f"--pipeline={PIPELINE}", f"--refiner={REFINER}", "--skip-direction-check"]
    assert run(package_main, "convert", *given, f"--out={tmp_path / 'model'}") == 0
    export = ["convert", f"--export={tmp_path / 'model'}", "--network=refiner"]
    folder = tmp_path / "new" / "refiner"
    assert run(package_main, *export, f"--out={folder}") == 0
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        file.name for file in REFINER.iterdir() if file.suffix in (".json", ".safetensors")
    )
    name = "diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(folder / name), load_file(REFINER / name)
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        np.testing.assert_array_equal(ours[key], array, err_msg=key)
    described = model_directory.describe(tmp_path / "model").refiner
    assert unet_config(open_folder(folder)[0], refiner=True) == described

    capsys.readouterr()
    assert run(package_main, *export, f"--out={folder}") == 2
    assert "--force" in capsys.readouterr().err
    (folder / "mine.txt").write_text("mine")
    assert run(package_main, *export, f"--out={folder}", "--force") == 2
    assert "other files" in capsys.readouterr().err
    (folder / "mine.txt").unlink()
    (folder / name).write_bytes(b"")
    assert run(package_main, *export, f"--out={folder}", "--force") == 0
    assert load_file(folder / name).keys() == theirs.keys()

    link, taken = folder.parent / "link", folder.parent / "taken"
    link.symlink_to(folder)
    (folder / name).write_bytes(b"")
    assert run(package_main, *export, f"--out={link}", "--force") == 0
    assert link.is_symlink()
    assert load_file(folder / name).keys() == theirs.keys()
    taken.write_text("mine")
    for out, message in ((taken, "is a file"), (folder.parent / "a.ckpt", "its folder in nothing")):
        capsys.readouterr()
        assert run(package_main, *export, f"--out={out}", "--force") == 2
        assert message in capsys.readouterr().err
    assert taken.read_text() == "mine"
    assert sorted(file.name for file in folder.parent.iterdir()) == ["link", "refiner", "taken"]


def test_weights_that_predict_noise_are_refused(tmp_path, monkeypatch, capsys):
    """Stable Diffusion's own have the names and shapes of a rectified flow's."""
    asked = []

    def cosine(params, states, *, module, config):
        asked.append((states.shape, config.shape))
        return 0.9

    monkeypatch.setattr(velocity_check, "noise_cosine", cosine)
    given = [f"--pipeline={PIPELINE}", f"--out={tmp_path / 'model'}"]
    assert run(package_main, "convert", *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "points toward the noise (cosine 0.90)" in line
    assert asked == [((1, 77, 32), (8, 8, 4))]
    assert not (tmp_path / "model").exists()


def unlink(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: unlink(p), "there is no folder at .*; give that of a diffusers pipeline"),
        (lambda p: unlink(p / "model_index.json"), "has no model_index.json; give the folder of a"),
        (lambda p: unlink(p / "tokenizer"), "has no folder tokenizer; get the whole pipeline"),
        (
            lambda p: [unlink(p / "tokenizer" / n) for n in ("vocab.json", "tokenizer.json")],
            "tokenizer: .*has no .*vocab.json",
        ),
        (
            lambda p: [unlink(p / "tokenizer" / n) for n in ("merges.txt", "tokenizer.json")],
            "tokenizer: .*has no .*merges.txt",
        ),
        (
            lambda p: another_text_encoder(p / "text_encoder", hidden_size=64),
            "text encoder gives states of width 64, .* 32",
        ),
        (
            lambda p: another_text_encoder(p / "text_encoder", vocab_size=700, eos_token_id=699),
            "tokenizer: .*714 ids, but the text encoder has embeddings of 700",
        ),
        (
            lambda p: edit_json(p / "model_index.json", text_encoder_2=["transformers", "X"]),
            "has a second text encoder; supported are SD 1.x and 2.x",
        ),
        (
            lambda p: edit_json(p / "model_index.json", unet=["diffusers", "SD3Transformer2D"]),
            "the pipeline's unet is 'SD3Transformer2D'; supported is UNet2DConditionModel",
        ),
        (
            lambda p: edit_json(p / "model_index.json", tokenizer=["transformers", "T5Tokenizer"]),
            "tokenizer is 'T5Tokenizer'; supported is CLIPTokenizer or",
        ),
        (
            lambda p: edit_json(p / "unet/config.json", class_embed_type="timestep"),
            "predictor: .*class_embed_type",
        ),
        (
            lambda p: edit_tensors(
                p / "unet/diffusion_pytorch_model.safetensors", lambda s: s.pop("conv_in.bias")
            ),
            "predictor: .*conv_in.bias",
        ),
        (
            lambda p: edit_tensors(
                p / "text_encoder/model.safetensors",
                lambda s: s.update(more=np.zeros(3, np.float32)),
            ),
            "text_encoder: .*more",
        ),
        (
            lambda p: edit_tensors(
                p / "unet/diffusion_pytorch_model.safetensors",
                lambda s: s["conv_in.bias"].__setitem__(0, np.nan),
            ),
            "predictor: .*conv_in.bias.* not finite",
        ),
        (
            lambda p: edit_json(p / SCHEDULER, prediction_type="v_prediction"),
            "is a diffusion model: .* says v_prediction, and that v is not the velocity of a rect",
        ),
        (
            lambda p: (p / SCHEDULER).write_text('{"prediction_type": "v_pred'),
            "scheduler: cannot read .*scheduler_config.json as JSON",
        ),
        (lambda p: (p / SCHEDULER).write_text("[]"), "scheduler: .* must hold a JSON object"),
    ],
)
def test_a_pipeline_that_is_not_whole_is_refused_before_anything_is_written(
    pipeline, tmp_path, capsys, damage, message
):
    damage(pipeline)
    out = tmp_path / "model"
    given = [f"--pipeline={pipeline}", f"--out={out}", "--skip-direction-check"]
    assert run(package_main, "convert", *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert sorted(path.name for path in tmp_path.iterdir()) in ([], ["pipeline"])


def keep(pipeline: Path) -> None:
    """Nothing is changed: it has Stable Diffusion's file, without a prediction_type."""


@pytest.mark.parametrize(
    "change",
    [
        keep,
        lambda p: edit_json(p / SCHEDULER, prediction_type="epsilon"),
        lambda p: edit_json(p / SCHEDULER, prediction_type=["v_prediction"]),
        lambda p: unlink(p / "scheduler"),
    ],
)
def test_a_scheduler_that_says_no_v_prediction_does_not_matter(pipeline, change):
    change(pipeline)
    assert text_conversion._check_scheduler(pipeline, str(pipeline)) is None


@pytest.mark.parametrize(("named", "asked"), [(["diffusers", "DDIM"], 1), ([None, None], 0)])
def test_the_scheduler_is_asked_of_the_hub_where_the_index_names_one(
    pipeline, monkeypatch, named, asked
):
    edit_json(pipeline / "model_index.json", scheduler=named)
    remote = Path(shutil.copytree(pipeline, pipeline.parent / "remote"))
    unlink(pipeline / "scheduler")
    edit_json(remote / SCHEDULER, prediction_type="v_prediction")
    calls = []

    def fetch_parts(*given):
        calls.append(given)
        return remote

    monkeypatch.setattr(hub, "fetch_parts", fetch_parts)
    given = (pipeline, "hf://some/diffusion")
    if asked:
        with pytest.raises(InputError, match=r"^hf://some/diffusion is a diffusion model"):
            text_conversion._check_scheduler(*given)
    else:
        text_conversion._check_scheduler(*given)
    parts = {"scheduler": ("scheduler_config.json",)}
    assert calls == [("hf://some/diffusion", "model_index.json", parts)] * asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--refiner=nowhere"], "refiner: .*nowhere"),
        ([f"--refiner={PIPELINE / 'unet'}"], "refiner: .*in_channels"),
        (["--vae=nowhere"], "nowhere"),
        (["--predictor=x.pt"], "give one of --predictor and --pipeline"),
        (["--size=SiT-XL/2"], "--size means nothing to convert --pipeline; leave it out"),
        (["--guidance=none", "--guidance-scale=2"], "guidance 'none' has no scale, but 2.0"),
    ],
)
def test_arguments_that_do_not_fit_a_pipeline_are_refused(tmp_path, capsys, arguments, message):
    given = [f"--pipeline={PIPELINE}", f"--out={tmp_path / 'model'}", "--skip-direction-check"]
    assert run(package_main, "convert", *given, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not any(tmp_path.iterdir())


def test_what_stands_at_out_is_kept_unless_force_is_given(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text("{}")
    given = [f"--pipeline={PIPELINE}", f"--out={tmp_path / 'model'}", "--skip-direction-check"]
    assert run(package_main, "convert", *given) == 2
    assert "exists; choose another --out, or replace it with --force" in capsys.readouterr().err
    assert (tmp_path / "model" / "model.json").read_text() == "{}"
    assert run(package_main, "convert", *given, "--guidance=official", "--force") == 0
    description = model_directory.describe(tmp_path / "model")
    assert (description.guidance, description.refiner) == ("official", None)


def test_all_parts_of_a_pipeline_on_the_hub_are_of_one_commit(tmp_path, monkeypatch):
    """The hub itself is played in test_hub.py."""
    asked = []

    def file(downloads, place):
        asked.append((place.revision, place.path))
        local = tmp_path / "snapshots" / "c0ffee" / place.path
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_text("{}")
        return local

    monkeypatch.setattr(hub._Downloads, "file", file)
    monkeypatch.setattr(hub._Downloads, "first_file", lambda self, places: file(self, places[0]))
    folder = hub.fetch_parts(
        "hf://some/flow", text_conversion.INDEX, {"tokenizer": ("vocab.json", "merges.txt")}
    )
    assert folder == tmp_path / "snapshots" / "c0ffee"
    assert asked == [
        (None, "model_index.json"),
        ("c0ffee", "tokenizer/vocab.json"),
        ("c0ffee", "tokenizer/merges.txt"),
    ]

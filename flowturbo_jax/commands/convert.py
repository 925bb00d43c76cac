"""Turns published weights into a model directory, describes one, or exports its networks.

  convert --predictor SiT-XL-2-256x256.pt --refiner SiT-XL-2-Refiner.pt --vae vae-ema/ --out DIR
  convert --pipeline 2-rectified-flow/ --out DIR
  convert --describe DIR
  convert --export DIR --network refiner --out refiner.safetensors

Reads .safetensors, PyTorch's .pt, .pth and .bin (without PyTorch; nothing in them is executed) and
diffusers folders; a pipeline is one with unet/, vae/, text_encoder/ and tokenizer/. Every file is
verified before anything is written. A reference may also be hf://owner/name/file. Of a training
checkpoint the moving average (ema) is taken unless --weights says model; the official FlowTurbo
code takes model.
"""

import argparse
from collections.abc import Sequence

from flowturbo_jax import model_directory
from flowturbo_jax.commands import entry
from flowturbo_jax.commands.entry import LineParser
from flowturbo_jax.guidance import MODES
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_description import Description
from flowturbo_jax.pipelines import conversion, costs, exporting, text_conversion


def main(argv: Sequence[str]) -> None:
    """Reads the command line and does one of the three."""
    args = _parser().parse_args(argv[1:])
    empty = [name for name, value in vars(args).items() if value == ""]
    if empty:
        raise InputError(f"--{empty[0].replace('_', '-')} is empty; give a value or leave it out")
    jobs = [name for name in JOBS if getattr(args, name)]
    if len(jobs) != 1:
        raise InputError(
            "give one of --predictor and --pipeline (to convert), --describe and --export"
        )
    _refuse_unused(args, jobs[0])
    if jobs[0] == "describe":
        print(table(model_directory.describe(args.describe)))
        return
    if not args.out:
        raise InputError("--out is missing; it says where to write")
    if jobs[0] == "export":
        state = exporting.export(args.export, args.network, args.out, args.force)
        print(f"wrote {args.out}: {len(state)} tensors under their official names")
        network = model_directory.describe(args.export).networks[args.network]
        if getattr(network, "reversed_time", False):
            print(
                'its clock is reversed: to convert it again, give a {"reversed_time": true} config'
            )
        return
    how = (args.out, args.force, lambda line: print(entry.one_line(line)))
    if jobs[0] == "pipeline":
        description = text_conversion.convert_pipeline(_pipeline_sources(args), *how)
    else:
        description = conversion.convert_model(_sources(args), *how)
    print(table(description))
    print(f"wrote {args.out}{_hint(description, args.out)}")


def _hint(description: Description, out: str) -> str:
    """How to go on from what was converted."""
    if description.vae is None and description.image_shape[-1] not in (1, 3):
        return ""
    if description.takes_text:
        schedule = "" if description.refiner else " --config.schedule=H8"
        return (
            "; sample it with python sample.py --config=configs/rectified_flow_t2i.py "
            f'--config.model_dir={out}{schedule} --config.prompt="..."'
        )
    flags = ["--config=configs/sit_xl_2_256.py", f"--config.model_dir={out}"]
    if description.refiner is None:
        flags.append("--config.schedule=H2P6")
    if len(description.class_names) != 1000:
        flags.append("--config.labels=")
    if description.guidance != "official":
        flags.append("--config.guidance=")
    if description.guidance == "none":
        flags.append("--config.guidance_scale=1")
    return f"; sample it with python sample.py {' '.join(flags)}"


JOBS = ("predictor", "pipeline", "describe", "export")
PIPELINE_ONLY = {"refiner", "vae", "guidance", "guidance_scale"}
CONVERT_ONLY = {
    "refiner": "weights of its refiner; of a pipeline's, the folder of a diffusers U-Net",
    "vae": "folder of a diffusers AutoencoderKL; of a pipeline, in place of its own",
    "predictor_config": "JSON file of what shapes do not tell, such as num_heads",
    "refiner_config": "the same for the refiner",
    "size": "the published size the predictor must have, such as SiT-XL/2",
    "image_size": "the side its images must have, in pixels",
    "predictor_sha256": "refuse another predictor file",
    "refiner_sha256": "refuse another refiner file",
    "vae_sha256": "refuse another VAE weights file",
    "class_names": "file with one name per line; ImageNet's for 1000 classes",
    "guidance": f"default mode of the model: {', '.join(MODES)}",
    "guidance_scale": "default scale of the model",
    "guided_channels": "how many channels the official mode guides; 3 of SiT's 4",
    "weights": "of a training checkpoint: ema (default) or model",
}
NUMBERS = {"image_size": int, "guidance_scale": float, "guided_channels": int}


def _parser() -> LineParser:
    parser = LineParser(prog="python -m flowturbo_jax convert", description=__doc__)
    parser.add_argument("--predictor", help="weights of a SiT")
    parser.add_argument("--pipeline", help="folder of a diffusers text-to-image pipeline")
    for name, text in CONVERT_ONLY.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, help=text, type=NUMBERS.get(name, str))
    parser.add_argument(
        "--skip-direction-check",
        action="store_true",
        help="do not evaluate the predictor once to find weights that predict noise",
    )
    parser.add_argument("--describe", metavar="DIR", help="print what a model directory costs")
    parser.add_argument("--export", metavar="DIR", help="write one network under official names")
    parser.add_argument("--network", help="which: predictor, refiner, vae or text_encoder")
    parser.add_argument(
        "--out", help="model directory, or the .safetensors file (or U-Net's folder) of --export"
    )
    parser.add_argument("--force", action="store_true", help="replace what stands at --out")
    return parser


def _refuse_unused(args: argparse.Namespace, job: str) -> None:
    """Refuses arguments that the job would ignore."""
    used = {
        "pipeline": {*PIPELINE_ONLY, "skip_direction_check", "out", "force"},
        "predictor": {*CONVERT_ONLY, "skip_direction_check", "out", "force"},
        "describe": set(),
        "export": {"network", "out", "force"},
    }[job]
    for name, value in vars(args).items():
        given = value is not None and value is not False
        if given and name != job and name not in used:
            verbs = {"predictor": "convert", "pipeline": "convert --pipeline"}
            flag, verb = name.replace("_", "-"), verbs.get(job, job)
            raise InputError(f"--{flag} means nothing to {verb}; leave it out")
    if job == "export" and args.network is None:
        raise InputError("--network is missing; it is predictor, refiner, vae or text_encoder")


def _pipeline_sources(args: argparse.Namespace) -> text_conversion.PipelineSources:
    return text_conversion.PipelineSources(
        pipeline=args.pipeline,
        refiner=args.refiner,
        vae=args.vae,
        guidance=args.guidance,
        guidance_scale=args.guidance_scale,
        check_direction=not args.skip_direction_check,
    )


def _sources(args: argparse.Namespace) -> conversion.Sources:
    which = args.weights or "ema"
    if which not in ("ema", "model"):
        raise InputError(f"--weights is {which!r}; it must be ema or model")
    given = {name: getattr(args, f"{name}_sha256") for name in ("predictor", "refiner", "vae")}
    return conversion.Sources(
        predictor=args.predictor,
        refiner=args.refiner,
        vae=args.vae,
        which=which,
        predictor_config=args.predictor_config,
        refiner_config=args.refiner_config,
        size=args.size,
        image_size=args.image_size,
        sha256={name: value for name, value in given.items() if value is not None},
        class_names=args.class_names,
        guidance=args.guidance,
        guidance_scale=args.guidance_scale,
        guided_channels=args.guided_channels,
        check_direction=not args.skip_direction_check,
    )


def table(description: Description) -> str:
    """What a model is and what its networks cost, as text."""
    height, width, channels = description.image_shape
    size = description.predictor.size_name or f"{description.family} of no published size"
    classes = f"{description.predictor.num_classes} classes"
    wanted = "of texts" if description.takes_text else classes
    lines = [
        f"{size}: {height} x {width} x {channels} images, {wanted}, guidance "
        f"{description.guidance} at {description.guidance_scale:g}",
        f"{'network':12s}{'parameters':>14s}{'per evaluation':>20s}",
    ]
    for cost in costs.network_costs(description):
        count, work = _short(cost.parameters, "kM"), _short(cost.multiply_adds, "kMG")
        lines.append(f"{cost.what:12s}{count:>14s}{work + 'MAC':>20s}")
    lines.append("(of one image and one branch of guidance; 1 MAC is a multiply-add, 2 FLOP)")
    return "\n".join(lines)


def _short(count: int, units: str) -> str:
    """A count in the largest of the units that leaves it at least 0.1, such as "118.62 G"."""
    power = max((i for i in range(1, len(units) + 1) if count >= 0.1 * 1000**i), default=1)
    return f"{count / 1000**power:.2f} {units[power - 1]}"

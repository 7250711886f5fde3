"""Export a training run as weights to share: in half precision, with its config, history and curves.

    python scripts/export_weights.py checkpoints/denoising/my_run --record my_record.yaml --out my_weights
    python scripts/export_weights.py checkpoints/t/step1 checkpoints/t/step2 --record ... --out ...    # the last one's
    python scripts/export_weights.py --renew    # this repository's, after a record.yaml has changed

`model_best.pth` is exported: the best on the validation images, without the state of the training. The command that
trains with a config is added to it. The record, which a person writes, says what the weights are for and how they were
trained; it is kept beside them and in their metadata. Examples: pretrained_models/*/record.yaml; its fields:
dgunet/checkpoints/registry.py. --renew also writes docs/models.md, the table of all weights.
"""

import dataclasses
import hashlib
import shutil
from pathlib import Path

from common import ROOT, Parser, UserError, command_imports, run_cli

with command_imports(__name__):
    import yaml
    from natsort import natsorted

    from dgunet.checkpoints.load import load_model, read_checkpoint
    from dgunet.checkpoints.registry import IN_REPOSITORY, Record
    from dgunet.checkpoints.safetensors import save_weights
    from dgunet.data.photos import format_sigma
    from dgunet.model.local import check_windows
    from dgunet.model.sampling import ScalableSampling
    from dgunet.model.variants import find_variant

TABLE = ROOT / "docs/models.md"


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of the runs, in the order of training")
    parser.add_argument("--out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--record", type=Path, help="YAML file that says what the weights are for")
    parser.add_argument(
        "--renew", action="store_true", help="rewrite the metadata of this repository's weights, and the table"
    )
    args = parser.parse_args()
    if args.renew and not (args.runs or args.out or args.record):
        for weights in sorted(ROOT.glob(IN_REPOSITORY)):
            content = read_checkpoint(weights)
            record = read_record(weights.with_name("record.yaml"))
            if record != content.get("record"):
                save_weights(weights, content["state_dict"], content["model"], record)
                print(f"renewed {weights}")
        TABLE.write_text(models_table(), encoding="utf-8")
        print(f"wrote {TABLE}")
    elif args.runs and args.out and args.record and not args.renew:
        export(args.runs, args.out, args.record)
    else:
        raise UserError("give RUNS, --record and --out, or --renew alone; see --help")


def export(runs: list[Path], out: Path, record_file: Path):
    if out.exists():
        raise UserError(f"{out} exists; remove it, or give another --out")
    for run in runs:
        for name in ("model_best.pth", "config.yaml", "history.csv", "curves.png"):
            if not (run / name).is_file():
                raise UserError(f"{run} has no {name}; give the folder of a run that has validated")
    record = read_record(record_file)
    content = read_checkpoint(runs[-1] / "model_best.pth")
    half = {name: value.half() for name, value in content["state_dict"].items()}
    overflown = [name for name, value in half.items() if not value.isfinite().all()]
    if overflown:
        raise UserError(f"half precision cannot hold {overflown[0]}; train with weight decay")
    out.mkdir(parents=True)
    weights = out / "weights.safetensors"
    save_weights(weights, half, content["model"], record)
    shutil.copy(record_file, out / "record.yaml")
    for step, run in enumerate(runs, start=1):
        suffix = f"_step{step}" if len(runs) > 1 else ""
        for name in ("history.csv", "curves.png"):
            shutil.copy(run / name, out / f"{Path(name).stem}{suffix}{Path(name).suffix}")
        config = out / f"config{suffix}.yaml"
        task = find_variant(content["model"]["name"]).task.title().replace("_", "")
        there = config.resolve().relative_to(ROOT) if config.resolve().is_relative_to(ROOT) else config
        about = f"{record['name']}: {record['trained_on']}; {record['hours']:g} h on {record['hardware']}"
        command = f"# {about}, {record['date']}\n#   python {task}/train.py --config {there}\n"
        config.write_text(command + (run / "config.yaml").read_text())
    print(f"wrote {out}: {weights.stat().st_size / 2**20:.1f} MiB of weights")


def read_record(path: Path) -> dict:
    """The record in a YAML file, as `save_weights` takes it.

    Raises:
        UserError: not such a file, a field missing, unknown, or of another kind.
    """
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the record {path}: {' '.join(str(error).split())}") from error
    fields = {field.name: field for field in dataclasses.fields(Record) if field.name not in ("task", "path")}
    needed = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    given = record if isinstance(record, dict) else {}
    wrong = [f"{name} is missing" for name in needed if name not in given]
    wrong += [f"{name} is unknown" for name in given if name not in fields]
    if wrong:
        raise UserError(f"{path}: {', '.join(wrong)}; its fields are {', '.join(fields)}")
    record |= {"date": str(record["date"]), "noise_sigma": record.get("noise_sigma")}

    def pair(value) -> bool:
        return isinstance(value, list) and len(value) == 2 and all(isinstance(v, int | float) for v in value)

    scores = record["scores"]
    sound = {name: isinstance(record[name], str) and "\n" not in record[name] for name in needed} | {
        "name": str(record["name"]).isidentifier(),
        "scores": isinstance(scores, dict) and all(map(pair, scores.values())),
        "hours": isinstance(record["hours"], int | float),
        "noise_sigma": record["noise_sigma"] is None or pair(record["noise_sigma"]),
    }
    for name, right in sound.items():
        if not right:
            raise UserError(
                f"{path}: {name} is {record[name]!r:.60}, which is not what dgunet/checkpoints/registry.py says"
            )
    try:
        check_windows(record.get("local", False))
    except UserError as error:
        raise UserError(f"{path}: local: {error}") from error
    return record


def models_table() -> str:
    """docs/models.md."""
    parts = [
        "# The weights that come with dgunet\n\n"
        'By name: `load_model("NAME")` in Python, `--weights NAME` in every command. Each file says all of this\n'
        "itself, in its metadata, which `python scripts/export_weights.py --renew` writes from the `record.yaml`\n"
        "beside it, as it does this page. Scores are PSNR in dB / SSIM, as the papers of the task compute them.\n"
    ]
    for path in natsorted(ROOT.glob(IN_REPOSITORY), key=str):
        record = read_record(path.with_name("record.yaml"))
        model = load_model(path)
        noise = record["noise_sigma"]
        scores = ", ".join(f"{name} {psnr:.2f} / {ssim:.4f}" for name, (psnr, ssim) in record["scores"].items())
        arguments = model.arguments
        rows = {
            "for": record["trained_for"],
            "not for": record["not_for"],
            "noise": noise and f"sigma {format_sigma(noise)}, of 255",
            "local statistics": record.get("local") and ", ".join(f"{k} {v}" for k, v in record["local"].items()),
            "ratios": isinstance(model.degradation, ScalableSampling) and model.degradation.percent,
            "scores": scores,
            "network": f"{model.name}, width {arguments['width']}, {arguments['stages']} stages, "
            f"{sum(p.numel() for p in model.parameters()):,} parameters",
            "trained on": record["trained_on"],
            "training": f"{record['hours']:g} h on {record['hardware']}, {record['date']}",
            "licence": record["licence"],
            "file": f"`{path.relative_to(ROOT).as_posix()}`, {path.stat().st_size / 2**20:.1f} MiB",
            "sha256": f"`{hashlib.sha256(path.read_bytes()).hexdigest()}`",
        }
        lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
        parts.append("\n".join([f"## {record['name']}\n", "| | |", "| --- | --- |", *lines]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    run_cli(main)

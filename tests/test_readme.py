"""The README keeps its word."""

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest
from prepare_patches import GRIDS, grid_boxes

from dgunet import create_model, list_models
from dgunet.data.loader import ResumableBatchSampler
from dgunet.model.degradations import KINDS
from dgunet.training.config import find_config, load_config

ROOT = Path(__file__).resolve().parents[1]

README = (ROOT / "README.md").read_text()
SNAKE = re.compile("(?<=[a-z])(?=[A-Z])")
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("[A-Z]*/README.md"), *ROOT.glob("docs/*.md")]


def test_python_block_runs():
    blocks = re.findall(r"<!-- the tests run this block -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], "README.md", "exec"), {})


@pytest.mark.parametrize(
    "module", ["model.network", "model.variants", "checkpoints.load", "inference", "evaluation.metrics"]
)
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"dgunet.{module}"))
    assert result.attempted > 0 and result.failed == 0


def test_parameter_counts():
    counts = {
        name: int(count.replace(",", ""))
        for line in README.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line)
        for count in re.findall(r"\| ([\d,]+) \|$", line)
    }
    assert counts == {name: sum(p.numel() for p in create_model(name).parameters()) for name in list_models()}


def commands() -> list[tuple[str, list[str]]]:
    """(file, words) of each `python FILE.py ...` and `dgunet ...` in code blocks, code spans and configs' comments."""
    found = []
    for path in (*DOCUMENTS, *ROOT.glob("configs/*/*.yaml")):
        text = path.read_text()
        code = re.findall(r"^#( +python (?:.*\\\n#)*.*)", text, flags=re.MULTILINE)
        if path.suffix == ".md":
            blocks = re.split(r"```(\w*\n.*?)```", text, flags=re.DOTALL)
            code = [block.removeprefix("bash") for block in blocks[1::2] if block.startswith("bash\n")]
            code += re.findall(r"`((?:python|dgunet) [^`]+)`", "\n\n".join(blocks[::2]).replace("\n", " "))
        lines = "\n".join(code).replace("\\\n#", " ").replace("\\\n", " ").splitlines()
        calls = [call for line in lines for call in re.findall(r"(?:python \S+\.py|^ *dgunet [a-z]+)\b.*", line)]
        found += [(path.relative_to(ROOT).as_posix(), shlex.split(call, comments=True)) for call in calls]
    return found


def test_commands_have_the_options_and_keys_that_the_documents_give_them():
    sources = {
        "train": "dgunet/training/config.py",
        "test": "dgunet/evaluation/cli.py",
        "ablation.py": "studies/runs.py",
        "study_sensing.py": "studies/runs.py",
    }
    trained = 0
    for file, words in commands():
        script = ROOT / ("dgunet/apps/cli.py" if words[0] == "dgunet" else words[1])
        command = words[1] if words[0] == "dgunet" else script.name
        if command in ("train.py", "test.py"):  # of a task
            command = command.removesuffix(".py")
        places = {script, ROOT / sources.get(command, script), ROOT / f"dgunet/apps/{command}.py"}
        places |= {*ROOT.glob("dgunet/tasks/*.py")} if command == "test" else set()
        known = "".join(place.read_text() for place in places if place.exists())
        for word in words:
            if word.startswith("--"):
                option = word.replace("--no-", "--")  # of a BooleanOptionalAction
                assert f'"{word}"' in known or f'"{option}"' in known, f"{file}: {shlex.join(words)} has no {word}"
        if command == "train":
            options = {
                key: value for key, value in zip(words, words[1:], strict=False) if re.match(r"GPU$|[A-Z]+\.", key)
            }
            config = words[words.index("--config") + 1] if "--config" in words else None
            task = words[2:3] if words[0] == "dgunet" else [SNAKE.sub("_", script.parent.name).lower()]
            load_config(
                config and find_config(config, ROOT.joinpath("configs", *task)),
                [word for pair in options.items() for word in pair],
            )
            trained += 1
    assert trained > 30, "the commands were not found"


def test_extras_that_the_documents_name_exist():
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    named = {
        name
        for path in DOCUMENTS
        for names in re.findall(r'"\.\[([\w,]+)\]"', path.read_text())
        for name in names.split(",")
    }
    assert named >= {"train", "hub", "demo"}
    assert named <= set(extras)


def test_readme_names_every_known_degradation():
    (line,) = [line for line in README.splitlines() if "# dgunet/model/degradations.py" in line]
    named = line.partition("# dgunet/model/degradations.py")[2]
    assert all(re.search(rf"\b{kind.__name__}\b", named) for kind in KINDS.values())


def test_files_that_the_documents_name_exist():
    """Scripts, configs, modules and images; what a command writes, and data that must be downloaded, need not."""
    for document in (*DOCUMENTS, *ROOT.glob("configs/*/*.yaml")):
        text = document.read_text()
        for name in re.findall(
            r"(?:scripts|studies|configs|dgunet|docs|tests|[A-Z]\w+)/[\w/]+\.(?:py|sh|yaml|md|png)", text
        ):
            if not name.startswith(("Datasets/", "SIDD", "DND")) and "/TASK/" not in name:
                assert (ROOT / name).exists(), f"{document.relative_to(ROOT)} names {name}"


def test_links_lead_somewhere():
    """Of the documents, to files and to headings in them."""
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(((?!https?:)[^)]+)\)", document.read_text()):
            name, _, heading = link.partition("#")
            target = document.parent / name if name else document
            assert target.exists(), f"{document.relative_to(ROOT)} links to {link}"
            headings = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.MULTILINE) if heading else []
            assert not heading or heading in [h.lower().replace(" ", "-") for h in headings], f"no {link}"


def test_every_task_has_its_differences_in_one_place():
    for task in ("Deblurring", "Deraining", "Denoising", "CompressiveSensing"):
        text = (ROOT / task / "README.md").read_text()
        assert "docs/differences.md" in text and "## Differences" not in text


def test_patches_are_trained_on_for_as_many_steps_as_whole_images():
    """The command that Deblurring/README.md gives for GoPro in patches, beside the paper's recipe."""
    text = (ROOT / "Deblurring/README.md").read_text()
    (options,) = re.findall(r"train\.py (TRAINING\.TRAIN_DIR \S+_patches.*?)```", text, flags=re.DOTALL)
    config, images = ROOT / "configs/deblurring/dgunet.yaml", 2103
    patches = images * len(grid_boxes(720, 1280, **GRIDS["gopro"]))

    def steps(cfg, pairs: int) -> int:
        batches = ResumableBatchSampler(pairs - cfg.TRAINING.VAL_HOLD_BACK, cfg.OPTIM.BATCH_SIZE, seed=0)
        return cfg.OPTIM.NUM_EPOCHS * batches.steps

    whole, cut = load_config(config), load_config(config, options.replace("\\\n", " ").split())
    assert steps(cut, patches) == pytest.approx(steps(whole, images), rel=0.002)
    assert cut.TRAINING.VAL_HOLD_BACK * images == whole.TRAINING.VAL_HOLD_BACK * patches, "the same images"

"""The README keeps its word."""

import re
from pathlib import Path

from dgunet import create_model, list_models

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_python_block_runs():
    blocks = re.findall(r"<!-- the tests run this block -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], "README.md", "exec"), {})


def test_parameter_counts():
    counts = {
        name: int(count.replace(",", ""))
        for line in README.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line)
        for count in re.findall(r"\| ([\d,]+) \|$", line)
    }
    assert counts == {name: sum(p.numel() for p in create_model(name).parameters()) for name in list_models()}


def test_files_that_the_documents_name_exist():
    """Scripts, configs, modules and pictures; what a command writes, and data that must be downloaded, need not."""
    for document in ROOT.glob("**/README.md"):
        if ".venv" in document.parts or "tests" in document.parts:
            continue
        text = document.read_text()
        for name in re.findall(r"(?:scripts|configs|dgunet|docs|tests|[A-Z]\w+)/[\w/]+\.(?:py|sh|yaml|md|png)", text):
            if not name.startswith(("Datasets/", "SIDD", "DND")) and "/TASK/" not in name:
                assert (ROOT / name).exists(), f"{document.relative_to(ROOT)} names {name}"

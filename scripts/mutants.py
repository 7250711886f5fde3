"""Does a test notice when the code is wrong? Puts faults into dgunet/, one at a time, and runs the tests.

    pip install cosmic-ray pytest-cov
    python scripts/mutants.py --count 100 --jobs 2          # about an hour of two cores; too slow for every change
    python scripts/mutants.py --count 30 --module metrics   # of one module

The faults are drawn, seeded: a file, by its length; a kind of fault that cosmic-ray knows to make (another operator,
another number, a condition turned round, ...); a place. Those in annotations change nothing and do not count. They are
put into a copy of the repository, whose tests should pass as they are. First all tests run once, to know which of them
run which lines, and for how long. Of a fault, those that run its lines are tried first, then all others of its module,
some of which run it in other processes; the quick ones before the slow ones. Faults that no test noticed are printed as
differences: write the test, or be sure that nothing is wrong with them.
"""

import argparse
import ast
import difflib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from subprocess import DEVNULL
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.errors import ROOT, UserError, run_cli

# Tests of a module besides tests/test_MODULE.py.
ALSO = {
    "checkpoint": ["test_checkpoint_faults.py", "test_engine.py"],
    "data": ["test_damaged_files.py", "test_engine.py"],
    "degradations": ["test_model.py", "test_parity.py", "test_checkpoint.py", "test_tasks.py"],
    "distributed": ["test_engine.py"],
    "engine": ["test_checkpoint_faults.py", "test_schedule.py", "test_tasks.py", "test_kills.py"],
    "errors": ["test_data.py", "test_config.py", "test_engine.py"],
    "evaluation": ["test_denoising.py", "test_tasks.py", "test_kills.py"],
    "files": ["test_data.py", "test_damaged_files.py", "test_checkpoint.py"],
    "hardware": ["test_engine.py", "test_evaluation.py", "test_inference.py"],
    "inference": ["test_evaluation.py"],
    "instance_norm": ["test_model.py"],
    "layers": ["test_model.py", "test_parity.py"],
    "losses": ["test_parity.py", "test_engine.py"],
    "metrics": ["test_evaluation.py"],
    "model": ["test_parity.py", "test_checkpoint.py"],
    "original_checkpoints": ["test_parity.py", "test_checkpoint.py"],
    "pathways": ["test_model.py", "test_parity.py"],
    "patches": ["test_data.py", "test_engine.py", "test_denoising.py", "test_tasks.py"],
    "photographs": ["test_demo_data.py"],
    "proximal": ["test_model.py", "test_parity.py"],
    "runlog": ["test_engine.py"],
    "schedule": ["test_engine.py"],
    "resume": ["test_checkpoint_faults.py", "test_engine.py"],
    "synthesis": ["test_demo_data.py", "test_data.py"],
    "testing": ["test_evaluation.py", "test_denoising.py", "test_tasks.py"],
    "training": ["test_config.py", "test_tasks.py", "test_engine.py"],
    "transforms": ["test_data.py", "test_inference.py"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="faults to try")
    parser.add_argument("--module", help="only in dgunet/MODULE.py")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at once")
    args = parser.parse_args()
    paths = sorted((ROOT / "dgunet").glob(f"{args.module or '*'}.py"))
    if not paths:
        raise UserError(f"there is no dgunet/{args.module}.py")
    chosen = draw_mutants(paths, args.count, args.seed)

    with tempfile.TemporaryDirectory() as folder:
        copies = SimpleQueue()
        for job in range(args.jobs):
            copies.put(shutil.copytree(ROOT, Path(folder) / str(job), ignore=ignored, symlinks=True))
        tests_of = measure(Path(folder) / "0", args.jobs)
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = {pool.submit(tested, copies, tests_of(*mutant), *mutant): mutant for mutant in chosen}
            unnoticed = 0
            for number, job in enumerate(as_completed(jobs), start=1):
                if not job.result():
                    unnoticed += 1
                    print(difference(*jobs[job]))
                print(f"{number} tried, {number - unnoticed} noticed", flush=True)


def draw_mutants(paths: list[Path], count: int, seed: int) -> list[tuple[Path, str]]:
    """(file, its content with one fault) for a random choice of all faults that change what the file does."""
    try:
        from cosmic_ray.ast import ast_nodes, get_ast
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator, operator_names
    except ImportError as error:
        raise UserError("cosmic-ray makes the faults: pip install cosmic-ray") from error
    kinds = [name for name in operator_names() if "/Variable" not in name]  # those two want a variable's name
    nodes = {path: list(ast_nodes(get_ast(path.read_text()))) for path in paths}
    rng, chosen = random.Random(seed), {}
    while len(chosen) < count:
        (path,) = rng.choices(paths, [len(nodes[path]) for path in paths])
        operator = get_operator(rng.choice(kinds))()
        places = sum(len(list(operator.mutation_positions(node))) for node in nodes[path])
        if places:
            code = mutate_code(path.read_bytes(), operator, rng.randrange(places))
            if meaning(code) not in (None, meaning(path.read_text())):
                chosen.setdefault((path, meaning(code)), code)
    return [(path, code) for (path, _), code in chosen.items()]


def meaning(code: str) -> str | None:
    """What a program does: its syntax tree without annotations and documentation; None for what is no program."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return ast.dump(tree)


def measure(copy: Path, jobs: int) -> Callable[[Path, str], list[str]]:
    """Run all tests; returns what tells those to try on a mutant: that run its lines, then the others of its module."""
    options = ["-n", str(jobs), "--cov=dgunet", "--cov-context=test", "--cov-report=", "--junitxml=seconds.xml"]
    if subprocess.run([sys.executable, "-m", "pytest", *options], cwd=copy, stdout=DEVNULL).returncode:
        raise UserError("the tests fail without any fault, or pytest-cov is missing; run bash scripts/test.sh")
    from coverage import CoverageData

    data = CoverageData(str(copy / ".coverage"))
    data.read()
    seconds = {}
    for case in ElementTree.parse(copy / "seconds.xml").iter("testcase"):
        seconds[f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}"] = float(case.get("time"))

    def tests_of(path: Path, code: str) -> list[str]:
        before = path.read_text().splitlines()
        changes = difflib.SequenceMatcher(None, before, code.splitlines(), autojunk=False).get_opcodes()
        changed = {line for tag, i, j, *_ in changes if tag != "equal" for line in range(i + 1, max(j, i + 1) + 1)}
        contexts = data.contexts_by_lineno(str(copy / path.relative_to(ROOT)))
        run_by = [set(contexts.get(line, [])) - {""} for line in changed]
        covering = {context.split("|")[0] for contexts in run_by for context in contexts} & seconds.keys()
        names = {f"tests/test_{path.stem}.py", *(f"tests/{name}" for name in ALSO.get(path.stem, []))}
        others = {test for test in seconds if test.split("::")[0] in names} - covering
        return sorted(covering, key=seconds.get) + sorted(others, key=seconds.get)

    return tests_of


def tested(copies: SimpleQueue, tests: list[str], path: Path, code: str) -> bool:
    """Whether one of the tests, tried in this order, fails with this code in its place."""
    copy = copies.get()
    place = copy / path.relative_to(ROOT)
    before = place.read_text()
    try:
        place.write_text(code)
        options = ["-x", "-n", "0", "-p", "no:cacheprovider", "-p", "no:cov"]
        options += ["-o", "faulthandler_timeout=120", "-o", "faulthandler_exit_on_timeout=true"]  # of a test that hangs
        command = [sys.executable, "-m", "pytest", *options, *tests]
        return subprocess.run(command, cwd=copy, stdout=DEVNULL, stderr=DEVNULL).returncode != 0
    finally:
        place.write_text(before)
        copies.put(copy)


def difference(path: Path, code: str) -> str:
    name = str(path.relative_to(ROOT))
    lines = difflib.unified_diff(path.read_text().splitlines(), code.splitlines(), name, name, n=1, lineterm="")
    return "\n".join(lines)


def ignored(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name in (".git", ".venv", "Datasets", "checkpoints", "results", "__pycache__")}


if __name__ == "__main__":
    run_cli(main)

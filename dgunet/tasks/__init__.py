"""The tasks, each a record of all that differs between them: its networks, configs, data, test sets, command lines.

A task of your own is a `Task` in a module of yours: ``dgunet train my_module:dehazing`` (docs/extending.md).
"""

import difflib
import os
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from dgunet.evaluation.cli import Evaluation, test_command
from dgunet.model.variants import VARIANTS, Variant
from dgunet.runtime.errors import ROOT, UserError
from dgunet.runtime.imports import import_object, is_object_name
from dgunet.training.cli import Training, train_command

TASKS = ("deblurring", "deraining", "denoising", "compressive_sensing")  # modules here, each with its TASK

_packed = Path(__file__).parents[1] / "configs"  # where the wheel has them (pyproject.toml)
CONFIGS = _packed if _packed.exists() else ROOT / "configs"


@dataclass(frozen=True)
class Task:
    """All that is of one task alone. A new one needs a name, its networks and the folder of its configs.

    Args:
        name: e.g. ``"deraining"``: in tables of results, and how the names of its networks begin.
        variants: its networks by name; ``create_model`` knows them from then on.
        configs: the folder of its configs, of which ``dgunet.yaml`` is what is trained without ``--config``; default:
            those that come with dgunet.
        training: how it is trained.
        evaluation: how it is tested.
        train_help, test_help: what ``--help`` says, with commands written as ``dgunet train NAME``.
    """

    name: str
    variants: dict[str, Variant]
    configs: Path | None = None
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    train_help: str = ""
    test_help: str = ""

    def __post_init__(self):
        for name, variant in self.variants.items():
            if VARIANTS.setdefault(name, variant) != variant or variant.task != self.name:
                raise UserError(f"the task {self.name} has a network {name} of another task; give it another name")

    def train(self, argv: list[str] | None = None, prog: str | None = None):
        """Train as a command line says: ``argv``, by default the process's own; ``prog`` is the command in --help."""
        description = self.train_help or f"Train DGUNet for {self.name.replace('_', ' ')}."
        description = _as_called(description, f"dgunet train {self.name}", prog)
        configs = self.configs or CONFIGS / self.name
        train_command(self.name, self.training, configs, description, argv, prog)

    def test(self, argv: list[str] | None = None, prog: str | None = None):
        """Test as the command line says, see `train`."""
        description = self.test_help or f"Test DGUNet for {self.name.replace('_', ' ')}, or restore images."
        description = _as_called(description, f"dgunet test {self.name}", prog)
        test_command(self.name, self.evaluation, description, argv, prog)


def _as_called(text: str, usual: str, prog: str | None) -> str:
    """The examples in a text as they are for this command: ``python Deblurring/train.py``, say."""
    if prog is None or prog == usual:
        return text
    script = prog.removeprefix("python ")  # as torchrun takes it
    return text.replace(f"-m {usual}", script if script != prog else f"-m {prog}").replace(usual, prog)


def own_variants(task: str) -> dict[str, Variant]:
    """The paper's networks for a task."""
    return {name: variant for name, variant in VARIANTS.items() if variant.task == task}


def find_task(name: str) -> Task:
    """The record of a task that comes with dgunet, by its name, or of one's own, as ``module:name``.

    Raises:
        UserError: no such task, or something else.
    """
    if name in TASKS:
        return import_module(f"dgunet.tasks.{name}").TASK
    if not is_object_name(name):
        guess = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {guess[0]}?" if guess else f"known are {', '.join(TASKS)}; your own is module:name"
        raise UserError(f"no task {name!r:.100}; {hint}")
    task = import_object(name, "TASK")
    if not isinstance(task, Task):
        raise UserError(f"TASK {name} is a {type(task).__name__}, not a dgunet.tasks.Task")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for the processes that training starts, which import its data sets
    return task

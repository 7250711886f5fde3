"""The configuration of a training run: defaults, then a YAML file, then the command line.

Every key is declared here once, with what it means; a key that is not declared is an error. Relative paths are
relative to the current folder.
"""

import argparse
import contextlib
import datetime
import difflib
import inspect
import re
import sys
import textwrap
import unicodedata
from argparse import RawDescriptionHelpFormatter
from collections.abc import Hashable
from pathlib import Path

import yaml
from yacs.config import CfgNode as CN

from dgunet.model.network import ARGUMENTS, FACTORIES, DGUNet
from dgunet.model.proximal import MULTIPLE
from dgunet.runtime.errors import UserError
from dgunet.runtime.imports import is_object_name
from dgunet.training.losses import LOSSES

_C, _RANGES, _EPOCHS = CN(), {}, 10**6
_OWN = "module:name"  # among the choices of a key that takes an object of the user's own module, too


def _key(name: str, default, allowed=None):
    """Declare a key, its default and ``allowed`` values: (lowest, highest) of each of its numbers, or [the choices]."""
    *sections, leaf = name.split(".")
    node = _C
    for section in sections:
        node = node.setdefault(section, CN())
    node[leaf] = default
    if allowed is not None:
        _RANGES[name] = allowed


_key("SEED", 1234, (0, 2**32 - 1))  # of everything random
_key("DEVICE", "auto", ["auto", "cuda", "cpu"])  # auto: GPUs where there are any
_key("GPU", [], (0, 1023))  # which GPUs to use, e.g. [0, 1]; empty: all that are visible
_key("PROCESSES", 0, (0, 256))  # 0: one for each GPU, one on the CPU; more on the CPU run over gloo

_key("MODEL.NAME", "deblurring_dgunet")  # see dgunet.list_models()
_key("MODEL.SESSION", "DGUNet")  # name of the run: its files go to TRAINING.SAVE_DIR/SESSION
_key("MODEL.OVERRIDES", CN())  # arguments of DGUNet that differ from the paper's, e.g. {width: 16}
# Compressive sensing: measurements per pixel. Or two numbers, such as [0.01, 0.5]: one network for every ratio between
# them. Each step then measures with the first M rows of the matrix. In half of the steps M is uniform, so that
# the last rows are trained often enough; in the others it is log-uniform, or one step in sixteen would be below 4 %.
_key("MODEL.RATIO", 0.25, (0.001, 1))
_key("MODEL.BLOCK", 32, (MULTIPLE, 128))  # compressive sensing: side of the blocks in pixels, a multiple of 8 up to 128
_key("MODEL.MATRIX", "learned")  # compressive sensing: learned (with the network) or fixed
# What the matrix starts from, or stays: xavier, orthonormal (Gaussian), dct (lowest frequencies), pca (principal
# components of training blocks), or a .npy file, which sets the ratio. Empty: xavier if learned, orthonormal if fixed,
# dct for a range of ratios, which wants the rows that are worth the most first.
# The matrix of MODEL.WEIGHTS comes before it, unless it is of another ratio, or a file's is to stay fixed.
_key("MODEL.MATRIX_START", "")
# Deblurring: a known degradation, of which TRAIN_DIR and VAL_DIR hold clean images: blur, or an operator of your own,
# module:name of a function or class that make() or make(cfg) gives it (docs/own_operator.md). Empty: it is learned.
_key("MODEL.DEGRADATION", "")
# blur: .npy file of the kernel, (h, w), both odd; or motion: a simulated camera shake for each step. It comes in from
# beyond the crops, whose margin of half the largest extent, rounded up to a multiple of 8, is cut off.
_key("MODEL.KERNEL", "")
_key("MODEL.KERNEL_EXTENT", [5, 25], (1, 200))  # motion: smallest and largest extent, pixels
_key("MODEL.NOISE", 0.0, (0, 255))  # blur: sigma of Gaussian noise added to blurred training images (0 to 255)
_key("MODEL.GREY", False)  # known degradation: train on the luminance, for grey images
# Known degradation: train on complex images, two channels: the luminance as the real part, 0 as the imaginary part.
_key("MODEL.COMPLEX", False)
# Parts of your own, module:name of functions or classes that make them, see docs/extending.md: the proximal mapping and
# the learned degradation of each stage. Empty: the paper's.
_key("MODEL.PROXIMAL", "")
_key("MODEL.LEARNED_DEGRADATION", "")
_key("MODEL.WEIGHTS", "")  # to start from: a checkpoint (ours or the authors'), or the name of one; empty: from scratch

_key("OPTIM.BATCH_SIZE", 16, (1, 2**16))  # total over all processes and accumulation steps
_key("OPTIM.NUM_EPOCHS", 3000, (1, _EPOCHS))
_key("OPTIM.LR_INITIAL", 1e-4, (1e-12, 1))
_key("OPTIM.LR_MIN", 1e-6, (0, 1))  # where the cosine ends: one epoch after the last
_key("OPTIM.NAME", "adam", ["adam", "adamw", "muon", _OWN])  # the optimizer; see docs/extending.md
_key("OPTIM.BETAS", [0.9, 0.999], (0, 0.999999))  # of Adam, AdamW, and the parameters that Muon leaves to AdamW
_key("OPTIM.WARMUP_EPOCHS", 3, (0, _EPOCHS))  # in epoch e of them the lr is LR_INITIAL * e / WARMUP_EPOCHS
_key("OPTIM.SCHEDULE", "cosine", ["cosine", "constant", "step", _OWN])  # after the warm-up
_key("OPTIM.COSINE_EXTRA_EPOCHS", 0, (-1, _EPOCHS))  # cosine: longer by so many (denoising: 40; -1: LR_MIN in the last)
_key("OPTIM.LR_MILESTONES", [], (1, _EPOCHS))  # step: epochs after which the lr is multiplied by LR_DECAY
_key("OPTIM.LR_DECAY", 0.5, (1e-6, 1))
_key("OPTIM.WEIGHT_DECAY", 0.0, (0, 1))  # Adam's is L2, AdamW's and Muon's are decoupled
_key("OPTIM.ACCUMULATE", 1, (1, 2**16))  # split each batch into this many forward/backward passes
_key("OPTIM.CLIP_NORM", 0.0, (0, 10**6))  # largest norm of the gradient; 0: no clipping
_key("OPTIM.EMA_DECAY", 0.0, (0, 0.999999))  # e.g. 0.999: validate and test a moving average of the weights; 0: off
_key("OPTIM.MAX_BAD_STEPS", 50, (1, 10**6))  # steps in a row with a non-finite loss or gradient before the run gives up
# So many of them before the run goes back to its averaged weights, or without EMA to those of the last validation or
# epoch, with the optimizer's moments cleared and a lower learning rate; 0, or not below MAX_BAD_STEPS: never.
_key("OPTIM.ROLLBACK_AFTER_BAD_STEPS", 10, (0, 10**6))
_key("OPTIM.ROLLBACK_LR_FACTOR", 0.5, (1e-6, 1))  # by which a rollback multiplies the lr from then on
_key("OPTIM.MAX_ROLLBACKS", 5, (0, 1000))  # in a run; after them MAX_BAD_STEPS ends it

# Weights of the losses, which are summed over all stages.
_key("LOSS.CHARBONNIER", 1.0, (0, 10**6))
_key("LOSS.EDGE", 0.0, (0, 10**6))
_key("LOSS.MSE", 0.0, (0, 10**6))
# {name: weight}, in place of these three: charbonnier, edge, mse, or module:name of a loss of your own, such as
# "{charbonnier: 1, my_losses:Focal: 0.1}"; see docs/extending.md.
_key("LOSS.TERMS", CN())
_key("LOSS.CLAMP", False)  # clamp the estimates to [0, 1] first

# Folder with input/ and target/; or a file that scripts/pack_dataset.py wrote; or a list, a text or CSV file with two
# paths to a line.
_key("TRAINING.TRAIN_DIR", "")
_key("TRAINING.INPUT_DIR", "")  # of pairs, instead of TRAIN_DIR: the folder of the inputs
_key("TRAINING.TARGET_DIR", "")  # and that of the targets, which have the same names
_key("TRAINING.VAL_INPUT_DIR", "")  # likewise, instead of VAL_DIR
_key("TRAINING.VAL_TARGET_DIR", "")  # and the targets
# Other names of inputs and targets in these folders, such as {input: '*_input', target: '*_gt'}: each * stands for what
# the two have in common, see docs/extending.md. Empty: input/* and target/*, or a published layout, as a note says.
_key("TRAINING.PAIRS", CN())
# Text file, also one beside the config: names, one to a line, of images to leave out, such as those of a test set.
_key("TRAINING.EXCLUDE", "")
_key("TRAINING.VAL_DIR", "")  # the same for validation; empty: VAL_HOLD_BACK of TRAIN_DIR
_key("TRAINING.VAL_HOLD_BACK", 32, (0, 10**6))  # images held out without VAL_DIR: the last by name, at most a tenth
_key("TRAINING.SAVE_DIR", "checkpoints")
# True: continue SAVE_DIR/SESSION where it stopped; auto: where there is none yet, begin it
_key("TRAINING.RESUME", False, [False, True, "auto"])
_key("TRAINING.TRAIN_PS", 256, (MULTIPLE, 4096))  # side of the random training crops, pixels
# Side of the central validation crops; 0: whole images. Compressive sensing: of the blocks that the central 256x256
# pixels are cut into.
_key("TRAINING.VAL_PS", 256, (0, 2**16))
# For a queue with a limit: the run ends within so many seconds, in all its sessions together, validated and saved. The
# cosine follows the clock instead of the epochs, of which NUM_EPOCHS are the most. 0: no limit.
_key("TRAINING.SECONDS", 0.0, (0, 10**9))
_key("TRAINING.REPEAT", 1, (1, 10**4))  # how often an image counts in an epoch (each time with another crop)
_key("TRAINING.VAL_AFTER_EVERY", 1, (1, _EPOCHS))  # epochs
_key("TRAINING.VAL_TIMES", 1, (1, 1000))  # validations in such an epoch, evenly spaced
_key("TRAINING.VAL_EPOCHS", [], (1, _EPOCHS))  # if given, validate in these epochs (and from VAL_FROM_EPOCH on) only
_key("TRAINING.VAL_FROM_EPOCH", 0, (0, _EPOCHS))
_key("TRAINING.SAVE_EACH_VALIDATION", True)  # keep the weights of every validation as model_epoch_N.pth
_key("TRAINING.SAVE_MINUTES", 15.0, (0, 10**6))  # model_latest.pth is also written this often within an epoch
_key("TRAINING.WORKERS", 4, (0, 256))  # data loading processes of each training process
# A list of csv (history.csv, curves.png), console (lines, train.log, a bar), images (of the validation, as PNG),
# tensorboard, wandb, mlflow, and module:name, a logger of one's own; auto: csv, console, tensorboard if installed.
_key("TRAINING.LOGGERS", "auto")

# Degrade clean images while training, by a function of dgunet/data/synthesis.py: gaussian_noise, found_noise,
# sensor_noise, bayer_noise, grain, photo_noise, rain_streaks, added_rain, motion_blur; or by module:name, one of your
# own (docs/extending.md). TRAIN_DIR is then a folder of clean images. Empty: train on pairs.
_key("SYNTHESIS.NAME", "")
_key("SYNTHESIS.OPTIONS", CN())  # its arguments that differ from their defaults, e.g. {sigma: [0, 50]}

_key("AUGMENT.FLIP", True)  # random flips and rotations by 90 degrees (compressive sensing: flips and transposition)
_key("AUGMENT.SATURATION", 0.0, (0, 1))  # s: a third of the pairs gets its saturation scaled by U(1 - s, 1 + s); 0: off
_key("AUGMENT.MIXUP", 0.0, (0, 100))  # alpha of the Beta distribution that mixes two pairs (denoising: 0.6); 0: off
_key("AUGMENT.MIXUP_FROM_EPOCH", 6, (0, _EPOCHS))

_key("SPEED.AMP", "auto", ["auto", "bf16", "fp32"])  # bf16, fp32, or auto: bf16 where the hardware computes it
_key("SPEED.CHANNELS_LAST", "auto", ["auto", True, False])  # memory format, False: NCHW; auto: the faster one
# Record the training step as a CUDA graph and replay it: small networks and crops train faster. auto: where possible.
_key("SPEED.CAPTURE", "auto", ["auto", True, False])
# torch.compile: faster after a minute or more of compiling. auto: on a GPU, for runs of so many steps that it repays.
_key("SPEED.COMPILE", False, [False, True, "auto"])
# Its mode; reduce-overhead runs CUDA graphs, which helps small networks and crops.
_key("SPEED.COMPILE_MODE", "default", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
_key("SPEED.CHECKPOINTING", False)  # recompute each stage in the backward pass: much less memory, a third more time

# Arguments of DGUNet and of the syntheses, where MODEL.OVERRIDES and SYNTHESIS.OPTIONS give them.
_RANGES |= {
    **{f"MODEL.OVERRIDES.{k}": v for k, v in ARGUMENTS.items() if k != "channels" and v != [True, False]},
    "MODEL.OVERRIDES.rho": (0, 10),
    "SYNTHESIS.OPTIONS.sigma": (0, 255),
    "SYNTHESIS.OPTIONS.shot": (1e-9, 1),
    "SYNTHESIS.OPTIONS.read": (1e-9, 1),
    "SYNTHESIS.OPTIONS.density": (0.01, 1000),
    "SYNTHESIS.OPTIONS.length": (1, 200),
    "SYNTHESIS.OPTIONS.width": (0.1, 20),
    "SYNTHESIS.OPTIONS.brightness": (0, 1),
    "SYNTHESIS.OPTIONS.extent": (0, 100),
    "SYNTHESIS.OPTIONS.sharp": (0, 1),
}

# Keys, or how they begin, that say where pairs are.
PAIRS = (
    "TRAINING.INPUT_DIR", "TRAINING.TARGET_DIR", "TRAINING.VAL_INPUT_DIR", "TRAINING.VAL_TARGET_DIR", "TRAINING.PAIRS",
)  # fmt: skip

# Keys, or how they begin, that are not every task's: its record (dgunet/tasks) says which it uses.
_NOT_EVERYWHERE = (
    "MODEL.RATIO", "MODEL.BLOCK", "MODEL.MATRIX", "MODEL.DEGRADATION", "MODEL.KERNEL", "MODEL.NOISE", "MODEL.GREY",
    "MODEL.COMPLEX", "SYNTHESIS", "AUGMENT.SATURATION", "AUGMENT.MIXUP", *PAIRS,
)  # fmt: skip


def load_config(path: str | Path | None = None, options: list[str] | dict = ()) -> CN:
    """Defaults, overridden by a YAML file, overridden by ``KEY VALUE`` pairs, or a dict of keys and values; frozen.

    Raises:
        UserError: no such file, not YAML, an unknown key (with the likeliest right one), a key given twice in the
            file, a value of a wrong type or out of its range.
    """
    cfg, given, assignments = _C.clone(), set(), []
    if path is not None:
        for key, value in _flatten(_read_yaml(path), cfg):
            if key in given:
                raise UserError(f"{path}: {_shorten(key)} is given twice; keep one of the two")
            given.add(key)
            if value is not None or not isinstance(_declared(key), CN):  # else a section with nothing in it
                assignments.append((key, value, str(path)))
    words, values = ((), options) if isinstance(options, dict) else (options, {})
    if len(words) % 2:
        raise UserError(f"options come in pairs, KEY VALUE, as in OPTIM.BATCH_SIZE 8; got {' '.join(words)}")
    for key, text in zip(words[::2], words[1::2], strict=True):
        try:
            value = yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError):
            value = text
        if isinstance(_declared(key), str) and type(value) in (int, float, datetime.date, datetime.datetime):
            value = text  # 007 and 2026-01-05 may well be names of runs
        assignments.append((key, value, "command line"))
    assignments += [(key, value, "options") for key, value in values.items()]
    for key, value, source in sorted(assignments, key=lambda one: one[0] != "SYNTHESIS.NAME"):  # whose the options are
        _assign(cfg, key, value, source)
    unread = [key for key in (*words[::2], *values) if key in _LOSS_KEYS]
    if unread and cfg.LOSS.TERMS:
        name = unread[0].removeprefix("LOSS.").lower()
        raise UserError(f"{unread[0]} does nothing where LOSS.TERMS is set; set LOSS.TERMS.{name} instead")
    if cfg.OPTIM.SCHEDULE == "cosine" and cfg.OPTIM.LR_MIN > cfg.OPTIM.LR_INITIAL:
        raise UserError(f"OPTIM.LR_MIN {cfg.OPTIM.LR_MIN} is above OPTIM.LR_INITIAL {cfg.OPTIM.LR_INITIAL}; lower it")
    cfg.freeze()
    return cfg


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice (the last would win) and aliases (which may never end)."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"*{event.anchor}: a config has no aliases; write the value itself")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for part, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = self.construct_object(part, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.YAMLError(f"{key} is given twice; keep one of the two")
                seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: str | Path) -> dict:
    """The content of a YAML file that holds KEY: value lines."""
    largest = 2**20  # a checkpoint in the place of a config need not be read to its end
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(largest + 1)
        content = yaml.load(text, _Loader) if len(text) <= largest else text
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}; see configs/") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates and numbers of too many digits: ValueError
        raise UserError(f"{path} is not valid YAML: {_shorten(str(error), 300)}") from error
    if not isinstance(content, dict | None):
        raise UserError(f"{path} is not a config: it should hold KEY: value lines, see configs/")
    return content or {}


def changed_keys(cfg: CN, other: CN) -> list[str]:
    """Dotted names of the keys in which two configs differ; a key that one of them lacks has its default there."""
    one, two, default = (dict(_flatten(config)) for config in (cfg, other, _C))
    return [key for key in one | two if one.get(key, default.get(key)) != two.get(key, default.get(key))]


def flat_config(cfg: CN) -> dict:
    """Every key's value by its dotted name."""
    return dict(_flatten(cfg))


def format_config(cfg: CN) -> str:
    """The whole config as YAML, keys that differ from the defaults marked with ``# *``."""
    changed = set(changed_keys(cfg, _C))
    lines, path = [], []
    for line in cfg.dump(default_flow_style=False, sort_keys=False, width=float("inf")).splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        path = path[:depth] + [re.split(r":(?: |$)", line.strip())[0]]
        lines.append(line + ("  # *" if ".".join(path) in changed else ""))
    return "\n".join(lines)


def find_config(config: str, folder: Path) -> str:
    """The path of a config: of a file, or where that is a bare name, of the one of this name in a task's folder.

    Raises:
        UserError: neither a file nor such a name.
    """
    if Path(config).name != config or Path(config).suffix or Path(config).is_file():
        return config
    if not (path := folder / f"{config}.yaml").is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml"))) or f"none in {folder}"
        raise UserError(f"--config {config} is neither a file nor the name of one of this task's configs: {known}")
    return str(path)


def parse_args(
    task: str,
    description: str,
    uses: tuple[str, ...],
    configs: Path,
    argv: list[str] | None = None,
    prog: str | None = None,
) -> tuple[CN, argparse.Namespace]:
    """Read the command line of a task's training: ``--config FILE --dry_run KEY VALUE ...``.

    Args:
        task: its name.
        description: for ``--help``.
        uses: of the keys that not every task uses, those that this one does, or how they begin.
        configs: the folder of its configs.
        argv, prog: as of argparse.

    Raises:
        UserError: as `find_config` and `load_config`; a key is set that the task does not use.
    """
    parser = argparse.ArgumentParser(prog, description=description, formatter_class=RawDescriptionHelpFormatter)
    parser._negative_number_matcher = re.compile("-[0-9.in]", re.IGNORECASE)  # -1e-4 and -inf are values, too
    known = ", ".join(sorted(path.stem for path in configs.glob("*.yaml")))
    parser.add_argument("--config", default="dgunet", help=f"YAML file, or one of {known} (default: dgunet)")
    parser.add_argument("--dry_run", action="store_true", help="say what would be done, then stop")
    parser.add_argument("--help_config", action="store_true", help="list this task's config keys, then stop")
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="config keys to override, OPTIM.BATCH_SIZE 8")
    args = parser.parse_intermixed_args(argv)
    if args.help_config:
        print(describe_keys(uses))
        parser.exit()
    cfg = load_config(find_config(args.config, configs), args.options)
    for key in changed_keys(cfg, _C):
        if key.startswith(_NOT_EVERYWHERE) and not key.startswith(uses):
            known = " and ".join(uses)
            raise UserError(f"{key} does nothing in {task.replace('_', ' ')}, which uses {known}; leave it out")
    return cfg, args


def describe_keys(uses: tuple[str, ...] = _NOT_EVERYWHERE) -> str:
    """Every config key with its default, its allowed values, and what the comments in this file say of it.

    Args:
        uses: of the keys that not every task uses, those to list, or how they begin.
    """
    lines, above = [], []
    for line in inspect.getsource(sys.modules[__name__]).splitlines():
        found = re.match(r'_key\("([\w.]+)".*?\)(?:  # (.*))?$', line)
        if found and (not found[1].startswith(_NOT_EVERYWHERE) or found[1].startswith(uses)):
            default, allowed = _declared(found[1]), _RANGES.get(found[1])
            lines.append(f"{found[1]} {dict(default) if isinstance(default, CN) else default!r}")
            if allowed is not None:
                lines[-1] += f"  ({(' to ' if isinstance(allowed, tuple) else ', ').join(map(str, allowed))})"
            text = " ".join([*above, found[2] or ""])
            lines += textwrap.wrap(text, 100, initial_indent="    ", subsequent_indent="    ")
        above = [*above, line[2:]] if line.startswith("# ") else []
    return "\n".join(lines)


def _flatten(node: dict, declared: dict | None = None, prefix: str = ""):
    """Yields (dotted key, value) of the leaves; a dict where ``declared`` has a value is that key's value."""
    for key, value in node.items():
        name = f"{prefix}{key}"
        known = declared.get(key) if isinstance(declared, dict) else None
        if isinstance(value, dict) and (declared is None or known is None or isinstance(known, dict)):
            yield from _flatten(value, known if declared is not None else None, f"{name}.")
        else:
            yield name, value


# What LOSS.TERMS replaces.
_LOSS_KEYS = [f"LOSS.{name.upper()}" for name in LOSSES]

# What MODEL.OVERRIDES may change: how many channels there are, and their degradation, is up to the data; parts of the
# user's own have keys.
_ARGUMENTS = {
    name: parameter.default
    for name, parameter in inspect.signature(DGUNet).parameters.items()
    if name not in ("channels", "degradation", "checkpointing", *FACTORIES)
}


def _declared(key: str):
    """A value of the type that a key takes, () for a range, a CN for a section, None where there is no such key."""
    *sections, leaf = _split(key)
    if sections == ["MODEL", "OVERRIDES"]:
        return _ARGUMENTS.get(leaf)
    if sections == ["LOSS", "TERMS"]:
        return 1.0 if leaf in LOSSES or is_object_name(leaf) else None
    if sections == ["TRAINING", "PAIRS"]:
        return "" if leaf in ("input", "target") else None
    if sections == ["SYNTHESIS", "OPTIONS"]:
        return True if leaf == "clip" else () if key in _RANGES else None
    node = _C
    for section in (*sections, leaf):
        node = node.get(section) if isinstance(node, CN) else None
    return node


def _split(key: str) -> list[str]:
    """The parts of a dotted key; the name of a loss may have dots itself."""
    terms = "LOSS.TERMS."
    return ["LOSS", "TERMS", key.removeprefix(terms)] if key.startswith(terms) else key.split(".")


def _assign(cfg: CN, key: str, value, source: str):
    declared = _declared(key)
    if isinstance(declared, CN):
        if not isinstance(value, dict):
            raise UserError(f"{source}: {key} is a section, got {_short(value)}; give its keys, {key}.NAME value")
        if key == "LOSS.TERMS":
            cfg.LOSS.TERMS.clear()  # given as a whole, it is the whole loss
        parts = sorted(_flatten(value), key=lambda part: part[0] != "NAME")
        for name, part in parts:  # MODEL.OVERRIDES "{width: 16}" on the command line
            _assign(cfg, f"{key}.{name}", part, source)
        return
    if key.startswith("SYNTHESIS.OPTIONS.") and is_object_name(cfg.SYNTHESIS.NAME):
        value = _plain(value, key, source)
        _check_text(key, value, source)
        cfg.SYNTHESIS.OPTIONS[key.removeprefix("SYNTHESIS.OPTIONS.")] = value
        return
    if declared is None:
        raise UserError(f"{source}: unknown config key {_shorten(key)}{_hint(key)}")
    node = cfg
    *sections, leaf = _split(key)
    for section in sections:
        node = node[section]
    node[leaf] = _coerce(declared, value, key, source)
    _check_range(key, node[leaf], source)


def _hint(key: str) -> str:
    """What an unknown key was probably meant to be."""
    names = [name for name, _ in _flatten(_C)]
    section, _, leaf = key.rpartition(".")
    if section == "MODEL.OVERRIDES":
        return f"; it takes {', '.join(sorted(_ARGUMENTS))}"
    if section == "TRAINING.PAIRS":
        return "; it takes input and target"
    if key.startswith("LOSS.TERMS."):
        return f"; it takes {', '.join(LOSSES)}, or a loss of your own as module:name"
    key, leaf = key.upper(), leaf.upper()
    # The first key that begins so (OPTIM.LR), the right name in a wrong section, the likeliest, the first of that name.
    guess = [name for name in names if leaf and name.startswith(key)]
    guess += [name for name in names if leaf == name.rsplit(".", 1)[-1]]
    guess += difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    guess += [name for name in names if leaf and name.rsplit(".", 1)[-1].startswith(leaf)]
    return f"; did you mean {guess[0]}?" if guess else "; the keys are listed in dgunet/training/config.py"


def _coerce(default, value, key: str, source: str):
    """Bring a value to the type of the key's default, where nothing is lost by it."""
    if key == "MODEL.RATIO" and not isinstance(value, int | float | str):
        default = ()  # or a range
    kind, given = type(default), type(value)  # isinstance would take True for an int
    values = value if given is list else [value]
    if key == "TRAINING.LOGGERS":
        if all(isinstance(name, str) for name in values):
            return value if value == "auto" else values
    elif given is bool:
        if kind is bool or default == "auto":  # a switch, or one that may be left to us
            return value
    elif kind is bool:
        if key in _RANGES and isinstance(value, str | None):  # a switch of more than two positions
            return value or ""
    elif kind is float and isinstance(value, int | float | str):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)  # YAML takes 1e-4, without a dot, for text
    elif kind is int and (given is int or (given is float and value.is_integer())):
        return int(value)
    elif kind is str and isinstance(value, str | int | float | None):
        return "" if value is None else str(value)
    elif kind is list and default and type(default[0]) is float:
        numbers = value if given is list else [value] * len(default)
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if len(numbers) == len(default) and bool not in map(type, numbers):
                return [float(number) for number in numbers]
    elif kind is list:
        if all(type(number) is int for number in values):
            return values
    elif kind is tuple:
        ends = value if given is list and len(value) == 2 else [value, value]
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            lowest, highest = (float(end) for end in ends if type(end) is not bool)
            if not lowest > highest:
                return [lowest, highest]
    expected = {
        str: "text", int: "a whole number", float: "a number", bool: "True or False",
        list: "two numbers" if default else "a list of whole numbers", tuple: "a number or a range, [LOWEST, HIGHEST]",
    }  # fmt: skip
    if key == "TRAINING.LOGGERS":
        expected[str] = "auto or a list of names"
    raise UserError(f"{source}: {key} must be {expected[kind]}, got {_short(value)}")


def _plain(value, key: str, source: str):
    """An option of a user's own function as it is: a number, text, a switch, or a list of them."""
    if type(value) is list:
        return [_plain(part, key, source) for part in value]
    if type(value) is str and re.fullmatch(r"[-+]?[0-9.]+e[-+]?[0-9]+", value, re.IGNORECASE):
        with contextlib.suppress(ValueError):
            return float(value)  # YAML takes 1e-4, without a dot, for text
    if not isinstance(value, str | int | float | bool | None):
        raise UserError(f"{source}: {key} must be a number, text, a switch or a list of them, got {_short(value)}")
    return value


def _check_range(key: str, value, source: str):
    """Raise a UserError where a value of the right type is out of its range."""
    allowed = _RANGES.get("LOSS.MSE" if key.startswith("LOSS.TERMS.") else key)
    own = isinstance(allowed, list) and _OWN in allowed and is_object_name(value)
    if isinstance(allowed, list) and value not in allowed and not own:
        raise UserError(f"{source}: {key} is {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}, got {_short(value)}")
    if isinstance(allowed, tuple):
        lowest, highest = allowed
        for number in value if isinstance(value, list) else [value]:
            if not lowest <= number <= highest:  # nor is NaN
                raise UserError(f"{source}: {key} must be from {lowest} to {highest}, got {_short(number)}")
    if key == "GPU" and len(set(value)) < len(value):
        raise UserError(f"{source}: GPU lists one twice, got {_short(value)}; each is used by one process")
    if key == "TRAINING.VAL_PS" and 0 < value < MULTIPLE:
        raise UserError(f"{source}: {key} must be 0 (whole images) or at least {MULTIPLE}, got {value}")
    if key == "MODEL.BLOCK" and value % MULTIPLE:
        raise UserError(f"{source}: {key} must be a multiple of {MULTIPLE}, got {value}")
    _check_text(key, value, source)
    if key == "MODEL.SESSION" and (value in ("", ".", "..") or {*value} & {*"/\\"} or len(value.encode()) > 200):
        raise UserError(
            f"{source}: {key} is the name of one folder in TRAINING.SAVE_DIR, without slashes and of at most 200 "
            f"bytes, got {_short(value)}"
        )


def _check_text(key: str, value, source: str):
    if isinstance(value, str):
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value):
            raise UserError(f"{source}: {key} must be text without control characters, in UTF-8, got {_short(value)}")
        if len(value.encode()) > 4000 or any(len(name.encode()) > 255 for name in value.split("/")):
            raise UserError(f"{source}: {key} is longer than names of files can be, got {_short(value)}")


def _shorten(text: str, length: int = 100) -> str:
    """A user's text on one line."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."


def _short(value) -> str:
    """``repr``, on one line that can be read."""
    return _shorten(repr(value))

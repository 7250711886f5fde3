"""The configuration of a training run: defaults, then a YAML file, then the command line.

Every key is declared here once, with what it means; a key that is not declared is an error. Relative paths are
relative to the current folder.
"""

import argparse
import datetime
import difflib
from pathlib import Path

import yaml
from yacs.config import CfgNode as CN

from dgunet.errors import UserError

_C = CN()
_C.SEED = 1234  # of everything random
_C.DEVICE = "auto"  # auto (GPUs where there are any), cuda, cpu
_C.GPU = []  # which GPUs to use, e.g. [0, 1]; empty: all that are visible
_C.PROCESSES = 0  # 0: one for each GPU, one on the CPU; more on the CPU run over gloo

_C.MODEL = CN()
_C.MODEL.NAME = "deblurring_dgunet"  # see dgunet.list_models()
_C.MODEL.SESSION = "DGUNet"  # name of the run: its files go to TRAINING.SAVE_DIR/SESSION
_C.MODEL.OVERRIDES = CN(new_allowed=True)  # arguments of DGUNet that differ from the paper's, e.g. {width: 16}
_C.MODEL.RATIO = 0.25  # compressive sensing: measurements per pixel
_C.MODEL.MATRIX = "learned"  # compressive sensing: learned (with the network) or fixed
# What the matrix starts from, or stays: xavier, orthonormal (Gaussian), dct (lowest frequencies), pca (principal
# components of training blocks), or a .npy file, which sets the ratio. Empty: xavier if learned, orthonormal if fixed.
# The matrix of MODEL.WEIGHTS comes before it, unless it is of another ratio.
_C.MODEL.MATRIX_START = ""
_C.MODEL.WEIGHTS = ""  # checkpoint whose weights to start from (ours or the authors'); empty: from scratch

_C.OPTIM = CN()
_C.OPTIM.BATCH_SIZE = 16  # total over all processes and accumulation steps
_C.OPTIM.NUM_EPOCHS = 3000
_C.OPTIM.LR_INITIAL = 1e-4
_C.OPTIM.LR_MIN = 1e-6  # reached in the last epoch
_C.OPTIM.WARMUP_EPOCHS = 3  # in epoch e of them the rate is LR_INITIAL * e / WARMUP_EPOCHS
_C.OPTIM.SCHEDULE = "cosine"  # after the warm-up: cosine, constant, or step
_C.OPTIM.COSINE_EXTRA_EPOCHS = 0  # lengthens the cosine beyond the last epoch (the original's denoising: 40)
_C.OPTIM.LR_MILESTONES = []  # step: epochs after which the rate is multiplied by LR_DECAY
_C.OPTIM.LR_DECAY = 0.5
_C.OPTIM.WEIGHT_DECAY = 0.0  # Adam's (L2)
_C.OPTIM.ACCUMULATE = 1  # split each batch into this many forward/backward passes
_C.OPTIM.CLIP_NORM = 0.0  # largest norm of the gradient; 0: no clipping
_C.OPTIM.EMA_DECAY = 0.0  # e.g. 0.999: validate and test an exponential moving average of the weights; 0: off
_C.OPTIM.MAX_BAD_STEPS = 50  # steps in a row with a non-finite loss or gradient before the run gives up

_C.LOSS = CN()  # weights of the losses, summed over all stages
_C.LOSS.CHARBONNIER = 1.0
_C.LOSS.EDGE = 0.0
_C.LOSS.MSE = 0.0
_C.LOSS.CLAMP = False  # clamp the estimates to [0, 1] before the loss

_C.TRAINING = CN()
_C.TRAINING.TRAIN_DIR = ""  # folder with input/ and target/
_C.TRAINING.VAL_DIR = ""  # the same for validation; empty: VAL_HOLD_BACK of TRAIN_DIR
_C.TRAINING.VAL_HOLD_BACK = 32  # without VAL_DIR: so many, the last by name, are not trained on but validated with
_C.TRAINING.SAVE_DIR = "checkpoints"
_C.TRAINING.RESUME = False  # continue SAVE_DIR/SESSION where it stopped
_C.TRAINING.TRAIN_PS = 256  # side of the random training crops, pixels
_C.TRAINING.VAL_PS = 256  # side of the central validation crops; 0: whole pictures
_C.TRAINING.REPEAT = 1  # how often a picture counts in an epoch (each time with another crop)
_C.TRAINING.VAL_AFTER_EVERY = 1  # epochs
_C.TRAINING.VAL_TIMES = 1  # validations in such an epoch, evenly spaced
_C.TRAINING.VAL_EPOCHS = []  # if given, validate in these epochs (and from VAL_FROM_EPOCH on) only
_C.TRAINING.VAL_FROM_EPOCH = 0
_C.TRAINING.SAVE_EACH_VALIDATION = True  # keep the weights of every validation as model_epoch_N.pth
_C.TRAINING.SAVE_MINUTES = 15.0  # model_latest.pth is also written this often within an epoch
_C.TRAINING.WORKERS = 4  # data loading processes of each training process

_C.SYNTHESIS = CN()
# Degrade clean pictures while training, by a function of dgunet/synthesis.py: gaussian_noise, sensor_noise,
# rain_streaks, added_rain, motion_blur. TRAIN_DIR is then a folder of clean pictures. Empty: train on pairs.
_C.SYNTHESIS.NAME = ""
_C.SYNTHESIS.OPTIONS = CN(new_allowed=True)  # its arguments that differ from their defaults, e.g. {sigma: [0, 50]}

_C.AUGMENT = CN()
_C.AUGMENT.FLIP = True  # random flips and rotations by 90 degrees (compressive sensing: flips and transposition)
_C.AUGMENT.SATURATION = 0.0  # s: a third of the pairs gets its saturation scaled by U(1 - s, 1 + s); 0: off
_C.AUGMENT.MIXUP = 0.0  # alpha of the Beta distribution that mixes two pairs (denoising: 0.6); 0: off
_C.AUGMENT.MIXUP_FROM_EPOCH = 6

_C.SPEED = CN()
_C.SPEED.AMP = "auto"  # bf16, fp32, or auto: bf16 where the hardware computes it
_C.SPEED.CHANNELS_LAST = "auto"  # memory format: True, False (NCHW), or auto: whichever trains faster on the hardware
_C.SPEED.COMPILE = False  # torch.compile: faster after a minute or more of compiling
_C.SPEED.COMPILE_MODE = "default"  # its mode; reduce-overhead runs CUDA graphs, which helps small networks and crops
_C.SPEED.CHECKPOINTING = False  # recompute each stage in the backward pass: much less memory, a third more time


def load_config(path: str | Path | None = None, options: list[str] = ()) -> CN:
    """Defaults, overridden by a YAML file, overridden by ``KEY VALUE`` pairs; frozen.

    Raises:
        UserError: no such file, not YAML, an unknown key (with the likeliest right one), a value of a wrong type.
    """
    cfg = _C.clone()
    if path is not None:
        try:
            content = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise UserError(f"cannot read the config {path}: {error.strerror}; see configs/") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict | None):
            raise UserError(f"{path} is not a config: it should hold KEY: value lines, see configs/")
        for key, value in _flatten(content or {}, cfg):
            if value is None and isinstance(cfg.get(key), CN):
                continue  # a section with nothing in it
            _assign(cfg, key, value, source=str(path))
    if len(options) % 2:
        raise UserError(f"options come in pairs, KEY VALUE, as in OPTIM.BATCH_SIZE 8; got {' '.join(options)}")
    for key, text in zip(options[::2], options[1::2], strict=True):
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        if isinstance(value, datetime.date):  # 2026-01-05 may well be the name of a run
            value = text
        _assign(cfg, key, value, source="command line")
    cfg.freeze()
    return cfg


def changed_keys(cfg: CN, other: CN) -> list[str]:
    """Dotted names of the keys in which two configs differ; what one of them does not know has its default there."""
    mine, theirs, known = (dict(_flatten(config)) for config in (cfg, other, _C))
    default = known.get
    return [key for key in mine | theirs if mine.get(key, default(key)) != theirs.get(key, default(key))]


def format_config(cfg: CN) -> str:
    """The whole config as YAML, keys that differ from the defaults marked with ``# *``."""
    changed = set(changed_keys(cfg, _C))
    lines, path = [], []
    for line in cfg.dump(default_flow_style=False, sort_keys=False, width=float("inf")).splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        path = path[:depth] + [line.strip().split(":")[0]]
        lines.append(line + ("  # *" if ".".join(path) in changed else ""))
    return "\n".join(lines)


def parse_args(description: str, default_config: str) -> tuple[CN, argparse.Namespace]:
    """Read the command line of a ``train.py``: ``--config FILE --dry_run KEY VALUE ...``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[1]
    default = root / "configs" / default_config
    parser.add_argument("--config", default=str(default), help=f"YAML file (default: configs/{default_config})")
    parser.add_argument("--dry_run", action="store_true", help="say what would be done, then stop")
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="config keys to override, OPTIM.BATCH_SIZE 8")
    args = parser.parse_intermixed_args()
    return load_config(args.config, args.options), args


def _flatten(node: dict, declared: dict | None = None, prefix: str = ""):
    """Yields (dotted key, value) of the leaves; a dict where ``declared`` has a value is that key's value."""
    for key, value in node.items():
        name = f"{prefix}{key}"
        known = declared.get(key) if isinstance(declared, dict) else None
        if isinstance(value, dict) and (declared is None or known is None or isinstance(known, dict)):
            yield from _flatten(value, known if declared is not None else None, f"{name}.")
        else:
            yield name, value


def _assign(cfg: CN, key: str, value, source: str):
    *sections, leaf = key.split(".")
    node = cfg
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
    if isinstance(node, CN) and leaf not in node and node.is_new_allowed():
        node[leaf] = value
        return
    if isinstance(node, CN) and isinstance(value, dict) and isinstance(node.get(leaf), CN):
        for name, part in value.items():  # MODEL.OVERRIDES "{width: 16}" on the command line
            _assign(cfg, f"{key}.{name}", part, source)
        return
    if not isinstance(node, CN) or leaf not in node or isinstance(node[leaf], CN):
        names = [name for name, _ in _flatten(_C)]
        guess = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        if not guess:  # perhaps the right name in the wrong section
            guess = [name for name in names if name.rsplit(".", 1)[-1] == leaf.upper()]
        hint = f"; did you mean {guess[0]}?" if guess else "; the keys are listed in dgunet/config.py"
        raise UserError(f"{source}: unknown config key {key}{hint}")
    node[leaf] = _coerce(node[leaf], value, key, source)


def _coerce(default, value, key: str, source: str):
    """Bring a value to the type of the key's default, where nothing is lost by it."""
    if (_is(bool, default) or default == "auto") and _is(bool, value):  # a switch, or one that may be left to us
        return value
    if isinstance(default, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML takes 1e-4, without a dot, for text
        except ValueError:
            pass
    if _is(int, default) and isinstance(value, float) and value.is_integer():
        return int(value)
    if _is(int, default) and _is(int, value):
        return value
    if isinstance(default, str) and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(default, str) and value is None:
        return ""
    if isinstance(default, list) and isinstance(value, list | tuple):
        return list(value)
    if isinstance(default, list) and _is(int, value):
        return [value]
    kind = {"str": "text", "int": "a whole number", "float": "a number", "bool": "True or False", "list": "a list"}
    raise UserError(f"{source}: {key} must be {kind[type(default).__name__]}, got {value!r}")


def _is(kind: type, value) -> bool:
    return type(value) is kind  # isinstance would take True for an int

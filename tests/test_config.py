"""Configuration: defaults, then YAML, then the command line; and every mistake in one line."""

import collections
import dataclasses
import inspect
import random
import re
from pathlib import Path

import pytest
import torch
import yaml

import dgunet.training.cli
from dgunet import DGUNet, UserError
from dgunet.data.synthesis import DEGRADATIONS
from dgunet.model.variants import VARIANTS
from dgunet.runtime import distributed
from dgunet.tasks import find_task
from dgunet.training.cli import train_command
from dgunet.training.config import _RANGES, changed_keys, format_config, load_config
from dgunet.training.losses import LOSSES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def leaves(node, prefix="") -> dict:
    """{dotted key: value} of a config."""
    found = {}
    for key, value in node.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def refusal(path=None, options=()) -> str:
    with pytest.raises(UserError) as error:
        load_config(path, list(options))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_command_line_over_file_over_defaults(yaml_file):
    path = yaml_file("OPTIM:\n  BATCH_SIZE: 8\n  NUM_EPOCHS: 20\n")
    cfg = load_config(path, ["OPTIM.BATCH_SIZE", "4"])
    assert (cfg.OPTIM.BATCH_SIZE, cfg.OPTIM.NUM_EPOCHS, cfg.OPTIM.LR_INITIAL) == (4, 20, 1e-4)
    assert load_config().OPTIM.BATCH_SIZE == 16  # the defaults are left alone


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        load_config().OPTIM.BATCH_SIZE = 1


def test_dotted_keys_and_empty_files(yaml_file):
    assert load_config(yaml_file("OPTIM.BATCH_SIZE: 8\n")).OPTIM.BATCH_SIZE == 8
    assert load_config(yaml_file("# nothing\n")) == load_config()
    assert load_config(yaml_file("OPTIM:\n  # BATCH_SIZE: 8\nMODEL:\n  SESSION: a\n")).MODEL.SESSION == "a"


@pytest.mark.parametrize(
    ("key", "guess"),
    [
        ("OPTIM.LR_INTIAL", "OPTIM.LR_INITIAL"),
        ("optim.batch_size", "OPTIM.BATCH_SIZE"),
        ("TRAINING.BATCH_SIZE", "OPTIM.BATCH_SIZE"),
        ("BATCH_SIZE", "OPTIM.BATCH_SIZE"),
        ("OPTIM.TRAIN_DIR", "TRAINING.TRAIN_DIR"),
        ("OPTIM.BATCH_SIZE.X", "OPTIM.BATCH_SIZE"),
        ("SEEDS", "SEED"),
        ("OPTIM.LR", "OPTIM.LR_INITIAL"),
        ("LR", "OPTIM.LR_INITIAL"),
        ("OPTIM.lr", "OPTIM.LR_INITIAL"),
        ("TRAIN_DIR", "TRAINING.TRAIN_DIR"),
    ],
)
def test_unknown_key_suggests_the_right_one(yaml_file, key, guess):
    assert refusal(None, [key, "1"]).endswith(f"unknown config key {key}; did you mean {guess}?")
    path = yaml_file(f"{key}: 1\n")
    assert refusal(path).startswith(f"{path}: unknown config key {key}; did you mean {guess}?")


def test_unknown_key_like_no_other():
    assert "the keys are listed in dgunet/training/config.py" in refusal(None, ["ZZZZZZ", "1"])


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("OPTIM.LR_INITIAL", "1e-4", 1e-4),  # text to YAML
        ("OPTIM.LR_INITIAL", "1", 1.0),
        ("OPTIM.NUM_EPOCHS", "10.0", 10),
        ("LOSS.CLAMP", "true", True),
        ("LOSS.CLAMP", "False", False),
        ("TRAINING.RESUME", "auto", "auto"),
        ("TRAINING.RESUME", "True", True),
        ("MODEL.RATIO", "0.1", 0.1),
        ("MODEL.RATIO", "[0.01, 0.5]", [0.01, 0.5]),
        ("MODEL.RATIO", "[1e-2, 1]", [0.01, 1.0]),
        ("GPU", "[0, 1]", [0, 1]),
        ("GPU", "1", [1]),
        ("MODEL.SESSION", "7", "7"),
        ("MODEL.SESSION", "007", "007"),  # an octal number to YAML
        ("MODEL.SESSION", "1:30", "1:30"),  # and a sexagesimal one
        ("MODEL.SESSION", "2026-01-05", "2026-01-05"),
        ("MODEL.SESSION", "a: b: c", "a: b: c"),
        ("MODEL.WEIGHTS", "", ""),
    ],
)
def test_values_are_brought_to_their_type(key, text, value):
    found = leaves(load_config(None, [key, text]))[key]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("key", "text", "kind"),
    [
        ("OPTIM.BATCH_SIZE", "eight", "a whole number"),
        ("OPTIM.BATCH_SIZE", "8.5", "a whole number"),
        ("OPTIM.BATCH_SIZE", "True", "a whole number"),
        ("OPTIM.BATCH_SIZE", "[8]", "a whole number"),
        ("OPTIM.LR_INITIAL", "fast", "a number"),
        ("OPTIM.LR_INITIAL", "True", "a number"),
        ("LOSS.CLAMP", "1", "True or False"),
        ("LOSS.CLAMP", "maybe", "True or False"),
        ("MODEL.NAME", "[a]", "text"),
        ("MODEL.NAME", "True", "text"),
        ("GPU", "all", "a list of whole numbers"),
        ("GPU", "[0, a]", "a list of whole numbers"),
        ("GPU", "[true]", "a list of whole numbers"),
        ("OPTIM.LR_MILESTONES", "[60, 1.5]", "a list of whole numbers"),
        ("MODEL.OVERRIDES.width", "wide", "a whole number"),
        ("MODEL.OVERRIDES.shared", "0", "True or False"),
        ("OPTIM.LR_INITIAL", "1" + "0" * 400, "a number"),
        ("MODEL.RATIO", "half", "a number"),
        ("MODEL.RATIO", "[0.5, 0.01]", "a number or a range, [LOWEST, HIGHEST]"),
        ("MODEL.RATIO", "[0.1, 0.2, 0.3]", "a number or a range, [LOWEST, HIGHEST]"),
    ],
)
def test_wrong_type(yaml_file, key, text, kind):
    assert f"command line: {key} must be {kind}, got" in refusal(None, [key, text])
    assert f"{key} must be {kind}, got" in refusal(yaml_file(f"{key}: {text}\n"))


@pytest.mark.parametrize("text", ["OPTIM: [1", "a: b: c\n", "\tOPTIM: 1"])
def test_broken_yaml(yaml_file, text):
    path = yaml_file(text)
    assert refusal(path).startswith(f"{path} is not valid YAML")


@pytest.mark.parametrize("text", ["just words\n", "- a\n- b\n"])
def test_yaml_that_is_no_config(yaml_file, text):
    assert "should hold KEY: value lines" in refusal(yaml_file(text))


def test_binary_file(tmp_path):
    (tmp_path / "a.yaml").write_bytes(bytes(range(256)))
    assert "is not valid YAML" in refusal(tmp_path / "a.yaml")


def test_missing_file_and_folder(tmp_path):
    assert f"cannot read the config {tmp_path / 'a.yaml'}: No such file" in refusal(tmp_path / "a.yaml")
    assert f"cannot read the config {tmp_path}" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("OPTIM: {BATCH_SIZE: 8}\nSEED: 1\nOPTIM: {NUM_EPOCHS: 3}\n", "OPTIM is given twice"),
        ("OPTIM:\n  BATCH_SIZE: 8\n  BATCH_SIZE: 4\n", "BATCH_SIZE is given twice"),
        ("OPTIM: {BATCH_SIZE: 8}\nOPTIM.BATCH_SIZE: 4\n", "OPTIM.BATCH_SIZE is given twice"),
        ("MODEL: {OVERRIDES: {width: 8, width: 16}}\n", "width is given twice"),
        ("OPTIM: &a\n  BATCH_SIZE: *a\n", "no aliases"),
        ("&a [*a]", "no aliases"),
        ("SEED: &a [1, 1]\nGPU: &b [*a, *a]\n", "no aliases"),
        ("SEED: " + "[" * 5000, "not valid YAML"),
        ("SEED: " + "{a: " * 5000, "not valid YAML"),
        ("MODEL.SESSION: 2026-13-45\n", "not valid YAML"),  # a date for YAML, if an impossible one
        ("SEED: " + "9" * 5000, "not valid YAML"),
        ("SEED: " + "9" * 400, "SEED must be from 0 to 4294967295, got 999"),
        ("? [a, b]\n: 1\n", "not valid YAML"),
        ("? {a: b}\n: 1\n", "not valid YAML"),
        ("!!map x", "not valid YAML"),
        ("<<: {SEED: 1}\n", ""),
        ("!!python/object/apply:os.getpid []", "not valid YAML"),
        ("SEED: !!binary aGVsbG8=\n", "SEED must be a whole number"),
        ('"a\\nb": 1\n', "unknown config key a b"),
        ("OPTIM: 5\n", "OPTIM is a section, got 5"),
        ("MODEL: {OVERRIDES: [8]}\n", "MODEL.OVERRIDES is a section"),
        ("MODEL: {OVERRIDES: {wdith: 8}}\n", "it takes attention, final_fusion"),
        ("MODEL: {OVERRIDES: {width: {a: 8}}}\n", "unknown config key MODEL.OVERRIDES.width.a"),
        ("OPTIM.: 5\n", "unknown config key OPTIM."),
        ("1: 5\n", "unknown config key 1"),
        ("a" * 10**6, "not a config"),
        ("a: " + "b" * 2**21, "not a config"),
        ("SEED: " + "ab" * 10000, "SEED must be a whole number"),
    ],
    ids=lambda text: text[:30],
)
def test_yaml_that_python_could_stumble_over(yaml_file, text, message):
    said = refusal(yaml_file(text))
    assert message in said and len(said) < 700


def test_empty_sections_of_every_depth(yaml_file):
    assert load_config(yaml_file("OPTIM:\nMODEL:\n  OVERRIDES:\n")) == load_config()


def test_odd_number_of_options():
    assert "options come in pairs" in refusal(None, ["OPTIM.BATCH_SIZE"])


def test_model_overrides_are_free(yaml_file):
    path = yaml_file("MODEL:\n  OVERRIDES: {width: 16, fusion: concat}\n")
    cfg = load_config(path, ["MODEL.OVERRIDES.width", "8", "MODEL.OVERRIDES.shared", "False"])
    assert dict(cfg.MODEL.OVERRIDES) == {"width": 8, "fusion": "concat", "shared": False}


CHANGES = [
    [],
    ["OPTIM.BATCH_SIZE", "8", "LOSS.CLAMP", "True"],
    ["GPU", "[0, 1]", "TRAINING.VAL_EPOCHS", "[1, 25]", "MODEL.OVERRIDES.width", "8"],
    ["MODEL.SESSION", "'#1: a'", "OPTIM.LR_MIN", "1e-7"],
    ["TRAINING.TRAIN_DIR", "/data/" + "a folder with spaces in its name " * 4 + "/train"],
]


def test_key_that_an_older_config_lacks_has_its_default_there():
    cfg, older = load_config(), load_config(None, ["SEED", "5"])
    older.defrost()
    del older.SPEED["COMPILE_MODE"]
    assert changed_keys(cfg, older) == ["SEED"]
    assert changed_keys(load_config(None, ["SPEED.COMPILE_MODE", "max-autotune"]), older) == [
        "SEED",
        "SPEED.COMPILE_MODE",
    ]


@pytest.mark.parametrize("options", CHANGES)
def test_formatted_config_marks_changes_and_loads_again(yaml_file, options):
    cfg = load_config(None, options)
    text = format_config(cfg)
    assert load_config(yaml_file(text)) == cfg
    assert changed_keys(cfg, load_config()) == [key for key in leaves(cfg) if key in options[::2]]
    marked = [line.split(":")[0].strip() for line in text.splitlines() if line.endswith("# *")]
    assert sorted(marked) == sorted(key.rsplit(".", 1)[1] if "." in key else key for key in options[::2])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_shipped_configs_load(path):
    cfg = load_config(path)
    assert changed_keys(cfg, load_config())
    assert path.read_text().startswith("# ")


# ---------------------------------------------------------------------------------------------------------- ranges

DECLARED = leaves(load_config())
DECLARED |= {
    f"{section}.{name}": parameter.default
    for section, functions in (("MODEL.OVERRIDES", [DGUNet]), ("SYNTHESIS.OPTIONS", DEGRADATIONS.values()))
    for function in functions
    for name, parameter in inspect.signature(function).parameters.items()
    if name not in ("channels", "degradation", "checkpointing", "layers", "image", "rng")
}
NUMBERS = {
    key: default
    for key, default in DECLARED.items()
    if isinstance(default, int | float | list | tuple) and not isinstance(default, bool)
}


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_a_range(yaml_file, key):
    """And its ends are taken, what is beyond them, NaN and infinity are not."""
    lowest, highest = _RANGES[key]
    for value in (lowest, highest):
        words = [key, str(value), "OPTIM.SCHEDULE", "constant"]
        assert leaves(load_config(None, words))[key] in (value, [value], [value, value])
    for value in (lowest - 1, highest + 1, 10**400, -(10**400), ".nan", ".inf", "-.inf", "1e999"):
        said = refusal(None, [key, str(value)])
        assert said.startswith(f"command line: {key} must be") and len(said) < 200
        assert f"{key} must be" in refusal(yaml_file(f"{key}: [{value}]\n"))


@pytest.mark.parametrize("key", [key for key, allowed in _RANGES.items() if isinstance(allowed, list)])
def test_every_choice(key):
    *others, last = map(str, _RANGES[key])
    for choice in _RANGES[key]:
        assert leaves(load_config(None, [key, str(choice)]))[key] == choice
    assert f"{key} is {', '.join(others)} or {last}, got 'neither'" in refusal(None, [key, "neither"])
    assert f"{key} is {others[0]}" in refusal(None, [key, ""])


@pytest.mark.parametrize("block", [12, 33, 127])
def test_blocks_are_of_whole_units(block):
    assert f"MODEL.BLOCK must be a multiple of 8, got {block}" in refusal(None, ["MODEL.BLOCK", str(block)])


def test_only_one_key_may_be_negative():
    lowest = {key: allowed[0] for key, allowed in _RANGES.items() if isinstance(allowed, tuple)}
    assert {key for key, least in lowest.items() if least < 0} == {"OPTIM.COSINE_EXTRA_EPOCHS"}


def test_every_range_is_of_a_key():
    assert _RANGES.keys() <= DECLARED.keys()


@pytest.mark.parametrize(
    "name", ["..", ".", "", "a/b", "/tmp/a", "../a", "a\\b", "a\0b", '"a\\nb"', "a\udcffb", "é" * 101]
)
def test_session_is_the_name_of_a_folder(name):
    said = refusal(None, ["MODEL.SESSION", name])
    assert "MODEL.SESSION" in said and ("the name of one folder" in said or "without control characters" in said)


@pytest.mark.parametrize("key", [key for key, default in leaves(load_config()).items() if default == ""])
def test_text_that_no_path_can_hold(key):
    assert f"{key} must be text without control characters" in refusal(None, [key, "a\0b"])
    assert f"{key} is longer than names of files can be" in refusal(None, [key, "a/" + "é" * 128])
    assert f"{key} is longer than names of files can be" in refusal(None, [key, "a/" * 2001])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["GPU", "[0, 0]"], "GPU lists one twice"),
        (["GPU", "[-1]"], "GPU must be from 0"),
        (["TRAINING.VAL_PS", "7"], "0 (whole images) or at least 8"),
        (["OPTIM.LR_INITIAL", "1e-7"], "OPTIM.LR_MIN 1e-06 is above OPTIM.LR_INITIAL 1e-07"),
        (["OPTIM.LR_MILESTONES", "[60, 0]"], "OPTIM.LR_MILESTONES must be from 1"),
        (["MODEL.OVERRIDES", "{stages: 1000000000}"], "MODEL.OVERRIDES.stages must be from 1 to 100, got 1000000000"),
        (["SYNTHESIS.OPTIONS", "{sigma: [50, 0]}"], "SYNTHESIS.OPTIONS.sigma must be a number or a range"),
        (["SYNTHESIS.OPTIONS.sigma", "[0, 50, 100]"], "SYNTHESIS.OPTIONS.sigma must be a number or a range"),
        (["SYNTHESIS.OPTIONS.sigma", "[0, 500]"], "SYNTHESIS.OPTIONS.sigma must be from 0 to 255, got 500"),
        (["SYNTHESIS.OPTIONS.clip", "0"], "SYNTHESIS.OPTIONS.clip must be True or False"),
        (["SYNTHESIS.OPTIONS.layers", "[]"], "unknown config key SYNTHESIS.OPTIONS.layers"),
        (["MODEL.OVERRIDES.channels", "4"], "unknown config key MODEL.OVERRIDES.channels"),  # the data's
        (["MODEL.OVERRIDES.degradation", "4"], "unknown config key MODEL.OVERRIDES.degradation"),
        (["MODEL.OVERRIDES.checkpointing", "True"], "unknown config key MODEL.OVERRIDES.checkpointing"),
    ],
)
def test_out_of_range(options, message):
    assert message in refusal(None, options)


def test_lr_min_matters_only_to_the_cosine():
    assert load_config(None, ["OPTIM.LR_INITIAL", "1e-7", "OPTIM.SCHEDULE", "constant"]).OPTIM.LR_MIN == 1e-6


@pytest.mark.parametrize("key", leaves(load_config()) | {"MODEL.OVERRIDES": None})
def test_every_key_is_read_somewhere(key):
    files = [p for p in (ROOT / "dgunet").rglob("*.py") if p.name != "config.py"]
    files += [p for p in ROOT.glob("[A-Z]*/*.py")]
    leaf = key.rsplit(".", 1)[-1]
    is_loss = key == f"LOSS.{leaf}" and leaf.lower() in LOSSES  # the engine goes through them all
    assert is_loss or any(re.search(rf"\.{leaf}\b", p.read_text()) for p in files), f"nobody reads {key}"


# ---------------------------------------------------------------------------------------------------------- fuzzing

ODD_VALUES = [
    0, 1, -1, 2, 3, 7, 8, 16, 32, 64, 100, 255, 256, 4096, 10**6, 10**9, 2**31, 2**63, -(10**9), 10**30, 0.0, -0.0, 0.1,
    0.5, 1.0, 1.5, 1e-3, 1e-12, 1e-300, 1e30, 1e308, float("nan"), float("inf"), float("-inf"), True, False, None, "",
    " ", ".", "..", "/", "a/b", "\0", "\n", "é", "\udcff", "nan", "1e400", "0x10", "1_000", "auto", "cuda", "cpu",
    "fp32", "bf16", "constant", "step", "cosine", "pca", "dct", "fixed", "concat", "default", [],
    [0], [1, 2], [2, 1], [[1]],
    [None], ["a"], [0.5], [-1], {}, {"a": 1}, {"width": 8}, {"sigma": [0, 9]}, "x" * 300, 16 * "9",
]  # fmt: skip


def write_yaml(values: dict, rng: random.Random) -> str:
    """{dotted key: value} as YAML, in one of the styles that people write."""
    if rng.random() < 0.5:
        return yaml.dump(values, allow_unicode=rng.random() < 0.5, default_flow_style=rng.random() < 0.3)
    tree = {}
    for key, value in values.items():
        node = tree
        *sections, leaf = key.split(".")
        for section in sections:
            node = node.setdefault(section, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node[leaf] = value
    return yaml.dump(tree, default_flow_style=rng.random() < 0.3)


def damage(text: str, rng: random.Random) -> str:
    """The text after some slips of a hand."""
    pieces = ["\t", ":", ": ", "- ", "[", "]", "{", "}", "&a ", "*a", "!!", "<<: ", "#", "'", '"', "|\n", "? ", "%",
              "\0", "\x85", "SEED: 3\n", "OPTIM:\n", "---\n", "é", "\ufeff", "2026-13-01", "1:99"]  # fmt: skip
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(text))
        kind = rng.random()
        if kind < 0.4:
            text = text[:at] + rng.choice(pieces) + text[at:]
        elif kind < 0.7:
            text = text[:at] + text[at + rng.randint(1, 5) :]
        else:  # some lines once more
            lines = text.splitlines(keepends=True)
            some = lines[rng.randint(0, len(lines)) :][: rng.randint(1, 3)]
            text += "".join(some)
    return text


def test_fuzz(tmp_path, image_pairs, fuzz, capsys, monkeypatch):
    """A config is either refused in one line or one that a dry run accepts."""
    image_pairs(tmp_path / "pairs", count=4, size=(40, 48))
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    for name in ("kaiming_uniform_", "uniform_"):  # the largest networks take seconds to draw, and none is run
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    places = {
        "TRAINING.TRAIN_DIR": "pairs",
        "TRAINING.VAL_DIR": "pairs",
        "DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "GPU": [],
    }
    small = {"MODEL.OVERRIDES.width": 8, "MODEL.OVERRIDES.growth": 4, "MODEL.OVERRIDES.stages": 2}
    small |= {"OPTIM.BATCH_SIZE": 4, "TRAINING.VAL_HOLD_BACK": 1, "MODEL.OVERRIDES.final_growth": 4}
    keys, counts = [*DECLARED, "MODEL.OVERRIDES", "SYNTHESIS.OPTIONS", "OPTIM", "NAME", ""], collections.Counter()
    rng = random.Random(0)
    for trial in range(150 * fuzz):
        task = rng.choice(["denoising", "deraining", "deblurring", "compressive_sensing"])
        values = dict(places) | small | {"MODEL.NAME": f"{task}_dgunet"}
        if task == "compressive_sensing":
            values |= {"TRAINING.TRAIN_DIR": "pairs/target", "TRAINING.VAL_DIR": "pairs/target"}
            values |= {"TRAINING.TRAIN_PS": 32, "TRAINING.VAL_PS": 32}
        changed = rng.sample(keys, rng.randint(1, 3))
        for key in changed:
            allowed = _RANGES.get(key)
            ends = [rng.uniform(*allowed), *allowed] if isinstance(allowed, tuple) else allowed or []
            if isinstance(DECLARED.get(key), int) and isinstance(allowed, tuple):
                ends = [round(end) for end in ends]
            values[key] = rng.choice(ODD_VALUES + 40 * ends)
        text = write_yaml(values, rng)
        if rng.random() < 0.3:
            text = damage(text, rng)
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8", errors="surrogateescape")
        words = [str(word) for key in changed for word in (key, values[key])] if rng.random() < 0.3 else []
        words = [word.replace("\0", "\\0") for word in words]  # no command line holds one
        try:
            cfg = load_config("config.yaml", words)
            dry_run(cfg, monkeypatch, words)
            counts["accepted"] += 1
        except UserError as error:
            assert str(error) and len(str(error).splitlines()) == 1 and len(str(error)) < 2000, (trial, text, words)
            counts["refused"] += 1
        except Exception as error:
            raise AssertionError(f"trial {trial}: {words} {text}") from error
    assert min(counts["accepted"], counts["refused"]) > 15 * fuzz
    with capsys.disabled():
        if fuzz > 1:
            print(dict(counts))


def parsed(monkeypatch, task: str, *words):
    """The config that a task's training has from these words."""
    read = []
    monkeypatch.setattr(dgunet.training.cli, "_check_keys", lambda cfg, _: read.append(cfg) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        find_task(task).train([str(word) for word in words])
    return read[0]


@pytest.mark.parametrize(
    "task, key, value",
    [
        ("deraining", "AUGMENT.MIXUP", "0.6"),
        ("deblurring", "AUGMENT.MIXUP_FROM_EPOCH", "3"),
        ("denoising", "AUGMENT.SATURATION", "0.2"),
        ("deblurring", "MODEL.RATIO", "0.1"),
        ("denoising", "MODEL.MATRIX", "fixed"),
        ("deraining", "MODEL.MATRIX_START", "dct"),
        ("denoising", "MODEL.DEGRADATION", "blur"),
        ("compressive_sensing", "MODEL.KERNEL", "a.npy"),
        ("compressive_sensing", "SYNTHESIS.NAME", "gaussian_noise"),
        ("compressive_sensing", "SYNTHESIS.OPTIONS.sigma", "5"),
    ],
)
def test_key_that_the_task_does_not_use_is_refused(monkeypatch, tmp_path, task, key, value):
    told = rf"{key} does nothing in {task.replace('_', ' ')}, which uses .*; leave it out"
    with pytest.raises(UserError, match=told):
        parsed(monkeypatch, task, key, value)
    (tmp_path / "a.yaml").write_text(f"MODEL.NAME: {task}_dgunet\n{key}: {value}\n")
    with pytest.raises(UserError, match=told):
        parsed(monkeypatch, task, "--config", tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_a_complete_config_is_one_of_its_task(monkeypatch, tmp_path, path):
    """As a run writes it: with all keys, those that the task does not use at their defaults."""
    task, cfg = path.parent.name, load_config(path)
    assert VARIANTS[cfg.MODEL.NAME].task == task
    (tmp_path / "config.yaml").write_text(format_config(cfg))
    assert "MIXUP" in (tmp_path / "config.yaml").read_text()
    assert parsed(monkeypatch, task, "--config", tmp_path / "config.yaml") == cfg


def test_dry_run_with_components_of_images_that_are_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("MODEL: {NAME: compressive_sensing_dgunet, MATRIX_START: pca}")
    words = ["TRAINING.TRAIN_DIR", "nowhere", "DEVICE", "cpu"]
    dry_run(load_config("config.yaml", words), monkeypatch, words)
    assert "missing     no folder" in capsys.readouterr().out


def dry_run(cfg, monkeypatch, words: list[str]):
    """As ``train.py --dry_run`` of the config's task, in this process."""
    task = VARIANTS[cfg.MODEL.NAME].task if cfg.MODEL.NAME in VARIANTS else "denoising"
    uses = ("AUGMENT", "MODEL") if task == "compressive_sensing" else ("SYNTHESIS", "AUGMENT", "MODEL")
    monkeypatch.setattr(dgunet.training.cli, "launch", launch_here)
    how = dataclasses.replace(find_task(task).training, uses=uses)
    train_command(task, how, Path(), "", ["--dry_run", "--config", "config.yaml", *words])


def launch_here(function, cfg, *args):
    """`launch` without starting further processes."""
    distributed._count(cfg)
    distributed._run(function, cfg, args, group=False)


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("True", True), ("false", False)])
def test_a_switch_that_may_be_left_to_us(text, value, tmp_path):
    """SPEED.CHANNELS_LAST was a switch once: the configs and checkpoints of that time keep their meaning."""
    cfg = load_config(None, ["SPEED.CHANNELS_LAST", text])
    assert cfg.SPEED.CHANNELS_LAST is value or cfg.SPEED.CHANNELS_LAST == value == "auto"
    (tmp_path / "a.yaml").write_text(format_config(cfg))
    assert load_config(tmp_path / "a.yaml").SPEED.CHANNELS_LAST == value
    assert changed_keys(type(cfg).load_cfg(cfg.dump()), cfg) == []

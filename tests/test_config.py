"""Configuration: defaults, then YAML, then the command line; and every mistake in one line."""

import re
from pathlib import Path

import pytest

from dgunet import UserError
from dgunet.config import changed_keys, format_config, load_config

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
    ],
)
def test_unknown_key_suggests_the_right_one(yaml_file, key, guess):
    assert refusal(None, [key, "1"]).endswith(f"unknown config key {key}; did you mean {guess}?")
    path = yaml_file(f"{key}: 1\n")
    assert refusal(path).startswith(f"{path}: unknown config key {key}; did you mean {guess}?")


def test_unknown_key_like_no_other():
    assert "the keys are listed in dgunet/config.py" in refusal(None, ["ZZZZZZ", "1"])


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("OPTIM.LR_INITIAL", "1e-4", 1e-4),  # text to YAML
        ("OPTIM.LR_INITIAL", "1", 1.0),
        ("OPTIM.NUM_EPOCHS", "10.0", 10),
        ("LOSS.CLAMP", "true", True),
        ("LOSS.CLAMP", "False", False),
        ("GPU", "[0, 1]", [0, 1]),
        ("GPU", "1", [1]),
        ("MODEL.SESSION", "7", "7"),
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
        ("GPU", "all", "a list"),
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
    assert changed_keys(load_config(None, ["SPEED.COMPILE_MODE", "x"]), older) == ["SEED", "SPEED.COMPILE_MODE"]


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


@pytest.mark.parametrize("key", leaves(load_config()) | {"MODEL.OVERRIDES": None})
def test_every_key_is_read_somewhere(key):
    files = [p for p in (ROOT / "dgunet").glob("*.py") if p.name != "config.py"]
    files += [p for p in ROOT.glob("[A-Z]*/*.py")]
    leaf = key.rsplit(".", 1)[-1]
    assert any(re.search(rf"\.{leaf}\b", p.read_text()) for p in files), f"nobody reads {key}"


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("True", True), ("false", False)])
def test_a_switch_that_may_be_left_to_us(text, value, tmp_path):
    """SPEED.CHANNELS_LAST was a switch once: the configs and checkpoints of that time keep their meaning."""
    cfg = load_config(None, ["SPEED.CHANNELS_LAST", text])
    assert cfg.SPEED.CHANNELS_LAST is value or cfg.SPEED.CHANNELS_LAST == value == "auto"
    (tmp_path / "a.yaml").write_text(format_config(cfg))
    assert load_config(tmp_path / "a.yaml").SPEED.CHANNELS_LAST == value
    assert changed_keys(type(cfg).load_cfg(cfg.dump()), cfg) == []

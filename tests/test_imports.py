"""Objects named as module:name."""

import importlib

import pytest

from dgunet.runtime.errors import UserError
from dgunet.runtime.imports import import_object, is_object_name


def test_object_of_a_module_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "own_module_a.py").write_text("class Thing:\n    size = 3\n")
    monkeypatch.chdir(tmp_path)
    assert import_object("own_module_a:Thing", "KEY").size == import_object("own_module_a:Thing.size", "KEY") == 3


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("no_such_module_x:f", "no_such_module_x"),
        ("own_module_b:f", "own_module_b has no f"),
        ("f", "module:name"),
        ("a b:c", "a b:c"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, monkeypatch, text, named):
    (tmp_path / "own_module_b.py").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=named) as error:
        import_object(text, "LOSS.TERMS")
    assert "LOSS.TERMS" in str(error.value)


def test_an_error_in_the_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "own_module_c.py").write_text("import no_such_module_y")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_y"):
        import_object("own_module_c:f", "KEY")


def test_form():
    assert is_object_name("a.b:c.d") and not any(map(is_object_name, ("a", "a:", ":a", "a:b:c", "C:/x", "1:2")))


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ("dgunet.data:hold_back", "dgunet.data.pairs:hold_out"),
        ("dgunet.data:exclude", "dgunet.data.pairs:exclude"),
        ("dgunet.evaluation:PictureSet", "dgunet.evaluation.sets:ImageSet"),
        ("dgunet.model:FromImages", "dgunet.training.step:MeasureThenRestore"),
        ("dgunet.training:train_command", "dgunet.training.cli:train_command"),
        ("dgunet.learner:Learner", "dgunet.training.step:TrainState"),
        ("dgunet.tiff:Tiff", "dgunet.data.tiff:Tiff"),
    ],
)
def test_former_names_warn(monkeypatch, former, now):
    module, name = former.split(":")
    if module in ("dgunet.learner", "dgunet.tiff"):
        monkeypatch.delitem(importlib.sys.modules, module, raising=False)  # it warns where it is imported
    with pytest.warns(DeprecationWarning, match=now.partition(":")[0]):
        found = getattr(importlib.import_module(module), name)
    assert found is import_object(now, "test")


def test_former_names_are_no_others():
    for module in ("dgunet.data", "dgunet.evaluation", "dgunet.model", "dgunet.training"):
        assert not hasattr(importlib.import_module(module), "no_such_name")

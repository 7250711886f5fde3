"""Objects of a user's own module, named as ``module:name``."""

import os
import sys
from importlib import import_module

from dgunet.runtime.errors import UserError


def is_object_name(text: str) -> bool:
    """Whether a text names an object of a module, ``my_module:name``, rather than one of ours."""
    module, _, name = text.partition(":")
    return bool(name) and all(part.isidentifier() for part in (*module.split("."), *name.split(".")))


def object_name(found) -> str:
    """``module:name`` of a function or class; "" for what no import finds: a lambda, a partial, one in a function."""
    name = f"{getattr(found, '__module__', '')}:{getattr(found, '__qualname__', '')}"
    return name if is_object_name(name) else ""


def import_object(text: str, key: str):
    """The object that ``module:name`` names; modules in the current folder are found, too.

    Only for what a user wrote on the command line, in a config or in Python: never for what a checkpoint says.

    Args:
        text: such as ``my_losses:Focal``.
        key: where the user wrote it, for messages: a config key or an argument.

    Raises:
        UserError: not of this form, no such module, or no such name in it. An error in the module itself is raised
            as it is, with its traceback.
    """
    if not is_object_name(text):
        raise UserError(f"{key} is {text!r:.100}; write module:name, such as my_module:make")
    module_name, _, name = text.partition(":")
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        found = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UserError(f"{key} {text}: no module {error.name} here or among the installed packages") from error
        raise
    finally:
        sys.path[:] = before
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"{key} {text}: {module_name} has no {part}")
        found = getattr(found, part)
    return found

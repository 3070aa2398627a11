"""Objects of the user's own, named in the config as ``package.module:attribute``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType

from parallel.errors import ConfigError

__all__ = ["call_target", "load_target"]


def load_target(field: str, target: str) -> object:
    """Import ``package.module:attribute`` (attributes may be dotted: ``module:Class.method``).

    Modules are looked up in the working directory first, then wherever Python looks.

    Args:
        field: the config field that holds ``target``; named in errors.
        target: the dotted path.

    Raises:
        ConfigError: the form is wrong, the module is missing or fails to import, or it has no such
            attribute (the closest existing name is suggested).
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise ConfigError(
            field,
            target,
            "names a Python object as package.module:attribute",
            f"{field}=my_package.my_module:my_object",
        )
    found: object = _import(field, target, module_name)
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ConfigError(
                field,
                target,
                f"{module_name} has no attribute {name!r}",
                _suggestion(field, module_name, found, name),
            )
        found = getattr(found, name)
    return found


def call_target(field: str, target: str, *args: object, **kwargs: object) -> object:
    """Load ``target`` and call it.

    Args:
        field: as for :func:`load_target`.
        args: what Muster gives it.
        kwargs: the user's own, from the ``kwargs`` beside ``target``.

    Raises:
        ConfigError: as :func:`load_target`; or it is not callable, does not take these arguments or raised.
    """
    found = load_target(field, target)
    if not callable(found):
        raise ConfigError(
            field, target, f"is a {type(found).__name__}, not callable", "name a class or function"
        )
    given = ", ".join([*(type(arg).__name__ for arg in args), *(f"{name}=…" for name in kwargs)])
    try:
        inspect.signature(found).bind(*args, **kwargs)
    except TypeError as error:
        options = f"{field.rpartition('.')[0]}.kwargs"
        fix = f"change its parameters, or {options}"
        raise ConfigError(
            field, target, f"is called as {target.partition(':')[2]}({given}): {error}", fix
        ) from error
    except ValueError:
        pass  # some callables written in C tell nothing about their parameters
    try:
        return found(*args, **kwargs)
    except ConfigError:
        raise
    except Exception as error:
        relation = f"raised {type(error).__name__}: {error} ({_place(error)})"
        raise ConfigError(field, target, relation, "mend it there") from error


def _import(field: str, target: str, module_name: str) -> ModuleType:
    here = str(Path.cwd())
    # `python -m` puts the working directory on the path, an installed console script does not.
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(missing + "."):
            raise ConfigError(
                field,
                target,
                f"there is no module {missing!r} in {here} or among the installed packages",
                "run from the folder that holds it, install it, or set PYTHONPATH",
            ) from error
        raise _failed(field, target, module_name, error) from error
    except Exception as error:
        raise _failed(field, target, module_name, error) from error


def _failed(field: str, target: str, module_name: str, error: Exception) -> ConfigError:
    relation = f"importing {module_name} raised {type(error).__name__}: {error} ({_place(error)})"
    return ConfigError(field, target, relation, f"make `python -c 'import {module_name}'` work")


def _place(error: Exception) -> str:
    """``file:line`` where an exception was raised."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}:{last.lineno}"


def _suggestion(field: str, module_name: str, owner: object, name: str) -> str:
    public = [candidate for candidate in dir(owner) if not candidate.startswith("_")]
    close = difflib.get_close_matches(name, public, n=1, cutoff=0.5)
    if close and isinstance(owner, ModuleType):
        return f"{field}={module_name}:{close[0]}"
    return (
        f"did you mean {close[0]}?"
        if close
        else f"define {name} there, or name one of: {', '.join(public[:8])}"
    )

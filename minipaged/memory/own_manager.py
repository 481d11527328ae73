"""A block manager that the user wrote: found by FILE.py:CLASS, and used such that its failures are told as its own."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from minipaged.errors import BlockManagerError, InputError
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.types import Allocation, PoolUsage

NEEDED = ("allocate", "append", "mark_computed", "free", "table", "usage", "can_admit", "begin_step", "take_events")
ANSWERS: dict[str, tuple[type, ...]] = {  # what the engine reads without looking
    "allocate": (Allocation, type(None)),
    "append": (Allocation, type(None)),
    "table": (list, tuple),
    "usage": (PoolUsage,),
}


def find_class(text: str | type) -> type:
    """The class that FILE.py:CLASS names, or the one given. InputError if the file cannot be run, or has no such class."""
    if isinstance(text, type):
        return text
    if not isinstance(text, str):
        raise InputError(f"block_manager must be a class or FILE.py:CLASS, not {text!r:.80}")
    name, _, wanted = text.rpartition(":")
    path = Path(name)
    if path.suffix != ".py" or not wanted:
        raise InputError(f"block_manager must be FILE.py:CLASS, not {text!r}")
    if not path.is_file():
        raise InputError(f"block_manager: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"block_manager_of_{path.stem}", path.resolve())
    if spec is None or spec.loader is None:
        raise InputError(f"block_manager: {path} is no Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"block_manager: {path} cannot be loaded: {_told(error, str(path.resolve()))}") from error
    found = getattr(module, wanted, None)
    if not isinstance(found, type):
        raise InputError(f"block_manager: {path} has no class {wanted}; it has {_classes(module)}")
    return found


def own_manager(kind: type, num_blocks: int, block_size: int, **settings: Any) -> BlockManager:
    """`kind(num_blocks, block_size, **settings)`, whose failures raise BlockManagerError. InputError if it cannot be a block manager."""
    lacking = [name for name in NEEDED if not callable(getattr(kind, name, None))]
    if lacking:
        raise InputError(f"block_manager: {kind.__name__} has no {', '.join(lacking)}")
    manager = _guarded(kind, kind.__name__)(num_blocks, block_size, **settings)
    return cast(BlockManager, _Guarded(manager))


class _Guarded:
    """Everything is the manager's own; its methods raise BlockManagerError where they fail."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._manager, name)
        if not callable(value):
            return value
        kind = type(self._manager)
        method = self.__dict__[name] = _guarded(value, f"{kind.__name__}.{name}", kind, ANSWERS.get(name))
        return method


def _guarded(
    method: Callable[..., Any], name: str, kind: type | None = None, answers: tuple[type, ...] | None = None
) -> Callable[..., Any]:
    """The method; if it fails, BlockManagerError with its name, and so if what it answers is nothing that the engine can read.

    An InputError that passed through no line of the user's is the engine's business: a setting that cannot be.
    """
    file = getattr(sys.modules.get((kind or cast(type, method)).__module__), "__file__", None) or ""

    @wraps(method, updated=())
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            answer = method(*arguments, **options)
        except Exception as error:
            theirs = any(frame.filename == file for frame in traceback.extract_tb(error.__traceback__))
            if isinstance(error, InputError) and not theirs:
                raise
            raise BlockManagerError(f"your block manager failed in {name}: {_told(error, file)}") from error
        if answers is not None and not isinstance(answer, answers):
            wanted = " or ".join("None" if each is type(None) else each.__name__ for each in answers)
            raise BlockManagerError(f"your block manager's {name} gave {answer!r:.80}, and should give {wanted}")
        return answer

    return call


def _told(error: Exception, file: str) -> str:
    """The error in a line, and the last line of the file that it passed through."""
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{text}".replace(f"({Path(file).name}, line {error.lineno})", f"({Path(file).name}:{error.lineno})")
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{text} ({Path(file).name}:{lines[-1].lineno}: {lines[-1].line})" if lines else text


def _classes(module: ModuleType) -> str:
    own = [name for name, each in vars(module).items() if isinstance(each, type) and each.__module__ == module.__name__]
    return ", ".join(own) or "none"

"""Looks on while a lesson's tests call the learner's manager, so that the run that failed can be opened on the screen.

Only the learner's own class is followed, not the ones with bugs that are made from it, and only in pools that a screen shows whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from inspect import isfunction
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from minipaged.learn import so_far
from minipaged.learn.tape import Tape

FOLLOWED = ("BlockPool", "Manager", "PrefixCache", "Engine")  # classes of lessons that hold blocks, by name
MOST_BLOCKS, MOST_STATES, MOST_OBJECTS = 256, 2_000, 8
LONGEST_CALL = 80  # characters


class State(NamedTuple):
    """What is in the pool: as a Tape takes it."""

    tables: Mapping[str, tuple[int, ...]]
    lengths: Mapping[str, int]


@dataclass
class _Followed:
    """One object's life so far. The object is kept, so that its id is not given to another one."""

    subject: Any
    block_size: int
    states: list[State] = field(default_factory=list)
    last_call: str = ""


def state_of(subject: Any) -> State:
    """The tables of a manager, or of an engine's requests; of a pool, which has none, a table for each holder of a block."""
    if hasattr(subject, "tables"):
        tables, lengths = subject.tables, subject.lengths
    elif hasattr(subject, "running"):
        requests = [*subject.running, *subject.waiting, *subject.swapped]
        tables = {f"request {each.arrival}": each.table for each in requests if each.table}
        lengths = {f"request {each.arrival}": each.computed for each in requests if each.table}
    else:
        counts = getattr(subject, "ref_counts", None)
        holders = enumerate(counts) if counts is not None else ((block, 1) for block in sorted(subject.held))
        tables = {f"{block}, {i}": (block,) for block, count in holders for i in range(count)}
        lengths = dict.fromkeys(tables, getattr(subject, "block_size", 1))
    kept = {str(name): tuple(_block(block) for block in table) for name, table in tables.items()}
    return State(kept, {name: max(0, int(lengths.get(name, 0))) for name in kept})


def _block(given: object) -> int:
    """A block's number; of what cannot be one, the null block's."""
    return given if isinstance(given, int) and given > 0 else 0


class Witness:
    """The objects that the running test has called."""

    def __init__(self) -> None:
        self._followed: dict[int, _Followed] = {}
        self._depth = 0

    def forget(self) -> None:
        """Another test begins."""
        self._followed.clear()

    def save(self, path: Path) -> str:
        """Write the life of the object that was called last; returns that call, or "" where there is nothing to show."""
        last = next(reversed(self._followed.values()), None)
        if last is None:
            return ""
        self._look(last.subject, "")  # functions that belong to no class may have changed it since
        if not any(state.tables for state in last.states):
            return ""
        blocks = {block for state in last.states for table in state.tables.values() for block in table}
        num_blocks = max(last.subject.num_blocks, 1 + max(blocks, default=0))
        if num_blocks > MOST_BLOCKS:
            return ""
        tape = Tape(num_blocks, last.block_size)
        for state in last.states:
            tape.note(state.tables, state.lengths)
        path.parent.mkdir(exist_ok=True)
        tape.write(path)
        return last.last_call

    @contextmanager
    def follow(self, module: ModuleType) -> Iterator[None]:
        """Look on at each call from outside of the classes that `module` plays with."""
        patched: list[tuple[type, str, object]] = []
        for kind in (vars(module).get(name) for name in FOLLOWED):
            if not isinstance(kind, type) or kind.__module__ not in (module.__name__, so_far.__name__):
                continue
            for name in dir(kind):
                function = getattr(kind, name)
                if not name.startswith("_") and isfunction(function):
                    patched.append((kind, name, vars(kind).get(name)))
                    setattr(kind, name, self._watched(kind, function))
        try:
            yield
        finally:
            for kind, name, before in patched:
                delattr(kind, name) if before is None else setattr(kind, name, before)

    def _watched(self, kind: type[Any], function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(subject: Any, *args: Any, **settings: Any) -> Any:
            if self._depth or type(subject) is not kind or subject.num_blocks > MOST_BLOCKS:
                return function(subject, *args, **settings)
            self._look(subject, "")
            self._depth += 1
            try:
                return function(subject, *args, **settings)
            finally:
                self._depth -= 1
                told = f"{function.__name__}({', '.join(map(repr, args))})"
                self._look(subject, told if len(told) <= LONGEST_CALL else f"{function.__name__}(…)")

        return call

    def _look(self, subject: Any, call: str) -> None:
        found = self._followed.pop(id(subject), None)
        if found is None:
            size = getattr(subject, "block_size", 0) or getattr(sys.modules[type(subject).__module__], "BLOCK", 1)
            found = _Followed(subject, size)
        self._followed[id(subject)] = found  # the one called last stands at the end
        while len(self._followed) > MOST_OBJECTS:
            del self._followed[next(iter(self._followed))]
        found.last_call = call or found.last_call
        try:
            state = state_of(subject)
        except (
            AttributeError,
            TypeError,
            ValueError,
        ):  # the learner's code has put something else there: its test will say
            return
        if (not found.states or found.states[-1] != state) and len(found.states) < MOST_STATES:
            found.states.append(state)

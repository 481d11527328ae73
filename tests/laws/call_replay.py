"""A law of the memory that fails by itself leaves a replay: its calls on the manager are noted, and made once more with a recorder.

A manager does the same each time (L54), so nothing but the calls is kept while the laws are tried. Each call is a step of the replay.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from minipaged.memory.types import BlockEvent
from tests.laws.model import Line, look
from tests.laws.records import StepRecord
from tests.laws.replay import write_replay

CALLS = (
    *("begin_step", "end_step", "allocate", "append", "mark_computed", "fork", "truncate", "release", "free"),
    *("swap_out", "swap_in", "pin", "unpin", "reset_prefix_cache"),
)
MOST_BLOCKS = 4096  # a pool that a screen can show


class Call(NamedTuple):
    """One call on a manager."""

    name: str
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass
class Noted:
    """A manager that was made, and what was called on it."""

    make: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]
    calls: list[Call] = field(default_factory=list)
    last: ClassVar[Noted | None] = None  # the one that was called last, to be shown if its law fails


def noting(kind: type) -> type:
    """The same class of managers, whose calls from outside are noted."""

    class Noting(kind):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            self.noted = Noted(kind, args, options)
            self.inside = False  # a call of its own is no call from outside
            super().__init__(*args, **options)

    for name in CALLS:
        setattr(Noting, name, _noted_call(kind, name))
    return Noting


def _noted_call(kind: type, name: str) -> Callable[..., Any]:
    method = getattr(kind, name)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        if self.inside:
            return method(self, *args, **options)
        as_given = tuple(list(a) if isinstance(a, list) else a for a in args)
        plain = {key: value for key, value in options.items() if key != "hit"}  # a handle is of this manager alone
        self.noted.calls.append(Call(name, as_given, plain))
        Noted.last = self.noted
        self.inside = True
        try:
            return method(self, *args, **options)
        finally:
            self.inside = False

    return call


def leave_call_replay(noted: Noted, path: Path, finding: str) -> str | None:
    """Make the calls once more and record each. Returns the command that shows them; None where no screen could."""
    manager = noted.make(*noted.args, **noted.options)
    if manager.usage().total > MOST_BLOCKS:
        return None
    follower = _Follower(manager, noted.options.get("block_size", noted.args[-1]))
    records = [follower.record()]
    for call in noted.calls:
        with suppress(Exception):  # what is refused, and what the fault makes impossible
            follower.follow(call, getattr(manager, call.name)(*call.args, **call.options))
        with suppress(Exception):
            records.append(follower.record())
    return write_replay(path, records, finding)


class _Follower:
    """What a replay shows of one manager, from its calls, answers and events."""

    def __init__(self, manager: Any, block_size: int) -> None:
        self._manager, self._block_size = manager, block_size
        self._lines: dict[int, Line] = {}

    def follow(self, call: Call, answer: Any) -> None:
        """A call that returned `answer`."""
        lines, args = self._lines, call.args
        match call.name:
            case "allocate" if answer is not None:
                cached = answer.cached_tokens
                lines[args[0]] = Line(args[0], None, list(args[1]), 0, cached, cached)
            case "mark_computed":
                line = lines[args[0]]
                line.tokens[line.written :] = [*args[1], *line.tokens[line.written + len(args[1]) :]]
                line.written += len(args[1])
            case "fork":
                parent = lines[args[0]]
                lines[args[1]] = Line(
                    args[1], None, list(parent.tokens), 0, parent.written, parent.written, parent.seq_id
                )
            case "truncate":
                lines[args[0]].cut(args[1])
            case "free":
                del lines[args[0]]
            case "swap_out" | "swap_in" if answer is not None:
                for seq_id in args[0]:
                    lines[seq_id].swapped = call.name == "swap_out"

    def record(self) -> StepRecord:
        """How things stand, and what was given since the last record."""
        events: tuple[BlockEvent, ...] = self._manager.take_events()
        view = look(self._manager, self._lines, self._manager.usage().total)
        return StepRecord.of(view, self._lines, self._block_size, events)

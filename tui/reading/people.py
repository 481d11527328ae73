"""Who asked: a request of a server as a person behind it, from the notes that an attached screen gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from minipaged.text.safe import clean
from minipaged.trace.snapshot import SequenceState


@dataclass(frozen=True, slots=True)
class Person:
    """Where a request came from. first: seconds to its first token; first_ns: when that was, by the clock of the trace."""

    client: str
    method: str
    id: str
    first: float | None = None
    first_ns: int = 0

    @classmethod
    def of_note(cls, note: Mapping[str, object]) -> Person:
        """What a note of kind "request" says."""
        first, first_ns = note.get("first"), note.get("first_ns")
        client, method, name = (clean(str(note.get(name, ""))) for name in ("client", "method", "id"))
        return cls(
            client,
            method,
            name,
            first if isinstance(first, int | float) else None,
            first_ns if isinstance(first_ns, int) else 0,
        )

    def words(self, state: SequenceState, now_ns: int) -> str:
        """`127.0.0.1 chat 3f2a9c1b, first 83 ms, 42 tok/s`: the first token came so long after the request."""
        method = self.method.removeprefix("/v1/").partition("/")[0]
        words = [f"{self.client.rpartition(':')[0]} {method} {self.id[:8]}"]
        if self.first is not None:
            words.append(f"first {1000 * self.first:.0f} ms")
        drawn = len(state.token_ids) - state.num_prompt
        spent = (now_ns - self.first_ns) / 1e9
        if self.first_ns and drawn > 1 and spent > 0 and state.alive:
            words.append(f"{(drawn - 1) / spent:.0f} tok/s")
        return ", ".join(words)

"""Managers that speak an older protocol (a learner's, another system's): what they lack is answered with what they have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from minipaged.memory.block_manager import BlockManager
    from minipaged.memory.types import Admission, Allocation


def adapted(manager: Any) -> BlockManager:
    """The manager itself if it has `lookup` and `end_step`; else one that adds them: its handles ask anew each time, and it takes back no
    promise."""
    whole = hasattr(manager, "lookup") and hasattr(manager, "end_step")
    return cast("BlockManager", manager if whole else _Adapted(manager))


class _Question(NamedTuple):
    """Stands for a PrefixHit: the prompt, which is asked about anew each time."""

    manager: Any
    token_ids: list[int]
    salt: str | None

    @property
    def num_tokens(self) -> int:
        """Tokens that a new sequence would find now."""
        return int(self.manager.match_prefix(self.token_ids, salt=self.salt))


class _Adapted:
    """Everything that is not here is the manager's own."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def end_step(self) -> None:
        """Such a manager has no end_step: what was marked stays published."""

    def lookup(self, token_ids: Iterable[int], *, salt: str | None = None) -> _Question:
        """The question itself."""
        return _Question(self._manager, list(token_ids), salt)

    def can_admit(self, *sizes: int, hit: _Question | None = None, **options: Any) -> Admission:
        """As the manager, which is given the prompt instead of the handle."""
        prompt = {} if hit is None else {"token_ids": hit.token_ids, "salt": hit.salt}
        return cast("Admission", self._manager.can_admit(*sizes, **options, **prompt))

    def allocate(self, seq_id: int, token_ids: Iterable[int], *, hit: Any = None, **options: Any) -> Allocation | None:
        """As the manager, which looks the prompt up itself."""
        return cast("Allocation | None", self._manager.allocate(seq_id, token_ids, **options))

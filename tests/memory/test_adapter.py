"""Managers of the older protocol behind the new one."""

from __future__ import annotations

from typing import Any

from minipaged.baselines.contiguous import ContiguousBlockManager
from minipaged.memory import Admission, BlockManager
from minipaged.memory.adapter import adapted


class Older:
    """What a manager was before there were handles and ends of plans."""

    def __init__(self) -> None:
        self._real = BlockManager(8, 4, watermark=0.0)

    def can_admit(self, num_tokens: int, max_new_tokens: int = 0, **options: Any) -> Admission:
        """num_sequences, token_ids and salt; no hit."""
        assert options.keys() <= {"num_sequences", "token_ids", "salt"}
        return self._real.can_admit(num_tokens, max_new_tokens, **options)

    def allocate(self, seq_id: int, token_ids: list[int], **options: Any) -> Any:
        """num_tokens, salt and read_cache; no hit."""
        assert options.keys() <= {"num_tokens", "salt", "read_cache"}
        return self._real.allocate(seq_id, token_ids, **options)

    def match_prefix(self, token_ids: list[int], *, salt: str | None = None) -> int:
        """As ever."""
        return self._real.match_prefix(token_ids, salt=salt)

    def mark_computed(self, seq_id: int, token_ids: list[int]) -> None:
        """As ever."""
        self._real.mark_computed(seq_id, token_ids)


def test_what_is_whole_is_left_alone() -> None:
    """The real manager, and the systems that reserve ahead."""
    for manager in (BlockManager(8, 4), ContiguousBlockManager(8, 4, "orca-max")):
        assert adapted(manager) is manager


def test_an_older_manager_answers_the_new_questions() -> None:
    """A handle asks it anew each time, under the salt that it was made for."""
    manager = adapted(Older())
    manager.end_step()
    prompt = list(range(20))
    hit, other = manager.lookup([*prompt, 9]), manager.lookup([*prompt, 9], salt="a")
    assert hit.num_tokens == 0
    assert manager.allocate(0, prompt, num_tokens=20, hit=hit) is not None
    manager.mark_computed(0, prompt)
    assert (hit.num_tokens, other.num_tokens) == (20, 0)
    assert manager.can_admit(21, hit=hit) is Admission.OK
    assert manager.can_admit(21, hit=other) is Admission.LATER
    assert manager.can_admit(21, num_sequences=9, hit=hit) is Admission.NEVER
    got = manager.allocate(1, [*prompt, 9], hit=hit)
    assert got is not None
    assert got.cached_tokens == 20

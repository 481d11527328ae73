"""Historical bugs of paged memory, each put into the real block manager. The docstring is the bug; the spec must find every one.

A mutant changes one method of the manager or of a part that it owns, and leaves the rest alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

from minipaged.memory import swap
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.sequence_blocks import SequenceBlocks
from minipaged.memory.types import NULL_BLOCK, Allocation


class LateBoundary(BlockManager):
    """A block is taken one token after it is needed."""

    def append(self, seq_id: int, num_tokens: int) -> Allocation | None:
        got = super().append(seq_id, max(0, num_tokens - 1))
        if got is not None and num_tokens:
            self._sequences.find(seq_id).room += 1
        return got


class UncountedFork(BlockManager):
    """A fork copies the table and counts no new holder."""

    def fork(self, parent_id: int, child_id: int) -> None:
        super().fork(parent_id, child_id)
        for block in self.table(child_id):
            self._pool.refs[block] -= block != NULL_BLOCK


class ForgivingFree(BlockManager):
    """Freeing twice is absorbed: the count is clamped at 0."""

    def free(self, seq_id: int) -> None:
        try:
            super().free(seq_id)
        except KeyError:
            return


class FullHit(BlockManager):
    """A prompt that is cached as a whole leaves no token to compute."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        editor = self._editor
        editor.match = lambda tokens, salt, wanted: editor.index.match(  # type: ignore[method-assign]
            tokens, editor.block_size, salt, min(len(tokens), wanted) // editor.block_size
        )


class TouchedBeforeTheCheck(BlockManager):
    """Found blocks are touched before the capacity check fails: they become the most recently used."""

    def allocate(self, seq_id: int, token_ids: Iterable[int], **options: Any) -> Allocation | None:
        got = super().allocate(seq_id, token_ids, **options)
        if got is None and options.get("read_cache", True):
            tokens = array("I", token_ids)
            for block in self._editor.match(tokens, options.get("salt"), len(tokens))[0]:
                self._pool.share(block)
                self._pool.drop(block)
        return got


class FreedWhileHeld(BlockManager):
    """A sequence that leaves frees its blocks, whoever else holds them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        pool, drop = self._pool, self._pool.drop

        def careless(block: int) -> None:
            pool.refs[block] = 1
            drop(block)

        pool.drop = careless  # type: ignore[method-assign]


class PinnedEvicted(BlockManager):
    """A pin is noted, and the block may be evicted all the same."""

    def pin(self, block_id: int) -> None:
        super().pin(block_id)
        self._pool.drop(block_id)

    def unpin(self, block_id: int) -> None:
        if self._pool.refs[block_id] or block_id in self._editor.index:
            self._pool.share(block_id)
        super().unpin(block_id)


class StaleKey(BlockManager):
    """A block that is handed out again can still be found by its old content."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._editor.take = lambda seq_id: self._pool.take()  # type: ignore[method-assign]


class HitBeforeWrite(BlockManager):
    """A prompt's blocks can be found as soon as they are allocated, before anything is written."""

    def allocate(self, seq_id: int, token_ids: Iterable[int], **options: Any) -> Allocation | None:
        got = super().allocate(seq_id, token_ids, **options)
        if got is not None and self._caching:
            sequence = self._sequences.find(seq_id)
            kept = sequence.computed, sequence.tokens[:], list(sequence.keys)
            sequence.tokens = array("I", token_ids)
            sequence.computed = sequence.room
            self._editor.publish_full(sequence)
            sequence.computed, sequence.tokens, sequence.keys = kept
        return got


class CopyAfterWrite(BlockManager):
    """A copy is told with the next append, when the block it was to protect has been written."""

    late: tuple[tuple[int, int], ...] = ()

    def append(self, seq_id: int, num_tokens: int) -> Allocation | None:
        got = super().append(seq_id, num_tokens)
        if got is None:
            return None
        late, self.late = self.late, got.copies
        return got._replace(copies=late)


class SwapDuplicates(BlockManager):
    """A swapped group copies a shared block once for each of its holders."""

    def swap_out(self, seq_ids: Iterable[int]) -> list[tuple[int, int]] | None:
        pairs: list[tuple[int, int]] = []
        for seq_id in seq_ids:
            found = super().swap_out([seq_id])
            if found is None:
                return None
            pairs += found
        return pairs


class BuiltinHashKeys(BlockManager):
    """Keys are the built-in hash of the parent's key and the tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        index, size = self._editor.index, self._editor.block_size

        def key_of(parent: bytes, tokens: tuple[int, ...]) -> bytes:
            return repr(hash((parent, hash(tokens)))).encode()

        def match(tokens: array[int], block_size: int, salt: str | None, most: int) -> tuple[list[int], list[bytes]]:
            blocks, keys, key = [], [], repr(salt).encode()
            for i in range(most):
                key = key_of(key, tuple(tokens[i * block_size : (i + 1) * block_size]))
                block = index._block_of.get(key)
                if block is None:
                    break
                blocks.append(block)
                keys.append(key)
            return blocks, keys

        def publish_full(sequence: SequenceBlocks) -> None:
            for i in range(len(sequence.keys), sequence.computed // size):
                parent = sequence.keys[-1] if sequence.keys else sequence.root
                sequence.keys.append(key_of(parent, tuple(sequence.tokens[i * size : (i + 1) * size])))
                self._editor.publish(sequence, i)

        index.match = match  # type: ignore[method-assign]
        self._editor.publish_full = publish_full  # type: ignore[method-assign]

    def allocate(self, seq_id: int, token_ids: Iterable[int], **options: Any) -> Allocation | None:
        got = super().allocate(seq_id, token_ids, **options)
        if got is not None:
            self._sequences.find(seq_id).root = repr(options.get("salt")).encode()
        return got


class ReleasedTwice(BlockManager):
    """A window's block is given back again whenever its entry is released again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gone: dict[tuple[int, int], int] = {}

    def release(self, seq_id: int, indices: Iterable[int]) -> None:
        indices = list(indices)
        before = self.table(seq_id)
        super().release(seq_id, indices)
        for index in indices:
            if before[index]:
                self._gone[seq_id, index] = before[index]
            elif self._pool.refs[self._gone.get((seq_id, index), 0)]:
                self._pool.drop(self._gone[seq_id, index])


class AbortLeaks(BlockManager):
    """A sequence that is freed between its fork and its write keeps the block that it was to write."""

    def free(self, seq_id: int) -> None:
        sequence = self._sequences.find(seq_id)
        if sequence.pending is not None:
            self._pool.refs[sequence.table[sequence.pending.entry]] += 1
        super().free(seq_id)


class KeysLostInSwap(BlockManager):
    """What belongs to a block beside its slots does not travel with a swap: the content keys are lost."""

    def swap_in(self, seq_ids: Iterable[int]) -> list[tuple[int, int]] | None:
        seq_ids = list(seq_ids)
        pairs = super().swap_in(seq_ids)
        for seq_id in seq_ids if pairs is not None else []:
            sequence = self._sequences.find(seq_id)
            sequence.keys = [bytes(32) for _ in sequence.keys]
        return pairs


class SwapStealsShared(BlockManager):
    """A swap-out takes a block away from those who hold it outside the group."""

    def swap_out(self, seq_ids: Iterable[int]) -> list[tuple[int, int]] | None:
        pairs = super().swap_out(seq_ids)
        for device, _ in pairs or ():
            while self._pool.refs[device]:
                self._pool.drop(device)
        return pairs


class SwapInTooEager(BlockManager):
    """A swap-in takes the last blocks and leaves none for its own next step."""

    def swap_in(self, seq_ids: Iterable[int]) -> list[tuple[int, int]] | None:
        real = swap.next_step_blocks
        swap.next_step_blocks = lambda group, host, block_size: 0  # type: ignore[assignment]
        try:
            return super().swap_in(seq_ids)
        finally:
            swap.next_step_blocks = real


HISTORICAL: tuple[type[BlockManager], ...] = (
    LateBoundary,
    UncountedFork,
    ForgivingFree,
    FullHit,
    TouchedBeforeTheCheck,
    FreedWhileHeld,
    PinnedEvicted,
    StaleKey,
    HitBeforeWrite,
    CopyAfterWrite,
    SwapDuplicates,
    BuiltinHashKeys,
    ReleasedTwice,
    AbortLeaks,
    KeysLostInSwap,
    SwapStealsShared,
    SwapInTooEager,
)

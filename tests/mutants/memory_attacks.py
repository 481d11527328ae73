"""Bugs found by reading the real block manager as an attacker would. The docstring is the bug; the spec must find every one."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Any

from minipaged.memory.block_manager import BlockManager
from minipaged.memory.blocks import PrefixHit, next_key, root_key
from minipaged.memory.tables import SequenceBlocks
from minipaged.memory.types import Admission, Allocation, PoolUsage, token_array
from tests.mutants.memory_bugs import Rekeyed


class Patched(BlockManager):
    """A manager whose parts are changed by `patch` once it is built."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.patch()

    def patch(self) -> None:
        """Change a part."""


class ModuloBoundary(BlockManager):
    """A new block is taken when the length is a multiple of the block size, not when need exceeds have."""

    def append(self, seq_id: int, num_tokens: int) -> Allocation | None:
        sequence = self._sequences.find(seq_id)
        if num_tokens and sequence.reserved and sequence.reserved % self._block_size:
            got = super().append(seq_id, min(num_tokens, self._block_size - sequence.reserved % self._block_size))
            if got is not None:
                sequence.reserved += max(0, num_tokens - 1) // self._block_size
            return got
        return super().append(seq_id, num_tokens)


class CopiesAFullTail(BlockManager):
    """A shared tail is copied even at a full boundary, where nothing is written in it."""

    def append(self, seq_id: int, num_tokens: int) -> Allocation | None:
        sequence = self._sequences.find(seq_id)
        full = sequence.table and sequence.reserved == len(sequence.table) * self._block_size
        shared = full and self._pool.refs[sequence.table[-1]] > 1
        if num_tokens and shared and self._pool.num_available > self._editor.blocks_for(num_tokens):
            pair = self._editor.copy_tail(sequence)
            got = super().append(seq_id, num_tokens)
            return got._replace(copies=(pair,)) if got is not None else None
        return super().append(seq_id, num_tokens)


class CopiesAlone(Patched):
    """A tail is copied although nobody else holds it."""

    def patch(self) -> None:
        self._editor.copies.must_copy = lambda tail, slot: True  # type: ignore[method-assign]


class NeverCopies(Patched):
    """A shared tail is written in place."""

    def patch(self) -> None:
        self._editor.copies.must_copy = lambda tail, slot: False  # type: ignore[method-assign]


class ForgetsWhoMayComeBack(Patched):
    """A tail is written in place while its other holder's copy can still be given up, over slots that holder needs."""

    def patch(self) -> None:
        self._editor.copies.must_copy = lambda tail, slot: self._pool.refs[tail] > 1  # type: ignore[method-assign]


class EverySharerCopies(BlockManager):
    """Whether to copy is decided at the fork: the last sharer copies too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shared: set[int] = set()
        real = self._editor.copies.must_copy
        self._editor.copies.must_copy = (  # type: ignore[method-assign]
            lambda tail, slot: tail in self._shared or real(tail, slot)
        )

    def fork(self, parent_id: int, child_id: int) -> None:
        super().fork(parent_id, child_id)
        self._shared.update(self.table(child_id)[-1:])


class KeepsACopyGivenUp(BlockManager):
    """A victim's table keeps the destination of a copy that is not made."""

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        self._editor.copies.end(self._sequences.find(seq_id))
        super().truncate(seq_id, num_tokens)


class UnguardedCopies(Patched):
    """A block that this step copies from is handed out within it."""

    def patch(self) -> None:
        self._editor.copies._pool = _Unguarded(self._pool)  # type: ignore[assignment]


class _Unguarded:
    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def guard(self, block: int) -> None:
        """Nothing."""

    def unguard(self, block: int) -> None:
        """Nothing."""


class UnguardedSwaps(BlockManager):
    """A block that this step swaps out is handed out within it."""

    def swap_out(self, seq_ids: Iterable[int]) -> list[tuple[int, int]] | None:
        pairs = super().swap_out(seq_ids)
        self._pool.begin_step()
        return pairs


class HostBlocksReused(Patched):
    """A host block that this step writes or reads is used by another swap of the step."""

    def patch(self) -> None:
        host = self._host
        take = host.take

        def careless() -> int:
            block = take()
            host._touched.clear()
            return block

        host.take = careless  # type: ignore[method-assign]
        host.touch = lambda block: None  # type: ignore[method-assign]


class KeyWithoutPrefix(Rekeyed):
    """A block's key is made of its own tokens alone."""

    def key_of(self, parent: bytes, tokens: bytes) -> bytes:
        return next_key(b"", tokens)


class SaltIgnored(Rekeyed):
    """The salt is left out of the key."""

    def root_of(self, salt: str | None) -> bytes:
        return bytes(32)


class EmptySaltIsNone(Rekeyed):
    """An empty salt is taken for no salt."""

    def root_of(self, salt: str | None) -> bytes:
        return root_key(salt or None)


class MissesSkipped(BlockManager):
    """A match goes on after a miss."""

    def lookup(self, token_ids: Iterable[int], *, salt: str | None = None) -> PrefixHit:
        return _SkipsMisses(self._editor.index, token_array(token_ids), self._block_size, salt)

    def allocate(self, seq_id: int, token_ids: Iterable[int], **options: Any) -> Allocation | None:
        return super().allocate(
            seq_id, token_ids, **{**options, "hit": self.lookup(token_ids, salt=options.get("salt"))}
        )


class _SkipsMisses(PrefixHit):
    def find(self, num_tokens: int) -> list[int]:
        whole = super().find(num_tokens)
        while len(self.keys) * self._block_size < min(len(self.tokens) - 1, num_tokens) - self._block_size + 1:
            start = len(self.keys) * self._block_size
            parent = self.keys[-1] if self.keys else self.root
            self.keys.append(next_key(parent, self.tokens[start : start + self._block_size].tobytes()))
        most = max(0, min(len(self.tokens) - 1, num_tokens)) // self._block_size
        later = [self.index.find(key) for key in self.keys[len(whole) : most]]
        return whole + [block for block in later if block is not None]


class NewestEvicted(Patched):
    """The most recently used cached block is evicted."""

    def patch(self) -> None:
        free = self._pool._free
        free.first_cached = lambda: free._previous[0]  # type: ignore[method-assign]


class HeadFirst(BlockManager):
    """A sequence's blocks are freed from its head, so that the shallowest is evicted first."""

    def free(self, seq_id: int) -> None:
        sequence = self._sequences.find(seq_id)
        if sequence.host is None and sequence.pending is None and sequence.promised_from is None:
            sequence.table.reverse()
        super().free(seq_id)


class PublishesAfterRelease(BlockManager):
    """A sequence that has lost blocks goes on publishing what it computes."""

    def release(self, seq_id: int, indices: Iterable[int]) -> None:
        super().release(seq_id, indices)
        self._sequences.find(seq_id).publishes = True


class ResetsWhileHeld(BlockManager):
    """The cache is reset although requests hold blocks."""

    def reset_prefix_cache(self) -> bool:
        for block in self._editor.index.blocks():
            if self._pool.refs[block]:
                self._editor.index.erase(block)
                self._editor.emit("evict", -1, block, -1, -1)
        super().reset_prefix_cache()
        return True


class FailureLeaks(BlockManager):
    """An allocation that fails keeps what it had taken by then."""

    def allocate(self, seq_id: int, token_ids: Iterable[int], **options: Any) -> Allocation | None:
        got = super().allocate(seq_id, token_ids, **options)
        if got is None and self._pool.num_available:
            self._pool.take()
        return got


class TableShared(BlockManager):
    """A child's table is its parent's own list."""

    def fork(self, parent_id: int, child_id: int) -> None:
        super().fork(parent_id, child_id)
        self._sequences.find(child_id).table = self._sequences.find(parent_id).table


class KeysShared(BlockManager):
    """A child's keys are its parent's own list."""

    def fork(self, parent_id: int, child_id: int) -> None:
        super().fork(parent_id, child_id)
        self._sequences.find(child_id).keys = self._sequences.find(parent_id).keys


class WritesIntoFound(BlockManager):
    """A sequence truncated into a published block goes on in it without erasing its key."""

    def append(self, seq_id: int, num_tokens: int) -> Allocation | None:
        index = self._editor.index
        real = index.erase
        in_tail = {self._sequences.find(seq_id).table[-1]} if self._sequences.find(seq_id).table else set()
        index.erase = lambda block: block not in in_tail and real(block)  # type: ignore[method-assign]
        try:
            return super().append(seq_id, num_tokens)
        finally:
            index.erase = real  # type: ignore[method-assign]


class PartialPublished(Patched):
    """The last, partly filled block is hashed as if it were full."""

    def patch(self) -> None:
        editor, size = self._editor, self._block_size
        real = editor.publish_full

        def careless(sequence: SequenceBlocks) -> None:
            computed = sequence.computed
            sequence.computed = min(sequence.reserved, -(-computed // size) * size)
            real(sequence)
            sequence.computed = computed

        editor.publish_full = careless  # type: ignore[method-assign]


class KeyStolen(Patched):
    """Of two blocks with equal content the one published last is found."""

    def patch(self) -> None:
        index = self._editor.index

        def find(key: bytes) -> int | None:
            return [*index._twins.get(key, ()), index._block_of.get(key)][-1 if key not in index._twins else -2]

        index.find = find  # type: ignore[method-assign]


class TwinsLostOnErase(Patched):
    """When the found one of two equal blocks is evicted, the other can no longer be found."""

    def patch(self) -> None:
        index, real = self._editor.index, self._editor.index.erase

        def erase(block: int) -> bool:
            key = index._key_of.get(block)
            if key is None:
                return False
            if index._block_of.get(key) == block:
                for twin in index._twins.pop(key, ()):
                    del index._key_of[twin]
            return real(block)

        index.erase = erase  # type: ignore[method-assign]


class CachedCountedOut(BlockManager):
    """Cached blocks are not counted as free."""

    def usage(self) -> PoolUsage:
        usage = super().usage()
        return usage._replace(free=usage.free - usage.cached)


class NeverForgetsTheTails(BlockManager):
    """Whether a request can ever fit assumes that its samples share their prompt's last, partly filled block too."""

    def can_admit(self, num_tokens: int, max_new_tokens: int = 0, **options: Any) -> Admission:
        width = options.get("num_sequences", 1)
        blocks = self._editor.blocks_for(num_tokens) + width * self._editor.blocks_for(max_new_tokens)
        got = super().can_admit(num_tokens, max_new_tokens, **options)
        return Admission.LATER if got is Admission.NEVER and blocks < self._pool.num_blocks else got


class WatermarkOnGrowth(BlockManager):
    """Growth has to leave the watermark free too."""

    def append(self, seq_id: int, num_tokens: int) -> Allocation | None:
        sequence = self._sequences.on_device(seq_id)
        need = self._editor.blocks_for(sequence.reserved + max(0, num_tokens)) - len(sequence.table)
        if type(num_tokens) is int and need > 0 and need + self._watermark_blocks > self._pool.num_available:
            return None
        return super().append(seq_id, num_tokens)


class WatermarkWhenIdle(BlockManager):
    """The watermark keeps the only request out."""

    def _watermark(self) -> int:
        return self._watermark_blocks


class PinsLostOnFree(BlockManager):
    """A sequence that leaves takes the pins of its blocks along."""

    def free(self, seq_id: int) -> None:
        table = self.table(seq_id)
        super().free(seq_id)
        for block in table:
            if block in self._pool.pins:
                del self._pool.pins[block]
                self._pool.refs[block] -= 1


class PublishUntold(Patched):
    """A block is published and no event says so."""

    def patch(self) -> None:
        real = self._editor.emit
        self._editor.emit = (  # type: ignore[method-assign]
            lambda kind, *rest: None if kind == "publish" else real(kind, *rest)
        )


class ForkUntold(Patched):
    """A fork is not told."""

    def patch(self) -> None:
        real = self._editor.emit
        self._editor.emit = lambda kind, *rest: None if kind == "fork" else real(kind, *rest)  # type: ignore[method-assign]


class HostLeak(BlockManager):
    """A swapped sequence that is freed keeps its host blocks."""

    def free(self, seq_id: int) -> None:
        sequence = self._sequences.find(seq_id)
        if sequence.host is not None:
            sequence.host = []
        super().free(seq_id)


class UnreadMeansUnfilled(BlockManager):
    """A request that does not read the cache does not fill it."""

    def allocate(self, seq_id: int, token_ids: Iterable[int], **options: Any) -> Allocation | None:
        got = super().allocate(seq_id, token_ids, **options)
        if got is not None:
            self._sequences.find(seq_id).publishes = options.get("read_cache", True)
        return got


class HitsInBlocks(BlockManager):
    """Hits are reported in blocks, not tokens."""

    def allocate(self, seq_id: int, token_ids: Iterable[int], **options: Any) -> Allocation | None:
        got = super().allocate(seq_id, token_ids, **options)
        return got._replace(cached_tokens=got.cached_tokens // self._block_size) if got is not None else None


class HitsCountedTwice(Patched):
    """The capacity check subtracts found blocks twice where they are evictable."""

    def patch(self) -> None:
        real = self._editor.count_available
        self._editor.count_available = lambda blocks: 2 * real(blocks)  # type: ignore[method-assign]


class HitsCountedAsFree(Patched):
    """The capacity check counts found blocks as free ones that can still be handed out."""

    def patch(self) -> None:
        self._editor.count_available = lambda blocks: 0  # type: ignore[method-assign]


class NullHandedOut(Patched):
    """The pool's first block is handed out like any other."""

    def patch(self) -> None:
        self._pool._free._fresh = 0


class SwapInReversed(BlockManager):
    """A sequence comes back with the last two entries of its table exchanged."""

    def swap_in(self, seq_ids: Iterable[int]) -> list[tuple[int, int]] | None:
        seq_ids = list(seq_ids)
        pairs = super().swap_in(seq_ids)
        for seq_id in seq_ids if pairs is not None else []:
            table = self._sequences.find(seq_id).table
            table[-2:] = table[-2:][::-1]
        return pairs


class KeysOutliveTruncation(BlockManager):
    """Keys of rejected tokens stay with the sequence."""

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        sequence = self._sequences.find(seq_id)
        keys = list(sequence.keys)
        super().truncate(seq_id, num_tokens)
        sequence.keys = keys


class TokensOutliveTruncation(BlockManager):
    """Rejected tokens stay in the record from which keys are made."""

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        sequence = self._sequences.find(seq_id)
        tokens = sequence.tokens[:]
        super().truncate(seq_id, num_tokens)
        sequence.tokens = tokens


class TruncationKeepsBlocks(BlockManager):
    """Room is given back, its blocks are not."""

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        sequence = self._sequences.find(seq_id)
        keep = self._editor.blocks_for(num_tokens) if type(num_tokens) is int else 0
        extra = sequence.table[keep:]
        for block in extra:
            self._pool.refs[block] += 1
        super().truncate(seq_id, num_tokens)
        sequence.table.extend(extra)


class WritesBeyondRoom(BlockManager):
    """More tokens can be marked than there is room for."""

    def mark_computed(self, seq_id: int, token_ids: Iterable[int]) -> None:
        sequence = self._sequences.find(seq_id)
        ids = list(token_ids)
        sequence.reserved = max(sequence.reserved, sequence.computed + len(ids))
        super().mark_computed(seq_id, ids)


class ForksWithRoom(BlockManager):
    """A parent with room not yet computed is forked: both will write there."""

    def fork(self, parent_id: int, child_id: int) -> None:
        parent = self._sequences.find(parent_id)
        reserved, parent.reserved = parent.reserved, parent.computed
        super().fork(parent_id, child_id)
        parent.reserved = self._sequences.find(child_id).reserved = reserved


class ReleasesTheTail(BlockManager):
    """A block that is still being filled can be released."""

    def release(self, seq_id: int, indices: Iterable[int]) -> None:
        sequence = self._sequences.find(seq_id)
        computed, sequence.computed = sequence.computed, len(sequence.table) * self._block_size
        try:
            super().release(seq_id, indices)
        finally:
            sequence.computed = computed


class SlowRemoval(Patched):
    """A cached block leaves the middle of the free list by walking there."""

    def patch(self) -> None:
        free = self._pool._free
        real = free.remove_cached

        def walk(block: int) -> None:
            at = free._next[0]
            while at != block:
                at = free._next[at]
            real(block)

        free.remove_cached = walk  # type: ignore[method-assign]


class DicedBlocks(Patched):
    """Which empty block is handed out is left to chance."""

    def patch(self) -> None:
        free, dice = self._pool._free, Random()
        real = free.pop

        def roll() -> int:
            dice.shuffle(free._empty)
            return real()

        free.pop = roll  # type: ignore[method-assign]


ATTACKS: tuple[type[BlockManager], ...] = tuple(
    mutant
    for mutant in list(globals().values())
    if isinstance(mutant, type) and issubclass(mutant, BlockManager) and mutant not in (BlockManager, Patched, Rekeyed)
)

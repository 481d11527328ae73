"""Historical bugs of paged memory, each put into the real block manager. The docstring is the bug; the spec must find every one.

A mutant changes one method of the manager or of a part that it owns, and leaves the rest alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

from minipaged.memory import swap
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.blocks import PrefixHit, next_key, root_key
from minipaged.memory.tables import SequenceBlocks
from minipaged.memory.types import NULL_BLOCK, Admission, Allocation, token_array


class Rekeyed(BlockManager):
    """A manager whose keys are made by `key_of` and `root_of`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._editor.publish_full = self._publish_full  # type: ignore[method-assign]

    def key_of(self, parent: bytes, tokens: bytes) -> bytes:
        return next_key(parent, tokens)

    def root_of(self, salt: str | None) -> bytes:
        return root_key(salt)

    def lookup(self, token_ids: Iterable[int], *, salt: str | None = None) -> PrefixHit:
        hit = super().lookup(token_ids, salt=salt)
        hit.root = self.root_of(salt)
        size, data = 4 * self._block_size, hit.tokens.tobytes()
        for start in range(0, len(data) - size + 1, size):
            hit.keys.append(self.key_of(hit.keys[-1] if hit.keys else hit.root, data[start : start + size]))
        return hit

    def allocate(self, seq_id: int, token_ids: Iterable[int], **options: Any) -> Allocation | None:
        return super().allocate(
            seq_id, token_ids, **{**options, "hit": self.lookup(token_ids, salt=options.get("salt"))}
        )

    def _publish_full(self, sequence: SequenceBlocks) -> None:
        size = self._block_size
        for i in range(len(sequence.keys), sequence.computed // size):
            parent = sequence.keys[-1] if sequence.keys else sequence.root
            sequence.keys.append(self.key_of(parent, sequence.tokens[i * size : (i + 1) * size].tobytes()))
            if self._editor.publish(sequence, i) and sequence.promised_from is not None:
                self._editor.promises.writer_of[sequence.table[i]] = sequence.seq_id


class LateBoundary(BlockManager):
    """A block is taken one token after it is needed."""

    def append(self, seq_id: int, num_tokens: int) -> Allocation | None:
        got = super().append(seq_id, max(0, num_tokens - 1))
        if got is not None and num_tokens:
            self._sequences.find(seq_id).reserved += 1
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

    def lookup(self, token_ids: Iterable[int], *, salt: str | None = None) -> PrefixHit:
        return _WholeHit(self._editor.index, token_array(token_ids), self._block_size, salt)

    def allocate(self, seq_id: int, token_ids: Iterable[int], **options: Any) -> Allocation | None:
        return super().allocate(
            seq_id, token_ids, **{**options, "hit": self.lookup(token_ids, salt=options.get("salt"))}
        )


class _WholeHit(PrefixHit):
    def find(self, num_tokens: int) -> list[int]:
        tokens, self.tokens = self.tokens, array("I", [*self.tokens, 0])
        found = super().find(min(len(tokens), num_tokens))
        self.tokens = tokens
        return found


class TouchedBeforeTheCheck(BlockManager):
    """Found blocks are touched before the capacity check fails: they become the most recently used."""

    def allocate(self, seq_id: int, token_ids: Iterable[int], **options: Any) -> Allocation | None:
        got = super().allocate(seq_id, token_ids, **options)
        if got is None and options.get("read_cache", True):
            for block in self.lookup(token_ids, salt=options.get("salt")).find(2**32):
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
    """A hit on a later step's block: a prompt's blocks can be found as soon as they are allocated, whichever step computes them."""

    def allocate(self, seq_id: int, token_ids: Iterable[int], **options: Any) -> Allocation | None:
        got = super().allocate(seq_id, token_ids, **options)
        if got is not None and self._caching:
            sequence = self._sequences.find(seq_id)
            kept = sequence.computed, sequence.tokens[:], list(sequence.keys)
            sequence.tokens = array("I", token_ids)
            sequence.computed = sequence.reserved
            self._editor.publish_full(sequence)
            sequence.computed, sequence.tokens, sequence.keys = kept
        return got


class WithdrawnAfterAHit(BlockManager):
    """A writer is withdrawn after someone hit its block."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._editor.check_leaving = lambda sequence, num_tokens: None  # type: ignore[method-assign]


class PromiseOutlivesItsWriter(BlockManager):
    """A promise is kept after a withdrawal: what a victim was to write in this step can still be found."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._editor.promised_entries = lambda sequence, num_tokens: []  # type: ignore[method-assign]


class PromiseNeverKept(BlockManager):
    """A promise is taken back by a writer that leaves when the plan is final."""

    def end_step(self) -> None:
        super().end_step()
        self._planning = True


class CopiesWhatIsToBeWritten(BlockManager):
    """A fork of what this step is to write: the child's copy is made before it is written."""

    def fork(self, parent_id: int, child_id: int) -> None:
        parent = self._sequences.find(parent_id)
        promised, parent.promised_from = parent.promised_from, None
        super().fork(parent_id, child_id)
        parent.promised_from = promised


class SwapsOutWhatIsToBeWritten(BlockManager):
    """A sequence that found a block of this step is swapped out, before the block is written."""

    def swap_out(self, seq_ids: Iterable[int]) -> list[tuple[int, int]] | None:
        writers = self._editor.promises.writer_of
        kept = dict(writers)
        ids = list(seq_ids)
        for block, seq in kept.items():
            if seq not in ids:
                del writers[block]
        got = super().swap_out(ids)
        writers.update({block: seq for block, seq in kept.items() if seq not in ids})
        return got


class EqualContentForgotten(BlockManager):
    """A copy of equal content is forgotten: the block published first is the only one that is remembered."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        index, real = self._editor.index, self._editor.index.publish
        index.publish = lambda key, block: key not in index._block_of and real(key, block)  # type: ignore[method-assign]


class SharedOnceForEach(BlockManager):
    """Whether a request can ever fit counts its prompt once for each of its samples."""

    def can_admit(self, num_tokens: int, max_new_tokens: int = 0, **options: Any) -> Admission:
        blocks = options.get("num_sequences", 1) * self._editor.blocks_for(num_tokens + max_new_tokens)
        if blocks > self._num_blocks - 1:
            return Admission.NEVER
        return super().can_admit(num_tokens, max_new_tokens, **options)


class StaleHandle(BlockManager):
    """A handle that was looked up earlier finds what was there then."""

    def lookup(self, token_ids: Iterable[int], *, salt: str | None = None) -> PrefixHit:
        return _RemembersBlocks(self._editor.index, token_array(token_ids), self._block_size, salt)


class _RemembersBlocks(PrefixHit):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._found = super().find(len(self.tokens))

    def find(self, num_tokens: int) -> list[int]:
        return self._found[: max(0, min(len(self.tokens) - 1, num_tokens)) // self._block_size]


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


class BuiltinHashKeys(Rekeyed):
    """Keys are the built-in hash of the parent's key and the tokens."""

    def key_of(self, parent: bytes, tokens: bytes) -> bytes:
        return repr(hash((parent, hash(tuple(array("I", tokens)))))).encode()

    def root_of(self, salt: str | None) -> bytes:
        return repr(salt).encode()


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
        swap.next_step_blocks = lambda group, block_size: 0
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
    WithdrawnAfterAHit,
    PromiseOutlivesItsWriter,
    PromiseNeverKept,
    CopiesWhatIsToBeWritten,
    SwapsOutWhatIsToBeWritten,
    EqualContentForgotten,
    SharedOnceForEach,
    StaleHandle,
    CopyAfterWrite,
    SwapDuplicates,
    BuiltinHashKeys,
    ReleasedTwice,
    AbortLeaks,
    KeysLostInSwap,
    SwapStealsShared,
    SwapInTooEager,
)

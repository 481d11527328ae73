"""Block tables: which physical block holds which tokens of which sequence. Allocate, append, fork, copy-on-write, free, swap, prefix cache.

Knows integers: sequences, token ids, blocks. Knows nothing of text, tensors, requests or time.

Who owns which tokens of a sequence (half-open ranges, 0 <= cached <= computed <= room <= len(table) * block_size):

    [0, cached)         found in the prefix cache by allocate. Others wrote their KV; their blocks are full and never written
                        by this sequence while anybody can find or hold them.
    [cached, computed)  the caller has written their KV and said so with mark_computed: that is when a full block is published.
    [computed, room)    promised by allocate or append: the caller may write their KV in this step or later, in order. Nobody
                        else can read it: these blocks have no key, and a fork is refused while there is such room.
    [room, tail's end)  nobody's. The next append promises it if this sequence is the block's only holder, else copies the block.

A block that can be found is never written: a sequence that was truncated into one and goes on erases its key first if it is
the only holder, and copies the block otherwise. truncate may cut computed tokens too (rejected ones); until they are
overwritten their full blocks can still be found, since the content stands.

A step: begin_step; calls that promise room, swap and give up; the caller runs swap-outs, swap-ins, copies and writes, in this
order; mark_computed, fork, free. A copy can be given up from the append that told it until its writer's mark_computed or the
next begin_step: truncate to where it began, swap_out and free do so, and the caller must then drop it from the step. Swaps
are never given up. Everything is deterministic, and a call that raises or returns None has changed nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from minipaged.config import check_bool, check_int, check_real
from minipaged.errors import InputError
from minipaged.memory import swap
from minipaged.memory.checks import check_salt, id_list, token_array
from minipaged.memory.host_pool import HostPool
from minipaged.memory.prefix_index import root_key
from minipaged.memory.sequence_blocks import SequenceBlocks, SequenceDirectory
from minipaged.memory.table_editor import TableEditor
from minipaged.memory.types import NULL_BLOCK, Admission, Allocation, BlockEvent, PoolUsage

MAX_BLOCKS = 2**26
MAX_BLOCK_SIZE = 2**16
_NOTHING = Allocation(0, (), ())


class BlockManager:
    """The paged memory of one engine.

    num_blocks: device blocks, the null block (0) included; block_size: tokens a block; num_host_blocks: blocks for swapped sequences;
    watermark: share of the pool that new and returning sequences leave free for those that run. InputError for anything out of range.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        num_host_blocks: int = 0,
        prefix_caching: bool = True,
        watermark: float = 0.01,
    ) -> None:
        check_int("num_blocks", num_blocks, 2, MAX_BLOCKS)
        check_int("block_size", block_size, 1, MAX_BLOCK_SIZE)
        check_int("num_host_blocks", num_host_blocks, 0, MAX_BLOCKS)
        check_bool("prefix_caching", prefix_caching)
        self._num_blocks = num_blocks
        self.set_watermark(watermark)
        self._block_size = block_size
        self._caching = prefix_caching
        self._editor = TableEditor(num_blocks, block_size)
        self._pool = self._editor.pool
        self._host = HostPool(num_host_blocks)
        self._sequences = SequenceDirectory()
        self._arrivals: set[int] = set()  # device blocks that this step swaps in

    # ---- steps

    def begin_step(self) -> None:
        """A new step: what the step before copied or swapped from may be handed out again, its copies can no longer be given up."""
        self._pool.begin_step()
        self._host.begin_step()
        self._editor.copies.begin_step()
        self._arrivals.clear()

    def take_events(self) -> tuple[BlockEvent, ...]:
        """What happened since the last call, in causal order. The list grows until somebody takes it."""
        return self._editor.take_events()

    # ---- coming in

    def can_admit(
        self,
        num_tokens: int,
        max_new_tokens: int = 0,
        *,
        num_sequences: int = 1,
        token_ids: Iterable[int] | None = None,
        salt: str | None = None,
    ) -> Admission:
        """Whether `num_sequences` sequences of num_tokens tokens each may start now.

        NEVER: with all their new tokens and nothing shared they exceed the pool. token_ids: blocks found for these are not
        needed anew, and those of them that nobody holds cannot be handed out to others (each counts once). OK leaves the
        watermark free, unless no sequence holds blocks.
        """
        check_int("num_tokens", num_tokens, 0)
        check_int("max_new_tokens", max_new_tokens, 0)
        check_int("num_sequences", num_sequences, 1)
        check_salt(salt)
        if num_sequences * self._editor.blocks_for(num_tokens + max_new_tokens) > self._pool.num_blocks - 1:
            return Admission.NEVER
        hits: list[int] = []
        if token_ids is not None:
            tokens = token_array(token_ids)
            if self._caching:
                hits = self._editor.match(tokens, salt, num_tokens)[0]
        need = num_sequences * (self._editor.blocks_for(num_tokens) - len(hits)) + self._editor.count_available(hits)
        return Admission.OK if need + self._watermark() <= self._pool.num_available else Admission.LATER

    def match_prefix(self, token_ids: Iterable[int], *, salt: str | None = None) -> int:
        """Tokens that a new sequence would find in the cache: whole blocks, and never all of its tokens. Changes nothing."""
        check_salt(salt)
        tokens = token_array(token_ids)
        return len(self._editor.match(tokens, salt, len(tokens))[0]) * self._block_size if self._caching else 0

    def allocate(
        self,
        seq_id: int,
        token_ids: Iterable[int],
        *,
        num_tokens: int | None = None,
        salt: str | None = None,
        read_cache: bool = True,
        reserve_tokens: int | None = None,
    ) -> Allocation | None:
        """A table for a new sequence: the longest cached prefix, and blocks for the first `num_tokens` tokens (all, if None).

        Found blocks lie wholly inside the first num_tokens, and at least one of token_ids is left to compute. reserve_tokens
        is for managers that reserve ahead; here blocks come on demand, so it is checked and changes nothing. None: no room,
        and nothing changed. InputError: seq_id is in use.
        """
        self._sequences.check_new(seq_id)
        tokens = token_array(token_ids)
        wanted = len(tokens) if num_tokens is None else check_int("num_tokens", num_tokens, 0, len(tokens))
        check_salt(salt)
        check_bool("read_cache", read_cache)
        if reserve_tokens is not None:
            check_int("reserve_tokens", reserve_tokens, 0)
        blocks, keys = self._editor.match(tokens, salt, wanted) if self._caching and read_cache else ([], [])
        count = self._editor.blocks_for(wanted) - len(blocks)
        if count + self._editor.count_available(blocks) > self._pool.num_available:
            return None
        sequence = SequenceBlocks(seq_id, root_key(salt) if self._caching else b"")
        self._sequences.add(sequence)
        for index, block in enumerate(
            blocks
        ):  # all of them, before one is taken: what is found must not be evicted for the rest
            self._pool.share(block)
            self._editor.tell("cache_hit", seq_id, block, -1, index)
        sequence.table = blocks
        sequence.keys = keys
        sequence.computed = len(blocks) * self._block_size
        sequence.room = wanted
        if self._caching:
            sequence.tokens = tokens[: sequence.computed]
        return Allocation(sequence.computed, self._editor.grow(sequence, count), ())

    # ---- growing

    def append(self, seq_id: int, num_tokens: int) -> Allocation | None:
        """Room for the next `num_tokens` tokens. None: no room, nothing changed.

        If they begin in the tail block and somebody else holds it too, it is copied: the destination replaces it in the table.
        """
        sequence = self._sequences.on_device(seq_id)
        if type(num_tokens) is not int or num_tokens < 0:
            check_int("num_tokens", num_tokens, 0)
        table, room = sequence.table, sequence.room
        have, need = len(table), -(-(room + num_tokens) // self._block_size)
        if not num_tokens or room >= have * self._block_size:
            if need > have + self._pool.num_available:
                return None
            sequence.room = room + num_tokens
            return Allocation(0, self._editor.grow(sequence, need - have), ()) if need > have else _NOTHING
        tail = table[-1]
        copies = self._editor.copies.must_copy(tail, room - (have - 1) * self._block_size)
        if need - have + copies > self._pool.num_available:
            return None
        pair: tuple[tuple[int, int], ...] = ()
        if copies:
            pair = (self._editor.copy_tail(sequence),)
        elif self._editor.index.erase(tail):  # truncated into a full block, and about to write in it
            self._editor.tell("evict", seq_id, tail, -1, have - 1)
        sequence.room = room + num_tokens
        if need == have and not pair:
            return _NOTHING
        return Allocation(0, self._editor.grow(sequence, need - have), pair)

    def mark_computed(self, seq_id: int, token_ids: Iterable[int]) -> None:
        """The next tokens are these and their KV is written. Blocks that become full are published, unless an entry was released before.

        InputError for more tokens than there is promised room for.
        """
        sequence = self._sequences.on_device(seq_id)
        tokens = token_array(token_ids)
        computed = sequence.computed + len(tokens)
        if computed > sequence.room:
            raise InputError(
                f"sequence {seq_id} has room for {sequence.room - sequence.computed} tokens, not {len(tokens)}"
            )
        if not tokens:
            return
        sequence.computed = computed
        self._editor.copies.end(sequence)  # it has been written to, so the copy was made
        if self._caching and sequence.publishes:
            sequence.tokens.extend(tokens)
            if computed // self._block_size > len(sequence.keys):
                self._editor.publish_full(sequence)

    def fork(self, parent_id: int, child_id: int) -> None:
        """A child with the parent's table: nothing is allocated, each block has one more holder.

        InputError while the parent has room that is not computed yet.
        """
        parent = self._sequences.on_device(parent_id)
        self._sequences.check_new(child_id)
        if parent.room != parent.computed:
            raise InputError(
                f"sequence {parent_id} has room for {parent.room - parent.computed} tokens that are not computed: truncate it first"
            )
        child = parent.child(child_id)
        self._sequences.add(child)
        for block in child.table:
            if block != NULL_BLOCK:
                self._pool.share(block)
        self._editor.tell("fork", child_id, -1, parent_id, len(child.table))

    # ---- giving back

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens: blocks and promised room beyond them go, and a copy with no writes left after it.

        num_tokens may be less than what is computed: the rest is rejected, and what follows is written over it. InputError
        for more than the room there is, or inside an entry that was released.
        """
        sequence = self._sequences.on_device(seq_id)
        check_int("num_tokens", num_tokens, 0, sequence.room)
        keep = self._editor.blocks_for(num_tokens)
        if num_tokens < keep * self._block_size and sequence.table[keep - 1] == NULL_BLOCK:
            raise InputError(f"sequence {seq_id} cannot be cut at token {num_tokens}: entry {keep - 1} was released")
        self._editor.cut(sequence, num_tokens)

    def release(self, seq_id: int, indices: Iterable[int]) -> None:
        """These table entries become null; null ones stay so. Nothing that the sequence computes from then on is published.

        InputError unless every entry is full of computed tokens.
        """
        sequence = self._sequences.on_device(seq_id)
        full = sequence.computed // self._block_size
        chosen = id_list("index", indices)
        for index in chosen:
            if index >= full:
                raise InputError(
                    f"entry {index} of sequence {seq_id} cannot be released: its first {full} blocks are full and computed"
                )
        for index in sorted(chosen, reverse=True):
            block = sequence.table[index]
            if block != NULL_BLOCK:
                sequence.publishes = False
                sequence.table[index] = NULL_BLOCK
                self._editor.tell("release", seq_id, block, -1, index)
                self._pool.drop(block)

    def free(self, seq_id: int) -> None:
        """The sequence is gone: its blocks lose a holder, the deepest first. KeyError if it is unknown or freed already."""
        sequence = self._sequences.find(seq_id)
        if sequence.host is not None:
            for index in range(len(sequence.host) - 1, -1, -1):
                block = sequence.host[index]
                if block >= 0:
                    self._host.drop(block)
                    self._editor.tell("free", seq_id, block, -1, index, "host")
        else:
            self._editor.cut(sequence, 0)
        self._sequences.remove(seq_id)

    # ---- the host

    def swap_out(self, seq_ids: Iterable[int]) -> list[tuple[int, int]] | None:
        """Move these sequences to the host together. (device, host) pairs, each block once.

        None: no room there, or this very step swaps one of them in. Copies of theirs in this step are given up, with the room
        promised after them. Their full blocks can still be found on the device until they are handed out again.
        """
        group = self._sequences.group(seq_ids, swapped=False)
        blocks = swap.blocks_to_move(group)
        if len(blocks) > self._host.num_available or not self._arrivals.isdisjoint(blocks):
            return None
        for sequence in group:
            if sequence.pending is not None:
                self._editor.cut(sequence, sequence.pending.room)
        return swap.move_out(group, self._pool, self._host, self._editor.tell)

    def swap_in(self, seq_ids: Iterable[int]) -> list[tuple[int, int]] | None:
        """Bring these sequences back together. (host, device) pairs, each block once.

        None: no room for their blocks, those of one more token each, and the watermark (which is left aside while no sequence
        holds blocks). Their full blocks are published again, where no other block has their content by then.
        """
        group = self._sequences.group(seq_ids, swapped=True)
        blocks = {block for sequence in group for block in sequence.host or () if block >= 0}
        need = len(blocks) + swap.next_step_blocks(group, self._host, self._block_size)
        if need + self._watermark() > self._pool.num_available:
            return None
        pairs = swap.move_in(group, self._pool, self._host, self._editor.take, self._editor.tell)
        for _, block in pairs:
            self._arrivals.add(block)
            self._pool.guard(block)
        for sequence in group:
            for index in range(len(sequence.keys)):
                self._editor.publish(sequence, index)
        return pairs

    # ---- the cache

    def pin(self, block_id: int) -> None:
        """Keep a block that is held or cached, whoever leaves. InputError for one that holds nothing."""
        self._check_block(block_id)
        if block_id == NULL_BLOCK or (not self._pool.refs[block_id] and block_id not in self._editor.index):
            raise InputError(f"block {block_id} cannot be pinned: it holds nothing")
        self._pool.share(block_id)
        self._pool.pins[block_id] = self._pool.pins.get(block_id, 0) + 1
        self._editor.tell("pin", -1, block_id, -1, -1)

    def unpin(self, block_id: int) -> None:
        """Undo one pin. InputError if there is none."""
        self._check_block(block_id)
        pins = self._pool.pins.get(block_id, 0)
        if not pins:
            raise InputError(f"block {block_id} is not pinned")
        if pins == 1:
            del self._pool.pins[block_id]
        else:
            self._pool.pins[block_id] = pins - 1
        self._editor.tell("unpin", -1, block_id, -1, -1)
        self._pool.drop(block_id)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached content. False, and nothing changed, while a request or a pin holds a block, on the device or the host."""
        if self._pool.num_free < self._pool.num_blocks - 1 or self._host.refs:
            return False
        for block in self._editor.index.blocks():
            self._editor.index.erase(block)
            self._editor.tell("evict", -1, block, -1, -1)
        self._pool.clear_cached()
        return True

    # ---- looking

    def table(self, seq_id: int) -> tuple[int, ...]:
        """The sequence's device blocks; 0 where an entry was released; () while it is swapped out."""
        return tuple(self._sequences.find(seq_id).table)

    def host_table(self, seq_id: int) -> tuple[int, ...]:
        """The sequence's host blocks while it is swapped out, -1 where an entry was released; () while it is on the device."""
        return tuple(self._sequences.find(seq_id).host or ())

    def ref_count(self, block_id: int) -> int:
        """Table entries and pins that name the block; 0 for the null block."""
        self._check_block(block_id)
        return self._pool.refs[block_id]

    def usage(self) -> PoolUsage:
        """Blocks by state."""
        pool = self._pool
        total, free = pool.num_blocks, pool.num_free
        return PoolUsage(
            total,
            1,
            free,
            pool.num_cached,
            total - 1 - free,
            len(pool.pins),
            self._host.num_blocks,
            self._host.num_free,
        )

    def _check_block(self, block_id: int) -> None:
        check_int("block_id", block_id, 0, self._pool.num_blocks - 1)

    def set_watermark(self, share: float) -> None:
        """Another watermark from now on. InputError if it is no share."""
        self._watermark_blocks = int(check_real("watermark", share, 0.0, 1.0) * self._num_blocks)

    def _watermark(self) -> int:
        """Blocks to leave free for those that run: none while nobody holds any."""
        return self._watermark_blocks if self._watermark_blocks and self._sequences.hold_device_blocks() else 0

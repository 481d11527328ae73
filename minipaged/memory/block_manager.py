"""Block tables: which physical block holds which tokens of which sequence. Allocate, append, fork, copy-on-write, free, swap, prefix cache.

It handles integers only: numbers of sequences, token ids, numbers of blocks. No text, no tensors, no requests, no time.

Who owns which tokens of a sequence (half-open ranges, 0 <= cached <= computed <= reserved <= len(table) * block_size):

    [0, cached)           found in the prefix cache by allocate. Others write their KV, in this step or before; their blocks are full and
                          never written by this sequence while anybody can find or hold them.
    [cached, computed)    the caller has named these tokens with mark_computed: their KV is written by the step being planned, or was by
                          an earlier one. That is when a full block is published: others may share it in this step and later.
    [computed, reserved)  allocate or append found a place for them: the caller may write their KV in this step or later, in order.
                          Nobody else can read it: these blocks have no key, and a fork is refused while there are such tokens.
    [reserved, tail's end)  nobody's. The next append reserves it if this sequence is the block's only holder, else copies the block.

A block that can be found is not written by a later step: a sequence that was truncated into one and goes on erases its key first if it
is the only holder, and copies the block otherwise. truncate may cut computed tokens too (rejected ones); until they are
overwritten their full blocks can still be found, since the content stands.

A step:

    begin_step()          opens the plan
    allocate, append, swap_out, swap_in, mark_computed, truncate, free, in any order
    end_step()            closes it: what the plan says will be done
    take_moves()          where the host caches: more swap-outs and swap-ins
    the caller runs swap-outs, swap-ins, copies and writes, in this order
    mark_computed, fork, truncate, release, free

While the plan is open nothing of it has been done, so a sequence can still leave it by truncate, swap_out or free. Its copy is given
up then (the caller drops it from the step), and the blocks that it had promised to write can no longer be found; the call is
refused while somebody else holds one of these. Swaps are never given up. A caller that never calls end_step marks what it has
written, and takes no promise back; one that does calls it once before its first step.

Everything is deterministic, and a call that raises or returns None has changed nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from minipaged.config import check_bool, check_int, check_real
from minipaged.errors import InputError
from minipaged.memory import swap
from minipaged.memory.blocks import PrefixHit, PrefixIndex
from minipaged.memory.retention import KEEP_ALL, Retention
from minipaged.memory.tables import SequenceBlocks, SequenceDirectory, TableEditor
from minipaged.memory.types import (
    NULL_BLOCK,
    Admission,
    Allocation,
    BlockEvent,
    PoolUsage,
    check_salt,
    id_list,
    token_array,
)

MAX_BLOCKS = 2**26
MAX_BLOCK_SIZE = 2**16
_NOTHING = Allocation(0, (), ())


class BlockManager:
    """The paged memory of one engine.

    num_blocks: device blocks, the null block (0) included; block_size: tokens a block; num_host_blocks: blocks for swapped sequences;
    host_cache: whether the rest of them keeps content that the device evicts, which is found like any other (the caller runs take_moves()
    with each step); watermark: share of the pool that new and returning sequences leave free for those that run; retention: which
    entries the caller releases as a sequence grows. InputError for anything out of range.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        num_host_blocks: int = 0,
        prefix_caching: bool = True,
        watermark: float = 0.01,
        retention: Retention = KEEP_ALL,
        host_cache: bool = False,
    ) -> None:
        check_int("num_blocks", num_blocks, 2, MAX_BLOCKS)
        check_int("block_size", block_size, 1, MAX_BLOCK_SIZE)
        check_int("num_host_blocks", num_host_blocks, 0, MAX_BLOCKS)
        check_bool("prefix_caching", prefix_caching)
        self._num_blocks = num_blocks
        self.set_watermark(watermark)
        self._block_size = block_size
        self._caching = prefix_caching
        self.retention = retention
        self._editor = TableEditor(num_blocks, block_size)
        self._pool = self._editor.pool
        self._host = swap.HostPool(num_host_blocks)
        check_bool("host_cache", host_cache)
        self._host_index: PrefixIndex | None = None  # where the host's cached content is found
        if host_cache and prefix_caching and num_host_blocks:
            self._host_index = self._host.index
            self._editor.save = self._spill
        self._spills: list[tuple[int, int]] = []  # (device, host), since take_moves
        self._fetches: list[tuple[int, int]] = []  # (host, device)
        self._sequences = SequenceDirectory()
        self._arrivals: set[int] = set()  # device blocks that this step swaps in
        self._ends_steps = False  # whether the caller says when its plans are final
        self._planning = False  # between begin_step and end_step

    # ---- steps

    def begin_step(self) -> None:
        """Open the plan of a new step: what the step before copied or swapped from may be handed out again."""
        self._settle()
        # Every copy and swap guards the block that it reads, so without guards there is nothing on the host to let go of either.
        if self._pool.guards:
            self._pool.begin_step()
            self._arrivals.clear()
            self._host.begin_step()
        elif self._editor.save is not None:
            self._host.begin_step()
        self._planning = self._ends_steps

    def end_step(self) -> None:
        """The plan is final: its copies are made, and what it promised to write stays published."""
        self._settle()
        self._ends_steps = True
        self._planning = False

    def _settle(self) -> None:
        """What the plan copies and promises can no longer be taken back."""
        if self._editor.copies.kept_slots:
            self._editor.copies.settle()
        if self._editor.promises.writers:
            self._editor.promises.settle()

    def take_moves(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """What the host's cache adds to the step: swap-outs (device, host) and swap-ins (host, device), since the last call. They are
        run even if whoever caused them leaves the step."""
        moves = self._spills, self._fetches
        self._spills, self._fetches = [], []
        return moves

    def _spill(self, key: bytes, block: int, seq_id: int) -> None:
        """The content of a device block goes on in the host's cache, if there is room."""
        home = self._host.keep(key)
        if home is not None:
            self._spills.append((block, home))
            self._editor.emit("spill", seq_id, block, home, -1)

    def _fetch(self, sequence: SequenceBlocks, key: bytes, home: int, index: int) -> int:
        """A device block for what the host holds, published. It can neither be swapped out nor handed out in the step that fills it."""
        block = self._editor.take(sequence.seq_id)
        self._editor.emit("alloc", sequence.seq_id, block, -1, index)
        self._editor.emit("host_hit", sequence.seq_id, block, home, index)
        self._fetches.append((home, block))
        self._arrivals.add(block)
        self._pool.guard(block)
        if self._editor.index.publish(key, block):
            self._editor.emit("publish", sequence.seq_id, block, -1, index)
        return block

    def take_events(self) -> tuple[BlockEvent, ...]:
        """What happened since the last call, in causal order. The list grows until somebody takes it."""
        return self._editor.take_events()

    # ---- coming in

    def lookup(self, token_ids: Iterable[int], *, salt: str | None = None) -> PrefixHit:
        """A prompt's keys, to be given to can_admit and allocate, now or in a later step: so it is hashed once. Changes nothing."""
        check_salt(salt)
        return PrefixHit(
            self._editor.index, token_array(token_ids), self._block_size, salt, self.retention, self._host_index
        )

    def match_prefix(self, token_ids: Iterable[int], *, salt: str | None = None) -> int:
        """Tokens that a new sequence would find in the cache: whole blocks, and never all of its tokens. Changes nothing."""
        return self.lookup(token_ids, salt=salt).num_tokens

    def can_admit(
        self,
        num_tokens: int,
        max_new_tokens: int = 0,
        *,
        num_sequences: int = 1,
        token_ids: Iterable[int] | None = None,
        salt: str | None = None,
        hit: PrefixHit | None = None,
        chunk: int | None = None,
    ) -> Admission:
        """Whether a request of `num_sequences` samples of one prompt of num_tokens tokens may start now.

        They hold the prompt's full blocks once; its tail and all that follows is each sample's own. NEVER: with all their new tokens
        they exceed the pool, though a step computes at most `chunk` tokens (None: all) and the retention policy releases what it may
        in between. hit (or token_ids, with their salt): blocks found for these are not needed anew, and those of
        them that nobody holds cannot be handed out to others (each counts once). OK leaves the watermark free, unless no sequence
        holds blocks.
        """
        check_int("num_tokens", num_tokens, 0)
        check_int("max_new_tokens", max_new_tokens, 0)
        check_int("num_sequences", num_sequences, 1)
        check_salt(salt)
        shared = num_tokens // self._block_size
        most = self.retention.most_blocks_of_request(num_tokens, max_new_tokens, num_sequences, self._block_size, chunk)
        if most > self._pool.num_blocks - 1:
            return Admission.NEVER
        if hit is not None:
            self._check_hit(hit)
        elif token_ids is not None:
            hit = self.lookup(token_ids, salt=salt)
        found = hit.find(num_tokens) if hit is not None else []
        need = shared + num_sequences * (self._editor.blocks_for(num_tokens) - shared)
        need -= sum(block >= 0 for block in found)
        need += self._editor.count_available(found)
        return Admission.OK if need + self._watermark() <= self._pool.num_available else Admission.LATER

    def allocate(
        self,
        seq_id: int,
        token_ids: Iterable[int],
        *,
        num_tokens: int | None = None,
        salt: str | None = None,
        read_cache: bool = True,
        hit: PrefixHit | None = None,
    ) -> Allocation | None:
        """A table for a new sequence: the longest cached prefix, and blocks for the first `num_tokens` tokens (all, if None).

        Found blocks lie wholly inside the first num_tokens, and at least one of token_ids is left to compute. Entries of the prefix that
        the retention policy would have released are null. hit: what `lookup` gave for these tokens; what it finds is looked up anew.
        None: no room, and nothing changed. InputError: seq_id is in use, or the hit is of other tokens.
        """
        self._sequences.check_new(seq_id)
        tokens = token_array(token_ids)
        wanted = len(tokens) if num_tokens is None else check_int("num_tokens", num_tokens, 0, len(tokens))
        check_salt(salt)
        check_bool("read_cache", read_cache)
        if hit is not None:
            self._check_hit(hit)
            if hit.tokens != tokens:
                raise InputError(
                    f"hit is of other tokens ({len(hit.tokens)} of them, not these {len(tokens)}): look these up"
                )
        if hit is None or hit.salt != salt:
            hit = PrefixHit(self._editor.index, tokens, self._block_size, salt, self.retention, self._host_index)
        blocks = hit.find(wanted) if read_cache else []
        count, on_host = self._editor.blocks_for(wanted) - len(blocks), [~block for block in blocks if block < 0]
        if count + len(on_host) + self._editor.count_available(blocks) > self._pool.num_available:
            return None
        sequence = SequenceBlocks(seq_id, hit.root)
        self._sequences.add(sequence)
        # All of them, before one is taken: what is found must not be evicted for the rest.
        for block in blocks:
            if block > 0:
                self._pool.share(block)
        for home in on_host:
            self._host.touch(home)
        for index, block in enumerate(blocks):
            if block > 0:
                self._editor.emit("cache_hit", seq_id, block, -1, index)
            elif block < 0:
                blocks[index] = self._fetch(sequence, hit.keys[index], ~block, index)
        sequence.table = blocks
        sequence.keys = hit.keys[: len(blocks)]
        sequence.computed = len(blocks) * self._block_size
        sequence.reserved = wanted
        sequence.publishes = (
            self._caching and self.retention.shares and (self.retention.publishes or NULL_BLOCK not in blocks)
        )
        if self._caching:
            sequence.tokens = tokens[: sequence.computed]
        return Allocation(sequence.computed, self._editor.grow(sequence, count), ())

    def _check_hit(self, hit: PrefixHit) -> None:
        if not isinstance(hit, PrefixHit) or hit.index is not self._editor.index:
            raise InputError(f"hit must be what this manager's lookup returned, not {hit!r}")

    # ---- growing

    def append(self, seq_id: int, num_tokens: int) -> Allocation | None:
        """A place for the next `num_tokens` tokens, known or not yet. None: no room, nothing changed.

        If they begin in the tail block and somebody else holds it too, it is copied: the destination replaces it in the table.
        """
        sequence = self._sequences.on_device(seq_id)
        if type(num_tokens) is not int or num_tokens < 0:
            check_int("num_tokens", num_tokens, 0)
        if not self.retention.shares:
            return self._append_to_own(sequence, num_tokens)
        table, reserved = sequence.table, sequence.reserved
        have, need = len(table), -(-(reserved + num_tokens) // self._block_size)
        if not num_tokens or reserved >= have * self._block_size:
            if need > have + self._pool.num_available:
                return None
            sequence.reserved = reserved + num_tokens
            return Allocation(0, self._editor.grow(sequence, need - have), ()) if need > have else _NOTHING
        tail = table[-1]
        copies = self._editor.copies.must_copy(tail, reserved - (have - 1) * self._block_size)
        if need - have + copies > self._pool.num_available:
            return None
        pair: tuple[tuple[int, int], ...] = ()
        if copies:
            pair = (self._editor.copy_tail(sequence),)
        elif self._editor.index.erase(tail):  # truncated into a full block, and about to write in it
            self._editor.emit("evict", seq_id, tail, -1, have - 1)
        sequence.reserved = reserved + num_tokens
        if need == have and not pair:
            return _NOTHING
        return Allocation(0, self._editor.grow(sequence, need - have), pair)

    def _append_to_own(self, sequence: SequenceBlocks, num_tokens: int) -> Allocation | None:
        """As `append`, of a sequence that is about to write in any of its blocks, since heavy hitters' scores grow there and the tokens of
        any slot may go: each block that somebody else holds too is copied. These copies are not given up.
        """
        if not num_tokens:
            return _NOTHING
        table, seq_id = sequence.table, sequence.seq_id
        shared = [index for index, block in enumerate(table) if self._pool.refs[block] > 1]
        grown = max(0, self._editor.blocks_for(sequence.reserved + num_tokens) - len(table))
        if grown + len(shared) > self._pool.num_available:
            return None
        pairs = []
        for index in shared:
            source, destination = table[index], self._editor.take(seq_id)
            self._pool.guard(source)
            table[index] = destination
            self._pool.drop(source)
            self._arrivals.add(destination)  # not to be swapped out before it is filled
            self._editor.emit("copy", seq_id, source, destination, index)
            pairs.append((source, destination))
        sequence.reserved += num_tokens
        return Allocation(0, self._editor.grow(sequence, grown), tuple(pairs))

    def mark_computed(self, seq_id: int, token_ids: Iterable[int]) -> None:
        """The next tokens are these, and the step being planned (or an earlier one) writes their KV.

        Blocks that become full are published, unless an entry was released before: whoever is allocated from now on may share them.
        InputError for more tokens than are reserved.
        """
        sequence = self._sequences.on_device(seq_id)
        tokens = token_array(token_ids)
        computed = sequence.computed + len(tokens)
        if computed > sequence.reserved:
            raise InputError(
                f"sequence {seq_id} has room for {sequence.reserved - sequence.computed} tokens, not {len(tokens)}"
            )
        if not tokens:
            return
        if not self._planning:
            self._editor.copies.end(sequence)  # it has been written to, so the copy was made
        elif sequence.promised_from is None:
            self._editor.promises.add(sequence)
        sequence.computed = computed
        if sequence.publishes:
            sequence.tokens.extend(tokens)
            if computed // self._block_size > len(sequence.keys):
                self._editor.publish_full(sequence)

    def fork(self, parent_id: int, child_id: int) -> None:
        """A child with the parent's table: nothing is allocated, each block has one more holder.

        InputError while the parent has reserved tokens that are not computed, or the step being planned is still to write some of its
        (a copy of the tail in this step would come before that write).
        """
        parent = self._sequences.on_device(parent_id)
        self._sequences.check_new(child_id)
        parent.check_fork()
        child = parent.child(child_id)
        self._sequences.add(child)
        for block in child.table:
            if block != NULL_BLOCK:
                self._pool.share(block)
        self._editor.emit("fork", child_id, -1, parent_id, len(child.table))

    # ---- giving back

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens: blocks and reserved places beyond them go, and a copy with no writes left after it.

        num_tokens may be less than what is computed: the rest is rejected, and what follows is written over it. InputError
        for more than is reserved, inside an entry that was released, inside a found block that another sequence writes in this step, or
        if somebody else holds what this one was to write in it.
        """
        sequence = self._sequences.on_device(seq_id)
        check_int("num_tokens", num_tokens, 0, sequence.reserved)
        keep = self._editor.blocks_for(num_tokens)
        if num_tokens < keep * self._block_size and sequence.table[keep - 1] == NULL_BLOCK:
            raise InputError(f"sequence {seq_id} cannot be cut at token {num_tokens}: entry {keep - 1} was released")
        if self._editor.promises.writer_of:
            self._editor.check_leaving(sequence, num_tokens)
        self._editor.cut(sequence, num_tokens)

    def release(self, seq_id: int, indices: Iterable[int]) -> None:
        """These table entries become null; null ones stay so. Nothing that the sequence computes from then on is published, unless the
        retention policy is a window, behind which keys and values depend on the tokens alone.

        InputError unless every entry is full of computed tokens, none of which the step being planned is still to write.
        """
        sequence = self._sequences.on_device(seq_id)
        written = sequence.computed if sequence.promised_from is None else sequence.promised_from
        full = written // self._block_size
        chosen = id_list("index", indices)
        for index in chosen:
            if index >= full:
                raise InputError(
                    f"entry {index} of sequence {seq_id} cannot be released: its first {full} blocks are full and computed"
                )
        for index in sorted(chosen, reverse=True):
            block = sequence.table[index]
            if block != NULL_BLOCK:
                sequence.publishes = sequence.publishes and self.retention.publishes
                sequence.table[index] = NULL_BLOCK
                self._editor.emit("release", seq_id, block, -1, index)
                self._pool.drop(block)

    def free(self, seq_id: int) -> None:
        """The sequence is gone: its blocks lose a holder, the deepest first. KeyError if it is unknown or freed already.

        InputError if somebody else holds what it was to write in the step being planned.
        """
        sequence = self._sequences.find(seq_id)
        if sequence.host is not None:
            for index in range(len(sequence.host) - 1, -1, -1):
                block = sequence.host[index]
                if block >= 0:
                    self._host.drop(block)
                    self._editor.emit("free", seq_id, block, -1, index, "host")
        else:
            if self._editor.promises.writer_of:
                self._editor.check_leaving(sequence, 0)
            self._editor.cut(sequence, 0)
        self._sequences.remove(seq_id)

    # ---- the host

    def swap_out(self, seq_ids: Iterable[int]) -> list[tuple[int, int]] | None:
        """Move these sequences to the host together. (device, host) pairs, each block once.

        None: no room there, or this very step swaps one of their blocks in or has another sequence write one. Copies and promises of
        theirs in this step are given up, with what is reserved after them; InputError if somebody else holds what one of them was to
        write. Their full blocks can still be found on the device until they are handed out again.
        """
        group = self._sequences.group(seq_ids, swapped=False)
        ends = [sequence.before_plan() for sequence in group]
        not_yet_written = set(self._editor.promises.writer_of)
        for sequence, end in zip(group, ends, strict=True):
            if end is not None:
                self._editor.check_leaving(sequence, end)
                not_yet_written.difference_update(
                    sequence.table[i] for i in self._editor.promised_entries(sequence, end)
                )
        blocks = swap.blocks_to_move(group, self._block_size)
        if len(blocks) > self._host.num_available:
            return None
        if not blocks.keys().isdisjoint(self._arrivals | not_yet_written):
            return None
        for sequence, end in zip(group, ends, strict=True):
            if end is not None:
                self._editor.cut(sequence, end)
        return swap.move_out(group, blocks, self._pool, self._host, self._editor.emit)

    def swap_in(self, seq_ids: Iterable[int]) -> list[tuple[int, int]] | None:
        """Bring these sequences back together. (host, device) pairs, each block once.

        None: no room for their blocks, those of one more token each, and the watermark (which is left aside while no sequence
        holds blocks). Their full blocks are published again.
        """
        group = self._sequences.group(seq_ids, swapped=True)
        blocks = {block for sequence in group for block in sequence.host or () if block >= 0}
        need = len(blocks) + swap.next_step_blocks(group, self._block_size)
        if need + self._watermark() > self._pool.num_available:
            return None
        pairs = swap.move_in(group, self._pool, self._host, self._editor.take, self._editor.emit)
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
        self._editor.emit("pin", -1, block_id, -1, -1)

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
        self._editor.emit("unpin", -1, block_id, -1, -1)
        self._pool.drop(block_id)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached content. False, and nothing changed, while a request or a pin holds a block, on the device or the host."""
        if self._pool.num_free < self._pool.num_blocks - 1 or self._host.refs:
            return False
        for block in self._editor.index.blocks():
            self._editor.index.erase(block)
            self._editor.emit("evict", -1, block, -1, -1)
        self._pool.clear_cached()
        self._host.forget()
        self._spills, self._fetches = [], []
        if self._editor.published is not None:
            self._editor.published.clear()
        return True

    # ---- what lies below the host

    def note_published(self) -> None:
        """From now on `take_published` tells which blocks were published."""
        self._editor.published = []

    def take_published(self) -> list[tuple[bytes, int]]:
        """(key, device block) of each that was published since the last call; steps that were planned since then write them."""
        published, self._editor.published = self._editor.published or [], []
        return published

    def holds(self, key: bytes, block: int) -> bool:
        """Whether the device block still has the content of the key."""
        return self._editor.index.key_of(block) == key

    def missing(self, hit: PrefixHit) -> list[bytes]:
        """Keys of a prompt's full blocks from the first on that neither tier holds. What the host holds before it is not given up for
        what `receive` makes room for in this step."""
        return hit.missing(self._host.touch)

    def receive(self, key: bytes) -> int | None:
        """A host block for content that the caller is about to put there, which can be found from now on; None: there is no room."""
        return self._host.keep(key) if self._host_index is not None else None

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
            self._host.num_cached,
        )

    def _check_block(self, block_id: int) -> None:
        check_int("block_id", block_id, 0, self._pool.num_blocks - 1)

    def set_watermark(self, share: float) -> None:
        """Another watermark from now on. InputError if it is no share."""
        self._watermark_blocks = int(check_real("watermark", share, 0.0, 1.0) * self._num_blocks)

    def _watermark(self) -> int:
        """Blocks to leave free for those that run: none while nobody holds any."""
        return self._watermark_blocks if self._watermark_blocks and self._sequences.hold_device_blocks() else 0

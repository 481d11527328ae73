"""A block manager that reserves ahead, as the systems before paging did: a row is a run of consecutive blocks, from
admission to finish.

It stands where BlockManager stands, so that the same scheduler, runner and kernels execute every system; only what
is held, and therefore who may enter, differs. Nothing is shared: a fork gets a run of its own and copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from minipaged.baselines.batches import WebUI
from minipaged.baselines.buddy import BuddyAllocator, next_power_of_two
from minipaged.baselines.orca import Orca
from minipaged.baselines.reservations import Reservations
from minipaged.baselines.systems import reservations
from minipaged.baselines.tgi import PagedTGI
from minipaged.config import MAX_BLOCK_SIZE, EngineConfig, check_int
from minipaged.errors import InputError
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.blocks import PrefixHit, PrefixIndex
from minipaged.memory.types import NULL_BLOCK, Admission, Allocation, BlockEvent, PoolUsage, token_array
from minipaged.scheduling.scheduler import Scheduler

_NOTHING = Allocation(0, (), ())
_EMPTY_INDEX = PrefixIndex()


class Ask(NamedTuple):
    """What a sequence's request asked for. `output` is what it will answer in truth, where that is known; else the
    limit.
    """

    max_new: int
    output: int
    rows: int = 1  # sequences that the request runs side by side


@dataclass(slots=True)
class _Run:
    """One row's place."""

    blocks: list[int]
    account: int  # its key in the accounting
    room: int = 0  # tokens that the table promises room for
    computed: int = 0
    entries: int = 0  # blocks of the run that the table shows
    pending: list[tuple[int, int]] = field(default_factory=list)  # copies that the next append reports


class ContiguousBlockManager:
    """A system of baselines/systems.py in blocks. Set `ask_of` before the first allocate: it tells what a sequence's
    request asked for.

    The public calls are BlockManager's, with its errors; there is no prefix cache, no swap, no beam search (a beam
    forks at every token, and each fork here would copy the whole row).
    """

    def __init__(self, num_blocks: int, block_size: int, system: str, *, max_len: int = 2048) -> None:
        check_int("num_blocks", num_blocks, 2)
        check_int("block_size", block_size, 1, MAX_BLOCK_SIZE)
        self.system = system
        self._num_blocks, self._block_size, self._max_len = num_blocks, block_size, max_len
        usable = num_blocks - 1
        # Orca's buddies decide in whole blocks; for the others the slots' accounting decides and blocks follow.
        self._accounts: Reservations = reservations(system, usable * block_size, max_len=max_len, block_size=block_size)
        self._buddy: BuddyAllocator | None = None
        if isinstance(self._accounts, Orca):
            self._buddy = BuddyAllocator(usable, next_power_of_two(self._blocks_for(max_len)))
        self._free = set(range(1, num_blocks))
        self._runs: dict[int, _Run] = {}
        self._spares: dict[
            int, list[_Run]
        ] = {}  # rows reserved for samples not born yet, by the sequence that was admitted
        self._ended: list[_Run] = []  # rows that a running batch still holds
        self._events: list[BlockEvent] = []
        self._next_account = 0
        self.ask_of: Callable[[int], Ask] | None = None

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    # ---- steps

    def begin_step(self) -> None:
        """Rows admitted in the step before now run: nobody joins a static batch any more."""
        self._accounts.close()

    def end_step(self) -> None:
        """Nothing: no promise is ever taken back here."""

    def take_events(self) -> tuple[BlockEvent, ...]:
        """What happened since the last call, in causal order."""
        events, self._events = tuple(self._events), []
        return events

    def _tell(self, kind: str, seq_id: int, block: int, other: int, index: int) -> None:
        self._events.append(BlockEvent(kind, seq_id, block, other, index, "device", 0))

    # ---- coming in

    def can_admit(
        self,
        num_tokens: int,
        max_new_tokens: int = 0,
        *,
        num_sequences: int = 1,
        token_ids: Iterable[int] | None = None,
        salt: str | None = None,
        hit: PrefixHit | None = None,
    ) -> Admission:
        """NEVER where not even an empty pool could hold it; else OK: `allocate` finds out whether there is room now."""
        check_int("num_tokens", num_tokens, 1)
        check_int("max_new_tokens", max_new_tokens, 0)
        check_int("num_sequences", num_sequences, 1)
        if num_tokens + max_new_tokens > self._max_len:
            return Admission.NEVER
        most = max(1, max_new_tokens)
        return Admission.OK if self.fits(num_tokens, Ask(most, most, num_sequences)) else Admission.NEVER

    def fits(self, num_tokens: int, ask: Ask) -> bool:
        """Whether an empty pool would hold a request: what does not, waits for ever."""
        empty = ContiguousBlockManager(self._num_blocks, self._block_size, self.system, max_len=self._max_len)
        return all(empty._reserve(num_tokens, ask) is not None for _ in range(ask.rows))

    def lookup(self, token_ids: Iterable[int], *, salt: str | None = None) -> PrefixHit:
        """A hit that finds nothing: nothing is cached."""
        return PrefixHit(_EMPTY_INDEX, token_array(token_ids), self._block_size, salt)

    def match_prefix(self, token_ids: Iterable[int], *, salt: str | None = None) -> int:
        """0: nothing is cached."""
        return 0

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
        """Reserve a row for every sequence of the request, and show the blocks of the first `num_tokens`. None: no
        room, nothing changed.
        """
        if seq_id in self._runs:
            raise InputError(f"sequence {seq_id} is in use")
        known = len(token_ids) if isinstance(token_ids, list | tuple) else len(list(token_ids))
        wanted = known if num_tokens is None else check_int("num_tokens", num_tokens, 0, known)
        if self.ask_of is None:
            raise InputError(
                "set ask_of before the first allocate: a system that reserves ahead must know what was asked for"
            )
        ask = self.ask_of(seq_id)
        runs: list[_Run] = []
        for _ in range(ask.rows):
            run = self._reserve(known, ask)
            if run is None:
                for taken in runs:
                    self._accounts_cancel(taken)
                    self._give_back(taken)
                return None
            runs.append(run)
        first, *spares = runs
        self._runs[seq_id] = first
        if spares:
            self._spares[seq_id] = spares
        return Allocation(0, self._show(seq_id, first, wanted), ())

    def _reserve(self, prompt: int, ask: Ask) -> _Run | None:
        """A run of blocks by the system's rule."""
        account = self._next_account
        if self._buddy is not None and isinstance(self._accounts, Orca):
            start = self._buddy.allocate(self._blocks_for(self._accounts.reserve(prompt, ask.output)))
            if start is None:
                return None
            blocks = list(range(start + 1, start + 1 + self._buddy.size_of(start)))
        else:
            if not self._accounts.admit(account, prompt, ask.output, max(ask.max_new, ask.output)):
                return None
            reserved = (
                prompt + ask.output if isinstance(self._accounts, WebUI) else self._accounts.rows[account].reserved
            )
            found = self._find(self._blocks_for(reserved))
            if found is None:
                self._accounts.cancel(account)
                return None
            blocks = found
        self._next_account += 1
        self._free.difference_update(blocks)
        return _Run(blocks, account)

    def _find(self, count: int) -> list[int] | None:
        """The first `count` consecutive free blocks; any blocks for the system that pages."""
        free = sorted(self._free)
        if isinstance(self._accounts, PagedTGI):
            return free[:count] if len(free) >= count else None
        length = 0
        for i, block in enumerate(free):
            length = length + 1 if i and free[i - 1] == block - 1 else 1
            if length == count:
                return free[i - count + 1 : i + 1]
        return None

    # ---- growing

    def _show(self, seq_id: int, run: _Run, room: int) -> tuple[int, ...]:
        """Let the table reach `room` tokens; returns the entries that are new."""
        need = self._blocks_for(room)
        new = tuple(run.blocks[run.entries : need])
        for i, block in enumerate(new, run.entries):
            self._tell("alloc", seq_id, block, -1, i)
        run.entries, run.room = max(run.entries, need), room
        return new

    def append(self, seq_id: int, num_tokens: int) -> Allocation | None:
        """Room for the next tokens, inside the reservation. None past its end. Reports the copies of a fork."""
        run = self._find_run(seq_id)
        check_int("num_tokens", num_tokens, 0)
        if self._blocks_for(run.room + num_tokens) > len(run.blocks):
            return None
        copies, run.pending = tuple(run.pending), []
        new = self._show(seq_id, run, run.room + num_tokens)
        return Allocation(0, new, copies) if new or copies else _NOTHING

    def mark_computed(self, seq_id: int, token_ids: Iterable[int]) -> None:
        """The next tokens are these and their KV is written."""
        run = self._find_run(seq_id)
        computed = run.computed + len(list(token_ids))
        if computed > run.room:
            raise InputError(
                f"sequence {seq_id} has room for {run.room - run.computed} tokens, not {computed - run.computed}"
            )
        run.computed = computed

    def fork(self, parent_id: int, child_id: int) -> None:
        """A row of its own for the child; what the parent has written is copied when the child first asks for room."""
        parent = self._find_run(parent_id)
        if child_id in self._runs:
            raise InputError(f"sequence {child_id} is in use")
        if parent.room != parent.computed:
            raise InputError(f"sequence {parent_id} has room that is not computed: truncate it first")
        spares = self._spares.get(parent_id)
        if not spares:
            raise InputError(
                f"sequence {parent_id} reserved no row for another sample: {self.system} runs no beam search"
            )
        child = spares.pop(0)
        count = self._blocks_for(parent.computed)
        self._tell("fork", child_id, -1, parent_id, count)
        self._show(child_id, child, parent.computed)
        for source, destination in zip(parent.blocks[:count], child.blocks[:count], strict=True):
            child.pending.append((source, destination))
            self._tell("copy", child_id, source, destination, len(child.pending) - 1)
        child.computed = parent.computed
        self._runs[child_id] = child

    # ---- giving back

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """The table shows no more than the first `num_tokens` tokens; the reservation stays."""
        run = self._find_run(seq_id)
        check_int("num_tokens", num_tokens, 0, run.room)
        keep = self._blocks_for(num_tokens)
        for i in range(run.entries - 1, keep - 1, -1):
            self._tell("free", seq_id, run.blocks[i], -1, i)
        run.entries, run.room, run.computed = keep, num_tokens, min(run.computed, num_tokens)

    def free(self, seq_id: int) -> None:
        """The sequence has ended. Its blocks return, with those of its batch if it ran in one. KeyError if unknown."""
        run = self._runs.pop(seq_id)
        for gone in (run, *self._spares.pop(seq_id, ())):
            for i in range(gone.entries - 1, -1, -1):
                self._tell("free", seq_id, gone.blocks[i], -1, i)
            if self._buddy is None:
                self._accounts.finish(gone.account)
            self._ended.append(gone)
        if self._accounts.joins or not self._accounts.rows:
            for gone in self._ended:
                self._give_back(gone)
            self._ended.clear()

    def _accounts_cancel(self, run: _Run) -> None:
        if self._buddy is None:
            self._accounts.cancel(run.account)

    def _give_back(self, run: _Run) -> None:
        if self._buddy is not None:
            self._buddy.free(run.blocks[0] - 1)
        self._free.update(run.blocks)

    def swap_out(self, seq_ids: Iterable[int]) -> None:
        """None: these systems do not swap."""
        return

    def swap_in(self, seq_ids: Iterable[int]) -> None:
        """None: nothing was swapped out."""
        return

    def reset_prefix_cache(self) -> bool:
        """True: there is none."""
        return True

    # ---- looking

    def _find_run(self, seq_id: int) -> _Run:
        return self._runs[seq_id]

    def table(self, seq_id: int) -> tuple[int, ...]:
        """The blocks that hold the sequence's tokens and promised room: consecutive, except under tgi-paged."""
        run = self._find_run(seq_id)
        return tuple(run.blocks[: run.entries])

    def host_table(self, seq_id: int) -> tuple[int, ...]:
        """(): nothing is swapped."""
        self._find_run(seq_id)
        return ()

    def ref_count(self, block_id: int) -> int:
        """1 for a reserved block."""
        check_int("block_id", block_id, 0, self._num_blocks - 1)
        return int(block_id != NULL_BLOCK and block_id not in self._free)

    def usage(self) -> PoolUsage:
        """Blocks by state; reserved blocks count as referenced, written or not."""
        free = len(self._free)
        return PoolUsage(self._num_blocks, 1, free, 0, self._num_blocks - 1 - free, 0, 0, 0)


def contiguous_scheduler(
    system: str, config: EngineConfig, num_blocks: int, block_size: int, *, max_new: int = 0
) -> tuple[Scheduler, ContiguousBlockManager]:
    """The engine's own scheduler over that system's memory.

    Requests must run to their limit (`ignore_eos`): it is then the true length of the answer, which orca-oracle knows. For
    the others a client allows `max_new` tokens, or the request's own limit if that is more.
    """
    manager = ContiguousBlockManager(num_blocks, block_size, system, max_len=config.max_model_len)
    scheduler = Scheduler(config, cast(BlockManager, manager), block_size)

    def ask(seq_id: int) -> Ask:
        length = scheduler.sequences[seq_id].request.params.max_tokens
        return Ask(max(max_new, length), length)

    manager.ask_of = ask
    return scheduler, manager

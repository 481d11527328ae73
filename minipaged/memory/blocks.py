"""Physical blocks: which are free, who holds the others (a count), and which can be found by their content.

Free blocks (FreeList). Push, pop and removal from the middle are O(1), and a pool of a million blocks is made by two allocations of
zeros. Blocks without content come first: the last one put back, then those never used, by number. Then the cached ones, the least
recently used first, so that no content is lost while an empty block is left.

Counts (BlockPool). A block's count is the number of table entries and pins that name it. At 0 it is free: it goes to the free list, as an
eviction candidate if its content can still be found. A block that this step copies or swaps from (or swaps in to) is guarded: it
may become free, yet is not handed out before the next step begins.

Content (PrefixIndex, PrefixHit). A block's key is the BLAKE2b digest (256 bits) of its parent's key and its own tokens; the first block's
parent key is drawn from the salt. So a key covers the tokens, all that came before them, and the salt, and a collision is out of
reach (it is never Python's `hash`). Two blocks with equal content are both remembered under their one key: the block published first is
the one that is found, and the other is found once the first is evicted. No table is ever rewritten to join the two.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from hashlib import blake2b

from minipaged.memory.retention import KEEP_ALL, Retention
from minipaged.memory.types import NULL_BLOCK

_UNSALTED = bytes(32)


class FreeList:
    """Blocks 1 .. num_blocks - 1, all empty at first.

    The cached ones form a doubly linked list inside two arrays. Block 0 is never free, so entry 0 stands for the list's two ends,
    and arrays of zeros are an empty list.
    """

    def __init__(self, num_blocks: int) -> None:
        self._empty: list[int] = []  # a stack
        self._fresh = 1  # blocks from here on were never handed out
        self._num_blocks = num_blocks
        self._next = array("i", bytes(4 * num_blocks))
        self._previous = array("i", bytes(4 * num_blocks))
        self._num_cached = 0

    def __len__(self) -> int:
        return len(self._empty) + self._num_blocks - self._fresh + self._num_cached

    @property
    def num_cached(self) -> int:
        """How many of them still hold content that can be found."""
        return self._num_cached

    def push_empty(self, block: int) -> None:
        """Put back a block whose content nobody can find: it is the next to go."""
        self._empty.append(block)

    def push_cached(self, block: int) -> None:
        """Put back a block whose content can be found: it is the last to go."""
        last = self._previous[0]
        self._next[last] = block
        self._previous[block] = last
        self._next[block] = 0
        self._previous[0] = block
        self._num_cached += 1

    def remove_cached(self, block: int) -> None:
        """Take a cached block out, wherever it stands."""
        before, after = self._previous[block], self._next[block]
        self._next[before] = after
        self._previous[after] = before
        self._num_cached -= 1

    def pop(self) -> int:
        """Take the next block. IndexError if there is none."""
        if self._empty:
            return self._empty.pop()
        if self._fresh < self._num_blocks:
            self._fresh += 1
            return self._fresh - 1
        block = self.first_cached()
        if not block:
            raise IndexError("pop from an empty free list")
        self.remove_cached(block)
        return block

    def first_cached(self) -> int:
        """The least recently used of the cached blocks; 0 if there is none."""
        return self._next[0]


class BlockPool:
    """Blocks 0 .. num_blocks - 1; block 0 is the null block, which is never handed out, counted or freed."""

    def __init__(self, num_blocks: int, index: PrefixIndex) -> None:
        self.num_blocks = num_blocks
        self.refs = [0] * num_blocks
        self.pins: dict[int, int] = {}  # block -> how many pins
        self._index = index
        self._free = FreeList(num_blocks)
        self.guards: dict[int, int] = {}  # block -> copies and swaps of this step that read it
        # Free but guarded: on no list until the step is over; in the order they became free.
        self._held_back: dict[int, None] = {}

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now."""
        return len(self._free)

    @property
    def num_free(self) -> int:
        """Blocks with count 0."""
        return len(self._free) + len(self._held_back)

    @property
    def num_cached(self) -> int:
        """Blocks with count 0 whose content can be found."""
        return self._free.num_cached + sum(block in self._index for block in self._held_back)

    def is_available(self, block: int) -> bool:
        """Whether the block is one of those that can be handed out now."""
        return not self.refs[block] and block not in self._held_back

    def take(self) -> int:
        """Hand out a block: its count is 1, and the caller erases its key. IndexError if none is available."""
        block = self._free.pop()
        self.refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder. The block has one already, or its content was found."""
        if not self.refs[block]:
            if block in self._held_back:
                del self._held_back[block]
            else:
                self._free.remove_cached(block)
        self.refs[block] += 1

    def drop(self, block: int) -> None:
        """One holder less. ValueError if the block has none: a double free is never absorbed."""
        refs = self.refs[block]
        if refs <= 0:
            raise ValueError(f"block {block} is free already")
        self.refs[block] = refs - 1
        if refs == 1:
            if block in self.guards:
                self._held_back[block] = None
            else:
                self._push(block)

    def guard(self, block: int) -> None:
        """Something in this step reads the block: it is not handed out again before the next step."""
        self.guards[block] = self.guards.get(block, 0) + 1

    def unguard(self, block: int) -> None:
        """One such reader was given up."""
        self.guards[block] -= 1
        if not self.guards[block]:
            del self.guards[block]
            if block in self._held_back:
                del self._held_back[block]
                self._push(block)

    def begin_step(self) -> None:
        """The reads of the step before are done."""
        self.guards.clear()
        for block in self._held_back:
            self._push(block)
        self._held_back.clear()

    def clear_cached(self) -> None:
        """Every free block is an empty one now. The caller has erased the keys."""
        for _ in range(self._free.num_cached):
            block = self._free.first_cached()
            self._free.remove_cached(block)
            self._free.push_empty(block)

    def _push(self, block: int) -> None:
        if block in self._index:
            self._free.push_cached(block)
        else:
            self._free.push_empty(block)


def root_key(salt: str | None) -> bytes:
    """The parent key of a first block. No salt and the empty salt are two worlds."""
    if salt is None:
        return _UNSALTED
    return blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=32, person=b"salt").digest()


def next_key(parent: bytes, tokens: bytes) -> bytes:
    """The key of a block whose tokens (as bytes of an array of type "I") follow the block of key `parent`."""
    return blake2b(parent + tokens, digest_size=32).digest()


class PrefixIndex:
    """Which blocks hold the content of each key. A block has at most one key. All operations are O(1) per block."""

    def __init__(self) -> None:
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}  # the block that is found by the key: the one published first
        self._twins: dict[bytes, dict[int, None]] = {}  # the other blocks of the key, in the order they were published
        self.find = self._block_of.get  # a block that holds the content of a key, or None
        self.key_of = self._key_of.get  # the key of a block that has one, or None

    def __contains__(self, block: int) -> bool:
        """Whether this block is remembered under its content."""
        return block in self._key_of

    def publish(self, key: bytes, block: int) -> bool:
        """Remember that `block` holds the content of `key`; False, and nothing changed, if the block has a key."""
        if block in self._key_of:
            return False
        self._key_of[block] = key
        if self._block_of.setdefault(key, block) != block:
            self._twins.setdefault(key, {})[block] = None
        return True

    def erase(self, block: int) -> bool:
        """Forget the block's key, as its content is about to change; False if it had none. Its twins are found from now on."""
        key = self._key_of.pop(block, None)
        if key is None:
            return False
        twins = self._twins.get(key)
        if self._block_of[key] != block:
            del self._twins[key][block]
        elif twins:
            self._block_of[key] = next(iter(twins))
            del twins[self._block_of[key]]
        else:
            del self._block_of[key]
        if twins is not None and not twins:
            del self._twins[key]
        return True

    def blocks(self) -> list[int]:
        """The blocks that have a key, in the order they were published."""
        return list(self._key_of)


class PrefixHit:
    """A prompt's keys, each hashed once and only when it is needed. It holds no block: what it finds is looked up anew each time."""

    __slots__ = ("_block_size", "_host", "_retention", "index", "keys", "root", "salt", "tokens")

    def __init__(
        self,
        index: PrefixIndex,
        tokens: array[int],
        block_size: int,
        salt: str | None,
        retention: Retention = KEEP_ALL,
        host: PrefixIndex | None = None,
    ) -> None:
        self.tokens, self.salt, self.root = tokens, salt, root_key(salt)
        self.keys: list[bytes] = []  # of the leading full blocks, as far as anybody has asked
        self.index = index  # where it looks
        self._block_size = block_size
        self._retention = retention
        self._host = host  # where content is looked for that the device does not hold

    @property
    def num_tokens(self) -> int:
        """Tokens that a new sequence would find now: whole blocks, and never all of its tokens."""
        return len(self.find(len(self.tokens))) * self._block_size

    @property
    def num_on_host(self) -> int:
        """Blocks of these that only the host holds: each takes a block of the device all the same."""
        return sum(block < 0 for block in self.find(len(self.tokens)))

    def find(self, num_tokens: int) -> list[int]:
        """Blocks that hold the prompt's leading full blocks now, inside its first `num_tokens` tokens and with at least one token of
        it left to compute; a host block h, whose content is to come back, stands as ~h. The first miss ends it. Blocks that the
        retention policy would have released by then are not asked for: null entries stand in their place.
        """
        most = max(0, min(len(self.tokens) - 1, num_tokens)) // self._block_size
        if self._retention.spare(most * self._block_size, self._block_size):
            return self._find_without_spare(most)
        blocks: list[int] = []
        keys, find = self.keys, self.index.find if self._host is None else self._find_in_tiers
        for key in keys[:most]:
            block = find(key)
            if block is None:
                return blocks
            blocks.append(block)
        for key in self._further_keys(most):
            block = find(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _find_without_spare(self, most: int) -> list[int]:
        """As `find`, where some of the `most` leading entries are spare: the longest run of blocks of which all others are found."""
        for _ in self._further_keys(most):
            pass
        found = list(map(self._find_in_tiers, self.keys[:most]))
        in_a_row = 0
        rows = [in_a_row := in_a_row + 1 if block is not None else 0 for block in found]  # found blocks up to each one
        for end in range(most, 0, -1):
            spare = self._retention.spare(end * self._block_size, self._block_size)
            front, behind = (spare.start, end - spare.stop) if spare else (0, end)
            if rows[end - 1] >= behind and None not in found[:front]:
                return [NULL_BLOCK if block is None or i in spare else block for i, block in enumerate(found[:end])]
        return []

    def missing(self, touch: Callable[[int], None]) -> list[bytes]:
        """Keys of the full blocks from the first miss on. Host blocks before it are told to `touch`."""
        most = max(0, len(self.tokens) - 1) // self._block_size
        for _ in self._further_keys(most):
            pass
        for index, key in enumerate(self.keys[:most]):
            block = self._find_in_tiers(key)
            if block is None:
                return self.keys[index:most]
            if block < 0:
                touch(~block)
        return []

    def _find_in_tiers(self, key: bytes) -> int | None:
        block = self.index.find(key)
        if block is not None or self._host is None:
            return block
        on_host = self._host.find(key)
        return None if on_host is None else ~on_host

    def _further_keys(self, most: int) -> Iterator[bytes]:
        """Hash on to `most` keys, one at a time; what was hashed is kept."""
        keys = self.keys
        if len(keys) >= most:
            return
        key = keys[-1] if keys else self.root
        data, stride = self.tokens.tobytes(), self._block_size * self.tokens.itemsize
        for start in range(len(keys) * stride, most * stride, stride):
            key = next_key(key, data[start : start + stride])
            keys.append(key)
            yield key

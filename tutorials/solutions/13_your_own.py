"""Solutions of lesson 13, Your own: each body stands where the exercise, ../13_your_own.py, has its stub."""


class MyFreeList:
    def __init__(self, num_blocks: int) -> None:
        """lesson 13, task 1: MyFreeList"""
        self._empty = list(range(num_blocks - 1, 0, -1))  # a stack: the lowest number on top
        self._cached = OrderedDict()

    def __len__(self) -> int:
        """lesson 13, task 1: MyFreeList"""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """lesson 13, task 1: MyFreeList"""
        return len(self._cached)

    def push_empty(self, block: int) -> None:
        """lesson 13, task 1: MyFreeList"""
        self._empty.append(block)

    def push_cached(self, block: int) -> None:
        """lesson 13, task 1: MyFreeList"""
        self._cached[block] = None

    def remove_cached(self, block: int) -> None:
        """lesson 13, task 1: MyFreeList"""
        del self._cached[block]

    def first_cached(self) -> int:
        """lesson 13, task 1: MyFreeList"""
        return next(iter(self._cached), 0)

    def pop(self) -> int:
        """lesson 13, task 1: MyFreeList"""
        if self._empty:
            return self._empty.pop()
        if not self._cached:
            raise IndexError("no block is free")
        return self._cached.popitem(last=False)[0]


class MyPrefixIndex:
    def __init__(self) -> None:
        """lesson 13, task 2: MyPrefixIndex"""
        self._blocks_of: dict[bytes, dict[int, None]] = {}  # each key's, in the order they were published
        self._key_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        """lesson 13, task 2: MyPrefixIndex"""
        return len(self._key_of)

    def __contains__(self, block: int) -> bool:
        """lesson 13, task 2: MyPrefixIndex"""
        return block in self._key_of

    def blocks(self) -> list[int]:
        """lesson 13, task 2: MyPrefixIndex"""
        return list(self._key_of)

    def publish(self, key: bytes, block: int) -> bool:
        """lesson 13, task 2: MyPrefixIndex"""
        if block in self._key_of:
            return False
        self._key_of[block] = key
        self._blocks_of.setdefault(key, {})[block] = None
        return True

    def erase(self, block: int) -> bool:
        """lesson 13, task 2: MyPrefixIndex"""
        if block not in self._key_of:
            return False
        key = self._key_of.pop(block)
        del self._blocks_of[key][block]
        if not self._blocks_of[key]:
            del self._blocks_of[key]
        return True

    def find(self, key: bytes) -> int | None:
        """lesson 13, task 2: MyPrefixIndex"""
        return next(iter(self._blocks_of.get(key, ())), None)


class MyBlockPool:
    def take(self) -> int:
        """lesson 13, task 3: MyBlockPool"""
        block = self._free.pop()
        self.refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """lesson 13, task 3: MyBlockPool"""
        if self.refs[block] == 0:
            self.withdraw(block)
        self.refs[block] += 1

    def drop(self, block: int) -> None:
        """lesson 13, task 3: MyBlockPool"""
        if self.refs[block] == 0:
            raise ValueError(f"block {block} is free already")
        self.refs[block] -= 1
        if self.refs[block] == 0:
            self.put_back(block)


class MyBlockManager:
    def fork(self, parent_id: int, child_id: int) -> None:
        """lesson 13, task 4: MyBlockManager.fork"""
        child = parent.child(child_id)
        self._sequences.add(child)
        for block in child.table:
            if block != NULL_BLOCK:
                self._pool.share(block)
        self._editor.emit("fork", child_id, -1, parent_id, len(child.table))

    def more_room(self, sequence: SequenceBlocks, num_tokens: int) -> Allocation | None:
        """lesson 13, task 5: MyBlockManager.more_room"""
        size, table, reserved = self._block_size, sequence.table, sequence.reserved
        need, have = -(-(reserved + num_tokens) // size), len(table)
        into_tail = num_tokens > 0 and reserved < have * size
        must_copy = into_tail and self._editor.copies.must_copy(table[-1], reserved - (have - 1) * size)
        if need - have + must_copy > self._pool.num_available:
            return None
        copies = ()
        if must_copy:
            copies = (self._editor.copy_tail(sequence),)
        elif into_tail and self._editor.index.erase(table[-1]):
            self._editor.emit("evict", sequence.seq_id, table[-1], -1, have - 1)
        sequence.reserved = reserved + num_tokens
        return Allocation(0, self._editor.grow(sequence, max(0, need - have)), copies)

"""Solutions of lesson 6, The boundary: each body stands where the exercise, ../06_the_boundary.py, has its stub."""


def blocks_for(tokens: int, block_size: int) -> int:
    """lesson 6, task 1: blocks_for"""
    return -(-tokens // block_size)


class Manager:
    def grow(self, sequence: str, count: int) -> bool:
        """lesson 6, task 2: Manager.grow"""
        have = len(self.tables.get(sequence, []))
        length = self.lengths.get(sequence, 0) + count
        missing = blocks_for(length, self.block_size) - have
        if missing > len(self.free_blocks):
            return False
        self.tables.setdefault(sequence, []).extend(self.free_blocks.popleft() for _ in range(missing))
        self.lengths[sequence] = length
        return True


def law(manager: Manager, operations: list[Operation]) -> None:
    """lesson 6, task 3: law"""
    lengths: dict[str, int] = {}
    for kind, name, count in operations:
        if kind == "free":
            manager.free(name)
            del lengths[name]
        else:
            tables = {n: list(t) for n, t in manager.tables.items()}
            free = list(manager.free_blocks)
            wanted = lengths.get(name, 0) + count
            missing = blocks_for(wanted, manager.block_size) - len(tables.get(name, []))
            if manager.grow(name, count):
                assert missing <= len(free), "it promised room that it does not have"
                lengths[name] = wanted
            else:
                assert missing > len(free), "it refused although there was room"
                assert manager.tables == tables, "a refusal changed the tables"
        assert manager.lengths == lengths, "the lengths are wrong"
        held = [block for table in manager.tables.values() for block in table]
        assert sorted([*held, *manager.free_blocks]) == list(range(1, manager.num_blocks)), "lost, doubled or invented"
        for each, length in lengths.items():
            need = blocks_for(length, manager.block_size)
            assert len(manager.tables[each]) == need, f"{each} needs {need} blocks and has {len(manager.tables[each])}"

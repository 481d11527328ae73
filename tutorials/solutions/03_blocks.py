"""Solutions of lesson 3, Blocks: each body stands where the exercise, ../03_blocks.py, has its stub."""


class BlockPool:
    def allocate(self) -> int:
        """lesson 3, task 1: BlockPool.allocate"""
        if not self.free_blocks:
            raise OutOfBlocks
        block = self.free_blocks.popleft()
        self.held.add(block)
        return block

    def free(self, block: int) -> None:
        """lesson 3, task 2: BlockPool.free"""
        if block not in self.held:
            raise ValueError(f"block {block} is not held")
        self.held.remove(block)
        self.free_blocks.append(block)


def law(pool: BlockPool, operations: list[Operation]) -> None:
    """lesson 3, task 3: law"""
    held: set[int] = set()
    for operation in operations:
        if operation == "allocate":
            try:
                block = pool.allocate()
            except OutOfBlocks:
                assert len(held) == pool.num_blocks - 1, "it refused although a block was free"
            else:
                assert 0 < block < pool.num_blocks, f"block {block} is not a block of this pool"
                assert block not in held, f"block {block} was handed out twice"
                held.add(block)
        else:
            try:
                pool.free(operation)
            except ValueError:
                assert operation not in held, f"block {operation} is held, but it refused to take it back"
            else:
                assert operation in held, f"block {operation} was not held, but it took it back"
                held.remove(operation)
        assert pool.num_free == pool.num_blocks - 1 - len(held), "free and held together are not all"

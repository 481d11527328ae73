"""Solutions of lesson 10, Prefix cache: each body stands where the exercise, ../10_prefix_cache.py, has its stub."""


def keys(tokens: list[int], block_size: int) -> list[bytes]:
    """lesson 10, task 1: keys"""
    found, parent = [], bytes(32)
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = digest(parent + as_bytes(tokens[start : start + block_size]))
        found.append(parent)
    return found


class PrefixCache:
    def match(self, tokens: list[int]) -> list[int]:
        """lesson 10, task 2: PrefixCache.match"""
        found: list[int] = []
        for key in keys(tokens[:-1], self.block_size):
            block = self.block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def take(self) -> int:
        """lesson 10, task 3: PrefixCache.take"""
        if not self.free_blocks:
            raise OutOfBlocks
        block, _ = self.free_blocks.popitem(last=False)
        if block in self.key_of:
            del self.block_of[self.key_of.pop(block)]
            self.evicted += 1
        self.ref_counts[block] = 1
        return block

    def finish(self, table: list[int]) -> None:
        """lesson 10, task 4: PrefixCache.finish"""
        for block in reversed(table):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self.free_blocks[block] = None

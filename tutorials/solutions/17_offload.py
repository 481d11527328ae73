"""Solutions of lesson 17, Offload: each body stands where the exercise, ../17_offload.py, has its stub."""


def carry_seconds(link: Link, num_bytes: int, pieces: int) -> float:
    """lesson 17, task 1: carry_seconds"""
    return num_bytes / link.bytes_per_second + pieces * link.seconds_per_piece


def recompute_seconds(machine: Machine, model: Model, tokens: int) -> float:
    """lesson 17, task 2: recompute_seconds"""
    read = 2 * model.parameters / machine.bytes_per_second
    compute = 2 * model.parameters * tokens / machine.operations_per_second
    return max(read, compute)


def crossover(link: Link, machine: Machine, model: Model, tokens: int) -> int | None:
    """lesson 17, task 3: crossover"""
    again = recompute_seconds(machine, model, tokens)
    for size in SIZES:
        blocks = -(-tokens // size)
        num_bytes = blocks * size * model.kv_bytes_per_token
        if 2 * carry_seconds(link, num_bytes, 2 * model.layers * blocks) < again:
            return size
    return None


class Tiers:
    def put(self, key: str, block: Tensor) -> None:
        """lesson 17, task 4: Tiers.put"""
        self.host.pop(key, None)
        if key in self.disk:
            del self.disk[key]
            self._delete(key)
        self.host[key] = block.clone()
        while len(self.host) > self.host_blocks:
            oldest, content = self.host.popitem(last=False)
            self._write(oldest, content)
            self.disk[oldest] = None
        while len(self.disk) > self.disk_blocks:
            oldest, _ = self.disk.popitem(last=False)
            self._delete(oldest)

    def get(self, key: str) -> Tensor | None:
        """lesson 17, task 5: Tiers.get"""
        if key in self.host:
            self.host.move_to_end(key)
            return self.host[key]
        if key not in self.disk:
            return None
        block = self._read(key)
        self.put(key, block)
        return block

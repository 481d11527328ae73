"""Solutions of lesson 16, Windows and sinks: each body stands where the exercise, ../16_windows_and_sinks.py, has its stub."""


def spare(num_computed: int, window: int, sinks: int, block_size: int) -> range:
    """lesson 16, task 1: spare"""
    front = -(-sinks // block_size)
    first_seen = max(0, num_computed - window + 1)
    return range(front, max(front, first_seen // block_size))


class Stream:
    def release(self, entries: range) -> None:
        """lesson 16, task 2: Stream.release"""
        for entry in entries:
            if self.table[entry]:
                self.free.append(self.table[entry])
                self.table[entry] = 0


def second_query(q: Tensor, position: int, window: int, sinks: int) -> Tensor:
    """lesson 16, task 3: second_query"""
    return rotated(q, min(position, sinks + window - 1) - position)


def streaming_attention(
    q: Tensor, keys: Tensor, values: Tensor, table: list[int], position: int, window: int, sinks: int
) -> Tensor:
    """lesson 16, task 4: streaming_attention"""
    size, second = keys.shape[1], second_query(q, position, window, sinks)
    scores, seen = [], []
    for entry, block in enumerate(table):
        for place in range(size if block else 0):
            key = entry * size + place
            if sees(position, key, window, sinks):
                scores.append(((second if key < sinks else q) * keys[block, place]).sum(-1))
                seen.append(values[block, place])
    weights = (torch.stack(scores) / q.shape[-1] ** 0.5).softmax(0)
    return (weights[..., None] * torch.stack(seen)).sum(0)

"""Solutions of lesson 14, Grouped heads and paged prefill: each body stands where the exercise has its stub."""


def kv_head(head: int, heads: int, kv_heads: int) -> int:
    """lesson 14, task 1: kv_head"""
    return head // (heads // kv_heads)


def visible(first_query: int, count: int, first_key: int, size: int) -> Tensor:
    """lesson 14, task 2: visible"""
    queries = first_query + torch.arange(count)
    keys = first_key + torch.arange(size)
    return keys[None, :] <= queries[:, None]


def paged_prefill(q: Tensor, key_cache: Tensor, value_cache: Tensor, table: list[int], first_query: int) -> Tensor:
    """lesson 14, task 3: paged_prefill"""
    n, heads, head_dim = q.shape
    _, block_size, kv_heads, _ = key_cache.shape
    grouped = q.view(n, kv_heads, heads // kv_heads, head_dim)
    online = OnlineSoftmax(kv_heads, heads // kv_heads, n, head_dim)
    for entry, block in enumerate(table):
        first_key = entry * block_size
        filled = min(block_size, first_query + n - first_key)
        if filled <= 0:
            break
        scores = torch.einsum("nkgd,skd->kgns", grouped, key_cache[block, :filled]) / head_dim**0.5
        scores = scores.masked_fill(~visible(first_query, n, first_key, filled), float("-inf"))
        online.add(scores, value_cache[block, :filled])
    return online.result().permute(2, 0, 1, 3).flatten(1, 2)

"""Solutions of lesson 12, The Triton kernel: each body stands where the exercise, ../12_the_triton_kernel.py, has its stub."""


def bytes_to_move(lengths: list[int], kv_heads: int, head_dim: int, bytes_per_number: int) -> int:
    """lesson 12, task 1: bytes_to_move"""
    return 2 * sum(lengths) * kv_heads * head_dim * bytes_per_number


@triton.jit
def load_page(
    cache_ptr,
    block,
    head,
    filled,
    stride_block,
    stride_slot,
    stride_head,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """lesson 12, task 2: load_page"""
    slot = tl.arange(0, PAGE)[:, None]
    d = tl.arange(0, HEAD_DIM)[None, :]
    addresses = cache_ptr + block * stride_block + slot * stride_slot + head * stride_head + d
    return tl.load(addresses, mask=slot < filled, other=0.0)


@triton.jit
def walk(
    query, key_ptr, value_ptr, table_ptr, length, head, scale, stride_block, stride_slot, stride_head,
    PAGE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """lesson 12, task 3: walk"""
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    weighted = tl.zeros([HEAD_DIM], tl.float32)
    for entry in range(tl.cdiv(length, PAGE)):
        block = tl.load(table_ptr + entry).to(tl.int64)
        filled = length - entry * PAGE
        keys = load_page(key_ptr, block, head, filled, stride_block, stride_slot, stride_head, PAGE, HEAD_DIM)
        scores = tl.sum(query[None, :] * keys.to(tl.float32), 1) * scale
        scores = tl.where(tl.arange(0, PAGE) < filled, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0))
        shrink = tl.exp(top - new_top)
        weights = tl.exp(scores - new_top)
        values = load_page(value_ptr, block, head, filled, stride_block, stride_slot, stride_head, PAGE, HEAD_DIM)
        total = total * shrink + tl.sum(weights, 0)
        weighted = weighted * shrink + tl.sum(weights[:, None] * values.to(tl.float32), 0)
        top = new_top
    return weighted / total

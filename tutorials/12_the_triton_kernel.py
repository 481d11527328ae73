# %% [markdown]
# # 12. The Triton kernel
#
# *45 minutes. You need lesson 5, and Linux, for Triton is made for it. No GPU is needed; if you have one, it
# joins in at the end.*
#
# ## Why
#
# Lesson 5 walked the pages in a Python loop. That was right, and hopelessly slow: each turn of the loop
# launches a handful of small operations. On a GPU the whole walk belongs into one **kernel**, a program that
# runs a thousand times side by side, once for each sequence and head. Its only job is to read keys and values
# once, as fast as memory delivers them.
#
# **Triton** lets you write such a program in Python. What you write is one *program instance*: it asks which
# one it is (`tl.program_id`), computes the addresses of what it needs, loads whole **tiles** (small arrays
# that live in the chip's registers, the memory nearest to its arithmetic), computes with them as numpy would,
# and stores the result. All instances together are the **grid**.
#
# ```
#  grid:   one program for each (sequence, head)
#
#  program (1, 0)    table of sequence 1:  [ 7, 2, 5 ]        length 10, pages of 4
#
#     page 7  ────►  tile of keys   [4, head_dim]  ─┐
#                    tile of values [4, head_dim]  ─┴─►  top, total, weighted     (lesson 5's online softmax, in registers)
#     page 2  ────►  …                                   top, total, weighted
#     page 5  ────►  … 2 of 4 slots are ours: mask       top, total, weighted  ─►  out[1, 0]
# ```
#
# ## The interpreter
#
# Triton compiles for GPUs. But it can also **interpret** a kernel in plain Python and numpy, instance by
# instance. That is slow, and it is the best way to write one: `print` works, errors have line numbers, and
# NaN shows where it comes from. This lesson sets `TRITON_INTERPRET=1` for itself.
#
# When all is solved and you have an NVIDIA GPU, the same code is compiled for it, tested there, and timed:
#
# ```console
# $ LESSON_ON_GPU=1 python 12_the_triton_kernel.py
# ```

# %%
# ruff: noqa: E402, N803
from __future__ import annotations

import os
import random
import time
from collections.abc import Callable

ON_GPU = os.environ.get("LESSON_ON_GPU") == "1"
if ON_GPU:
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before triton is imported

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

if ON_GPU and not torch.cuda.is_available():
    raise RuntimeError(
        "LESSON_ON_GPU=1, but torch sees no GPU here: leave it out, and the interpreter runs your kernel"
    )
version = np.lib.NumpyVersion
if not ON_GPU and version(triton.__version__) < "3.7.0" and version(np.__version__) >= "2.4.0":
    raise RuntimeError(
        f"the interpreter of Triton {triton.__version__} cannot run loops with numpy {np.__version__}: pip install 'numpy<2.4'"
    )
DEVICE = "cuda" if ON_GPU else "cpu"
torch.set_num_threads(1)  # steady timings


class Batch:
    """Random sequences in pages, with NaN in every slot that is nobody's."""

    def __init__(
        self, lengths: list[int], *, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, page: int = 4,
        dtype: torch.dtype = torch.float32, seed: int = 0, fill: float = float("nan"),
    ) -> None:  # fmt: skip
        noise = torch.Generator().manual_seed(seed)
        self.page, width = page, max(-(-n // page) for n in lengths)
        blocks = random.Random(seed).sample(range(1, 1 + len(lengths) * width), len(lengths) * width)
        tables = torch.tensor(blocks, dtype=torch.int32).view(len(lengths), width)
        shape = (1 + len(blocks), page, kv_heads, head_dim)
        caches = []
        for _ in range(2):
            cache = torch.full(shape, fill)
            for table, length in zip(tables.tolist(), lengths, strict=True):
                for position in range(length):
                    block = table[position // page]
                    cache[block, position % page] = torch.randn(kv_heads, head_dim, generator=noise)
            caches.append(cache.to(DEVICE, dtype))
        self.keys, self.values = caches
        self.query = torch.randn(len(lengths), heads, head_dim, generator=noise).to(DEVICE, dtype)
        self.tables, self.lengths = tables.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def dense(batch: Batch) -> Tensor:
    """The twin: gather, then attention in 64 bits. Slow, obvious, right."""
    rows = []
    group = batch.query.shape[1] // batch.keys.shape[2]
    for q, table, length in zip(batch.query.double(), batch.tables.long(), batch.lengths.tolist(), strict=True):
        k, v = (
            cache[table].flatten(0, 1)[:length].double().repeat_interleave(group, 1)
            for cache in (batch.keys, batch.values)
        )
        scores = torch.einsum("hd,nhd->hn", q, k) / q.shape[-1] ** 0.5
        rows.append(torch.einsum("hn,nhd->hd", scores.softmax(1), v))
    return torch.stack(rows)


# %% [markdown]
# ## The pain
#
# One turn of lesson 5's loop, on one small page: the time goes into starting a handful of operations, not
# into their arithmetic. And how many turns does one token of a modest batch take?


# %%
def one_turn(q: Tensor, keys: Tensor, values: Tensor, sums: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Lesson 5's task 2 and 3 for one page: keys and values [page, heads, head_dim]."""
    top, total, weighted = sums
    scores = torch.einsum("hd,nhd->hn", q, keys) / q.shape[-1] ** 0.5
    new_top = torch.maximum(top, scores.amax(1))
    shrink, weights = torch.exp(top - new_top), torch.exp(scores - new_top[:, None])
    total = total * shrink + weights.sum(1)
    return new_top, total, weighted * shrink[:, None] + torch.einsum("hn,nhd->hd", weights, values)


def the_pain() -> None:
    batch, context, page, heads, head_dim = 16, 1_000, 16, 8, 64
    q, keys, values = (
        torch.randn(heads, head_dim),
        torch.randn(page, heads, head_dim),
        torch.randn(page, heads, head_dim),
    )
    sums = (torch.full((heads,), float("-inf")), torch.zeros(heads), torch.zeros(heads, head_dim))
    best = float("inf")
    for _ in range(200):
        start = time.perf_counter()
        one_turn(q, keys, values, sums)
        best = min(best, time.perf_counter() - start)
    turns = batch * -(-context // page)
    print(f"one turn of the loop on one page: {1e6 * best:.1f} microseconds")
    print(
        f"{batch} sequences of {context:,} tokens take {turns:,} turns: {1e3 * turns * best:.1f} ms, for each layer and token\n"
    )


if __name__ == "__main__":
    the_pain()

# %% [markdown]
# ## Task 1: `bytes_to_move`
#
# Before writing a kernel, compute what it must do at the least. Decoding is limited by memory: there are only
# a few multiplications for each number that is read. So the yardstick is bytes: every key and every value of
# every sequence, once. (The query and the output are small; leave them out.) A kernel that moves these bytes
# at the rate of a plain copy cannot be improved.
#
# Several query heads may share one key and value (a KV head, lesson 2). A good kernel reads it once for all
# of them.
#
# ```console
# $ python 12_the_triton_kernel.py
# NotImplementedError: lesson 12, task 1: bytes_to_move
# ```


# %%
def bytes_to_move(lengths: list[int], kv_heads: int, head_dim: int, bytes_per_number: int) -> int:
    """Bytes of keys and values that one decoding step must read in one layer.

    >>> bytes_to_move([10, 3], kv_heads=2, head_dim=16, bytes_per_number=2)
    1664
    """
    raise NotImplementedError("lesson 12, task 1: bytes_to_move")


# %%
def test_1_every_key_and_value_once() -> None:
    assert bytes_to_move([10, 3], kv_heads=2, head_dim=16, bytes_per_number=2) == 2 * 13 * 2 * 16 * 2
    batch = Batch([8, 8], page=4)
    held = batch.keys[1:].nbytes + batch.values[1:].nbytes
    assert bytes_to_move([8, 8], 2, 16, 4) == held, "two texts that fill their pages"


if __name__ == "__main__":
    test_1_every_key_and_value_once()

# %% [markdown]
# ## Task 2: `load_page`
#
# A kernel sees memory as a pointer to the first number, and **strides**: how many numbers further the next
# block, slot or head begins. The cache is `[num_blocks, page, kv_heads, head_dim]`, so the number at (block,
# slot, head, d) lies at
#
# ```
#  cache_ptr + block * stride_block + slot * stride_slot + head * stride_head + d
# ```
#
# You want a whole tile, all slots of the page and all d. Write the address once, with `slot` as a column and
# `d` as a row; they broadcast to a matrix of addresses, as in numpy:
#
# ```
#  slot = tl.arange(0, PAGE)[:, None]         d = tl.arange(0, HEAD_DIM)[None, :]
# ```
#
# `tl.load(addresses, mask=..., other=0.0)` reads where the mask is true and gives 0 elsewhere. Slots at or
# behind `filled` belong to nobody and hold NaN here: mask them. A weight of zero would not help, since 0 ·
# NaN is NaN.


# %%
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
    """The keys (or values) of one head in one block: [PAGE, HEAD_DIM], zeros in slots at or behind `filled`."""
    raise NotImplementedError("lesson 12, task 2: load_page")


# %%
@triton.jit
def _one_page(out_ptr, cache_ptr, block, head, filled, s0, s1, s2, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr):
    tile = load_page(cache_ptr, block, head, filled, s0, s1, s2, PAGE, HEAD_DIM)
    at = tl.arange(0, PAGE)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(out_ptr + at, tile)


def test_2_reads_one_tile() -> None:
    batch = Batch([8], page=4, kv_heads=2, head_dim=16)
    for block in (1, 2):
        for head in (0, 1):
            out = torch.empty(4, 16, device=DEVICE)
            _one_page[(1,)](out, batch.keys, block, head, 4, *batch.keys.stride()[:3], 4, 16)
            assert torch.equal(out, batch.keys[block, :, head]), f"block {block}, head {head}"


def test_2_slots_that_are_nobodys_read_as_zero() -> None:
    batch = Batch([6], page=4)
    block = int(batch.tables[0, 1])
    out = torch.empty(4, 16, device=DEVICE)
    _one_page[(1,)](out, batch.values, block, 0, 2, *batch.values.stride()[:3], 4, 16)
    assert torch.equal(out[:2], batch.values[block, :2, 0])
    assert not out[2:].isnan().any(), "NaN came through: the mask must stop it"
    assert (out[2:] == 0).all()


if __name__ == "__main__":
    test_2_reads_one_tile()
    test_2_slots_that_are_nobodys_read_as_zero()

# %% [markdown]
# ## Task 3: `walk`
#
# The page walk. Begin with the three sums of lesson 5, in registers this time:
#
# ```
#  top = tl.full([], float("-inf"), tl.float32)
#  total = tl.full([], 0.0, tl.float32)
#  weighted = tl.zeros([HEAD_DIM], tl.float32)
# ```
#
# Then loop over `range(tl.cdiv(length, PAGE))`, the entries of the table. In each turn:
#
# 1. `block = tl.load(table_ptr + entry).to(tl.int64)`: which page is next? (64 bits, because
#    `block * stride_block` outgrows 32 bits on a large GPU. Kernels have crashed over this.)
# 2. `filled = length - entry * PAGE`: how many tokens of the text are left from here on. It may exceed PAGE;
#    the mask does not mind.
# 3. The keys' tile, as float32. The scores: multiply with `query[None, :]`, `tl.sum` over axis 1, times
#    `scale`.
# 4. Slots at or behind `filled` must weigh nothing: their score is −∞, by
#    `tl.where(tl.arange(0, PAGE) < filled, scores, float("-inf"))`.
# 5. Lesson 5's five lines (`one_turn` above has them), with `tl.maximum`, `tl.max(scores, 0)`, `tl.exp` and
#    `tl.sum`, and the values' tile.
#
# At the end return `weighted / total`.


# %%
@triton.jit
def walk(
    query, key_ptr, value_ptr, table_ptr, length, head, scale, stride_block, stride_slot, stride_head,
    PAGE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Attention of one query [HEAD_DIM] over the pages of one table: [HEAD_DIM] in float32."""
    raise NotImplementedError("lesson 12, task 3: walk")


# %% [markdown]
# Around it, given: the kernel proper, which finds out who it is and what to read, and the function that
# launches the grid.


# %%
@triton.jit
def _decode(
    out_ptr, query_ptr, key_ptr, value_ptr, tables_ptr, lengths_ptr, scale, width, stride_block, stride_slot, stride_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    at = (row * HEADS + head) * HEAD_DIM + tl.arange(0, HEAD_DIM)
    out = walk(
        tl.load(query_ptr + at).to(tl.float32), key_ptr, value_ptr, tables_ptr + row * width, tl.load(lengths_ptr + row),
        head // GROUP, scale, stride_block, stride_slot, stride_head, PAGE, HEAD_DIM,
    )  # fmt: skip
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty))


def paged_decode(batch: Batch) -> Tensor:
    """Attention of one new token for each sequence. Sizes of pages and heads must be powers of two, as Triton's tiles are."""
    rows, heads, head_dim = batch.query.shape
    out = torch.empty_like(batch.query)
    _decode[(rows, heads)](
        out, batch.query, batch.keys, batch.values, batch.tables, batch.lengths, head_dim**-0.5, batch.tables.shape[1],
        *batch.keys.stride()[:3], heads, heads // batch.keys.shape[2], batch.page, head_dim,
    )  # fmt: skip
    return out


# %%
def test_3_equals_the_twin_at_every_boundary() -> None:
    for page in (1, 4, 16):
        batch = Batch([1, page, page + 1, 2 * page, 11], page=page, seed=page)
        torch.testing.assert_close(paged_decode(batch).double(), dense(batch), rtol=1e-4, atol=1e-5)


def test_3_any_sharing_of_heads() -> None:
    for heads, kv_heads in ((2, 2), (4, 1), (4, 2)):
        batch = Batch([5, 9], heads=heads, kv_heads=kv_heads)
        torch.testing.assert_close(paged_decode(batch).double(), dense(batch), rtol=1e-4, atol=1e-5)


def test_3_sixteen_bits() -> None:
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        batch = Batch([7, 12], dtype=dtype)
        torch.testing.assert_close(paged_decode(batch).double(), dense(batch), rtol=tolerance, atol=tolerance)


def test_3_the_numbers_of_the_pages_do_not_matter() -> None:
    batch = Batch([9, 14])
    before = paged_decode(batch)
    shuffled = torch.randperm(len(batch.keys), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    place = torch.argsort(shuffled)
    batch.keys, batch.values = batch.keys[shuffled].contiguous(), batch.values[shuffled].contiguous()
    batch.tables = place[batch.tables.long()].to(torch.int32)
    assert torch.equal(paged_decode(batch), before)


if __name__ == "__main__":
    test_3_equals_the_twin_at_every_boundary()
    test_3_any_sharing_of_heads()
    test_3_sixteen_bits()
    test_3_the_numbers_of_the_pages_do_not_matter()

# %% [markdown]
# ## What was won
#
# On a CPU: the proof that it is right, and what a perfect kernel would need for the bytes of task 1 at the
# rate of a plain copy on this machine. On a GPU: your kernel's own rate beside the copy's, and beside that of
# minipaged's kernel, which makes the four changes named below.


# %%
SHAPES = [(64, 4_096, 32, 8), (64, 1_024, 32, 32), (1, 16_384, 32, 8)]  # sequences, tokens, heads, KV heads
HEAD_DIM, PAGE = 128, 16


def seconds(action: Callable[[], object]) -> float:
    """The median on a GPU, where Triton's own stopwatch empties the caches between runs; the fastest of five on a CPU."""
    if ON_GPU:
        return triton.testing.do_bench(action, return_mode="median") / 1e3
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - start)
    return best


def copy_rate(num_bytes: int = 256 * 2**20) -> float:
    """Bytes a second, read and written, of a plain copy."""
    source = torch.ones(num_bytes // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds(lambda: target.copy_(source))


def large_batch(sequences: int, context: int, heads: int, kv_heads: int) -> Batch:
    """Sequences of one length in shuffled pages, drawn on the device."""
    width, numbers = -(-context // PAGE), {"device": DEVICE, "dtype": torch.bfloat16}
    batch = Batch([1])
    batch.page = PAGE
    batch.keys, batch.values = (
        torch.randn(1 + sequences * width, PAGE, kv_heads, HEAD_DIM, **numbers) for _ in range(2)
    )
    batch.query = torch.randn(sequences, heads, HEAD_DIM, **numbers)
    batch.tables = (1 + torch.randperm(sequences * width, device=DEVICE)).to(torch.int32).view(sequences, width)
    batch.lengths = torch.full((sequences,), context, device=DEVICE, dtype=torch.int32)
    return batch


def on_the_gpu() -> None:
    from minipaged.kernels.attention import paged_decode as of_minipaged

    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bfloat16")
    rate = copy_rate()
    print(f"a plain copy moves {rate / 1e9:,.0f} GB a second\n")
    print("sequences  tokens  heads/KV      yours             minipaged's       of the copy: yours, minipaged's")
    for sequences, context, heads, kv_heads in SHAPES:
        batch = large_batch(sequences, context, heads, kv_heads)
        arguments = (batch.query, batch.keys, batch.values, batch.tables, batch.lengths, HEAD_DIM**-0.5)
        torch.testing.assert_close(paged_decode(batch), of_minipaged(*arguments), rtol=2e-2, atol=2e-3)
        moved = bytes_to_move([context] * sequences, kv_heads, HEAD_DIM, 2)
        yours = seconds(lambda batch=batch: paged_decode(batch))
        theirs = seconds(lambda arguments=arguments: of_minipaged(*arguments))
        row = "".join(f"{1e6 * each:8,.0f} us {moved / each / 1e9:6,.0f} GB/s" for each in (yours, theirs))
        shares = "".join(f"{moved / each / rate:10.0%}" for each in (yours, theirs))
        print(f"{sequences:>9}{context:>8,}{heads:>7}/{kv_heads:<3}{row}{shares}")


def what_was_won() -> None:
    for page in (4, 16, 64):
        batch = Batch([37, 64, 5], page=page)
        error = float((paged_decode(batch).double() - dense(batch)).abs().max())
        print(f"pages of {page:>2}: largest difference from attention in 64 bits {error:.0e}")
    if ON_GPU:
        on_the_gpu()
        return
    rate = copy_rate()
    print(f"\na plain copy moves {rate / 1e9:,.1f} GB a second here")
    sequences, context, _, kv_heads = SHAPES[0]
    moved = bytes_to_move([context] * sequences, kv_heads, HEAD_DIM, 2)
    print(
        f"{sequences} sequences of {context:,} tokens, {kv_heads} KV heads of {HEAD_DIM}, 16 bits: {moved / 2**20:,.0f} MiB a layer"
    )
    print(f"at the rate of the copy: {1e3 * moved / rate:.2f} ms")
    if torch.cuda.is_available():
        print("this machine has a GPU; to see how fast your kernel is: LESSON_ON_GPU=1 python 12_the_triton_kernel.py")
    else:
        print("no GPU here: the interpreter shows that your kernel is right, not how fast it is")


if __name__ == "__main__":
    what_was_won()

# %% [markdown]
# Where your kernel stays behind the copy on a GPU, you can now say why:
#
# 1. Each query head of a group reads the same keys again. Let one program serve the whole group, with the
#    heads as rows of a small matrix product.
# 2. One page is a small tile. Load several at once, with a vector of page numbers.
# 3. The mask costs something in every turn, though only the last page needs it. Give that one a turn of its
#    own.
# 4. A single long text keeps a few programs busy while the rest of the GPU has nothing to do. Cut it into
#    chunks, and merge what they say as lesson 5 merged pages.
#
# All four are in minipaged's kernel.
#
# ## What real engines do
#
# - **vLLM** has a Triton kernel of this shape as one of several attention backends (`TRITON_ATTN`), for
#   devices that its other kernels do not serve
#   ([`triton_unified_attention.py`](https://github.com/vllm-project/vllm/blob/main/vllm/v1/attention/ops/triton_unified_attention.py)).
# - **FlashAttention 3** reads paged keys and values on NVIDIA's Hopper GPUs (Shah et al. 2024, [arXiv
#   2407.08608](https://arxiv.org/abs/2407.08608)); **FlashInfer** generates kernels for each layout (Ye et
#   al. 2025, [arXiv 2501.01005](https://arxiv.org/abs/2501.01005)).
# - **Triton** itself: Tillet, Kung and Cox 2019
#   ([paper](https://www.eecs.harvard.edu/~htk/publication/2019-mapl-tillet-kung-cox.pdf)),
#   [documentation](https://triton-lang.org/main/index.html).
#
# ## Where this lives in minipaged
#
# - `kernels/attention/decode_tile.py`: `attend_tile` is one turn of your loop.
# - `kernels/attention/decode_triton.py`: the loop without masks, and the chunks.
# - `kernels/attention/triton_tiles.py`: `tile_blocks` and `load_tile` are task 2 for several pages at once.
# - `kernels/attention/decode.py`: `paged_decode` chooses between the kernel and its twin.
# - `tests/kernels`: every kernel against its twin, in the interpreter, as you ran it.

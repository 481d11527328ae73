"""The loading warps of prefill_hopper: one warpgroup that looks up pages and copies tiles into rings of buffers in shared memory.

Ordinary asynchronous copies of sixteen bytes a thread, as FlashAttention-3 has for pages, so that any power of two is a block size. No load
has a mask: positions past the row's end read its last token again, and the score's mask hides them.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806, RUF059

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from minipaged.kernels.attention.prefill_hopper_items import HALF, describe, work_item

THREADS = gl.constexpr(128)  # of a warpgroup: each tells a barrier that its copies have come

# Triton 3.6 calls it async_copy_global_to_shared; it was renamed later.
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def offsets_of(page, slot, page_strides, WIDE: gl.constexpr):
    """Where the tokens in these slots of these pages begin, in elements; in 32 bits unless WIDE."""
    if WIDE:
        page = page.to(gl.int64)
    return page * page_strides[0] + slot * page_strides[1]


@gluon.jit
def last_offsets(
    table_ptr,
    start,
    last,
    page_strides,
    TILE: gl.constexpr,
    PAGE_BITS: gl.constexpr,
    WIDE: gl.constexpr,
    layout: gl.constexpr,
):
    """Offsets of TILE positions from `start`, those past `last` being `last`: none past it is read."""
    position = gl.minimum(start + gl.arange(0, TILE, layout=gl.SliceLayout(1, layout)), last)
    page = gl.load(table_ptr + (position >> PAGE_BITS))
    return offsets_of(page, position & ((1 << PAGE_BITS) - 1), page_strides, WIDE)


@gluon.jit
def whole_offsets(
    table_ptr,
    start,
    page_strides,
    TILE: gl.constexpr,
    PAGE_BITS: gl.constexpr,
    WIDE: gl.constexpr,
    layout: gl.constexpr,
):
    """Offsets of TILE positions from `start`, a multiple of TILE, all within the row."""
    place = gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))
    if TILE < (1 << PAGE_BITS):  # else start is a multiple of the page too
        place = start % (1 << PAGE_BITS) + place
    page = gl.load(table_ptr + (start >> PAGE_BITS) + (place >> PAGE_BITS))
    return offsets_of(page, place & ((1 << PAGE_BITS) - 1), page_strides, WIDE)


@gluon.jit
def wait_until_empty(barriers, number):
    """Until the round before `number` of a ring of buffers has been used."""
    STAGES: gl.constexpr = barriers.shape[0]
    mbarrier.wait(barriers.index(number % STAGES), ((number // STAGES) & 1) ^ 1)


@gluon.jit
def copy_tile(buffers, full, number, ptr, offset, layout: gl.constexpr):
    """Begin the copy of the tokens at `offset` into the buffer of round `number`; its barrier is signalled when they have come."""
    STAGES: gl.constexpr = buffers.shape[0]
    dim = gl.arange(0, buffers.shape[2], layout=gl.SliceLayout(0, layout))
    copy_to_shared(buffers.index(number % STAGES), ptr + (offset[:, None] + dim[None, :]))
    async_copy.mbarrier_arrive(full.index(number % STAGES), increment_count=False)


@gluon.jit
def copy_queries(buffers, full, number, query_ptr, strides, described, PACK: gl.constexpr, layout: gl.constexpr):
    """Begin the copy of an item's queries, each warpgroup's half apart; rows past the last query repeat it."""
    tiles, whole, first_query, num_queries, tile, length, first_head, row = described
    QUERIES: gl.constexpr = 2 * HALF // PACK
    ROUNDS: gl.constexpr = buffers.shape[0] // 2
    dim = gl.arange(0, buffers.shape[2], layout=gl.SliceLayout(0, layout))
    for half in gl.static_range(2):
        tile_row = half * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
        index = tile * QUERIES + tile_row // PACK
        token = (first_query + gl.minimum(index, num_queries - 1)).to(gl.int64)
        offset = token * strides[2] + (first_head + tile_row % PACK) * strides[3]
        buffer = buffers.index(2 * (number % ROUNDS) + half)
        copy_to_shared(buffer, query_ptr + offset[:, None] + dim[None, :])
    async_copy.mbarrier_arrive(full.index(number % ROUNDS), increment_count=False)


@gluon.jit
def produce(
    work,
    turns,
    buffers,
    barriers,
    pointers,
    strides,
    PAGE_BITS: gl.constexpr,
    WIDE: gl.constexpr,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    PACK: gl.constexpr,
):
    """The loading warpgroup. Of each item: queries, keys of the last tile, then keys of each tile before the values of the one after."""
    queries, keys, values = buffers
    query_full, query_empty, key_full, key_empty, value_full, value_empty = barriers
    query_ptr, key_ptr, value_ptr, block_tables_ptr = pointers
    page_strides = (strides[4], strides[5])
    stride_head, stride_table, stride_table_head = strides[6], strides[7], strides[8]
    TILE: gl.constexpr = keys.shape[1]
    HEAD_DIM: gl.constexpr = keys.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    count = 0  # tiles of keys so far
    number = 0  # items so far
    for turn in range(0, turns):
        described = describe(work_item(turn), work, HEADS, PACK, TILE)
        tiles, whole, first_query, num_queries, tile, length, first_head, row = described
        if tiles > 0:
            wait_until_empty(query_empty, number)
            copy_queries(queries, query_full, number, query_ptr, strides, described, PACK, layout)
            kv_head = first_head // GROUP
            table_ptr = block_tables_ptr + row.to(gl.int64) * stride_table + kv_head * stride_table_head
            my_keys = key_ptr + kv_head.to(gl.int64) * stride_head
            my_values = value_ptr + kv_head.to(gl.int64) * stride_head
            offset = gl.zeros([TILE], gl.int64 if WIDE else gl.int32, layout=gl.SliceLayout(1, layout))
            for step in range(0, tiles + 1):
                late = offset  # the values of a tile are where its keys were
                if step < tiles:  # page ids are asked for before there is room for the tile
                    start = (tiles - 1 - step) * TILE
                    if step == 0:
                        offset = last_offsets(table_ptr, start, length - 1, page_strides, TILE, PAGE_BITS, WIDE, layout)
                    else:
                        offset = whole_offsets(table_ptr, start, page_strides, TILE, PAGE_BITS, WIDE, layout)
                    wait_until_empty(key_empty, count + step)
                    copy_tile(keys, key_full, count + step, my_keys, offset, layout)
                if step > 0:
                    wait_until_empty(value_empty, count + step - 1)
                    copy_tile(values, value_full, count + step - 1, my_values, late, layout)
            number += 1
        count += tiles
    async_copy.commit_group()
    async_copy.wait_group(0)

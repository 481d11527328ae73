"""Decodes that read common pages once: the twin's result whoever shares, and however much."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipaged.kernels.attention import paged_decode
from minipaged.kernels.attention.decode import paged_decode_torch
from minipaged.kernels.attention.decode_shared import SharedPrefixes, tiles_of
from minipaged.kernels.launch_table import DecodeLaunch
from tests.kernels.paged_cases import FEW_HEADS, PagedCase, assert_close, examples, make_case

SHORT_CHUNKS = DecodeLaunch(16, 1, 1, min_chunk=16, programs_per_multiprocessor=6, enough_waves=1000)


def shared_case(
    groups: list[tuple[int, int]], extra: int, *, kv_heads: int, group: int, block_size: int, **settings: object
) -> tuple[PagedCase, SharedPrefixes]:
    """Rows in groups of (rows, common blocks), in mixed order, with `extra` rows that share nothing; what they share lies in one place."""
    owners = [number for number, (rows, _) in enumerate(groups) for _ in range(rows)] + [-1] * extra
    owners = [
        owners[i] for i in torch.randperm(len(owners), generator=torch.Generator().manual_seed(len(owners))).tolist()
    ]
    common = [groups[owner][1] * block_size if owner >= 0 else 0 for owner in owners]
    lengths = [tokens + 1 + 7 * row % 40 for row, tokens in enumerate(common)]
    case = make_case(lengths, [1] * len(lengths), kv_heads=kv_heads, group=group, block_size=block_size, **settings)
    told = []
    for number, (_, blocks) in enumerate(groups):
        rows = [row for row, owner in enumerate(owners) if owner == number]
        case.block_tables[rows, ..., :blocks] = case.block_tables[rows[0], ..., :blocks].clone()
        told.append((rows, blocks * block_size))
    columns = tiles_of(told, len(owners))
    tensors = (torch.tensor(column, dtype=torch.int32, device=case.query.device) for column in columns)
    return case, SharedPrefixes(*tensors)


@pytest.mark.usefixtures("interpreted", "unset_choice")
@examples(25)
@given(
    st.lists(st.tuples(st.integers(2, 4), st.integers(1, 9)), min_size=1, max_size=2),
    st.integers(0, 2),
    FEW_HEADS,
    st.sampled_from([4, 8, 16]),
    st.sampled_from([None, SHORT_CHUNKS]),
)
def test_L64_common_pages_change_nothing(
    groups: list[tuple[int, int]], extra: int, heads: tuple[int, int], block_size: int, launch: DecodeLaunch | None
) -> None:
    from minipaged.kernels.attention.decode_triton import paged_decode_triton

    case, shared = shared_case(groups, extra, kv_heads=heads[0], group=heads[1], head_dim=32, block_size=block_size)
    out = paged_decode_triton(*case.decode(), shared=shared, launch=launch)
    assert_close(out, paged_decode_torch(*case.decode()))


@pytest.mark.usefixtures("interpreted", "unset_choice")
def test_more_rows_than_a_tile_and_tiles_that_are_not_used() -> None:
    from minipaged.kernels.attention.decode_triton import paged_decode_triton

    case, shared = shared_case([(18, 3)], 1, kv_heads=1, group=2, head_dim=16, block_size=4, table_per_head=True)
    assert shared.tile_tokens.tolist() == [12, 12]
    idle = torch.full((2, shared.rows.shape[1]), -1, dtype=torch.int32)
    padded = shared._replace(
        rows=torch.cat([shared.rows, idle]),
        tile_tokens=torch.cat([shared.tile_tokens, torch.zeros(2, dtype=torch.int32)]),
    )
    expected = paged_decode_torch(*case.decode())
    assert_close(paged_decode_triton(*case.decode(), shared=padded, launch=SHORT_CHUNKS), expected)
    assert_close(paged_decode(*case.decode(), shared=padded), expected)


@pytest.mark.usefixtures("interpreted", "unset_choice")
def test_the_common_pages_are_read_where_the_first_row_of_a_tile_has_them() -> None:
    """A row whose own table is another is attended as the tile says: this is the caller's to get right, and a wrong tile is seen."""
    from minipaged.kernels.attention.decode_triton import paged_decode_triton

    case, shared = shared_case([(3, 2)], 0, kv_heads=1, group=2, head_dim=16, block_size=4)
    tables = case.block_tables.clone()
    tables[shared.rows[0, 1], 0] = tables[shared.rows[0, 0], 2]
    apart = replace(case, block_tables=tables)
    out = paged_decode_triton(*apart.decode(), shared=shared)
    assert_close(out, paged_decode_torch(*case.decode()))
    assert not torch.allclose(out, paged_decode_torch(*apart.decode()))


def test_not_with_a_window() -> None:
    case, shared = shared_case([(3, 2)], 0, kv_heads=1, group=2, head_dim=16, block_size=4)
    with pytest.raises(ValueError, match="window"):
        paged_decode(*case.decode(), window=3, shared=shared)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.usefixtures("unset_choice")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim"), [(2, 4, 128), (4, 1, 64), (1, 8, 128), (2, 3, 96), (1, 7, 256)]
)
def test_on_a_gpu(kv_heads: int, group: int, head_dim: int, dtype: torch.dtype) -> None:
    case, shared = shared_case(
        [(40, 90), (5, 33)],
        3,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        block_size=16,
        dtype=dtype,
        device="cuda",
    )
    assert_close(paged_decode(*case.decode(), shared=shared), paged_decode_torch(*case.decode()))

"""The Hopper kernel of paged_prefill: which calls it takes (anywhere), and its outputs (on a Hopper GPU)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minipaged.kernels import launch_table
from minipaged.kernels.attention import paged_prefill
from minipaged.kernels.dispatch import gluon_runs
from minipaged.kernels.launch_table import HopperPrefillLaunch, hopper_prefill_launch, hopper_prefill_settings
from tests.kernels.paged_cases import PagedCase, assert_close, dense_attention, make_case

on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and torch.cuda.get_device_capability() == launch_table.HOPPER),
        reason="needs a Hopper GPU",
    ),
    pytest.mark.skipif(not gluon_runs(), reason="needs a triton whose Gluon is known"),
    pytest.mark.usefixtures("unset_choice"),
]
# head_dim, kv_heads, group, block_size, a table per KV head
SHAPES = [
    (64, 3, 3, 16, False),
    (64, 2, 4, 256, True),
    (64, 4, 1, 1, False),
    (128, 2, 4, 16, False),
    (128, 4, 1, 64, False),
    (128, 1, 2, 256, True),
    (128, 2, 7, 1, False),
]
SETTINGS = {"short": HopperPrefillLaunch(64, 4, persistent=True), "long": HopperPrefillLaunch(128, 2, persistent=False)}
# (contexts, queries): one item's state must not reach the next; the second failed so once (a tile's mask was the one of the tile before)
ROWS = {
    "edges": ([1, 64, 65, 127, 128, 129, 191, 300], [1, 64, 65, 127, 128, 129, 1, 172]),
    "long before short": ([700, 257, 1300, 40, 128, 1], [700, 100, 129, 1, 128, 1]),
    "decodes among prompts": ([511, 17, 1000, 1, 63, 256], [1, 17, 1, 1, 63, 1]),
    "empty rows": ([0, 200, 30, 0, 129], [0, 200, 0, 0, 2]),
}


def gpu_case(shape: tuple[int, int, int, int, bool], rows: str, dtype: torch.dtype = torch.bfloat16) -> PagedCase:
    head_dim, kv_heads, group, block_size, table_per_head = shape
    contexts, queries = ROWS[rows]
    return make_case(
        contexts,
        queries,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        table_per_head=table_per_head,
        device="cuda",
        unused_entry=0,
    )


def attend(
    case: PagedCase, settings: HopperPrefillLaunch, programs: int, monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """The kernel with this launch, as on a GPU of `programs` multiprocessors."""
    from minipaged.kernels.attention import prefill_hopper

    monkeypatch.setattr(prefill_hopper, "multiprocessors", lambda device: programs)
    out = torch.full_like(case.query, float("nan"))
    return prefill_hopper.paged_prefill_hopper(*case.prefill(), out=out, launch=settings)


class TestOnHopper:
    pytestmark = on_hopper

    @pytest.mark.parametrize("rows", ROWS)
    @pytest.mark.parametrize("settings", SETTINGS)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_L64_equals_dense_attention(
        self,
        shape: tuple[int, int, int, int, bool],
        settings: str,
        rows: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """One program takes all items in turn, a few take several, many take one each."""
        case = gpu_case(shape, rows, torch.float16 if shape[2] == 3 else torch.bfloat16)
        expected = dense_attention(case)
        for persistent, programs in ((True, 1), (True, 5), (False, 1)):
            launch = replace(SETTINGS[settings], persistent=persistent)
            assert_close(attend(case, launch, programs, monkeypatch), expected)

    @pytest.mark.parametrize("settings", SETTINGS)
    def test_L63_sees_neither_physical_ids_nor_unused_slots(
        self, settings: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case = gpu_case(SHAPES[3], "long before short")
        out = attend(case, SETTINGS[settings], 5, monkeypatch)
        for other in (case.permuted(1), case.filled(1e4)):
            assert torch.equal(out, attend(other, SETTINGS[settings], 5, monkeypatch))

    def test_padding_is_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = gpu_case(SHAPES[3], "edges")
        tokens = case.query.shape[0]
        padded = replace(case, query=torch.cat([case.query, torch.full_like(case.query[:7], float("nan"))]))
        out = attend(padded, SETTINGS["long"], 5, monkeypatch)
        assert_close(out[:tokens], dense_attention(case))
        assert out[tokens:].isnan().all()

    def test_queries_may_be_part_of_a_wider_tensor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = gpu_case(SHAPES[3], "edges")
        merged = torch.cat([case.query] * 3, 1)
        part = replace(case, query=merged[:, case.query.shape[1] : 2 * case.query.shape[1]])
        assert_close(attend(part, SETTINGS["long"], 5, monkeypatch), dense_attention(case))

    def test_a_captured_prefill_follows_its_inputs(self) -> None:
        """Lengths, queries and tables change in place under a graph; paged_prefill itself chooses the kernel."""
        case = make_case(
            [400, 400], [200, 200], kv_heads=2, group=4, head_dim=128, block_size=16, dtype=torch.bfloat16,
            device="cuda", unused_entry=0,
        )  # fmt: skip
        tables = case.block_tables.clone()
        assert chosen(case) is not None
        out = torch.empty_like(case.query)
        paged_prefill(*case.prefill(), out=out)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            paged_prefill(*case.prefill(), out=out)
        for step, (lengths, starts) in enumerate(
            (([400, 200], [0, 200, 400]), ([129, 64], [0, 128, 129]), ([0, 300], [0, 0, 150]))
        ):
            case.context_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
            case.query_starts.copy_(torch.tensor(starts, dtype=torch.int32))
            case.block_tables.copy_(tables.roll(step, 0))
            case.query.copy_(torch.randn(case.query.shape, generator=torch.Generator().manual_seed(step)))
            graph.replay()
            assert_close(out[: starts[-1]], dense_attention(case)[: starts[-1]])

    def test_it_takes_what_it_is_faster_at(self) -> None:
        assert chosen(gpu_case(SHAPES[3], "decodes among prompts")) is None, "most tiles are empty"
        uniform = uniform_case("cuda")
        assert chosen(uniform) is not None
        assert chosen(uniform, window=100) is None
        wide = torch.zeros(800, 8, 136, dtype=torch.bfloat16, device="cuda")[:, :, 8:]
        assert chosen(replace(uniform, query=wide[:, :, :128])) is None, (
            "its rows do not begin at multiples of 16 elements"
        )


def uniform_case(device: str) -> PagedCase:
    return make_case(
        [200] * 4,
        [200] * 4,
        kv_heads=2,
        group=4,
        head_dim=128,
        block_size=16,
        dtype=torch.bfloat16,
        device=device,
        unused_entry=0,
    )


def chosen(case: PagedCase, window: int | None = None) -> HopperPrefillLaunch | None:
    """The launch that paged_prefill takes for a case."""
    return hopper_prefill_launch(
        case.query, case.key_cache, case.value_cache, case.block_tables, case.max_query_len, window
    )


def test_tensors_elsewhere_are_left_to_others() -> None:
    assert chosen(uniform_case("cpu")) is None


def test_sections_are_full() -> None:
    """As many pairs of (row, heads) as divide all of them, and hold no more keys and values than asked for."""
    launch = HopperPrefillLaunch(128, 2, True, section_bytes=1000)
    assert launch.section(pairs=32, pairs_per_kv_head=2, kv_bytes=300) == 4  # 6 would fit
    assert launch.section(pairs=32, pairs_per_kv_head=2, kv_bytes=10) == 32
    assert launch.section(pairs=7, pairs_per_kv_head=1, kv_bytes=2000) == 1


SHORT, LISTS, ONE_LIST, APART = (
    HopperPrefillLaunch(64, 4, persistent=True),
    HopperPrefillLaunch(128, 2, persistent=True),
    HopperPrefillLaunch(128, 2, persistent=True, section_bytes=48 << 20),
    HopperPrefillLaunch(128, 2, persistent=False),
)


@pytest.mark.parametrize(
    ("longest", "most_queries", "mebibytes", "tiles_per_full_tile", "fastest"),
    [
        (512, 512, 8, 1.0, SHORT),  # 4 x 512
        (1024, 1024, 64, 1.0, SHORT),  # 16 x 1024
        (4096, 4096, 256, 1.0, APART),  # 4 x 4096
        (16384, 16384, 64, 1.0, APART),  # 1 x 16384
        (2048, 2048, 32, 1.0, ONE_LIST),  # 1 x 2048 with 32 KV heads
        (1536, 512, 24, 1.0, LISTS),  # 4 x 512 after 1024
        (4608, 512, 72, 1.0, APART),  # 4 x 512 after 4096
        (8704, 512, 34, 1.0, APART),  # 1 x 512 after 8192
        (2048, 2048, 32, 4.0, ONE_LIST),  # captured for 2048 queries a row, run with 4 x 512
        (2048, 2048, 64, 4.0, None),
        (3904, 3900, 46, 1.43, LISTS),  # a step of 700 after 3200, 3900 and 3592
        (2048, 512, 8, 8.0, None),
    ],
)
def test_the_launch_is_the_one_measured_as_fastest(
    longest: int,
    most_queries: int,
    mebibytes: int,
    tiles_per_full_tile: float,
    fastest: HopperPrefillLaunch | None,
) -> None:
    assert hopper_prefill_settings(longest, most_queries, mebibytes << 20, tiles_per_full_tile) == fastest

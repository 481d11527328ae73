"""The kernel benchmark on a CPU: its arithmetic, its peers' arguments and what it leaves out. Times are made up; outputs are not."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from minipaged.lab.measure import kernels as bench_kernels
from minipaged.lab.measure import peers as bench_peers
from minipaged.lab.measure.kernels import check_agreement, decode_rows, prefill_rows, ragged
from minipaged.lab.measure.peers import PEERS, make_case, minipaged
from minipaged.lab.measure.pools import BLOCK, Pool, make_pool
from minipaged.lab.measure.rows import Ceilings
from minipaged.lab.measure.small_kernels import SMALL, norm, rope_write, silu, small_rows
from minipaged.lab.measure.small_kernels import draws as sampling
from minipaged.lab.measure.timing import Failed, Timing, Work

CEILINGS = Ceilings(gigabytes=1.0, teraflops=1e-3)
DECODE = (("small", (40, 40), 4, 2, 32), ("ragged", (33, 7), 4, 2, 32))
PREFILL = ((2, 20, 0, 4, 2, 32), (2, 20, 16, 4, 2, 32))


def made_up(works: Mapping[str, Work], calls: int, failed: Failed) -> dict[str, Timing]:
    """Ours takes 100, 200 and 300 us, the next contender twice as long, and so on. Every work runs once."""
    for work in works.values():
        work()
    return {name: Timing(tuple(100.0 * (i + 1) * k for k in (1, 2, 3))) for i, name in enumerate(works)}


def attention(pool: Pool, query: Tensor, new: int, pages: list[list[int]]) -> Tensor:
    """Causal attention over the given pages of each sequence."""
    outs = []
    for row, (ids, length) in enumerate(zip(pages, pool.contexts, strict=True)):
        keys, values = (cache[ids].flatten(0, 1)[:length].float() for cache in (pool.keys, pool.values))
        group = query.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values))
        mine = query[row * new : (row + 1) * new].float().transpose(0, 1)
        seen = torch.arange(length) <= torch.arange(length - new, length)[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(mine, keys, values, attn_mask=seen)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs).to(query.dtype)


def test_pools_tell_the_same_in_every_form() -> None:
    pool = make_pool((33, 7, 16), 2, 8, device="cpu")
    starts, index, last = pool.rows()
    assert starts.tolist() == [0, 3, 4, 5]
    assert last.tolist() == [1, 7, 16]
    assert index.tolist() == [*pool.tables[0].tolist(), pool.tables[1, 0].item(), pool.tables[2, 0].item()]
    assert sorted(index.tolist()) == list(range(5))
    assert pool.kv_bytes == 2 * 56 * 2 * 8 * 2
    even = make_pool((20, 20), 2, 8, device="cpu")
    keys, values = even.dense()
    assert keys.shape == values.shape == (2, 2, 20, 8)
    assert torch.equal(keys[1, :, 17], even.keys[even.tables[1, 17 // BLOCK], 17 % BLOCK])


def test_rows_hold_medians_shares_and_ratios() -> None:
    notes: list[str] = []
    rows = list(decode_rows(("sdpa",), CEILINGS, notes.append, shapes=DECODE, timed=made_up, device="cpu"))
    ours, flash = rows[:2]
    assert (ours.kernel, ours.shape, ours.contender, ours.microseconds) == ("decode", "small", "minipaged", 200.0)
    kv_bytes = 2 * 80 * 2 * 32 * 2
    assert ours.value == pytest.approx(kv_bytes / 200e-6 / 1e9)
    assert ours.share == pytest.approx(ours.value / CEILINGS.gigabytes)
    assert ours.ratio is None
    assert (flash.contender, flash.ratio) == ("torch flash, dense", 2.0)
    assert [row.contender for row in rows if row.shape == "ragged"] == ["minipaged"]
    assert any("one length" in note for note in notes)
    assert any(note.startswith("torch cuDNN, dense, decode small:") for note in notes)


def test_prefill_counts_what_is_seen() -> None:
    notes: list[str] = []
    rows = list(prefill_rows(("sdpa",), CEILINGS, notes.append, shapes=PREFILL, timed=made_up, device="cpu"))
    whole, behind = (row for row in rows if row.contender == "minipaged")
    assert whole.value == pytest.approx(4 * 2 * 4 * 32 * (20 * 21 / 2) / 200e-6 / 1e12)
    assert behind.value == pytest.approx(4 * 2 * 4 * 32 * (20 * 16 + 20 * 21 / 2) / 200e-6 / 1e12)
    assert behind.shape == "2 x 20, 4/2, after 16"


def test_the_ratio_is_the_median_of_each_rounds() -> None:
    assert Timing((1.0, 10.0, 5.0)).speed_against(Timing((3.0, 11.0, 10.0))) == 2.0


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(make_pool((40, 40), 2, 32, device="cpu"), 4, 1)
    right = minipaged(case)()
    check_agreement(right.view(2, 1, 4, 32), right)
    with pytest.raises(ValueError, match="relative error"):
        check_agreement(right.flip(0), right)
    with pytest.raises(ValueError, match="relative error nan"):
        check_agreement(right * float("nan"), right)

    monkeypatch.setitem(PEERS, "fa3", (("wrong", lambda case: lambda: torch.zeros_like(case.query)),))
    notes: list[str] = []
    rows = list(decode_rows(("fa3",), CEILINGS, notes.append, shapes=DECODE[:1], timed=made_up, device="cpu"))
    assert [row.contender for row in rows] == ["minipaged"]
    assert notes == ["wrong, decode small: ValueError: its output is not ours: relative error 1.0e+00"]


def test_a_peer_that_cannot_be_captured_is_left_out() -> None:
    def broken(works: Mapping[str, Work], calls: int, failed: Failed) -> dict[str, Timing]:
        for name in list(works)[1:]:
            failed(name, RuntimeError("operation not permitted when stream is capturing"))
        return {"minipaged": Timing((1.0, 1.0, 1.0))}

    notes: list[str] = []
    rows = list(decode_rows(("sdpa",), CEILINGS, notes.append, shapes=DECODE[:1], timed=broken, device="cpu"))
    assert [row.contender for row in rows] == ["minipaged"]
    assert "torch flash, dense, decode small: RuntimeError: operation not permitted when stream is capturing" in notes

    def ours_breaks(works: Mapping[str, Work], calls: int, failed: Failed) -> dict[str, Timing]:
        failed("minipaged", RuntimeError("out of memory"))
        return {}

    with pytest.raises(RuntimeError, match="out of memory"):
        list(decode_rows((), CEILINGS, notes.append, shapes=DECODE[:1], timed=ours_breaks, device="cpu"))


@pytest.mark.parametrize("peer", ["fa3", "flashinfer"])
def test_a_peer_that_is_not_installed_is_left_out(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vllm", "vllm.vllm_flash_attn", "flashinfer"):
        monkeypatch.setitem(sys.modules, name, None)
    notes: list[str] = []
    rows = list(decode_rows((peer,), CEILINGS, notes.append, shapes=DECODE[:1], timed=made_up, device="cpu"))
    assert [row.contender for row in rows] == ["minipaged"]
    assert len(notes) == len(PEERS[peer])
    assert all("cannot be imported" in note for note in notes)


def test_flash_attention_is_given_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[dict[str, Any]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, **told: Any) -> None:
        pool = Pool(k, v, told["block_table"], told["seqused_k"], tuple(told["seqused_k"].tolist()))
        assert told["causal"]
        assert told["fa_version"] == 3
        assert told["max_seqlen_k"] == max(pool.contexts)
        assert told["cu_seqlens_q"].tolist() == [i * told["max_seqlen_q"] for i in range(len(pool.contexts) + 1)]
        pages = [table[: -(-n // BLOCK)].tolist() for table, n in zip(pool.tables, pool.contexts, strict=True)]
        told["out"].copy_(attention(pool, q, told["max_seqlen_q"], pages))

    library = ModuleType("vllm.vllm_flash_attn")
    library.flash_attn_varlen_func = attend  # type: ignore[attr-defined]
    library.get_scheduler_metadata = lambda **told: planned.append(told)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", library)
    notes: list[str] = []
    rows = list(decode_rows(("fa3",), CEILINGS, notes.append, shapes=DECODE, timed=made_up, device="cpu"))
    rows += prefill_rows(("fa3",), CEILINGS, notes.append, shapes=PREFILL, timed=made_up, device="cpu")
    assert [row.contender for row in rows] == ["minipaged", "fa3", "fa3 planned"] * 2 + ["minipaged", "fa3"] * 2
    assert all("for decode only" in note for note in notes)
    assert planned[0]["num_heads_kv"] == 2
    assert planned[0]["page_size"] == BLOCK


def test_flashinfer_is_given_compressed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapper:
        def __init__(self, workspace: Tensor, layout: str, use_tensor_cores: bool = False) -> None:
            assert layout == "NHD"

        def run(self, query: Tensor, cache: tuple[Tensor, Tensor], out: Tensor) -> None:
            starts, index, last = (x.tolist() for x in self.pages)
            pages = [index[a:b] for a, b in itertools.pairwise(starts)]
            lengths = tuple(BLOCK * (len(ids) - 1) + n for ids, n in zip(pages, last, strict=True))
            pool = Pool(*cache, torch.zeros(0), torch.zeros(0), lengths)
            out.copy_(attention(pool, query, self.new, pages))

    class Decode(Wrapper):
        def plan(self, starts: Tensor, index: Tensor, last: Tensor, *shape: int, **kinds: Any) -> None:
            self.pages, self.new = (starts, index, last), 1
            assert shape == (4, 2, 32, BLOCK)

    class Prefill(Wrapper):
        def plan(self, queries: Tensor, starts: Tensor, index: Tensor, last: Tensor, *shape: int, **kinds: Any) -> None:
            self.pages, self.new = (starts, index, last), int(queries[1])
            assert kinds["causal"]

    library = ModuleType("flashinfer")
    library.BatchDecodeWithPagedKVCacheWrapper = Decode  # type: ignore[attr-defined]
    library.BatchPrefillWithPagedKVCacheWrapper = Prefill  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    monkeypatch.setattr(bench_peers, "WORKSPACE_BYTES", 1024)
    notes: list[str] = []
    rows = list(decode_rows(("flashinfer",), CEILINGS, notes.append, shapes=DECODE, timed=made_up, device="cpu"))
    rows += prefill_rows(("flashinfer",), CEILINGS, notes.append, shapes=PREFILL, timed=made_up, device="cpu")
    assert [row.contender for row in rows] == ["minipaged", "flashinfer"] * 4
    assert not notes


def test_small_kernels_run_and_count_their_bytes() -> None:
    cases = (rope_write(33, 4, 2, 32), norm(5, 64), silu(5, 48), sampling(3, 97))
    rows = list(small_rows(CEILINGS, cases=cases, timed=made_up, device="cpu"))
    assert [row.kernel for row in rows] == ["rope + cache write", "norm", "SiLU * gate", "sampling"]
    assert rows[1].value == pytest.approx(2 * 5 * 64 * 2 / 200e-6 / 1e9)
    assert all(row.share == pytest.approx(row.value) for row in rows)


def test_the_shapes_are_large_enough() -> None:
    # One row of logits stays in the cache; it is there to be timed, not for its bandwidth.
    assert [case.shape for case in SMALL if case.moved < 64e6] == ["1 x 151936 logits"]
    assert {prefix for _, new, prefix, *_ in bench_kernels.PREFILL_SHAPES if new == 512} == {0, 1024, 4096, 16384}
    lengths = ragged()
    assert lengths == ragged()
    assert len(lengths) == 64
    assert 100 <= min(lengths) < 300
    assert 1800 < max(lengths) <= 2048


def test_a_long_enough_graph_is_captured() -> None:
    """work / ceiling is the least time of a call; a graph of passes * calls of them takes 1,500 us or one pass."""
    assert Ceilings(3000, 700).passes(3e5, "GB/s", 1) == 15  # 100 us each
    assert Ceilings(3000, 700).passes(3e7, "GB/s", 4) == 1

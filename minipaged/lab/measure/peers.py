"""The peers of paged attention, each brought to one form: given a pool and queries, a call that attends and returns the
output.

A peer that is not installed, or does not take the shape, raises PeerMissingError with the reason. Queries are packed:
[tokens, heads, head_dim], `new` tokens a sequence, the last ones of its context, causal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minipaged.kernels.attention import paged_decode, paged_prefill
from minipaged.lab.measure.pools import BLOCK, Pool

Attend = Callable[[], Tensor]
WORKSPACE_BYTES = 128 * 2**20  # what flashinfer's documentation asks for


class PeerMissingError(Exception):
    """This peer cannot run here, or not on this shape; the text says why."""


@dataclass(frozen=True)
class Case:
    """Attention to be computed: `new` queries a sequence over the contexts of a pool."""

    pool: Pool
    query: Tensor  # [sequences * new, heads, head_dim]
    new: int
    starts: Tensor  # int32 [sequences + 1]

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(self.query.shape[2] ** -0.5)


def make_case(pool: Pool, heads: int, new: int) -> Case:
    """Random queries for a pool."""
    sequences, head_dim, device = len(pool.contexts), pool.keys.shape[3], pool.keys.device
    query = torch.randn(sequences * new, heads, head_dim, device=device, dtype=torch.bfloat16)
    starts = torch.arange(sequences + 1, device=device, dtype=torch.int32) * new
    return Case(pool, query, new, starts)


def minipaged(case: Case) -> Attend:
    """This project's kernels."""
    pool, out = case.pool, torch.empty_like(case.query)
    paged = (case.query, pool.keys, pool.values, pool.tables, pool.lengths)
    if case.new == 1:
        return lambda: paged_decode(*paged, case.scale, out=out)
    return lambda: paged_prefill(*paged, case.starts, case.new, case.scale, out=out)


def fa3(case: Case) -> Attend:
    """FlashAttention 3 over pages, as vLLM ships it."""
    return _fa3(case, planned=False)


def fa3_planned(case: Case) -> Attend:
    """The same with its work list made beforehand, as an engine does once a step for all layers."""
    if case.new > 1:
        raise PeerMissingError("a plan is made for decode only")
    return _fa3(case, planned=True)


def _fa3(case: Case, *, planned: bool) -> Attend:
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata
    except (ImportError, OSError) as error:
        raise PeerMissingError(f"vllm.vllm_flash_attn cannot be imported: {error}") from None
    pool, out = case.pool, torch.empty_like(case.query)
    longest = max(pool.contexts)
    settings: dict[str, Any] = {
        "max_seqlen_q": case.new,
        "cu_seqlens_q": case.starts,
        "max_seqlen_k": longest,
        "seqused_k": pool.lengths,
        "block_table": pool.tables,
        "causal": True,
        "out": out,
        "fa_version": 3,
    }
    if planned:
        _, heads, head_dim = case.query.shape
        settings["scheduler_metadata"] = get_scheduler_metadata(
            batch_size=len(pool.contexts),
            max_seqlen_q=case.new,
            max_seqlen_k=longest,
            num_heads_q=heads,
            num_heads_kv=pool.keys.shape[2],
            headdim=head_dim,
            cache_seqlens=pool.lengths,
            qkv_dtype=case.query.dtype,
            cu_seqlens_q=case.starts,
            page_size=BLOCK,
            causal=True,
        )

    def attend() -> Tensor:
        flash_attn_varlen_func(case.query, pool.keys, pool.values, **settings)
        return out

    return attend


def flashinfer(case: Case) -> Attend:
    """FlashInfer over pages, planned beforehand."""
    try:
        import flashinfer as library
    except (ImportError, OSError) as error:
        raise PeerMissingError(f"flashinfer cannot be imported: {error}") from None
    pool, (_, heads, head_dim) = case.pool, case.query.shape
    kv_heads, out = pool.keys.shape[2], torch.empty_like(case.query)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=case.query.device)
    shape = (heads, kv_heads, head_dim, BLOCK)
    kind = {"q_data_type": case.query.dtype, "kv_data_type": pool.keys.dtype}
    if case.new == 1:
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=heads > kv_heads)
        wrapper.plan(*pool.rows(), *shape, **kind)
    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(case.starts, *pool.rows(), *shape, causal=True, **kind)

    def attend() -> Tensor:
        wrapper.run(case.query, (pool.keys, pool.values), out=out)
        return out

    return attend


def torch_flash(case: Case) -> Attend:
    """torch's flash attention over keys and values that are dense: what paging is compared with."""
    query, keys, values = _dense(case)
    if case.new == 1 or case.new == keys.shape[2]:
        return _sdpa(case, torch.nn.attention.SDPBackend.FLASH_ATTENTION)

    def attend() -> Tensor:
        # scaled_dot_product_attention takes no prefix with its flash backend; the operator behind it does
        out = torch.ops.aten._scaled_dot_product_flash_attention(query, keys, values, 0.0, True, scale=case.scale)[0]
        return _packed(out)

    return attend


def torch_cudnn(case: Case) -> Attend:
    """cuDNN's attention through torch, over dense keys and values, where it takes the shape."""
    if case.new > 1 and case.new != max(case.pool.contexts):
        raise PeerMissingError("torch asks cuDNN for no causal attention behind a prefix")
    return _sdpa(case, torch.nn.attention.SDPBackend.CUDNN_ATTENTION)


def _sdpa(case: Case, backend: torch.nn.attention.SDPBackend) -> Attend:
    query, keys, values = _dense(case)
    causal, grouped = case.new > 1, query.shape[1] != keys.shape[1]

    def attend() -> Tensor:
        with torch.nn.attention.sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(
                query, keys, values, is_causal=causal, scale=case.scale, enable_gqa=grouped
            )
        return _packed(out)

    return attend


def _dense(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Query [sequences, heads, new, head_dim] and dense keys and values."""
    if len(set(case.pool.contexts)) > 1:
        raise PeerMissingError("dense keys and values need contexts of one length")
    query = case.query.view(-1, case.new, *case.query.shape[1:]).transpose(1, 2).contiguous()
    return query, *case.pool.dense()


def _packed(out: Tensor) -> Tensor:
    """[sequences, heads, new, head_dim] -> a view [sequences, new, heads, head_dim]: no copy is timed."""
    return out.transpose(1, 2)


PEERS: dict[str, tuple[tuple[str, Callable[[Case], Attend]], ...]] = {
    "fa3": (("fa3", fa3), ("fa3 planned", fa3_planned)),
    "flashinfer": (("flashinfer", flashinfer),),
    "sdpa": (("torch flash, dense", torch_flash), ("torch cuDNN, dense", torch_cudnn)),
}
"""What `--against` may name, and the contenders that each name brings."""

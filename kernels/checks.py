"""What every kernel demands of its arguments: shapes, dtypes, devices. Reads no tensor's contents, so nothing waits for the device."""

from __future__ import annotations

import torch

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CODE_DTYPES = (torch.int8, torch.float8_e4m3fn)  # of a quantized cache
INDEX_DTYPES = (torch.int64, torch.int32)
# A hidden score is -inf, and times 0 that would be NaN. Bounded well inside float32, in which the kernels multiply by the scale.
SMALLEST_SCALE, LARGEST_SCALE = 1e-30, 1e30
COLDEST = 1e-5  # below this temperature a draw is greedy: logits over it would leave what float32 can hold


def shape_of(tensor: torch.Tensor) -> list[int]:
    """A tensor's shape as it is printed in messages."""
    return list(tensor.shape)


def check_integers(
    name: str,
    tensor: torch.Tensor,
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    length: int | None,
    device: torch.device,
) -> None:
    """A contiguous vector of `length` integers of one of `dtypes` on `device`; any length if None."""
    dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    if tensor.dim() != 1 or (length is not None and tensor.shape[0] != length):
        raise ValueError(f"{name} has shape {shape_of(tensor)}; it must be [{'any' if length is None else length}]")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; it must be {' or '.join(map(str, dtypes))}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {device}, where the cache is")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has stride {tensor.stride(0)}; it must be contiguous")


def check_logits(logits: torch.Tensor) -> None:
    """[rows, vocab] with at least one token, its last dimension contiguous."""
    if logits.dim() != 2 or logits.shape[1] < 1 or logits.dtype not in FLOAT_DTYPES or logits.stride(1) != 1:
        raise ValueError(
            f"logits is {logits.dtype} {shape_of(logits)} with strides {logits.stride()}; it must be float32, float16 or bfloat16 "
            "[rows, vocab] with its last dimension contiguous"
        )


def check_column(name: str, column: torch.Tensor, logits: torch.Tensor, dtypes: tuple[torch.dtype, ...] = ()) -> None:
    """One number for each row of the logits, where they are, contiguous; of one of `dtypes`, or of any if none is named."""
    alike = column.shape == logits.shape[:1] and column.device == logits.device and column.is_contiguous()
    if not alike or (dtypes and column.dtype not in dtypes):
        kinds = f"{' or '.join(map(str, dtypes))} " if dtypes else ""
        raise ValueError(
            f"{name} is {column.dtype} {shape_of(column)} on {column.device}; it must be {kinds}[{logits.shape[0]}], contiguous, on "
            f"{logits.device}"
        )


def check_caches(key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
    """Both caches [num_blocks, block_size, kv_heads, head_dim], alike in shape, dtype, device and strides."""
    if key_cache.dim() != 4 or key_cache.shape != value_cache.shape:
        raise ValueError(
            f"key_cache {shape_of(key_cache)} and value_cache {shape_of(value_cache)}: both must be "
            "[num_blocks, block_size, kv_heads, head_dim]"
        )
    if key_cache.dtype != value_cache.dtype or key_cache.dtype not in (*FLOAT_DTYPES, *CODE_DTYPES):
        raise ValueError(
            f"key_cache is {key_cache.dtype} and value_cache {value_cache.dtype}; both must be the same one of "
            "float32, float16, bfloat16 or, with scales, int8, float8_e4m3fn"
        )
    if key_cache.device != value_cache.device:
        raise ValueError(f"key_cache is on {key_cache.device} and value_cache on {value_cache.device}")
    if key_cache.stride() != value_cache.stride() or key_cache.stride(3) != 1:
        raise ValueError(
            f"key_cache has strides {key_cache.stride()} and value_cache {value_cache.stride()}; they must be equal, "
            "with head_dim contiguous"
        )
    if min(key_cache.shape[1:]) < 1:
        raise ValueError(f"key_cache {shape_of(key_cache)}: block_size, kv_heads and head_dim must be at least 1")


def check_scales(scales: tuple[torch.Tensor, torch.Tensor] | None, cache: torch.Tensor) -> None:
    """A quantized cache comes with scales of keys and of values, float32 [num_blocks, kv_heads, block_size]; no other one does."""
    if (scales is not None) != (cache.dtype in CODE_DTYPES):
        raise ValueError(f"the cache is {cache.dtype}; scales go with int8 and float8_e4m3fn, and with these alone")
    if scales is None:
        return
    num_blocks, block_size, kv_heads, _ = cache.shape
    for name, scale in zip(("key", "value"), scales, strict=True):
        if scale.shape != (num_blocks, kv_heads, block_size) or scale.dtype != torch.float32:
            raise ValueError(
                f"the {name} scales are {scale.dtype} {shape_of(scale)}; they must be torch.float32 "
                f"[{num_blocks}, {kv_heads}, {block_size}]"
            )
        if scale.device != cache.device or not scale.is_contiguous():
            raise ValueError(
                f"the {name} scales have strides {scale.stride()} on {scale.device}; they must be contiguous, on {cache.device}"
            )


def check_like_cache(name: str, tensor: torch.Tensor, cache: torch.Tensor) -> None:
    """dtype and device of `tensor` are the cache's (any floating dtype where that holds codes), and its last dimension is contiguous."""
    if tensor.dtype != cache.dtype and (cache.dtype not in CODE_DTYPES or tensor.dtype not in FLOAT_DTYPES):
        raise ValueError(f"{name} is {tensor.dtype}, but the cache is {cache.dtype}")
    if tensor.device != cache.device:
        raise ValueError(f"{name} is on {tensor.device}, but the cache is on {cache.device}")
    if tensor.stride(-1) != 1:
        raise ValueError(f"{name} has strides {tensor.stride()}; its last dimension must be contiguous")


def check_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    num_rows: int,
    scale: float,
    window: int | None,
    out: torch.Tensor | None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """What paged_decode and paged_prefill demand alike."""
    check_caches(key_cache, value_cache)
    check_scales(scales, key_cache)
    _, _, kv_heads, head_dim = key_cache.shape
    if query.dim() != 3 or query.shape[2] != head_dim or query.shape[1] < 1 or query.shape[1] % kv_heads != 0:
        raise ValueError(
            f"query has shape {shape_of(query)}; it must be [tokens, heads, {head_dim}] with heads a multiple of the cache's {kv_heads}"
        )
    check_like_cache("query", query, key_cache)
    if block_tables.dim() not in (2, 3) or block_tables.shape[0] != num_rows:
        raise ValueError(
            f"block_tables has shape {shape_of(block_tables)}; it must be [{num_rows}, width] or [{num_rows}, {kv_heads}, width]"
        )
    if block_tables.dim() == 3 and block_tables.shape[1] != kv_heads:
        raise ValueError(
            f"block_tables has shape {shape_of(block_tables)}; a table per KV head needs [{num_rows}, {kv_heads}, width]"
        )
    if block_tables.dtype != torch.int32 or block_tables.device != query.device:
        raise ValueError(
            f"block_tables is {block_tables.dtype} on {block_tables.device}; it must be torch.int32 on {query.device}"
        )
    if block_tables.shape[-1] > 1 and block_tables.stride(-1) != 1:
        raise ValueError(f"block_tables has strides {block_tables.stride()}; its last dimension must be contiguous")
    check_integers("context_lens", context_lens, torch.int32, num_rows, query.device)
    if not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
        raise ValueError(f"scale is {scale}; it must be above 0 and finite, from {SMALLEST_SCALE} to {LARGEST_SCALE}")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1, or None for no window")
    if out is not None:
        if out.shape != query.shape:
            raise ValueError(f"out has shape {shape_of(out)}; it must be the query's, {shape_of(query)}")
        check_like_cache("out", out, key_cache)
        if out.dtype != query.dtype:
            raise ValueError(f"out is {out.dtype}, but the query is {query.dtype}")

"""linear and gated_linear for one row and for few: one program per tile of outputs, which reads its rows of the weight from end to end.

With few rows a product is bound by reading the weight, so all that matters is that every multiprocessor keeps enough of it in flight,
and that nothing else costs a pass of its own: the norm's weight multiplies x on its way in, the norm's quotient (one number) the sums
on their way out; bias, gate and residual follow. For more rows torch's product is the faster one, except where it is added to a residual.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import torch
import triton
import triton.language as tl

from minipaged.kernels.attention.triton_tiles import must_upcast
from minipaged.kernels.dependent_launch import dependent_launch, wait_for_previous
from minipaged.kernels.launch_table import FEW_ROWS, FEW_ROWS_OUTPUTS, LinearLaunch, one_row_launch


@triton.jit
def _load_weight(
    weight_ptr,
    column,
    k,
    n_size,
    k_size,
    stride_weight,
    WHOLE_N: tl.constexpr,
    WHOLE_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """[COLUMNS, DEPTH] of the weight: it is read once, so it need not stay in the cache."""
    pointers = weight_ptr + column.to(tl.int64)[:, None] * stride_weight + k[None, :]
    if WHOLE_N and WHOLE_K:
        tile = tl.load(pointers, eviction_policy="evict_first")
    else:
        mask = (column < n_size)[:, None] & (k < k_size)[None, :]
        tile = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _one_row_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    eps,
    n_size,  # outputs; with GATED the gate's, the weight has twice as many rows
    k_size,
    stride_weight,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE_N: tl.constexpr,
    WHOLE_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The product as a multiply-and-sum. Each tile of the weight is on its way while the one before it is used; the first one even
    while the kernel before this one still runs, since weights wait for nobody.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    up_ptr = weight_ptr + n_size.to(tl.int64) * stride_weight
    weight = _load_weight(weight_ptr, column, depth, n_size, k_size, stride_weight, WHOLE_N, WHOLE_K, False)
    up = weight
    if GATED:
        up = _load_weight(up_ptr, column, depth, n_size, k_size, stride_weight, WHOLE_N, WHOLE_K, False)
    wait_for_previous(DEPENDENT)
    sums = tl.zeros([COLUMNS, DEPTH], tl.float32)  # added up once, at the end
    up_sums = tl.zeros([COLUMNS, DEPTH], tl.float32)
    squares = tl.zeros([DEPTH], tl.float32)
    for start in tl.range(0, k_size, DEPTH, num_stages=1):
        k = start + depth
        following = k + DEPTH
        next_weight = _load_weight(weight_ptr, column, following, n_size, k_size, stride_weight, WHOLE_N, False, False)
        next_up = next_weight
        if GATED:
            next_up = _load_weight(up_ptr, column, following, n_size, k_size, stride_weight, WHOLE_N, False, False)
        x = tl.load(x_ptr + k, mask=k < k_size, other=0.0)
        if HAS_NORM:
            wide = x.to(tl.float32)
            squares += wide * wide
            wide_x = (wide * tl.load(norm_ptr + k, mask=k < k_size, other=0.0).to(tl.float32))[None, :]
        else:
            wide_x = x.to(tl.float32)[None, :]
        sums += weight.to(tl.float32) * wide_x
        if GATED:
            up_sums += up.to(tl.float32) * wide_x
        weight = next_weight
        up = next_up
    result = tl.sum(sums, 1)
    up_result = result
    if GATED:
        up_result = tl.sum(up_sums, 1)
    if HAS_NORM:
        quotient = tl.rsqrt(tl.sum(squares, 0) / k_size + eps)
        result = result * quotient
        up_result = up_result * quotient
    mask = column < n_size
    if HAS_BIAS:
        result += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            up_result += tl.load(bias_ptr + n_size + column, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        result = result / (1.0 + tl.exp(-result)) * up_result
    if HAS_RESIDUAL:
        result += tl.load(residual_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + column, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    num_rows,
    n_size,
    k_size,
    stride_x,
    stride_weight,
    stride_out,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE_N: tl.constexpr,
    WHOLE_K: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The product by tensor cores, rows padded to what a dot takes; out's rows are the residual's, if there is one."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    wide_row = row.to(tl.int64)[:, None]
    wait_for_previous(DEPENDENT)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, k_size, DEPTH, num_stages=STAGES):
        k = start + tl.arange(0, DEPTH)
        weight = _load_weight(weight_ptr, column, k, n_size, k_size, stride_weight, WHOLE_N, WHOLE_K, UPCAST)
        mask = (row < num_rows)[:, None] & (k < k_size)[None, :]
        x = tl.load(x_ptr + wide_row * stride_x + k[None, :], mask=mask, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
        sums = tl.dot(x, tl.trans(weight), sums, input_precision="ieee")
    mask = (row < num_rows)[:, None] & (column < n_size)[None, :]
    at = wide_row * stride_out + column[None, :]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + column, mask=column < n_size, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        sums += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, sums.to(out_ptr.dtype.element_ty), mask=mask)


def takes_one_row(x: torch.Tensor) -> bool:
    """Whether a product, whatever stands around it, is the one-row kernel's. float32 is there for exactness: torch's."""
    return x.shape[0] == 1 and x.element_size() == 2


def takes_few_rows(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> bool:
    """Whether a product into a residual is the few-rows kernel's: where it was measured to be faster than torch's (kernels/README.md)."""
    few = 1 < x.shape[0] <= FEW_ROWS.rows and x.element_size() == 2
    return few and residual is not None and weight.shape[0] <= FEW_ROWS_OUTPUTS


def one_row_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    launch: LinearLaunch | None = None,
) -> torch.Tensor:
    """See linear and gated_linear; x is [1, inputs]. `launch` overrides the launch table."""
    n_size, k_size = weight.shape[0] // (2 if gated else 1), x.shape[1]
    out = x.new_empty(1, n_size) if residual is None else residual
    launch = launch or one_row_launch(n_size, gated)
    _one_row_kernel[(triton.cdiv(n_size, launch.columns),)](
        out,
        x,
        weight,
        bias if bias is not None else x,
        norm if norm is not None else x,
        out,
        eps,
        n_size,
        k_size,
        weight.stride(0),
        GATED=gated,
        HAS_BIAS=bias is not None,
        HAS_NORM=norm is not None,
        HAS_RESIDUAL=residual is not None,
        COLUMNS=launch.columns,
        DEPTH=launch.depth,
        WHOLE_N=n_size % launch.columns == 0,
        WHOLE_K=k_size % launch.depth == 0,
        num_warps=launch.num_warps,
        **dependent_launch(x.device),
    )
    return out


def few_rows_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    launch: LinearLaunch = FEW_ROWS,
) -> torch.Tensor:
    """See minipaged.kernels.linear.matmul; any number of rows, but it pays for few. `launch` overrides the launch table."""
    num_rows, k_size = x.shape
    n_size = weight.shape[0]
    out = x.new_empty(num_rows, n_size) if residual is None else residual
    if out.numel() == 0:
        return out
    _few_rows_kernel[(triton.cdiv(n_size, launch.columns), triton.cdiv(num_rows, launch.rows))](
        out,
        x,
        weight,
        bias if bias is not None else x,
        out,
        num_rows,
        n_size,
        k_size,
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ROWS=launch.rows,
        COLUMNS=launch.columns,
        DEPTH=launch.depth,
        WHOLE_N=n_size % launch.columns == 0,
        WHOLE_K=k_size % launch.depth == 0,
        STAGES=launch.num_stages,
        UPCAST=must_upcast(x),
        num_warps=launch.num_warps,
        **dependent_launch(x.device),
    )
    return out

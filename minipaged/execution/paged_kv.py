"""The tensors that hold keys and values: written and read by attention, and moved block by block (copy, swap out, swap in).

The store is a named list of per-block tensors. Copies and swaps act on all of them alike; `write`, `rope_write` and `attend` are the only
ones that say which tensor is what, and in the engine nobody else calls the kernels that store keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minipaged.config import ModelConfig
from minipaged.execution.step_inputs import StepInputs
from minipaged.kernels.attention import paged_decode, paged_prefill
from minipaged.kernels.attention.heavy_hitters import Budget, Marks, keep_heaviest
from minipaged.kernels.attention.sinks import Sinks
from minipaged.kernels.cache import copy_blocks, rope_write_kv, write_kv
from minipaged.kernels.cache.quantize import LARGEST_CODE, Scales
from minipaged.memory.retention import KEEP_ALL, Retention
from minipaged.model.llama import Layer, angle_rows
from minipaged.scheduling.plan import Pairs


class PagedKV:
    """Keys and values of every layer, on the device and, for swapping, on the host.

    Keys and values are [num_blocks, block_size, num_kv_heads, head_dim] each; a token's slot is block * block_size + offset. A step's
    keys and values are written before anyone attends, layer by layer, so a sequence may attend to blocks that another sequence of the
    same step fills. dtype: of what is written and attends; kept_as: what the cache keeps of it, as CacheConfig.kv_dtype names it: a
    floating dtype, which must be that one, or int8 or float8_e4m3fn codes with scales.

    The scales are two tensors more of each layer, float32 [num_blocks, num_kv_heads, block_size]. All that touches them:

    - `__init__` makes them; `copy`, `swap_out` and `swap_in` move them with the codes, as any tensor of a block, and
      `minipaged/execution/disk_tier.py` `DiskTier` keeps them with it on disk.
    - `write` and `rope_write` fill them: `kernels/cache/cache_write.py` `write_kv_torch`, on a GPU
      `kernels/cache/cache_write_triton.py` `_write_kernel` and `kernels/cache/rope_write_triton.py` `_rope_write_kernel`. What a scale is
      says `kernels/cache/quantize.py` `quantize`, for Triton `kernels/cache/quantize_triton.py` `scale_of`.
    - `attend` multiplies by them: `kernels/attention/decode.py` `gather_pages` in the torch twins; on a GPU
      `kernels/attention/decode_tile.py` `attend_tile` or `kernels/attention/decode_codes.py` `attend_codes` while decoding, in a prefill
      `kernels/attention/prefill_loops.py` `attend_in_turn` and `attend_overlapped`, or `kernels/cache/dequantize.py` `dequantize_pages`
      before it.
    - `kernels/checks.py` `check_scales` refuses what does not fit; `minipaged/config.py` `ModelConfig.kv_bytes_per_token` counts them.

    Heavy hitters have two tensors more of each layer, of the same shape: the score and the position of the token in each slot
    (kernels/attention/heavy_hitters.py); `attend` fills them.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        *,
        num_host_blocks: int = 0,
        dtype: torch.dtype = torch.float32,
        kept_as: str | None = None,
        device: torch.device | str = "cpu",
        retention: Retention = KEEP_ALL,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = torch.device(device)
        self.softmax_scale = config.head_dim**-0.5  # of attention scores
        # Tokens that a query of each layer sees: by the model's own window or the policy's, whichever is the smaller.
        windows = [(config.window_of(layer), retention.window) for layer in range(config.num_layers)]
        self.windows = [min((w for w in pair if w is not None), default=None) for pair in windows]
        self.retention = retention
        self._unrotated = config.unrotated_layers
        half = config.head_dim // 2
        self._no_turn = torch.cat((torch.ones(1, half), torch.zeros(1, half)), dim=1).to(self.device)
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)
        kept = dtype if kept_as is None else getattr(torch, kept_as)
        kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"key": (shape[1:], kept), "value": (shape[1:], kept)}
        if kept in LARGEST_CODE:
            scales = (config.num_kv_heads, block_size), torch.float32
            kinds |= {"key_scale": scales, "value_scale": scales}
        if retention.heavy:
            mark = (config.num_kv_heads, block_size)
            kinds |= {"score": (mark, torch.float32), "position": (mark, torch.int32)}
        layers = range(config.num_layers)
        blocks = {f"{kind}.{layer}": block for layer in layers for kind, block in kinds.items()}  # of each tensor
        self.tensors = {
            name: torch.zeros((num_blocks, *block), dtype=dtype, device=self.device)
            for name, (block, dtype) in blocks.items()
        }
        self.keys = [self.tensors[f"key.{i}"] for i in layers]
        self.values = [self.tensors[f"value.{i}"] for i in layers]
        self.scales: list[Scales | None] = [
            (self.tensors[f"key_scale.{i}"], self.tensors[f"value_scale.{i}"]) if "key_scale" in kinds else None
            for i in layers
        ]
        self.marks = (
            [Marks(self.tensors[f"score.{i}"], self.tensors[f"position.{i}"]) for i in layers]
            if retention.heavy
            else []
        )
        pinned = self.device.type == "cuda"
        self.host = {
            name: torch.zeros((num_host_blocks, *block), dtype=dtype, pin_memory=pinned)
            for name, (block, dtype) in (blocks.items() if num_host_blocks else ())
        }

    def write(self, layer: int, key: Tensor, value: Tensor, inputs: StepInputs) -> None:
        """Put each token's key and value, [tokens, kv_heads, head_dim], into its slot; the key comes rotated."""
        # The layers' tensors differ in their numbers alone, so the first layer's are checked for all of a step; as in `attend`.
        where = (self.keys[layer], self.values[layer], inputs.slot_mapping)
        write_kv(key, value, *where, scales=self.scales[layer], check=layer == 0)

    def rope_write(self, layer: Layer, heads: Tensor, inputs: StepInputs, angles: Tensor) -> Tensor:
        """`write` for heads as projected, [tokens, heads + 2 kv_heads, head_dim], in one pass with what comes before it.

        Norms (where the layer does) and rotates queries and keys, the queries in place. angles: of llama.angle_table. Returns the queries,
        [tokens, heads, head_dim].
        """
        query, key, value = layer.split(heads)
        where = (self.keys[layer.index], self.values[layer.index], inputs.slot_mapping)
        scales = self.scales[layer.index]
        rope_write_kv(
            query, key, value, inputs.positions, layer.angles(angles), *where, scales=scales, **layer.head_norms()
        )
        return query

    def with_sinks(self, inputs: StepInputs, frequencies: Tensor) -> StepInputs:
        """A step's inputs, with what turns its queries for the sinks: from positions in the text to those within the cache."""
        last = self.retention.sinks + (self.retention.window or 0) - 1
        positions = inputs.positions
        return inputs._replace(sink_turn=angle_rows(frequencies, positions.clamp(max=last) - positions))

    def _sinks(self, layer: int, turn: Tensor) -> Sinks:
        # A layer without rope knows no distances: its queries stay as they are.
        return Sinks(self.retention.sinks, self._no_turn.expand_as(turn) if layer in self._unrotated else turn)

    def attend(self, layer: int, query: Tensor, inputs: StepInputs) -> Tensor:
        """Attention of the step's tokens over their block tables; the step's own keys and values are written already.

        query: [tokens, heads, head_dim], as is what is returned. Decodes and chunks have a kernel each. With heavy hitters, what has been
        attended to least goes afterwards.
        """
        out = self._attend(layer, query, inputs)
        if self.marks:
            self._keep_heaviest(layer, query, inputs)
        return out

    def _keep_heaviest(self, layer: int, query: Tensor, inputs: StepInputs) -> None:
        """Add the step's attention to the scores, and let go of what is beyond the budget."""
        cache = (self.keys[layer], self.values[layer], self.marks[layer])
        budget, decodes = Budget(self.retention.heavy, self.retention.recent), len(inputs.decode_lengths)
        positions, drawn_from = inputs.positions, inputs.drawn_from
        if decodes:
            keep_heaviest(
                *(query[:decodes], *cache, inputs.decode_tables, inputs.decode_lengths, None, positions[:decodes]),
                *(None if drawn_from is None else drawn_from[:decodes], budget, self.softmax_scale),
                scales=self.scales[layer],
                check=layer == 0,
            )
        if len(inputs.chunk_lengths):
            keep_heaviest(
                *(query, *cache, inputs.chunk_tables, inputs.chunk_lengths, inputs.chunk_starts, positions),
                *(None if drawn_from is None else drawn_from[decodes:], budget, self.softmax_scale),
                scales=self.scales[layer],
                check=layer == 0,
            )

    def _attend(self, layer: int, query: Tensor, inputs: StepInputs) -> Tensor:
        keys, values, scales, decodes = (
            self.keys[layer],
            self.values[layer],
            self.scales[layer],
            len(inputs.decode_lengths),
        )
        window, sinks = self.windows[layer], None
        if inputs.sink_turn is not None:
            sinks = self._sinks(layer, inputs.sink_turn)
        rows = (inputs.decode_tables, inputs.decode_lengths, self.softmax_scale)
        if not len(inputs.chunk_lengths):
            shared = inputs.shared if window is None else None
            return paged_decode(
                *(query, keys, values, *rows),
                scales=scales,
                window=window,
                sinks=sinks,
                shared=shared,
                check=layer == 0,
            )
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        if decodes:
            # In a graph some of these rows are padding. They get zeros; where they are a chunk's tokens, the next kernel writes over them.
            for_decodes = None if sinks is None else sinks._replace(turn=sinks.turn[:decodes])
            paged_decode(
                *(query[:decodes], keys, values, *rows),
                scales=scales,
                window=window,
                sinks=for_decodes,
                out=out[:decodes],
                check=layer == 0,
            )
        chunks = (
            inputs.chunk_tables,
            inputs.chunk_lengths,
            inputs.chunk_starts,
            inputs.longest_chunk,
            self.softmax_scale,
        )
        return paged_prefill(query, keys, values, *chunks, scales=scales, window=window, sinks=sinks, out=out)

    def copy(self, pairs: Pairs) -> None:
        """Copy blocks on the device, in every tensor. pairs: (source, destination); no destination is another pair's source."""
        if pairs:
            copy_blocks(list(self.tensors.values()), torch.tensor(pairs, dtype=torch.int64))

    def swap_out(self, pairs: Pairs) -> None:
        """Copy blocks to the host, in every tensor. pairs: (device, host)."""
        if pairs:
            self._move(self.tensors, self.host, pairs)

    def swap_in(self, pairs: Pairs) -> None:
        """Copy blocks to the device, in every tensor. pairs: (host, device)."""
        if pairs:
            self._move(self.host, self.tensors, pairs)

    @staticmethod
    def _move(sources: dict[str, Tensor], targets: dict[str, Tensor], pairs: Pairs) -> None:
        for name, source in sources.items():
            target = targets[name]
            # One after the other on the same stream, so in the order in which the runner asks, and before its kernels.
            for i, j in pairs:
                target[j].copy_(source[i], non_blocking=True)

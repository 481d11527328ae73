"""The tensors that hold keys and values: written and read by attention, and moved block by block (copy, swap out, swap in).

The store is a named list of per-block tensors. Copies and swaps act on all of them alike; `write`, `rope_write` and `attend` are the only
ones that say which tensor is what. So the scales of a quantized KV are one more name here and one more argument of the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minipaged.config import ModelConfig
from minipaged.execution.step_inputs import StepInputs
from minipaged.kernels.attention import paged_decode, paged_prefill
from minipaged.kernels.attention.sinks import Sinks
from minipaged.kernels.cache import copy_blocks, rope_write_kv, write_kv
from minipaged.memory.retention import KEEP_ALL, Retention
from minipaged.model.llama import Layer, angle_rows
from minipaged.scheduling.plan import Pairs


class PagedKV:
    """Keys and values of every layer, on the device and, for swapping, on the host.

    Each tensor is [num_blocks, block_size, num_kv_heads, head_dim]; a token's slot is block * block_size + offset. A step's keys and
    values are written before anyone attends, layer by layer, so a sequence may attend to blocks that another sequence of the same step
    fills.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        *,
        num_host_blocks: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        retention: Retention = KEEP_ALL,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = torch.device(device)
        self.scale = config.head_dim**-0.5  # of attention scores
        # Tokens that a query of each layer sees: by the model's own window or the policy's, whichever is the smaller.
        windows = [(config.window_of(layer), retention.window) for layer in range(config.num_layers)]
        self.windows = [min((w for w in pair if w is not None), default=None) for pair in windows]
        self.retention = retention
        self._unrotated = config.unrotated_layers
        half = config.head_dim // 2
        self._no_turn = torch.cat((torch.ones(1, half), torch.zeros(1, half)), dim=1).to(self.device)
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)
        names = [f"{kind}.{layer}" for layer in range(config.num_layers) for kind in ("key", "value")]
        self.tensors = {name: torch.zeros(shape, dtype=dtype, device=self.device) for name in names}
        self.keys = [self.tensors[f"key.{i}"] for i in range(config.num_layers)]
        self.values = [self.tensors[f"value.{i}"] for i in range(config.num_layers)]
        pinned = self.device.type == "cuda"
        host_shape = (num_host_blocks, *shape[1:])
        self.host = {
            name: torch.zeros(host_shape, dtype=dtype, pin_memory=pinned) for name in (names if num_host_blocks else ())
        }

    def write(self, layer: int, key: Tensor, value: Tensor, inputs: StepInputs) -> None:
        """Put each token's key and value, [tokens, kv_heads, head_dim], into its slot; the key comes rotated."""
        # The layers' tensors differ in their numbers alone, so the first layer's are checked for all of a step; as in `attend`.
        write_kv(key, value, self.keys[layer], self.values[layer], inputs.slot_mapping, check=layer == 0)

    def rope_write(self, layer: Layer, heads: Tensor, inputs: StepInputs, angles: Tensor) -> Tensor:
        """`write` for heads as projected, [tokens, heads + 2 kv_heads, head_dim], in one pass with what comes before it.

        Norms (where the layer does) and rotates queries and keys, the queries in place. angles: of llama.angle_table. Returns the queries,
        [tokens, heads, head_dim].
        """
        query, key, value = layer.split(heads)
        where = (self.keys[layer.index], self.values[layer.index], inputs.slot_mapping)
        rope_write_kv(query, key, value, inputs.positions, layer.angles(angles), *where, **layer.head_norms())
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

        query: [tokens, heads, head_dim], as is what is returned. Decodes and chunks have a kernel each.
        """
        keys, values, window = self.keys[layer], self.values[layer], self.windows[layer]
        decodes, sinks = len(inputs.decode_lengths), None
        if inputs.sink_turn is not None:
            sinks = self._sinks(layer, inputs.sink_turn)
        rows = (inputs.decode_tables, inputs.decode_lengths, self.scale)
        if not len(inputs.chunk_lengths):
            return paged_decode(query, keys, values, *rows, window=window, sinks=sinks, check=layer == 0)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        if decodes:
            # In a graph some of these rows are padding. They get zeros; where they are a chunk's tokens, the next kernel writes over them.
            for_decodes = None if sinks is None else sinks._replace(turn=sinks.turn[:decodes])
            paged_decode(
                *(query[:decodes], keys, values, *rows),
                window=window,
                sinks=for_decodes,
                out=out[:decodes],
                check=layer == 0,
            )
        chunks = (inputs.chunk_tables, inputs.chunk_lengths, inputs.chunk_starts, inputs.longest_chunk, self.scale)
        return paged_prefill(query, keys, values, *chunks, window=window, sinks=sinks, out=out)

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

"""The network, once: a LLaMA-style decoder whose flags cover every family of ModelConfig.

The arithmetic of a step over a flat list of tokens, from ids to logits. Where keys and values are kept, which sequence a token belongs
to and how attention is done is the caller's: it passes a function, so the same layers run over pages, over a dense cache, or over no
cache at all. Inference only.

Rounding follows transformers (norms and rotary angles in float32, cast back before they are applied), so that outputs can be compared
with it. Below, T is the number of tokens in the step, H the query heads, KH the KV heads, D the head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from minipaged.config import ModelConfig, RopeDivisors, RopeScaling
from minipaged.model.linear import Dense, Linear, Packed, RMSNorm, empty_parameter
from minipaged.model.streaming import LayerStream

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attention(layer, query [T, H, D], key [T, KH, D], value [T, KH, D]) -> [T, H, D].

Query and key come normed and rotated. All three are views whose last dimension is contiguous; the other strides are whatever the
projection left. It is the place that writes keys and values to the cache."""

RawAttention = Callable[["Layer", Tensor], Tensor]
"""attention(layer, heads [T, H + 2 KH, D]) -> [T, H, D]: the same for heads as projected, queries first, then keys, then values.

For those who norm and rotate while they write to the cache."""


class Vocabulary(Protocol):
    """The rows of embedding and head where several ranks share them (split.py)."""

    def embed(self, table: Tensor, token_ids: Tensor) -> Tensor:
        """Embeddings of any tokens, [T, hidden_size], for this rank's table [rows, hidden_size]."""
        ...

    def whole(self, logits: Tensor) -> Tensor:
        """Logits of the whole vocabulary, [R, vocab_size], for those of this rank, [R, rows]."""
        ...

    def most_likely(self, logits: Tensor) -> Tensor:
        """draw_tokens(whole(logits)) without gathering them: int64 [R]."""
        ...

    def draw(self, logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
        """draw_tokens(whole(logits), temperature, uniform) without gathering them: int64 [R]."""
        ...


INITIAL_STD = 0.02  # of drawn weights: `initializer_range` of every published config


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): each norm and sum rides on a matrix product."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        weight_device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.index = index
        self.rotates = index not in config.unrotated_layers
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        hidden, inner, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        query_size, qkv_size = self.num_heads * self.head_dim, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        linear = partial(Linear, dtype=dtype, device=device, weight_device=weight_device)
        self.attention_norm = RMSNorm(hidden, eps, dtype=dtype, device=device)
        self.qkv = linear(hidden, qkv_size, bias=config.attention_bias)
        self.query_norm = RMSNorm(self.head_dim, eps, dtype=dtype, device=device) if config.qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, eps, dtype=dtype, device=device) if config.qk_norm else None
        self.output = linear(query_size, hidden, bias=config.output_bias)
        self.mlp_norm = RMSNorm(hidden, eps, dtype=dtype, device=device)
        self.gate_up = linear(hidden, 2 * inner, bias=config.mlp_bias)
        self.down = linear(inner, hidden, bias=config.mlp_bias)

    def forward(self, hidden: Tensor, attention: RawAttention) -> Tensor:
        """The layer's output, [T, hidden_size]; `hidden` may be changed in place and returned."""
        heads = self.qkv(hidden, norm=self.attention_norm).view(hidden.shape[0], -1, self.head_dim)
        # Where ranks share the layer the sum is a new tensor, so it is what is returned that goes on.
        hidden = self.output(attention(self, heads).reshape(hidden.shape[0], -1), residual=hidden)
        after: Tensor = self.down(self.gate_up.gated(hidden, norm=self.mlp_norm), residual=hidden)
        return after

    def split(self, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the queries, keys and values."""
        query, key, value = heads.split_with_sizes((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        return query, key, value

    def head_norms(self) -> dict[str, Any]:
        """The norms of single heads, as rope_write_kv takes them; nothing where the model has none."""
        if self.query_norm is None or self.key_norm is None:
            return {}
        return {
            "query_norm": self.query_norm.weight,
            "key_norm": self.key_norm.weight,
            "eps": self.query_norm.eps,
        }

    def rotated(self, heads: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`split`, with queries and keys normed (where the model does) and rotated: what rope_write_kv does on its way."""
        query_key, value = heads.tensor_split((self.num_heads + self.num_kv_heads,), dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = query_key.tensor_split((self.num_heads,), dim=1)
            query_key = torch.cat((self.query_norm(query), self.key_norm(key)), dim=1)
        turned = rotate(query_key, cos, sin) if self.rotates else query_key
        query, key = turned.tensor_split((self.num_heads,), dim=1)
        return query, key, value

    def angles(self, table: Tensor) -> Tensor:
        """The angle table for rope_write_kv; a layer without rope reads the row of position 0, which turns nothing, everywhere."""
        return table if self.rotates else table[:1].expand_as(table)


class Llama(nn.Module):
    """The decoder. Its parameters are empty until `slots()` is filled (loading/weights.py) or `random` draws them.

    embeds, draws: whether it begins with the embedding and ends with the head; a stage of a pipeline may do neither (split.py).
    weight_device: where the matrices of the products are made, if not on `device`: "meta" where each is to be given a format. streamed:
    layers that are made on the host; once they are filled, `stream_layers` says where they run.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        weight_device: torch.device | str | None = None,
        streamed: tuple[int, ...] = (),
        embeds: bool = True,
        draws: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.draws = draws
        reads_table = embeds or (draws and config.tie_embeddings)
        table_device = device if reads_table else "meta"
        self.embedding = empty_parameter(config.vocab_size, config.hidden_size, dtype=dtype, device=table_device)
        layers = nn.ModuleList(
            Layer(config, i, dtype=dtype, device="cpu" if i in streamed else device, weight_device=weight_device)
            for i in range(config.num_layers)
        )
        self.streamed, self.stream = streamed, cast("LayerStream | None", None)
        self.layers = cast(list[Layer], layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        head_device = weight_device or device if draws and not config.tie_embeddings else "meta"
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, device=head_device)
        if config.tie_embeddings:
            self.head.format = Dense(self.embedding)
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, config.rotary_dim)
        self.register_buffer("frequencies", frequencies.to(device), persistent=False)
        self.frequencies: Tensor
        self.split: Vocabulary | None = None  # the vocabulary is shared by ranks

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: Attention, received: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the last norm, [T, hidden_size], for token_ids and positions, integers [T] (or whole numbers in
        float64, in which their angles are computed then).

        received: in place of the embeddings, what the stage before gives. A stage that does not draw gives on what is before the norm.
        """
        cos, sin = rope_angles(self.frequencies, positions, self.dtype)

        def rotated_first(layer: Layer, heads: Tensor) -> Tensor:
            return attention(layer.index, *layer.rotated(heads, cos, sin))

        if received is not None:
            embedded = received
        elif self.split is not None:
            embedded = self.split.embed(self.embedding, token_ids)
        else:
            embedded = functional.embedding(token_ids, self.embedding)
        hidden = self.run_layers(embedded, rotated_first)
        return self.norm(hidden) if self.draws else hidden

    def run_layers(self, hidden: Tensor, attention: RawAttention) -> Tensor:
        """Hidden states before the last norm, for those after the embedding: [T, hidden_size], which may be changed in place."""
        stream = self.stream
        if stream is None:
            for layer in self.layers:
                hidden = layer(hidden, attention)
            return hidden
        stream.begin()
        for layer in self.layers:
            stream.before(layer.index)
            hidden = layer(hidden, attention)
            stream.after(layer.index)
        stream.end()
        return hidden

    def stream_layers(self, device: torch.device) -> None:
        """The weights of `streamed` layers, which are filled, stay where they are from now on and visit the device when they are used."""
        if self.streamed:
            self.stream = LayerStream(self.layers, self.streamed, device)

    def weight_device(self, linear: Linear, device: torch.device | str) -> torch.device | str:
        """Where a Linear's weight is kept: on the device, or on the host if its layer is streamed."""
        held = any(linear is module for index in self.streamed for module in self.layers[index].modules())
        return "cpu" if held else device

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, float32 [R, vocab_size], for hidden states after the last norm, [R, hidden_size]."""
        scores = self.own_logits(hidden)
        return scores if self.split is None else self.split.whole(scores)

    def own_logits(self, hidden: Tensor) -> Tensor:
        """As `logits`, of the tokens whose rows this rank has."""
        scores: Tensor = self.head(hidden)
        return scores.float()

    def pack(self) -> Llama:
        """Rearrange the weights for this processor where that is known to help; afterwards `slots()` is of no use.

        Only a CPU with oneDNN is touched: there the plain layout of float32 leaves most of the memory bandwidth unused, and four-bit
        codes have a kernel of torch's for bfloat16.
        """
        onednn = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        if onednn and self.norm.weight.device.type == "cpu":
            # What oneDNN rearranges cannot be copied, so layers that are streamed stay plain.
            plain = {id(module) for index in self.streamed for module in self.layers[index].modules()}
            for module in self.modules():
                if isinstance(module, Linear) and (self.draws or module is not self.head) and id(module) not in plain:
                    module.pack()
        return self

    def slots(self) -> dict[str, Tensor]:
        """Where each weight belongs: Hugging Face's tensor name -> the view of a parameter to copy it into."""
        slots: dict[str, Tensor] = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm.weight}
        for layer in self.layers:
            slots.update(_layer_norm_slots(layer))
        for linear, pieces in self.linears():
            slots |= linear.slots(pieces)
        return slots

    def linears(self) -> Iterator[tuple[Linear, dict[str, int]]]:
        """Each Linear with a weight of its own, and the matrices that it holds one below the other: Hugging Face's name -> rows."""
        if self.draws and not self.config.tie_embeddings:
            yield self.head, {"lm_head": self.config.vocab_size}
        for layer in self.layers:
            query, kv = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
            inner = layer.down.in_features
            prefix = f"model.layers.{layer.index}."
            for linear, pieces in (
                (layer.qkv, {"self_attn.q_proj": query, "self_attn.k_proj": kv, "self_attn.v_proj": kv}),
                (layer.gate_up, {"mlp.gate_proj": inner, "mlp.up_proj": inner}),
                (layer.output, {"self_attn.o_proj": layer.output.out_features}),
                (layer.down, {"mlp.down_proj": layer.down.out_features}),
            ):
                yield linear, {prefix + name: rows for name, rows in pieces.items()}

    @staticmethod
    def random(
        config: ModelConfig,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | str,
        std: float = INITIAL_STD,
        *,
        packed: bool = False,
        streamed: tuple[int, ...] = (),
    ) -> Llama:
        """A model with weights drawn on `device` from `seed`: equal on a rerun, meaningless in what it says.

        packed: the layers' matrices are four-bit codes, the head is dense, as AWQ leaves it.
        """
        model = Llama(config, dtype=dtype, device=device, weight_device="meta" if packed else None, streamed=streamed)
        generator = torch.Generator(device=device).manual_seed(seed)
        if packed:
            for linear, _ in model.linears():
                if linear is model.head:
                    linear.format = linear.dense_on(device)
                else:
                    drawn = Packed.random(linear.out_features, linear.in_features, std, device, generator)
                    linear.format = drawn.to(model.weight_device(linear, device))
        for name, parameter in model.named_parameters():
            if not name.endswith((".words", ".scales")):
                _draw(name, parameter, std, generator)
        return model


def draw_parameters(
    parameters: Mapping[str, Tensor], seed: int, dtype: torch.dtype, device: torch.device | str, std: float
) -> Iterator[tuple[str, Tensor]]:
    """(name, values) of each of a model's parameters, as Llama.random draws them, one at a time: the model itself may have none."""
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in parameters.items():
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        _draw(name, values, std, generator)
        yield name, values


def _draw(name: str, values: Tensor, std: float, generator: torch.Generator) -> None:
    if name.endswith("norm.weight"):
        values.fill_(1.0)
    elif values.device != generator.device:  # of a layer that stays on the host: the same numbers all the same
        values.copy_(torch.empty_like(values, device=generator.device).normal_(0.0, std, generator=generator))
    else:
        values.normal_(0.0, std, generator=generator)


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | RopeDivisors | None, rotary_dim: int | None = None
) -> Tensor:
    """Radians a position for each pair of dimensions, float32 [head_dim / 2]: theta^(-2i / head_dim) (RoFormer, 3.2.2).

    If only `rotary_dim` dimensions of a head turn, theirs are the first pairs, and the others have the frequency 0. With Llama 3's
    scaling, wavelengths longer than the original context are stretched by `factor`, short ones are kept, and those between are blended.
    """
    turning = head_dim if rotary_dim is None else rotary_dim
    frequencies = 1.0 / (theta ** (torch.arange(0, turning, 2, dtype=torch.float32) / turning))
    if isinstance(scaling, RopeScaling):
        frequencies = _llama_3(frequencies, scaling)
    elif scaling is not None:
        frequencies = frequencies / torch.tensor(scaling.divisors, dtype=torch.float32)
    return functional.pad(frequencies, (0, (head_dim - turning) // 2))


def _llama_3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    longest = scaling.original_max_position / scaling.low_freq_factor
    shortest = scaling.original_max_position / scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    keep = (scaling.original_max_position / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - keep) * frequencies / scaling.factor + keep * frequencies
    stretched = torch.where(wavelengths > longest, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < shortest, frequencies, stretched)


def rope_angles(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of positions [T], each [T, 1, D], for `rotate`. Computed once a step, in float32; in float64 if `dtype` or
    the positions are, as those of a stream may be large."""
    wide = torch.promote_types(torch.promote_types(positions.dtype, torch.float32), dtype)
    angles = positions[:, None, None].to(wide) * frequencies.to(wide)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def angle_table(frequencies: Tensor, num_positions: int) -> Tensor:
    """Cosines, then sines, of the angles of positions 0, 1, ...: float32 [num_positions, D], for rope_write_kv."""
    if frequencies.is_meta:  # shapes alone: torch would import its compiler for an arange of nothing
        return frequencies.new_empty(num_positions, 2 * len(frequencies))
    angles = torch.arange(num_positions, device=frequencies.device, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def angle_rows(frequencies: Tensor, positions: Tensor) -> Tensor:
    """Cosines, then sines, of the angles of these positions: float32 [T, D], by way of float64, as a stream's positions are large."""
    angles = positions.double()[:, None] * frequencies.double()
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) of heads [T, N, D] by its angle: the half-split form of Hugging Face.

    Rolling by D/2 swaps the halves, and `sin` carries the minus sign of the first one.
    """
    return torch.addcmul(x * cos, torch.roll(x, x.shape[-1] // 2, dims=-1), sin)


def _layer_norm_slots(layer: Layer) -> dict[str, Tensor]:
    """The slots of one layer's norms."""
    slots: dict[str, Tensor] = {
        "input_layernorm.weight": layer.attention_norm.weight,
        "post_attention_layernorm.weight": layer.mlp_norm.weight,
    }
    if layer.query_norm is not None and layer.key_norm is not None:
        slots |= {"self_attn.q_norm.weight": layer.query_norm.weight, "self_attn.k_norm.weight": layer.key_norm.weight}
    return {f"model.layers.{layer.index}.{name}": slot for name, slot in slots.items()}

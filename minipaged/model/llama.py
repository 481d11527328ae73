"""The network, once: a LLaMA-style decoder whose flags cover Llama 1-3, SmolLM2, Mistral, Qwen 2.5 and Qwen 3.

Knows the arithmetic of a step over a flat list of tokens, from ids to logits. Does not know where keys and values are
kept, which sequence a token belongs to, or how attention is done: the caller's `attention` does that, so the same code
runs over pages, over a dense cache, or over no cache at all. Inference only.

Rounding follows transformers (norms and rotary angles in float32, cast back before they are applied), so that outputs
can be compared with it. Below, T is the number of tokens in the step, H the query heads, KH the KV heads, D the head
size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from minipaged.config import ModelConfig, RopeScaling

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attention(layer, query [T, H, D], key [T, KH, D], value [T, KH, D]) -> [T, H, D].

Query and key come rotated. All three are views whose last dimension is contiguous; the other strides are whatever the
projection left. It is the place that writes keys and values to the cache."""

INITIAL_STD = 0.02  # of drawn weights: `initializer_range` of every published config
PACK_ROWS = 8  # the batch that oneDNN's layout is chosen for; measured equally good from 1 to 1,000 rows


class Linear(nn.Module):
    """y = x W^T + b, with W [out_features, in_features]."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = _parameter(out_features, in_features, dtype=dtype, device=device)
        self.bias = _parameter(out_features, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.is_mkldnn:
            packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return packed
        return functional.linear(x, self.weight, self.bias)

    def pack(self) -> None:
        """Lay a float32 CPU weight out as oneDNN's matrix kernels read it: 2-4 times faster than the plain layout."""
        packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), PACK_ROWS)
        self.weight = nn.Parameter(packed, requires_grad=False)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = _parameter(size, dtype=dtype, device=device)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, index: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.index = index
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        hidden, inner, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        query_size, qkv_size = self.num_heads * self.head_dim, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.attention_norm = RMSNorm(hidden, eps, dtype=dtype, device=device)
        self.qkv = Linear(hidden, qkv_size, bias=config.attention_bias, dtype=dtype, device=device)
        self.query_norm = RMSNorm(self.head_dim, eps, dtype=dtype, device=device) if config.qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, eps, dtype=dtype, device=device) if config.qk_norm else None
        self.output = Linear(query_size, hidden, bias=config.output_bias, dtype=dtype, device=device)
        self.mlp_norm = RMSNorm(hidden, eps, dtype=dtype, device=device)
        self.gate_up = Linear(hidden, 2 * inner, bias=config.mlp_bias, dtype=dtype, device=device)
        self.down = Linear(inner, hidden, bias=config.mlp_bias, dtype=dtype, device=device)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        x = x + self.attend(self.attention_norm(x), cos, sin, attention)
        return x + self.mlp(self.mlp_norm(x))

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        heads = self.qkv(x).view(x.shape[0], -1, self.head_dim)  # [T, H + 2 KH, D]
        query_key, value = heads.tensor_split((self.num_heads + self.num_kv_heads,), dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = query_key.tensor_split((self.num_heads,), dim=1)
            query_key = torch.cat((self.query_norm(query), self.key_norm(key)), dim=1)
        query, key = rotate(query_key, cos, sin).tensor_split((self.num_heads,), dim=1)
        mixed: Tensor = self.output(attention(self.index, query, key, value).reshape(x.shape[0], -1))
        return mixed

    def mlp(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        down: Tensor = self.down(functional.silu(gate) * up)
        return down


class Llama(nn.Module):
    """The decoder. Its parameters are empty until `slots()` is filled (weights.py) or `random` draws them."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.embedding = _parameter(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        layers = nn.ModuleList(Layer(config, i, dtype=dtype, device=device) for i in range(config.num_layers))
        self.layers = cast(list[Layer], layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        head_device = "meta" if config.tie_embeddings else device
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, device=head_device)
        if config.tie_embeddings:
            self.head.weight = self.embedding
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self.register_buffer("frequencies", frequencies.to(device), persistent=False)
        self.frequencies: Tensor

    def forward(self, token_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Hidden states after the last norm, [T, hidden_size], for token_ids and positions, both int64 [T]."""
        x = functional.embedding(token_ids, self.embedding)
        cos, sin = rope_angles(self.frequencies, positions, self.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, attention)
        hidden: Tensor = self.norm(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, float32 [R, vocab_size], for hidden states [R, hidden_size]."""
        scores: Tensor = self.head(hidden)
        return scores.float()

    def pack(self) -> Llama:
        """Rearrange the weights for this processor where that is known to help; afterwards `slots()` is of no use.

        Only float32 on a CPU with oneDNN is touched: there the plain layout leaves most of the memory bandwidth unused.
        """
        onednn = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        if onednn and self.dtype == torch.float32 and self.embedding.device.type == "cpu":
            for module in self.modules():
                if isinstance(module, Linear):
                    module.pack()
        return self

    def slots(self) -> dict[str, Tensor]:
        """Where each weight belongs: Hugging Face's tensor name -> the view of a parameter to copy it into."""
        slots: dict[str, Tensor] = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm.weight}
        if not self.config.tie_embeddings:
            slots["lm_head.weight"] = self.head.weight
        for layer in self.layers:
            slots.update(_layer_slots(layer))
        return slots

    @staticmethod
    def random(
        config: ModelConfig, seed: int, dtype: torch.dtype, device: torch.device | str, std: float = INITIAL_STD
    ) -> Llama:
        """A model with weights drawn on `device` from `seed`: equal on a rerun, meaningless in what it says."""
        model = Llama(config, dtype=dtype, device=device)
        generator = torch.Generator(device=device).manual_seed(seed)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, std, generator=generator)
        return model


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians a position for each pair of dimensions, float32 [head_dim / 2]: theta^(-2i / head_dim) (RoFormer, 3.2.2).

    With Llama 3's scaling, wavelengths longer than the original context are stretched by `factor`, short ones are kept,
    and those between are blended.
    """
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if scaling is None:
        return frequencies
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
    """Cosines and signed sines of positions [T], each [T, 1, D], for `rotate`. Computed once a step, in float32."""
    angles = positions[:, None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) of heads [T, N, D] by its angle: the half-split form of Hugging Face.

    Rolling by D/2 swaps the halves, and `sin` carries the minus sign of the first one.
    """
    return torch.addcmul(x * cos, torch.roll(x, x.shape[-1] // 2, dims=-1), sin)


def _parameter(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def _layer_slots(layer: Layer) -> dict[str, Tensor]:
    """One layer's slots: the merged matrices are split into the pieces that checkpoints hold."""
    query, kv = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    inner = layer.down.in_features
    merged = (
        (layer.qkv, (("self_attn.q_proj", query), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv))),
        (layer.gate_up, (("mlp.gate_proj", inner), ("mlp.up_proj", inner))),
        (layer.output, (("self_attn.o_proj", layer.output.out_features),)),
        (layer.down, (("mlp.down_proj", layer.down.out_features),)),
    )
    slots: dict[str, Tensor] = {
        "input_layernorm.weight": layer.attention_norm.weight,
        "post_attention_layernorm.weight": layer.mlp_norm.weight,
    }
    if layer.query_norm is not None and layer.key_norm is not None:
        slots |= {"self_attn.q_norm.weight": layer.query_norm.weight, "self_attn.k_norm.weight": layer.key_norm.weight}
    for linear, pieces in merged:
        row = 0
        for name, rows in pieces:
            slots[f"{name}.weight"] = linear.weight[row : row + rows]
            if linear.bias is not None:
                slots[f"{name}.bias"] = linear.bias[row : row + rows]
            row += rows
    return {f"model.layers.{layer.index}.{name}": slot for name, slot in slots.items()}

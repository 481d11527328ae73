"""A language model small enough to read in one go. Its weights are random and it talks nonsense, but it is a real decoder: change one
key anywhere and the logits move.

Attention is a function that is passed in: attend(layer, q, k, v) -> out. Only that function knows where keys and values are kept, which
is what these lessons are about. (minipaged is built the same way: its runner passes the model a function over pages.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class TinyModel:
    """Token and position embeddings, then layers of attention and a small MLP, then logits. All in float32 on the CPU."""

    def __init__(
        self, *, vocab: int = 64, width: int = 64, heads: int = 4, layers: int = 2, longest: int = 512, seed: int = 0
    ) -> None:
        self.vocab, self.width, self.heads, self.layers, self.longest = vocab, width, heads, layers, longest
        self.head_dim = width // heads
        noise = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=noise) / math.sqrt(shape[0])

        self.token_embedding = random(vocab, width) * math.sqrt(vocab)
        self.position_embedding = random(longest, width) * math.sqrt(longest)
        self.qkv = [random(width, 3 * width) for _ in range(layers)]
        self.out = [random(width, width) for _ in range(layers)]
        self.up = [random(width, 4 * width) for _ in range(layers)]
        self.down = [random(4 * width, width) for _ in range(layers)]
        self.head = random(width, vocab)
        self.tokens_computed = 0  # counts the work: tokens that went through the layers

    def __call__(self, tokens: list[int], first_position: int, attend: Attend) -> Tensor:
        """Logits [len(tokens), vocab] for tokens that stand at positions first_position, first_position + 1, ..."""
        self.tokens_computed += len(tokens)
        positions = torch.arange(first_position, first_position + len(tokens))
        x = self.token_embedding[tokens] + self.position_embedding[positions]  # [tokens, width]
        for layer in range(self.layers):
            qkv = (norm(x) @ self.qkv[layer]).view(len(tokens), 3, self.heads, self.head_dim)
            q, k, v = qkv.unbind(1)
            attended = attend(layer, q, k, v)  # each [tokens, heads, head_dim]
            x = x + attended.flatten(1) @ self.out[layer]
            x = x + torch.relu(norm(x) @ self.up[layer]) @ self.down[layer]
        return norm(x) @ self.head


def norm(x: Tensor) -> Tensor:
    """Layer normalisation without parameters."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:])


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last len(q) tokens over all len(k) of them. q [n, heads, dim]; k, v [m, heads, dim], m >= n."""
    n, m = len(q), len(k)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    future = torch.ones(n, m).triu(m - n + 1).bool()  # query i stands at position m - n + i
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, float("-inf")).softmax(-1), v)

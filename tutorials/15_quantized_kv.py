# %% [markdown]
# # 15. Quantized KV
#
# *30 minutes. You need lessons 2 and 4.*
#
# ## Why
#
# A pool of so many bytes holds so many tokens, and every one of these bytes is read again for each new token.
# Half the bytes: twice the tokens, and half the reading. Keys and values need not be kept as exactly as they
# were computed. Eight bits are 256 steps; what matters is where the steps lie.
#
# ```
#  a head's key, 4 numbers        0.50   -1.00    0.02    0.25
#  the largest of them                    1.00                       scale = 1.00 / 127
#  codes, whole numbers             64    -127       3      32       each number / scale, rounded: one byte each
#  read back, code * scale        0.504  -1.00    0.024   0.252      off by half a scale at most
# ```
#
# A **code** is a small whole number, a **scale** says what a step of 1 is worth. The question is how many
# numbers should share a scale. Many: then one large number among them takes the steps away from all the
# others. Few: then the scales take room themselves. And one thing is special about a cache: it grows. If a
# block had one scale, a token that comes later, with larger numbers, would change it, and all that was written there
# before would have to be written anew.
#
# So: one scale for each token and each head, written once, together with the codes.
#
# ## The pain

# %%
from __future__ import annotations

import random

import torch
from torch import Tensor

from minipaged.learn.tiny_model import TinyModel, dense_attention

torch.set_num_threads(1)


def with_outlier() -> Tensor:
    """Keys of 64 tokens, 2 heads of 16 numbers; one token is far larger than the others, as it is in real models."""
    keys = torch.randn(64, 2, 16, generator=torch.Generator().manual_seed(0))
    keys[3] *= 50
    return keys


def the_pain() -> None:
    keys = with_outlier()
    step = keys.abs().max() / 127
    lost = ((keys / step).round() == 0).float().mean()
    print(f"one scale for all: the steps are {step:.3f} wide, and {100 * lost:.0f} % of the numbers become 0")
    own = keys.abs().amax(-1, keepdim=True) / 127
    lost = ((keys / own).round() == 0).float().mean()
    print(f"one for each token and head: {100 * lost:.1f} % of the numbers become 0\n")


if __name__ == "__main__":
    the_pain()

# %% [markdown]
# ## Task 1: `quantize`
#
# The picture, for any number of heads at once. For each head: the scale is its largest number, the sign
# left out, divided by 127. The codes are the numbers divided by the scale, rounded to the nearest.
#
# A head whose numbers are all 0 has the scale 0 and the codes 0. Take care of it: 0 / 0 is `NaN`, and which whole
# number that becomes depends on the machine.
#
# ```console
# $ python 15_quantized_kv.py
# NotImplementedError: lesson 15, task 1: quantize
# ```


# %%
def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of heads: [..., head_dim] -> int8 [..., head_dim] and float32 [...].

    >>> codes, scale = quantize(torch.tensor([0.50, -1.00, 0.02, 0.25]))
    >>> codes.tolist(), round(127 * scale.item(), 3)
    ([64, -127, 3, 32], 1.0)
    """
    raise NotImplementedError("lesson 15, task 1: quantize")


# %%
def test_1_shapes_and_kinds() -> None:
    codes, scales = quantize(torch.randn(5, 2, 8))
    assert (codes.shape, codes.dtype) == ((5, 2, 8), torch.int8)
    assert (scales.shape, scales.dtype) == ((5, 2), torch.float32)


def test_1_off_by_half_a_scale_at_most() -> None:
    for seed in range(50):
        noise = torch.Generator().manual_seed(seed)
        x = torch.randn(7, 3, 8, generator=noise) * 10.0 ** random.Random(seed).randint(-3, 3)
        codes, scales = quantize(x)
        back = codes.float() * scales[..., None]
        for head, kept, scale, again in zip(
            x.reshape(-1, 8), codes.reshape(-1, 8), scales.flatten(), back.reshape(-1, 8), strict=True
        ):
            i = int((head - again).abs().argmax())
            told = f"{head[i]:.4g} has the code {int(kept[i])} and the scale {scale:.4g}, and is read back as {again[i]:.4g}"
            assert abs(head[i] - again[i]) <= 0.501 * scale, f"off by more than half a scale: {told}"
            most = int(kept.int().abs().max())
            assert most == 127, f"the largest number of each head should have the code 127 or -127, and not {most}"


def test_1_each_token_and_head_has_a_scale_of_its_own() -> None:
    x = torch.randn(4, 2, 8)
    codes, scales = quantize(x)
    x[2, 1] *= 100
    again, _ = quantize(x)
    assert torch.equal(codes[:2], again[:2]), "a large token has changed another one's codes"
    assert torch.equal(codes[2, 0], again[2, 0]), "a large head has changed another one's codes"
    assert scales.unique().numel() == 8


def test_1_zeros_stay_zeros() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoCodeOfNaN(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.int8:
                given = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
                assert not any(bool(a.isnan().any()) for a in given), (
                    "NaN was made into a code: 0 / 0, where a head is all 0"
                )
            return out

    with NoCodeOfNaN():
        codes, scales = quantize(torch.zeros(2, 1, 4))
    assert not codes.any()
    assert scales.tolist() == [[0.0], [0.0]]


if __name__ == "__main__":
    test_1_shapes_and_kinds()
    test_1_off_by_half_a_scale_at_most()
    test_1_each_token_and_head_has_a_scale_of_its_own()
    test_1_zeros_stay_zeros()

# %% [markdown]
# ## Task 2: `QuantizedPages.write`
#
# Quantize the tokens, and store their codes and scales in the pool, by block and place: so everything that moves a
# block (copy-on-write, swap) moves both alike. `slots` are those of lesson 4, `block * block_size + place`, one for
# each token; there may be none. (The stub is below, next to that of task 3.)
#
# ## Task 3: `QuantizedPages.read`
#
# Lesson 5's gather, and each code times its scale. (A kernel does not make this tensor: it reads codes, and
# multiplies while it computes.)


# %%
class QuantizedPages:
    """One layer's keys, or its values, in eight bits."""

    def __init__(self, num_blocks: int, block_size: int, kv_heads: int, head_dim: int) -> None:
        self.block_size = block_size
        self.codes = torch.zeros(num_blocks, block_size, kv_heads, head_dim, dtype=torch.int8)
        self.scales = torch.full((num_blocks, block_size, kv_heads), float("nan"))  # nothing is written yet

    def write(self, slots: list[int], x: Tensor) -> None:
        """Keep tokens [len(slots), kv_heads, head_dim] in these slots.

        >>> pages = QuantizedPages(num_blocks=3, block_size=2, kv_heads=1, head_dim=2)
        >>> pages.write([5], torch.tensor([[[127.0, -3.0]]]))
        >>> pages.codes[2, 1].tolist(), pages.scales[2, 1].tolist()
        ([[127, -3]], [1.0])
        """
        raise NotImplementedError("lesson 15, task 2: QuantizedPages.write")

    def read(self, table: list[int], length: int) -> Tensor:
        """The first `length` tokens of a text side by side: float32 [length, kv_heads, head_dim].

        >>> pages = QuantizedPages(num_blocks=3, block_size=2, kv_heads=1, head_dim=2)
        >>> pages.codes[2, 0], pages.scales[2, 0] = torch.tensor([[4, -2]]), torch.tensor([0.5])
        >>> pages.read(table=[2], length=1).tolist()
        [[[2.0, -1.0]]]
        """
        raise NotImplementedError("lesson 15, task 3: QuantizedPages.read")


# %%
def test_2_codes_and_scales_lie_in_their_slots() -> None:
    pages, x = QuantizedPages(9, 4, 2, 8), torch.randn(3, 2, 8)
    pages.write([30, 5, 31], x)
    codes, scales = quantize(x)
    for i, (block, place) in enumerate(((7, 2), (1, 1), (7, 3))):
        assert torch.equal(pages.codes[block, place], codes[i])
        assert torch.equal(pages.scales[block, place], scales[i])
    assert int((~pages.scales.isnan()).sum()) == 3 * 2, "slots were written that were not named"
    pages.write([], x[:0])


def test_2_later_tokens_change_nothing() -> None:
    pages, x = QuantizedPages(9, 4, 2, 8), torch.randn(4, 2, 8)
    pages.write([4, 5], x[:2])
    codes, scales = pages.codes[1, :2].clone(), pages.scales[1, :2].clone()
    pages.write([6, 7], 100 * x[2:])
    assert torch.equal(pages.codes[1, :2], codes)
    assert torch.equal(pages.scales[1, :2], scales)


def test_3_reads_what_was_written() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        size, length = rng.choice([1, 3, 4, 16]), rng.randint(1, 40)
        table = rng.sample(range(1, 60), -(-length // size))
        pages, x = QuantizedPages(60, size, 2, 8), torch.randn(length, 2, 8)
        slots = [table[position // size] * size + position % size for position in range(length)]
        cut = rng.randint(0, length)
        pages.write(slots[:cut], x[:cut])
        pages.write(slots[cut:], x[cut:])
        out = pages.read(table, length)
        assert (out.shape, out.dtype) == (x.shape, torch.float32)
        wrong = ~((out - x).abs() <= 0.501 / 127 * x.abs().amax(-1, keepdim=True))
        if bool(wrong.any()):
            at, head, i = wrong.nonzero()[0].tolist()
            told = f"{x[at, head, i]:.4g} was written for number {i} of head {head} at position {at}, and "
            raise AssertionError(f"{told}{out[at, head, i]:.4g} was read; table {table}, blocks of {size}")


if __name__ == "__main__":
    test_2_codes_and_scales_lie_in_their_slots()
    test_2_later_tokens_change_nothing()
    test_3_reads_what_was_written()

# %% [markdown]
# ## Task 4: `bytes_per_token`
#
# What a token weighs now: over all layers, for keys and for values, each head's codes at one byte each, and its
# scale, four bytes. Lesson 2 counted the same without scales.


# %%
def bytes_per_token(layers: int, kv_heads: int, head_dim: int) -> int:
    """Bytes of one token's codes and scales.

    >>> bytes_per_token(layers=1, kv_heads=1, head_dim=16)
    40
    """
    raise NotImplementedError("lesson 15, task 4: bytes_per_token")


# %%
def test_4_codes_and_scales() -> None:
    assert bytes_per_token(30, 3, 64) == 12_240
    assert bytes_per_token(32, 8, 128) == 67_584


def test_4_the_pages_take_as_much() -> None:
    pages = QuantizedPages(10, 4, 3, 32)
    assert 2 * (pages.codes.nbytes + pages.scales.nbytes) == 40 * bytes_per_token(1, 3, 32)


if __name__ == "__main__":
    test_4_codes_and_scales()
    test_4_the_pages_take_as_much()

# %% [markdown]
# ## What was won
#
# Tokens that fit into a gibibyte. Then the error, first of the keys above: what the one large token does to the
# ordinary ones, with one scale for a block of 16 tokens and with your scales. Then that of a whole model's logits.
# An error is a price, and whoever pays it should have measured it.


# %%
def logits(model: TinyModel, tokens: list[int], *, quantized: bool) -> Tensor:
    """The logits of every token, computed one by one over a cache."""
    shape = (model.heads, model.head_dim)
    exact = [torch.zeros(2, 0, *shape) for _ in range(model.layers)]
    pages = [[QuantizedPages(20, 4, *shape) for _ in "kv"] for _ in range(model.layers)]
    table = random.Random(0).sample(range(1, 20), -(-len(tokens) // 4))
    rows = []
    for position, token in enumerate(tokens):

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, position: int = position) -> Tensor:
            if not quantized:
                exact[layer] = torch.cat([exact[layer], torch.stack([k, v])], 1)
                return dense_attention(q, *exact[layer])
            slot = table[position // 4] * 4 + position % 4
            for kept, x in zip(pages[layer], (k, v), strict=True):
                kept.write([slot], x)
            return dense_attention(q, *(kept.read(table, position + 1) for kept in pages[layer]))

        rows.append(model([token], position, attend))
    return torch.cat(rows)


def errors(tokens: list[int]) -> tuple[float, float]:
    """The largest difference of logits with and without quantization, and the spread of the logits themselves."""
    model = TinyModel()
    exact, about = (logits(model, tokens, quantized=q) for q in (False, True))
    return float((exact - about).abs().max()), float(exact.std())


def test_4_a_model_hardly_notices() -> None:
    error, spread = errors([t * t % 64 for t in range(40)])
    assert 0 < error < 0.1 * spread, f"logits are off by {error:.3f}, and their spread is {spread:.3f}"


def what_was_won() -> None:
    print("tokens in a GiB:                16 bits        8 bits")
    for name, layers, kv_heads, dim in (("SmolLM2 135M", 30, 3, 64), ("Llama 3 8B", 32, 8, 128)):
        kept = [2**30 // each for each in (4 * layers * kv_heads * dim, bytes_per_token(layers, kv_heads, dim))]
        print(f"{name:>22}: {kept[0]:>15,} {kept[1]:>13,}   {kept[1] / kept[0]:.2f} times as many")
    keys = with_outlier()
    ordinary = torch.arange(64) != 3
    blocks = keys.view(4, 16, 2, 16).abs().amax((1, 3), keepdim=True) / 127
    by_block = ((keys.view(4, 16, 2, 16) / blocks).round() * blocks).view_as(keys)
    codes, scales = quantize(keys)
    by_token = codes.float() * scales[..., None]
    print("\nmean error of the keys of ordinary tokens:")
    for name, about in (("a scale a block", by_block), ("a scale a token and head", by_token)):
        print(f"{name:>26}: {float((about - keys)[ordinary].abs().mean()):.5f}")
    error, spread = errors([t * t % 64 for t in range(60)])
    print(f"\nlogits of a tiny model: off by {error:.4f} at most; their spread is {spread:.3f}")


if __name__ == "__main__":
    test_4_a_model_hardly_notices()
    what_was_won()

# %% [markdown]
# ## What real engines do
#
# - **vLLM** keeps keys and values in eight bits (floating ones, fp8) with a scale for a whole layer, 1 if nobody has measured it
#   ([docs](https://docs.vllm.ai/en/latest/features/quantization/quantized_kvcache.html)).
# - **KIVI** goes to two bits: keys share scales along the channel, for their outliers stay in the same
#   channels, values along the token (Liu et al. 2024, [arXiv 2402.02750](https://arxiv.org/abs/2402.02750)).
#
# ## Where this lives in minipaged
#
# - `kernels/cache/quantize.py`: `quantize` and `dequantize`, for int8 and fp8.
# - `minipaged/execution/paged_kv.py`: `PagedKV` has the scales among its tensors, so copies and swaps move them too.
# - `minipaged/config.py`: `ModelConfig.kv_bytes_per_token`.

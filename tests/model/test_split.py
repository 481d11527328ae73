"""The parts of a model that ranks share, together, against the whole: every family, rank counts that replicate KV heads included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minipaged.errors import InputError
from minipaged.kernels.sampling import draw_tokens
from minipaged.model.linear import RMSNorm
from minipaged.model.llama import Llama
from minipaged.model.loading import zoo
from minipaged.model.loading.shapes import shape
from minipaged.model.loading.weights import Checkpoint, load_model, open_checkpoint
from minipaged.model.split import Part, SplitVocabulary, Summed
from tests.execution.thread_ranks import OneBuffer, ThreadCollectives, on_ranks
from tests.model.tiny import CONFIGS, dense_attention, dense_logits, drawn_tokens, save_folder

CPU: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def logits_of_ranks(
    checkpoint: Checkpoint, ranks: int, tokens: list[int], collectives: type[ThreadCollectives] = ThreadCollectives
) -> list[Tensor]:
    def one(part: Part, collectives: ThreadCollectives) -> Tensor:
        model = load_model(checkpoint, **CPU, part=part).pack()
        part.connect(model, checkpoint.config, collectives)
        return dense_logits(model, tokens)

    return on_ranks(ranks, one, collectives)


@pytest.mark.parametrize("family", ["gqa", "tied", "biased"])
def test_sums_may_lie_in_one_buffer(family: str, tmp_path: Path) -> None:
    save_folder(CONFIGS[family], tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    tokens = drawn_tokens(60, 97)
    expected = dense_logits(load_model(checkpoint, **CPU), tokens)
    for found in logits_of_ranks(checkpoint, 2, tokens, OneBuffer):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_two_ranks_have_the_logits_of_one(family: str, tmp_path: Path) -> None:
    save_folder(CONFIGS[family], tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    tokens = drawn_tokens(60, 97)
    expected = dense_logits(load_model(checkpoint, **CPU), tokens)
    first, second = logits_of_ranks(checkpoint, 2, tokens)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(first, second)  # bit for bit: each rank draws for itself


@pytest.mark.parametrize("family", ["mha", "mqa", "tied", "biased", "qwen 2.5 tied", "qwen 3 biased", "granite"])
def test_four_ranks_have_the_logits_of_one(family: str, tmp_path: Path) -> None:
    """Two KV heads, or one, are each on several ranks."""
    save_folder(CONFIGS[family], tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    tokens = drawn_tokens(60, 97)
    expected = dense_logits(load_model(checkpoint, **CPU), tokens)
    for found in logits_of_ranks(checkpoint, 4, tokens):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gqa", "tied", "smollm 3", "granite"])
@pytest.mark.parametrize("stages", [2, 3])
def test_stages_one_after_the_other_have_the_logits_of_one_rank(family: str, stages: int, tmp_path: Path) -> None:
    """Of smollm 3's five layers some have no rope, and in a tied model the last stage needs the embedding too."""
    save_folder(CONFIGS[family], tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    if checkpoint.config.num_layers < stages:
        with pytest.raises(InputError, match="pipeline_parallel=3 cannot split"):
            Part(0, 1, 0, stages).share(checkpoint.config)
        return
    tokens = drawn_tokens(60, 97)
    expected = dense_logits(load_model(checkpoint, **CPU), tokens)
    hidden: Tensor | None = None
    for stage in range(stages):
        model = load_model(checkpoint, **CPU, part=Part(0, 1, stage, stages)).pack()
        with torch.inference_mode():
            hidden = model(torch.tensor(tokens), torch.arange(len(tokens)), dense_attention, hidden)
    assert hidden is not None
    torch.testing.assert_close(model.logits(hidden), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["toy", "random:toy"])
def test_drawn_models_are_cut_from_the_same_draw(name: str) -> None:
    whole = zoo.load(name, device="cpu")
    tokens = drawn_tokens(40, 257)

    def one(part: Part, collectives: ThreadCollectives) -> Tensor:
        loaded = zoo.load(name, device="cpu", part=part)
        part.connect(loaded.model, loaded.config, collectives)
        return dense_logits(loaded.model, tokens)

    expected = dense_logits(whole.model, tokens)
    for found in on_ranks(2, one):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_most_likely_token_is_found_without_gathering(ranks: int) -> None:
    """Ties go to the smallest id, and a row with NaN on any rank draws nothing: as without ranks."""
    config = shape("toy")
    torch.manual_seed(0)
    logits = torch.randn(12, config.vocab_size)
    logits[0, [5, 120, 250]] = 9.0
    logits[1, [200, 256]] = 9.0
    logits[2, 199] = float("nan")
    logits[3] = float("-inf")
    logits[4, 256] = 50.0
    expected = draw_tokens(logits)
    assert expected[[0, 1, 2, 3, 4]].tolist() == [5, 200, -1, -1, 256]

    def one(part: Part, collectives: ThreadCollectives) -> tuple[Tensor, Tensor]:
        first, last = part.vocabulary(config)
        vocabulary = SplitVocabulary(part, config, collectives)
        own = logits[:, first:last].contiguous()
        return vocabulary.most_likely(own), vocabulary.whole(own)

    for drawn, whole in on_ranks(ranks, one):
        assert drawn.tolist() == expected.tolist()
        torch.testing.assert_close(whole, logits, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_token_is_drawn_without_gathering(ranks: int) -> None:
    """The same number picks the same token, cold rows take the likeliest, and a row that cannot be drawn from is -1."""
    config = shape("toy")
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, config.vocab_size, generator=generator)
    temperature = 0.1 + 2 * torch.rand(4000, generator=generator)
    uniform = torch.rand(4000, dtype=torch.float64, generator=generator)
    temperature[:50] = 0.0
    logits[40, 7], logits[60, 256] = float("nan"), float("inf")
    uniform[70:80], uniform[80:90] = 0.0, 1 - 2.0**-53
    logits[90:100, :100] = -1e4  # nothing there can be drawn
    logits[100:110, 150:] = -1e4
    expected = draw_tokens(logits, temperature, uniform)
    assert expected[[40, 60]].tolist() == [-1, -1]

    def one(part: Part, collectives: ThreadCollectives) -> Tensor:
        first, last = part.vocabulary(config)
        vocabulary = SplitVocabulary(part, config, collectives)
        return vocabulary.draw(logits[:, first:last].contiguous(), temperature, uniform)

    for drawn in on_ranks(ranks, one):
        assert (
            drawn != expected
        ).sum() <= 1  # a number may lie within rounding of where one token ends and the next begins
        assert torch.equal(drawn[:110], expected[:110])


def test_parts_are_smaller_by_their_number() -> None:
    config = shape("llama-3-8b")
    for ranks, kv_heads in ((2, 4), (8, 1), (16, 1), (32, 1)):
        part = Part(1, ranks).share(config)
        assert (part.num_heads, part.num_kv_heads) == (32 // ranks, kv_heads)
        assert part.kv_bytes_per_token() * 8 == config.kv_bytes_per_token() * kv_heads
        assert part.num_parameters() < 1.1 * config.num_parameters() / ranks + 2e8 * kv_heads
    rows = [Part(rank, 4).vocabulary(shape("toy")) for rank in range(4)]
    assert rows == [(0, 65), (65, 130), (130, 195), (195, 257)]


@pytest.mark.parametrize(
    ("name", "ranks", "words"),
    [
        ("smollm2-135m", 2, "tensor_parallel=2 does not divide smollm2-135m's num_heads, 9"),
        ("toy", 3, "tensor_parallel=3 does not divide toy's num_heads, 4"),
        ("llama-3.2-3b", 12, "tensor_parallel=12 does not divide llama-3.2-3b's intermediate_size, 8192"),
    ],
)
def test_a_number_that_does_not_divide_is_refused(name: str, ranks: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Part(0, ranks).share(shape(name))


def test_kv_heads_are_split_or_replicated_evenly() -> None:
    config = replace(shape("toy"), num_heads=12, num_kv_heads=6)
    assert [Part(0, ranks).share(config).num_kv_heads for ranks in (1, 2)] == [6, 3]
    with pytest.raises(InputError, match="tensor_parallel=4 and toy's num_kv_heads, 6: one must divide the other"):
        Part(0, 4).share(config)


class LostResidual(Summed):
    """No rank adds the residual: what came before the layer is lost."""

    def multiply(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None, residual: Tensor | None) -> Tensor:
        return super().multiply(x, bias, norm, None)


class ResidualOnEveryRank(Summed):
    """Every rank adds it: it counts as often as there are ranks."""

    def multiply(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None, residual: Tensor | None) -> Tensor:
        return self.collectives.all_reduce(self.inner.multiply(x, bias, norm, residual))


class BiasOnEveryRank(Part):
    """Each rank keeps the bias of a product that is summed."""

    def cut(self, config: Any, name: str, values: Tensor) -> Tensor:
        return values if name.endswith("o_proj.bias") else super().cut(config, name, values)


class FirstKvHeads(Part):
    """Every rank takes the first KV heads, whoever's queries it has."""

    def cut(self, config: Any, name: str, values: Tensor) -> Tensor:
        kind = name.split(".")[-2]
        return super().cut(config, name, values) if kind not in ("k_proj", "v_proj") else values[: len(values) // 2]


@pytest.mark.parametrize("bug", [LostResidual, ResidualOnEveryRank, BiasOnEveryRank, FirstKvHeads, None])
def test_L73_bugs_of_the_split_are_seen_in_the_logits(bug: Any, tmp_path: Path) -> None:
    save_folder(CONFIGS["biased"], tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    tokens = drawn_tokens(20, 97)
    expected = dense_logits(load_model(checkpoint, **CPU), tokens)

    def one(part: Part, collectives: ThreadCollectives) -> Tensor:
        if isinstance(bug, type) and issubclass(bug, Part):
            part = bug(part.rank, part.ranks)
        model: Llama = load_model(checkpoint, **CPU, part=part)
        part.connect(model, checkpoint.config, collectives)
        for layer in model.layers:
            for linear in (layer.output, layer.down):
                if isinstance(bug, type) and issubclass(bug, Summed):
                    linear.format.__class__ = bug
        return dense_logits(model, tokens)

    found = on_ranks(2, one)[0]
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3) is (bug is None)

"""Layers that visit the device in turn compute what they compute when they stay there."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from minipaged import LLM
from minipaged.config import ModelConfig, SamplingParams, parse_offload
from minipaged.errors import InputError
from minipaged.model.llama import Llama
from minipaged.model.loading.offload import choose_layers
from minipaged.model.streaming import LayerStream, spread

CONFIG = ModelConfig(
    name="tiny",
    vocab_size=257,
    hidden_size=64,
    intermediate_size=128,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=256,
)
CPU = torch.device("cpu")


def hidden_of(model: Llama) -> torch.Tensor:
    """Of a few tokens that see nothing but themselves."""
    tokens = torch.tensor([3, 7, 200, 5])
    with torch.inference_mode():
        return model(tokens, torch.arange(4), lambda layer, query, key, value: query)  # type: ignore[no-any-return]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_streamed_layers_are_exact(count: int, packed: bool) -> None:
    """Bit for bit, at every step: a buffer must hold its first layers again when the next step begins."""
    whole = Llama.random(CONFIG, 3, torch.float32, "cpu", std=0.2, packed=packed)
    streamed = Llama.random(CONFIG, 3, torch.float32, "cpu", std=0.2, packed=packed, streamed=spread(count, 5))
    streamed.stream_layers(CPU)
    assert streamed.stream is not None
    assert len(streamed.stream.place) == count
    for _ in range(2):
        assert torch.equal(hidden_of(streamed), hidden_of(whole))


class SendsLate(LayerStream):
    """The buffer is filled for the layer after the next one before its own layer has run."""

    def before(self, index: int) -> None:
        """Sends too early."""
        super().before(index)
        super().after(index)

    def after(self, index: int) -> None:
        """Nothing is left to send."""


class NeverBegins(LayerStream):
    """The buffers are not filled anew when a step begins."""

    begun = False

    def begin(self) -> None:
        """Only once."""
        if not self.begun:
            super().begin()
        self.begun = True


@pytest.mark.parametrize("wrong", [SendsLate, NeverBegins])
def test_wrong_orders_are_found(wrong: type[LayerStream], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Llama.random(CONFIG, 3, torch.float32, "cpu", std=0.2)
    monkeypatch.setattr("minipaged.model.llama.LayerStream", wrong)
    streamed = Llama.random(CONFIG, 3, torch.float32, "cpu", std=0.2, streamed=(0, 1, 2, 3))
    streamed.stream_layers(CPU)
    hidden_of(streamed)
    assert not torch.equal(hidden_of(streamed), hidden_of(whole))


def answer(**settings: Any) -> list[int]:
    llm = LLM("toy", device="cpu", num_blocks=40, **settings)
    return list(llm.generate("once upon a time", SamplingParams(max_tokens=16))[0].outputs[0].token_ids)


def test_an_engine_writes_the_same_and_says_what_to_expect() -> None:
    expected = answer()
    with pytest.warns(
        UserWarning, match=r"2 of 2 layers of toy .* stay in host memory.* at most [0-9,.]+ steps a second"
    ):
        assert answer(offload_weights=1) == expected


def test_what_fits_is_not_streamed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for wish in ("auto", "none", 0):
            assert choose_layers(wish, CONFIG, 10**6, torch.float32, CPU) == ((), 0)


def test_layers_are_spread_evenly() -> None:
    assert [spread(count, 5) for count in (0, 1, 2, 5)] == [(), (4,), (2, 4), (0, 1, 2, 3, 4)]
    assert all(len(spread(count, 80)) == count for count in range(81))


@pytest.mark.parametrize("wish", ["all", -1, "nan", "inf", None, True, []])
def test_other_wishes_are_refused(wish: Any) -> None:
    with pytest.raises(InputError, match="offload_weights must be auto, none or a number of GB, not"):
        parse_offload(wish)


def test_ranks_are_refused_by_name() -> None:
    from minipaged.model.loading import zoo
    from minipaged.model.split import Part

    with pytest.raises(InputError, match="offload_weights needs a model on one device"):
        zoo.load("toy", device="cpu", part=Part(0, 2), offload=1)

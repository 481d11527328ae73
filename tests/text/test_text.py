"""Text that grows token by token: the same however the tokens come, whole characters only, and ended by the right stop string."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.api import LLM
from minipaged.config import SamplingParams
from minipaged.text.detokenizer import TextStream

PIECES = [
    b"a",
    b"b",
    b"ab",
    b"ba",
    b"\xc3",
    b"\xa9",
    b"\xe2\x82",
    b"\xac",
    b"",
    b" ",
    b"\xf0\x9f",
    b"\x98\x80",
    b"\xff",
]
stops = st.lists(st.text("ab é€", min_size=1, max_size=4), max_size=3).map(tuple)
written = st.lists(st.integers(0, len(PIECES) - 1), max_size=30)


def chunks(tokens: list[int], cuts: list[int]) -> Iterator[list[int]]:
    """The tokens in pieces of these lengths, then the rest."""
    at = 0
    for cut in cuts:
        yield tokens[at : at + cut]
        at += cut
    yield tokens[at:]


def read(tokens: list[int], cuts: list[int], stop: tuple[str, ...] = (), min_tokens: int = 0) -> TextStream:
    stream = TextStream(PIECES.__getitem__, stop, min_tokens=min_tokens)
    for chunk in chunks(tokens, cuts):
        stream.feed(chunk)
    return stream


@given(tokens=written, cuts=st.lists(st.integers(0, 5), max_size=12))
def test_text_is_its_bytes_however_they_come(tokens: list[int], cuts: list[int]) -> None:
    """Without stop strings the text is that of all bytes together."""
    stream = read(tokens, cuts)
    stream.finish()
    assert stream.text == b"".join(PIECES[t] for t in tokens).decode("utf-8", errors="replace")
    assert stream.stable == len(stream.text)


@given(tokens=written, stop=stops, min_tokens=st.integers(0, 8))
def test_a_stop_string_ends_the_text_before_itself(tokens: list[int], stop: tuple[str, ...], min_tokens: int) -> None:
    """One token at a time: the text ends at the first stop string that ends after `min_tokens` tokens, and no earlier one counts."""
    stream = TextStream(PIECES.__getitem__, stop, min_tokens=min_tokens)
    shown = ""
    for number, token in enumerate(tokens, 1):
        before = read(tokens[: number - 1], []).text
        stream.feed([token])
        whole = read(tokens[:number], []).text
        ending = [i for s in stop for i in range(len(whole)) if whole.startswith(s, i) and i + len(s) > len(before)]
        assert stream.text[: len(shown)] == shown, "what was stable was taken back"
        shown = stream.text[: stream.stable]
        if number > min_tokens and ending:
            assert stream.stopped
            assert stream.text == whole[: min(ending)]
            assert stream.consumed == number
            return
        assert not stream.stopped
        assert stream.text == whole


@given(tokens=written, cuts=st.lists(st.integers(0, 5), max_size=12), stop=stops, min_tokens=st.integers(0, 8))
def test_an_early_stop_string_never_counts(
    tokens: list[int], cuts: list[int], stop: tuple[str, ...], min_tokens: int
) -> None:
    """However the tokens come, nothing stops within the first `min_tokens`; what stops one by one stops in chunks."""
    stream = read(tokens, cuts, stop, min_tokens)
    assert stream.stopped == read(tokens, [1] * len(tokens), stop, min_tokens).stopped
    if stream.stopped:
        assert stream.consumed > min_tokens


@pytest.mark.parametrize("overlap", [0, 1])
def test_min_tokens_holds_for_stop_strings(overlap: int) -> None:
    """An answer whose text has the stop string from its start on goes on for min_tokens, as for stop tokens."""
    llm = LLM("toy", num_blocks=64, block_size=4, overlap=overlap)
    free = llm.generate(["hello"], SamplingParams(max_tokens=20, ignore_eos=True))[0].outputs[0]
    stop = free.text[:1]
    assert stop
    short = llm.generate(["hello"], SamplingParams(max_tokens=20, ignore_eos=True, stop=(stop,)))[0].outputs[0]
    assert (short.text, short.finish_reason) == ("", "stop")
    least = SamplingParams(max_tokens=20, min_tokens=6, ignore_eos=True, stop=(stop,))
    held = llm.generate(["hello"], least)[0].outputs[0]
    assert len(held.token_ids) >= 6
    assert held.token_ids == free.token_ids[: len(held.token_ids)]
    assert free.text.startswith(held.text)

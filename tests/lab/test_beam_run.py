"""What beams and samples share is counted from the engine's own trace."""

from __future__ import annotations

import pytest

from minipaged.errors import InputError
from minipaged.lab.measure import beam_run
from minipaged.lab.measure.beam_run import INSTRUCTIONS, Sharing, kept, measure


def run(**settings: object) -> list[Sharing]:
    return measure(model="toy", device="cpu", progress=lambda what, done, total: None, **{"requests": 2, **settings})  # type: ignore[arg-type]


def test_wider_shares_more_and_one_row_shares_nothing() -> None:
    heard: list[Sharing] = []
    found = run(widths=(1, 2, 4), done=heard.append)
    assert heard == found
    saving = {(s.kind, s.width): s.saving for s in found}
    assert saving["samples", 1] == 0
    assert 0 < saving["samples", 2] < saving["samples", 4] < 1
    assert 0 < saving["beams", 2] < saving["beams", 4] < 1
    assert all(saving["beams", n] > saving["samples", n] for n in (2, 4)), (
        "beams share what they have written, samples the prompt"
    )
    assert all(s.answer_tokens <= beam_run.MAX_TOKENS for s in found)


def test_the_saving_is_the_papers_blocks_saved_over_blocks_needed() -> None:
    """Two samples of one answer of one token behind a prompt that fills blocks: all but each one's last block is shared."""
    (found,) = run(widths=(2,), kinds=("samples",), requests=1)
    prompt = found.prompt_tokens
    assert prompt == len(INSTRUCTIONS[0].encode()), "the toy model has a token a byte"
    full = int(prompt) // 16
    least, most = full / (2 * (full + 1 + beam_run.MAX_TOKENS // 16)), full / (2 * full)
    assert least < found.saving < most


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="requests"):
        run(requests=0)
    with pytest.raises(InputError, match="requests"):
        run(requests=len(INSTRUCTIONS) + 1)
    with pytest.raises(InputError, match="width"):
        run(widths=(0,))
    with pytest.raises(InputError, match="'trees'"):
        run(kinds=("trees",))


def test_what_was_kept_reads_back(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for sharing in kept():
        assert 0 < sharing.saving < 1
    monkeypatch.setattr(beam_run, "RESULTS", beam_run.RESULTS.with_name("none.json"))
    assert kept() == []

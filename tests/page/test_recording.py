"""`LLM.trace`: what it records, how a notebook shows it, and the file that it writes."""

from __future__ import annotations

from html import unescape
from pathlib import Path

import pytest

from minipaged import LLM, SamplingParams
from minipaged.errors import InputError
from minipaged.page import recording
from minipaged.trace.player import Player
from minipaged.trace.sources import FileSource
from tests.page.browser import Browser

PROMPTS = ["Once upon a time", "The cat sat"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("toy", num_blocks=40, block_size=4, trace=True)


def test_a_trace_is_of_all_that_was_done(llm: LLM, tmp_path: Path) -> None:
    assert "without a step yet" in repr(llm.trace)
    assert "<iframe" not in llm.trace._repr_html_()
    llm.generate(PROMPTS, SamplingParams(max_tokens=12))
    assert len(llm.trace) == 12
    player = Player(llm.trace.source)
    player.seek(12)
    assert player.snapshot == llm.engine.trace.state()
    path = tmp_path / "run.mpt"
    llm.trace.save(path)
    again = Player(FileSource(path))
    again.seek(12)
    assert again.snapshot == player.snapshot
    with pytest.raises(InputError, match="cannot be written"):
        llm.trace.save(tmp_path)
    assert llm.trace is llm.trace


def test_a_trace_that_is_asked_for_late_begins_there() -> None:
    late = LLM("toy", num_blocks=40, block_size=4)
    late.generate(PROMPTS, SamplingParams(max_tokens=4))
    assert len(late.trace) == 0
    late.generate(PROMPTS, SamplingParams(max_tokens=6))
    assert len(late.trace) == 6
    late.trace.clear()
    assert len(late.trace) <= 1, "what the engine holds may be told as a step"


def test_a_trace_ends_when_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MOST_STEPS", 5)
    llm = LLM("toy", num_blocks=40, block_size=4, trace=True)
    llm.generate(PROMPTS, SamplingParams(max_tokens=9))
    assert len(llm.trace) == 5
    assert "5 steps are kept at most" in repr(llm.trace)


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(browser: Browser, llm: LLM, tmp_path: Path) -> None:
    llm.trace.clear()
    llm.generate(PROMPTS, SamplingParams(max_tokens=12))
    shown = llm.trace._repr_html_()
    assert unescape(shown.partition('srcdoc="')[2].partition('" style')[0]) == llm.trace.html()
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><h1>A notebook</h1><p>before</p>{shown}<p>after</p>", encoding="utf-8")
    ground = "getComputedStyle(document.body).backgroundColor"
    browser.open(notebook.as_uri(), (900, 900), dark=True)
    assert browser.run(ground) == "rgba(0, 0, 0, 0)", "its styles stay in it"
    assert browser.run("document.querySelector('iframe').offsetHeight") == recording.FRAME_HEIGHT
    ready = "new Promise(done => { const look = () => document.body?.dataset.ready ? done(1) : setTimeout(look, 5); look(); })"
    assert browser.in_frame(f"{ready}.then(() => document.getElementById('where').textContent)").endswith("of 12")
    assert browser.in_frame("document.getElementById('rows').rows.length") == 2
    assert browser.complaints == []


def test_a_wrong_trace_argument_is_named() -> None:
    with pytest.raises(InputError, match="trace must be"):
        LLM("toy", trace="yes")  # type: ignore[arg-type]

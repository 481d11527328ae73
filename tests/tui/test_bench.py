"""`minipaged bench screen`: both kinds of round are the same generation, and the pictures are of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import children, wait_for

from minipaged.errors import InputError
from minipaged.serving.live import EngineProcess
from minipaged.tui.bench.engine import MadeUpWords, requests, timed_engine
from minipaged.tui.bench.measure import Outcome, Plan, Round, _cores, measure


def test_rounds_with_and_without_do_the_same_work(tmp_path: Path) -> None:
    settings = {"num_blocks": 40, "device": "cpu", "max_num_batched_tokens": 2048}
    outcome = measure(Plan("toy", settings, 5, 12, 1, None, str(tmp_path)))
    off, on = outcome.rounds
    assert (off.screen, on.screen) == (False, True)
    assert off.figures["tokens"] == on.figures["tokens"] > 0
    assert off.figures["steps"] == on.figures["steps"]
    assert outcome.terminal_bytes > 10_000, "the screen was painted on its terminal"
    assert {"blocks-120x40.svg", "compare-200x60.svg"} <= set(outcome.pictures)
    for name in outcome.pictures:
        picture = (tmp_path / name).read_text()
        assert "PAUSED" in picture
        assert "Compare" in picture or "Blocks" in picture
    assert "orca" in (tmp_path / "compare-120x40.svg").read_text()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not pin processes")
def test_the_engine_and_all_else_have_cores_of_their_own() -> None:
    """A process starts on its parent's cores: the engine goes to its own by name, not to the first of those it finds."""
    mine = os.sched_getaffinity(0)
    engine_cores, others = _cores(1)
    assert len(engine_cores) == 1
    assert set(others) == (mine - set(engine_cores) or mine)
    arguments = {"model": "toy", "settings": {"num_blocks": 40, "device": "cpu"}, "cores": engine_cores}
    os.sched_setaffinity(0, others)
    try:
        with EngineProcess(timed_engine, arguments) as engine:
            assert engine.source.wait(lambda: engine.source.ready, 60)
            assert os.sched_getaffinity(engine.pid) == set(engine_cores)
    finally:
        os.sched_setaffinity(0, mine)
    assert _cores(None) == ([], [])


def test_what_cannot_run_says_why() -> None:
    with pytest.raises(InputError, match="no model is called 'nothing'"):
        measure(Plan("nothing", {"num_blocks": 40, "device": "cpu"}, 2, 4, 1))


def test_the_ratio_is_the_median_pairs() -> None:
    rounds = [
        Round(number % 2 == 1, {"tokens_per_second": v, "cpu_seconds": 9 / v, "tokens": 9})
        for number, v in enumerate((10, 9, 10, 5, 10, 10))
    ]
    assert Outcome(tuple(rounds), 0, ()).ratio == 0.9
    assert Outcome(tuple(rounds), 0, ()).processor_ratio == pytest.approx(0.9)


def test_made_up_words_are_words_and_tell_ids_apart() -> None:
    codec = MadeUpWords(150_000)
    words = {codec.token_bytes(token) for token in range(257, 20_000)}
    assert len(words) == 20_000 - 257
    assert all(word.decode().strip().isalpha() for word in words)
    assert codec.decode(codec.encode("a page")) == "a page"
    assert sum(params.n == 4 for _, params in requests(64, 100)) == 16


def test_nothing_is_left_when_it_is_killed(tmp_path: Path) -> None:
    mark = tmp_path / "pictures"
    command = [
        sys.executable,
        "-m",
        "minipaged",
        "bench",
        "screen",
        "--model",
        "toy",
        "--requests",
        "40",
        "--max-tokens",
        "900",
    ]
    bench = subprocess.Popen([*command, "--num-blocks", "4000", "--pictures", str(mark)], stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(children(mark)) == 3)  # the command, the screen on its terminal, the engine
    finally:
        bench.kill()
        bench.wait()
    wait_for(lambda: not children(mark))

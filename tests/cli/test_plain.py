"""The run as plain lines: each answer stands under the number by which the lines before it call its sequence."""

from __future__ import annotations

import errno
import io
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from minipaged.cli.plain import end_of, run_plain
from minipaged.cli.show import build_engine
from minipaged.config import SamplingParams
from minipaged.trace import file
from minipaged.trace.sources import FileSource


def test_answers_stand_under_their_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    factory = partial(build_engine, "toy", {"num_blocks": 64, "device": "cpu"})
    asked = (("one prompt", SamplingParams(max_tokens=4, n=2, seed=0)), ("another", SamplingParams(max_tokens=3)))
    assert run_plain(factory, asked, steps=None, record=None) == 0
    lines = capsys.readouterr().out.splitlines()
    ended = {line.split(" · ")[1].split(" is complete")[0] for line in lines if "is complete" in line}
    headed = [line.split(" · ") for line in lines if line.startswith("sequence ")]
    assert {name for name, _ in headed} == ended
    assert sorted(prompt for _, prompt in headed) == ["another", "one prompt", "one prompt"]


def test_the_end_of_a_prompt_begins_with_a_word() -> None:
    assert end_of("short", 10) == "short"
    assert end_of("exactly ten"[:10], 10) == "exactly te"
    assert end_of("some longer words", 10) == "…words"
    assert end_of("a longer words", 7) == "…words"
    assert end_of("withoutanyspace", 6) == "…space"
    assert all(len(end_of("one two three four", width)) <= width for width in range(2, 20))


class FullAfter(io.RawIOBase):
    """A file on a disk that has room for so many bytes."""

    def __init__(self, room: int) -> None:
        self.kept = bytearray()
        self._room = room

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if len(self.kept) + len(data) > self._room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.kept += data
        return len(data)


@pytest.mark.parametrize("room", [0, 3000, 12_000])
def test_a_full_disk_ends_the_recording_and_not_the_run(
    room: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullAfter(room)
    monkeypatch.setattr(file, "open", lambda *args: disk, raising=False)
    factory = partial(build_engine, "toy", {"num_blocks": 64, "device": "cpu"})
    asked = (("one prompt", SamplingParams(max_tokens=60, ignore_eos=True)),)
    assert run_plain(factory, asked, steps=None, record=tmp_path / "run.mpt") == 1
    captured = capsys.readouterr()
    told = [line for line in captured.err.splitlines() if line.startswith("minipaged: ")]
    assert len(told) == 1
    assert "run.mpt: No space left on device" in told[0]
    assert "is complete (" in captured.out
    assert 0 <= len(disk.kept) <= room
    if room > 10_000:
        kept = tmp_path / "kept.mpt"
        kept.write_bytes(disk.kept)
        assert len(FileSource(kept)) > 0


def test_a_refused_prompt_and_its_reason_are_safe(capsys: pytest.CaptureFixture[str]) -> None:
    factory = partial(build_engine, "toy", {"num_blocks": 64, "device": "cpu"})
    assert run_plain(factory, (("\x1b[2J" + "x" * 5000, SamplingParams(max_tokens=4)),), steps=None, record=None) == 2
    out = capsys.readouterr().out
    assert "refused: " in out
    assert "\x1b" not in out

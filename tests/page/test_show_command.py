"""`minipaged show --html`: what it writes, what it refuses, and how long traces are thinned."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from minipaged.cli.main import app
from minipaged.cli.terminal import run_guarded
from minipaged.errors import InputError
from minipaged.page import frames
from minipaged.page import page as page_module
from minipaged.page.frames import chosen_positions, document
from minipaged.page.page import run_page
from minipaged.trace.events import StepDelta
from minipaged.trace.player import Player
from minipaged.trace.sources import FileSource, ListSource
from minipaged.tui.gallery import scenario_path

COW = str(scenario_path("cow"))


def show(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    try:
        code = run_guarded(partial(app, args=["show", *args]))
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_a_page_is_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.html"
    code, said, _ = show(capsys, COW, "--html", str(out))
    assert code == 0
    assert "14 steps" in said
    first = out.read_text(encoding="utf-8")
    assert first.startswith("<!doctype html>")
    assert "http:" not in first
    assert "https:" not in first
    code, _, err = show(capsys, COW, "--html", str(out))
    assert (code, "exists" in err, "--force" in err) == (2, True, True)
    assert show(capsys, COW, "--html", str(out), "--force")[0] == 0
    assert out.read_text(encoding="utf-8") == first
    assert [path.name for path in tmp_path.iterdir()] == ["run.html"]


@pytest.mark.parametrize(
    ("trace", "out", "named"),
    [
        (__file__, "x.html", "is not a minipaged trace"),
        ("no-such.mpt", "x.html", "cannot open the trace"),
        (COW, ".", "is a folder: name a file in it, such as"),
        (COW, "no/such/x.html", "does not exist"),
        (str(Path(__file__).parent), "x.html", "cannot open the trace"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trace: str, out: str, named: str
) -> None:
    code, _, err = show(capsys, trace, "--html", str(tmp_path / out))
    assert code == 2
    assert named in err
    assert list(tmp_path.iterdir()) == []


def test_a_trace_is_not_overwritten_by_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "run.mpt"
    trace.write_bytes(Path(COW).read_bytes())
    code, _, err = show(capsys, str(trace), "--html", str(trace), "--force")
    assert code == 2
    assert "name another file" in err
    assert trace.read_bytes() == Path(COW).read_bytes()


def test_force_without_html_has_no_use(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = show(capsys, COW, "--force")
    assert code == 2
    assert "--force" in err


def deltas_of(name: str) -> list[StepDelta]:
    source = FileSource(scenario_path(name))
    return [source.delta(at) for at in range(len(source))]


def folded(found: dict[str, object]) -> dict[int, list[int]]:
    """The blocks' values after all frames."""
    blocks: dict[int, list[int]] = {}
    for frame in found["frames"]:  # type: ignore[attr-defined]
        values = frame.get("blocks", [])
        blocks.update({values[i]: values[i + 1 : i + 5] for i in range(0, len(values), 5)})
    return blocks


def test_a_long_trace_is_thinned_and_ends_the_same() -> None:
    source = ListSource(deltas_of("evict"))
    few = document(source, most_frames=12)
    assert len(few["frames"]) <= 13
    assert few["steps"] == 70
    assert few["frames"][-1]["at"] == 70
    assert folded(few) == folded(document(source))
    player = Player(source)
    player.seek(70)
    pool = player.snapshot.device
    assert folded(few)[3] == [int(getattr(pool, name)[3]) for name in ("owner", "refs", "fill", "flags")]
    marked = set(chosen_positions(source, 40))
    assert {at + 1 for at in range(70) if source.marks[at]} <= marked, "what happened is kept first"


def test_a_trace_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = deltas_of("cow")
    huge = [replace(d, stats=d.stats._replace(total_blocks=frames.MOST_BLOCKS + 2)) for d in deltas]
    with pytest.raises(InputError, match="a page draws at most 262,144"):
        run_page(ListSource(huge))
    monkeypatch.setattr(page_module, "MOST_BYTES", 20_000)
    with pytest.raises(InputError, match="the page would weigh"):
        run_page(ListSource(deltas))


def test_an_empty_and_a_damaged_trace_have_a_page(tmp_path: Path) -> None:
    (only,) = document(ListSource([]))["frames"]
    assert (only["at"], only["say"]) == (0, "the start: every block is free")
    cut = tmp_path / "cut.mpt"
    cut.write_bytes(Path(COW).read_bytes()[:3000])
    found = document(FileSource(cut))
    assert 0 < len(found["frames"]) < 15
    assert "damaged" in found["damage"]

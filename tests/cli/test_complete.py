"""Shell completion: the values that exist, offered through the protocol that the shells speak."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minipaged.baselines.systems import SYSTEMS
from minipaged.cli import complete
from minipaged.lab.simulation.hardware import GPUS
from minipaged.tui.gallery import SCENARIOS


def offered(words: str) -> list[str]:
    """What bash would be offered after these words, by a process as bash starts it."""
    typed = words.split(" ")
    environment = {
        **os.environ,
        "_MINIPAGED_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(typed) - 1),
    }
    script = "import sys; sys.argv = ['minipaged']; from minipaged.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("minipaged generate --model smol", ["smollm2-135m"]),
        ("minipaged chat --model to", ["toy"]),
        ("minipaged tui --scenario ", list(SCENARIOS)),
        ("minipaged lab simulate --gpu h100", [name for name in GPUS if name.startswith("h100")]),
        ("minipaged lab simulate --system paged,or", [f"paged,{name}" for name in SYSTEMS if name.startswith("or")]),
    ],
)
def test_the_shell_is_offered_what_exists(words: str, expected: list[str]) -> None:
    assert expected
    assert offered(words) == expected


def test_every_model_offered_has_a_name_that_is_known() -> None:
    from minipaged.model.loading.pull import SOURCES
    from minipaged.model.loading.shapes import SIMULATED_ONLY, shape

    for name in complete.models(""):
        assert name in (*SOURCES, "toy") or (shape(name) and name.removeprefix("random:") not in SIMULATED_ONLY)
    assert set(complete.downloads("")) == set(SOURCES)


def test_paths_are_offered_where_one_is_typed(tmp_path: Path) -> None:
    (tmp_path / "a[1]").mkdir()
    (tmp_path / "a[1]" / "model.gguf").touch()
    (tmp_path / "a[1]" / "notes.txt").touch()
    assert complete.models(f"{tmp_path}/a[") == [f"{tmp_path}/a[1]/"]
    assert complete.models(f"{tmp_path}/a[1]/") == [f"{tmp_path}/a[1]/model.gguf"]
    assert complete.shapes(f"{tmp_path}/a[1]/") == []


def test_systems_continue_after_a_comma_without_those_chosen() -> None:
    assert "all" in complete.systems("")
    after = complete.systems("paged,")
    assert "paged,paged" not in after
    assert "paged,all" not in after
    assert {name.partition(",")[2] for name in after} >= set(SYSTEMS) - {"paged"}


def test_completion_imports_no_torch() -> None:
    script = (
        "import sys; from minipaged.cli import main, complete as c; "
        "[f('') for f in (c.models, c.shapes, c.scenarios, c.gpus, c.systems, c.downloads, c.devices, c.dtypes)]; "
        "sys.exit('torch' in sys.modules or 'textual' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0

"""A block manager of the user's: it works like minipaged's, and what it does wrong is told as its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from minipaged.api import LLM
from minipaged.config import SamplingParams
from minipaged.errors import BlockManagerError, InputError
from minipaged.learn.catalog import lesson
from minipaged.memory.own_manager import find_class

HEAD = "from minipaged.memory.block_manager import BlockManager\n\nclass Mine(BlockManager):\n"
ASKED = ["the pages of this book", "are not bound"], SamplingParams(max_tokens=20, ignore_eos=True)


def written(folder: Path, body: str) -> str:
    path = folder / "my.py"
    path.write_text(HEAD + body, encoding="utf-8")
    return f"{path}:Mine"


def texts(block_manager: str | type | None) -> list[str]:
    llm = LLM("toy", device="cpu", num_blocks=20, block_size=4, block_manager=block_manager)
    return [output.outputs[0].text for output in llm.generate(*ASKED)]


def test_the_last_lessons_manager_writes_the_same(tmp_path: Path) -> None:
    path = tmp_path / "13_your_own.py"
    path.write_text(lesson(13).solved(), encoding="utf-8")
    assert texts(f"{path}:MyBlockManager") == texts(None) == texts(find_class(f"{path}:MyBlockManager"))


def test_it_is_the_users_class_that_is_asked(tmp_path: Path) -> None:
    """The base class' answers, counted."""
    body = "    calls = 0\n\n    def append(self, *a):\n        Mine.calls += 1\n        return super().append(*a)\n"
    kind = find_class(written(tmp_path, body))
    texts(kind)
    assert kind.calls > 5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (
            "    def append(self, *a):\n        return {}[7]\n",
            r"Mine\.append: KeyError: 7 \(my\.py:5: return \{\}\[7\]\)",
        ),
        (
            "    def append(self, *a):\n        return [1]\n",
            r"Mine\.append gave \[1\], and should give Allocation or None",
        ),
        ("    def __init__(self, *a, **k):\n        raise NotImplementedError('task 1')\n", r"Mine: NotImpl.*task 1"),
        ("    def free(self, seq_id):\n        super().free(-seq_id - 1)\n", r"Mine\.free: InputError: .*my\.py:5"),
        ("    def __init__(self):\n        pass\n", r"in Mine: TypeError"),
    ],
)
def test_what_fails_in_it_is_told_as_its_own(tmp_path: Path, body: str, told: str) -> None:
    with pytest.raises(BlockManagerError, match=told):
        texts(written(tmp_path, body))


def test_what_is_left_to_minipaged_refuses_as_ever(tmp_path: Path) -> None:
    """A setting that cannot be is no fault of the user's class."""
    llm = LLM("toy", device="cpu", num_blocks=20, block_manager=written(tmp_path, "    pass\n"))
    with pytest.raises(InputError, match="watermark"):
        llm.engine.scheduler.manager.set_watermark(7.0)


def test_what_is_neither_text_nor_class_is_refused() -> None:
    with pytest.raises(InputError, match=r"must be a class or FILE\.py:CLASS, not 3"):
        texts(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("my.py", "must be FILE.py:CLASS"),
        ("gone.py:Mine", "there is no file gone.py"),
        ("{folder}/my.py:Yours", "has no class Yours; it has Mine"),
        ("{folder}/broken.py:Mine", r"cannot be loaded: ZeroDivisionError: .* \(broken.py:2: 1 / 0\)"),
        ("{folder}/syntax.py:Mine", r"cannot be loaded: SyntaxError: .*syntax.py"),
        ("{folder}/small.py:Small", "Small has no allocate, append"),
    ],
)
def test_what_is_no_block_manager_is_refused(tmp_path: Path, text: str, told: str) -> None:
    written(tmp_path, "    pass\n")
    (tmp_path / "broken.py").write_text("\n1 / 0\n", encoding="utf-8")
    (tmp_path / "syntax.py").write_text("def (:\n", encoding="utf-8")
    (tmp_path / "small.py").write_text("class Small:\n    pass\n", encoding="utf-8")
    with pytest.raises(InputError, match=told):
        texts(text.format(folder=tmp_path))

"""The list of laws, and the search for their tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from minipaged import laws

TESTS = Path(__file__).parents[1]
MEMORY = [f"L{n:02}" for n in (*range(1, 37), 47, 49, 52, 53, 54, 56, 58, 65, 66, 68)]
# Of features that are still to come: whoever brings one takes its law off this list.
TO_COME: list[str] = []


def test_the_laws_are_75_in_order() -> None:
    """Ids without a gap, one sentence each."""
    assert [law.id for law in laws.LAWS] == [f"L{n:02}" for n in range(1, 76)]
    assert all(law.sentence.endswith(".") and law.group for law in laws.LAWS)


def test_every_law_of_the_memory_is_tested() -> None:
    """A law without a test would be a wish."""
    found = laws.tests_of(TESTS)
    assert not [law for law in MEMORY if not found[law]]


def test_the_laws_without_a_test_are_those_to_come() -> None:
    """No other law may be without one, and a law that has one is no longer to come."""
    found = laws.tests_of(TESTS)
    assert [law for law, tests in found.items() if not tests] == TO_COME


def test_ids_are_found_in_names_and_parameters(tmp_path: Path) -> None:
    """A test's name may carry several laws; a parameter's id belongs to the test after it; other words are left alone."""
    (tmp_path / "test_a.py").write_text(
        """CASES = [pytest.param(1, id="L07-leak"), pytest.param(2, id="XL08")]
def test_L01_L02_both(): "L03 is only spoken of"
def test_L64(case): ...
def test_nothing(): ...
"""
    )
    found = laws.tests_of(tmp_path)
    assert {law: tests for law, tests in found.items() if tests} == {
        "L01": ["test_a.py::test_L01_L02_both"],
        "L02": ["test_a.py::test_L01_L02_both"],
        "L07": ["test_a.py::test_L01_L02_both"],
        "L64": ["test_a.py::test_L64"],
    }
    with pytest.raises(FileNotFoundError, match="nowhere"):
        laws.tests_of(tmp_path / "nowhere")

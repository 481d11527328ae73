"""What a stranger's text becomes before it is shown: unsafe characters are replaced, invisible ones are not mistaken for them."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.text.safe import REPLACED, clean, printable, steers

PERSIAN = "می\u200cخواهم"  # "I want": a non-joiner between its halves
ENGLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"  # a black flag and invisible tags

CASES = [
    pytest.param(PERSIAN, PERSIAN, "میخواهم", id="persian"),
    pytest.param("क्\u200dष", "क्\u200dष", "कष", id="hindi"),
    pytest.param("co\xadop", "coop", "coop", id="soft hyphen"),
    pytest.param("a\u200bb\u2060c", "a\u200bb\u2060c", "abc", id="zero width"),
    pytest.param("\u200fאב\u200e", "\u200fאב\u200e", "אב", id="direction marks"),
    pytest.param("\ufeffa", "a", "a", id="byte order mark"),
    pytest.param("one\r\ntwo\r\n", "one\ntwo\n", "one↵two↵", id="CRLF"),
    pytest.param("one\u2028two", "one\ntwo", "one↵two", id="line separator"),
    pytest.param("over\rwritten", "overwritten", "overwritten", id="lone carriage return"),
    pytest.param("👩\u200d💻", "👩\u200d💻", "□□", id="joined emoji"),
    pytest.param("🇩🇪", "🇩🇪", "□□", id="a country's flag"),
    pytest.param(ENGLAND, ENGLAND, "□", id="a region's flag"),
    pytest.param("❤\ufe0f", "❤\ufe0f", "❤", id="variation selector"),
    pytest.param("\x1b]0;title\x07", "�]0;title�", "�]0;title�", id="escape sequence"),
    pytest.param("\x9b2J\x7f\x08\x00", "�2J���", "�2J���", id="other controls"),
    pytest.param("a\u202eb\u2066c\u2069", "a�b�c�", "a�b�c�", id="reordering"),
    pytest.param("\ud800", "�", "�", id="half a pair"),
    pytest.param("\ue000", "�", "�", id="private use"),
    pytest.param("a\tb", "a\tb", "a b", id="tab"),
]


@pytest.mark.parametrize(("text", "flowing", "in_cells"), CASES)
def test_what_a_strangers_text_becomes(text: str, flowing: str, in_cells: str) -> None:
    assert printable(text) == flowing
    assert clean(text) == in_cells


@given(st.text(max_size=60), st.text(max_size=60))
def test_nothing_that_steers_is_left_and_nothing_else_is_marked(one: str, two: str) -> None:
    shown = printable(one + two)
    assert shown == printable(one) + printable(two), "a stream can be made safe part by part"
    assert not any(steers(char) for char in shown if char not in "\n\t")
    for char in one:
        if printable(char) == REPLACED != char:
            assert unicodedata.category(char) in ("Cc", "Cs", "Co") or unicodedata.bidirectional(char)[-1] in "EOI"

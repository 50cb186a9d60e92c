"""Text from a file cannot do anything to a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggufkit.report.escape import RUNNING_TEXT, shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("blk.0.attn_q.weight", "blk.0.attn_q.weight"),
        ("Größe 大小 حجم 🍁", "Größe 大小 حجم 🍁"),
        ("\x1b[2J\x1b[31mred", "\\e[2J\\e[31mred"),
        ("\x9b31m", "\\x9b31m"),  # the one-byte form of ESC [
        ("a\rb\nc\td\0", "a\\rb\\nc\\td\\0"),
        ("a\u202egnp.exe", "a\\u202egnp.exe"),  # right-to-left override
        ("a\u2066b\u2069\u200f", "a\\u2066b\\u2069\\u200f"),
        ("a\u200bb\ufeff", "a\\u200bb\\ufeff"),  # zero width
        ("a\u2028b", "a\\u2028b"),
        ("\U000e0041", "\\U000e0041"),  # a tag character
        ("\udcff", "\\xff"),  # a byte that was no UTF-8
        ("\ud800", "\\ud800"),
        ("\x07", "\\x07"),
    ],
)
def test_what_is_not_printable_is_escaped(text: str, expected: str) -> None:
    assert shown(text) == expected


@given(st.text())
def test_nothing_but_printable_characters_comes_out(text: str) -> None:
    assert shown(text).isprintable()


@given(st.text(), st.integers(1, 40))
def test_a_limit_is_kept_and_seen(text: str, limit: int) -> None:
    whole, cut = shown(text), shown(text, limit=limit)
    assert cut == whole if len(whole) <= limit else len(cut) == limit and cut.endswith("…")


def test_running_text_keeps_its_lines_but_no_escapes() -> None:
    assert shown("one\ntwo\t\x1b[1mthree\r", keep=RUNNING_TEXT) == "one\ntwo\t\\e[1mthree\\r"


def test_a_long_text_costs_only_what_is_shown() -> None:
    assert shown("\x1b" * 50_000_000, limit=4) == "\\e\\…"

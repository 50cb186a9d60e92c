"""How text that comes from a file is shown: nothing in it can move the cursor, recolour the terminal or
reorder the line.

A tensor name, a metadata string or a generated answer is somebody else's text. A terminal obeys escape
sequences in it, and an editor obeys bidirectional marks, so that what is shown may not be what is there.
Everything that is not printable is written as an escape that names it.
"""

from __future__ import annotations

#: what running text may keep besides printable characters: line ends, tabs, wide and unbreakable spaces, and the
#: joiners and marks that Arabic, Indic scripts and emoji are written with
RUNNING_TEXT = "\n\t\u00a0\u3000\u200c\u200d\u200e\u200f"

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\x1b": "\\e", "\x00": "\\0"}


def shown(text: str, *, limit: int | None = None, keep: str = "") -> str:
    """`text` with every character that is not printable written as an escape.

    Control characters, ANSI escapes, bidirectional and zero-width marks, line separators, private use and
    unassigned characters become `\\n`, `\\e`, `\\x9b`, `\\u202e`; a byte that was no UTF-8 becomes `\\xff`.

    Args:
        text: as it stands in the file.
        limit: cut to this many characters, the last of them an ellipsis.
        keep: characters to leave as they are, for instance `RUNNING_TEXT`.
    """
    if limit is not None:
        text = text[: limit + 1]  # escaping only lengthens, so that more than this cannot be shown anyway
    whole = text if text.isprintable() else "".join(c if c.isprintable() or c in keep else _escape(c) for c in text)
    return whole if limit is None or len(whole) <= limit else whole[: limit - 1] + "…"


def _escape(char: str) -> str:
    if char in _SHORT:
        return _SHORT[char]
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # Python's stand-in for a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"

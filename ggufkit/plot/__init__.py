"""Data → picture. A file a kind: first what is drawn, as data that a test or the terminal can read as well, then the
drawing of it with matplotlib, which is loaded when something is drawn.

Nothing here judges or computes a model: statistics, traces and comparisons are handed in.
"""

from __future__ import annotations

from ggufkit.plot.style import DARK, LIGHT, SUFFIXES, Theme, check_format, save

__all__ = ["DARK", "LIGHT", "SUFFIXES", "Theme", "check_format", "save"]

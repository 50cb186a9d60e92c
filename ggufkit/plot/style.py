"""What all pictures share: paper and ink, light or dark, the frame around a panel, and the file they go to.

Colours are those of Okabe and Ito's palette, and the maps' is cividis: colour-blind people can tell them apart, and
they keep their order in grey. Sizes are in inches at 130 dots, so that the words can still be read at half the size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ggufkit.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
DPI = 130
#: how a map of numbers is coloured
COLOURS = "cividis"


@dataclass(frozen=True, slots=True)
class Theme:
    """The colours of one paper: words, lesser words, lines, a quiet area, and the three that say something."""

    paper: str
    ink: str
    faint: str
    line: str
    quiet: str
    blue: str
    orange: str
    red: str


LIGHT = Theme("#FFFFFF", "#1A1A1A", "#555555", "#999999", "#EEF3F7", "#0072B2", "#D55E00", "#B00020")
DARK = Theme("#14181C", "#ECECEC", "#B0B6BC", "#70777E", "#232B33", "#56B4E9", "#F0A03C", "#FF7A7A")


def check_format(output: Path) -> None:
    """Refuse a file ending that cannot be drawn, before anything is read for it.

    Raises:
        UsageError: it is none of `SUFFIXES`.
    """
    if output.suffix.lower() not in SUFFIXES:
        ending = f"ends in {output.suffix!r}" if output.suffix else "has no ending"
        raise UsageError(f"the picture's name {ending}", path=str(output), expected=", ".join(SUFFIXES))


def save(figure: Figure, output: Path) -> None:
    """Write a picture as PNG, SVG or PDF; the same picture gives the same file.

    Raises:
        UsageError: the file's ending names no such format.
        OSError: the file cannot be written.
    """
    check_format(output)
    dateless = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(output.suffix.lower())
    figure.savefig(output, metadata=dateless)


def sheet(width: float, height: float, title: str, theme: Theme, caption: str = "") -> Figure:
    """An empty picture with its title above and a caption below, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=theme.paper)
    place = {"x": 0.1 / width, "y": 1 - 0.1 / height, "ha": "left"}
    figure.suptitle(plain(title), fontsize=11, fontweight="bold", color=theme.ink, **place)
    if caption:
        figure.supxlabel(caption, fontsize=8.5, color=theme.faint, y=0.1 / height, va="bottom")
    return figure


def margins(figure: Figure, left: float, right: float, bottom: float, top: float) -> None:
    """Room for the words around the panels, in inches; matplotlib's own layout takes longer than all the rest."""
    width, height = figure.get_size_inches()
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)


def frame(axes: Axes, theme: Theme, size: float) -> None:
    """Ticks and the two lines that a panel keeps, in the paper's colours."""
    axes.set_facecolor(theme.paper)
    axes.tick_params(which="both", labelsize=size, length=3, color=theme.line, labelcolor=theme.ink)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.line)


def plain(text: str) -> str:
    """Text of a file without anything that matplotlib would typeset or a font lacks."""
    from ggufkit.report.escape import shown

    return shown(text, limit=80).replace("$", r"\$")

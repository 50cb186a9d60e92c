"""Scales of blocks: what is counted where, and that an extreme one is seen."""

from __future__ import annotations

from pathlib import Path

import builder
import numpy as np
import pytest
from test_cli import ggufkit

from ggufkit import demo, plot, reader, stats
from ggufkit.errors import UsageError
from ggufkit.plot import scales


def measured(scale: list[float], folder: Path) -> list[stats.TensorStats]:
    file = builder.File()
    blocks = b"".join(np.float16(one).tobytes() + np.arange(32, dtype="i1").tobytes() for one in scale)
    file.tensor("blk.0.attn_q.weight", blocks, shape=(len(scale), 32), type="Q8_0")
    with reader.open(file.write(folder / "m.gguf")) as gguf:
        return [one for _, one in stats.scan(gguf) if isinstance(one, stats.TensorStats)]


def test_every_scale_is_counted_and_the_ends_are_exact(tmp_path: Path) -> None:
    (row,) = scales.rows(measured([1.0, 1.0, -1.0, 2.0, 1024.0, 0.0], tmp_path))
    assert row.counts.sum() == 5
    assert (row.smallest, row.largest, row.largest_block, row.n_zero) == (1, 1024, 4, 1)
    assert row.median == 1
    top = (row.first + row.counts.size - 1) / scales.PER_DECADE
    assert top == pytest.approx(np.log10(1024), abs=2 / scales.PER_DECADE)


def test_only_tensors_with_scales_have_rows() -> None:
    with reader.open(demo.MODEL) as gguf:
        found = scales.rows(one for _, one in stats.scan(gguf) if isinstance(one, stats.TensorStats))
    assert {row.type for row in found} == {"Q5_0", "Q4_K", "Q6_K", "Q8_0"}


def test_plain_floats_are_an_error() -> None:
    with pytest.raises(UsageError, match="scales"):
        scales.rows([])


def test_the_ends_are_drawn_as_points(tmp_path: Path) -> None:
    figure = scales.draw(scales.rows(measured([1.0, 1.0, 1000.0], tmp_path)), "title")
    assert [float(line.get_xdata()[0]) for line in figure.axes[0].lines] == [0.0, 3.0]  # type: ignore[index]


def test_what_is_not_finite_is_written_out(tmp_path: Path) -> None:
    figure = scales.draw(scales.rows(measured([1.0, np.nan, np.inf], tmp_path)), "title")
    assert [text.get_text() for text in figure.axes[0].texts] == ["2 NaN/Inf"]


@pytest.mark.parametrize("values", [[0.0, 0.0], [np.nan], [6e-8, 65504.0], [1.0]])
def test_odd_scales_are_drawn(tmp_path: Path, values: list[float]) -> None:
    plot.save(scales.draw(scales.rows(measured(values, tmp_path)), "title"), tmp_path / "s.png")


def test_the_command(tmp_path: Path) -> None:
    assert ggufkit("plot", demo.MODEL, "--kind", "scales", "-o", tmp_path / "s.pdf").exit_code == 0
    out = ggufkit("plot", demo.MODEL, "blk.*.ffn_down.weight", "--kind", "scales", "--terminal").stdout
    assert len([line for line in out.splitlines() if "ffn_down" in line]) == 5
    assert ggufkit("plot", demo.MODEL, "*.bias", "--kind", "scales").exit_code == 2

"""Strips over rotary pairs: which channel lands where, and that a pattern is drawn as one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_cli import ggufkit

from ggufkit import demo, plot, quants, reader, stats
from ggufkit.container import Tensor
from ggufkit.errors import UsageError
from ggufkit.plot import outliers


def of_demo(glob: str) -> list[outliers.Strips]:
    with reader.open(demo.MODEL) as gguf:
        chosen = {name: one for name, one in gguf.tensors.items() if one.name.endswith(glob)}

        def row_sizes(tensor: Tensor) -> np.ndarray:
            sizes = stats.measure(gguf, tensor, keep_rows=True).rows.absmax
            assert sizes is not None
            return sizes

        return outliers.strips(gguf, chosen, row_sizes)


@pytest.mark.parametrize(
    ("adjacent", "channel", "place"),
    [
        (False, 3, (0, 3)),
        (False, 4 + 3, (1, 3)),
        (False, 8 + 4 + 1, (1, 1)),  # the second head lies on the first
        (True, 6, (0, 3)),
        (True, 7, (1, 3)),
        (True, 8 + 3, (1, 1)),
    ],
)
def test_partners_are_aligned(adjacent: bool, channel: int, place: tuple[int, int]) -> None:
    bias = np.zeros(16)
    bias[channel] = -211.0
    strips = outliers.fold("attn_k.bias", {0: bias}, 8, adjacent=adjacent)
    assert strips.values.shape == (1, 2, 4)
    assert strips.values[0][place] == -211
    assert np.count_nonzero(strips.values) == 1


def test_of_the_heads_the_largest_is_shown_with_its_sign() -> None:
    strips = outliers.fold("attn_k.bias", {0: np.array([1.0, 2, -5, 4, 0, -3, 2, 9])}, 4)
    assert strips.values.tolist() == [[[1, -3], [-5, 9]]]


def test_the_demo_s_real_biases() -> None:
    (strips,) = of_demo("attn_k.bias")
    with reader.open(demo.MODEL) as gguf:
        tensor = gguf.tensors["blk.3.attn_k.bias"]
        assert tensor.type is not None
        bias = quants.dequantize(tensor.type, gguf.read(tensor))
    assert strips.layers == (0, 1, 2, 3, 4)
    assert strips.rotated
    assert np.abs(strips.values[3]).max() == np.abs(bias).max()


def test_what_is_not_rotated_is_shown_by_channel() -> None:
    (strips,) = of_demo("attn_v.bias")
    assert strips.values.shape[:2] == (5, 1)
    assert not strips.rotated


def test_rows_of_a_matrix() -> None:
    (strips,) = of_demo("attn_k.weight")
    assert strips.rotated
    assert (strips.values >= 0).all()


def test_channels_without_room_are_gathered() -> None:
    values = np.zeros(1000)
    values[999] = -7
    strips = outliers.fold("attn_v.bias", {0: values, 1: np.zeros(500)}, None)
    assert strips.values.shape == (2, 1, 64)
    assert strips.values[0, 0, -1] == -7
    assert np.isnan(strips.values[1, 0, -1])


def test_too_many_roles_are_an_error() -> None:
    with pytest.raises(UsageError, match="roles"):
        of_demo("")


def test_notes_name_value_and_pair() -> None:
    bias = np.zeros(16)
    bias[4 + 3] = -211.0
    grid = outliers.fold("attn_k.bias", {7: bias, 8: bias}, 8).grid()
    assert grid.rows == ("7", "", "8", "")
    assert grid.notes == ("-211 at 3", "", "-211 at 3", "")


@pytest.mark.parametrize("vector", [np.zeros(16), np.full(16, np.nan), np.r_[np.inf, np.zeros(15)]])
def test_odd_vectors_are_drawn(tmp_path: Path, vector: np.ndarray) -> None:
    plot.save(outliers.draw([outliers.fold("attn_k.bias", {0: vector}, 8)], "title"), tmp_path / "p.png")


def test_the_bars_above_are_the_largest_of_all_layers() -> None:
    layers = {layer: np.roll(np.r_[float(layer), np.zeros(7)], layer) for layer in (1, 2)}
    figure = outliers.draw([outliers.fold("attn_k.bias", layers, 8)], "title")
    heights = [[bar.get_height() for bar in bars] for bars in figure.axes[1].containers]  # type: ignore[union-attr]
    assert heights == [[0, 1, 2, 0], [0, 0, 0, 0]]


def test_the_command_without_options(tmp_path: Path) -> None:
    assert ggufkit("plot", demo.MODEL, "--kind", "outliers", "-o", tmp_path / "o.png").exit_code == 0
    out = ggufkit("plot", demo.MODEL, "--kind", "outliers", "--terminal").stdout
    assert "attn_k.bias: magnitude" in out
    assert "29.2" in out

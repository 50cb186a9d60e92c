"""The map of role × layer: what is in its cells, what is marked, and that it can be drawn."""

from __future__ import annotations

from pathlib import Path

import builder
import numpy as np
import pytest
from test_cli import ggufkit

from ggufkit import demo, plot, reader, stats
from ggufkit.plot import grid, layers
from ggufkit.report.text import grid as text
from ggufkit.report.text.style import console


def measured(path: Path) -> dict[str, stats.TensorStats]:
    with reader.open(path) as gguf:
        return {one.name: one for _, one in stats.scan(gguf) if isinstance(one, stats.TensorStats)}


@pytest.fixture(scope="module")
def haiku() -> dict[str, stats.TensorStats]:
    return measured(demo.MODEL)


def cell(drawn: grid.Grid, role: str, layer: int) -> float:
    return float(drawn.values[drawn.rows.index(role), layer])


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("absmax", lambda one: max(one.max.value, -one.min.value)),
        ("std", lambda one: one.std),
        ("kurtosis", lambda one: one.kurtosis),
        ("zeros", lambda one: 100 * one.n_zero / one.count),
    ],
)
def test_each_tensor_is_in_its_cell(haiku: dict[str, stats.TensorStats], measure: str, expected: object) -> None:
    drawn = layers.of_stats(haiku.values(), measure)
    assert drawn.columns == ("0", "1", "2", "3", "4")
    for layer in range(5):
        one = haiku[f"blk.{layer}.attn_k.bias"]
        assert cell(drawn, "attn_k.bias", layer) == expected(one)  # type: ignore[operator]


def test_a_tensor_outside_the_layers_is_a_bar(haiku: dict[str, stats.TensorStats]) -> None:
    drawn = layers.of_stats(haiku.values(), "std")
    assert set(drawn.values[drawn.rows.index("token_embd.weight")]) == {haiku["token_embd.weight"].std}


def test_roles_come_in_the_order_of_the_pass(haiku: dict[str, stats.TensorStats]) -> None:
    rows = layers.of_stats(haiku.values(), "std").rows
    assert rows[:4] == ("token_embd.weight", "attn_norm.weight", "attn_q.weight", "attn_q.bias")
    assert rows[-2:] == ("output_norm.weight", "output.weight")


def test_the_largest_of_a_row_is_written_beside_it() -> None:
    drawn = layers.arrange({"blk.0.x": 1.0, "blk.1.x": 211.4, "blk.2.x": 2.0}, "q", {}, logarithmic=True)
    assert drawn.notes == ("211 in 1",)


def test_bits_need_no_numbers() -> None:
    with reader.open(demo.MODEL) as gguf:
        drawn = layers.bits(gguf.tensors.values())
    assert cell(drawn, "ffn_down.weight", 0) == 6.5625  # Q6_K: 210 bytes for 256 weights
    assert cell(drawn, "attn_q.bias", 0) == 32


def test_what_was_found_is_marked_and_nan_marks_itself(tmp_path: Path) -> None:
    file = builder.File()
    file.tensor("blk.0.x", np.ones(4, "f4"))
    file.tensor("blk.1.x", np.array([1, np.nan, 2, 3], "f4"))
    found = layers.of_stats(
        measured(file.write(tmp_path / "m.gguf")).values(), "absmax", {"blk.0.x": "error", "y": "info"}
    )
    assert set(found.marks) == {grid.Mark(0, 0, "error"), grid.Mark(0, 1, "NaN or Inf")}


class TestScale:
    def grid(self, values: object) -> grid.Grid:
        cells = np.atleast_2d(np.array(values, float))
        return grid.Grid("q", "", "c", ("r",) * len(cells), tuple(map(str, range(cells.shape[1]))), cells)

    def test_it_spans_what_is_there(self) -> None:
        assert self.grid([0.1, 1, 10, 100]).limits() == (-1.0, 2.0)

    def test_one_that_is_far_away_does_not_flatten_the_others(self) -> None:
        low, high = self.grid([1, 2, 3, 4, 5, 6, 7, 1e30]).limits()
        assert low == 0
        assert high < 4

    @pytest.mark.parametrize("values", [[1.0], [3.0, 3.0], [0.0, 1.0], [np.nan, np.nan], [0.0, 0.0], [np.inf, 1.0]])
    def test_odd_maps_are_drawn(self, tmp_path: Path, values: list[float]) -> None:
        drawn = self.grid(values)
        low, high = drawn.limits()
        assert low < high
        plot.save(grid.draw([drawn], "title"), tmp_path / "m.png")
        with (tmp_path / "m.txt").open("w") as file:
            text.grid(console(file), drawn)


class TestPaper:
    def test_numbers_labels_and_marks_are_drawn(self) -> None:
        drawn = layers.arrange({"blk.0.x": 1.0, "blk.1.x": 10.0}, "size", {"blk.1.x": "error"}, logarithmic=True)
        figure = grid.draw([drawn], "the title", "the caption")
        axes = figure.axes[0]
        assert np.array(axes.images[0].get_array()).tolist() == [[0.0, 1.0]]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["x"]
        assert axes.collections[-1].get_offsets().tolist() == [[1.0, 0.0]]  # type: ignore[union-attr]
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["error"]

    def test_dark_is_dark(self) -> None:
        drawn = layers.arrange({"blk.0.x": 1.0}, "size", {}, logarithmic=True)
        assert sum(grid.draw([drawn], "title", theme=plot.DARK).get_facecolor()[:3]) < 0.5


class TestTerminal:
    def rendered(self, drawn: grid.Grid, folder: Path, width: int) -> str:
        with (folder / "out.txt").open("w+", encoding="utf-8") as file:
            target = console(file)
            target.width = width
            text.grid(target, drawn)
            file.seek(0)
            return file.read()

    def test_a_row_a_role_with_its_mark(self, tmp_path: Path) -> None:
        drawn = layers.arrange({"blk.0.x": 1.0, "blk.1.x": 1000.0}, "size", {"blk.1.x": "error"}, logarithmic=True)
        (line,) = [line for line in self.rendered(drawn, tmp_path, 80).splitlines() if line.startswith("x")]
        assert line == "x  ░░░✗██  1e+03 in 1"

    def test_columns_without_room_show_the_largest(self, tmp_path: Path) -> None:
        values = {f"blk.{layer}.x": 1.0 for layer in range(400)} | {"blk.301.x": 1000.0}
        out = self.rendered(layers.arrange(values, "size", {}, logarithmic=True), tmp_path, 80)
        assert out.splitlines()[2].count("█") == 1
        assert max(map(len, out.splitlines())) <= 80


class TestCommand:
    def test_a_picture_and_its_marks_from_one_pass(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        passes = []
        scan = stats.scan
        monkeypatch.setattr(stats, "scan", lambda *args, **rest: passes.append(1) or scan(*args, **rest))
        target = tmp_path / "map.svg"
        assert ggufkit("plot", demo.MODEL, "--kind", "layers", "--findings", "-o", target).exit_code == 0
        assert target.stat().st_size > 1000
        assert len(passes) == 1

    def test_bits_are_not_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stats, "scan", None)
        result = ggufkit("plot", demo.MODEL, "--kind", "layers", "--measure", "bits", "--terminal")
        assert "bits per weight" in result.stdout

    def test_a_glob_chooses_rows(self) -> None:
        out = ggufkit("plot", demo.MODEL, "*.bias", "--kind", "layers", "--terminal").stdout
        assert "attn_v.bias" in out
        assert "ffn_up" not in out

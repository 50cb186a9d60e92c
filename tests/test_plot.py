"""Histograms: what is counted, and that it can be drawn."""

from __future__ import annotations

from pathlib import Path

import builder
import numpy as np
import pytest

from ggufkit import plot, reader
from ggufkit.errors import NewerThanTool, UsageError
from ggufkit.plot import bars, histogram
from ggufkit.report.text import plot as text
from ggufkit.report.text.style import console


def counted(values: np.ndarray, folder: Path) -> histogram.Histogram:
    file = builder.File()
    file.tensor("blk.0.attn_k.bias", values)
    with reader.open(file.write(folder / "one.gguf")) as gguf:
        return histogram.histogram(gguf, gguf.tensors["blk.0.attn_k.bias"])


def normal(n: int = 20_000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n).astype("f4")


def test_every_finite_value_is_counted_once(tmp_path: Path) -> None:
    values = normal()
    one = counted(values, tmp_path)
    expected, _ = np.histogram(values.astype("f8"), one.edges)
    assert one.counts.sum() == one.n == values.size
    assert np.abs(one.counts - expected).sum() <= 2  # a value on an edge may fall on either side
    assert (one.minimum, one.maximum) == (values.min(), values.max())


def test_quantiles_and_bounds(tmp_path: Path) -> None:
    values = 3 + 2 * normal()
    one = counted(values, tmp_path)
    assert one.median == pytest.approx(np.median(values), rel=0.01)
    assert one.deviation == pytest.approx(2, rel=0.03)
    assert (one.low, one.high) == (one.median - 6 * one.deviation, one.median + 6 * one.deviation)


def test_outliers_are_found_with_index_and_value(tmp_path: Path) -> None:
    values = normal(512).reshape(16, 32)
    values[3, 5], values[7, 0] = -211.0, 40.0
    one = counted(values, tmp_path)
    assert one.n_outliers == 2
    assert one.outliers == (((3, 5), -211.0), ((7, 0), 40.0))


def test_a_far_value_bends_the_axis_and_the_bulk_stays_visible(tmp_path: Path) -> None:
    values = normal()
    values[0] = 1000.0
    bent, straight = counted(values, tmp_path), counted(values[1:], tmp_path)
    assert bent.bent
    assert not straight.bent
    assert (bent.counts[(bent.edges[:-1] > -3) & (bent.edges[1:] < 3)] > 0).sum() > 20


def test_a_value_off_the_paper_is_an_arrow(tmp_path: Path) -> None:
    values = normal()
    values[17] = 1e30
    one = counted(values, tmp_path)
    assert (one.n_above, one.n_below) == (1, 0)
    assert one.edges[-1] < 1e7
    assert one.outliers[0] == ((17,), np.float32(1e30))
    assert one.counts.sum() == values.size - 1


def test_what_is_not_finite_is_counted_apart(tmp_path: Path) -> None:
    values = normal(1000)
    values[:3], values[3:5], values[5] = np.nan, np.inf, -np.inf
    one = counted(values, tmp_path)
    assert (one.n_nan, one.n_inf, one.counts.sum()) == (3, 3, 994)
    assert np.isfinite([one.minimum, one.maximum, one.median, one.deviation]).all()


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(64, "f4"),
        np.full(64, -3.5, "f4"),
        np.full(64, np.nan, "f4"),
        np.ones(1, "f4"),
        np.array([0, 0, 0, 0, 0, 0, 0, 1e-30], "f4"),
        np.array([-3e38, 3e38, 0, 0, 1e-40, 0, 0, 0], "f4"),
    ],
)
def test_odd_tensors_are_counted_and_drawn(tmp_path: Path, values: np.ndarray) -> None:
    one = counted(values, tmp_path)
    assert one.counts.sum() + one.n_nan + one.n_inf + one.n_below + one.n_above == values.size
    assert (np.diff(one.edges) > 0).all()
    plot.save(bars.draw([one], "title"), tmp_path / "one.png")
    text.histograms(console(open(tmp_path / "out.txt", "w")), [one])  # noqa: SIM115, PTH123


def test_pieces_are_counted_like_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal(1000).reshape(10, 100)
    values[9, 99] = 500
    whole = counted(values, tmp_path)
    monkeypatch.setattr(histogram, "_CHUNK", 96)
    pieces = counted(values, tmp_path)
    assert (pieces.counts == whole.counts).all()
    assert pieces.outliers == whole.outliers


def test_quantized_tensors(tmp_path: Path) -> None:
    file = builder.File()
    blocks = b"".join(np.float16(1).tobytes() + np.arange(-16, 16, dtype="i1").tobytes() for _ in range(4))
    file.tensor("w", blocks, shape=(4, 32), type="Q8_0")
    with reader.open(file.write(tmp_path / "q.gguf")) as gguf:
        one = histogram.histogram(gguf, gguf.tensors["w"])
    assert (one.minimum, one.maximum, one.n) == (-16, 15, 128)


def test_a_type_that_is_not_known_says_so(tmp_path: Path) -> None:
    file = builder.File()
    file.tensor("w", bytes(64), shape=(2, 32), type=77)
    with reader.open(file.write(tmp_path / "new.gguf")) as gguf, pytest.raises(NewerThanTool, match="77"):
        histogram.histogram(gguf, gguf.tensors["w"])


class TestMatching:
    @pytest.mark.parametrize(
        ("globs", "expected"),
        [
            (["blk.0.attn_q.bias"], ["blk.0.attn_q.bias"]),
            (["blk.*.attn_[qk].bias"], [f"blk.{n}.attn_{x}.bias" for n in (0, 1) for x in "qk"]),
            (["output.weight", "output.weight", "blk.1.attn_v.bias"], ["output.weight", "blk.1.attn_v.bias"]),
        ],
    )
    def test_globs(self, tmp_path: Path, globs: list[str], expected: list[str]) -> None:
        with reader.open(builder.model().write(tmp_path / "m.gguf")) as gguf:
            assert [tensor.name for tensor in histogram.matching(gguf, globs)] == expected

    def test_without_any_the_first_layer_and_what_is_outside(self, tmp_path: Path) -> None:
        with reader.open(builder.model().write(tmp_path / "m.gguf")) as gguf:
            names = {tensor.name for tensor in histogram.matching(gguf, [])}
        assert {"token_embd.weight", "blk.0.attn_q.bias"} <= names
        assert not any(name.startswith("blk.1.") for name in names)

    @pytest.mark.parametrize("glob", ["blk.7.*", "attn"])
    def test_no_match_is_an_error(self, tmp_path: Path, glob: str) -> None:
        with (
            reader.open(builder.model().write(tmp_path / "m.gguf")) as gguf,
            pytest.raises(UsageError, match="no tensor matches"),
        ):
            histogram.matching(gguf, [glob])

    def test_too_many_are_an_error(self, tmp_path: Path) -> None:
        with (
            reader.open(builder.model(n_layer=6).write(tmp_path / "m.gguf")) as gguf,
            pytest.raises(UsageError, match="fit into one picture"),
        ):
            histogram.matching(gguf, ["*"])


class TestPictures:
    @pytest.mark.parametrize(
        ("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")]
    )
    def test_the_ending_decides(self, tmp_path: Path, suffix: str, magic: bytes) -> None:
        target = tmp_path / f"p{suffix}"
        plot.save(bars.draw([counted(normal(100), tmp_path)], "title"), target)
        assert target.read_bytes().startswith(magic)

    @pytest.mark.parametrize("name", ["p.jpg", "p", "p.png.txt"])
    def test_other_endings_are_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UsageError, match=r"ending|ends"):
            plot.check_format(tmp_path / name)

    def test_the_same_numbers_give_the_same_picture(self, tmp_path: Path) -> None:
        one = counted(normal(100), tmp_path)
        for name in ("a.pdf", "b.pdf"):
            plot.save(bars.draw([one], "title"), tmp_path / name)
        assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()

    def test_hostile_names_are_text(self, tmp_path: Path) -> None:
        file = builder.File()
        file.tensor("$\\frac{\x1b[31m$ <script>", normal(64))
        with reader.open(file.write(tmp_path / "m.gguf")) as gguf:
            (tensor,) = gguf.tensors.values()
            one = histogram.histogram(gguf, tensor)
        plot.save(bars.draw([one, one], "$\\x$"), tmp_path / "p.svg")
        assert "<script>" not in (tmp_path / "p.svg").read_text()

    def test_the_furthest_values_are_written_out(self, tmp_path: Path) -> None:
        values = normal(256)
        values[31] = -211
        figure = bars.draw([counted(values, tmp_path)], "title")
        written = [text.get_text() for text in figure.axes[0].texts]
        assert any("-211 [31]" in label for label in written)

    def test_small_multiples(self, tmp_path: Path) -> None:
        one = counted(normal(64), tmp_path)
        figure = bars.draw([one] * 5, "title")
        assert sum(panel.axison for panel in figure.axes) == 5


class TestTerminal:
    def rendered(self, drawn: list[histogram.Histogram], folder: Path, width: int) -> str:
        with (folder / "out.txt").open("w+", encoding="utf-8") as file:
            target = console(file)
            target.width = width
            text.histograms(target, drawn)
            file.seek(0)
            return file.read()

    def test_one_is_a_chart_with_its_outliers_named(self, tmp_path: Path) -> None:
        values = normal(256)
        values[31] = -211
        out = self.rendered([counted(values, tmp_path)], tmp_path, 80)
        assert "1 outside" in out
        assert "-211 [31]" in out
        assert "█" in out
        assert max(map(len, out.splitlines())) <= 80

    def test_several_are_a_line_each(self, tmp_path: Path) -> None:
        out = self.rendered([counted(normal(256, seed), tmp_path) for seed in range(3)], tmp_path, 80)
        assert len([line for line in out.splitlines() if "blk.0.attn_k.bias" in line]) == 3
        assert max(map(len, out.splitlines())) <= 80

"""Pictures of traces: activations, the error between two, and the rows of a head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_cli import ggufkit

from ggufkit import demo, plot, reader, runtime
from ggufkit.compare import compare
from ggufkit.errors import UsageError
from ggufkit.plot import activations, attention, grid
from ggufkit.runtime import record
from ggufkit.trace import Trace


@pytest.fixture(scope="module")
def haiku() -> Trace:
    with reader.open(demo.MODEL) as gguf:
        return record.record(runtime.load(gguf, "reference"), record.Plan([1, 5, 9, 30, 7]))


@pytest.fixture(scope="module")
def stored(haiku: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "t.safetensors"
    haiku.save(path)
    with_error(haiku, "l_out-1").save(path.with_name("wrong.safetensors"))
    return path


def with_error(trace: Trace, *names: str) -> Trace:
    return replace(trace, arrays={name: one * 2 if name in names else one for name, one in trace.arrays.items()})


def at(drawn: grid.Grid, row: str, column: int) -> float:
    return float(drawn.values[drawn.rows.index(row), column])


class TestSizes:
    def test_each_step_and_layer(self, haiku: Trace) -> None:
        rms, absmax = activations.sizes(haiku.arrays)
        step = haiku.arrays["l_out-3"].astype("f8")
        assert at(rms, "l_out", 3) == pytest.approx(np.median(np.sqrt(np.mean(step**2, axis=1))))
        assert at(absmax, "l_out", 3) == np.abs(step).max()
        assert (rms.rows[0], rms.rows[-1]) == ("embd", "result_output")

    def test_a_sink_is_in_the_absmax_alone(self) -> None:
        step = np.ones((5, 4), "f4")
        step[0] = 1000
        rms, absmax = activations.sizes({"l_out-0": step})
        assert (at(rms, "l_out", 0), at(absmax, "l_out", 0)) == (1, 1000)

    def test_scores_of_later_keys_do_not_count(self) -> None:
        scores = np.where(np.tri(3, dtype=bool), 2.0, np.nan)[:, None].astype("f4")
        rms, absmax = activations.sizes({"kq-0": scores})
        assert (at(rms, "kq", 0), at(absmax, "kq", 0), rms.marks) == (2, 2, ())

    def test_what_is_not_finite_is_marked(self) -> None:
        bad = np.ones((2, 4), "f4")
        bad[1, 2] = np.inf
        rms, _ = activations.sizes({"l_out-0": np.ones((2, 4), "f4"), "l_out-1": bad})
        assert rms.marks == (grid.Mark(0, 1, "NaN or Inf"),)

    def test_layers_that_are_not_there_have_no_column(self) -> None:
        rms, _ = activations.sizes({"l_out-7": np.ones((2, 4), "f4"), "l_out-20": np.ones((2, 4), "f4")})
        assert rms.columns == ("7", "20")

    def test_no_step_is_an_error(self) -> None:
        with pytest.raises(UsageError, match="no step"):
            activations.sizes({})


class TestErrors:
    def test_the_first_divergence_is_marked(self, haiku: Trace) -> None:
        drawn = activations.errors(compare(with_error(haiku, "q_rope-2", "l_out-3"), haiku))
        assert drawn.marks == (grid.Mark(drawn.rows.index("q_rope"), 2, "error"),)
        assert at(drawn, "q_rope", 2) == pytest.approx(1, rel=1e-3)
        assert at(drawn, "q_rope", 1) < 1e-8

    def test_and_named_on_paper(self, haiku: Trace) -> None:
        figure = activations.draw_errors(compare(with_error(haiku, "q_rope-2", "l_out-3"), haiku), "title")
        axes = figure.axes[0]
        assert "first: q_rope-2" in axes.texts[0].get_text()
        assert len(axes.lines[0].get_ydata()) == len(haiku.arrays)  # type: ignore[arg-type]
        assert axes.get_legend_handles_labels()[1] == ["bit for bit the same", "diverged"]

    def test_two_that_agree_have_no_mark(self, haiku: Trace) -> None:
        assert not activations.draw_errors(compare(haiku, haiku), "title").axes[0].texts

    def test_nothing_in_common_is_an_error(self, haiku: Trace) -> None:
        none = replace(haiku, arrays={})
        with pytest.raises(UsageError, match="in common"):
            activations.draw_errors(compare(haiku, none), "title")


class TestAttention:
    def test_the_rows_of_the_head(self, haiku: Trace) -> None:
        drawn = attention.head(haiku.arrays, layer=2, head=1)
        expected = haiku.arrays["kq_soft_max-2"][:, 1]
        seen = np.tri(5, dtype=bool)
        assert np.array_equal(drawn.values[seen], expected[seen])
        assert np.isnan(drawn.values[~seen]).all()
        assert drawn.marks == ()
        assert "every row adds up to 1" in attention.caption(drawn)

    @pytest.mark.parametrize(
        ("place", "value", "mark"),
        [
            ((2, 0), 0.9, grid.Mark(2, 2, "error")),
            ((1, 3), 0.2, grid.Mark(1, 3, "error")),
            ((3, 1), np.nan, grid.Mark(3, 1, "NaN or Inf")),
        ],
        ids=["sum", "future", "nan"],
    )
    def test_a_row_that_is_wrong_is_marked(self, place: tuple[int, int], value: float, mark: grid.Mark) -> None:
        rows = np.tri(4) / np.arange(1, 5)[:, None]
        rows[place] = value
        drawn = attention.head({"kq_soft_max-0": rows[:, None].astype("f4")})
        assert drawn.marks == (mark,)
        assert attention.caption(drawn).startswith("1 of 4 rows")

    def test_positions_count_from_the_trace_s_first(self) -> None:
        drawn = attention.head({"kq_soft_max-0": np.full((2, 1, 4), 0.25, "f4")}, first_position=3)
        assert drawn.rows == ("3", "4")

    @pytest.mark.parametrize("which", [{"layer": 9}, {"head": 99}])
    def test_what_is_not_there_is_an_error(self, haiku: Trace, which: dict[str, int]) -> None:
        with pytest.raises(UsageError):
            attention.head(haiku.arrays, **which)


class TestCommand:
    def test_a_trace_alone(self, stored: Path, tmp_path: Path) -> None:
        assert ggufkit("plot", stored, "-o", tmp_path / "a.png").exit_code == 0
        assert "absmax" in ggufkit("plot", stored, "--terminal").stdout

    def test_against_another(self, stored: Path, tmp_path: Path) -> None:
        args = ("plot", stored.with_name("wrong.safetensors"), "--against", stored)
        assert ggufkit(*args, "-o", tmp_path / "e.png", "--dark").exit_code == 0
        assert "✗ error" in ggufkit(*args, "--terminal").stdout

    def test_attention(self, stored: Path, tmp_path: Path) -> None:
        args = ("plot", stored, "--kind", "attention")
        assert ggufkit(*args, "-o", tmp_path / "a.svg", "--head", 2).exit_code == 0
        assert "layer 0, head 0" in ggufkit(*args, "--terminal").stdout
        assert ggufkit(*args, "--head", 77).exit_code == 2

    def test_a_kind_that_needs_the_other_sort_of_file(self, stored: Path) -> None:
        assert ggufkit("plot", demo.MODEL, "--kind", "attention").exit_code == 2
        assert ggufkit("plot", stored, "--kind", "layers").exit_code != 0


def test_a_long_trace_is_drawn(tmp_path: Path) -> None:
    rows = np.tri(600) / np.arange(1, 601)[:, None]
    drawn = attention.head({"kq_soft_max-0": rows[:, None].astype("f4")})
    plot.save(grid.draw([drawn], "title"), tmp_path / "a.png")

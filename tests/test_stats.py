"""One pass over a tensor: against NumPy in float64 on the dequantized values, and both ways of scanning against each
other."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builder import File

import ggufkit.reader
from ggufkit import quants, stats
from ggufkit.container import GGUF
from ggufkit.errors import FormatError, GgufkitError, NewerThanTool, Unsupported
from ggufkit.quants import BY_NAME, TYPES, QuantType
from ggufkit.quants.fingerprint import MARKS, marked
from ggufkit.stats import TensorStats, stream
from ggufkit.stats.chunk import CHUNK_BYTES, chunks
from ggufkit.stats.runs import ByteRuns, Runs

DECODABLE = [qtype for qtype in TYPES.values() if qtype.decodable]
BLOCKS = [qtype for qtype in DECODABLE if qtype.is_block]

BOTH = pytest.mark.parametrize("compiled", [False, True], ids=["numpy", "compiled"])


def by_name(qtype: QuantType) -> str:
    return qtype.name


def weights(qtype: QuantType, rows: int, length: int, seed: int = 3) -> np.ndarray:
    """Packed rows that look like weights: random codes, scales of a healthy size. uint8 [rows, bytes]."""
    rng = np.random.default_rng(seed)
    if not qtype.is_block:
        values = rng.normal(0.0, 0.05, (rows, length))
        if qtype.name == "BF16":
            return (values.astype("<f4").view("<u4") >> 16).astype("<u2").view(np.uint8)
        dtype = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}.get(qtype.name)
        if dtype is not None:
            return values.astype(dtype).view(np.uint8)
        return rng.integers(-100, 100, (rows, length)).astype(f"<i{qtype.type_size}").view(np.uint8)
    raw = rng.integers(0, 256, (rows * (length // qtype.block_size), qtype.type_size), dtype=np.uint8)
    for at in (qtype.d, qtype.dmin):
        if at is not None and qtype.name != "Q8_K":
            raw[:, at : at + 2] = rng.uniform(0.5, 1, (len(raw), 1)).astype("<f2").view(np.uint8)
    if qtype.name == "Q8_K":
        raw[:, :4] = rng.uniform(0.5, 1, (len(raw), 1)).astype("<f4").view(np.uint8)
    if qtype.name == "MXFP4":
        raw[:, 0] = rng.integers(118, 124, len(raw))
    if qtype.name == "IQ1_M":
        raw[:, [49, 51, 53, 55]] &= 0x0F  # the f16 scale lies in these nibbles: 0x2c66 is 0.0687
        raw[:, [49, 51, 53, 55]] |= np.array([0x60, 0x60, 0xC0, 0x20], np.uint8)
    return raw.reshape(rows, -1)


def one_tensor(path: Path, qtype: QuantType | str, raw: np.ndarray, shape: tuple[int, ...], big: bool = False) -> GGUF:
    """A file with the one tensor `w`."""
    qtype = BY_NAME[qtype] if isinstance(qtype, str) else qtype
    file = File(big=big)
    file.tensor("w", raw.tobytes(), shape=shape, type=qtype.id)
    return ggufkit.reader.open(file.write(path / "w.gguf"))


def measure(gguf: GGUF, compiled: bool, **options: Any) -> TensorStats:
    return stats.measure(gguf, gguf.tensors["w"], compiled=compiled, **options)


def floats(path: Path, values: Any, compiled: bool = False, **options: Any) -> TensorStats:
    """Statistics of an F32 tensor."""
    values = np.asarray(values, np.float32)
    return measure(one_tensor(path, "F32", values, values.shape), compiled, **options)


def difference(found: Any, wanted: Any, path: str = "") -> str | None:
    """Where two results differ: exactly, but for the moments, which may do so in the tenth digit."""
    if dataclasses.is_dataclass(found):
        parts = (
            difference(getattr(found, f.name), getattr(wanted, f.name), f"{path}.{f.name}")
            for f in dataclasses.fields(found)
        )
        return next((part for part in parts if part), None)
    if isinstance(found, tuple):
        if len(found) != len(wanted):
            return path
        parts = (difference(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(found, wanted, strict=True)))
        return next((part for part in parts if part), None)
    if isinstance(found, np.ndarray):
        return None if np.array_equal(found, wanted, equal_nan=found.dtype.kind == "f") else path
    if path.removeprefix(".") in ("mean", "std", "skewness", "kurtosis"):
        return None if np.isclose(found, wanted, rtol=1e-9, atol=1e-12, equal_nan=True) else path
    same = found == wanted or (isinstance(found, float) and math.isnan(found) and math.isnan(wanted))
    return None if same else f"{path}: {found} and {wanted}"


class TestAgainstNumPy:
    """Every type, both ways, against float64 on the values that `dequantize` gives."""

    @BOTH
    @pytest.mark.parametrize("qtype", DECODABLE, ids=by_name)
    def test_values(self, qtype: QuantType, compiled: bool, tmp_path: Path):
        raw = weights(qtype, 40, 512)
        found = measure(one_tensor(tmp_path, qtype, raw, (40, 512)), compiled)
        values = quants.dequantize(qtype, raw).reshape(-1)
        wide = values.astype(np.float64)
        central = wide - wide.mean()
        assert (found.count, found.n_nan, found.n_inf) == (40 * 512, 0, 0)
        assert found.n_zero == np.count_nonzero(values == 0)
        assert (found.min.value, found.min.index) == (values.min(), values.argmin())
        assert (found.max.value, found.max.index) == (values.max(), values.argmax())
        # dequantizing rounds to float32, the sums do not; without a min, and with an f16 scale, nothing is rounded
        near = 1e-8 if qtype.has_min or qtype.name == "Q8_K" else 1e-9
        variance = (central**2).mean()
        assert found.mean == pytest.approx(wide.mean(), abs=near * wide.std())
        assert found.std == pytest.approx(math.sqrt(variance), rel=near)
        assert found.skewness == pytest.approx((central**3).mean() / variance**1.5, abs=near)
        assert found.kurtosis == pytest.approx((central**4).mean() / variance**2, rel=near)

    @BOTH
    @pytest.mark.parametrize("qtype", DECODABLE, ids=by_name)
    def test_histogram_and_rows(self, qtype: QuantType, compiled: bool, tmp_path: Path):
        raw = weights(qtype, 40, 512)
        found = measure(one_tensor(tmp_path, qtype, raw, (40, 512)), compiled, keep_rows=True)
        values = quants.dequantize(qtype, raw)
        edges = found.histogram.edges
        for counts, side in ((found.histogram.positive, values > 0), (found.histogram.negative, values < 0)):
            np.testing.assert_array_equal(counts, np.histogram(np.abs(values[side]), [*edges[:-1], np.inf])[0])
        assert found.histogram.total + found.n_zero == found.count
        np.testing.assert_array_equal(found.rows.absmax, np.abs(values).max(axis=1))
        np.testing.assert_allclose(found.rows.rms, np.sqrt((values.astype(float) ** 2).mean(axis=1)), rtol=1e-6)
        assert found.rows.median == pytest.approx(np.median(np.log2(found.rows.rms)), abs=0.1)
        largest = np.argsort(-found.rows.rms, kind="stable")[0]
        assert found.rows.largest[0].row == largest
        assert len(found.rows.largest) == len(found.rows.smallest) == 8

    @BOTH
    @pytest.mark.parametrize("qtype", BLOCKS, ids=by_name)
    def test_scales_and_mins(self, qtype: QuantType, compiled: bool, tmp_path: Path):
        raw = weights(qtype, 8, 512)
        found = measure(one_tensor(tmp_path, qtype, raw, (8, 512)), compiled)
        blocks = raw.reshape(-1, qtype.type_size)
        assert (found.mins is not None) == qtype.has_min
        for series, at in ((found.scales, qtype.d), (found.mins, qtype.dmin)):
            if series is None:
                continue
            stored = quants.unpack(qtype, blocks).scales.reshape(-1)
            if qtype.name == "Q8_K":
                stored = blocks[:, :4].copy().view("<f4")[:, 0]
            elif at is not None:
                stored = blocks[:, at : at + 2].copy().view("<f2")[:, 0].astype(np.float32)
            proper = np.abs(stored[stored != 0])
            assert series.count == len(stored)
            assert (series.n_zero, series.n_negative) == (np.sum(stored == 0), np.sum(stored < 0))
            assert (series.largest.value, series.smallest.value) == (proper.max(), proper.min())
            assert series.largest.index == np.abs(stored).argmax() // series.per_block
            assert series.histogram.total == len(proper)

    @BOTH
    @pytest.mark.parametrize("name", sorted(MARKS))
    def test_marks(self, name: str, compiled: bool, tmp_path: Path):
        qtype = BY_NAME[name]
        raw = weights(qtype, 64, 512)
        found = measure(one_tensor(tmp_path, qtype, raw, (64, 512)), compiled).marks
        flags = marked(qtype, raw.reshape(-1, qtype.type_size))
        assert found is not None
        assert flags is not None
        without = np.flatnonzero(~flags)
        assert (found.count, found.n_without) == (len(flags), len(without))
        assert (found.first_without, found.last_without) == (without[0], without[-1])
        assert found.longest_run == Runs.of(~flags).span


class TestBothWays:
    """The compiled pass and NumPy find the same, whatever the bytes; so does any number of threads."""

    @pytest.mark.parametrize("qtype", DECODABLE, ids=by_name)
    def test_random_bytes(self, qtype: QuantType, tmp_path: Path):
        rng = np.random.default_rng(11)
        raw = rng.integers(0, 256, (30, 768 // qtype.block_size * qtype.type_size), dtype=np.uint8)
        raw[7:9] = 0
        raw[20] = raw[19]
        gguf = one_tensor(tmp_path, qtype, raw, (30, 768))
        assert difference(measure(gguf, True), measure(gguf, False)) is None

    @pytest.mark.parametrize("shape", [(), (1,), (31,), (7, 33), (3, 5, 40), (2, 3, 4, 5), (200, 1)])
    def test_odd_shapes(self, shape: tuple[int, ...], tmp_path: Path):
        values = np.random.default_rng(0).normal(size=shape).astype("<f4")
        gguf = one_tensor(tmp_path, "F32", values, shape)
        found = measure(gguf, True)
        assert difference(found, measure(gguf, False)) is None
        assert found.min.value == values.min()
        assert found.coordinates(found.min.index) == np.unravel_index(values.argmin(), shape)

    @BOTH
    @pytest.mark.parametrize("name", ["F32", "Q5_0", "Q4_K"])
    def test_threads_and_order(self, name: str, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("ggufkit.stats.chunk.CHUNK_BYTES", 3000)
        qtype = BY_NAME[name]
        gguf = one_tensor(tmp_path, qtype, weights(qtype, 60, 1024), (60, 1024))
        found = [next(stats.scan(gguf, threads=threads, compiled=compiled))[1] for threads in (1, 3, 8)]
        found.append(measure(gguf, compiled))
        assert all(dataclasses.astuple(one)[10:14] == dataclasses.astuple(found[0])[10:14] for one in found)
        assert [difference(one, found[0]) for one in found] == [None] * 4

    @pytest.mark.parametrize("name", ["F32", "Q8_0"])
    def test_a_row_longer_than_a_chunk(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        qtype = BY_NAME[name]
        raw = weights(qtype, 2, 4096)
        gguf = one_tensor(tmp_path, qtype, raw, (2, 4096))
        whole = measure(gguf, False, keep_rows=True)
        monkeypatch.setattr("ggufkit.stats.chunk.CHUNK_BYTES", 1500)
        for compiled in (False, True):
            found = measure(gguf, compiled, keep_rows=True)
            np.testing.assert_array_equal(found.rows.absmax, whole.rows.absmax)
            np.testing.assert_allclose(found.rows.rms, whole.rows.rms, rtol=1e-6)
            assert (found.rows.count, found.rows.length) == (2, 4096)
            assert difference(found.histogram, whole.histogram) is None
            assert (found.min, found.max) == (whole.min, whole.max)

    @pytest.mark.parametrize("name", ["F16", "Q5_1", "Q6_K"])
    def test_big_endian(self, name: str, tmp_path: Path):
        qtype = BY_NAME[name]
        raw = weights(qtype, 10, 512)
        little = measure(one_tensor(tmp_path, qtype, raw, (10, 512)), False)
        big = one_tensor(tmp_path, qtype, quants.to_little(qtype, raw), (10, 512), big=True)
        assert all(difference(measure(big, compiled), little) is None for compiled in (False, True))


class TestNotFinite:
    @BOTH
    def test_counts_and_places(self, compiled: bool, tmp_path: Path):
        values = np.ones((10, 64), np.float32)
        values[3, 5], values[4, 6], values[9, 63] = np.nan, -np.inf, np.nan
        found = floats(tmp_path, values, compiled)
        assert (found.n_nan, found.n_inf, found.n_finite) == (2, 1, 637)
        assert found.coordinates(found.first_nan) == (3, 5)
        assert found.coordinates(found.first_inf) == (4, 6)
        assert found.rows.n_nonfinite == 3
        assert found.blocks.n_nonfinite == 3

    @BOTH
    def test_the_rest_is_not_poisoned(self, compiled: bool, tmp_path: Path):
        qtype = BY_NAME["Q4_0"]
        raw = weights(qtype, 10, 512)
        values = quants.dequantize(qtype, raw)
        raw.reshape(-1, 18)[37, :2] = np.array([np.nan], "<f2").view(np.uint8)
        found = measure(one_tensor(tmp_path, qtype, raw, (10, 512)), compiled)
        rest = np.delete(values.reshape(-1, 32), 37, axis=0).astype(np.float64)
        assert (found.n_nan, found.first_nan) == (32, 37 * 32)
        assert found.std == pytest.approx(rest.std(), rel=1e-9)
        assert found.histogram.total + found.n_zero == rest.size
        assert (found.scales.n_nan, found.scales.first_nonfinite) == (1, 37)
        assert found.scales.first_nonfinite_offset == 37 * 18

    @BOTH
    def test_k_block_scale_offset_points_at_the_field(self, compiled: bool, tmp_path: Path):
        qtype = BY_NAME["Q6_K"]
        raw = weights(qtype, 2, 512)
        raw.reshape(-1, 210)[2, 208:] = np.array([np.inf], "<f2").view(np.uint8)
        found = measure(one_tensor(tmp_path, qtype, raw, (2, 512)), compiled).scales
        assert (found.n_inf, found.first_nonfinite, found.first_nonfinite_offset) == (1, 2, 2 * 210 + 208)

    @BOTH
    def test_nothing_finite_at_all(self, compiled: bool, tmp_path: Path):
        found = floats(tmp_path, np.full((4, 32), np.nan), compiled)
        assert (found.min, found.max, found.absmax) == (None, None, None)
        assert math.isnan(found.mean)
        assert math.isnan(found.std)
        assert found.histogram.total == 0

    @BOTH
    def test_an_overflow_while_dequantizing_is_infinite(self, compiled: bool, tmp_path: Path):
        raw = np.full((1, 17), 0x72, np.uint8)  # codes 2 and 12
        raw[0, 0] = 254  # 2^126
        found = measure(one_tensor(tmp_path, "MXFP4", raw, (1, 32)), compiled)
        assert (found.n_inf, found.n_finite, found.max.value) == (16, 16, 2.0**127)


class TestMoments:
    @BOTH
    def test_far_from_zero(self, compiled: bool, tmp_path: Path):
        values = (1 + np.random.default_rng(1).normal(0, 1e-3, 4096)).astype(np.float32)
        found, wide = floats(tmp_path, values, compiled), values.astype(np.float64)
        central = wide - wide.mean()
        assert found.std == pytest.approx(wide.std(), rel=1e-9)
        assert found.kurtosis == pytest.approx((central**4).mean() / (central**2).mean() ** 2, rel=1e-9)

    @BOTH
    def test_of_a_constant(self, compiled: bool, tmp_path: Path):
        found = floats(tmp_path, np.full((3, 64), 0.1), compiled)
        assert (found.mean, found.std) == (pytest.approx(0.1), 0.0)
        assert math.isnan(found.kurtosis)

    @BOTH
    def test_of_very_large_and_very_small_numbers(self, compiled: bool, tmp_path: Path):
        values = np.array([3e38, -3e38, 1e-45, -1e-40, 0.0, -0.0, 2.0**-128, 1.0], np.float32)
        found = floats(tmp_path, values, compiled)
        assert found.n_zero == 2
        assert (found.min.value, found.max.value) == (np.float32(-3e38), np.float32(3e38))
        assert found.std == pytest.approx(values.astype(float).std(), rel=1e-9)
        assert (found.histogram.positive.sum(), found.histogram.negative.sum()) == (4, 2)
        assert found.histogram.edges[0] == 0.0

    def test_an_empty_tensor(self, tmp_path: Path):
        found = floats(tmp_path, np.zeros((0, 32)))
        assert (found.count, found.min, found.rows.count, found.blocks.count) == (0, None, 0, 0)
        assert math.isnan(found.mean)


class TestRows:
    @BOTH
    def test_zero_and_constant_rows(self, compiled: bool, tmp_path: Path):
        values = np.random.default_rng(2).normal(size=(100, 48)).astype(np.float32)
        values[10:13] = 0.0
        values[50] = -0.0
        values[60], values[70] = 5.0, 5.0
        rows = floats(tmp_path, values, compiled).rows
        assert (rows.n_zero, rows.longest_zero_run) == (4, stats.Span(10, 3))
        assert (rows.n_constant, rows.first_constant) == (2, 60)
        assert rows.smallest[0].rms > 0.1

    @BOTH
    def test_one_loud_row(self, compiled: bool, tmp_path: Path):
        values = np.random.default_rng(2).normal(size=(300, 64)).astype(np.float32)
        values[123] *= 1000
        rows = floats(tmp_path, values, compiled).rows
        assert rows.largest[0].row == 123
        assert math.log2(rows.largest[0].rms) - rows.median == pytest.approx(10, abs=0.6)
        assert rows.spread < 0.3

    def test_sizes_are_kept_only_when_asked_for(self, tmp_path: Path):
        assert floats(tmp_path, np.ones((4, 32))).rows.absmax is None


class TestBlocks:
    """Blocks against their rows and columns."""

    def structured(self, rows: int = 200, length: int = 1024) -> np.ndarray:
        rng = np.random.default_rng(4)
        columns = np.exp2(rng.normal(0, 1.5, (1, length // 32))).repeat(32, axis=1)
        return (rng.normal(size=(rows, length)) * np.exp2(rng.normal(0, 1.5, (rows, 1))) * columns).astype(np.float32)

    @BOTH
    def test_strong_rows_and_columns_are_no_outliers(self, compiled: bool, tmp_path: Path):
        blocks = floats(tmp_path, self.structured(), compiled).blocks
        assert (blocks.count, blocks.elements, blocks.n_outliers) == (200 * 32, 32, 0)
        assert blocks.spread < 0.3
        assert blocks.deviations.sum() == blocks.count

    @BOTH
    @pytest.mark.parametrize("factor", [1 / 64, 64.0, 2.0**60])
    def test_one_block_off(self, factor: float, compiled: bool, tmp_path: Path):
        values = self.structured()
        values[77, 5 * 32 : 6 * 32] *= factor
        found = floats(tmp_path, values, compiled)
        worst = found.blocks.worst[0]
        assert found.block_coordinates(worst.block) == (77, 160)
        assert worst.octaves == pytest.approx(math.log2(factor), abs=1)
        assert (found.blocks.n_outliers, found.blocks.first_outlier) == (1, worst.block)

    @BOTH
    def test_a_stretch_of_foreign_bytes(self, compiled: bool, tmp_path: Path):
        qtype = BY_NAME["Q8_0"]
        raw = weights(qtype, 100, 1024)
        place = np.random.default_rng(5).integers(0, 256, 4096, dtype=np.uint8)
        raw.reshape(-1)[34 * 1000 : 34 * 1000 + 4096] = place
        blocks = measure(one_tensor(tmp_path, qtype, raw, (100, 1024)), compiled).blocks
        assert 1000 <= blocks.first_outlier < 1010
        assert 1110 < blocks.last_outlier <= 1120
        assert blocks.n_outliers > 80
        assert {worst.block for worst in blocks.worst} <= set(range(1000, 1121))

    @BOTH
    def test_zero_blocks(self, compiled: bool, tmp_path: Path):
        qtype = BY_NAME["Q4_K"]
        raw = weights(qtype, 10, 1024)
        raw.reshape(-1, 144)[17:21] = 0
        found = measure(one_tensor(tmp_path, qtype, raw, (10, 1024)), compiled)
        assert (found.blocks.n_zero, found.blocks.longest_zero_run) == (4, stats.Span(17, 4))
        zeros = found.repeats.zero_bytes
        assert zeros is not None
        assert (zeros.start, zeros.length) == (17 * 144, 4 * 144)


class TestRepeats:
    @BOTH
    def test_nothing_repeats_in_random_weights(self, compiled: bool, tmp_path: Path):
        qtype = BY_NAME["Q5_0"]
        found = measure(one_tensor(tmp_path, qtype, weights(qtype, 50, 1024), (50, 1024)), compiled).repeats
        assert (found.n_consecutive, found.n_repeated, found.stretch, found.equal_bytes) == (0, 0, None, None)

    @BOTH
    def test_a_copied_stretch(self, compiled: bool, tmp_path: Path):
        qtype = BY_NAME["Q5_0"]
        raw = weights(qtype, 50, 1024)
        blocks = raw.reshape(-1, 22)
        blocks[1200:1300] = blocks[300:400]
        found = measure(one_tensor(tmp_path, qtype, raw, (50, 1024)), compiled).repeats
        assert (found.n_repeated, found.stretch) == (100, stats.Stretch(300, 1200, 100))

    @BOTH
    def test_one_block_over_and_over(self, compiled: bool, tmp_path: Path):
        qtype = BY_NAME["Q6_K"]
        raw = weights(qtype, 20, 1024)
        raw.reshape(-1, 210)[31:40] = raw.reshape(-1, 210)[30]
        found = measure(one_tensor(tmp_path, qtype, raw, (20, 1024)), compiled).repeats
        assert (found.n_consecutive, found.consecutive) == (9, stats.Span(31, 9))

    @BOTH
    def test_equal_bytes(self, compiled: bool, tmp_path: Path):
        qtype = BY_NAME["Q8_0"]
        raw = weights(qtype, 20, 1024)
        raw.reshape(-1)[5000:5100] = 0xFF
        raw.reshape(-1)[9000:9040] = 0
        found = measure(one_tensor(tmp_path, qtype, raw, (20, 1024)), compiled).repeats
        assert found.equal_bytes == stats.ByteRun(0xFF, 5000, 100)
        assert found.zero_bytes == stats.ByteRun(0, 9000, 40)


class TestGrids:
    @BOTH
    def test_one_value_off_the_grid(self, compiled: bool, tmp_path: Path):
        values = np.random.default_rng(6).normal(size=4096).astype("<f4")
        values = (values.view("<u4") & 0xFFFF0000).view("<f4").copy()
        values[1234] = 10000.5
        found = floats(tmp_path, values, compiled)
        assert (found.bf16.n_off, found.bf16.off) == (1, (stats.Extreme(10000.5, 1234),))

    @BOTH
    @pytest.mark.parametrize(
        ("value", "holds"), [(2.0**-24, True), (2.0**-25, False), (65504.0, True), (65520.0, False)]
    )
    def test_the_ends_of_f16(self, value: float, holds: bool, compiled: bool, tmp_path: Path):
        values = np.zeros(64, np.float32)
        values[40] = value
        assert floats(tmp_path, values, compiled).f16.n_off == (0 if holds else 1)

    @BOTH
    def test_f16_is_all_on_its_own_grid_and_mostly_off_bf16(self, compiled: bool, tmp_path: Path):
        found = measure(one_tensor(tmp_path, "F16", weights(BY_NAME["F16"], 4, 512), (4, 512)), compiled)
        assert found.f16.n_off == 0
        assert found.bf16.n_off > 1500
        assert len(found.bf16.off) == 8

    def test_only_floats_have_grids(self, tmp_path: Path):
        found = measure(one_tensor(tmp_path, "Q8_0", weights(BY_NAME["Q8_0"], 1, 64), (1, 64)), False)
        assert (found.bf16, found.f16) == (None, None)


class TestExperts:
    @BOTH
    def test_each_slice_of_the_first_axis(self, compiled: bool, tmp_path: Path):
        values = np.random.default_rng(8).normal(size=(4, 6, 32)).astype(np.float32)
        values[1] = 0
        values[2, 3, 4] = np.nan
        values[3] *= 100
        experts = floats(tmp_path, values, compiled).experts
        assert [expert.n_zero_rows for expert in experts] == [0, 6, 0, 0]
        assert [expert.n_nonfinite_rows for expert in experts] == [0, 0, 1, 0]
        assert experts[3].absmax == np.abs(values[3]).max()
        assert experts[0].rms == pytest.approx(np.sqrt((values[0].astype(float) ** 2).mean()), rel=1e-6)

    def test_a_matrix_has_none(self, tmp_path: Path):
        assert floats(tmp_path, np.ones((4, 32))).experts == ()


class TestErrors:
    def test_a_tensor_outside_the_file_does_not_stop_the_others(self, tmp_path: Path):
        file = File()
        file.tensor("a", np.ones((4, 32), "f4"))
        file.tensor("b", np.ones((4, 32), "f4")).offset = 1 << 20
        file.tensor("c", np.ones((4, 32), "f4"))
        found = {tensor.name: result for tensor, result in stats.scan(ggufkit.reader.open(file.write(tmp_path / "x")))}
        assert isinstance(found["b"], FormatError)
        assert isinstance(found["a"], TensorStats)
        assert isinstance(found["c"], TensorStats)

    @pytest.mark.parametrize(("number", "error"), [(99, NewerThanTool), (31, FormatError), (9, Unsupported)])
    def test_types_that_cannot_be_read(self, number: int, error: type[GgufkitError], tmp_path: Path):
        file = File()
        file.tensor("w", b"\0" * 80, shape=(1, 64), type=number)
        gguf = ggufkit.reader.open(file.write(tmp_path / "x"))
        with pytest.raises(error):
            stats.measure(gguf, gguf.tensors["w"])

    def test_a_file_that_shrinks_meanwhile(self, tmp_path: Path):
        gguf = one_tensor(tmp_path, "F32", np.ones(1 << 16, np.float32), (1 << 16,))
        os.truncate(tmp_path / "w.gguf", 4096)
        ((_, result),) = stats.scan(gguf)
        assert isinstance(result, FormatError)

    def test_progress_adds_up_to_the_bytes(self, tmp_path: Path):
        gguf = one_tensor(tmp_path, "F32", np.ones((300, 4096), np.float32), (300, 4096))
        done: list[int] = []
        list(stats.scan(gguf, progress=done.append))
        assert sum(done) == 300 * 4096 * 4
        assert len(done) > 1


class TestChunks:
    @pytest.mark.parametrize(("name", "rows", "length"), [("F32", 1, 5_000_000), ("Q4_0", 70_000, 896), ("I8", 3, 77)])
    def test_cover_the_tensor_once_in_order(self, name: str, rows: int, length: int):
        qtype = BY_NAME[name]
        offset = element = block = 0
        for chunk in chunks(qtype, rows, length):
            assert (chunk.offset, chunk.first_element, chunk.first_block) == (offset, element, block)
            assert chunk.nbytes <= CHUNK_BYTES
            offset, element, block = offset + chunk.nbytes, element + chunk.n_elements, block + chunk.n_blocks
        assert (offset, element) == (rows * length // qtype.block_size * qtype.type_size, rows * length)


class TestRuns:
    """Pieces add up to the whole, wherever it is cut."""

    def test_of_flags(self):
        rng = np.random.default_rng(0)
        for density in (0.1, 0.5, 0.9, 1.0):
            for _ in range(100):
                flags = rng.random(rng.integers(0, 40)) < density
                total = Runs()
                for piece in np.split(flags, np.sort(rng.integers(0, len(flags) + 1, 3))):
                    total += Runs.of(piece)
                assert total == Runs.of(flags)
                assert total.longest == max(map(len, "".join("01"[int(flag)] for flag in flags).split("0")))

    def test_of_bytes(self):
        rng = np.random.default_rng(0)
        for _ in range(400):
            n = rng.integers(0, 20)
            data = np.repeat(rng.integers(0, 2, n), rng.choice([1, 1, 9, 20, 30], n)).astype(np.uint8)
            total = ByteRuns()
            for piece in np.split(data, np.sort(rng.integers(0, len(data) + 1, 4))):
                total += ByteRuns.of(piece)
            runs = ["0" * len(run) for run in "".join(map(str, data)).split("1")]
            longest = max(map(len, runs), default=0)
            assert (total.zero.length if total.zero else 0) == (longest if longest >= 16 else 0)
            assert (total.zero, total.equal) == (ByteRuns.of(data).zero, ByteRuns.of(data).equal)


class TestWhichWay:
    """Nobody waits for a compiler for the sake of a few megabytes."""

    @pytest.mark.parametrize(
        ("megabytes", "kept", "compiled"),
        [(0.5, True, False), (5, False, False), (5, True, True), (50, False, True), (50, True, True)],
    )
    def test_by_size_and_what_is_there(
        self, megabytes: float, kept: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("ggufkit.stats.compiled.is_kept", lambda types: kept)
        assert stream._is_worth_it(int(megabytes * (1 << 20)), {BY_NAME["Q5_0"]}) is compiled

    def test_a_small_file_loads_no_compiler(self, tmp_path: Path):
        one_tensor(tmp_path, "Q8_0", weights(BY_NAME["Q8_0"], 10, 512), (10, 512))
        script = f"""
            import sys, ggufkit.reader
            from ggufkit import stats
            list(stats.scan(ggufkit.reader.open({str(tmp_path / "w.gguf")!r})))
            print(sorted({{"numba", "llvmlite", "gguf"}} & sys.modules.keys()))
        """
        code = textwrap.dedent(script)
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert out.stdout.strip() == "[]"


@pytest.mark.skipif(sys.platform == "win32", reason="measures with the resource module")
def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    """A sparse file with a tensor of 600 MB: what is needed beyond the interpreter stays below 60 MB."""
    file = File()
    file.tensor("w", shape=(4096, 4096 * 9), type=2)
    header = file.header()
    path = tmp_path / "sparse.gguf"
    path.write_bytes(header)
    os.truncate(path, len(header) + 64 + 4096 * 4096 * 9 // 32 * 18)
    script = f"""
        import resource, ggufkit.reader
        from ggufkit import stats
        gguf = ggufkit.reader.open({str(path)!r})
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        list(stats.scan(gguf, [], compiled=True))
        before = peak()
        ((_, found),) = stats.scan(gguf, compiled=True)
        assert found.n_zero == found.count == 4096 * 4096 * 9
        print(peak() - before)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 60_000 * (1024 if sys.platform == "darwin" else 1)

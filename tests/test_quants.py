"""The block formats, against gguf-py bit for bit where it knows them and against the struct's own words elsewhere."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from ggufkit import quants
from ggufkit.errors import FormatError, Unsupported
from ggufkit.quants import BY_NAME, REMOVED, TYPES, QuantType, compiled

RNG = np.random.default_rng(7)

BLOCKS = [qtype for qtype in TYPES.values() if qtype.is_block and qtype.decodable]
WITHOUT_ORACLE = {"Q8_1", "Q8_K", "Q1_0", "Q2_0", "F64", "I8", "I16", "I32", "I64"}
WITH_ORACLE = [qtype for qtype in TYPES.values() if qtype.name not in WITHOUT_ORACLE]


def random_rows(qtype: QuantType, rows: int = 24, blocks: int = 8) -> np.ndarray:
    """Random bytes: NaN and infinite scales, subnormal and negative ones, zeros, every code."""
    raw = RNG.integers(0, 256, (rows, blocks, qtype.type_size), dtype=np.uint8)
    if qtype.d is not None and qtype.name != "Q8_K":
        odd = np.array([0x7E00, 0x7C00, 0xFC00, 0x0001, 0x8001, 0x0000, 0x8000, 0x7BFF], "<u2")
        raw[0, :, qtype.d : qtype.d + 2] = odd.view(np.uint8).reshape(8, 2)
    return raw.reshape(rows, -1)


def assert_same_floats(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal to the last bit; the payload of a NaN does not count."""
    nan = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found[~nan].view(np.uint32), wanted[~nan].view(np.uint32))


def by_name(qtype: QuantType) -> str:
    return qtype.name


class TestTable:
    def test_agrees_with_gguf_py(self):
        from gguf.constants import GGML_QUANT_SIZES

        found = {number: (row.name, row.block_size, row.type_size) for number, row in TYPES.items()}
        wanted = {int(number): (number.name, *sizes) for number, sizes in GGML_QUANT_SIZES.items()}
        assert {number: found[number] for number in wanted} == wanted
        assert found.keys() - wanted.keys() <= {42}  # Q2_0 is newer than gguf 0.19

    def test_ids_names_and_removed_ids_are_disjoint(self):
        assert len(BY_NAME) == len(TYPES)
        assert REMOVED.keys() == {4, 5, 31, 32, 33, 36, 37, 38}
        assert not REMOVED.keys() & TYPES.keys()

    def test_bits_per_weight(self):
        assert {name: BY_NAME[name].bits_per_weight for name in ("F32", "Q4_0", "Q4_K", "Q6_K", "IQ1_S")} == {
            "F32": 32.0,
            "Q4_0": 4.5,
            "Q4_K": 4.5,
            "Q6_K": 6.5625,
            "IQ1_S": 1.5625,
        }

    @pytest.mark.parametrize("qtype", BLOCKS, ids=by_name)
    def test_fields_lie_inside_the_block_and_groups_fill_it(self, qtype: QuantType):
        assert all(word.offset + word.width * word.times <= qtype.type_size for word in qtype.words)
        assert qtype.block_size % qtype.group == 0
        assert qtype.has_min == (qtype.dmin is not None)

    def test_naming_a_type_loads_neither_numpy_nor_numba(self):
        script = "import sys, ggufkit.quants; print(sorted({'numpy', 'numba', 'gguf'} & sys.modules.keys()))"
        out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert out.stdout.strip() == "[]"


class TestDequantize:
    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # gguf-py's own, on NaN and infinite scales
    @pytest.mark.parametrize("qtype", WITH_ORACLE, ids=by_name)
    def test_equals_gguf_py(self, qtype: QuantType):
        import gguf.quants
        from gguf.constants import GGMLQuantizationType

        raw = random_rows(qtype)
        wanted = gguf.quants.dequantize(raw, GGMLQuantizationType(qtype.id))
        assert_same_floats(quants.dequantize(qtype, raw), wanted)

    def test_q8_k_has_a_float32_scale(self):
        raw = random_rows(BY_NAME["Q8_K"], rows=4, blocks=2).reshape(8, 292)
        d, codes = raw[:, :4].copy().view("<f4"), raw[:, 4:260].copy().view(np.int8)
        with np.errstate(all="ignore"):
            assert_same_floats(quants.dequantize(BY_NAME["Q8_K"], raw), d * codes)

    def test_q1_0_is_plus_or_minus_d_by_bit(self):
        raw = np.zeros((1, 18), np.uint8)
        raw[0, :2] = np.array([0.5], "<f2").view(np.uint8)
        raw[0, 2:4] = [0b00000101, 0b10000000]
        values = quants.dequantize(BY_NAME["Q1_0"], raw)[0]
        assert list(np.flatnonzero(values == 0.5)) == [0, 2, 15]
        assert set(values) == {-0.5, 0.5}

    def test_q2_0_counts_from_minus_one_to_two(self):
        raw = np.zeros((1, 18), np.uint8)
        raw[0, :2] = np.array([2.0], "<f2").view(np.uint8)
        raw[0, 2:4] = [0b11100100, 0b01010101]
        assert list(quants.dequantize(BY_NAME["Q2_0"], raw)[0, :8]) == [-2, 0, 2, 4, 0, 0, 0, 0]

    @pytest.mark.parametrize(("name", "dtype"), [("F64", "<f8"), ("I8", "i1"), ("I16", "<i2"), ("I32", "<i4")])
    def test_plain_numbers_become_float32(self, name: str, dtype: str):
        numbers = np.array([[0, 1, -2, 100]], dtype)
        np.testing.assert_array_equal(quants.dequantize(BY_NAME[name], numbers.view(np.uint8)), [[0, 1, -2, 100]])

    def test_writes_into_a_given_array(self):
        raw = random_rows(BY_NAME["Q8_0"])
        out = np.empty((24, 256), np.float32)
        assert quants.dequantize(BY_NAME["Q8_0"], raw, out=out) is out
        assert_same_floats(out, quants.dequantize(BY_NAME["Q8_0"], raw))

    def test_any_leading_shape(self):
        raw = random_rows(BY_NAME["Q4_0"], rows=6)
        assert quants.dequantize(BY_NAME["Q4_0"], raw.reshape(2, 3, -1)).shape == (2, 3, 256)
        assert quants.dequantize(BY_NAME["Q4_0"], raw[:0]).shape == (0, 256)

    @pytest.mark.parametrize("name", ["Q5_1", "Q6_K", "Q1_0"])
    def test_large_arrays_are_no_different(self, name: str, monkeypatch: pytest.MonkeyPatch):
        raw = random_rows(BY_NAME[name])
        wanted = quants.dequantize(BY_NAME[name], raw)
        codes = quants.unpack(BY_NAME[name], raw).codes
        monkeypatch.setattr("ggufkit.quants.codecs.LARGE", 1)
        assert_same_floats(quants.dequantize(BY_NAME[name], raw), wanted)
        np.testing.assert_array_equal(quants.unpack(BY_NAME[name], raw).codes, codes)

    def test_part_of_a_block_is_refused(self):
        with pytest.raises(FormatError, match="no whole number of Q4_0 blocks"):
            quants.dequantize(BY_NAME["Q4_0"], np.zeros(19, np.uint8))

    def test_a_type_that_no_file_holds_is_refused(self):
        with pytest.raises(Unsupported, match="Q8_1"):
            quants.dequantize(BY_NAME["Q8_1"], np.zeros(40, np.uint8))


class TestUnpack:
    @pytest.mark.parametrize("qtype", BLOCKS, ids=by_name)
    def test_value_is_scale_times_code_plus_min(self, qtype: QuantType):
        raw = random_rows(qtype)
        codes, scales, mins = quants.unpack(qtype, raw)
        assert (codes.dtype, scales.dtype) == (np.int8, np.float32)
        assert (mins is not None) == qtype.has_min
        with np.errstate(all="ignore"):
            values = codes * np.repeat(scales, qtype.group, axis=-1)
            if mins is not None:
                values = values + np.repeat(mins, qtype.group, axis=-1)
        assert_same_floats(values, quants.dequantize(qtype, raw))

    @pytest.mark.parametrize("qtype", BLOCKS, ids=by_name)
    def test_the_compiled_kernel_does_the_same(self, qtype: QuantType):
        raw = random_rows(qtype)
        found, wanted = compiled.unpack(qtype, raw), quants.unpack(qtype, raw)
        np.testing.assert_array_equal(found.codes, wanted.codes)
        assert_same_floats(found.scales, wanted.scales)
        if wanted.mins is not None and found.mins is not None:
            assert_same_floats(found.mins, wanted.mins)

    def test_plain_numbers_have_no_codes(self):
        with pytest.raises(Unsupported, match="F16 holds plain numbers"):
            quants.unpack(BY_NAME["F16"], np.zeros(2, np.uint8))


class TestByteOrder:
    @pytest.mark.parametrize("qtype", [t for t in TYPES.values() if t.decodable], ids=by_name)
    def test_big_endian_values_are_the_same(self, qtype: QuantType):
        raw = random_rows(qtype)
        big = quants.to_little(qtype, raw)  # swapping is its own inverse
        assert_same_floats(quants.dequantize(qtype, big, byteorder="big"), quants.dequantize(qtype, raw))

    @pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
    def test_swaps_what_gguf_py_swaps(self, name: str):
        from types import SimpleNamespace

        from gguf.constants import GGMLQuantizationType
        from gguf.scripts.gguf_convert_endian import byteswap_tensors

        qtype = BY_NAME[name]
        block = RNG.integers(0, 256, qtype.type_size, dtype=np.uint8)
        theirs = SimpleNamespace(data=block.copy())
        byteswap_tensors[GGMLQuantizationType(qtype.id)](theirs, 0)
        np.testing.assert_array_equal(quants.to_little(qtype, block), theirs.data)

    def test_the_argument_is_left_alone(self):
        raw = random_rows(BY_NAME["F32"])
        before = raw.copy()
        quants.dequantize(BY_NAME["F32"], raw, byteorder="big")
        np.testing.assert_array_equal(raw, before)


def test_a_gguf_package_without_codebooks_is_named(monkeypatch: pytest.MonkeyPatch):
    import gguf.quants

    from ggufkit.quants import iq

    monkeypatch.delattr(gguf.quants, "IQ3_S")
    iq.grid.cache_clear()
    with pytest.raises(Unsupported, match="no codebook for IQ3_S"):
        iq.grid("IQ3_S")

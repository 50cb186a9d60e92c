"""Damage and genius in biases and norms, on the bundled model, which was trained and is kept on the bf16 grid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ggufkit import checks, demo, reader
from ggufkit.findings import Finding, Judgement, Report, Severity

Change = Callable[[np.ndarray], None]


def damaged(tmp_path: Path, **changes: Change) -> Report:
    """The report on a copy of the bundled model whose vectors were changed: blk_0__attn_k_bias → blk.0.attn_k.bias."""
    path = tmp_path / "damaged.gguf"
    raw = bytearray(demo.MODEL.read_bytes())
    with reader.open(demo.MODEL) as gguf:
        for name, change in changes.items():
            tensor = gguf.tensors[name.replace("__", ".")]
            assert tensor.nbytes is not None
            vector = np.frombuffer(raw, np.float32, tensor.nbytes // 4, tensor.offset)
            change(vector)
    path.write_bytes(raw)
    return checks.run(path, select=["O"])


def named(report: Report, code: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.code == code]


def put(index: int, value: float) -> Change:
    def change(vector: np.ndarray) -> None:
        vector[index] = value

    return change


def flip(index: int, bit: int) -> Change:
    def change(vector: np.ndarray) -> None:
        vector.view(np.uint32)[index] ^= np.uint32(1 << bit)

    return change


BIASES = ("blk__2__attn_q__bias", "blk__0__attn_k__bias", "blk__4__attn_v__bias")


def test_the_bundled_model_is_healthy():
    report = checks.run(demo.MODEL, select=["O"])
    assert {finding.severity for finding in report.findings} <= {Severity.INFO}
    assert all(finding.judgement is Judgement.GENUINE for finding in report.findings)
    assert named(report, "O207"), "its largest bias is explained"


@pytest.mark.parametrize("value", [1e4, -1e4, 1e30, 3e38, 500.0])
@pytest.mark.parametrize("bias", BIASES)
def test_a_planted_value_is_corrupt(tmp_path, bias, value):
    (finding,) = named(damaged(tmp_path, **{bias: put(17, value)}), "O201")
    assert (finding.tensor, finding.index) == (bias.replace("__", "."), (17,))
    assert finding.severity is Severity.ERROR
    assert finding.judgement is Judgement.CORRUPT
    assert finding.value == pytest.approx(value)


def test_two_planted_values_do_not_hide_each_other(tmp_path):
    report = damaged(tmp_path, blk__1__attn_q__bias=put(3, 1e4), blk__3__attn_q__bias=put(8, 1e4))
    assert {finding.tensor for finding in named(report, "O201")} == {"blk.1.attn_q.bias", "blk.3.attn_q.bias"}


def test_a_planted_value_in_a_norm_is_corrupt(tmp_path):
    (finding,) = named(damaged(tmp_path, blk__2__ffn_norm__weight=put(5, 900.0)), "O201")
    assert finding.tensor == "blk.2.ffn_norm.weight"


def test_a_flipped_exponent_bit_is_told_with_the_value_before_it(tmp_path):
    with reader.open(demo.MODEL) as gguf:
        tensor = gguf.tensors["blk.2.attn_k.bias"]
        before = gguf.read(tensor).view(np.float32)
    index = int(np.flatnonzero((np.abs(before) > 0.05) & (np.abs(before) < 0.9))[0])
    (finding,) = named(damaged(tmp_path, blk__2__attn_k__bias=flip(index, 30)), "O201")
    restored = [evidence.numbers["restored"] for evidence in finding.evidence if "restored" in evidence.numbers]
    assert restored == [pytest.approx(float(before[index]))]


@pytest.mark.parametrize("bit", [0, 5, 15])
@pytest.mark.parametrize("tensor", ["blk__1__attn_k__bias", "blk__3__attn_norm__weight", "output_norm__weight"])
def test_a_flipped_low_bit_breaks_the_grid(tmp_path, tensor, bit):
    (finding,) = named(damaged(tmp_path, **{tensor: flip(11, bit)}), "O202")
    assert (finding.tensor, finding.index) == (tensor.replace("__", "."), (11,))


def test_a_vector_that_is_on_no_grid_is_left_alone(tmp_path):
    noise = np.random.default_rng(0)

    def blur(vector: np.ndarray) -> None:
        vector += noise.normal(0, 1e-4, vector.size).astype(np.float32)

    assert named(damaged(tmp_path, blk__1__attn_q__bias=blur), "O202") == []


def test_a_cleared_exponent_bit_is_a_vanishing_value(tmp_path):
    found = named(damaged(tmp_path, blk__3__ffn_norm__weight=put(9, 2.5e-38)), "O203")
    assert [finding.index for finding in found] == [(9,)]


def test_a_bias_that_is_odd_for_its_rotary_pair_is_suspicious(tmp_path):
    """Pair 12 turns; no other layer has anything like it there."""
    (finding,) = named(damaged(tmp_path, blk__0__attn_q__bias=put(12, -21.0)), "O204") or [None]
    assert finding is not None
    assert finding.severity is Severity.WARNING
    assert finding.judgement is Judgement.SUSPICIOUS


def test_clipped_biases_are_noticed(tmp_path):
    def clip(vector: np.ndarray) -> None:
        limit = np.sort(np.abs(vector))[-6]
        vector[:] = vector.clip(-limit, limit)

    (finding,) = named(damaged(tmp_path, blk__2__attn_q__bias=clip), "O205")
    assert finding.tensor == "blk.2.attn_q.bias"


@pytest.mark.parametrize(("layers", "severity"), [(range(5), Severity.ERROR), (range(1, 2), Severity.WARNING)])
def test_biases_that_were_switched_off_are_the_historic_mistake(tmp_path, layers, severity):
    def zero(vector: np.ndarray) -> None:
        vector[:] = 0

    report = damaged(tmp_path, **{f"blk__{layer}__attn_k__bias": zero for layer in layers})
    (finding,) = named(report, "O206")
    assert finding.severity is severity
    assert "switched off" in finding.message


@pytest.mark.real_model
def test_qwens_huge_biases_are_genuine(real_model):
    report = checks.run(real_model, select=["O"])
    assert {finding.severity for finding in report.findings} == {Severity.INFO}
    key = next(finding for finding in report.findings if finding.tensor == "blk.8.attn_k.bias")
    assert (key.value, key.judgement) == (-211.0, Judgement.GENUINE)

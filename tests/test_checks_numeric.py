"""Each rule on the numbers: what it finds in damaged weights, and that healthy ones of every block type pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from builder import File, model
from test_checks_metadata import Case
from tiny_models import tiny_model

from ggufkit import checks
from ggufkit.findings import Report, Severity

UP, NORM, BIAS = "blk.1.ffn_up.weight", "blk.1.ffn_norm.weight", "blk.1.attn_q.bias"
Values = npt.NDArray[np.float32]


def edit(name: str, change: Callable[[Values], object]) -> Callable[[File], object]:
    """Change values of an F32 tensor in place."""

    def damage(file: File) -> None:
        values = file[name].values()
        change(values)
        file[name].assign(values)

    return damage


def put(name: str, index: Any, value: float) -> Callable[[File], object]:
    return edit(name, lambda values: values.__setitem__(index, value))


def q8(name: str, change: Callable[[npt.NDArray[np.uint8]], object] = lambda blocks: None) -> Callable[[File], object]:
    """Pack every matrix in Q8_0 as ggml does, then change the packed blocks (uint8 [blocks, 34]) of one."""

    def damage(file: File) -> None:
        for entry in file.tensors:
            if len(entry.dims) == 2:
                packed = _pack_q8_0(entry.values())
                if entry.name == name:
                    change(packed)
                entry.type, entry.data = 8, packed.tobytes()

    return damage


def _pack_q8_0(values: Values) -> npt.NDArray[np.uint8]:
    blocks = values.reshape(-1, 32)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / 127
    codes = np.round(blocks / np.where(scales, scales, 1)).astype(np.int8)
    return np.hstack([scales.astype("<f2").view(np.uint8), codes.view(np.uint8)])


def f16(value: float) -> list[int]:
    return list(np.float16(value).tobytes())


def scaled(factor: float, block: int = 30) -> Callable[[npt.NDArray[np.uint8]], object]:
    """A block's scale multiplied."""

    def change(blocks: npt.NDArray[np.uint8]) -> None:
        scale = blocks[block, :2].copy().view("<f2")
        blocks[block, :2] = (scale * np.float16(factor)).view(np.uint8)

    return change


def setting(rows: Any, value: Any) -> Callable[[npt.NDArray[np.uint8]], object]:
    return lambda blocks: blocks.__setitem__(rows, value)


def experts(change: Callable[[Values], object]) -> Callable[[File], object]:
    """Six experts of 8 × 32 in one stacked tensor."""

    def damage(file: File) -> None:
        values = np.random.default_rng(5).standard_normal((6, 8, 32)).astype(np.float32)
        change(values)
        file.tensor("blk.0.ffn_up_exps.weight", values)

    return damage


def hybrid(change: Callable[[dict[str, Values]], object]) -> Callable[[File], object]:
    """A few tensors of a Qwen3-Next model."""

    def damage(file: File) -> None:
        rng = np.random.default_rng(6)
        values = {
            "blk.0.attn_norm.weight": 1 + 0.1 * rng.standard_normal(64).astype(np.float32),
            "blk.0.ssm_norm.weight": 0.1 * rng.standard_normal(16).astype(np.float32),
            "blk.0.ssm_a": -np.exp(rng.standard_normal(8)).astype(np.float32),
        }
        change(values)
        file.set("general.architecture", "qwen3next")
        file.tensors = []
        for name, array in values.items():
            file.tensor(name, array.astype(np.float32))

    return damage


CASES = [
    Case("NaN in a norm", put(NORM, 5, np.nan), "N101", "error", NORM, "1 NaN; the first is at [5]"),
    Case("Inf in a matrix", put(UP, (7, 3), np.inf), "N101", "error", UP, "1 Inf; the first is at [7, 3]"),
    Case("NaN in an expert", experts(lambda v: v.__setitem__((4, 2, 1), np.nan)), "N101", "error",
         "blk.0.ffn_up_exps.weight", "[4, 2, 1] of expert 4"),
    Case("Inf in a scale", q8(UP, setting((21, slice(2)), f16(np.inf))), "N102", "error", UP, "block 21, at [10, 32]"),
    Case("NaN in scales", q8(UP, setting((slice(21, 25), slice(2)), f16(np.nan))), "N102", "error", UP, "4 blocks"),
    Case("norm all zero", put(NORM, slice(None), 0), "N103", "error", NORM, "all zero"),
    Case("matrix all zero", q8(UP, setting(slice(None), 0)), "N103", "error", UP, "all zero"),
    Case("bias all zero", put("blk.1.attn_k.bias", slice(None), 0), "N103", "info", "blk.1.attn_k.bias", "all zero"),
    Case("expert all zero", experts(lambda v: v.__setitem__(3, 0)), "N103", "error", "blk.0.ffn_up_exps.weight",
         "expert 3"),
    Case("rows zero", put(UP, slice(5, 9), 0), "N104", "warning", UP, "4 of 96 rows"),
    Case("tokens never trained", put("token_embd.weight", slice(280, None), 0), "N104", "info", "token_embd.weight",
         "8 of"),
    Case("bytes zeroed", q8(UP, lambda b: b.reshape(-1).__setitem__(slice(1000, 1200), 0)), "N105", "error", UP,
         "bytes"),
    Case("bytes of 0xFF", q8(UP, lambda b: b.reshape(-1).__setitem__(slice(1000, 1200), 255)), "N105", "error", UP,
         "0xFF"),
    Case("floats zeroed", put(UP, (slice(40, 42), slice(10, 60)), 0), "N105", "error", UP, "are all zero"),
    Case("scale zeroed", q8(UP, setting((30, slice(2)), 0)), "N106", "warning", UP, "[15, 0]"),
    Case("rows copied", q8(UP, lambda b: b.__setitem__(slice(100, 112), b[10:22])), "N107", "warning", UP,
         "are a copy of those at [5, 0]"),
    Case("piece copied", q8(UP, lambda b: b.__setitem__(slice(101, 112), b[10:21])), "N107", "error", UP, "11 blocks"),
    Case("block copied", q8(UP, lambda b: b.__setitem__(101, b[10])), "N107", "error", UP, "a block"),
    Case("block copied beside itself", q8(UP, lambda b: b.__setitem__(11, b[10])), "N107", "error", UP, "repeat"),
    Case("block repeated", q8(UP, lambda b: b.__setitem__(slice(51, 60), b[50])), "N107", "error", UP, "9 blocks"),
    Case("floats copied", edit(UP, lambda v: v.reshape(-1).__setitem__(slice(736, 1056), v.reshape(-1)[96:416])),
         "N107", "error", UP, "copy"),
    Case("tensor written twice", lambda f: setattr(f[UP], "data", f["blk.1.ffn_gate.weight"].data), "N108", "error",
         UP, "same values"),
    Case("scale × 1024", q8(UP, scaled(1024)), "N109", "error", UP, "[15, 0]"),
    Case("scale × 16", q8(UP, scaled(16)), "N109", "warning", UP, "[15, 0]"),
    Case("scale / 2048", q8(UP, scaled(2**-11)), "N109", "warning", UP, "smaller"),
    Case("scale negative", q8(UP, scaled(-1)), "N110", "error", UP, "a block of"),
    Case("code damaged", q8(UP, setting((30, slice(2, 34)), 7)), "N110", "error", UP, "[15, 0]"),
    Case("scale / 200", q8(UP, scaled(1 / 200)), "N115", "warning", UP, "[15, 0]"),
    Case("1e30 in a matrix", put(UP, (50, 9), 1e30), "N111", "error", UP, "1e+30, at [50, 9]"),
    Case("exponent bit in a matrix", put(UP, (50, 9), -300.0), "N111", "error", UP, "-300"),
    Case("row filled", put(UP, 33, 0.25), "N112", "warning", UP, "1 rows"),
    Case("expert too large", experts(lambda v: v.__setitem__(2, v[2] * 500)), "N113", "warning",
         "blk.0.ffn_up_exps.weight", "expert 2"),
    Case("norm without its one", hybrid(lambda v: v.__setitem__("blk.0.attn_norm.weight",
         v["blk.0.attn_norm.weight"] - 1)),
         "N114", "error", "blk.0.attn_norm.weight", "near 1"),
    Case("decay above zero", hybrid(lambda v: v.__setitem__("blk.0.ssm_a", -v["blk.0.ssm_a"])), "N114", "error",
         "blk.0.ssm_a", "below zero"),
]  # fmt: skip


def report(tmp_path: Path, damage: Callable[[File], object]) -> Report:
    file = model()
    damage(file)
    return checks.run(file.write(tmp_path / "case.gguf"), select=["N"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damage_is_found_and_named(tmp_path: Path, case: Case) -> None:
    found = [finding for finding in report(tmp_path, case.damage).findings if finding.code == case.code]
    assert found, f"{case.code} found nothing"
    assert found[0].tensor == case.place
    assert case.names in found[0].message
    assert str(found[0].severity) == case.severity


def superweight(values: Values) -> None:
    """One weight hundreds of times its neighbours, another half as large: as in ffn_down of real models."""
    values[20, 40], values[20, 50] = 60.0, -25.0


def pruned(values: Values) -> None:
    values[np.random.default_rng(3).random(values.shape) < 0.6] = 0


def untrained(values: Values) -> None:
    """Rows of tokens that never occurred: equal, tiny or zero."""
    values[270:280] = 1e-6
    values[280:284] = values[260]
    values[284:] = 0


DOWN = "blk.0.ffn_down.weight"
HEALTHY: list[tuple[str, Callable[[File], object]]] = [
    ("as it is", lambda f: None),
    ("Q8_0", q8(UP)),
    ("a super weight", edit(DOWN, superweight)),
    ("a super weight in Q8_0", lambda f: (edit(DOWN, superweight)(f), q8(UP)(f))),
    ("pruned", edit(UP, pruned)),
    ("strong rows", edit(UP, lambda v: v.__imul__(np.geomspace(0.01, 30, 96, dtype=np.float32)[:, None]))),
    ("strong columns", edit(UP, lambda v: v.__imul__(np.geomspace(0.01, 30, 64, dtype=np.float32)))),
    ("untrained tokens", edit("token_embd.weight", untrained)),
    ("the embedding as head", lambda f: setattr(f["output.weight"], "data", f["token_embd.weight"].data)),
    ("layers stacked twice", lambda f: [setattr(f[str(e.name).replace("blk.0", "blk.1")], "data", e.data)
                                        for e in f.tensors if str(e.name).startswith("blk.0")]),
    ("experts", experts(lambda v: None)),
    ("a hybrid", hybrid(lambda v: None)),
    ("huge biases", put(BIAS, 15, -211.0)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), HEALTHY, ids=[name for name, _ in HEALTHY])
def test_healthy_numbers_pass(tmp_path: Path, name: str, change: Callable[[File], object]) -> None:
    findings = report(tmp_path, change).findings
    assert [finding for finding in findings if finding.severity is not Severity.INFO] == []


# -- every block type ------------------------------------------------------------------------------------------------

#: every type that the quantizer at hand writes in reasonable time
TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)


@pytest.mark.parametrize("type_", TYPES)
def test_a_healthy_model_of_every_type_passes(tmp_path: Path, type_: str) -> None:
    result = checks.run(tiny_model(tmp_path / "tiny.gguf", type=type_), select=["S", "M", "N"])
    assert [finding for finding in result.findings if finding.severity is not Severity.INFO] == []
    assert result.tensors_checked == result.tensors

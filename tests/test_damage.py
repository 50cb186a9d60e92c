"""What happens to files in the world, done to a small quantized model and to the real one: each is found and named.

The real file is never copied: it is shown to the reader through the damage.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import damage
import pytest
from damage import Case, Make
from tiny_models import tiny_model

from ggufkit import checks, reader
from ggufkit.findings import Report, Severity

E = "tokenizer.ggml.eos_token_id"


def cases(quantized: str, bias: str) -> list[Case]:
    """The kinds of damage, on a model in which `quantized` is a matrix of blocks and `bias` an F32 vector."""
    return [
        Case("truncated", damage.cut(0.6), ("S201",)),
        Case("truncated in the header", damage.cut(0.002), ("S101", "S106", "S108")),
        Case("NaN in a bias", damage.element(bias, 3, float("nan")), ("N101",), bias),
        Case("Inf in a block scale", damage.scale(quantized, 7, 0x7C00), ("N102",), quantized),
        Case("NaN in a block scale", damage.scale(quantized, 7, 0xFE01), ("N102",), quantized),
        Case("4 kB zeroed", damage.stretch(quantized, 4096, bytes), ("N105",), quantized),
        Case("4 kB of noise", damage.stretch(quantized, 4096, damage.noise), ("N102", "N109", "N110"), quantized),
        Case("offset outside the file", damage.offset(quantized, lambda g: g.size + 4096 & ~31), ("S201",), quantized),
        Case("overlapping tensors", damage.offset(quantized, lambda g: 0), ("S203",), None),
        Case("misaligned offset", damage.offset(quantized, lambda g: 33), ("S202",), quantized),
        Case("kv_count 2^60", damage.at(16, (2**60).to_bytes(8, "little")), ("S102",)),
        Case("EOS out of range", damage.scalar(E, "I", 2**31), ("T105",), E),
        Case("head_count 7", damage.scalar("qwen2.attention.head_count", "I", 7), ("M201",),
         "qwen2.attention.head_count"),
        Case("head_count 0", damage.scalar("qwen2.attention.head_count", "I", 0), ("M201",),
         "qwen2.attention.head_count"),
        Case("rope base NaN", damage.scalar("qwen2.rope.freq_base", "f", float("nan")), ("M104",),
         "qwen2.rope.freq_base"),
        Case("block_count one more", damage.scalar("qwen2.block_count", "I", 25), ("M306",), "qwen2.block_count"),
        Case("tensor renamed", damage.renamed(quantized), ("M301",), quantized),
        Case("wrong magic", damage.at(0, b"GGUX"), ("S001",)),
        Case("version 4", damage.at(4, b"\x04"), ("S003",), status=3),
        Case("huge string", lambda g: damage.Damage({g.fields["general.name"].value_offset: b"\xff" * 7 + b"\x7f"}),
             ("S106",), None),
        Case("type that is removed", lambda g: damage.Damage({damage.type_field(g.tensors[quantized]): b"\x1f"}),
             ("S115",), quantized),
    ]  # fmt: skip


TINY = ("blk.1.ffn_up.weight", "blk.1.attn_k.bias")
REAL = ("blk.5.ffn_up.weight", "blk.3.attn_q.bias")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", type="Q5_0")


def validated(path: Path, make: Make, monkeypatch: pytest.MonkeyPatch, *, select: Sequence[str] = ()) -> Report:
    with reader.open(path) as gguf:
        damaged = damage.patched(make(gguf))
    monkeypatch.setattr(reader, "Source", damaged)
    return checks.run(path, select=select)


def holds(report: Report, case: Case) -> None:
    """The damage is found by one of its rules, named, and decides the status."""
    found = [finding for finding in report.findings if finding.code in case.codes]
    assert found, [finding.message for finding in report.findings]
    if case.place is not None:
        assert case.place in {place for finding in found for place in (finding.tensor, finding.key)}
    assert report.exit_code() == case.status
    assert not any("itself failed" in skip.why for skip in report.skipped)


@pytest.mark.parametrize("case", cases(*TINY), ids=lambda case: case.name)
def test_damage_to_a_small_model_is_found(tiny: Path, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    holds(validated(tiny, case.make, monkeypatch), case)


@pytest.mark.real_model
@pytest.mark.parametrize("case", cases(*REAL), ids=lambda case: case.name)
def test_damage_to_the_real_model_is_found(real_model: Path, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the real file only the family of rules is run that is to find it: each pass over 491 MB takes its time."""
    holds(validated(real_model, case.make, monkeypatch, select=sorted({code[0] for code in case.codes})), case)


@pytest.mark.real_model
def test_the_real_models_are_healthy(real_model: Path, smol_model: Path) -> None:
    for path in (real_model, smol_model):
        report = checks.run(path)
        assert [finding for finding in report.findings if finding.severity is not Severity.INFO] == []
        assert report.exit_code() == 0
        assert report.tensors_checked == report.tensors


def test_damage_is_shown_as_it_would_be_written(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests see through the patches is what a damaged copy holds."""
    for case in cases(*TINY)[:7]:
        copy = damage.apply(tiny, case.make, tmp_path / "copy.gguf")
        with monkeypatch.context() as patch:
            seen = validated(tiny, case.make, patch)
        assert repr(checks.run(copy).findings) == repr(seen.findings)

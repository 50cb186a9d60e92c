"""Against another quantization of the same model, an earlier copy, or a manifest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_model

from ggufkit import checks, manifest, reader
from ggufkit.errors import NewerThanTool, UsageError
from ggufkit.findings import Severity


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(folder) -> Path:
    return tiny_model(folder / "q5.gguf", type="Q5_0")


def patched(source: Path, target: Path, tensor: str, start: int, data: bytes) -> Path:
    """A copy with some bytes of a tensor replaced."""
    raw = bytearray(source.read_bytes())
    with reader.open(source) as gguf:
        at = gguf.tensors[tensor].offset + start
    raw[at : at + len(data)] = data
    target.write_bytes(raw)
    return target


def found(path, **given):
    report = checks.run(path, select=["R"], **given)
    return {(finding.code, finding.tensor or finding.key): finding for finding in report.findings}


@pytest.mark.parametrize("type_", ["F32", "F16", "Q8_0", "Q5_0", "Q5_1", "Q4_1", "Q4_0"])
def test_another_quantization_of_the_model_agrees(folder, model, type_):
    other = tiny_model(folder / f"{type_}.gguf", type=type_)
    assert found(model, reference=other) == {}
    assert found(other, reference=model) == {}


def test_a_file_agrees_with_itself(model):
    report = checks.run(model, select=["R1"], reference=model)
    assert report.findings == ()
    assert report.rules_run == 3
    assert report.exit_code() == 0


def test_a_changed_float_is_named_with_its_place(folder, model):
    damaged = patched(model, folder / "bias.gguf", "blk.1.attn_k.bias", 4 * 7, np.float32(-34).tobytes())
    finding = found(damaged, reference=model)["R103", "blk.1.attn_k.bias"]
    assert finding.index == (7,)
    assert finding.severity is Severity.ERROR


@pytest.mark.parametrize("type_", ["Q5_0", "Q8_0", "F16"])
def test_a_bad_block_is_named_against_any_type(folder, model, type_):
    other = tiny_model(folder / f"ref-{type_}.gguf", type=type_)
    scale = np.float16(-0.9).tobytes()  # a sign and a size that are wrong for one block of 32
    damaged = patched(model, folder / "scale.gguf", "blk.0.ffn_up.weight", 22 * 40, scale)
    hits = found(damaged, reference=other)
    assert set(hits) == {("R103", "blk.0.ffn_up.weight")}


def test_exchanged_blocks_are_seen(folder, model):
    with reader.open(model) as gguf:
        first, second = (gguf.read(gguf.tensors["blk.0.attn_q.weight"], 22 * b, 22).tobytes() for b in (3, 90))
    once = patched(model, folder / "once.gguf", "blk.0.attn_q.weight", 22 * 3, second)
    twice = patched(once, folder / "twice.gguf", "blk.0.attn_q.weight", 22 * 90, first)
    finding = found(twice, reference=model)["R103", "blk.0.attn_q.weight"]
    assert finding.value == 2


def test_another_model_is_told_from_another_quantization(folder, model):
    stranger = tiny_model(folder / "stranger.gguf", type="Q8_0", seed=99)
    hits = found(model, reference=stranger)
    assert ("R103", "blk.0.ffn_up.weight") in hits
    assert "throughout" in hits["R103", "blk.0.ffn_up.weight"].message


def test_missing_tensors_and_changed_metadata_are_named(folder, model):
    tied = tiny_model(folder / "tied.gguf", type="Q5_0", tied=True)
    assert found(tied, reference=model)["R102", "output.weight"].severity is Severity.INFO
    other = tiny_model(folder / "qwen3.gguf", type="Q5_0", arch="qwen3")
    hits = found(other, reference=model)
    assert ("R102", "blk.0.attn_q.bias") in hits
    assert ("R101", "general.architecture") in hits


# --- manifest ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest_file(folder, model) -> Path:
    path = folder / "model.manifest.json"
    with reader.open(model) as gguf:
        path.write_text(json.dumps({"schema": manifest.SCHEMA, **manifest.make(gguf).as_document(str(model))}))
    return path


def test_the_file_matches_its_manifest(model, manifest_file):
    report = checks.run(model, select=["R2"], manifest=manifest_file)
    assert report.findings == ()
    assert report.rules_run == 2


def test_a_single_flipped_bit_is_seen(folder, model, manifest_file):
    damaged = patched(model, folder / "bit.gguf", "blk.1.ffn_down.weight", 1000, b"\x55")
    assert set(found(damaged, manifest=manifest_file)) == {("R202", "blk.1.ffn_down.weight")}


def test_a_changed_header_is_seen(folder, model, manifest_file):
    raw = model.read_bytes().replace(b"<|endoftext|>", b"<|endoftEXt|>", 1)
    path = folder / "header.gguf"
    path.write_bytes(raw)
    assert set(found(path, manifest=manifest_file)) == {("R201", None)}


def test_without_something_to_compare_with_the_rules_are_skipped(model):
    report = checks.run(model, select=["R"])
    assert report.rules_run == 0
    assert {skip.why for skip in report.skipped} >= {"no reference was given", "no manifest was given"}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", UsageError),
        ("[]", UsageError),
        ('{"schema": "ggufkit.validate/1"}', UsageError),
        ('{"schema": "ggufkit.manifest/1", "header": {}, "tensors": {}}', UsageError),
        ('{"schema": "ggufkit.manifest/9"}', NewerThanTool),
    ],
)
def test_what_is_no_manifest_says_so(tmp_path, text, error):
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(error):
        manifest.load(path)

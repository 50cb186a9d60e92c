"""Each rule on metadata and on the tensor list: what it finds in a damaged model, and that a sound one passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import pytest
from builder import File, array, f32, i32, model, scalar, u64

from ggufkit import checks
from ggufkit.findings import Report, Severity


class Case(NamedTuple):
    """A model, what is done to it, and the finding that must come of it.

    `names` must be in the message; `place` is the key or the tensor that the finding must name.
    """

    name: str
    damage: Callable[[File], object]
    code: str
    severity: str
    place: str | None
    names: str


def rename(old: str, new: str) -> Callable[[File], object]:
    return lambda file: setattr(file[old], "name", new)


def reshape(name: str, *shape: int) -> Callable[[File], object]:
    def damage(file: File) -> None:
        file[name].dims = shape[::-1]
        file[name].data = bytes(4 * int(np.prod(shape)))

    return damage


def without_biases(file: File) -> None:
    file.remove(*(f"blk.{layer}.attn_{part}.bias" for layer in range(2) for part in "qkv"))


def fused(file: File) -> None:
    """Query, key and value of each layer in one tensor, as some converters write them."""
    for layer in range(2):
        for kind, shape in (("weight", (128, 64)), ("bias", (128,))):
            file.remove(*(f"blk.{layer}.attn_{part}.{kind}" for part in "qkv"))
            file.tensor(f"blk.{layer}.attn_qkv.{kind}", np.ones(shape, np.float32))


def as_llama(file: File, n_layer: int = 10) -> None:
    """The same weights under an architecture that is not modelled, in ten layers."""
    grown = model(n_layer=n_layer, metadata={"general.architecture": "llama"})
    file.kv = [(str(key).replace("qwen2.", "llama."), value) for key, value in grown.kv]
    file.tensors = [entry for entry in grown.tensors if not str(entry.name).endswith(".bias")]


def llama_then(damage: Callable[[File], object]) -> Callable[[File], object]:
    def both(file: File) -> None:
        as_llama(file)
        damage(file)

    return both


CASES = [
    Case("architecture lost", lambda f: f.drop("general.architecture"), "M101", "error", "general.architecture",
         "missing"),
    Case("architecture changed", lambda f: f.set("general.architecture", "qwen3"), "M102", "error",
         "qwen3.context_length", ""),
    Case("context lost", lambda f: f.drop("qwen2.context_length"), "M102", "error", "qwen2.context_length", "missing"),
    Case("heads lost", lambda f: f.drop("qwen2.attention.head_count"), "M102", "error", "qwen2.attention.head_count",
         ""),
    Case("count as text", lambda f: f.set("qwen2.block_count", "2"), "M103", "error", "qwen2.block_count", "a string"),
    Case("count as u64", lambda f: f.set("qwen2.block_count", u64(2)), "M103", "error", "qwen2.block_count",
         "a uint64"),
    Case("base as f64", lambda f: f.set("qwen2.rope.freq_base", scalar("f64", 1e6)), "M103", "error",
         "qwen2.rope.freq_base", ""),
    Case("token types as u8", lambda f: f.set("tokenizer.ggml.token_type", array("u8", [1] * 288)), "M103", "error",
         "tokenizer.ggml.token_type", "uint8[288]; it must be int32[]"),
    Case("scores as i8", lambda f: f.set("tokenizer.ggml.scores", array("i8", [1] * 288)), "M103", "error",
         "tokenizer.ggml.scores", "float32[]"),
    Case("zero heads", lambda f: f.set("qwen2.attention.head_count", 0), "M201", "error",
         "qwen2.attention.head_count", "0"),
    Case("513 blocks", lambda f: f.set("qwen2.block_count", 513), "M104", "error", "qwen2.block_count", "513"),
    Case("zero blocks", lambda f: f.set("qwen2.block_count", 0), "M104", "error", "qwen2.block_count", "1 to 512"),
    Case("NaN rope base", lambda f: f.set("qwen2.rope.freq_base", float("nan")), "M104", "error",
         "qwen2.rope.freq_base", "nan, which is no number"),
    Case("infinite epsilon", lambda f: f.set("qwen2.attention.layer_norm_rms_epsilon", float("inf")), "M104", "error",
         "qwen2.attention.layer_norm_rms_epsilon", "inf"),
    Case("NaN in an unknown key", lambda f: f.set("qwen2.new_thing", float("nan")), "M104", "error",
         "qwen2.new_thing", ""),
    Case("negative rope base", lambda f: f.set("qwen2.rope.freq_base", -1e6), "M104", "error", "qwen2.rope.freq_base",
         ""),
    Case("rope scaling unknown", lambda f: f.set("qwen2.rope.scaling.type", "banana"), "M104", "error",
         "qwen2.rope.scaling.type", "'banana'"),
    Case("quantization version", lambda f: f.set("general.quantization_version", 1) and quantize(f), "M105", "warning",
         "general.quantization_version", "is 1"),
    Case("no quantization version", lambda f: quantize(f.drop("general.quantization_version")), "M105", "warning",
         "general.quantization_version", "missing"),
    Case("file type of another mix", lambda f: f.set("general.file_type", 10), "M106", "info", "general.file_type",
         "Q2_K"),
    Case("key in capitals", lambda f: f.add("My Key", 1), "M107", "info", "My Key", "lower_case"),
    Case("key with an escape", lambda f: f.add("general.\x1b[31m", 1), "M107", "warning", "general.\x1b[31m",
         "printed"),
    Case("another architecture", as_llama, "M108", "info", "general.architecture", "'llama' is not modelled"),
    Case("adapter", lambda f: f.set("general.type", "adapter"), "M109", "info", "general.type", "'adapter'"),
    Case("half the heads", lambda f: f.set("qwen2.attention.head_count", 2), "M201", "error",
         "qwen2.attention.head_count", "4 query heads of 16"),
    Case("heads that do not divide", lambda f: f.set("qwen2.attention.head_count", 3), "M201", "error",
         "qwen2.attention.head_count", "evenly"),
    Case("wrong key heads", lambda f: f.set("qwen2.attention.head_count_kv", 4), "M201", "error",
         "qwen2.attention.head_count", "2 key heads of 16"),
    Case("no key heads", lambda f: f.drop("qwen2.attention.head_count_kv"), "M202", "warning",
         "qwen2.attention.head_count_kv", "missing"),
    Case("rope dimensions", lambda f: f.set("qwen2.rope.dimension_count", 8), "M203", "error", None,
         "qwen2.rope.dimension_count is 8"),
    Case("value length", lambda f: f.set("qwen2.attention.value_length", 32), "M203", "error", None, "value_length"),
    Case("no rope base", lambda f: f.drop("qwen2.rope.freq_base"), "M210", "warning", "qwen2.rope.freq_base",
         "silently"),
    Case("large epsilon", lambda f: f.set("qwen2.attention.layer_norm_rms_epsilon", 1e-3), "M212", "warning",
         "qwen2.attention.layer_norm_rms_epsilon", "0.001"),
    Case("scaling without factor", lambda f: f.set("qwen2.rope.scaling.type", "linear"), "M213", "error",
         "qwen2.rope.scaling.factor", "missing"),
    Case("yarn without length", lambda f: f.set("qwen2.rope.scaling.type", "yarn").set("qwen2.rope.scaling.factor",
         4.0),
         "M213", "warning", "qwen2.rope.scaling.original_context_length", "missing"),
    Case("no expert used", lambda f: f.set("qwen2.expert_count", 4).set("qwen2.expert_used_count", 0), "M214", "error",
         "qwen2.expert_used_count", "0 of 4"),
    Case("experts lost", lambda f: stack_experts(f, 3), "M214", "error", "qwen2.expert_count", "holds 3 experts"),
    Case("projector of nothing", lambda f: f.set("general.architecture", "clip"), "M215", "warning",
         "clip.projector_type", "type"),
    Case("tensor lost", lambda f: f.remove("blk.1.ffn_up.weight"), "M301", "error", "blk.1.ffn_up.weight",
         "is missing"),
    Case("tensor renamed", rename("blk.1.ffn_up.weight", "blk.1.ffn_up.weigth"), "M301", "error", "blk.1.ffn_up.weight",
         "'blk.1.ffn_up.weigth', probably the same"),
    Case("norm lost", lambda f: f.remove("output_norm.weight"), "M301", "error", "output_norm.weight", "is missing"),
    Case("biases lost", without_biases, "M302", "error", "blk.0.attn_q.bias", "all layers"),
    Case("biases of one layer", lambda f: f.remove("blk.1.attn_k.bias"), "M302", "error", "blk.1.attn_k.bias",
         "1 of 2"),
    Case("left-over tensor", lambda f: f.tensor("blk.0.lora_a", np.ones(32, np.float32)), "M303", "error",
         "blk.0.lora_a", "not part of qwen2"),
    Case("transposed", reshape("blk.0.ffn_up.weight", 64, 96), "M304", "error", "blk.0.ffn_up.weight", "transposed"),
    Case("short norm", reshape("blk.1.attn_norm.weight", 32), "M304", "error", "blk.1.attn_norm.weight", "[32]"),
    Case("short vocabulary", reshape("output.weight", 280, 64), "M305", "error", "output.weight", "280 rows"),
    Case("vocab_size", lambda f: f.set("qwen2.vocab_size", 1000), "M305", "warning", "qwen2.vocab_size", "1,000"),
    Case("too many blocks", lambda f: f.set("qwen2.block_count", 3), "M306", "error", "qwen2.block_count",
         "no tensors"),
    Case("too few blocks", lambda f: f.set("qwen2.block_count", 1), "M306", "error", "qwen2.block_count",
         "up to block 1"),
    Case("renamed elsewhere", llama_then(rename("blk.6.ffn_up.weight", "blk.6.ffn_up.weigth")), "M307", "warning",
         "blk.6.ffn_up.weight", "'ffn_up.weigth' instead"),
    Case("lost elsewhere", llama_then(lambda f: f.remove("blk.5.ffn_norm.weight")), "M307", "warning",
         "blk.5.ffn_norm.weight", "all other blocks have"),
    Case("reshaped elsewhere", llama_then(reshape("blk.5.ffn_norm.weight", 32)), "M307", "warning",
         "blk.5.ffn_norm.weight", "[32]"),
    Case("quantized bias", lambda f: quantize(f, "blk.0.attn_k.bias"), "M308", "warning", "blk.0.attn_k.bias", "Q8_0"),
]  # fmt: skip


def quantize(file: File, name: str = "blk.0.ffn_up.weight") -> File:
    """Zeros in Q8_0 instead of a tensor's values."""
    entry = file[name]
    rows = int(np.prod(entry.dims[1:]))
    entry.type, entry.data = 8, bytes(34 * entry.dims[0] // 32 * rows)
    return file


def stack_experts(file: File, count: int) -> None:
    file.set("qwen2.expert_count", 4).set("qwen2.expert_used_count", 2)
    file.tensor("blk.0.ffn_up_exps.weight", np.ones((count, 4, 32), np.float32))


def report(tmp_path: Path, damage: Callable[[File], object], **options: object) -> Report:
    file = model()
    damage(file)
    return checks.run(file.write(tmp_path / "case.gguf"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damage_is_found_and_named(tmp_path: Path, case: Case) -> None:
    found = [finding for finding in report(tmp_path, case.damage).findings if finding.code == case.code]
    assert found, f"{case.code} found nothing"
    assert case.place in {None, found[0].key, found[0].tensor}
    assert case.names in found[0].message
    assert str(found[0].severity) == case.severity


SOUND: list[tuple[str, Callable[[File], object]]] = [
    ("as it is", lambda f: None),
    ("tied head", lambda f: f.remove("output.weight")),
    ("fused projections", fused),
    ("linear scaling", lambda f: f.set("qwen2.rope.scaling.type", "linear").set("qwen2.rope.scaling.factor", 4.0)),
    ("output bias", lambda f: f.tensor("output.bias", np.ones(288, np.float32))),
    ("rope factors", lambda f: f.tensor("rope_freqs.weight", np.ones(8, np.float32))),
    ("quantized", quantize),
    ("another architecture", as_llama),
]


@pytest.mark.parametrize(("name", "change"), SOUND, ids=[name for name, _ in SOUND])
def test_sound_models_pass(tmp_path: Path, name: str, change: Callable[[File], object]) -> None:
    findings = report(tmp_path, change, select=["S", "M", "T", "C"]).findings
    assert [finding for finding in findings if finding.code not in ("M108", "M106")] == []


def test_integers_of_another_width_are_fine_by_the_specification(tmp_path: Path) -> None:
    found = report(tmp_path, lambda f: f.set("qwen2.block_count", u64(2)), profile="spec").findings
    assert [(finding.code, str(finding.severity)) for finding in found] == [("M103", "info")]


def test_a_wrong_head_count_is_one_finding_and_not_one_a_layer(tmp_path: Path) -> None:
    file = model(n_layer=12).set("qwen2.attention.head_count", 2)
    findings = checks.run(file.write(tmp_path / "case.gguf"), select=["M"]).findings
    assert [finding.code for finding in findings] == ["M201"]


def test_a_wrong_width_names_its_key_once(tmp_path: Path) -> None:
    file = model(n_layer=12).set("qwen2.feed_forward_length", 128)
    findings = checks.run(file.write(tmp_path / "case.gguf"), select=["M304"]).findings
    assert [finding.key for finding in findings] == ["qwen2.feed_forward_length"] * 3
    assert "12 layers" in findings[0].message


def test_qwen3_needs_its_key_length(tmp_path: Path) -> None:
    file = model()
    file.kv = [(str(key).replace("qwen2.", "qwen3."), value) for key, value in file.kv]
    file.set("general.architecture", "qwen3")
    file.tensor("blk.0.attn_q_norm.weight", np.ones(32, np.float32))
    findings = checks.run(file.write(tmp_path / "case.gguf"), select=["M204"]).findings
    assert "32 channels" in findings[0].message


def _known_model(**changes: object) -> File:
    """A qwen2 file with the dimensions of Qwen2.5-0.5B whose tensors have no data (the rules need none)."""
    keys: dict[str, object] = {
        "block_count": 24,
        "embedding_length": 896,
        "feed_forward_length": 4864,
        "attention.head_count": 14,
        "attention.head_count_kv": 2,
        "rope.freq_base": 1e6,
        **changes,
    }
    file = model(metadata={f"qwen2.{key}": value for key, value in keys.items() if value is not None})
    if keys["rope.freq_base"] is None:
        file.drop("qwen2.rope.freq_base")
    file.tensors = []
    file.tensor("token_embd.weight", b"", shape=(288, 896), type="F32")
    return file


@pytest.mark.parametrize(
    ("changes", "code", "severity", "names"),
    [
        ({"rope.freq_base": None}, "M210", "error", "Qwen2.5-0.5B"),
        ({"rope.freq_base": 10_000.0}, "M210", "error", "1,000,000"),
        ({"rope.freq_base": 5e6}, "M210", "warning", "5,000,000"),
        ({"attention.head_count": 7, "attention.head_count_kv": 1}, "M211", "warning", "14 and 2"),
        ({}, None, None, ""),
    ],
)
def test_known_models_have_known_values(
    tmp_path: Path, changes: dict[str, object], code: str | None, severity: str | None, names: str
) -> None:
    findings = checks.run(_known_model(**changes).write(tmp_path / "case.gguf"), select=["M21"]).findings
    assert [(finding.code, str(finding.severity)) for finding in findings] == ([(code, severity)] if code else [])
    assert all(names in finding.message for finding in findings)


@pytest.mark.parametrize(
    ("metadata", "severity"),
    [({}, "warning"), ({"general.type": "imatrix"}, None), ({"qwen2.block_count": 2}, "error")],
)
def test_a_file_without_architecture(tmp_path: Path, metadata: dict[str, object], severity: str | None) -> None:
    file = File()
    for key, value in metadata.items():
        file.add(key, value)
    findings = checks.run(file.write(tmp_path / "case.gguf"), select=["M101"]).findings
    assert [str(finding.severity) for finding in findings] == ([severity] if severity else [])


def test_an_image_model_is_not_blamed_for_being_none(tmp_path: Path) -> None:
    file = File().add("general.architecture", "flux")
    file.tensor("double_blocks.0.img_attn.qkv.weight", np.ones((4, 32), np.float32))
    report = checks.run(file.write(tmp_path / "case.gguf"), select=["S", "M", "T", "C"])
    assert [finding.code for finding in report.findings] == ["M109"]


def test_a_negative_integer_is_not_a_count(tmp_path: Path) -> None:
    found = report(tmp_path, lambda f: f.set("qwen2.block_count", i32(-1)), select=["M103"]).findings
    assert found[0].key == "qwen2.block_count"


def test_floats_keep_their_type(tmp_path: Path) -> None:
    assert report(tmp_path, lambda f: f.set("qwen2.rope.freq_base", f32(1e6)), select=["M103"]).findings == ()


def _of_architecture(arch: gguf.MODEL_ARCH, n_layer: int = 9) -> File:
    """A file with every tensor name that upstream lists for an architecture, in as many layers, and its usual keys."""
    name = gguf.MODEL_ARCH_NAMES[arch]
    file = model(metadata={"general.architecture": name})
    file.kv = [(str(key).replace("qwen2.", f"{name}."), value) for key, value in file.kv]
    file.set(f"{name}.block_count", n_layer)
    file.tensors = []
    for tensor in gguf.MODEL_TENSORS[arch]:
        template = gguf.TENSOR_NAMES[tensor]
        for layer in range(n_layer) if "{bid}" in template else (0,):
            shape = (288, 64) if tensor in (gguf.MODEL_TENSOR.TOKEN_EMBD, gguf.MODEL_TENSOR.OUTPUT) else (8, 64)
            full = template.format(bid=layer, xid=0) + ".weight"
            if all(entry.name != full for entry in file.tensors):
                file.tensor(full, b"", shape=shape, type="F32").data = bytes(4 * shape[0] * shape[1])
    return file


#: those that are modelled, those of Qwen2 that need biases, and a projector that must say more
_SPECIAL = ("QWEN2", "QWEN3", "QWEN2MOE", "QWEN2VL", "MMPROJ")


@pytest.mark.parametrize("arch", [arch for arch in gguf.MODEL_ARCH if arch.name not in _SPECIAL], ids=lambda a: a.name)
def test_architectures_that_are_not_modelled_are_not_blamed(tmp_path: Path, arch: gguf.MODEL_ARCH) -> None:
    """For every architecture that upstream knows: names alone are no reason for a warning."""
    report = checks.run(_of_architecture(arch).write(tmp_path / "case.gguf"), select=["S", "M"], ignore=["M214"])
    assert [finding for finding in report.findings if finding.severity is not Severity.INFO] == []

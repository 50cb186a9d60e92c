"""Architectures as data: the Config of a file, and the tensors that follow from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from builder import File, array, i32, model, u64

from ggufkit import arch, reader
from ggufkit.errors import FormatError, GgufkitError, Unsupported


def config_of(file: File, tmp_path: Path) -> arch.Config:
    with reader.open(file.write(tmp_path / "model.gguf")) as gguf:
        return arch.read_config(gguf)


def test_the_hyperparameters_are_read(tmp_path: Path) -> None:
    config = config_of(model(), tmp_path)
    assert (config.n_layer, config.n_embd, config.n_head, config.n_head_kv, config.n_ff) == (2, 64, 4, 2, 96)
    assert (config.head_dim, config.q_width, config.kv_width, config.n_vocab) == (16, 64, 32, 288)
    assert (config.rope_base, config.rope_scale, config.n_ctx_train) == (1e6, 1.0, 128)
    assert (config.tied, config.qkv_bias, config.qk_norm) == (False, True, False)


def test_defaults_are_those_of_every_loader(tmp_path: Path) -> None:
    file = model().drop("qwen2.rope.freq_base").set("qwen2.attention.head_count_kv", 4).remove("output.weight")
    file.drop("qwen2.attention.head_count_kv")
    config = config_of(file, tmp_path)
    assert (config.rope_base, config.n_head_kv, config.tied) == (10_000.0, 4, True)


def test_linear_scaling_divides_the_positions(tmp_path: Path) -> None:
    file = model().set("qwen2.rope.scaling.type", "linear").set("qwen2.rope.scaling.factor", 4.0)
    assert config_of(file, tmp_path).rope_scale == 4.0


REFUSED: list[tuple[str, Callable[[File], object], type[GgufkitError], str]] = [
    ("another architecture", lambda f: f.set("general.architecture", "mamba"), Unsupported, "'mamba' is not modelled"),
    ("no architecture", lambda f: f.drop("general.architecture"), Unsupported, "None is not modelled"),
    ("yarn", lambda f: f.set("qwen2.rope.scaling.type", "yarn"), Unsupported, "'yarn' is not modelled"),
    ("no layers", lambda f: f.drop("qwen2.block_count"), FormatError, "qwen2.block_count is missing"),
    ("513 layers", lambda f: f.set("qwen2.block_count", 513), FormatError, "block_count is 513"),
    ("layers as text", lambda f: f.set("qwen2.block_count", "two"), FormatError, "block_count is 'two'"),
    ("layers as a bool", lambda f: f.set("qwen2.block_count", True), FormatError, "block_count is True"),
    ("layers below zero", lambda f: f.set("qwen2.block_count", i32(-2)), FormatError, "block_count is -2"),
    ("heads as a list", lambda f: f.set("qwen2.attention.head_count", array("i32", [4])), FormatError, r"int32\[1\]"),
    ("no heads", lambda f: f.set("qwen2.attention.head_count", 0), FormatError, "head_count is 0"),
    ("heads that do not share", lambda f: f.set("qwen2.attention.head_count_kv", 3), FormatError, "evenly"),
    ("odd heads", lambda f: f.set("qwen2.attention.key_length", 15), FormatError, "rotated in pairs"),
    ("rope dimensions", lambda f: f.set("qwen2.rope.dimension_count", 8), FormatError, "rope.dimension_count is 8"),
    ("NaN base", lambda f: f.set("qwen2.rope.freq_base", float("nan")), FormatError, "freq_base is nan"),
    ("no embedding", lambda f: f.remove("token_embd.weight"), FormatError, "token_embd.weight is missing"),
    ("huge context", lambda f: f.set("qwen2.context_length", u64(2**60)), FormatError, "context_length is 11529"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "error", "words"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_cannot_be_is_refused_by_name(
    tmp_path: Path, name: str, change: Callable[[File], object], error: type[GgufkitError], words: str
) -> None:
    file = model()
    change(file)
    with pytest.raises(error, match=words):
        config_of(file, tmp_path)


def test_the_expected_tensors_are_those_of_a_healthy_model(tmp_path: Path) -> None:
    """Name for name and shape for shape, `output.weight` aside, which may be tied."""
    file = model()
    expected = arch.expected_tensors(config_of(file, tmp_path))
    assert {name: entry.shape for name, entry in expected.items()} == {
        str(entry.name): entry.dims[::-1] for entry in file.tensors
    }
    assert [name for name, entry in expected.items() if not entry.required] == ["output.weight"]


@pytest.mark.parametrize(
    ("name", "role", "layer"),
    [
        ("blk.7.attn_k.bias", "attn_k.bias", 7),
        ("token_embd.weight", "token_embd.weight", None),
        ("blk.x.attn_k.bias", "blk.x.attn_k.bias", None),
        ("blk.7", "blk.7", None),
        ("v.blk.3.ln1.weight", "v.blk.3.ln1.weight", None),
    ],
)
def test_a_name_tells_role_and_layer(name: str, role: str, layer: int | None) -> None:
    assert arch.role_of(name) == (role, layer)


def test_known_models_are_recognized_by_their_dimensions(tmp_path: Path) -> None:
    assert arch.known_models(config_of(model(), tmp_path)) == []
    for known in arch.KNOWN_MODELS:
        same = arch.Config(
            known.arch, known.n_layer, known.n_embd, known.n_head, known.n_head_kv, 64, known.n_ff, known.n_vocab,
            32768, 1e-6, known.rope_bases[0],
        )  # fmt: skip
        assert known in arch.known_models(same)
        assert known.n_head % known.n_head_kv == 0

"""What the header alone tells about a file."""

from __future__ import annotations

from pathlib import Path

import builder
import gguf as gguf_py
import numpy as np
import pytest

from ggufkit import overview, reader
from ggufkit.container import GGUF
from ggufkit.errors import UsageError
from ggufkit.tokenizer import Tokenizer


def opened(file: builder.File, folder: Path) -> GGUF:
    return reader.open(file.write(folder / "model.gguf"))


def test_file_types_are_ggml_s() -> None:
    theirs = {
        kind.value: kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")
        for kind in gguf_py.LlamaFileType
        if kind.name != "GUESSED"
    }
    assert theirs.items() <= overview.FILE_TYPES.items()


def test_the_file_s_facts(tmp_path: Path) -> None:
    file = builder.model()
    with opened(file, tmp_path) as gguf:
        facts = overview.file_facts(gguf)
    data = file.encode()
    assert (facts.size, facts.version, facts.byteorder, facts.alignment) == (len(data), 3, "little", 32)
    assert (facts.n_keys, facts.n_tensors) == (len(file.kv), len(file.tensors))
    assert facts.header_bytes == len(file.header())
    assert facts.data_bytes == sum(len(entry.data) for entry in file.tensors)
    assert facts.complete
    assert facts.shards == ("model.gguf",)


def test_the_model_s_facts(tmp_path: Path) -> None:
    with opened(builder.model(), tmp_path) as gguf:
        facts = overview.model_facts(gguf)
    assert (facts.architecture, facts.general["name"], facts.file_type) == ("qwen2", "Tiny Qwen2 Instruct", "F32")
    assert facts.modelled
    assert facts.problem is None
    assert facts.rows == 288
    assert facts.hyperparameters["n_layer"] == 2
    assert facts.hyperparameters["n_head_kv"] == 2
    assert facts.n_parameters == sum(tensor.n_elements for tensor in gguf.tensors.values())


def test_an_architecture_that_is_not_modelled_is_no_problem(tmp_path: Path) -> None:
    file = builder.File().add("general.architecture", "mamba").add("mamba.block_count", 3)
    with opened(file, tmp_path) as gguf:
        facts = overview.model_facts(gguf)
    assert not facts.modelled
    assert facts.problem is None
    assert facts.hyperparameters == {"n_layer": 3}


def test_a_known_architecture_with_impossible_keys_says_why(tmp_path: Path) -> None:
    with opened(builder.model(metadata={"qwen2.attention.head_count": 0}), tmp_path) as gguf:
        assert "head_count" in (overview.model_facts(gguf).problem or "")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.name", builder.u32(3)),
        ("general.file_type", "fifteen"),
        ("general.architecture", builder.u32(3)),
        ("qwen2.block_count", "two"),
        ("tokenizer.ggml.tokens", builder.u32(3)),
        ("tokenizer.ggml.tokens", builder.array("u8", [1, 2])),
        ("tokenizer.ggml.token_type", builder.array("u8", [1, 2])),
        ("tokenizer.ggml.eos_token_id", "last"),
        ("tokenizer.ggml.merges", 3.5),
        ("tokenizer.chat_template", 7),
        ("qwen2.context_length", builder.scalar("f64", 1e300)),
    ],
)
def test_a_value_of_another_type_is_left_out(tmp_path: Path, key: str, value: object) -> None:
    with opened(builder.model(metadata={key: value}), tmp_path) as gguf:
        facts = overview.overview(gguf)
    assert facts.file.n_keys == len(gguf.fields)


def test_the_mix_of_block_types(tmp_path: Path) -> None:
    file = builder.File().add("general.architecture", "qwen2")
    file.tensor("blk.0.ffn_up.weight", bytes(34 * 8), shape=(4, 64), type="Q8_0")
    file.tensor("blk.1.ffn_up.weight", bytes(34 * 8), shape=(4, 64), type="Q8_0")
    file.tensor("output_norm.weight", np.ones(64, "f4"))
    with opened(file, tmp_path) as gguf:
        mix = overview.quantization(gguf.tensors.values())
    packed, floats = mix.types
    assert (packed.type, packed.tensors, packed.elements, packed.nbytes) == ("Q8_0", 2, 512, 544)
    assert (packed.bits_per_weight, packed.roles) == (8.5, ("ffn_up.weight",))
    assert (floats.type, floats.bits_per_weight) == ("F32", 32)
    assert mix.bits_per_weight == pytest.approx(8 * (544 + 256) / 576)


@pytest.mark.parametrize("big", [False, True])
def test_the_tokenizer_s_facts(tmp_path: Path, big: bool) -> None:
    file = builder.model(big=big, metadata={"tokenizer.ggml.bos_token_id": 9999, "tokenizer.ggml.eot_token_id": 271})
    with opened(file, tmp_path) as gguf:
        facts = overview.tokenizer_facts(gguf, rows=300)
        texts = gguf.metadata["tokenizer.ggml.tokens"]
    assert facts is not None
    assert (facts.model, facts.pre, facts.n_tokens, facts.n_merges) == ("gpt2", "qwen2", 288, len(builder.MERGES))
    assert facts.types == {"normal": 269, "unused": 16, "control": 3}
    assert facts.unused_rows == 12
    assert facts.flags == {"add_bos_token": False}
    special = {token.role: token for token in facts.special}
    assert special["eos"].text == "<|im_end|>"
    assert special["bos"].text is None
    assert special["eot"].text == texts[271]


def test_strings_are_found_without_decoding_the_others(tmp_path: Path) -> None:
    strings = ["", "a", "zwei", "三", "\x00"]
    with opened(builder.File().add("x", strings), tmp_path) as gguf:
        assert overview.strings_at(gguf, gguf.fields["x"], [4, 3, 0, 3, -1, 5]) == {0: "", 3: "三", 4: "\x00"}


def test_a_vocabulary_alone(tmp_path: Path) -> None:
    file = builder.File().add("general.architecture", "qwen2")
    for key, value in builder.vocabulary().items():
        file.add(key, value)
    with opened(file, tmp_path) as gguf:
        facts = overview.overview(gguf)
    assert facts.quantization == overview.Quantization((), None)
    assert facts.memory == ()
    assert facts.tokenizer is not None
    assert facts.model.tied is None


def test_a_file_without_anything(tmp_path: Path) -> None:
    with opened(builder.File(), tmp_path) as gguf:
        facts = overview.overview(gguf)
    assert facts.tokenizer is None
    assert facts.template is None
    assert facts.model.architecture is None


def test_a_header_that_breaks_off_still_shows_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(builder.model().encode()[:400])
    with reader.open(path) as gguf:
        facts = overview.overview(gguf)
    assert facts.model.general["name"] == "Tiny Qwen2 Instruct"
    assert not facts.file.complete
    assert facts.problems


def test_both_orders_of_dimensions(tmp_path: Path) -> None:
    with opened(builder.model(), tmp_path) as gguf:
        rows = {row.name: row for row in overview.tensor_rows(gguf)}
    assert rows["blk.0.ffn_up.weight"].shape == (96, 64)
    assert rows["blk.0.ffn_up.weight"].dims == (64, 96)


def test_metadata_rows_hold_the_first_elements_only(tmp_path: Path) -> None:
    with opened(builder.model(), tmp_path) as gguf:
        rows = {row.key: row for row in overview.metadata_rows(gguf, elements=2)}
        whole = overview.metadata_value(gguf, "tokenizer.ggml.merges")
    assert rows["tokenizer.ggml.merges"].value == ["t h", "h e"]
    assert rows["tokenizer.ggml.merges"].type == f"string[{len(builder.MERGES)}]"
    assert len(rows["tokenizer.ggml.token_type"].value) == 2
    assert whole.value == list(builder.MERGES)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (builder.array("f64", [0.5, -1.0, 2.0]), [0.5, -1.0]),
        (builder.array("i8", [-1]), [-1]),
        (builder.array("u64", [2**60, 1, 2]), [2**60, 1]),
        (builder.array("bool", [1, 0, 1]), [True, False]),
        (builder.array("u32", []), []),
        (builder.nested(builder.array("u8", [1]), builder.array("u8", [2]), builder.array("u8", [3])), None),
    ],
)
def test_the_first_elements_of_any_array(tmp_path: Path, big: bool, value: builder.Value, expected: object) -> None:
    with opened(builder.File(big=big).add("x", value), tmp_path) as gguf:
        (row,) = overview.metadata_rows(gguf, elements=2)
    assert len(row.value) == 2 if expected is None else row.value == expected


def test_a_key_that_is_not_there_names_those_like_it(tmp_path: Path) -> None:
    with opened(builder.model(), tmp_path) as gguf, pytest.raises(UsageError) as caught:
        overview.metadata_value(gguf, "general.nam")
    assert "general.name" in (caught.value.help or "")


def test_the_bytes_behind_each_token(tmp_path: Path) -> None:
    with opened(builder.model(), tmp_path) as gguf:
        tokenizer = Tokenizer.from_metadata(gguf.metadata)
        ids = tokenizer.encode("é the<|im_end|>")
        rows = overview.token_rows(tokenizer, ids)
    assert [row.bytes for row in rows] == ["c3", "a9", "20", "74 68", "65", "3c 7c 69 6d 5f 65 6e 64 7c 3e"]
    assert [row.text for row in rows] == ["\\xc3", "\\xa9", " ", "th", "e", "<|im_end|>"]
    assert [row.special for row in rows] == [False] * 5 + [True]

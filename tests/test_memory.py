"""The memory that a model needs."""

from __future__ import annotations

from pathlib import Path

import builder

from ggufkit import memory, reader


def needed(file: builder.File, folder: Path, rows: int | None = 288) -> tuple[tuple[memory.Memory, ...], str | None]:
    with reader.open(file.write(folder / "model.gguf")) as gguf:
        return memory.memory_needed(gguf, rows)


def test_the_formula(tmp_path: Path) -> None:
    file = builder.model(metadata={"qwen2.context_length": 32768})
    usual, full = needed(file, tmp_path)[0]
    weights = sum(len(entry.data) for entry in file.tensors)
    kv = 2 * 2 * (16 + 16)  # layers · key heads · (key + value)
    working = 4 * 512 * (288 + 2 * 96 + 4 * 64)
    assert usual == memory.Memory(
        4096, weights, 4096 * kv * 2, 4096 * kv * 4, working, weights + 4096 * kv * 2 + working,
        weights + 4096 * kv * 4 + working,
    )  # fmt: skip
    assert (full.n_ctx, full.kv_f16) == (32768, 32768 * kv * 2)


def test_a_short_context_is_both_and_bounds_the_batch(tmp_path: Path) -> None:
    (only,), remark = needed(builder.model(), tmp_path)
    assert only.n_ctx == 128
    assert only.working == 4 * 128 * (288 + 2 * 96 + 4 * 64)
    assert remark is None


def test_key_heads_that_differ_by_layer(tmp_path: Path) -> None:
    file = builder.model(metadata={"qwen2.attention.head_count_kv": builder.array("i32", [0, 4])})
    assert needed(file, tmp_path)[0][0].kv_f16 == 2 * 128 * 4 * 32


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    found, remark = needed(builder.model().drop("qwen2.context_length"), tmp_path)
    assert found == ()
    assert remark == "cannot be told without context_length"


def test_a_sliding_window_is_remarked(tmp_path: Path) -> None:
    assert "sliding" in (needed(builder.model(metadata={"qwen2.attention.sliding_window": 64}), tmp_path)[1] or "")


def test_absurd_hyperparameters_are_no_numbers(tmp_path: Path) -> None:
    file = builder.model(metadata={"qwen2.context_length": builder.u64(2**60)})
    assert needed(file, tmp_path)[0] == ()

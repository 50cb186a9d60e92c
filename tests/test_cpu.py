"""The CPU engine against the reference: step by step, every type, and what may not change between two runs."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import Shape, tiny_model

from ggufkit import quants, reader, runtime
from ggufkit.errors import Unsupported, UsageError
from ggufkit.runtime.cpu import CpuEngine, engine, program
from ggufkit.runtime.cpu.simd import LANES, TILE_COLUMNS
from ggufkit.runtime.engine import element_edits
from ggufkit.runtime.reference import ReferenceEngine
from ggufkit.steps import Recorder

#: name → how the tiny model is made. Lengths that are no multiple of anything show whether edges are right
MODELS = {
    "qwen2": {"type": "Q5_0", "types": {"attn_v.weight": "Q8_0", "ffn_up.weight": "Q4_1"}},
    "qwen3": {"arch": "qwen3", "type": "Q8_0", "shape": Shape(n_head=4, n_head_kv=1, head_dim=32)},
    "tied": {"type": "Q4_0", "tied": True, "shape": Shape(n_layer=1, n_vocab=301)},
    "floats": {"type": "F32", "types": {"ffn_up.weight": "F16", "attn_q.weight": "BF16"}, "shape": Shape(n_ff=77)},
    "K": {"type": "Q4_K", "types": {"ffn_down.weight": "Q6_K", "ffn_up.weight": "Q2_K", "attn_k.weight": "Q3_K"}},
}
TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ3_S", "IQ4_XS", "TQ1_0", "TQ2_0"),
)
IDS = [5, 250, 17, 17, 99, 3, 280, 41, 8, 120, 77, 1]


def make(tmp_path, name, **changes):
    return reader.open(tiny_model(tmp_path / f"{name}.gguf", **{**MODELS[name], **changes}))


def differences(want: Recorder, got: Recorder) -> dict[str, float]:
    """Of each step, the largest difference as a share of the step's largest value."""
    assert list(want.arrays) == list(got.arrays)
    for name, array in want.arrays.items():
        assert got.arrays[name].shape == array.shape, name
    return {name: np.abs(array - got.arrays[name]).max() / np.abs(array).max() for name, array in want.arrays.items()}


@pytest.mark.parametrize("name", MODELS)
def test_every_step_is_the_reference_s(tmp_path, name):
    """A prompt, a token, another prompt after what the cache holds, another token."""
    model = make(tmp_path, name)
    fast, reference = CpuEngine(model), ReferenceEngine(model, np.float64)
    cache, kept = fast.new_cache(16), reference.new_cache(16)
    for part in (IDS[:4], IDS[4:5], IDS[5:11], IDS[11:]):
        want, got = Recorder(), Recorder()
        expected = reference.forward(part, kept, logits="all", tap=want)
        logits = fast.forward(part, cache, logits="all", tap=got)
        worst = max((error, step) for step, error in differences(want, got).items())
        assert worst < (1e-5, "")
        np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    assert cache.length == kept.length == len(IDS)


@pytest.mark.parametrize("type_name", TYPES)
def test_every_type_runs_packed(tmp_path, type_name):
    """Products with one position and with several go through different kernels."""
    model = reader.open(tiny_model(tmp_path / "m.gguf", type=type_name))
    fast, reference = CpuEngine(model), ReferenceEngine(model)
    cache, kept = fast.new_cache(8), reference.new_cache(8)
    for part in (IDS[:3], IDS[3:4]):
        expected = reference.forward(part, kept)
        np.testing.assert_allclose(fast.forward(part, cache), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("type_name", [name for name in TYPES if quants.BY_NAME[name].is_block])
def test_a_packed_weight_takes_a_byte_and_a_half_at_most(tmp_path, type_name):
    model = reader.open(tiny_model(tmp_path / "m.gguf", type=type_name, shape=Shape(256, 4, 4, 64, 256, 1, 512)))
    n_weights = sum(t.n_elements for t in model.tensors.values() if len(t.shape) == 2 and "embd" not in t.name)
    assert n_weights < CpuEngine(model).weights.nbytes <= 1.5 * n_weights


@pytest.mark.parametrize("n", [1, 2, TILE_COLUMNS - 1, TILE_COLUMNS, TILE_COLUMNS + 1, 3 * LANES + 5])
def test_every_length_of_a_prompt(tmp_path, n):
    model = make(tmp_path, "qwen2")
    ids = np.random.default_rng(n).integers(0, 288, n).tolist()
    fast, reference = CpuEngine(model), ReferenceEngine(model, np.float64)
    expected = reference.forward(ids, reference.new_cache(n), logits="all")
    logits = fast.forward(ids, fast.new_cache(n), logits="all")
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


def test_a_long_prompt_is_computed_in_chunks(tmp_path, monkeypatch):
    model = make(tmp_path, "qwen2")
    fast = CpuEngine(model)
    whole = fast.forward(IDS, fast.new_cache(16), logits="all")
    monkeypatch.setattr(engine, "CHUNK", 5)
    cache = fast.new_cache(16)
    in_parts = fast.forward(IDS, cache, logits="all")
    np.testing.assert_allclose(in_parts, whole, atol=1e-4)
    assert cache.length == len(IDS)
    np.testing.assert_array_equal(fast.forward(IDS, fast.new_cache(16)), in_parts[-1:])


def test_a_prompt_is_its_tokens_one_by_one(tmp_path):
    fast = CpuEngine(make(tmp_path, "qwen2"))
    together, cache = fast.forward(IDS[:6], fast.new_cache(8), logits="all"), fast.new_cache(8)
    alone = np.concatenate([fast.forward([token], cache) for token in IDS[:6]])
    np.testing.assert_allclose(alone, together, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_computes_the_same_bits(tmp_path, monkeypatch, threads):
    fast = CpuEngine(make(tmp_path, "K"))

    def run():
        cache, seen = fast.new_cache(16), Recorder()
        logits = [fast.forward(part, cache, tap=seen) for part in (IDS[:5], IDS[5:6])]
        return [*logits, *seen.arrays.values()]

    expected = run()
    crew = program.Crew(threads)
    monkeypatch.setattr(engine, "crew", lambda: crew)
    for first, second in zip(expected, run(), strict=True):
        assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("tensor", ["blk.0.ffn_up.weight", "blk.0.attn_k.bias", "token_embd.weight"])
def test_an_edit_is_run_and_undone_exactly(tmp_path, tensor):
    model = make(tmp_path, "qwen2", types={"ffn_up.weight": "F16", "token_embd.weight": "F32"})
    fast, reference = CpuEngine(model), ReferenceEngine(model)
    edits = element_edits(model, tensor, {5 * 64 + 3 if "weight" in tensor else 3: 30.0})
    before = fast.forward(IDS[:4], fast.new_cache(8))
    with reference.patched(edits), fast.patched(edits):
        expected = reference.forward(IDS[:4], reference.new_cache(8))
        inside = fast.forward(IDS[:4], fast.new_cache(8))
        np.testing.assert_allclose(inside, expected, atol=1e-4)
        assert np.abs(inside - before).max() > 1e-3
    assert fast.forward(IDS[:4], fast.new_cache(8)).tobytes() == before.tobytes()


def test_a_cache_that_was_cut_goes_on_from_there(tmp_path):
    fast = CpuEngine(make(tmp_path, "qwen2"))
    cache = fast.new_cache(8)
    fast.forward(IDS[:6], cache)
    cache.truncate(3)
    np.testing.assert_allclose(fast.forward(IDS[3:5], cache), fast.forward(IDS[:5], fast.new_cache(8)), atol=1e-4)
    with pytest.raises(UsageError, match="cannot be cut to 6"):
        cache.truncate(6)


def test_a_context_beyond_the_memory_is_refused_in_words(tmp_path):
    with pytest.raises(UsageError, match=r"the keys and values of .* GB, which this machine lacks"):
        CpuEngine(make(tmp_path, "qwen2")).new_cache(1 << 50)


def test_large_models_take_this_engine_and_small_ones_the_reference(tmp_path, monkeypatch):
    model = make(tmp_path, "qwen2")
    assert isinstance(runtime.load(model, "cpu"), ReferenceEngine)
    monkeypatch.setattr(runtime, "SMALL", 0)
    assert isinstance(runtime.load(model, "cpu", dtype="float32"), CpuEngine)
    assert isinstance(runtime.load(model, "cpu", dtype="float64"), ReferenceEngine)
    with pytest.raises(UsageError, match="does not compute in float16"):
        runtime.load(model, "cpu", dtype="float16")


def test_what_is_not_modelled_is_refused_before_anything_is_packed(tmp_path):
    with pytest.raises(Unsupported, match="'llama' is not modelled"):
        CpuEngine(make(tmp_path, "qwen2", arch="llama"))


def test_loading_tells_how_far_it_is(tmp_path):
    told = []
    CpuEngine(make(tmp_path, "qwen2"), progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0

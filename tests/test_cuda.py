"""The GPU engine against the reference: step by step, every type, and what may not change between two runs.

Each test runs on a GPU where there is one (marker `gpu`) and, fewer models, on an emulated one (`emulation/`), which
needs a C++ compiler and some patience the first time: what it compiles is kept in pytest's cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from emulation import cupy_on_cpu
from tiny_models import Shape, tiny_model

from ggufkit import gpu, quants, reader
from ggufkit.arch import Config
from ggufkit.errors import DeviceError, NotFinite, Unsupported, UsageError
from ggufkit.runtime.engine import Edit, element_edits
from ggufkit.runtime.reference import ReferenceEngine
from ggufkit.runtime.sampling import Sampler, SamplingParams, log_sum_exp
from ggufkit.steps import Recorder

SMALL_BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")
LARGE_BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ2_XS", "IQ3_S", "IQ4_XS", "TQ1_0", "TQ2_0")
FLOATS = ("F32", "F16", "BF16")
TYPES = (*FLOATS, *SMALL_BLOCKS, *LARGE_BLOCKS)

#: name → how the tiny model is made
MODELS = {
    "qwen2": {"type": "Q5_0", "types": {"attn_v.weight": "Q8_0", "output.weight": "Q8_0"}},
    "qwen3": {
        "arch": "qwen3",
        "type": "Q8_0",
        "shape": Shape(n_embd=128, n_head=4, n_head_kv=1, head_dim=64, n_ff=256),
    },
    "tied": {"type": "Q4_0", "tied": True, "shape": Shape(n_layer=1)},
    "unlike": {"type": "Q5_0", "types": {"ffn_up.weight": "Q4_1", "ffn_down.weight": "F16", "output.weight": "F32"}},
    "K": {
        "type": "Q4_K",
        "types": {"attn_v.weight": "Q6_K", "ffn_down.weight": "Q6_K", "ffn_up.weight": "Q5_K"},
        "shape": Shape(n_embd=256, n_head=4, n_head_kv=2, head_dim=64, n_ff=512, n_layer=1),
    },
}
IDS = [5, 250, 17, 17, 99, 3, 280, 41, 8, 120, 77, 1]

has_gpu = gpu.usable()
PLACES = [
    pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(not has_gpu, reason="needs a CUDA GPU and CuPy")]),
    pytest.param(
        "emulated",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(
                not (os.environ.get("GGUFKIT_TEST_EMULATION") and cupy_on_cpu.available()),
                reason="takes minutes: GGUFKIT_TEST_EMULATION=1 runs it, with g++ on Linux",
            ),
        ],
    ),
]


@pytest.fixture(params=PLACES)
def place(request, monkeypatch) -> Iterator[str]:
    """With a GPU, or what looks like one; and every prompt run as one, however short."""
    from ggufkit.runtime.cuda import decode
    from ggufkit.runtime.cuda import engine as engines

    monkeypatch.setattr(engines, "FEW_BYTES", 0)
    if request.param == "gpu":
        yield "gpu"
        return

    monkeypatch.setattr(decode, "WARPS", 4)
    with cupy_on_cpu.emulated(monkeypatch, Path(request.config.cache.mkdir("cuda_emulation"))):
        yield "emulated"


def make(tmp_path, name, **changes):
    return reader.open(tiny_model(tmp_path / f"{name}.gguf", **{**MODELS[name], **changes}))


def engine_of(model, dtype="float32"):
    from ggufkit.runtime.cuda import CudaEngine

    return CudaEngine(model, dtype)


def worst(want: Recorder, got: Recorder) -> tuple[float, str]:
    """The largest difference of a step, as a share of the step's largest value, and whose it is."""
    assert list(want.arrays) == list(got.arrays)
    found = []
    for name, array in want.arrays.items():
        assert got.arrays[name].shape == array.shape, name
        assert got.arrays[name].dtype == np.float32
        found.append((float(np.abs(array - got.arrays[name]).max() / np.abs(array).max()), name))
    return max(found)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float16", 2e-2)])
def test_every_step_is_the_reference_s(tmp_path, place, name, dtype, limit):
    """A prompt, a token, another prompt after what the cache holds, another token."""
    if place == "emulated" and dtype == "float16" and name not in ("qwen2", "K"):
        pytest.skip("the kernels are the same; a GPU tries them all")
    model = make(tmp_path, name)
    engine, reference = engine_of(model, dtype), ReferenceEngine(model)
    cache, kept = engine.new_cache(32), reference.new_cache(32)
    for part in (IDS[:4], IDS[4:5], IDS[5:11], IDS[11:]):
        want, got = Recorder(), Recorder()
        expected = reference.forward(part, kept, logits="all", tap=want)
        logits = engine.forward(part, cache, logits="all", tap=got)
        assert worst(want, got) < (limit, "")
        np.testing.assert_allclose(logits, expected, atol=limit * np.abs(expected).max())
    assert cache.length == kept.length == len(IDS)


@pytest.mark.parametrize("type_name", TYPES)
def test_every_type_runs(tmp_path, place, type_name):
    if place == "emulated" and type_name not in ("Q4_1", "Q3_K", "IQ4_XS", "BF16"):
        pytest.skip("test_every_type_survives_packing sees it; a GPU runs it")
    model = reader.open(tiny_model(tmp_path / "m.gguf", type=type_name))
    engine, reference = engine_of(model), ReferenceEngine(model)
    cache, kept = engine.new_cache(8), reference.new_cache(8)
    for part in (IDS[:3], IDS[3:4]):
        expected = reference.forward(part, kept)
        np.testing.assert_allclose(engine.forward(part, cache), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("type_name", TYPES)
def test_every_type_survives_packing(tmp_path, place, type_name):
    """Random weights through tiles and back: what the decoders see is what the file says."""
    from ggufkit.runtime.cuda.prompt import PromptRunner
    from ggufkit.runtime.cuda.weights import DeviceWeights

    shape = Shape(n_embd=256, n_head=2, n_head_kv=1, head_dim=128, n_ff=256, n_layer=1)
    if place == "emulated":
        pytest.importorskip("numpy")
    model = reader.open(tiny_model(tmp_path / "m.gguf", type=type_name, shape=shape))
    config = ReferenceEngine(model).config
    weights = DeviceWeights(model, config)
    weights.load()
    runner = PromptRunner(config, weights, half=False)
    runner.compile()
    runner._prepare_weights()
    wide = runner._wide(0)
    for name, array in (("attn_output", wide.out), ("ffn_down", wide.down)):
        tensor = model.tensor(f"blk.0.{name}.weight")
        expected = quants.dequantize(tensor.type, model.read(tensor)).reshape(tensor.shape)
        np.testing.assert_allclose(array.get(), expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_prompt_is_its_tokens_one_by_one(tmp_path, place, dtype):
    engine = engine_of(make(tmp_path, "qwen2"), dtype)
    together, cache = engine.forward(IDS[:6], engine.new_cache(8), logits="all"), engine.new_cache(8)
    alone = np.concatenate([engine.forward([token], cache) for token in IDS[:6]])
    np.testing.assert_allclose(alone, together, atol=(1e-4 if dtype == "float32" else 0.1))


@pytest.mark.parametrize("name", ["qwen2", "tied"])
def test_a_short_prompt_may_go_through_the_decoding_kernel(tmp_path, place, monkeypatch, name):
    from ggufkit.runtime.cuda import engine as engines

    model = make(tmp_path, name)
    engine, reference = engine_of(model), ReferenceEngine(model)
    cache, kept = engine.new_cache(16), reference.new_cache(16)
    monkeypatch.setattr(engines, "FEW_BYTES", 1 << 40)
    for part in (IDS[:1], IDS[1:6], IDS[6:8]):
        expected = reference.forward(part, kept)
        np.testing.assert_allclose(engine.forward(part, cache), expected, atol=1e-4)
        assert cache.length == kept.length


def test_two_runs_agree_in_every_bit(tmp_path, place):
    engine = engine_of(make(tmp_path, "qwen2"), "float16")

    def run():
        cache, seen = engine.new_cache(16), Recorder()
        logits = [engine.forward(part, cache, tap=seen) for part in (IDS[:5], IDS[5:6])]
        return [*logits, *seen.arrays.values()]

    for first, second in zip(run(), run(), strict=True):
        assert first.tobytes() == second.tobytes()


#: each kind of filter, and so much warmth that chance decides
SAMPLING = [
    SamplingParams(),
    SamplingParams(temperature=1.5, seed=3),
    SamplingParams(temperature=2.0, min_p=0.2, seed=4),
    SamplingParams(temperature=1.2, top_k=7, seed=5),
    SamplingParams(temperature=0.9, top_p=0.6, seed=6),
    SamplingParams(temperature=1.1, top_k=40, top_p=0.9, min_p=0.05, seed=7),
    SamplingParams(temperature=1.0, top_k=1000, seed=8),
]


@pytest.mark.parametrize("params", SAMPLING, ids=str)
def test_following_says_what_one_token_at_a_time_says(tmp_path, place, params):
    engine = engine_of(make(tmp_path, "qwen2"))
    cache = engine.new_cache(16)
    first = int(engine.forward(IDS[:4], cache)[0].argmax())
    said = list(engine.follow(first, cache, 7, Sampler(params), burst=3))
    assert cache.length == 4 + 7
    cache.truncate(4)
    token, sampler = first, Sampler(params)
    for choice in said:
        expected = sampler(engine.forward([token], cache)[0])
        assert choice.id == expected.id
        assert choice.logprob == pytest.approx(expected.logprob, abs=1e-4)
        token = choice.id


def test_following_left_early_leaves_the_cache_at_what_was_taken(tmp_path, place):
    engine = engine_of(make(tmp_path, "qwen2"))
    cache = engine.new_cache(16)
    answer = engine.follow(IDS[0], cache, 9, Sampler(), burst=4)
    taken = [next(answer) for _ in range(3)]
    answer.close()
    assert cache.length == 3
    assert engine.forward([taken[-1].id], cache).shape == (1, 288)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1, seed=1)], ids=["greedy", "drawn"])
def test_following_ends_where_the_logits_are_not_finite(tmp_path, place, params):
    model = make(tmp_path, "qwen2")
    engine = engine_of(model)
    cache = engine.new_cache(16)
    with (
        engine.patched(element_edits(model, "blk.1.attn_v.bias", {3: float("nan")})),
        pytest.raises(NotFinite, match="288 are NaN"),
    ):
        next(engine.follow(IDS[0], cache, 9, Sampler(params), burst=4))
    assert cache.length == 1


def choose(logits, params, uniform):
    """One choice on the device, from logits of our own."""
    from ggufkit.runtime.cuda.sample import Chooser

    cupy = gpu.library()
    likeliest = int(logits.argmax())
    token, chance = cupy.asarray(np.array([likeliest], np.int32)), cupy.empty(1, np.float32)
    chance.set(np.array([logits[likeliest] - log_sum_exp(logits)], np.float32))
    Chooser(params, len(logits))(cupy.asarray(logits), uniform, token, chance)
    return int(token.get()[0]), float(chance.get()[0])


@pytest.mark.parametrize("params", SAMPLING[1:], ids=str)
@pytest.mark.parametrize("spread", [0.5, 3.0, 30.0])
def test_a_choice_is_the_host_s(place, params, spread):
    rng = np.random.default_rng(0)
    n_vocab, tries = (151_936, 20) if place == "gpu" else (700, 3)
    for _ in range(tries):
        logits, uniform = rng.normal(0, spread, n_vocab).astype(np.float32), float(rng.random())
        token, chance = choose(logits, params, uniform)
        expected = Sampler(params)(logits, uniform)
        assert np.isnan(chance) or (token, chance) == (expected.id, pytest.approx(expected.logprob, abs=1e-4))
        assert not np.isnan(chance) or params.top_k > 100 or params.top_p < 1  # too many for it


@pytest.mark.parametrize(
    ("logits", "params", "expected"),
    [
        ([1, 3, 3, 2], {"top_k": 2}, {1, 2}),
        ([5, 5, 5, 5, 5, 5], {"top_k": 3}, {0, 1, 2}),
        ([0, 9, 0, 0], {"top_p": 0.5}, {1}),
        ([0, 200, 0, 199.9], {"top_p": 1e-9}, {1}),
        ([-1e30, 0, 1e-3, -1e30], {"top_k": 2}, {1, 2}),
        ([0, 1, 2, 3], {"min_p": 1.0}, {3}),
        ([7], {"top_k": 5, "top_p": 0.5}, {0}),
    ],
)
def test_what_the_filters_leave_on_the_device(place, logits, params, expected):
    said = {
        choose(np.array(logits, np.float32), SamplingParams(temperature=50, seed=0, **params), uniform)[0]
        for uniform in np.linspace(0, 0.9999, 12)
    }
    assert said == expected


def test_a_context_beyond_the_training_s_is_rotated_like_any_other(tmp_path, place):
    model = make(tmp_path, "tied")
    engine, reference = engine_of(model), ReferenceEngine(model)
    n = engine.config.n_ctx_train + 3
    ids = [i % 250 for i in range(n - 1)]
    cache, kept = engine.new_cache(n), reference.new_cache(n)
    for part in (ids, IDS[:1]):
        expected = reference.forward(part, kept)
        np.testing.assert_allclose(engine.forward(part, cache), expected, atol=1e-4)


def test_the_keys_of_a_long_context_may_be_split(tmp_path, place, monkeypatch):
    """Two keys a stretch, so that a short context needs all the stretches there are."""
    from ggufkit.runtime.cuda import decode

    made = decode.model_macros
    monkeypatch.setattr(decode, "model_macros", lambda *args: {**made(*args), "KEYS_A_SPLIT": 2})
    multiprocessors = 132 if place == "gpu" else 12
    with cupy_on_cpu_with(monkeypatch, place, multiprocessors):
        model = make(tmp_path, "tied", shape=Shape(n_layer=1, n_vocab=288))
        engine, reference = engine_of(model), ReferenceEngine(model)
        cache, kept = engine.new_cache(16), reference.new_cache(16)
        for token in IDS[:7]:
            expected = reference.forward([token], kept)
            np.testing.assert_allclose(engine.forward([token], cache), expected, atol=1e-4)


def cupy_on_cpu_with(monkeypatch, place, multiprocessors):
    if place == "gpu":
        return nullcontext()
    return cupy_on_cpu.emulated(monkeypatch, cupy_on_cpu.CACHE, multiprocessors=multiprocessors)


@pytest.mark.parametrize("tensor", ["blk.0.ffn_up.weight", "blk.0.attn_k.bias", "token_embd.weight"])
def test_an_edit_is_run_and_undone_exactly(tmp_path, place, tensor):
    model = make(tmp_path, "qwen2", types={"ffn_up.weight": "F16", "token_embd.weight": "F32"})
    engine, reference = engine_of(model), ReferenceEngine(model)
    edits = element_edits(model, tensor, {5 * 64 + 3 if "weight" in tensor else 3: 30.0})
    before = engine.forward(IDS[:4], engine.new_cache(8))
    with reference.patched(edits), engine.patched(edits):
        expected = reference.forward(IDS[:4], reference.new_cache(8))
        inside = engine.forward(IDS[:4], engine.new_cache(8))
        np.testing.assert_allclose(inside, expected, atol=1e-4)
        assert np.abs(inside - before).max() > 1e-3
    assert engine.forward(IDS[:4], engine.new_cache(8)).tobytes() == before.tobytes()


def test_an_edit_of_packed_bytes(tmp_path, place):
    """A block scale and a code of one row, of a matrix that shares its tiles with another."""
    model = make(tmp_path, "qwen2")
    engine, reference = engine_of(model), ReferenceEngine(model)
    edits = [
        Edit("blk.1.ffn_gate.weight", 22 * 7, np.float16(0.5).tobytes()),
        Edit("blk.1.ffn_up.weight", 300, b"\x55"),
    ]
    for part in (IDS[:1], IDS[:3]):
        with reference.patched(edits), engine.patched(edits):
            expected = reference.forward(part, reference.new_cache(8))
            np.testing.assert_allclose(engine.forward(part, engine.new_cache(8)), expected, atol=1e-4)


def test_a_nan_is_seen_where_it_enters(tmp_path, place):
    """Activations become integers on their way; a NaN must not get lost there, in no product after it."""
    model = make(tmp_path, "qwen2")
    engine = engine_of(model, "float16")
    edits = element_edits(model, "blk.1.attn_v.bias", {3: float("nan")})
    for ids in (IDS[:1], IDS[:3]):
        seen = Recorder()
        with engine.patched(edits):
            logits = engine.forward(ids, engine.new_cache(8), tap=seen)
        finite = {name for name, array in seen.arrays.items() if np.isfinite(array).all()}
        assert "v_proj-1" in finite
        assert {"v_bias-1", "kqv-1", "attn_out-1", "ffn_norm-1", "ffn_act-1", "l_out-1"}.isdisjoint(finite)
        assert np.isnan(logits).all()


def test_only_the_steps_that_are_wanted_are_shown(tmp_path, place):
    engine = engine_of(make(tmp_path, "tied"))
    for ids in (IDS[:3], IDS[:1]):
        seen = Recorder(["q_rope", "l_out"], layers=[0])
        engine.forward(ids, engine.new_cache(8), tap=seen)
        assert list(seen.arrays) == ["q_rope-0", "l_out-0"]


def test_what_it_says_of_itself(tmp_path, place):
    engine = engine_of(make(tmp_path, "tied"), "float16")
    assert (engine.name, engine.dtype) == ("cuda", np.dtype(np.float16))
    assert engine.device == gpu.device().name


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda engine: engine.forward([], engine.new_cache(4)), UsageError),
        (lambda engine: engine.forward([288], engine.new_cache(4)), UsageError),
        (lambda engine: engine.forward([1] * 5, engine.new_cache(4)), UsageError),
        (lambda engine: engine.new_cache(0), UsageError),
        (lambda engine: engine.new_cache(4).truncate(1), UsageError),
        (lambda engine: next(engine.follow(-1, engine.new_cache(4), 2, Sampler())), UsageError),
        (lambda engine: engine.patched([Edit("no.weight", 0, b"1")]).__enter__(), UsageError),
        (lambda engine: engine.patched([Edit("output_norm.weight", 254, b"123")]).__enter__(), UsageError),
    ],
)
def test_a_wrong_request_says_so(tmp_path, place, ask, error):
    engine = engine_of(make(tmp_path, "tied"))
    with pytest.raises(error):
        ask(engine)


def test_another_dtype_is_refused(tmp_path, place):
    with pytest.raises(UsageError, match="float64"):
        engine_of(make(tmp_path, "tied"), "float64")


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu, reason="needs a CUDA GPU and CuPy")
def test_a_context_larger_than_the_memory_says_what_to_do(tmp_path):
    engine = engine_of(make(tmp_path, "tied"))
    with pytest.raises(DeviceError, match="context") as caught:
        engine.new_cache(1 << 34)
    assert "--ctx" in caught.value.help


def test_heads_that_do_not_fit_are_refused():
    from ggufkit.runtime.cuda.engine import _check_shapes

    fits = Config("qwen2", 1, 64, 4, 2, 16, 96, 288, 128, 1e-6, 1e4)
    _check_shapes(fits)
    for change in ({"head_dim": 12}, {"head_dim": 512}, {"n_embd": 66}, {"n_ff": 98}):
        values = {name: getattr(fits, name) for name in fits.__dataclass_fields__} | change
        with pytest.raises(Unsupported):
            _check_shapes(Config(**values))

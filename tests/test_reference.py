"""The specification against somebody else's arithmetic: a second implementation, and llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import plain_model
import pytest
import tiny_models
from tiny_models import NARROW, tiny_model

from ggufkit import quants, reader
from ggufkit.runtime import load
from ggufkit.runtime.reference import REFERENCE, ReferenceEngine, layer_plan, matmul
from ggufkit.runtime.sampling import log_sum_exp
from ggufkit.steps import STEPS, Recorder

IDS = [72, 105, 257, 3, 3, 200, 17, 90, 256, 1, 45, 12]


@pytest.fixture(params=["qwen2", "qwen3"])
def arch(request):
    return request.param


def run(engine, ids=IDS, tap=None):
    return engine.forward(ids, engine.new_cache(64), logits="all", tap=tap)


@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied"])
def test_agrees_with_a_second_implementation(tmp_path, arch, tied):
    path = tiny_model(tmp_path / "m.gguf", arch=arch, tied=tied, seed=7)
    expected = plain_model.logits(tiny_models.tensors(arch, NARROW, tied=tied, seed=7), IDS, NARROW, arch)
    with reader.open(path) as gguf:
        assert np.abs(run(ReferenceEngine(gguf, np.float64)) - expected).max() < 1e-5
        assert np.abs(run(ReferenceEngine(gguf, np.float32)) - expected).max() < 2e-4


@pytest.mark.parametrize("type_name", ["F16", "BF16", "Q8_0", "Q5_0", "Q4_K", "Q6_K"])
def test_runs_the_dequantized_weights(tmp_path, type_name):
    path = tiny_model(tmp_path / "m.gguf", type=type_name)
    shape = tiny_models.WIDE if type_name.endswith("_K") else NARROW
    with reader.open(path) as gguf:
        weights = {
            name: quants.dequantize(tensor.type, gguf.read(tensor)).reshape(tensor.shape)
            for name, tensor in gguf.tensors.items()
        }
        expected = plain_model.logits(weights, IDS, shape, "qwen2")
        assert np.abs(run(ReferenceEngine(gguf)) - expected).max() < 3e-4


def test_scaled_positions_are_divided(tmp_path):
    path = tiny_model(
        tmp_path / "m.gguf", metadata={"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 4.0}
    )
    with reader.open(path) as gguf:
        engine, tap = ReferenceEngine(gguf, np.float64), Recorder(["q_bias-0", "q_rope-0"])
        run(engine, tap=tap)
    before, after = (tap.arrays[name].reshape(len(IDS), -1, NARROW.head_dim) for name in ("q_bias-0", "q_rope-0"))
    angle = 8 / 4.0  # position 8, pair 0
    assert after[8, 1, 0] == pytest.approx(before[8, 1, 0] * np.cos(angle) - before[8, 1, 8] * np.sin(angle))


def test_steps_are_those_of_the_contract_in_their_order_and_shapes(tmp_path, arch):
    with reader.open(tiny_model(tmp_path / "m.gguf", arch=arch)) as gguf:
        engine, tap = ReferenceEngine(gguf), Recorder()
        run(engine, tap=tap)
    sizes = engine.config.sizes() | {"T": len(IDS), "S": len(IDS), "H": NARROW.n_head, "K": NARROW.n_head_kv}
    absent = {"qwen2": {"q_norm", "k_norm"}, "qwen3": {"q_bias", "k_bias", "v_bias"}}[arch]
    of_layer = [step for step in STEPS if step.per_layer and step.name not in absent]
    expected = [("embd", "T,E")]
    expected += [(f"{step.name}-{layer}", step.shape) for layer in range(NARROW.n_layer) for step in of_layer]
    expected += [("result_norm", "T,E"), ("result_output", "T,V")]
    shapes = [(name, tuple(sizes[letter] for letter in letters.split(","))) for name, letters in expected]
    assert [(name, array.shape) for name, array in tap.arrays.items()] == shapes


def test_last_logits_are_the_last_of_all(tmp_path, arch):
    with reader.open(tiny_model(tmp_path / "m.gguf", arch=arch)) as gguf:
        engine = ReferenceEngine(gguf)
        everything, last = run(engine), engine.forward(IDS, engine.new_cache(64))
    assert last.shape == (1, NARROW.n_vocab)
    assert last.dtype == np.float32
    assert np.abs(last - everything[-1:]).max() < 1e-5


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 7], [11, 1], [1, 10, 1]], ids=str)
def test_the_cache_changes_nothing(tmp_path, arch, pieces):
    with reader.open(tiny_model(tmp_path / "m.gguf", arch=arch)) as gguf:
        engine = ReferenceEngine(gguf, np.float64)
        cache, logits, at = engine.new_cache(12), [], 0
        for n in pieces:
            logits.append(engine.forward(IDS[at : at + n], cache, logits="all"))
            at += n
        assert cache.length == 12
        assert np.abs(np.concatenate(logits) - run(engine)).max() < 1e-5


def test_a_cut_cache_forgets(tmp_path):
    with reader.open(tiny_model(tmp_path / "m.gguf")) as gguf:
        engine = ReferenceEngine(gguf)
        cache = engine.new_cache(32)
        engine.forward([1, 2, 3, 4, 5, 6], cache)
        cache.truncate(2)
        again = engine.forward(IDS[2:], cache)
        assert np.array_equal(again, engine.forward(IDS[2:], prefilled(engine, [1, 2])))


def prefilled(engine, ids):
    cache = engine.new_cache(32)
    engine.forward(ids, cache)
    return cache


def test_a_step_can_be_replaced(tmp_path):
    def without_up(state):
        return REFERENCE["ffn_act"](state) / state["ffn_up"]

    with reader.open(tiny_model(tmp_path / "m.gguf")) as gguf:
        tap = Recorder(["ffn_act-1", "ffn_gate-1"])
        run(ReferenceEngine(gguf, steps={**REFERENCE, "ffn_act": without_up}), tap=tap)
    gate = tap.arrays["ffn_gate-1"]
    assert tap.arrays["ffn_act-1"] == pytest.approx(gate / (1 + np.exp(-gate)), rel=1e-4)


def test_every_contract_step_has_a_function():
    assert set(REFERENCE) == {step.name for step in STEPS} | {"keys", "values"}


def test_the_plan_stores_keys_before_it_scores_them(tmp_path, arch):
    with reader.open(tiny_model(tmp_path / "m.gguf", arch=arch)) as gguf:
        plan = layer_plan(ReferenceEngine(gguf).config)
    assert plan.index("k_rope") < plan.index("keys") < plan.index("kq") < plan.index("kqv")
    assert plan.index("values") < plan.index("kqv")


def test_a_damaged_model_runs_without_a_warning(tmp_path):
    path = tiny_model(tmp_path / "m.gguf", edit=lambda tensors: tensors["blk.0.ffn_norm.weight"].fill(np.inf))
    with reader.open(path) as gguf:
        assert not np.isfinite(run(ReferenceEngine(gguf))).any()


def test_products_keep_the_precision_of_their_input():
    x, weight = np.ones((2, 3)), np.ones((4, 3), np.float32)
    assert matmul(x, weight).dtype == np.float64
    assert matmul(x.astype(np.float32), weight).dtype == np.float32


@pytest.mark.oracle
@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied"])
def test_llama_cpp_says_the_same_of_float_weights(tmp_path, arch, tied):
    llama_cpp = pytest.importorskip("llama_cpp")
    path = tiny_model(tmp_path / "m.gguf", arch=arch, tied=tied)
    f32 = llama_cpp.GGML_TYPE_F32
    options = {"n_ctx": 64, "logits_all": True, "n_threads": 2, "type_k": f32, "type_v": f32, "verbose": False}
    with reader.open(path) as gguf:
        oracle = llama_cpp.Llama(str(path), **options)
        oracle.eval(IDS)
        expected = np.array(oracle.scores[: len(IDS)])
        oracle.close()
        assert np.abs(run(ReferenceEngine(gguf, np.float64)) - expected).max() < 2e-4


# --- the real model against llama.cpp's golden numbers ---------------------------------------------------------

GOLDEN = json.loads((Path(__file__).parent / "golden" / "logits_qwen2.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["reference", "cpu"])
def real_engine(real_model, request):
    with reader.open(real_model) as gguf:
        yield load(gguf, device=request.param)


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize("prompt", list(GOLDEN["prompts"]))
def test_llama_cpp_says_the_same_of_the_real_model(real_engine, prompt):
    """Within what llama.cpp's int8 activations and f16 cache explain; teacher-forced, at every position."""
    golden = {key: np.array(values) for key, values in GOLDEN["prompts"][prompt].items()}
    logits = real_engine.forward(golden["ids"], real_engine.new_cache(64), logits="all")
    sure = golden["margin"] > 0.5
    assert sure.sum() > 10
    assert np.array_equal(logits.argmax(-1)[sure], golden["top_ids"][sure, 0])
    found = np.take_along_axis(logits, golden["top_ids"], axis=-1)
    differences = np.concatenate(
        [found - golden["top_logits"], logits[:, GOLDEN["columns"]] - golden["columns"]], axis=1
    )
    assert np.sqrt((differences**2).mean()) < 0.2
    divergence = coarse_kl(golden["top_logits"] - golden["logsumexp"][:, None], found - log_sum_exp(logits)[:, None])
    assert divergence.mean() < 0.005
    assert divergence.max() < 0.05


def coarse_kl(expected, found):
    """KL divergence over the five likeliest tokens, each by itself, and all others together, which are at least 1e-4:
    the golden numbers are rounded to that."""
    shares = [np.exp(x) for x in (expected, found)]
    p, q = (np.append(x, np.maximum(1 - x.sum(-1, keepdims=True), 1e-4), axis=-1) for x in shares)
    return (p * np.log(p / q)).sum(-1)

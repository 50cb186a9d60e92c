"""Every known bug, put into an engine that is not ours, is named; a healthy engine is named nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from foreign_engine import ForeignEngine
from tiny_models import tiny_model

from ggufkit import reader
from ggufkit.arch import read_config
from ggufkit.runtime.diagnose import Diagnosis, diagnose, pattern
from ggufkit.runtime.evaluate import Graph
from ggufkit.runtime.faults import FAULTS
from ggufkit.runtime.weights import Weights
from ggufkit.steps import parse_name

IDS = [5, 99, 17, 200, 44, 45, 17, 99, 5, 60, 61, 62, 63, 64]

#: bug of the foreign engine, the tiny model's type that shows it, whether it needs decoding one by one
BUGS: tuple[tuple[str, str, bool], ...] = (
    *((bug, "Q5_0", False) for bug in ("transposed", "leading_dimension", "gate_up_swapped", "key_value_swapped")),
    ("other_layer:1", "Q5_0", False),
    ("query_output_swapped", "Q5_0", False),
    ("head_tied", "Q5_0", False),
    *((bug, "Q5_0", False) for bug in ("embedding_off_by_one", "embedding_scaled", "embedding_transposed")),
    *((bug, "Q5_0", False) for bug in ("nibble_order", "nibbles_swapped", "high_bits_misplaced", "high_bits_missing")),
    *((bug, "Q5_0", False) for bug in ("zero_point_missing", "scale_of_next_block", "scale_byte_order")),
    ("block_off_by_one", "Q5_0", False),
    *((bug, "Q4_1", False) for bug in ("min_sign", "min_missing", "nibble_order", "scale_of_next_block")),
    *((bug, "F32", False) for bug in ("bias_missing", "bias_doubled", "bias_negative", "bias_of_other_layer:1")),
    ("bias_key_value_swapped", "F32", False),
    *((bug, "F32", False) for bug in ("rope_off", "position_stuck", "rope_interleaved", "rope_base:1000000")),
    *(
        (bug, "F32", False)
        for bug in ("position_offset:1", "position_offset:37", "rope_negative", "rope_half_channels")
    ),
    *((bug, "F32", False) for bug in ("rope_exponent", "rope_on_values")),
    *((bug, "F32", True) for bug in ("cache_current_only", "cache_slot_stuck", "cache_off_by_one", "rope_off")),
    *((bug, "F32", False) for bug in ("cache_stride", "cache_stride_position", "no_final_norm", "residual_from_input")),
    *((bug, "F32", False) for bug in ("head_modulo", "first_key_head", "no_mask", "mask_with_zero", "mask_off_by_one")),
    *((bug, "F32", False) for bug in ("no_scale", "scale_by_head_dim", "scale_by_width")),
    *((bug, "F32", False) for bug in ("softmax_over_heads", "softmax_over_queries", "no_output_projection")),
    *((bug, "F32", False) for bug in ("norm_without_weight", "norm_weight_plus_one", "norm_epsilon:0.001")),
    *(
        (bug, "F32", False)
        for bug in ("layer_norm", "norm_by_sum", "norm_skipped", "no_residual", "residual_after_norm")
    ),
    *((bug, "F32", False) for bug in ("gelu_tanh", "gelu", "quick_gelu", "relu", "sigmoid", "silu_on_up")),
    *((bug, "F32", False) for bug in ("no_up", "no_activation")),
)
#: bugs of the foreign engine that are cases of one fault
NAMED = {"cache_stride_position": "cache_stride", "no_final_norm": "norm_skipped"}
HARMLESS = ("", "fp16_activations", "bf16_activations", "int8_activations")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Bench]:
    folder = tmp_path_factory.mktemp("models")
    return {type_: Bench(tiny_model(folder / f"{type_}.gguf", type=type_)) for type_ in ("F32", "Q5_0", "Q4_1")}


class Bench:
    """One model with our graph and somebody else's engine."""

    def __init__(self, path) -> None:
        self.gguf = reader.open(path)
        self.graph = Graph(read_config(self.gguf))
        self.weights = Weights(self.gguf)
        self.engine = ForeignEngine(self.gguf)

    def diagnose(
        self, bugs: Sequence[str], *, decode: bool = False, steps: str = "", ids: Sequence[int] = IDS
    ) -> Diagnosis:
        arrays = self.engine.trace(ids, bugs, decode=decode)
        known = {parse_name(name): array for name, array in arrays.items() if not steps or name.startswith(steps)}
        return diagnose(self.graph, self.weights, ids, known, mode="decode" if decode else "prefill")


def names(diagnosis: Diagnosis) -> list[set[str]]:
    """The faults found, each with the ones that cannot be told from it."""
    return [{fault.name, *(name for name, _ in fault.same_numbers_as)} for fault in diagnosis.faults]


@pytest.mark.parametrize(("bug", "type_", "decode"), BUGS)
def test_an_injected_bug_is_named_first_and_alone(models, bug, type_, decode):
    diagnosis = models[type_].diagnose([bug] if bug else [], decode=decode)
    bug = bug.partition(":")[0]
    assert NAMED.get(bug, bug) in names(diagnosis)[0]
    assert len(diagnosis.faults) == 1
    assert not diagnosis.unexplained
    assert diagnosis.first_divergence is not None


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("type_", ["F32", "Q5_0", "Q4_1"])
@pytest.mark.parametrize("rounding", HARMLESS)
def test_a_healthy_engine_is_named_nothing(models, rounding, type_, decode):
    diagnosis = models[type_].diagnose([rounding], decode=decode)
    assert diagnosis.faults == ()
    assert diagnosis.first_divergence is None
    assert diagnosis.checked > 40


def test_rounding_is_recognised_as_noise(models):
    assert "activations are rounded to fp16" in models["F32"].diagnose(["fp16_activations"]).noise
    assert any("int8" in title for title in models["F32"].diagnose(["int8_activations"]).noise)


def test_a_bug_under_int8_noise_is_still_named(models):
    for bug in ("rope_interleaved", "bias_missing", "transposed", "no_scale", "gelu_tanh"):
        assert bug in names(models["F32"].diagnose([bug, "int8_activations"]))[0], bug


@pytest.mark.parametrize(
    "bugs",
    [
        ("transposed", "bias_missing"),
        ("rope_off", "gelu"),
        ("bias_missing", "no_scale"),
        ("head_modulo", "norm_skipped"),
    ],
)
def test_two_bugs_are_found_one_after_the_other(models, bugs):
    found = set().union(*names(models["F32"].diagnose(bugs)))
    assert set(bugs) <= found


def test_the_three_historic_bugs_at_once(models):
    diagnosis = models["Q5_0"].diagnose(["transposed", "bias_missing", "cache_slot_stuck"], decode=True)
    found = set().union(*names(diagnosis))
    assert {"transposed", "bias_missing", "cache_slot_stuck"} <= found


@pytest.mark.parametrize("steps", ["l_out", "q_rope", "kqv", "ffn_inp", "result_output"])
@pytest.mark.parametrize("bug", ["rope_interleaved", "bias_missing", "transposed"])
def test_a_sparse_trace_still_names_the_bug(models, bug, steps):
    diagnosis = models["F32"].diagnose([bug], steps=steps)
    assert bug in names(diagnosis)[0]


def test_faults_with_the_same_numbers_are_one_answer(models):
    fault = models["F32"].diagnose(["rope_off"]).faults[0]
    assert {fault.name, *(name for name, _ in fault.same_numbers_as)} >= {"rope_off", "position_stuck"}


def test_an_unknown_bug_is_not_given_a_name(models):
    bench = models["F32"]
    arrays = bench.engine.trace(IDS)
    known = {parse_name(name): array for name, array in arrays.items()}
    known["ffn_act", 1] = known["ffn_act", 1] * np.float32(1.7)
    diagnosis = diagnose(bench.graph, bench.weights, IDS, known)
    assert diagnosis.faults == ()
    assert diagnosis.unexplained[0] == "ffn_act-1"
    assert (diagnosis.first_divergence.step, diagnosis.first_divergence.layer) == ("ffn_act", 1)


#: what is tried on a real model: bugs of every family, as (bug, decode)
REAL = (
    *((bug, False) for bug in ("", "int8_activations", "transposed", "bias_missing", "high_bits_misplaced")),
    *((bug, False) for bug in ("rope_interleaved", "rope_base:10000", "head_modulo", "no_scale", "fp16_scores")),
    *((bug, False) for bug in ("gelu", "norm_without_weight", "no_residual")),
    *((bug, True) for bug in ("", "cache_slot_stuck", "position_stuck")),
)


@pytest.fixture(scope="module")
def real_bench(real_model) -> Bench:
    return Bench(real_model)


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("bug", "decode"), REAL)
def test_on_a_real_model_the_bug_is_named_alone_and_a_healthy_engine_nothing(real_bench, bug, decode):
    ids = [151644, 872, 198, 7985, 264, 6386]
    diagnosis = real_bench.diagnose([bug], decode=decode, ids=ids)
    name = bug.partition(":")[0]
    if name in HARMLESS:
        assert (diagnosis.faults, diagnosis.first_divergence) == ((), None)
    else:
        assert [name in found for found in names(diagnosis)] == [True]


def test_every_fault_explains_itself():
    for known_fault in FAULTS.values():
        assert len(known_fault.explanation) > 30, known_fault.name
        assert known_fault.title


def test_every_fault_is_injected_by_some_test():
    tried = {bug.partition(":")[0] for bug, _, _ in BUGS} | set(HARMLESS)
    assert set(FAULTS) - tried == {"fp16_scores", "cache_stale"}  # in tests of their own


def test_a_stale_cache_is_told_from_a_missing_mask_by_the_mode(models):
    """What the last prompt left cannot be known, so that the mixed values stay unexplained."""
    bench = models["F32"]
    diagnosis = bench.diagnose(["cache_stale"], decode=True)
    assert diagnosis.faults[0].name == "cache_stale"
    assert [name for name, _ in diagnosis.faults[0].same_numbers_as] == ["no_mask"]
    assert {name.partition("-")[0] for name in diagnosis.unexplained} == {"kqv"}


def test_scores_that_overflow_in_fp16_are_named(tmp_path):
    def enlarge(weights):
        for name in weights:
            if name.endswith(("attn_q.bias", "attn_k.bias")):
                weights[name] = np.abs(weights[name]) * 60 + 100

    bench = Bench(tiny_model(tmp_path / "loud.gguf", edit=enlarge))
    diagnosis = bench.diagnose(["fp16_scores"])
    assert names(diagnosis) == [{"fp16_scores"}]


def test_the_pattern_tells_positions_and_heads():
    expected = np.ones((6, 4, 8), np.float32)
    found = expected.copy()
    found[1:, 2:] += 1
    assert pattern(found, expected) == "positions 1 on, heads 2 on"
    found = expected.copy()
    found[3] += 1
    assert pattern(found, expected) == "position 3 alone, every head"

"""Rules on the running model: healthy ones pass, each kind of damage is seen, and what cannot be run says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import damage
import numpy as np
import pytest
from tiny_models import tiny_model

from ggufkit import checks, demo, doctor, reader
from ggufkit.checks import ablate, behaviour, running
from ggufkit.checks.ablate import Effect, Mend, Outcome
from ggufkit.checks.context import Context
from ggufkit.checks.running import Running, RunRequest
from ggufkit.container import GGUF
from ggufkit.errors import UsageError
from ggufkit.findings import Confidence, Evidence, Finding, Judgement, Report, Severity, Verdict
from ggufkit.runtime.engine import Edit, element_edits
from ggufkit.runtime.reference import REFERENCE, ReferenceEngine

ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO
CORRUPT, SUSPICIOUS, GENUINE = Judgement.CORRUPT, Judgement.SUSPICIOUS, Judgement.GENUINE
VALUE_BIAS = "blk.0.attn_v.bias"  # of the demo model: 0.54 at most in this layer, 1.5 in others


@pytest.fixture(scope="module")
def gguf() -> Iterator[GGUF]:
    with reader.open(demo.MODEL) as opened:
        yield opened


@pytest.fixture(scope="module")
def healthy() -> Report:
    return checks.run(demo.MODEL, run=True, device="cpu", ablate=["blk.*.attn_*.bias"])


@pytest.fixture(scope="module")
def at_work(gguf: GGUF) -> Running:
    found = running.start(Context(gguf), RunRequest(device="cpu"), [])
    assert found is not None
    return found


def after(gguf: GGUF, folder: Path, edits: list[Edit], *select: str) -> Report:
    """The report on a damaged copy of the demo model."""
    copy = demo.damaged(gguf, folder / "damaged.gguf", edits)
    return checks.run(copy, select=select or ["N", "O", "B101", "B201"], run=True, device="cpu")


def one(report: Report, code: str) -> Finding:
    (finding,) = [finding for finding in report.findings if finding.code == code]
    return finding


def function(finding: Finding) -> Evidence:
    """What the run says of it; of two such, the first, which is about mending."""
    return next(evidence for evidence in finding.evidence if evidence.kind == "function")


# -- healthy -----------------------------------------------------------------------------------------------------------


def test_a_healthy_model_has_no_finding_above_info(healthy: Report) -> None:
    assert (healthy.verdict, healthy.exit_code()) == (Verdict.OK, 0)
    assert {finding.severity for finding in healthy.findings} == {INFO}


@pytest.mark.parametrize(
    "name",
    ["finite", "padding", "attention", "cache", "determinism", "agreement", "copy", "nonce", "repetition",
     "end_of_turn", *(f"bits_per_byte.{text}" for text in ("prose", "code", "Chinese", "conversation"))],
)  # fmt: skip
def test_every_number_is_in_the_report(healthy: Report, name: str) -> None:
    probe = healthy.probes[name]
    assert probe.keys() == {"value", "limit", "text"}
    assert probe["text"]


def test_the_demo_model_can_do_what_it_learned(healthy: Report) -> None:
    values = {name: probe["value"] for name, probe in healthy.probes.items()}
    assert values["copy"]["second"] < 0.2 * values["copy"]["first"]
    assert values["bits_per_byte.conversation"]["nats"] < 1.5
    assert values["end_of_turn"]


def test_a_large_value_of_the_model_s_own_stays_genuine(healthy: Report) -> None:
    finding = one(healthy, "O207")
    assert finding.judgement is GENUINE
    assert "zeroing all of" in function(finding).text
    assert "in every layer" in finding.evidence[-1].text


def test_without_its_biases_it_is_another_model(healthy: Report) -> None:
    probe = healthy.probes["ablate blk.*.attn_*.bias"]
    assert probe["value"]["tensors"] == 15
    assert probe["value"]["delta"] > 1
    assert probe["value"]["mean_kl"] > 1


def test_a_glob_that_matches_nothing_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no tensor"):
        checks.run(demo.MODEL, ablate=["blk.99.*"])


# -- planted damage ----------------------------------------------------------------------------------------------------


def test_a_value_that_no_statistics_forbid_is_found_by_the_model(gguf: GGUF, tmp_path: Path) -> None:
    edits = element_edits(gguf, VALUE_BIAS, {5: 6.0})
    copy = demo.damaged(gguf, tmp_path / "static.gguf", edits)
    assert [finding for finding in checks.run(copy).findings if finding.severity is not INFO] == []
    finding = one(after(gguf, tmp_path, edits), "B201")
    assert (finding.tensor, finding.index, finding.value) == (VALUE_BIAS, (5,), 6.0)
    assert (finding.severity, finding.judgement) == (ERROR, CORRUPT)
    assert function(finding).numbers["delta"] < -ablate.VISIBLE


def test_a_corrupt_value_gets_the_evidence_of_the_run(gguf: GGUF, tmp_path: Path) -> None:
    finding = one(after(gguf, tmp_path, element_edits(gguf, VALUE_BIAS, {5: 1e4})), "O201")
    assert (finding.severity, finding.judgement, finding.confidence) == (ERROR, CORRUPT, Confidence.HIGH)
    assert function(finding).numbers["effect"] == "gains"
    assert function(finding).numbers["nats_after"] < 1.5


def test_a_corrupt_value_stays_corrupt_though_the_model_does_not_mind(gguf: GGUF, tmp_path: Path) -> None:
    finding = one(after(gguf, tmp_path, element_edits(gguf, "blk.3.attn_k.bias", {31: 1e3})), "O201")
    assert (finding.severity, finding.judgement) == (ERROR, CORRUPT)
    assert function(finding).numbers["effect"] != "gains"


def test_one_wound_does_not_hide_another(gguf: GGUF, tmp_path: Path) -> None:
    edits = [*element_edits(gguf, VALUE_BIAS, {5: 1e4}), *element_edits(gguf, "blk.1.attn_v.bias", {9: 1e4})]
    findings = [finding for finding in after(gguf, tmp_path, edits).findings if finding.code == "O201"]
    assert [function(finding).numbers["effect"] for finding in findings] == ["gains", "gains"]


def test_a_value_that_is_no_number(gguf: GGUF, tmp_path: Path) -> None:
    report = after(gguf, tmp_path, element_edits(gguf, "blk.2.attn_v.bias", {7: np.nan}))
    assert one(report, "B101").tensor == "blk.2.attn_v.bias"
    assert "v_bias-2" in one(report, "B101").message
    assert function(one(report, "N101")).numbers["nats_before"] == np.inf
    assert function(one(report, "N101")).numbers["nats_after"] < 1.5


def test_noise_in_a_matrix_is_mended_by_zeroing_its_blocks(gguf: GGUF, tmp_path: Path) -> None:
    name = "blk.1.ffn_down.weight"
    edits = [Edit(name, 20_000, damage.noise(2048))]
    report = after(gguf, tmp_path, edits)
    mended = [function(found) for found in report.findings if found.tensor == name and found.judgement is CORRUPT]
    assert mended[0].numbers["effect"] == "gains"
    assert "zeroing" in mended[0].text


def test_biases_that_were_switched_off_are_named_with_their_price(gguf: GGUF, tmp_path: Path) -> None:
    findings = after(gguf, tmp_path, demo.zeroed_biases(gguf), "O206", "B102").findings
    assert {finding.code for finding in findings} == {"O206"}
    assert all(function(finding).numbers["nats"] > 1.5 for finding in findings)


def test_biases_that_are_missing_are_named_with_their_price(tmp_path: Path) -> None:
    def without(weights: dict[str, np.ndarray]) -> None:
        for name in [name for name in weights if name.endswith(".bias")]:
            del weights[name]

    report = checks.run(tiny_model(tmp_path / "none.gguf", edit=without), select=["M302", "B101"], run=True)
    zeroed = checks.run(
        tiny_model(tmp_path / "zero.gguf", edit=lambda weights: [weights[n].fill(0) for n in weights if "bias" in n]),
        select=["O206", "B101"],
        run=True,
    )
    price = function(report.findings[0]).numbers["nats"]
    assert price == function(zeroed.findings[0]).numbers["nats"] > 0
    assert report.probes["finite"]["value"]


def test_trying_leaves_the_model_as_it_was(gguf: GGUF, at_work: Running) -> None:
    before = at_work.logits("code").tobytes()
    bench = ablate.Bench(at_work)
    assert bench.without(element_edits(gguf, VALUE_BIAS, {5: 6.0})).effect is Effect.COSTS
    assert at_work.logits("code").tobytes() == before


# -- the table of judgements -------------------------------------------------------------------------------------------


def outcome(delta: float, *, error: float = 0.0, judges: bool = True) -> Outcome:
    return Outcome("prose", 2.0, 2.0 + delta, delta, error, 0.1, 0.9, judges)


@pytest.mark.parametrize(
    ("delta", "error", "judges", "effect"),
    [
        (-0.06, 0.0, True, Effect.GAINS),
        (0.06, 0.0, True, Effect.COSTS),
        (0.05, 0.0, True, Effect.NONE),
        (-0.06, 0.04, True, Effect.NONE),  # it may be chance
        (-9.0, 0.0, False, Effect.NONE),  # the model knows none of the texts
        (-np.inf, 0.0, True, Effect.GAINS),
    ],
)
def test_what_counts_as_an_effect(delta: float, error: float, judges: bool, effect: Effect) -> None:
    assert outcome(delta, error=error, judges=judges).effect is effect


@pytest.mark.parametrize(
    ("said", "delta", "judgement", "severity"),
    [
        (CORRUPT, -1, CORRUPT, WARNING),
        (CORRUPT, 0, CORRUPT, WARNING),
        (CORRUPT, 1, CORRUPT, WARNING),
        (SUSPICIOUS, -1, CORRUPT, ERROR),
        (SUSPICIOUS, 0, SUSPICIOUS, WARNING),
        (SUSPICIOUS, 1, GENUINE, INFO),
        (GENUINE, -1, SUSPICIOUS, WARNING),
        (GENUINE, 0, GENUINE, WARNING),
        (GENUINE, 1, GENUINE, WARNING),
    ],
)
def test_the_judgement_after_mending(said: Judgement, delta: float, judgement: Judgement, severity: Severity) -> None:
    finding = Finding("O204", "odd-bias", WARNING, Confidence.MEDIUM, "odd", said)
    judged = ablate._judged(finding, Mend((), "setting it to 0"), outcome(delta))
    assert (judged.judgement, judged.severity) == (judgement, severity)
    assert judged.evidence[-1].kind == "function"


# -- engines at fault --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("behaviour") / "tiny.gguf")


def _forgets(state: Any) -> Any:
    kept = REFERENCE["keys"](state)
    return np.where(np.arange(len(kept))[:, None, None] < state.positions[0], 0, kept)


def _sees_the_future(state: Any) -> Any:
    powers = np.exp(state["kq"] - state["kq"].max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


_noise = np.random.default_rng(0)
_FAULTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "B104": {"kq_soft_max": _sees_the_future},
    "B105": {"keys": _forgets},
    "B106": {"ffn_act": lambda state: REFERENCE["ffn_act"](state) * (1 + 0.1 * _noise.random())},
    "B107": {"q_bias": lambda state: state["q_proj"]},
}


@pytest.mark.parametrize("code", _FAULTS)
def test_a_wrong_engine_is_told_from_a_wrong_file(tiny: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    steps = {**REFERENCE, **_FAULTS[code]}
    monkeypatch.setattr(running, "load", lambda gguf, device: ReferenceEngine(gguf, steps=steps))
    assert "rather than at the file" in (one(checks.run(tiny, select=[code], run=True), code).help or "")


@pytest.mark.parametrize("code", _FAULTS)
def test_a_right_engine_is_not_blamed(tiny: Path, code: str) -> None:
    assert checks.run(tiny, select=[code], run=True).findings == ()


def test_a_model_that_predicts_worse_than_chance(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights are; but so small a model may know something that no built-in text is about."""
    assert checks.run(tiny, select=["B102"], run=True).findings == ()
    monkeypatch.setattr(behaviour, "_GENERAL", 0)
    finding = one(checks.run(tiny, select=["B102"], run=True), "B102")
    assert finding.value > np.log(288)


def test_padding_that_is_likely(tmp_path: Path) -> None:
    def loud(weights: dict[str, np.ndarray]) -> None:
        weights["output.weight"][-8:] *= 10

    path = tiny_model(tmp_path / "padding.gguf", edit=loud)
    assert one(checks.run(path, select=["B103"], run=True), "B103").value > behaviour._PADDING


# -- what is not run ---------------------------------------------------------------------------------------------------


def reasons(report: Report) -> list[tuple[str, bool]]:
    return [(skip.why, skip.asked) for skip in report.skipped if skip.what == "running the model"]


def test_nothing_runs_unless_asked(tiny: Path) -> None:
    report = checks.run(tiny)
    assert (report.probes, reasons(report)) == ({}, [])
    assert "the model was not run" in {skip.why for skip in report.skipped}


def test_the_default_has_little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_RATE", 1.0)
    report = checks.run(demo.MODEL, select=["S", "B101"], run=None, device="cpu")
    ((why, asked),) = reasons(report)
    assert "--run does it" in why
    assert (asked, report.exit_code(), report.probes) == (False, 0, {})
    assert "finite" in checks.run(demo.MODEL, select=["B101"], run=True, device="cpu").probes


@pytest.mark.parametrize(("run", "status"), [(None, 0), (True, 3)])
def test_too_little_memory(monkeypatch: pytest.MonkeyPatch, run: bool | None, status: int) -> None:
    monkeypatch.setattr(running, "SMALL", 0)
    monkeypatch.setattr(doctor, "memory_bytes", lambda: (1 << 30, 1 << 20))
    report = checks.run(demo.MODEL, select=["S", "B101"], run=run, device="cpu")
    assert ["GB of memory" in why for why, _ in reasons(report)] == [True]
    assert report.exit_code() == status


@pytest.mark.parametrize(("run", "status"), [(None, 0), (True, 3)])
def test_an_architecture_that_is_not_modelled(tmp_path: Path, run: bool | None, status: int) -> None:
    path = tiny_model(tmp_path / "other.gguf", metadata={"general.architecture": "llama"})
    report = checks.run(path, select=["S", "B101"], run=run)
    assert ["not modelled" in why for why, _ in reasons(report)] == [True]
    assert report.exit_code() == status


def test_a_damaged_structure_is_not_run(tiny: Path, tmp_path: Path) -> None:
    path = damage.apply(tiny, damage.cut(0.9), tmp_path / "cut.gguf")
    ((why, asked),) = reasons(checks.run(path, run=True))
    assert "structure is damaged" in why
    assert asked


def test_without_rules_on_behaviour_the_default_does_not_run(tiny: Path) -> None:
    assert reasons(checks.run(tiny, select=["S", "O"], run=None)) == []


# -- the real model ----------------------------------------------------------------------------------------------------


def real(path: Path, monkeypatch: pytest.MonkeyPatch, name: str, index: int, value: float) -> Report:
    """The report on the real model with one value of a bias changed, without copying the file."""
    with reader.open(path) as opened:
        changed = damage.element(name, index, value)(opened)
    monkeypatch.setattr(reader, "Source", damage.patched(changed))
    return checks.run(path, select=["O", "B201"], run=True, device="cpu")


@pytest.mark.real_model
def test_the_real_biases_are_genuine(real_model: Path) -> None:
    report = checks.run(real_model, run=True, device="cpu", ablate=["blk.*.attn_*.bias"])
    (key_bias,) = [finding for finding in report.findings if finding.value == -211]
    assert (key_bias.severity, key_bias.judgement) == (INFO, GENUINE)
    assert {finding.severity for finding in report.findings} == {INFO}
    assert report.probes["ablate blk.*.attn_*.bias"]["value"]["delta"] > 8


@pytest.mark.slow
@pytest.mark.real_model
def test_a_planted_ten_in_a_value_bias(real_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = one(real(real_model, monkeypatch, "blk.3.attn_v.bias", 40, 10.0), "B201")
    assert (finding.tensor, finding.index) == ("blk.3.attn_v.bias", (40,))
    assert function(finding).numbers["delta"] < -0.1


@pytest.mark.real_model
def test_a_planted_ten_thousand_in_a_query_bias(real_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = one(real(real_model, monkeypatch, "blk.3.attn_q.bias", 100, 1e4), "O201")
    assert (finding.severity, finding.judgement) == (ERROR, CORRUPT)
    assert abs(function(finding).numbers["delta"]) < 0.3

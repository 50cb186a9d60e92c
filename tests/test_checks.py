"""The runner and the registry: what is run, what is said of what is not, and what every rule promises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import test_checks_metadata
import test_checks_numeric
import test_checks_tokens
import test_reader
from builder import File, model

from ggufkit import checks
from ggufkit.checks.rule import FAMILIES, SECTIONS, Need, Rule
from ggufkit.errors import FormatError, SourceError, UsageError
from ggufkit.findings import Confidence, Severity, Verdict

ALL = list(checks.RULES.values())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return model().write(tmp_path / "model.gguf")


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: rule.code)
def test_every_rule_is_documented(rule: Rule) -> None:
    """The docstring is what `explain` prints: a title, then what, why, a real case and what to do."""
    assert re.fullmatch(rf"[{''.join(FAMILIES)}]\d{{3}}", rule.code)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", rule.name)
    assert rule.title.endswith(".")
    paragraphs = rule.doc.split("\n\n")
    assert [paragraph.split()[0] for paragraph in paragraphs[1:]] == list(SECTIONS)
    assert all(len(paragraph.split()) > 1 for paragraph in paragraphs)


def test_names_are_unique() -> None:
    assert len({rule.name for rule in ALL}) == len(ALL)


def test_every_rule_of_these_families_has_a_bad_case() -> None:
    tested = {
        case.code for case in (*test_checks_metadata.CASES, *test_checks_tokens.CASES, *test_checks_numeric.CASES)
    }
    tested |= {case.code for case in (*test_reader.MUST_FAIL, *test_reader.MORE_MUST_FAIL)}
    tested |= {row[2] for row in (*test_reader.ODD, *test_reader.SPLIT_CASES)}
    tested |= {"M204", "M211"}  # each has a test of its own
    assert {code for code in checks.RULES if code[0] in "SMTCN"} - tested == set()


# -- selection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("select", "ignore", "expected"),
    [
        (["S201"], [], ["S201"]),
        (["data-outside"], [], ["S201"]),
        (["s20"], ["S203", "data-order"], ["S201", "S202", "S205", "S206", "S207", "S208"]),
        (["S201", "S201", "S20"], ["S20"], []),
        ([], sorted({rule.code[0] for rule in ALL}), []),
    ],
)
def test_rules_are_selected_by_code_beginning_or_name(
    select: list[str], ignore: list[str], expected: list[str]
) -> None:
    assert [rule.code for rule in checks.rule.select(select, ignore)] == expected


@pytest.mark.parametrize("name", ["X1", "S999", "", "data-outsid"])
def test_a_name_of_no_rule_is_refused(path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no rule is called"):
        checks.run(path, select=[name])
    with pytest.raises(UsageError, match="no rule is called"):
        checks.run(path, ignore=[name])
    with pytest.raises(UsageError, match="no rule is called"):
        checks.explain(name)


def test_explain_takes_a_code_or_a_name() -> None:
    assert checks.explain("s201") is checks.explain("data-outside") is checks.RULES["S201"]


# -- what was checked ------------------------------------------------------------------------------------------------


def test_all_rules_are_accounted_for(path: Path) -> None:
    report = checks.run(path)
    assert report.rules == len(checks.RULES)
    assert report.rules_run == sum(rule.code[0] in "SMTCNO" for rule in ALL)
    assert {code[0] for skip in report.skipped for code in skip.what.split(", ")} <= {"R", "B"}
    assert (report.tensors_checked, report.tensors) == (27, 27)
    assert report.verdict is Verdict.OK


def test_tensors_are_not_read_unless_a_rule_needs_them(path: Path) -> None:
    report = checks.run(path, select=["S", "M"])
    assert (report.tensors_checked, report.tensors) == (0, 27)
    assert "no rule that reads it was run" in {skip.why for skip in report.skipped}
    assert "not selected" in {skip.why for skip in report.skipped}
    assert report.exit_code() == 0


def test_nothing_checked_is_not_clean(path: Path) -> None:
    report = checks.run(path, select=["S201"], ignore=["S"])
    assert (report.rules_run, report.verdict, report.exit_code()) == (0, Verdict.INCOMPLETE, 3)


def test_a_vocabulary_alone_can_be_clean(tmp_path: Path) -> None:
    file = model()
    file.tensors = []
    report = checks.run(file.write(tmp_path / "vocabulary.gguf"))
    assert (report.tensors_checked, report.tensors, report.verdict) == (0, 0, Verdict.OK)
    assert "the file has no tensors" in {skip.why for skip in report.skipped}


def test_a_broken_header_stops_the_rules_that_need_it(tmp_path: Path) -> None:
    """Half a tensor table must not make the other half missing tensors."""
    path = tmp_path / "cut.gguf"
    path.write_bytes(model().header()[:-100])
    report = checks.run(path)
    assert {finding.code for finding in report.findings} == {"S101"}
    assert "the header breaks off" in {skip.why for skip in report.skipped}


def test_a_tensor_of_an_unknown_type_makes_the_report_newer_than_the_tool(tmp_path: Path) -> None:
    file = model()
    file["blk.0.ffn_up.weight"].type = 77
    report = checks.run(file.write(tmp_path / "new.gguf"))
    skipped = [skip for skip in report.skipped if skip.newer]
    assert [skip.what for skip in skipped] == ["tensor blk.0.ffn_up.weight"]
    assert report.tensors_checked == 26
    assert (report.verdict, report.exit_code()) == (Verdict.NEWER_THAN_TOOL, 3)


def test_damage_outranks_what_is_newer(tmp_path: Path) -> None:
    file = model().set("tokenizer.ggml.eos_token_id", 10**6)
    file["blk.0.ffn_up.weight"].type = 77
    assert checks.run(file.write(tmp_path / "both.gguf")).exit_code() == 1


@pytest.mark.parametrize(
    ("data", "verdict", "code", "status"),
    [
        (b"<html>", Verdict.NOT_GGUF, "S001", 1),
        (b"GGUF\x03", Verdict.BROKEN, "S002", 1),
        (b"GGUF\x04\0\0\0" + bytes(16), Verdict.NEWER_THAN_TOOL, "S003", 3),
    ],
)
def test_what_cannot_be_opened_is_a_report(
    tmp_path: Path, data: bytes, verdict: Verdict, code: str, status: int
) -> None:
    path = tmp_path / "case.gguf"
    path.write_bytes(data)
    report = checks.run(path, select=["M"])
    assert [finding.code for finding in report.findings] == [code]
    assert (report.verdict, report.exit_code()) == (verdict, status)


def test_a_missing_path_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be opened"):
        checks.run(tmp_path / "missing.gguf")


# -- rules that fail, rules that find too much -------------------------------------------------------------------------


def _with_rule(monkeypatch: pytest.MonkeyPatch, check: checks.rule.Check, *, needs: tuple[Need, ...] = ()) -> None:
    severity = dict.fromkeys(checks.PROFILES, Severity.WARNING)
    added = Rule("S999", "added", severity, Confidence.HIGH, needs, "Added.", check)
    monkeypatch.setitem(checks.RULES, "S999", added)


@pytest.mark.parametrize("error", [ValueError("of ours"), RecursionError(), FormatError("the file shrank")])
def test_a_rule_that_fails_makes_the_report_incomplete(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(context: checks.Context) -> Iterator[checks.Found]:
        yield checks.Found("before it broke")
        raise error

    _with_rule(monkeypatch, broken)
    report = checks.run(path, select=["S"])
    (skip,) = [skip for skip in report.skipped if skip.what == "S999"]
    assert str(error) in skip.why
    assert report.rules_run > 20
    assert (report.verdict, report.exit_code()) == (Verdict.INCOMPLETE, 3)


def test_a_flood_of_findings_is_counted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_rule(monkeypatch, lambda context: (checks.Found(f"number {n}") for n in range(1_000)))
    messages = [finding.message for finding in checks.run(path, select=["S999"]).findings]
    assert len(messages) == checks.MAX_PER_RULE + 1
    assert messages[-1] == "and 950 more of the same kind"


def test_findings_come_most_severe_first(tmp_path: Path) -> None:
    file = model().add("My Key", 1).set("tokenizer.ggml.eos_token_id", 10**6).drop("tokenizer.ggml.pre")
    severities = [finding.severity.rank for finding in checks.run(file.write(tmp_path / "case.gguf")).findings]
    assert severities == sorted(severities, reverse=True)
    assert set(severities) == {0, 1, 2}


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_progress_counts_the_bytes_of_all_tensors(path: Path) -> None:
    seen: list[tuple[int, int]] = []
    checks.run(path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(len(entry.data) for entry in model().tensors)
    assert seen == sorted(seen)


def test_the_number_of_threads_changes_nothing(tmp_path: Path) -> None:
    file = model()
    file["blk.1.ffn_up.weight"].assign(np.full((96, 64), np.inf, np.float32))
    path = file.write(tmp_path / "case.gguf")
    one, five = checks.run(path, jobs=1), checks.run(path, jobs=5)
    assert one.findings == five.findings != ()


def test_facts_say_what_the_file_is(path: Path) -> None:
    facts = checks.run(path).facts
    assert facts["architecture"] == "qwen2"
    assert facts["types"] == {"F32": 27}
    assert facts["parameters"] == sum(len(entry.data) // 4 for entry in model().tensors)


def test_an_empty_file_is_no_model(tmp_path: Path) -> None:
    report = checks.run(File().write(tmp_path / "empty.gguf"))
    assert report.verdict is Verdict.WARNINGS

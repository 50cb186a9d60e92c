"""Reports as text: what a reader sees first, that nothing is lost, and that nothing can play tricks."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ggufkit.compare import Comparison, Divergence, StepRow
from ggufkit.conversation import Reply
from ggufkit.doctor import Check, State
from ggufkit.findings import Confidence, Evidence, Finding, Judgement, Report, Severity, Skipped
from ggufkit.report.text import compare, doctor, run, style, validate
from ggufkit.runtime.generate import Generation


def console(width: int = 100) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    made = style.console(file)
    made.width = width
    return made, file


def rendered(report: Report, width: int = 100) -> str:
    target, file = console(width)
    validate.report(target, report)
    return file.getvalue()


def finding(severity: Severity = Severity.ERROR, **changes: object) -> Finding:
    fields: dict[str, object] = {
        "code": "N101",
        "name": "not-finite",
        "severity": severity,
        "confidence": Confidence.HIGH,
        "message": "3 values are NaN",
    }
    return Finding(**(fields | changes))  # type: ignore[arg-type]


class TestUnits:
    @pytest.mark.parametrize(
        ("count", "expected"),
        [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (491_400_064, "491.4 MB"),
            (999_960, "1.0 MB"),
            (7.2e9, "7.2 GB"),
            (4e22, "40000.0 EB"),
        ],
    )
    def test_bytes(self, count: float, expected: str) -> None:
        assert style.nbytes_text(count) == expected

    @pytest.mark.parametrize(("count", "expected"), [(0, "0"), (896, "896"), (630_167_424, "630.2 M"), (7e12, "7.0 T")])
    def test_counts(self, count: float, expected: str) -> None:
        assert style.count_text(count) == expected

    @pytest.mark.parametrize(
        ("part", "whole", "expected"),
        [(1, 2, "50.0 %"), (0, 2, "0.0 %"), (1, 10_000, "<0.1 %"), (1, 0, "–")],
    )
    def test_shares(self, part: float, whole: float, expected: str) -> None:
        assert style.share_text(part, whole) == expected

    @pytest.mark.parametrize(("count", "expected"), [(1, "1 tensor"), (0, "0 tensors"), (1234, "1,234 tensors")])
    def test_plurals(self, count: int, expected: str) -> None:
        assert style.plural(count, "tensor") == expected


class TestValidate:
    def test_the_verdict_comes_first_and_what_was_checked_last(self) -> None:
        lines = rendered(Report("m.gguf", tensors_checked=291, tensors=291, rules_run=47, rules=49)).splitlines()
        assert lines[0].startswith("✓ OK  m.gguf")
        assert lines[-1] == "checked 291 of 291 tensors, 47 of 49 rules ran, 2 skipped"

    @pytest.mark.parametrize(
        ("report", "first"),
        [
            (Report("m", rules_run=1), "✓ OK"),
            (Report("m", rules_run=1, findings=(finding(Severity.INFO),)), "✓ OK"),
            (Report("m", rules_run=1, findings=(finding(Severity.WARNING),)), "! WARNINGS"),
            (Report("m", rules_run=1, findings=(finding(),)), "✗ BROKEN"),
            (Report("m", rules_run=1, skipped=(Skipped("x", "y", asked=True),)), "? INCOMPLETE"),
            (Report("m", rules_run=1, skipped=(Skipped("x", "y", newer=True),)), "? NEWER THAN TOOL"),
            (Report("m", rules_run=0), "? INCOMPLETE"),
            (Report("m", rules_run=1, not_gguf=True), "✗ NOT GGUF"),
        ],
    )
    def test_every_verdict_has_its_word(self, report: Report, first: str) -> None:
        assert rendered(report).startswith(first + "  m")

    def test_findings_are_grouped_the_worst_first(self) -> None:
        findings = (
            finding(Severity.INFO, code="O207", name="large-bias"),
            finding(Severity.WARNING, code="M101", name="key"),
            finding(message="first"),
            finding(message="second"),
        )
        out = rendered(Report("m", rules_run=1, findings=findings))
        order = [
            "Errors (2)",
            "N101 not-finite",
            "first",
            "second",
            "Warnings (1)",
            "M101",
            "Worth knowing (1)",
            "O207",
        ]
        places = [out.index(part) for part in order]
        assert places == sorted(places)
        assert out.count("N101") == 1

    def test_everything_about_a_finding_is_said(self) -> None:
        one = finding(
            message="too large",
            tensor="blk.8.attn_k.bias",
            index=(31,),
            value=-211.0,
            offset=479_203_580,
            judgement=Judgement.GENUINE,
            confidence=Confidence.MEDIUM,
            evidence=(Evidence("numbers", "287 times the median"), Evidence("context", "other layers too")),
            help="nothing to do",
        )
        out = rendered(Report("m", rules_run=1, findings=(one,)))
        for part in (
            "blk.8.attn_k.bias[31]", "= -211", "byte 479,203,580", "judged genuine", "medium confidence",
            "– 287 times the median", "– other layers too", "→ nothing to do",
        ):  # fmt: skip
            assert part in out

    def test_what_the_message_says_is_not_said_again(self) -> None:
        one = finding(message="blk.8.attn_k.bias[31] is -211", tensor="blk.8.attn_k.bias", index=(31,), value=-211.0)
        out = rendered(Report("m", rules_run=1, findings=(one,)))
        assert out.count("attn_k.bias") == 1
        assert out.count("-211") == 1

    def test_every_skipped_thing_says_why(self) -> None:
        skipped = (
            Skipped("T101, T102", "there is no vocabulary"),
            Skipped("tensor x", "its type is unknown", newer=True),
        )
        out = rendered(Report("m", rules_run=1, skipped=skipped))
        assert "T101, T102: there is no vocabulary" in out
        assert "tensor x: its type is unknown" in out

    def test_a_hostile_name_is_shown_not_obeyed(self) -> None:
        one = finding(
            message="\x1b[2J[red]gone\u202e", tensor="\x1b]0;t\x07", help="\r", evidence=(Evidence("text", "\x9b"),)
        )
        skipped = (Skipped("\x1b[1m", "\x1b[2m"),)
        out = rendered(Report("\x1b[3m", rules_run=1, findings=(one,), skipped=skipped))
        assert all(char.isprintable() or char == "\n" for char in out)
        assert "\\e[2J[red]gone\\u202e" in out

    @pytest.mark.parametrize("width", [40, 80, 200])
    def test_no_line_is_wider_than_the_terminal(self, width: int) -> None:
        one = finding(message="word " * 60, evidence=(Evidence("text", "evidence " * 30),), help="help " * 30)
        assert max(map(len, rendered(Report("m", rules_run=1, findings=(one,)), width).splitlines())) <= width

    def test_several_files_get_a_line_each(self) -> None:
        target, file = console()
        validate.summary(target, [Report("a.gguf", rules_run=1), Report("b.gguf", rules_run=1, findings=(finding(),))])
        lines = file.getvalue().splitlines()
        assert lines[0] == "2 files"
        assert any("✓ ok" in line and "a.gguf" in line for line in lines)
        assert any("✗ broken" in line and "b.gguf" in line and " 1 " in line for line in lines)


class TestRun:
    def closing(self, problems: tuple[str, ...] = (), **changes: object) -> str:
        fields: dict[str, object] = {
            "n_prompt": 36, "n_reused": 0, "ids": tuple(range(15)), "stop": "end of turn", "stop_id": 2,
            "mean_logprob": -1.106, "min_logprob": -4.0, "repetition": 0.0, "distinct": (1.0, 1.0, 1.0), "padding": (),
            "steps_watched": 483, "not_finite": None, "seconds_to_first": 0.5, "prompt_rate": 84.4,
            "decode_rate": 24.14, "seed": 1,
        }  # fmt: skip
        numbers = Generation(**(fields | changes))  # type: ignore[arg-type]
        return run.closing(Reply("p", (1,), "t", numbers, problems)).plain

    def test_one_line_proves_sanity(self) -> None:
        assert self.closing() == (
            "✓ all 483 steps finite · mean log-probability -1.11 · repetition 0 % · 15 tokens at 24.1/s · "
            "prompt 36 at 84/s · ended: end of turn"
        )

    def test_a_problem_comes_first(self) -> None:
        assert self.closing(("the first step that is not finite is q_bias-3",)).startswith("✗ the first step")

    def test_repetition_is_called_out_without_judging(self) -> None:
        assert self.closing(repetition=0.73).startswith("! ")

    def test_an_answer_without_tokens(self) -> None:
        line = self.closing(ids=(), mean_logprob=None, decode_rate=None, stop="interrupted")
        assert "log-probability" not in line
        assert line.endswith("ended: interrupted")


class TestCompare:
    def rendered(self, **changes: object) -> str:
        rows = tuple(StepRow(f"l_out-{layer}", "same", ((2, 4), (2, 4))) for layer in range(30))
        fields: dict[str, object] = {
            "rows": rows, "first": None, "tokens_differ_at": None, "positions": (0, 2), "tolerance": 1e-4,
            "rtol": None, "atol": None, "only_a": (), "only_b": (), "notes": (),
        }  # fmt: skip
        target, file = console()
        compare.comparison(target, Comparison(**(fields | changes)), "a.st", "b.st")  # type: ignore[arg-type]
        return file.getvalue()

    def test_agreement(self) -> None:
        assert self.rendered().startswith("✓ THEY AGREE  30 steps compared, 30 bit for bit the same")

    def test_the_first_difference_and_the_steps_around_it(self) -> None:
        rows = [StepRow(f"l_out-{layer}", "same", ((2, 4), (2, 4))) for layer in range(30)]
        rows[20:] = [
            StepRow(f"l_out-{n}", "diverged", ((2, 4), (2, 4)), 0.5, 1, 2.0, (1, 3), 0.9, 0.25) for n in range(20, 30)
        ]
        out = self.rendered(rows=tuple(rows), first=Divergence("l_out", 20, 1, 0.5, "positions 1 on, every head"))
        assert out.startswith("✗ THEY PART AT l_out-20  plus the residual")
        assert "positions 1 on, every head" in out
        assert "l_out-19 " in out
        assert "l_out-10 " not in out

    def test_other_words_are_said_first(self) -> None:
        assert "token ids differ from position 3" in self.rendered(tokens_differ_at=3)

    def test_nothing_in_common(self) -> None:
        assert self.rendered(rows=()).startswith("? NOTHING TO COMPARE")

    def test_missing_steps_are_named(self) -> None:
        assert "a.st lacks 4 steps: embd, q_proj-0, q_proj-1, …" in self.rendered(
            only_b=("embd", "q_proj-0", "q_proj-1", "q_proj-2")
        )


class TestDoctor:
    def test_advice_is_collected_at_the_end(self) -> None:
        target, file = console()
        doctor.report(
            target,
            [
                Check("system", "Python", "3.12"),
                Check("gpu", "CuPy", "not installed (cupy)", State.ABSENT, "pip install 'ggufkit[cuda13]'"),
            ],
        )
        lines = file.getvalue().splitlines()
        assert "  ✓  Python  3.12" in lines
        assert lines[-2:] == ["To do", "  CuPy: pip install 'ggufkit[cuda13]'"]

    def test_all_is_well(self) -> None:
        target, file = console()
        doctor.report(target, [Check("system", "Python", "3.12")])
        assert file.getvalue().splitlines()[-1] == "Everything that can be used is there."

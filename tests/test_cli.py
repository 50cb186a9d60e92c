"""The command line: exit statuses, what goes where, and that nothing ends in a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import builder
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from ggufkit import demo
from ggufkit.cli import app, common
from ggufkit.cli.prove import layer_numbers
from ggufkit.errors import UsageError

COMMANDS = (
    "inspect", "validate", "run", "plot", "trace", "compare",
    "tokenize", "bench", "rules", "explain", "doctor", "demo",
)  # fmt: skip


def ggufkit(*args: object, stdin: str | bytes | None = None) -> Result:
    result = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def as_json(*args: object, stdin: str | None = None) -> Any:
    result = ggufkit(*args, "--json", stdin=stdin)
    return json.loads(result.stdout)


def process(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own, for what only a process can show."""
    command = [sys.executable, "-m", "ggufkit", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=False, **options
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builder.model().write(tmp_path_factory.mktemp("models") / "model.gguf")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = builder.File().add("general.architecture", "qwen2")
    for key, value in builder.vocabulary().items():
        file.add(key, value)
    return file.write(tmp_path_factory.mktemp("models") / "vocabulary.gguf")


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = builder.File().add("general.architecture", "mamba").add("mamba.block_count", 1)
    file.tensor("blk.0.ssm_in.weight", np.random.default_rng(0).standard_normal((8, 32)).astype("f4"))
    return file.write(tmp_path_factory.mktemp("models") / "mamba.gguf")


class TestEveryCommand:
    def test_they_are_all_there(self) -> None:
        listed = ggufkit("--help").stdout
        assert [name for name in COMMANDS if f" {name} " not in listed] == []

    def test_a_mistyped_command_gets_a_suggestion(self) -> None:
        result = CliRunner().invoke(app, ["inspct"])
        assert result.exit_code == 2
        assert "Did you mean 'inspect'?" in result.output

    @pytest.mark.parametrize("name", COMMANDS)
    def test_help(self, name: str) -> None:
        result = ggufkit(name, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.stdout

    def test_version(self) -> None:
        assert ggufkit("--version").stdout.startswith("ggufkit 0.")

    @pytest.mark.parametrize(
        "args", [["nonsense"], ["inspect"], ["inspect", "x", "--no-such-option"], ["validate", "x", "--format", "xml"]]
    )
    def test_usage_errors_are_2(self, args: Sequence[str]) -> None:
        assert ggufkit(*args).exit_code == 2


class TestErrors:
    def test_an_error_is_a_line_on_stderr_that_says_what_to_do(self, tmp_path: Path) -> None:
        result = ggufkit("inspect", tmp_path / "missing.gguf")
        assert result.exit_code == 2
        assert result.stdout == ""
        assert "missing.gguf" in result.stderr
        assert "check the path" in result.stderr
        assert len(result.stderr.splitlines()) == 2

    def test_with_json_it_is_a_document_on_stdout(self, tmp_path: Path) -> None:
        found = as_json("inspect", tmp_path / "missing.gguf")
        assert found["schema"] == "ggufkit.error/1"
        assert found["exit_code"] == 2
        assert found["error"]["kind"] == "SourceError"

    @pytest.mark.parametrize(
        ("content", "status", "said"),
        [
            (b"", 1, "empty file"),
            (b"<!DOCTYPE html><html>", 1, "HTML"),
            (b"GGUF\x09\0\0\0" + bytes(16), 3, "newer"),
            (b"GGUF\x03\0\0\0", 1, "ends"),
        ],
    )
    def test_files_that_cannot_be_opened(self, tmp_path: Path, content: bytes, status: int, said: str) -> None:
        path = tmp_path / "odd.gguf"
        path.write_bytes(content)
        for name in ("inspect", "validate"):
            result = ggufkit(name, path)
            assert result.exit_code == status, name
            assert said in result.stdout + result.stderr

    def test_what_comes_from_a_file_cannot_colour_an_error(self, tmp_path: Path) -> None:
        result = ggufkit("inspect", tmp_path / "\x1b[31mred.gguf")
        assert "\x1b" not in result.stderr
        assert "\\e[31mred" in result.stderr

    def test_out_of_memory_is_a_line(self, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
        def exhausted(path: str) -> None:
            raise MemoryError

        monkeypatch.setattr("ggufkit.reader.open", exhausted)
        result = ggufkit("inspect", model)
        assert result.exit_code == 3
        assert "memory" in result.stderr

    def test_an_interrupt_is_130(self, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
        def interrupted(path: str) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("ggufkit.reader.open", interrupted)
        result = ggufkit("inspect", model)
        assert result.exit_code == common.INTERRUPTED
        assert result.stderr == ""

    @pytest.mark.skipif(os.name == "nt", reason="pipes break differently on Windows")
    def test_a_reader_that_goes_away_is_no_error(self, model: Path) -> None:
        with subprocess.Popen(
            [sys.executable, "-m", "ggufkit", "inspect", str(model), "--key", "tokenizer.ggml.tokens", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as child:
            assert child.stdout is not None
            assert child.stderr is not None
            child.stdout.close()
            said = child.stderr.read()
            assert child.wait(60) == common.BROKEN_PIPE
        assert said == b""


class TestInspect:
    def test_sections(self, model: Path) -> None:
        out = ggufkit("inspect", model).stdout
        for part in ("File", "Model", "Quantization", "Tokenizer", "Chat template", "Memory", "Tiny Qwen2 Instruct"):
            assert part in out

    def test_json_has_everything(self, model: Path) -> None:
        found = as_json("inspect", model)
        assert list(found) == [
            "schema", "source", "file", "model", "quantization", "tokenizer", "template", "memory", "memory_note",
            "problems", "memory_formula", "metadata", "tensors",
        ]  # fmt: skip
        assert found["schema"] == "ggufkit.inspect/1"
        assert len(found["tensors"]) == found["file"]["n_tensors"]
        assert len(found["metadata"]) == found["file"]["n_keys"]
        assert found["tensors"][0].keys() == {
            "name", "type", "shape", "dims", "elements", "nbytes", "bits_per_weight", "offset", "shard",
        }  # fmt: skip

    def test_tensors_and_metadata(self, model: Path) -> None:
        out = ggufkit("inspect", model, "--tensors", "--metadata").stdout
        assert "blk.1.ffn_down.weight" in out
        assert "64 × 96" in out
        assert "96 × 64" in out
        assert "qwen2.rope.freq_base" in out

    def test_a_key_is_printed_whole(self, model: Path) -> None:
        assert ggufkit("inspect", model, "--key", "general.name").stdout == "Tiny Qwen2 Instruct\n"
        assert ggufkit("inspect", model, "--key", "tokenizer.ggml.merges").stdout.splitlines() == list(builder.MERGES)

    def test_an_unknown_key_is_a_usage_error(self, model: Path) -> None:
        result = ggufkit("inspect", model, "--key", "general.nam")
        assert result.exit_code == 2
        assert "general.name" in result.stderr

    def test_a_vocabulary_alone(self, vocabulary: Path) -> None:
        result = ggufkit("inspect", vocabulary)
        assert result.exit_code == 0
        assert "0 tensors" in result.stdout

    def test_an_architecture_that_is_not_modelled(self, unknown: Path) -> None:
        result = ggufkit("inspect", unknown)
        assert result.exit_code == 0
        assert "not modelled here" in result.stdout

    def test_a_header_that_breaks_off_is_shown_as_far_as_it_goes(self, tmp_path: Path) -> None:
        path = tmp_path / "cut.gguf"
        path.write_bytes(builder.model().encode()[:3000])
        result = ggufkit("inspect", path)
        assert result.exit_code == 1
        assert "Tiny Qwen2 Instruct" in result.stdout
        assert "Problems" in result.stdout

    @pytest.mark.parametrize("option", ["--tensors", "--metadata", None])
    def test_hostile_names_are_escaped(self, tmp_path: Path, option: str | None) -> None:
        file = builder.model(metadata={"general.name": "\x1b]0;owned\x07[bold]x[/bold]\u202e"})
        file.add("key\x1b[2J", "value\x1b[2J")
        file.tensor("name\x1b[2J", np.ones(4, "f4"))
        result = ggufkit("inspect", file.write(tmp_path / "hostile.gguf"), *([option] if option else []))
        assert "\x1b" not in result.stdout
        assert "\u202e" not in result.stdout
        assert option is not None or "[bold]x[/bold]" in result.stdout  # rich's markup is not obeyed

    def test_nothing_ends_in_spaces(self, model: Path) -> None:
        for option in ("--tensors", "--metadata", "--tokenizer"):
            lines = ggufkit("inspect", model, option).stdout.splitlines()
            assert [line for line in lines if line != line.rstrip()] == []


class TestColour:
    """NO_COLOR, FORCE_COLOR and pipes."""

    def coloured(self, model: Path, **environment: str) -> bool:
        kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
        return "\x1b[" in process("inspect", model, env=kept | environment).stdout

    def test_a_pipe_has_none(self, model: Path) -> None:
        assert not self.coloured(model)

    def test_it_can_be_forced(self, model: Path) -> None:
        assert self.coloured(model, FORCE_COLOR="1", TERM="xterm-256color")


class TestValidate:
    def test_clean(self, model: Path) -> None:
        result = ggufkit("validate", model)
        assert result.exit_code == 0, result.stdout
        assert result.stdout.startswith("✓ OK")

    def test_the_last_line_says_what_was_checked(self, model: Path) -> None:
        last = ggufkit("validate", model).stdout.splitlines()[-1]
        report = as_json("validate", model)
        checked = report["checked"]
        assert last == (
            f"checked {checked['tensors']} of {checked['of']} tensors, {checked['rules']} of {checked['of_rules']} "
            f"rules ran, {checked['of_rules'] - checked['rules']} skipped"
        )
        assert checked["tensors"] == checked["of"] > 0

    def test_every_skipped_thing_says_why(self, vocabulary: Path) -> None:
        out = ggufkit("validate", vocabulary).stdout
        report = as_json("validate", vocabulary)
        assert report["checked"]["skipped"]
        for skip in report["checked"]["skipped"]:
            assert skip["why"] in out

    def test_a_vocabulary_alone_can_be_clean(self, vocabulary: Path) -> None:
        result = ggufkit("validate", vocabulary)
        assert result.exit_code == 0
        assert "checked 0 of 0 tensors" in result.stdout

    def test_damage_is_1_and_named(self, tmp_path: Path) -> None:
        file = builder.model()
        values = file["blk.1.attn_v.bias"].values()
        values[3] = np.nan
        file["blk.1.attn_v.bias"].assign(values)
        result = ggufkit("validate", file.write(tmp_path / "nan.gguf"))
        assert result.exit_code == 1
        assert "blk.1.attn_v.bias" in result.stdout
        assert result.stdout.startswith("✗ BROKEN")

    def test_min_severity_moves_the_threshold(self) -> None:
        read_only = ("validate", demo.MODEL, "--no-run")
        assert [finding["severity"] for finding in as_json(*read_only)["findings"]] == ["info"]
        assert ggufkit(*read_only).exit_code == 0
        assert ggufkit(*read_only, "--min-severity", "info").exit_code == 1

    def test_select_and_ignore(self, model: Path) -> None:
        assert as_json("validate", model, "--select", "S,M101")["checked"]["rules"] < 60
        assert ggufkit("validate", model, "--select", "X999").exit_code == 2

    def test_asking_for_a_run_that_cannot_be_made_is_3(self, vocabulary: Path) -> None:
        assert ggufkit("validate", vocabulary, "--run").exit_code == 3
        assert ggufkit("validate", vocabulary).exit_code == 0

    def test_the_model_is_run_unless_that_is_forbidden(self) -> None:
        assert "reference" in as_json("validate", demo.MODEL, "--device", "cpu")["probes"]["agreement"]["text"]
        assert as_json("validate", demo.MODEL, "--no-run")["probes"] == {}
        assert ggufkit("validate", demo.MODEL, "--no-run", "--ablate", "*").exit_code == 2

    def test_a_file_of_its_own(self, model: Path, tmp_path: Path) -> None:
        target = tmp_path / "report.json"
        result = ggufkit("validate", model, "--json", "-o", target)
        assert result.stdout == ""
        assert json.loads(target.read_text())["schema"] == "ggufkit.validate/1"
        ggufkit("validate", model, "-o", tmp_path / "report.txt")
        assert (tmp_path / "report.txt").read_text(encoding="utf-8").startswith("✓ OK")

    def test_a_place_that_cannot_be_written(self, model: Path, tmp_path: Path) -> None:
        result = ggufkit("validate", model, "-o", tmp_path / "no" / "such" / "folder.txt")
        assert result.exit_code == 2
        assert "cannot be written" in result.stderr

    def test_a_directory(self, model: Path, vocabulary: Path, tmp_path: Path) -> None:
        (tmp_path / "a.gguf").write_bytes(model.read_bytes())
        (tmp_path / "b.gguf").write_bytes(vocabulary.read_bytes()[:2000])
        (tmp_path / "c.txt").write_text("not mine")
        result = ggufkit("validate", tmp_path)
        assert result.exit_code == 1
        assert "2 files" in result.stdout
        lines = ggufkit("validate", tmp_path, "--format", "jsonl").stdout.splitlines()
        assert [json.loads(line)["verdict"] for line in lines] == ["ok", "broken"]
        assert ggufkit("validate", tmp_path, "--json").exit_code == 2

    def test_an_empty_directory_is_a_usage_error(self, tmp_path: Path) -> None:
        assert ggufkit("validate", tmp_path).exit_code == 2


class TestRules:
    def test_the_list(self) -> None:
        found = as_json("rules")
        assert found["schema"] == "ggufkit.rules/1"
        assert {"S001", "M101", "T101"} <= {rule["code"] for rule in found["rules"]}
        assert "S001" in ggufkit("rules").stdout

    @pytest.mark.parametrize("code", ["S001", "s001", "not-gguf"])
    def test_explain(self, code: str) -> None:
        out = ggufkit("explain", code).stdout
        assert out.startswith("S001 not-gguf")
        assert "Fix." in out

    def test_explain_what_is_not_there(self) -> None:
        assert ggufkit("explain", "Z123").exit_code == 2


class TestRun:
    def test_it_speaks_and_proves_its_sanity(self) -> None:
        result = ggufkit("run", demo.MODEL, "-p", demo.PROMPT, "-n", 40)
        assert result.exit_code == 0
        assert len(result.stdout.strip().splitlines()) == 3
        closing = result.stderr.splitlines()[-1]
        for part in ("steps finite", "mean log-probability", "repetition", "/s", "ended: end of turn"):
            assert part in closing

    def test_json(self) -> None:
        found = as_json("run", demo.MODEL, "-p", "snow", "-n", 4)
        assert list(found) == ["schema", "source", "engine", "device", "dtype", "sane", "reply"]
        assert found["sane"] is True
        assert len(found["reply"]["numbers"]["ids"]) == 4

    def test_the_prompt_from_stdin(self) -> None:
        assert as_json("run", demo.MODEL, "-p", "-", "--raw", "-n", 1, stdin="snow")["reply"]["prompt"] == "snow"

    def test_no_prompt_and_no_terminal(self) -> None:
        result = ggufkit("run", demo.MODEL, stdin="")
        assert result.exit_code == 2
        assert "-p" in result.stderr

    def test_a_prompt_longer_than_the_context_says_both_lengths(self) -> None:
        result = ggufkit("run", demo.MODEL, "-p", "snow " * 50, "--ctx", 16)
        assert result.exit_code == 2
        assert "16 positions" in result.stderr
        assert "tokens" in result.stderr

    def test_sampling_is_repeatable_with_a_seed(self) -> None:
        args = ("run", demo.MODEL, "-p", "snow", "-n", 12, "--temp", 1.5, "--top-k", 50, "--seed", 7)
        assert ggufkit(*args).stdout == ggufkit(*args).stdout

    @pytest.mark.parametrize("args", [["--temp", "-1"], ["--top-p", "2"], ["-n", "-3"], ["--ctx", "0"]])
    def test_senseless_options(self, args: Sequence[str]) -> None:
        assert ggufkit("run", demo.MODEL, "-p", "x", *args).exit_code == 2

    def test_an_architecture_that_is_not_modelled_is_3(self, unknown: Path) -> None:
        result = ggufkit("run", unknown, "-p", "x")
        assert result.exit_code == 3
        assert "not modelled" in result.stderr

    def test_a_system_message_needs_a_template(self) -> None:
        assert ggufkit("run", demo.MODEL, "-p", "x", "--raw", "--system", "y").exit_code == 2


class TestTraceAndCompare:
    def test_a_trace_agrees_with_itself_and_with_float64(self, tmp_path: Path, model: Path) -> None:
        one, two = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
        assert ggufkit("trace", model, "-p", "the owl", "-o", one).stdout == f"{one}\n"
        assert ggufkit("trace", model, "-p", "the owl", "-o", two, "--dtype", "float64").exit_code == 0
        assert ggufkit("compare", one, one).exit_code == 0
        result = ggufkit("compare", one, two)
        assert result.exit_code == 0
        assert result.stdout.startswith("✓ THEY AGREE")

    def test_the_first_difference_is_named(self, tmp_path: Path, model: Path) -> None:
        damaged = builder.File.read(model)
        values = damaged["blk.1.attn_q.bias"].values()
        damaged["blk.1.attn_q.bias"].assign(values + 1)
        other = damaged.write(tmp_path / "other.gguf")
        for name, file in (("a", model), ("b", other)):
            ggufkit("trace", file, "--tokens", "1,2,3", "-o", tmp_path / f"{name}.safetensors")
        result = ggufkit("compare", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
        assert result.exit_code == 1
        assert "PART AT q_bias-1" in result.stdout
        found = as_json("compare", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
        assert found["schema"] == "ggufkit.compare/1"
        assert found["agree"] is False
        assert (found["comparison"]["first"]["step"], found["comparison"]["first"]["layer"]) == ("q_bias", 1)

    def test_a_summary(self, model: Path) -> None:
        found = as_json("trace", model, "--tokens", "1,2,3", "--summary", "--layers", "1", "--steps", "q_*")
        assert [step["name"] for step in found["steps"]] == ["q_proj-1", "q_bias-1", "q_rope-1"]
        assert found["token_ids"] == [1, 2, 3]
        assert "q_rope-0" in ggufkit("trace", model, "--tokens", "1", "--summary").stdout

    @pytest.mark.parametrize(
        "args",
        [
            [],
            ["--tokens", "1"],
            ["-p", "x", "--tokens", "1", "--summary"],
            ["--tokens", "1", "--summary", "-o", "x.safetensors"],
            ["--tokens", "one", "--summary"],
            ["--tokens", "1", "--summary", "--layers", "5-3"],
            ["--tokens", "1", "--summary", "--layers", "99"],
            ["--tokens", "999999", "--summary"],
            ["--tokens", "1", "--summary", "--steps", "nonsense"],
        ],
    )
    def test_usage_errors(self, model: Path, args: Sequence[str]) -> None:
        assert ggufkit("trace", model, *args).exit_code == 2

    def test_a_file_that_is_no_trace(self, model: Path) -> None:
        result = ggufkit("compare", model, model)
        assert result.exit_code in (1, 2)
        assert result.stderr.startswith("error:")

    @pytest.mark.parametrize(("text", "layers"), [("3", [3]), ("0-2", [0, 1, 2]), ("0, 5,7-8", [0, 5, 7, 8])])
    def test_layers(self, text: str, layers: list[int]) -> None:
        assert layer_numbers(text) == layers

    @pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1-", "99999"])
    def test_no_layers(self, text: str) -> None:
        with pytest.raises(UsageError, match="names no layers"):
            layer_numbers(text)


class TestTokenize:
    def test_json(self, model: Path) -> None:
        found = as_json("tokenize", model, "an owl<|im_end|>")
        assert found["schema"] == "ggufkit.tokenize/1"
        assert found["count"] == len(found["tokens"])
        assert found["tokens"][-1]["special"] is True
        assert bytes.fromhex("".join(token["bytes"] for token in found["tokens"])) == b"an owl<|im_end|>"

    def test_special_texts_can_be_left_as_text(self, model: Path) -> None:
        found = as_json("tokenize", model, "<|im_end|>", "--no-parse-special")
        assert not any(token["special"] for token in found["tokens"])

    def test_from_a_file_or_stdin(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "text.txt").write_text("秋", encoding="utf-8")
        from_file = as_json("tokenize", model, "--file", tmp_path / "text.txt")
        assert from_file["text"] == "秋"
        assert as_json("tokenize", model, "-", stdin="秋")["tokens"] == from_file["tokens"]

    @pytest.mark.parametrize("args", [[], ["text", "--file", "also"]])
    def test_one_text(self, model: Path, args: Sequence[str]) -> None:
        assert ggufkit("tokenize", model, *args).exit_code == 2

    def test_a_text_that_is_no_utf8(self, model: Path) -> None:
        result = ggufkit("tokenize", model, "-", stdin=b"\xff")
        assert result.exit_code == 2
        assert "UTF-8" in result.stderr


class TestPlot:
    def test_a_picture(self, model: Path, tmp_path: Path) -> None:
        target = tmp_path / "p.png"
        assert ggufkit("plot", model, "blk.*.attn_k.bias", "-o", target).stdout == f"{target}\n"
        assert target.read_bytes().startswith(b"\x89PNG")

    def test_without_options_it_goes_here(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert ggufkit("plot", model, "output_norm.weight").stdout == "model-histogram.png\n"
        assert (tmp_path / "model-histogram.png").exists()

    def test_on_the_terminal(self, model: Path) -> None:
        assert "█" in ggufkit("plot", model, "blk.0.attn_k.bias", "--terminal").stdout

    @pytest.mark.parametrize("args", [["no.such.tensor"], ["output.weight", "-o", "p.bmp"]])
    def test_usage_errors(self, model: Path, args: Sequence[str]) -> None:
        assert ggufkit("plot", model, *args).exit_code == 2

    def test_a_place_that_cannot_be_written(self, model: Path, tmp_path: Path) -> None:
        result = ggufkit("plot", model, "output_norm.weight", "-o", tmp_path / "no" / "p.png")
        assert result.exit_code == 2
        assert "cannot be written" in result.stderr


def test_doctor() -> None:
    result = ggufkit("doctor")
    assert result.exit_code == 0
    assert "Python" in result.stdout
    assert as_json("doctor")["schema"] == "ggufkit.doctor/1"

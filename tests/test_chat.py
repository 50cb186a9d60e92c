"""Chat templates: read without being run, and run where they can do no harm."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggufkit.reader
from ggufkit import _render_template, chat
from ggufkit.chat import TemplateError
from ggufkit.errors import FormatError, GgufkitError, UsageError
from ggufkit.tokenizer import Tokenizer

HI = [{"role": "user", "content": "Hi <b>&é"}]

CHATML = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nBe good.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def run_here(template: str, max_output: int = 10_000, **variables: Any) -> dict[str, Any]:
    """What the child process answers, without the process."""
    request = {"template": template, "variables": {"messages": HI, **variables}, "max_output": max_output}
    return _render_template.render(request)


# ---------------------------------------------------------------------- which templates there are


def test_templates_are_found_by_name() -> None:
    metadata = {
        "tokenizer.chat_template": "a",
        "tokenizer.chat_template.tool_use": "b",
        "tokenizer.chat_templates": ["default", "tool_use"],
        "general.name": "x",
    }
    assert chat.templates(metadata) == {"default": "a", "tool_use": "b"}
    assert chat.templates({}) == {}


def test_a_template_that_is_no_string_is_named() -> None:
    with pytest.raises(FormatError, match=r"tokenizer\.chat_template is a int"):
        chat.templates({"tokenizer.chat_template": 3})


# ---------------------------------------------------------------------- facts


def test_facts_of_a_chatml_template() -> None:
    facts = chat.facts(CHATML)
    assert facts.roles == ("system",)
    assert facts.special_texts == ("<|im_start|>", "<|im_end|>")
    assert facts.variables == {"messages", "add_generation_prompt"}
    assert (facts.filters, facts.tags, facts.uncommon) == ({"trim"}, {"if", "for"}, ())
    assert (facts.has_system, facts.has_tools, facts.has_generation_prompt, facts.adds_bos) == (
        True,
        False,
        True,
        False,
    )


@pytest.mark.parametrize(
    ("template", "roles"),
    [
        ("{% if message.role == 'user' %}{% endif %}", ("user",)),
        ("{% if message['role'] in ['tool', 'ipython'] %}{% endif %}", ("tool", "ipython")),
        ("{% set role = message.role %}{% if 'model' == role %}{% endif %}", ("model",)),
        ("{% if message.content == 'user' %}{% endif %}", ()),
    ],
)
def test_roles_are_what_a_role_is_compared_with(template: str, roles: tuple[str, ...]) -> None:
    assert chat.facts(template).roles == roles


@pytest.mark.parametrize(
    ("template", "uncommon"),
    [
        ("{{ messages | tojson }}{{ 'x'.strip() }}{% if tools is defined %}{% endif %}", ()),
        ("{% macro m(x) %}{{ x }}{% endmacro %}{{ m(1) }}{% set ns = namespace(a=1) %}{% set ns.a = 2 %}", ()),
        ("{% for m in messages %}{% break %}{% endfor %}{% generation %}x{% endgeneration %}", ()),
        ("{{ messages | indent(2) | sparkle }}", ("filter indent", "filter sparkle")),
        ("{{ 'a'.format(1) }}{{ lipsum() }}", ("function lipsum", "method format")),
        ("{% include 'x' %}{% if a is sameas b %}{% endif %}", ("test sameas", "tag include")),
    ],
)
def test_what_not_every_engine_has(template: str, uncommon: tuple[str, ...]) -> None:
    assert chat.facts(template).uncommon == uncommon


@pytest.mark.parametrize(
    ("template", "variables"),
    [
        ("{{ bos_token }}{{ enable_thinking }}", {"bos_token", "enable_thinking"}),
        ("{% set x = 1 %}{{ x }}{% for m in messages %}{{ loop.index }}{{ m }}{% endfor %}", {"messages"}),
        ("{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}", {"tools"}),
    ],
)
def test_variables_are_what_a_template_must_be_given(template: str, variables: set[str]) -> None:
    assert chat.facts(template).variables == variables


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("a\n{% if x %}\nb", r"Unexpected end of template.*\(line 3"),
        ("\n\n{{ a b }}", r"\(line 3"),
        ("{{ 'never ends }}", "unexpected char"),
        ("{{" + "(" * 6000 + "1" + ")" * 6000 + "}}", "nested too deeply"),
        ("\n{{" + "[" * 6000, r"nested too deeply \(line 2"),
        ("{% if a %}" * 500 + "{% endif %}" * 500, "nested too deeply"),
        ("{{ " + "not " * 9000 + "a }}", "nested too deeply"),
        ("{{ a" + " if a else a" * 5000 + " }}", "nested too deeply"),
        ("{{ " + "1" * 9000 + " }}", "4300 digits"),
        ("x" * 50_000_000, "50,000,000 characters"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_templates_that_cannot_be_read(template: str, words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        chat.facts(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ a" + " + a" * 10_000 + " }}",
        "{{ a" + ".b" * 20_000 + " }}",
        "{% if a %}" + "{% elif a %}" * 3000 + "{% endif %}",
        "{% set a = {'b': {'c': '{{((('}} %}" * 1000,
        "{# ((( #}" * 5000,
    ],
    ids=lambda value: value[:24],
)
def test_long_is_not_deep(template: str) -> None:
    assert chat.facts(template).size == len(template)


def test_facts_run_nothing() -> None:
    chat.facts(
        "{{ raise_exception('ran') }}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    )


# ---------------------------------------------------------------------- rendering: what transformers does


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (CHATML, "<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\nHi <b>&é<|im_end|>\n"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi <b>&é"}]'),
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=1) }}", '{\n "b": 1,\n "a": [\n  2\n ]\n}'),
        ("  {% if true %}\na\n  {% endif %}\nb", "a\nb"),  # trim_blocks and lstrip_blocks
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("a{% generation %}b{% endgeneration %}c", "abc"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{% if tools is not none %}x{% endif %}{{ nowhere }}", ""),
    ],
)
def test_rendering(template: str, text: str) -> None:
    assert run_here(template, tools=None) == {"text": text}


def test_the_date_is_todays() -> None:
    before = time.strftime("%Y-%m-%d")
    assert run_here("{{ strftime_now('%Y-%m-%d') }}")["text"] in (before, time.strftime("%Y-%m-%d"))


@pytest.mark.parametrize(
    ("template", "error", "words", "line"),
    [
        ("\n{% if %}", "syntax", "Expected an expression", 2),
        ("\n\n{{ raise_exception('roles must alternate') }}", "refused", "roles must alternate", 3),
        ("{{ messages[0].x.y }}", "failed", "has no attribute 'x'", 1),
        ("{{ nowhere + 'a' }}", "failed", "'nowhere' is undefined", 1),
        ("{{ 1 // 0 }}", "failed", "zero", 1),
        ("{{ messages | sparkle }}", "syntax", "No filter named 'sparkle'", 1),
        ("{{ messages.append(1) }}", "forbidden", "'append' of 'list' object is unsafe", 1),
        ("{{ ().__class__.__mro__ }}", "forbidden", "__class__", 1),
        ("{{ cycler.__init__.__globals__ }}", "forbidden", "__init__", 1),
        ("{{ raise_exception.__globals__['json'] }}", "forbidden", "__globals__", 1),
        ("{{ range(10 ** 9) }}", "failed", "Range too big", 1),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion", "recursion", 1),
        ("{% for i in range(9999) %}xxxxxxxxxx{% endfor %}", "output", "10,000 characters", None),
    ],
)
def test_what_a_template_cannot_do(template: str, error: str, words: str, line: int | None) -> None:
    answer = run_here(template)
    assert (answer["error"], answer["line"]) == (error, line)
    assert words in answer["message"]
    assert error in _render_template.ERRORS


# ---------------------------------------------------------------------- rendering: the process around it


def test_a_prompt_comes_back_from_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jinja2.py").write_text("raise SystemExit('the wrong jinja2')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    template = "{{ bos_token }}{{ messages[0].content }}{{ thinking }}{{ eos_token }}{{ '\ud83e' }}"
    text = chat.render(template, HI, bos_token="<s>", eos_token="</s>", variables={"thinking": "…"})
    assert text == "<s>Hi <b>&é…</s>\ud83e"


@pytest.mark.parametrize(
    ("template", "error", "words"),
    [
        ("{{ raise_exception('no system role') }}", UsageError, "refuses these messages: no system role"),
        ("\n{{ 1 // 0 }}", TemplateError, r"failed.*\(line 2 of the template\)"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            TemplateError,
            "1.5 seconds",
        ),
        ("{{" + "(" * 6000, TemplateError, "nested too deeply"),
        ("{{ a" + " + a" * 10_000 + " }}", TemplateError, "recurses too deeply|broke its process"),
    ],
    ids=["refused", "failed", "endless", "deep", "long"],
)
def test_a_failing_template_is_an_error(template: str, error: type[GgufkitError], words: str) -> None:
    with pytest.raises(error, match=words):
        chat.render(template, HI, timeout=1.5 if "range" in template else 20)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory reliably")
@pytest.mark.parametrize(
    "template", ["{{ 'a' * 10 ** 10 }}", "{{ '%10000000000d' % 1 }}", "{{ 'a' | center(10 ** 10) }}"]
)
def test_memory_is_limited(template: str) -> None:
    with pytest.raises(TemplateError, match="memory"):
        chat.render(template, HI, timeout=20)


def test_output_is_limited() -> None:
    with pytest.raises(TemplateError, match="more than 10 characters"):
        chat.render("{{ messages[0].content * 9 }}", HI, max_output=10)


# ---------------------------------------------------------------------- prompts

SMALL = json.loads((Path(__file__).parent / "golden" / "vocabulary.json").read_text(encoding="utf-8"))["bpe"]


def metadata_with(template: str | None, **keys: Any) -> dict[str, Any]:
    tokens = [*SMALL["tokens"], "<s>"]
    types = np.array([1] * len(SMALL["tokens"]) + [3], np.int32)
    values = {"model": "gpt2", "pre": "qwen2", "tokens": tokens, "merges": SMALL["merges"], "token_type": types}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (values | keys).items()}
    return metadata if template is None else metadata | {"tokenizer.chat_template": template}


def test_without_a_template_there_is_no_prompt() -> None:
    metadata = metadata_with(None)
    assert chat.format_turns(metadata, Tokenizer.from_metadata(metadata), HI) is None


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_prompt_begins_with_one_bos(add_bos: bool) -> None:
    bos = len(SMALL["tokens"])
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    metadata = metadata_with(template, bos_token_id=bos, add_bos_token=add_bos)
    tokenizer = Tokenizer.from_metadata(metadata)
    prompt = chat.format_turns(metadata, tokenizer, HI, system="Be brief.")
    assert prompt is not None
    ids = tokenizer.encode(prompt)
    assert ids.count(bos) == 1
    assert tokenizer.decode(ids) == "<s>system:Be brief.;user:Hi <b>&é;"


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("fixture", "system"),
    [
        ("real_model", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        ("smol_model", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    ],
)
def test_real_templates(fixture: str, system: str, request: pytest.FixtureRequest) -> None:
    with ggufkit.reader.open(request.getfixturevalue(fixture)) as gguf:
        tokenizer = Tokenizer.from_metadata(gguf.metadata)
        turns = "<|im_start|>user\nHi <b>&é<|im_end|>\n<|im_start|>assistant\n"
        default = f"<|im_start|>system\n{system}<|im_end|>\n"
        assert chat.format_turns(gguf.metadata, tokenizer, HI) == default + turns
        own = chat.format_turns(gguf.metadata, tokenizer, HI, system="Be brief.")
        assert own == "<|im_start|>system\nBe brief.<|im_end|>\n" + turns
        facts = chat.facts(chat.templates(gguf.metadata)["default"])
    assert {"<|im_start|>", "<|im_end|>"} <= set(facts.special_texts)
    assert (facts.has_system, facts.has_generation_prompt, facts.adds_bos, facts.uncommon) == (True, True, False, ())

"""The chat template of a file: what it says about itself, and messages turned into a prompt.

A chat template is a program that comes with a file. `facts` reads it without running it: jinja2 parses, nothing
is compiled, and size and nesting are checked before. `render` runs it in a sandbox in a child process with
limits on time, memory and output; only whoever wants a prompt calls that.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufkit.errors import FormatError, GgufkitError, UsageError

if TYPE_CHECKING:
    from jinja2 import nodes

    from ggufkit.tokenizer import Tokenizer

__all__ = ["MAX_NESTING", "MAX_SIZE", "TemplateError", "TemplateFacts", "facts", "format_turns", "render", "templates"]

_KEY = "tokenizer.chat_template"

#: characters; of 60 templates of well-known models the longest has 17,000
MAX_SIZE = 64 << 10
#: open brackets and blocks at once; real templates stay below 15
MAX_NESTING = 64
#: bytes that a rendering process may have
MAX_MEMORY = 512 << 20

# What the engines that read GGUF have in common. A template that uses more works in transformers and may fail,
# or silently render something else, elsewhere.
_COMMON = {
    kind: frozenset(names.split())
    for kind, names in {
        "filter": "abs capitalize count default dictsort first float int items join last length list lower map reject "
        "rejectattr replace reverse safe select selectattr sort string title tojson trim upper",
        "test": "boolean callable defined divisibleby eq equalto even false float ge greaterthan gt in integer "
        "iterable le lessthan lower lt mapping ne none number odd sequence string true undefined upper",
        "function": "namespace raise_exception range strftime_now",
        "method": "append capitalize endswith get items keys lower lstrip pop replace rsplit rstrip split startswith "
        "strip title upper values",
        "tag": "break call continue filter for generation if macro set",
    }.items()
}

#: names that an engine gives to every template
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}
#: names that are there without being given
_BUILT_IN = {*_COMMON["function"], "loop", "caller", "self", "varargs", "kwargs"}

#: node type of jinja2 → the tag that makes it
_TAGS = {
    "Assign": "set",
    "AssignBlock": "set",
    "Block": "block",
    "Break": "break",
    "CallBlock": "call",
    "Continue": "continue",
    "ExprStmt": "do",
    "Extends": "extends",
    "FilterBlock": "filter",
    "For": "for",
    "FromImport": "from",
    "If": "if",
    "Import": "import",
    "Include": "include",
    "Macro": "macro",
    "Scope": "generation",
    "With": "with",
}

#: how control tokens are written; markup such as <tool_call> may or may not be one, so it is left out
_SPECIAL_TEXT = re.compile(
    r"<\|[^\s|<>]+\|>|<｜[^\s｜<>]+｜>|</?s>|<(?:bos|eos|start_of_turn|end_of_turn)>|\[/?INST\]|<</?SYS>>"
)


class TemplateError(FormatError):
    """A chat template that cannot be read, or failed. `line` is the template's line, when that is known."""

    def __init__(self, message: str, *, line: int | None = None, **rest: Any) -> None:
        super().__init__(f"{message} (line {line} of the template)" if line else message, **rest)
        self.line = line


@dataclass(frozen=True)
class TemplateFacts:
    """What a chat template says about itself without being run.

    Attributes:
        size: in characters.
        roles: role names that it compares a message's role with.
        literals: every piece of text that it can write or compare, in its order.
        special_texts: what looks like a control token in the literals, each once.
        variables: names that it expects to be given (`messages`, `tools`, `bos_token`, `enable_thinking` …).
        filters, tests, functions, methods, tags: the parts of the template language that it uses.
        uncommon: those of them that not every engine has, as `filter indent`.
    """

    size: int
    roles: tuple[str, ...]
    literals: tuple[str, ...]
    special_texts: tuple[str, ...]
    variables: frozenset[str]
    filters: frozenset[str]
    tests: frozenset[str]
    functions: frozenset[str]
    methods: frozenset[str]
    tags: frozenset[str]
    uncommon: tuple[str, ...]

    @property
    def adds_bos(self) -> bool:
        """Whether it writes the BOS token itself."""
        return "bos_token" in self.variables

    @property
    def has_system(self) -> bool:
        return "system" in self.roles

    @property
    def has_tools(self) -> bool:
        return "tools" in self.variables

    @property
    def has_generation_prompt(self) -> bool:
        return "add_generation_prompt" in self.variables


def templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a file by name; the unnamed one is `default`.

    Raises:
        FormatError: a template is no string.
    """
    found: dict[str, str] = {}
    for key in metadata:  # not items(): a value costs something, and the vocabulary's is large
        if key == _KEY or key.startswith(_KEY + "."):
            value = metadata[key]
            if not isinstance(value, str):
                raise FormatError(f"{key} is a {type(value).__name__}", expected="a string")
            found[key.removeprefix(_KEY).removeprefix(".") or "default"] = value
    return found


# ---------------------------------------------------------------------- facts, without running anything


def facts(template: str) -> TemplateFacts:
    """Read a chat template without running it.

    Raises:
        TemplateError: it is too long, nested too deeply, or has a syntax error; says the line.
    """
    tree = list(_walk(_parse(template)))
    literals = tuple(_literals(tree))
    used = {kind: frozenset[str]() for kind in _COMMON} | _used(tree)
    return TemplateFacts(
        size=len(template),
        roles=tuple(dict.fromkeys(_roles(tree))),
        literals=literals,
        special_texts=tuple(dict.fromkeys(text for part in literals for text in _SPECIAL_TEXT.findall(part))),
        variables=_variables(tree),
        filters=used["filter"],
        tests=used["test"],
        functions=used["function"],
        methods=used["method"],
        tags=used["tag"],
        uncommon=tuple(f"{kind} {name}" for kind in _COMMON for name in sorted(used[kind] - _COMMON[kind])),
    )


def _parse(template: str) -> nodes.Template:
    import jinja2

    from ggufkit._render_template import ERRORS, environment

    _check_size(template)
    try:
        return environment().parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"{ERRORS['syntax']}: {error.message}", line=error.lineno) from error
    except ValueError as error:  # a number of more digits than Python reads
        raise TemplateError(f"{ERRORS['syntax']}: {error}") from error
    except RecursionError as error:  # a chain that opens no bracket: not not not …
        raise TemplateError("the chat template is nested too deeply to be read") from error


def _check_size(template: str) -> None:
    """Refuse what no parser should be given, in linear time."""
    if len(template) > MAX_SIZE:
        raise TemplateError(
            f"the chat template has {len(template):,} characters", expected=f"at most {MAX_SIZE:,} characters"
        )
    at = _too_deep(template)
    if at is not None:
        raise TemplateError(
            "the chat template is nested too deeply",
            line=template.count("\n", 0, at) + 1,
            expected=f"at most {MAX_NESTING} brackets and blocks inside each other",
        )


_OPEN_TAG = re.compile(r"\{\{|\{%[-+]?\s*(\w*)|\{#")
_IN_TAG = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|%\}|['"(\[{)\]}]""", re.DOTALL)
#: tags with an end; `set` has one only sometimes, and is left to the parser
_BLOCKS = {"for", "if", "macro", "call", "filter", "block", "with", "generation", "autoescape"}
_ENDS = {f"end{name}" for name in _BLOCKS}


def _too_deep(template: str) -> int | None:
    """Where more than MAX_NESTING brackets and blocks are open; None when nowhere.

    What is no valid template may be counted wrongly: the parser says what is wrong with it.
    """
    at = blocks = brackets = 0
    inside = False
    while token := (_IN_TAG if inside else _OPEN_TAG).search(template, at):
        at, text = token.end(), token[0]
        if text == "{#":
            at = template.find("#}", at)
            if at < 0:
                return None
        elif not inside:
            inside, brackets = True, 0
            blocks += (token[1] in _BLOCKS) - (token[1] in _ENDS)
        elif text in ("'", '"'):
            return None  # a string that never ends
        elif text == "%}" or (text == "}" and brackets == 0):
            inside = False
        elif text in "([{)]}":
            brackets = max(brackets + (1 if text in "([{" else -1), 0)
        if blocks + brackets > MAX_NESTING:
            return at
    return None


def _walk(root: nodes.Node) -> Iterator[nodes.Node]:
    """Every node in the order of the source, without recursion: a long sum is a deep tree."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(reversed(list(node.iter_child_nodes())))


def _literals(tree: Sequence[nodes.Node]) -> Iterator[str]:
    from jinja2 import nodes

    for node in tree:
        if isinstance(node, nodes.TemplateData):
            yield node.data
        elif isinstance(node, nodes.Const) and isinstance(node.value, str):
            yield node.value


def _roles(tree: Sequence[nodes.Node]) -> Iterator[str]:
    """The strings in comparisons with something that is called role."""
    from jinja2 import nodes

    for node in tree:
        if isinstance(node, nodes.Compare):
            sides = list(_walk(node))
            if any(_is_role(side) for side in sides):
                yield from (text for text in _literals(sides) if text != "role")


def _is_role(node: nodes.Node) -> bool:
    from jinja2 import nodes

    if isinstance(node, nodes.Getattr):
        return node.attr == "role"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "role"
    return isinstance(node, nodes.Name) and node.name == "role"


def _variables(tree: Sequence[nodes.Node]) -> frozenset[str]:
    from jinja2 import nodes

    names = [node for node in tree if isinstance(node, nodes.Name)]
    loaded = {node.name for node in names if node.ctx == "load"}
    own = {node.name for node in names if node.ctx != "load"}
    own |= {node.name for node in tree if isinstance(node, nodes.Macro)}
    return frozenset(loaded - (own - _GIVEN) - _BUILT_IN)


def _used(tree: Sequence[nodes.Node]) -> dict[str, frozenset[str]]:
    """The names of the language's parts that a template uses, by kind."""
    from jinja2 import nodes

    macros = {node.name for node in tree if isinstance(node, nodes.Macro)} | {"caller"}
    calls = [node.node for node in tree if isinstance(node, nodes.Call)]
    return {
        "filter": frozenset(node.name for node in tree if isinstance(node, nodes.Filter)),
        "test": frozenset(node.name for node in tree if isinstance(node, nodes.Test)),
        "function": frozenset(node.name for node in calls if isinstance(node, nodes.Name)) - macros,
        "method": frozenset(node.attr for node in calls if isinstance(node, nodes.Getattr)),
        "tag": frozenset(_TAGS[name] for node in tree if (name := type(node).__name__) in _TAGS),
    }


# ---------------------------------------------------------------------- rendering, in a child process


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    timeout: float = 5.0,
    max_output: int = 1 << 20,
) -> str:
    """Run a chat template on some messages, in a sandbox in a process of its own.

    The environment is the one of transformers: trimmed blocks, loop controls, `tojson` without HTML escapes,
    `raise_exception`, `strftime_now`, the generation tag. The process may use `timeout` seconds and write
    `max_output` characters, and 512 MiB of memory where the system can limit that; Windows cannot, and some
    versions of macOS do not: there only time and output are limited.

    Args:
        messages: [{"role": …, "content": …}, …], whatever the template understands that JSON can say.
        add_generation_prompt: whether the prompt ends with the beginning of the assistant's turn.
        bos_token, eos_token: the texts of these tokens.
        tools: JSON schemas of functions, for templates that know tools.
        variables: more names for the template (`enable_thinking`).

    Raises:
        UsageError: the template refuses the messages.
        TemplateError: a syntax error, a failure or a limit; says the line where it is known.
    """
    _check_size(template)
    request = {
        "template": template,
        "variables": {
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            "bos_token": bos_token,
            "eos_token": eos_token,
            "tools": tools,
            "documents": None,
            **(variables or {}),
        },
        "max_output": max_output,
        "memory": MAX_MEMORY,
        "seconds": math.ceil(timeout) + 1,
    }
    return _text(_run_child(json.dumps(request), timeout))


def _run_child(request: str, timeout: float) -> dict[str, Any]:
    try:
        child = subprocess.run(
            _command(),
            input=request,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            check=False,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except subprocess.TimeoutExpired as error:
        raise TemplateError(f"the chat template did not finish within {timeout:g} seconds") from error
    except OSError as error:
        raise GgufkitError(f"the process that renders chat templates cannot be started: {error}") from error
    try:
        answer: dict[str, Any] = json.loads(child.stdout)
    except ValueError as error:
        reason = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise TemplateError(
            f"the chat template broke its process (exit status {child.returncode}: {reason})"
        ) from error
    return answer


@cache
def _command() -> list[str]:
    """Python without site-packages, the script, and the folders of what it imports."""
    script = Path(__file__).with_name("_render_template.py")
    folders = dict.fromkeys(str(Path(_origin(name)).parents[1]) for name in ("jinja2", "markupsafe"))
    return [sys.executable, "-I", "-S", str(script), *folders]


def _origin(package: str) -> str:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise GgufkitError(f"the package {package} is not installed", help=f"pip install {package}")
    return spec.origin


def _text(answer: Mapping[str, Any]) -> str:
    from ggufkit._render_template import ERRORS

    if "text" in answer:
        return str(answer["text"])
    message = f"{ERRORS[answer['error']]}: {answer['message']}"
    if answer["error"] == "refused":
        raise UsageError(message, help="change the messages, or run without the template (--raw)")
    raise TemplateError(message, line=answer["line"])


def format_turns(
    metadata: Mapping[str, Any],
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    system: str | None = None,
    timeout: float = 5.0,
) -> str | None:
    """The prompt for some messages by the file's own template, ready for `tokenizer.encode`.

    Args:
        messages: [{"role": "user", "content": …}, …].
        system: put in front as a system message.

    Returns:
        The prompt up to the beginning of the assistant's turn, without the BOS that `encode` adds; None when the
        file has no chat template.

    Raises:
        UsageError, TemplateError: as `render`.
    """
    template = templates(metadata).get("default")
    if template is None:
        return None
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    bos, eos = (_token_text(tokenizer, token) for token in (tokenizer.bos_id, tokenizer.eos_id))
    prompt = render(template, messages, bos_token=bos, eos_token=eos, timeout=timeout)
    return prompt.removeprefix(bos) if tokenizer.add_bos else prompt


def _token_text(tokenizer: Tokenizer, token: int | None) -> str:
    return "" if token is None else tokenizer.token_text(token)

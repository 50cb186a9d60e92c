"""Renders one chat template; run as a script, in a process of its own, because a template is a program from a file.

The sandbox stops a template from reaching anything but its variables; it does not stop it from running forever
or eating all memory. So the parent gives this process a deadline, and this process gives itself limits before
it looks at the template. It is started without site-packages (`-I -S`) and imports jinja2 alone, from the
folders named on its command line, which keeps its start near a tenth of a second.

Standard input: {"template", "variables", "max_output" (characters), "memory" (bytes), "seconds"} as JSON.
Standard output: {"text"} or {"error", "message", "line"} as JSON; `error` is a key of `ERRORS`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = sys.argv[1:]

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

#: what can go wrong, as the beginning of a sentence
ERRORS = {
    "syntax": "the chat template has a syntax error",
    "refused": "the chat template refuses these messages",
    "forbidden": "the chat template does something that the sandbox forbids",
    "failed": "the chat template failed",
    "recursion": "the chat template recurses too deeply",
    "memory": "the chat template needs more memory than it may have",
    "output": "the chat template writes more than it may",
}


class Refusal(jinja2.TemplateError):
    """A template called `raise_exception`."""


class Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`, which marks what a model said; for rendering it is only a scope."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=lineno)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment that chat templates are written for: as transformers has it."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = _strftime_now
    return made


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **rest: Any) -> str:
    """JSON as it is, where jinja2's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **rest)


def _refuse(message: object) -> None:
    raise Refusal(str(message))


def _strftime_now(pattern: str) -> str:
    import datetime as dt

    return dt.datetime.now().strftime(pattern)


def render(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request."""
    try:
        template = environment().from_string(request["template"])
        return _collect(template, request["variables"], request["max_output"])
    except jinja2.TemplateSyntaxError as error:
        return {"error": "syntax", "message": error.message, "line": error.lineno}
    except Refusal as error:
        return _failure("refused", error)
    except jinja2.exceptions.SecurityError as error:
        return _failure("forbidden", error)
    except RecursionError as error:
        return _failure("recursion", error)
    except MemoryError as error:
        return _failure("memory", error)
    except Exception as error:  # a template can raise whatever Python can
        return _failure("failed", error)


def _collect(template: jinja2.Template, variables: dict[str, Any], max_output: int) -> dict[str, Any]:
    pieces, left = [], max_output
    for piece in template.generate(variables):
        left -= len(piece)
        if left < 0:
            return {"error": "output", "message": f"more than {max_output:,} characters", "line": None}
        pieces.append(piece)
    return {"text": "".join(pieces)}


def _failure(kind: str, error: BaseException) -> dict[str, Any]:
    """The error with the template's line, which is that of the innermost frame inside the template."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return {"error": kind, "message": str(error)[:1000] or type(error).__name__, "line": line}


def _limit(memory: int, seconds: int) -> None:
    """Limits that the system keeps for us; where it cannot (Windows), only the parent's deadline is left."""
    try:
        import resource
    except ImportError:
        return
    for what, value in (("RLIMIT_AS", memory), ("RLIMIT_CPU", seconds), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        try:
            resource.setrlimit(getattr(resource, what), (value, value))
        except (AttributeError, ValueError, OSError):
            continue  # this one does not exist here, or is lower already


def main() -> None:
    request = json.load(sys.stdin)
    _limit(request["memory"], request["seconds"])
    json.dump(render(request), sys.stdout)


if __name__ == "__main__":
    main()

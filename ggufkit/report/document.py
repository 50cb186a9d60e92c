"""JSON documents: how any result becomes one, the same way for every command.

A document names its schema, `ggufkit.<command>/1`. JSON has no NaN and no infinities, so they are the strings
"NaN", "Infinity" and "-Infinity". Only ASCII is written: a document is safe to print on any terminal, whatever
the file put into its strings.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

from ggufkit.report.escape import shown

VERSION = 1

_SURROGATE = re.compile("[\ud800-\udfff]")


def document(command: str, body: Any, *, indent: int | None = 2) -> str:
    """The JSON document of a command's result.

    Args:
        command: names the schema.
        body: a dataclass or a mapping; see `plain`.
        indent: None puts everything on one line.
    """
    whole = {"schema": f"ggufkit.{command}/{VERSION}", **plain(body)}
    return json.dumps(whole, indent=indent, ensure_ascii=True, allow_nan=False)


def named_document(schema: str, body: Any) -> str:
    """A document of a schema of its own, such as a manifest's."""
    return json.dumps({"schema": schema, **plain(body)}, indent=1, ensure_ascii=True, allow_nan=False)


def plain(value: Any) -> Any:
    """`value` as JSON's own types: dataclasses become objects, arrays lists, enums their values.

    Raises:
        TypeError: it holds something that has no such form.
    """
    match value:
        case None | bool() | int() if not isinstance(value, Enum):
            return value
        case str() if not isinstance(value, Enum):
            return value if value.isascii() else _text(value)
        case Enum():
            return plain(value.value)
        case float():
            return _number(value)
        case Mapping():
            return {str(plain(key)): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case frozenset():
            return sorted(plain(item) for item in value)
        case PurePath():
            return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if hasattr(value, "tolist"):  # NumPy's arrays and scalars, without importing NumPy
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no place in a JSON document")


def _text(value: str) -> str:
    """Bytes that were no UTF-8 as `\\xff`: half a surrogate pair is no valid JSON to most parsers."""
    return _SURROGATE.sub(lambda match: shown(match[0]), value)


def _number(value: float) -> float | str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value

"""Known findings: written once, then counted and not shown, so that only what is new is in the way.

A finding is known by its rule and its place (tensor or key, and index), not by its message, which may be worded
better tomorrow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ggufkit.errors import NewerThanTool, SourceError, UsageError
from ggufkit.findings import Finding, Report
from ggufkit.report.escape import shown

SCHEMA = "ggufkit.baseline/1"

Known = frozenset[tuple[Any, ...]]


def entries(reports: Iterable[Report]) -> dict[str, Any]:
    """The document's body: every finding of some reports, by file name."""
    return {
        "files": {
            Path(report.source).name: [
                {"code": f.code, "tensor": _safe(f.tensor), "key": _safe(f.key), "index": list(f.index or ())}
                for f in report.findings
            ]
            for report in reports
        }
    }


def load(path: str | os.PathLike[str]) -> dict[str, Known]:
    """File name → what is known of it.

    Raises:
        SourceError: it cannot be read.
        UsageError: it is no baseline.
        NewerThanTool: it is of a later version.
    """
    name = os.fspath(path)
    try:
        document = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror or error}", path=name) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"no JSON: {error}", path=name, expected="a file of --write-baseline") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if isinstance(schema, str) and schema.startswith("ggufkit.baseline/") and schema != SCHEMA:
        raise NewerThanTool(f"a baseline of the schema {schema!r}", path=name, expected=SCHEMA, help="update ggufkit")
    try:
        if schema != SCHEMA:
            raise ValueError("its schema is another")
        return {
            str(file): frozenset((e["code"], e["tensor"], e["key"], tuple(e["index"])) for e in found)
            for file, found in document["files"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"this is no baseline: {error}", path=name, expected="a file of --write-baseline") from error


def without_known(report: Report, known: dict[str, Known]) -> Report:
    """The report with what is known counted instead of shown."""
    mine = known.get(Path(report.source).name, frozenset())
    new = tuple(finding for finding in report.findings if _place(finding) not in mine)
    return replace(report, findings=new, known=len(report.findings) - len(new))


def _place(finding: Finding) -> tuple[Any, ...]:
    return finding.code, _safe(finding.tensor), _safe(finding.key), tuple(finding.index or ())


def _safe(text: str | None) -> str | None:
    """A name as JSON can hold it, whatever the file put into it."""
    return None if text is None else shown(text)

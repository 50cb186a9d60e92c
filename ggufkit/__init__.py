"""ggufkit: is it the GGUF file, the tokenizer and template, or my engine? Answered with evidence.

    import ggufkit

    with ggufkit.open("model.gguf") as gguf:           # header only; arrays and tensors when asked for
        print(gguf.architecture, len(gguf.tensors))
        engine = ggufkit.load(gguf, device="auto")     # something that runs it

    report = ggufkit.validate("model.gguf")
    print(report.verdict, [finding.message for finding in report.findings])

The names are loaded when they are first used, so that importing ggufkit costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ggufkit.checks import run as validate
    from ggufkit.container import GGUF, Tensor
    from ggufkit.errors import GgufkitError
    from ggufkit.findings import Confidence, Evidence, Finding, Judgement, Report, Severity, Verdict
    from ggufkit.reader import open  # noqa: A004 - as gzip.open and PIL.Image.open
    from ggufkit.runtime import load
    from ggufkit.runtime.engine import Engine

#: public name → where it is, and what it is called there
_PLACES: dict[str, tuple[str, str]] = {
    "Confidence": ("ggufkit.findings", "Confidence"),
    "Engine": ("ggufkit.runtime.engine", "Engine"),
    "Evidence": ("ggufkit.findings", "Evidence"),
    "Finding": ("ggufkit.findings", "Finding"),
    "GGUF": ("ggufkit.container", "GGUF"),
    "GgufkitError": ("ggufkit.errors", "GgufkitError"),
    "Judgement": ("ggufkit.findings", "Judgement"),
    "Report": ("ggufkit.findings", "Report"),
    "Severity": ("ggufkit.findings", "Severity"),
    "Tensor": ("ggufkit.container", "Tensor"),
    "Verdict": ("ggufkit.findings", "Verdict"),
    "load": ("ggufkit.runtime", "load"),
    "open": ("ggufkit.reader", "open"),
    "validate": ("ggufkit.checks", "run"),
}

__all__ = [
    "GGUF",
    "Confidence",
    "Engine",
    "Evidence",
    "Finding",
    "GgufkitError",
    "Judgement",
    "Report",
    "Severity",
    "Tensor",
    "Verdict",
    "__version__",
    "load",
    "open",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'ggufkit' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

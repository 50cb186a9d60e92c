"""Engines that are not ours, as witnesses: llama.cpp and transformers, each showing its own steps under our names.

A verdict on an engine is worth more when a second implementation says the same. A witness is an `Engine` like any
other, so that traces, summaries and decoding work with it unchanged; its package is optional and is imported when a
witness is called.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from ggufkit.errors import Unsupported

if TYPE_CHECKING:
    from ggufkit.container import GGUF
    from ggufkit.runtime.engine import Engine


class Witness(NamedTuple):
    """Where a witness is implemented, and the extra that installs what it needs."""

    module: str
    engine: str
    extra: str


WITNESSES = {
    "llama.cpp": Witness("ggufkit.witness.llama_cpp", "LlamaCppEngine", "llamacpp"),
    "transformers": Witness("ggufkit.witness.transformers", "TransformersEngine", "transformers"),
}


def load(name: str, gguf: GGUF, dtype: str | None = None) -> Engine:
    """A witness that runs a model.

    Args:
        name: one of `WITNESSES`.
        gguf: an opened file; it stays open as long as the witness is used.
        dtype: of its computation, or None for what it does by itself; see the witness.

    Raises:
        Unsupported: its package is not installed or not understood, or the model is not modelled.
        UsageError: it does not compute in this dtype.
        FormatError, NewerThanTool: as `runtime.engine.runnable`.
    """
    witness = WITNESSES[name]
    try:
        module = import_module(witness.module)
    except ImportError as error:
        message = f"the engine {name} needs a package that is not installed here ({error.name or error})"
        raise Unsupported(message, help=f"pip install 'ggufkit[{witness.extra}]'") from error
    engine: Engine = getattr(module, witness.engine)(gguf, dtype)
    return engine

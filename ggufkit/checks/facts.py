"""What the file is, in a few facts that head a report."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ggufkit.container import GGUF


def describe(gguf: GGUF) -> dict[str, Any]:
    """Architecture, name, size and quantization mix; only what the header tells, and only what is there.

    Returns:
        Keys: `architecture`, `name`, `version`, `byteorder`, `files`, `bytes`, `tensors`, `parameters` (elements of
        all tensors), `types` (block type → number of tensors).
    """
    name = gguf.metadata.get("general.name")
    return {
        "architecture": gguf.architecture,
        "name": name if isinstance(name, str) else None,
        "version": gguf.version,
        "byteorder": gguf.byteorder,
        "files": len(gguf.shards),
        "bytes": gguf.size,
        "tensors": len(gguf.tensors),
        "parameters": sum(tensor.n_elements for tensor in gguf.tensors.values()),
        "types": dict(Counter(tensor.type_name for tensor in gguf.tensors.values()).most_common()),
    }

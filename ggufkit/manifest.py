"""Checksums of a file, part by part: the header and each tensor.

One flipped bit of a code, or the sign of one scale, changes nothing that statistics could see. A manifest written
while the file was known to be good sees it, and names the tensor, which the checksum of the whole file cannot.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufkit.container import GGUF, Tensor
from ggufkit.errors import FormatError, NewerThanTool, SourceError, UsageError

SCHEMA = "ggufkit.manifest/1"
_CHUNK = 4 << 20
_MAX_BYTES = 256 << 20

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a manifest file says.

    Attributes:
        header: sha256, in hex, of the header (of each shard's in turn).
        tensors: name → sha256 of its packed bytes.
        nbytes: name → how many those are.
        path: where it was read from; None for one just made.
    """

    header: str
    tensors: Mapping[str, str]
    nbytes: Mapping[str, int]
    path: str | None = None

    def as_document(self, source: str) -> dict[str, Any]:
        """The JSON document, less its schema."""
        entries = {name: {"sha256": digest, "bytes": self.nbytes[name]} for name, digest in self.tensors.items()}
        return {"source": source, "header": {"sha256": self.header}, "tensors": entries}


def make(gguf: GGUF, progress: Progress | None = None) -> Manifest:
    """The manifest of an opened file.

    Args:
        progress: called with the bytes done since it was last called.

    Raises:
        FormatError, NewerThanTool: a tensor cannot be read; a manifest of a damaged file would be of no use.
    """
    digests = {name: tensor_digest(gguf, tensor, progress) for name, tensor in gguf.tensors.items()}
    return Manifest(header_digest(gguf), digests, {name: t.nbytes or 0 for name, t in gguf.tensors.items()})


def header_digest(gguf: GGUF) -> str:
    """sha256, in hex, of the header up to where the data begins, of each shard in turn."""
    digest = hashlib.sha256()
    for shard in gguf.shards:
        digest.update(shard.source.read(0, shard.header_end))
    return digest.hexdigest()


def tensor_digest(gguf: GGUF, tensor: Tensor, progress: Progress | None = None) -> str:
    """sha256, in hex, of a tensor's packed bytes, read in pieces.

    Raises:
        FormatError, NewerThanTool: it cannot be read.
    """
    digest = hashlib.sha256()
    nbytes = tensor.nbytes
    if nbytes is None:
        gguf.read(tensor, 0, 0)  # says why there is no size
        raise FormatError(f"{tensor.name!r} has no size", path=str(gguf.path))
    buffer = memoryview(bytearray(min(_CHUNK, nbytes)))
    for start in range(0, nbytes, _CHUNK):
        part = buffer[: min(_CHUNK, nbytes - start)]
        gguf.read_into(tensor, part, start)
        digest.update(part)
        if progress:
            progress(len(part))
    return digest.hexdigest()


def load(path: str | os.PathLike[str]) -> Manifest:
    """Read a manifest file.

    Raises:
        SourceError: it cannot be read.
        UsageError: it is no manifest.
        NewerThanTool: it is of a later version.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError("too large for a manifest", path=str(path))
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror or error}", path=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"no JSON: {error}", path=str(path), expected="a file of --write-manifest") from error
    return _parsed(document, str(path))


def _parsed(document: Any, path: str) -> Manifest:
    schema = document.get("schema") if isinstance(document, dict) else None
    if isinstance(schema, str) and schema.startswith("ggufkit.manifest/") and schema != SCHEMA:
        raise NewerThanTool(f"a manifest of the schema {schema!r}", path=path, expected=SCHEMA, help="update ggufkit")
    try:
        if schema != SCHEMA:
            raise ValueError("its schema is another")
        tensors = {str(name): str(entry["sha256"]) for name, entry in document["tensors"].items()}
        nbytes = {str(name): int(entry["bytes"]) for name, entry in document["tensors"].items()}
        return Manifest(str(document["header"]["sha256"]), tensors, nbytes, path)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        message = f"this is no manifest: {error}"
        raise UsageError(message, path=path, expected="a file of --write-manifest") from error

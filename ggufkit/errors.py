"""The one exception family.

Everything that a file, a machine or a user can do wrong ends in a subclass of `GgufkitError`; any other
exception that leaves ggufkit is a bug in ggufkit. A message says what was found, where, what was expected
and what to do, so that the command line can print it as it stands.
"""

from __future__ import annotations


class GgufkitError(Exception):
    """Base of all errors.

    Args:
        message: what was found, in one sentence.
        path: the file it was found in.
        offset: the byte offset in that file.
        expected: what would have been right.
        help: what the user can do about it.
    """

    #: the exit status that the command line ends with
    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        offset: int | None = None,
        expected: str | None = None,
        help: str | None = None,  # noqa: A002 - the field's name in every report
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.offset = offset
        self.expected = expected
        self.help = help

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        at = f" (byte {self.offset:,})" if self.offset is not None else ""
        expected = f"; expected {self.expected}" if self.expected else ""
        return f"{where}{self.message}{at}{expected}"


class SourceError(GgufkitError):
    """A path cannot be opened or read: missing, a directory, no permission, vanished while reading."""

    exit_code = 2


class NotGGUF(GgufkitError):
    """The file is something else. `looks_like` names what, when that could be told."""

    def __init__(self, message: str, *, looks_like: str | None = None, **rest: object) -> None:
        super().__init__(message, **rest)  # type: ignore[arg-type]
        self.looks_like = looks_like


class FormatError(GgufkitError):
    """A GGUF file so damaged that nothing more of it can be read."""


class NewerThanTool(GgufkitError):
    """A container version, block type or tokenizer that this version of ggufkit does not know."""

    exit_code = 3


class Unsupported(GgufkitError):
    """The file may be fine, but ggufkit cannot do this with it (an architecture that is not modelled)."""

    exit_code = 3


class DeviceError(GgufkitError):
    """No GPU, no CuPy, an old driver, or not enough memory; `help` says what to do."""

    exit_code = 3


class UsageError(GgufkitError):
    """The request makes no sense: a prompt longer than the context, a tensor name that is not there."""

    exit_code = 2


class TraceError(GgufkitError):
    """A file is no trace: no safetensors, no token ids, or metadata that contradicts itself."""

    exit_code = 2


class NotFinite(GgufkitError):
    """The forward pass made NaN or an infinity, so that there is nothing to choose a token from."""

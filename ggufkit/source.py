"""Where bytes come from: a file, or the shards of a split set.

Reads are positional (`pread`), so that any number of threads can share one open file and fill buffers of
their own. Nothing is mapped into memory: a touched mapping stays resident and would make the memory needed
grow with the file.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from pathlib import Path
from typing import Self

from ggufkit.errors import SourceError

#: `PREFIX-00001-of-00003.gguf`, the file names of a split set, counted from 1
SPLIT_NAME = re.compile(r"(?P<prefix>.+)-(?P<no>[0-9]{5})-of-(?P<count>[0-9]{5})(?i:\.gguf)", re.DOTALL)


class Source:
    """One regular file, opened for positional reads. Safe to share between threads.

    Raises:
        SourceError: the path is missing, no regular file, or may not be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.name = str(path)
        self._lock = threading.Lock()
        try:
            self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
        except (OSError, ValueError) as error:
            raise _cannot_open(self.name, error) from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            what = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise SourceError(f"is {what}", path=self.name, expected="a GGUF file")
        self.size = status.st_size

    def read(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`; fewer only at the end of the file."""
        parts = []
        while count > 0:
            part = self._pread(offset, count)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` (writable, contiguous bytes) from `offset`; the number of bytes that were there."""
        done = 0
        while done < len(buffer):
            count = self._pread_into(offset + done, buffer[done:])
            if count == 0:
                break
            done += count
        return done

    def close(self) -> None:
        """Close the file; reading afterwards raises SourceError."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def _pread(self, offset: int, count: int) -> bytes:
        try:
            if hasattr(os, "pread"):
                return os.pread(self._fd, count, offset)
            with self._lock:  # Windows has no positional read
                os.lseek(self._fd, offset, os.SEEK_SET)
                return os.read(self._fd, count)
        except OSError as error:
            raise self._cannot_read(offset, error) from error

    def _pread_into(self, offset: int, buffer: memoryview) -> int:
        if not hasattr(os, "preadv"):  # macOS before 11, Windows
            part = self._pread(offset, min(len(buffer), 1 << 20))
            buffer[: len(part)] = part
            return len(part)
        try:
            return os.preadv(self._fd, [buffer], offset)
        except OSError as error:
            raise self._cannot_read(offset, error) from error

    def _cannot_read(self, offset: int, error: OSError) -> SourceError:
        reason = "the file is closed" if self._fd < 0 else error.strerror or str(error)
        return SourceError(f"cannot be read: {reason}", path=self.name, offset=offset)


def shard_paths(path: str | os.PathLike[str]) -> list[Path]:
    """All the files of the split set that `path` names a part of, in order; `[path]` when it is no split name.

    The count comes from the name alone; the files need not exist (a missing one is the reader's finding).
    A name that promises more than 9,999 parts, or a part beyond its count, is taken as an ordinary name.
    """
    path = Path(path)
    match = SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= int(match["no"]) <= count <= 9_999:
        return [path]
    prefix, suffix = match["prefix"], path.suffix
    return [path.with_name(f"{prefix}-{no:05d}-of-{count:05d}{suffix}") for no in range(1, count + 1)]


def _cannot_open(name: str, error: OSError | ValueError) -> SourceError:
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    hint = "check the path" if isinstance(error, FileNotFoundError) else None
    return SourceError(f"cannot be opened: {reason}", path=name, help=hint)

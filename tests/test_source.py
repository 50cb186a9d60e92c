"""Where bytes come from: positional reads of a file, and the names of a split set."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ggufkit.errors import SourceError
from ggufkit.source import Source, shard_paths

DATA = bytes(range(256)) * 40


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize(
    ("offset", "count"),
    [(0, 0), (0, 16), (255, 2), (len(DATA) - 3, 3), (len(DATA) - 3, 100), (len(DATA), 1), (len(DATA) + 5, 1)],
)
def test_reads_are_the_bytes_that_are_there(file: Path, offset: int, count: int) -> None:
    with Source(file) as source:
        assert source.read(offset, count) == DATA[offset : offset + count]
        buffer = bytearray(count)
        done = source.read_into(offset, memoryview(buffer))
        assert bytes(buffer[:done]) == DATA[offset : offset + count]


def test_a_system_without_positional_reads_gives_the_same(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pread", "preadv"):
        monkeypatch.delattr(os, name, raising=False)
    with Source(file) as source:
        buffer = bytearray(5000)
        assert source.read(100, 5000) == DATA[100:5100]
        assert source.read_into(100, memoryview(buffer)) == 5000
        assert bytes(buffer) == DATA[100:5100]


def test_threads_share_one_open_file(file: Path) -> None:
    with Source(file) as source, ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda at: source.read(at, 64), range(0, len(DATA), 64)))
    assert b"".join(parts) == DATA


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"missing\.gguf: cannot be opened"):
        Source(tmp_path / "missing.gguf")
    with pytest.raises(SourceError, match="is a directory"):
        Source(tmp_path)
    with pytest.raises(SourceError, match="null"):
        Source("a\0b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(SourceError, match="no regular file"):
        Source(tmp_path / "pipe.gguf")


def test_a_closed_file_says_so(file: Path) -> None:
    source = Source(file)
    source.close()
    source.close()
    with pytest.raises(SourceError, match="closed"):
        source.read(0, 1)
    with pytest.raises(SourceError, match="closed"):
        source.read_into(0, memoryview(bytearray(1)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.gguf", ["model.gguf"]),
        ("m-00001-of-00002.gguf", ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]),
        ("m-00002-of-00002.gguf", ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]),
        ("m-00001-of-00001.GGUF", ["m-00001-of-00001.GGUF"]),
        ("m-00003-of-00002.gguf", ["m-00003-of-00002.gguf"]),
        ("m-00000-of-00002.gguf", ["m-00000-of-00002.gguf"]),
        ("m-00001-of-00000.gguf", ["m-00001-of-00000.gguf"]),
        ("m-00001-of-10000.gguf", ["m-00001-of-10000.gguf"]),
        ("m-00001-OF-00002.gguf", ["m-00001-OF-00002.gguf"]),
        ("m-٠٠٠٠١-of-٠٠٠٠٢.gguf", ["m-٠٠٠٠١-of-٠٠٠٠٢.gguf"]),
        ("a\nb-00001-of-00002.gguf", ["a\nb-00001-of-00002.gguf", "a\nb-00002-of-00002.gguf"]),
    ],
)
def test_the_parts_of_a_split_set_follow_from_one_name(name: str, expected: list[str]) -> None:
    paths = shard_paths(Path("folder") / name)
    assert paths == [Path("folder") / part for part in expected]
    assert Path("folder") / name in paths

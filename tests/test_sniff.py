"""A file that is no GGUF is named for what it is."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from ggufkit import reader
from ggufkit.errors import NotGGUF
from ggufkit.sniff import identify


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", "x")
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.bin"))
    return buffer.getvalue()


_SAFETENSORS = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'

FOREIGN = [
    (b"", "empty file"),
    (b"\n", "text"),
    (b"<!DOCTYPE html><html><head><title>Sign in</title>", "HTML page"),
    (b"\n\n  <html lang='en'>", "HTML page"),
    (b"\xef\xbb\xbf<html>", "HTML page"),
    (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML document"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "Git LFS pointer"),
    (b'{"error":"Repository not found"}', "JSON"),
    (b"Not Found", "text file"),
    (len(_SAFETENSORS).to_bytes(8, "little") + _SAFETENSORS + bytes(4), "safetensors"),
    (_zip(), "zip archive"),
    (_tar(), "tar archive"),
    (b"\x1f\x8b\x08\x00" + bytes(20), "gzip"),
    (b"lmgg" + bytes(60), "GGML"),
    (b"fmgg" + bytes(60), "GGMF"),
    (b"tjgg" + bytes(60), "GGJT"),
    (b"FUGG" + bytes(60), "magic bytes reversed"),
    (b"\x80\x02}q\x00.", "pickle"),
    (b"\x7fELF" + bytes(60), "ELF"),
    (b"%PDF-1.7\n", "PDF"),
    (bytes(5000), "zeros"),
    (b"\x00\x01junk" + b"GGUF\x03\x00\x00\x00", "GGUF header at byte 6"),
]


@pytest.mark.parametrize(("data", "word"), FOREIGN, ids=[word for _, word in FOREIGN])
def test_foreign_files_are_named(tmp_path: Path, data: bytes, word: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(NotGGUF, match=word) as caught:
        reader.open(path)
    assert caught.value.looks_like is not None
    assert word in caught.value.looks_like


def test_bytes_of_nothing_known_are_shown() -> None:
    assert identify(b"\xde\xad\xbe\xef" * 10, 40) is None


def test_an_unknown_file_shows_its_first_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"\xde\xad\xbe\xef" * 10)
    with pytest.raises(NotGGUF, match=r"b'\\xde\\xad\\xbe\\xef'.*expected b'GGUF'") as caught:
        reader.open(path)
    assert caught.value.looks_like is None

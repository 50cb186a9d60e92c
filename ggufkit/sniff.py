"""What a file that is no GGUF really is.

A failed download or a wrong argument is the commonest "corrupt model"; naming it ends the search. The table
is tried from the top; a signature is (offset, bytes).
"""

from __future__ import annotations

#: how many first bytes `identify` wants to see
SNIFF_BYTES = 4096

_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"version https://git-lfs", "a Git LFS pointer: the weights themselves were not downloaded (git lfs pull)"),
    (0, b"lmgg", "a GGML file, the format before GGUF: convert it anew from the original model"),
    (0, b"fmgg", "a GGMF file, a format before GGUF: convert it anew from the original model"),
    (0, b"tjgg", "a GGJT file, the format before GGUF: convert it anew from the original model"),
    (0, b"algg", "a GGLA file: a LoRA adapter in a format before GGUF"),
    (0, b"FUGG", "a GGUF file with its magic bytes reversed: it was written on a machine of the other byte order"),
    (0, b"PK\x03\x04", "a zip archive (PyTorch's .pt and .bin files are zips too): unpack it, or convert it to GGUF"),
    (0, b"PK\x05\x06", "an empty zip archive"),
    (0, b"\x1f\x8b", "gzip-compressed data: decompress it first"),
    (0, b"\xfd7zXZ\x00", "xz-compressed data: decompress it first"),
    (0, b"BZh", "bzip2-compressed data: decompress it first"),
    (0, b"\x28\xb5\x2f\xfd", "zstd-compressed data: decompress it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-zip archive: unpack it first"),
    (0, b"Rar!", "a RAR archive: unpack it first"),
    (257, b"ustar", "a tar archive: unpack it first"),
    (0, b"\x7fELF", "an ELF program"),
    (0, b"MZ", "a Windows program"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras): convert it to GGUF"),
    (0, b"\x93NUMPY", "a NumPy array file"),
    (0, b"SQLite format 3", "an SQLite database"),
    (0, b"\x80\x02", "a Python pickle (an old PyTorch file): convert it to GGUF, and do not unpickle it"),
    (0, b"\x80\x04", "a Python pickle (an old PyTorch file): convert it to GGUF, and do not unpickle it"),
)

_MARKUP: tuple[tuple[bytes, str], ...] = (
    (b"<!doctype html", "an HTML page: the download gave a web page (a login or an error) instead of the file"),
    (b"<html", "an HTML page: the download gave a web page (a login or an error) instead of the file"),
    (b"<?xml", "an XML document: often a storage service's error message; open it as text"),
    (b"<error", "an XML error message: open it as text"),
)


def identify(head: bytes, size: int) -> str | None:
    """What a file with the first bytes `head` and `size` bytes in all is; None when that cannot be told."""
    if size == 0:
        return "an empty file: the download never started, or the disk was full"
    for offset, signature, name in _SIGNATURES:
        if head[offset : offset + len(signature)] == signature:
            return name
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for start, name in _MARKUP:
        if text[: len(start)].lower() == start:
            return name
    if _is_safetensors(head, size):
        return "a safetensors file: convert it to GGUF"
    if text[:1] in (b"{", b"["):
        return "JSON text: a configuration, an index or a service's answer, not the weights"
    return _by_content(head)


def _is_safetensors(head: bytes, size: int) -> bool:
    return len(head) > 9 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8


def _by_content(head: bytes) -> str | None:
    if not head.strip(b"\x00"):
        return "zeros: space that was reserved for a download which never filled it"
    at = head.find(b"GGUF")
    if at > 0:
        return f"something with a GGUF header at byte {at:,}: that many foreign bytes stand before it"
    return "a text file" if _is_text(head) else None


def _is_text(head: bytes) -> bool:
    """UTF-8 without control characters; the last character may be cut in half."""
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
    return all(byte >= 32 or byte in b"\t\r\n\f" for byte in head)

"""The reader on everything a header can hold: healthy files, hand-made bad ones, and random damage.

"Refused" means what a user sees: opening raises, or validating in the llama.cpp profile ends with a status other
than 0 and a finding that names the field. The first two tables are the cases of llama.cpp's own test of malformed
files; the others are what that test does not have.
"""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from builder import (
    ARRAY,
    File,
    array,
    boolean,
    f32,
    i32,
    model,
    nested,
    raw,
    scalar,
    split,
    string,
    u32,
    u64,
    write_split,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ggufkit import checks, reader
from ggufkit.container import ValueType
from ggufkit.errors import FormatError, GgufkitError, NewerThanTool, NotGGUF, SourceError, UsageError
from ggufkit.findings import Report, Severity

ROOT = Path(__file__).parent.parent
U64 = 2**64


class Case(NamedTuple):
    """A bad file: how it is made, the rule that must refuse it, and what the message must name."""

    name: str
    make: Callable[[], File | bytes]
    code: str
    names: str


def a_file(**header: object) -> File:
    """Two F32 tensors, one key."""
    file = File(**header)  # type: ignore[arg-type]
    file.add("general.name", "case")
    file.tensor("first", np.ones((2, 8), np.float32))
    file.tensor("second", np.ones((3, 8), np.float32))
    return file


def no_tensors(**header: object) -> File:
    return File(**header)  # type: ignore[arg-type]


def with_value(key: str | bytes, value: object) -> File:
    return File().add(key, value)


def aligned(value: object, layout: int) -> File:
    """Tensors laid out for `layout` under a header that says `value`."""
    file = File(layout=layout).add("general.alignment", value)
    file.tensor("first", np.ones(3, np.int8))
    file.tensor("second", np.ones(5, np.int8))
    return file


def one_tensor(**entry: object) -> File:
    """One tensor with some fields of its table line overridden."""
    file = File()
    tensor = file.tensor("weight", np.ones((2, 8), np.float32))
    for field, value in entry.items():
        setattr(tensor, field, value)
    return file


def every_type() -> File:
    """A pair of every type, and an array of every type."""
    file = File()
    for kind, (_, code) in {**{k: (0, c) for k, (_, c) in SCALAR_CODES.items()}}.items():
        values = [0.5, -1.5] if code in "fd" else [1, 0]
        file.add(f"one.{kind}", scalar(kind, values[0]))
        file.add(f"many.{kind}", array(kind, values))
    return file.add("one.string", "text").add("many.string", ["a", "", "ü"])


SCALAR_CODES = {
    "u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"), "i32": (5, "i"),
    "f32": (6, "f"), "bool": (7, "B"), "u64": (10, "Q"), "i64": (11, "q"), "f64": (12, "d"),
}  # fmt: skip


def cut(file: File, count: int) -> bytes:
    return file.encode()[:-count]


def two_huge_tensors() -> File:
    """Two I8 tensors whose sizes together wrap a size_t."""
    file = File()
    for name in ("first", "second"):
        file.tensor(name, b"", shape=[0x7FFF_FFFF_FFFF_FFC0], type="I8")
    return file


MUST_FAIL = [
    Case("header bad magic", lambda: no_tensors(magic=b"GGUX"), "S001", "GGUX"),
    Case("header version 0", lambda: no_tensors(version=0), "S002", "version field is 0"),
    Case("header version 1", lambda: no_tensors(version=1), "S002", "version 1"),
    Case("header version 4", lambda: no_tensors(version=4), "S003", "version 4"),
    Case("header n_tensors -1", lambda: no_tensors(n_tensors=-1), "S102", f"{U64 - 1:,} tensors"),
    Case("header n_kv -1", lambda: no_tensors(n_kv=-1), "S102", f"{U64 - 1:,} metadata pairs"),
    Case(
        "kv key size 2^64-1", lambda: no_tensors(n_kv=1).header() + b"\xff" * 8 + bytes(64), "S106", "metadata pair 0"
    ),
    Case("kv empty key", lambda: with_value("", 1), "S103", "pair 0 is empty"),
    Case("kv bad type", lambda: with_value("some.key", raw(13, bytes(8))), "S105", "'some.key' is 13"),
    Case("kv duplicate key", lambda: File().add("some.key", 1).add("some.key", 2), "S104", "'some.key'"),
    Case("kv alignment 13", lambda: with_value("general.alignment", 13), "S111", "general.alignment is 13"),
    Case(
        "kv alignment as i32", lambda: with_value("general.alignment", i32(32)), "S111", "a int32; it must be a uint32"
    ),
    Case("tensor name of 64 bytes", lambda: one_tensor(name="n" * 64), "S112", "64 bytes"),
    Case("tensor n_dims 5", lambda: one_tensor(dims=(2, 2, 2, 2, 1)), "S114", "'weight' claims 5 dimensions"),
    Case("tensor shape -1", lambda: one_tensor(dims=(8, -1)), "S114", "'weight' has the dimensions"),
    Case("tensor ne too big", lambda: one_tensor(dims=(2**33 - 4, 2**33 - 4)), "S114", "'weight' of shape"),
    Case("tensor nbytes too big", lambda: one_tensor(dims=(2**62,), type=27), "S114", f"{2**65:,} bytes"),
    Case("tensor bad type", lambda: one_tensor(type=43), "S116", "'weight' has type 43"),
    Case("tensor bad offset", lambda: one_tensor(offset=U64 - 1), "S201", "'weight'"),
    Case("tensor duplicate name", lambda: duplicate_name(), "S113", "'weight'"),
    Case("tensors, alignment 13", lambda: aligned(13, 32), "S111", "general.alignment is 13"),
    Case("tensors laid out for alignment 1", lambda: aligned(32, 1), "S202", "'second'"),
    Case("data one byte short", lambda: cut(aligned(32, 32), 1), "S206", "1 bytes before the padding"),
    Case("data, alignment 13", lambda: aligned(13, 13), "S111", "general.alignment is 13"),
    Case("data laid out for alignment 1", lambda: aligned(u32(32), 1), "S204", "'second'"),
    Case("data sizes that wrap", two_huge_tensors, "S201", "'first'"),
]

MUST_LOAD: list[tuple[str, Callable[[], File]]] = [
    ("header empty", no_tensors),
    ("kv of every type", every_type),
    ("tensor with a zero dimension", lambda: one_tensor(dims=(8, 0), data=b"")),
    ("tensors", a_file),
    ("tensors, alignment 1", lambda: aligned(1, 1)),
    ("data", lambda: a_file(tail=b"")),
    ("data, alignment 64", lambda: aligned(64, 64)),
]

#: what llama.cpp's own suite lacks
MORE_MUST_FAIL = [
    Case("one file joined to another", lambda: a_file(tail=a_file().encode()), "S207", "another GGUF header"),
    Case("overlap", lambda: with_offset("second", 32), "S203", "'second' begins at byte"),
    Case("hole", lambda: with_offset("second", 128), "S204", "64 bytes after"),
    Case("wrong order", lambda: swapped(), "S204", "'first'"),
    Case("misaligned offset", lambda: with_offset("second", 65), "S202", "'second' begins at offset 65"),
    Case("offset that wraps onto the header", lambda: with_offset("first", U64 - 32), "S201", "'first'"),
    Case("offset beyond the file", lambda: with_offset("second", 1 << 40), "S201", "'second'"),
    Case("data cut off", lambda: cut(a_file(), 100), "S201", "100 bytes too early"),
    Case("header only", lambda: a_file().header(), "S201", "2 of 2 tensors"),
    Case("cut inside the tensor table", lambda: a_file().header()[:-10], "S101", "tensor 'second'"),
    Case("cut inside a key", lambda: a_file().header()[:40], "S101", "ends inside the key of metadata pair 0"),
    Case("cut behind the counts", lambda: a_file().header()[:30], "S101", "only 6 bytes follow"),
    Case("cut inside the counts", lambda: a_file().header()[:20], "S002", "20 bytes"),
    Case("magic alone", lambda: b"GGUF", "S002", "4 bytes"),
    Case("nested array", lambda: with_value("deep", nested(array("u8", [1]))), "S109", "'deep'"),
    Case("nested 1,100 deep", lambda: with_value("deep", towers(1_100)), "S109", "deeper than 4"),
    Case("u8 array of 2^63", lambda: with_value("long", array("u8", [], count=2**63)), "S108", "'long'"),
    Case("string array of 2^40", lambda: with_value("long", array("string", [], count=2**40)), "S108", "'long'"),
    Case("string array that overruns", lambda: with_value("long", short_strings()), "S106", "string 1 of 'long'"),
    Case("cut inside an array", lambda: with_value("long", array("u8", [1, 2], count=9)).header(), "S101", "'long'"),
    Case(
        "cut inside a vocabulary",
        lambda: with_value("long", array("string", ["a" * 99, "b" * 99])).header()[:-50],
        "S101",
        "string 1 of 'long': of its 99 bytes 49",
    ),
    Case("string of 2^62", lambda: with_value("long", string("abc", length=2**62)), "S106", "'long'"),
    Case("cut inside a string", lambda: with_value("long", string("abc", length=4)).header(), "S101", "'long'"),
    Case("kv_count 2^60", lambda: no_tensors(n_kv=2**60), "S102", f"{2**60:,} metadata pairs"),
    Case("alignment 2^31", lambda: with_value("general.alignment", 2**31), "S111", f"{2**31}"),
    Case("alignment 0", lambda: with_value("general.alignment", 0), "S111", "general.alignment is 0"),
    Case("name of 65 bytes", lambda: one_tensor(name="n" * 65), "S112", "65 bytes"),
    Case("name that never ends", lambda: one_tensor(name_length=2**40), "S106", "the name of tensor 0"),
    Case("n_dims 2^31", lambda: one_tensor(n_dims=2**31), "S114", f"{2**31:,} dimensions"),
    Case("product of dims turns negative", lambda: one_tensor(dims=(2**63 - 1, 2)), "S114", "'weight'"),
    Case("product of dims turns 0", lambda: one_tensor(dims=(2**32, 2**32)), "S114", f"{2**64:,} elements"),
    Case("row that pads past 2^64", lambda: one_tensor(dims=((2**64 - 1) // 4,)), "S114", "'weight'"),
    Case("row that is no whole block", lambda: one_tensor(dims=(8, 2), type=2), "S114", "blocks of 32"),
    *(
        Case(f"removed type {number}", lambda number=number: one_tensor(type=number), "S115", f"type {number}, removed")  # type: ignore[misc]
        for number in (4, 5, 31, 32, 33, 36, 37, 38)
    ),
    Case("type of a fork", lambda: one_tensor(type=139), "S116", "type 139"),
    Case("type that is damage", lambda: one_tensor(type=0xFFFF_FFFF), "S116", "4294967295"),
    Case("empty tensor name", lambda: one_tensor(name=""), "S112", "tensor 0 has no name"),
    Case("tensor name no UTF-8", lambda: one_tensor(name=b"\xff\xfe"), "S112", "tensor 0 is not UTF-8"),
    Case("key no UTF-8", lambda: with_value(b"k\xff", 1), "S103", "pair 0 is not UTF-8"),
    Case("big-endian body, little-endian counts", lambda: mixed_order(), "S102", "metadata pairs"),
]


def duplicate_name() -> File:
    file = one_tensor()
    file.tensor("weight", np.ones((2, 8), np.float32))
    return file


def with_offset(name: str, offset: int) -> File:
    file = a_file()
    file[name].offset = offset
    return file


def swapped() -> File:
    file = a_file()
    file["first"].offset, file["second"].offset = 96, 0
    return file


def towers(depth: int) -> object:
    """An array in an array in an array …"""
    return raw(ARRAY, struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", 0, 0))


def short_strings() -> object:
    return raw(ARRAY, struct.pack("<IQ", 8, 2) + struct.pack("<Q", 1) + b"a" + struct.pack("<Q", 1 << 20) + b"b")


def mixed_order() -> bytes:
    """A big-endian version before little-endian counts."""
    data = bytearray(a_file().encode())
    data[4:8] = data[4:8][::-1]
    return bytes(data)


def written(tmp_path: Path, made: File | bytes) -> Path:
    path = tmp_path / "case.gguf"
    path.unlink(missing_ok=True)  # overwriting in place is slow on some file systems, which matters thousands of times
    path.write_bytes(made if isinstance(made, bytes) else made.encode())
    return path


def validated(tmp_path: Path, made: File | bytes, **options: object) -> Report:
    return checks.run(written(tmp_path, made), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", MUST_FAIL + MORE_MUST_FAIL, ids=lambda case: case.name)
def test_a_bad_file_is_refused_and_the_field_named(tmp_path: Path, case: Case) -> None:
    report = validated(tmp_path, case.make())
    messages = [finding.message for finding in report.findings if finding.code == case.code]
    assert messages, report.findings
    assert any(case.names in message for message in messages), messages
    assert report.exit_code() != 0


def test_the_suite_has_all_33_cases() -> None:
    assert (len(MUST_FAIL), len(MUST_LOAD)) == (26, 7)


@pytest.mark.parametrize(("name", "make"), MUST_LOAD, ids=[name for name, _ in MUST_LOAD])
def test_a_good_file_loads_without_an_error(tmp_path: Path, name: str, make: Callable[[], File]) -> None:
    report = validated(tmp_path, make())
    assert [finding for finding in report.findings if finding.severity is Severity.ERROR] == []
    assert report.exit_code() == 0
    with reader.open(written(tmp_path, make())) as gguf:
        assert gguf.problems == []


#: odd, but loadable: (name, file, code, severity in llama.cpp, severity in spec; None for no finding)
ODD: list[tuple[str, Callable[[], File | bytes], str, str | None, str | None]] = [
    ("bool 7", lambda: with_value("flag", boolean(7)), "S110", "warning", "error"),
    ("string no UTF-8", lambda: with_value("text", b"\xff"), "S107", "warning", "error"),
    ("alignment 4", lambda: aligned(4, 4), "S111", "warning", "error"),
    ("alignment 8", lambda: aligned(8, 8), "S111", None, None),
    ("nested array", lambda: with_value("deep", nested(array("u8", [1]))), "S109", "error", "info"),
    ("name of 64 bytes", lambda: one_tensor(name="n" * 64), "S112", "error", None),
    ("hole", lambda: with_offset("second", 128), "S204", "error", "info"),
    ("trailing bytes", lambda: a_file(tail=b"x" * 40), "S207", "warning", "warning"),
    ("trailing zeros", lambda: a_file(tail=bytes(4096)), "S207", "info", "info"),
    ("padding of ones", lambda: aligned_with_pad(b"\1"), "S205", "warning", "error"),
    ("big-endian", lambda: a_file(big=True), "S117", "warning", "info"),
    ("zero dimension", lambda: one_tensor(dims=(8, 0), data=b""), "S208", "info", "info"),
    ("last padding missing", lambda: cut(aligned(32, 32), 27), "S206", "error", "warning"),
]


def aligned_with_pad(pad: bytes) -> File:
    file = aligned(32, 32)
    file.pad = pad
    return file


@pytest.mark.parametrize(("name", "make", "code", "llama", "spec"), ODD, ids=[row[0] for row in ODD])
def test_the_profiles_disagree_where_the_parsers_do(
    tmp_path: Path, name: str, make: Callable[[], File | bytes], code: str, llama: str | None, spec: str | None
) -> None:
    for profile, expected in (("llama.cpp", llama), ("spec", spec)):
        report = validated(tmp_path, make(), profile=profile)
        found = [str(finding.severity) for finding in report.findings if finding.code == code]
        assert set(found) == ({expected} if expected else set())


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("big", [False, True])
def test_every_type_is_read_back(tmp_path: Path, big: bool) -> None:
    file = every_type()
    file.big = big
    with reader.open(written(tmp_path, file)) as gguf:
        assert gguf.byteorder == ("big" if big else "little")
        assert gguf.metadata["one.string"] == "text"
        assert gguf.metadata["many.string"] == ["a", "", "ü"]
        assert gguf.metadata["one.f64"] == 0.5
        assert gguf.metadata["one.bool"] is True
        assert gguf.metadata["many.bool"].tolist() == [True, False]
        assert gguf.metadata["many.f32"].tolist() == [0.5, -1.5]
        assert gguf.metadata["many.i16"].dtype == np.int16
        assert gguf.fields["many.u64"].type_name == "uint64[2]"


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("version", [2, 3])
def test_tensors_are_read_back_in_numpys_order(tmp_path: Path, big: bool, version: int) -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    file = File(big=big, version=version)
    file.tensor("before", np.ones(3, np.int8))
    file.tensor("w", values)
    with reader.open(written(tmp_path, file)) as gguf:
        tensor = gguf.tensors["w"]
        assert (tensor.shape, tensor.dims) == ((2, 3, 4), (4, 3, 2))
        assert (tensor.n_rows, tensor.n_elements, tensor.nbytes) == (6, 24, 96)
        assert tensor.offset == file.data_offset("w")
        read = gguf.read(tensor).view(">f4" if big else "<f4").reshape(tensor.shape)
        np.testing.assert_array_equal(read, values)
        np.testing.assert_array_equal(gguf.read(tensor, 16, 8), gguf.read(tensor)[16:24])


def test_nested_arrays_become_lists(tmp_path: Path) -> None:
    value = nested(array("i32", [1, 2]), array("string", ["a"]), nested(array("u8", [])))
    with reader.open(written(tmp_path, with_value("deep", value))) as gguf:
        first, second, third = gguf.metadata["deep"]
        assert (first.tolist(), second, [inner.tolist() for inner in third]) == ([1, 2], ["a"], [[]])


def test_bytes_that_are_no_utf8_survive(tmp_path: Path) -> None:
    file = File().add("text", b"a\xffb").add("tokens", array("string", [b"\xf0\x9f", b"ok"]))
    with reader.open(written(tmp_path, file)) as gguf:
        assert gguf.metadata["text"].encode("utf-8", "surrogateescape") == b"a\xffb"
        assert gguf.metadata["tokens"][0].encode("utf-8", "surrogateescape") == b"\xf0\x9f"


def test_a_nul_neither_ends_a_key_nor_a_name(tmp_path: Path) -> None:
    file = File().add("key\0one", 1).add("key\0two", 2)
    file.tensor("w\0a", np.ones(1, np.float32))
    file.tensor("w\0b", np.ones(1, np.float32))
    with reader.open(written(tmp_path, file)) as gguf:
        assert list(gguf.metadata) == ["key\0one", "key\0two"]
        assert list(gguf.tensors) == ["w\0a", "w\0b"]
        assert gguf.problems == []


def test_reading_outside_a_tensor_is_refused(tmp_path: Path) -> None:
    with reader.open(written(tmp_path, a_file())) as gguf:
        tensor = gguf.tensors["first"]
        for start, count in ((-1, 4), (0, 65), (64, 1)):
            with pytest.raises(UsageError, match="do not exist"):
                gguf.read(tensor, start, count)
        with pytest.raises(UsageError, match="no tensor named 'third'"):
            gguf.tensor("third")


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: cut(a_file(), 100), FormatError, "leaves the file"),
        (lambda: one_tensor(type=77), NewerThanTool, "unknown type 77"),
        (lambda: one_tensor(dims=(2**63 - 1, 2)), FormatError, "cannot exist"),
        (lambda: one_tensor(type=4), FormatError, "cannot exist"),
        (lambda: one_tensor(type=2**31), FormatError, "cannot exist"),
        (lambda: one_tensor(dims=(8, 2**50)), FormatError, "leaves the file"),
        (lambda: with_offset("second", U64 - 32), FormatError, "leaves the file"),
    ],
)
def test_reading_what_is_not_there_says_why(
    tmp_path: Path, make: Callable[[], File | bytes], error: type[GgufkitError], words: str
) -> None:
    with reader.open(written(tmp_path, make())) as gguf, pytest.raises(error, match=words):
        gguf.read(gguf.tensors[next(reversed(gguf.tensors))])


def test_a_file_that_shrank_after_it_was_opened_says_so(tmp_path: Path) -> None:
    path = written(tmp_path, a_file().add("text", "abc"))
    with reader.open(path) as gguf:
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(FormatError, match="ends inside a metadata value"):
            gguf.metadata["text"]
        with pytest.raises(FormatError, match="leaves the file"):
            gguf.read(gguf.tensors["second"])


def test_after_a_stop_the_rest_is_still_there(tmp_path: Path) -> None:
    """What was read before a fatal problem is kept: keys, tensors, and the problem with its place."""
    file = a_file().header()[:-10]
    with reader.open(written(tmp_path, file)) as gguf:
        assert gguf.metadata["general.name"] == "case"
        assert list(gguf.tensors) == ["first"]
        assert not gguf.complete
        assert [(problem.kind, problem.fatal) for problem in gguf.problems] == [("header-truncated", True)]
        with pytest.raises(FormatError, match="breaks off"):
            gguf.read(gguf.tensors["first"])


def test_all_problems_are_gathered(tmp_path: Path) -> None:
    file = File().add("", 1).add("flag", boolean(9)).add("twice", 1).add("twice", 2)
    file.tensor("w", b"", shape=[1], type=4)
    with reader.open(written(tmp_path, file)) as gguf:
        kinds = [problem.kind for problem in gguf.problems]
    assert kinds == ["key-empty", "bool-value", "key-duplicate", "type-removed"]
    assert set(kinds) <= set(reader.PROBLEMS)


def test_endless_problems_end(tmp_path: Path) -> None:
    file = File()
    for _ in range(20):
        file.add("", 1)
    with reader.open(written(tmp_path, file), limits=reader.Limits(problems=5)) as gguf:
        assert [problem.kind for problem in gguf.problems] == [
            *["key-empty", "key-empty", "key-duplicate", "key-empty", "key-duplicate"],
            "header-hopeless",
        ]


@pytest.mark.parametrize(
    ("limits", "kind"),
    [
        (reader.Limits(kv_pairs=0), "kv-count"),
        (reader.Limits(tensors=1), "tensor-count"),
        (reader.Limits(string=3), "string-too-long"),
        (reader.Limits(header=40), "header-too-long"),
        (reader.Limits(key=4), "key-too-long"),
    ],
)
def test_limits_hold(tmp_path: Path, limits: reader.Limits, kind: str) -> None:
    with reader.open(written(tmp_path, a_file()), limits=limits) as gguf:
        assert gguf.problems[0].kind == kind


def test_long_strings_cross_the_readers_window(tmp_path: Path) -> None:
    """Vocabularies larger than what is read at once, with strings that straddle its border."""
    tokens = ["x" * (number % 3000) for number in range(2000)]
    file = File().add("before", 1).add("tokens", array("string", tokens)).add("after", "end")
    with reader.open(written(tmp_path, file)) as gguf:
        assert gguf.metadata["tokens"] == tokens
        assert gguf.metadata["after"] == "end"
        assert gguf.problems == []


def test_many_keys_and_tensors_are_read(tmp_path: Path) -> None:
    """Inputs that a quadratic search for duplicates would take minutes for."""
    file = File()
    for number in range(20_000):
        file.kv.append((f"key.{number}", u32(number)))
        file.tensor(f"tensor.{number}", b"", shape=[0], type="F32")
    with reader.open(written(tmp_path, file)) as gguf:
        assert (len(gguf.metadata), len(gguf.tensors), gguf.problems) == (20_000, 20_000, [])


# -- split sets ------------------------------------------------------------------------------------------------------

NAMES = [entry.name for entry in model().tensors]
PARTS = ([], NAMES[:5], NAMES[5:])  # the first part of a set may hold no tensors


def test_a_split_set_opens_by_any_of_its_parts(tmp_path: Path) -> None:
    paths = write_split(model(), tmp_path, PARTS)
    for path in paths:
        with reader.open(path) as gguf:
            assert list(gguf.tensors) == NAMES
            assert gguf.architecture == "qwen2"
            assert gguf.size == sum(part.stat().st_size for part in paths)
            tensor = gguf.tensors[NAMES[7]]
            assert tensor.shard == 2
            np.testing.assert_array_equal(gguf.read(tensor), np.frombuffer(model()[NAMES[7]].data, np.uint8))
        assert checks.run(path, select=["S"]).findings == ()


def _split_damage(damage: Callable[[list[File]], None]) -> list[File]:
    shards = split(model(), PARTS)
    damage(shards)
    return shards


SPLIT_CASES: list[tuple[str, Callable[[list[File]], object], str, str]] = [
    ("wrong number", lambda s: s[1].set("split.no", i32(1)), "S121", "split.no of model-00002-of-00003.gguf"),
    ("same number twice", lambda s: s[2].set("split.no", i32(1)), "S121", "split.no of model-00003-of-00003.gguf"),
    ("stale count in a later part", lambda s: s[2].set("split.count", i32(5)), "S121", "split.count of model-00003"),
    ("stale total", lambda s: s[1].set("split.tensors.count", i32(99)), "S121", "99 tensors; its 3 files hold 27"),
    ("numbers missing", lambda s: s[1].drop("split.no"), "S121", "split.no of model-00002-of-00003.gguf is missing"),
    ("tensor lost", lambda s: s[2].remove(NAMES[-1]), "S121", "27 tensors; its 3 files hold 26"),
    ("tensor twice", lambda s: s[2].tensors.insert(0, s[1].tensors[0]), "S113", repr(NAMES[0])),
    ("later part is no GGUF", lambda s: setattr(s[1], "magic", b"<htm"), "S120", "part 2 of 3"),
    ("later part is empty", lambda s: s.__setitem__(1, File(magic=b"")), "S120", "part 2 of 3"),
    ("damage in a later part", lambda s: setattr(s[1].tensors[0], "offset", 1 << 40), "S201", repr(NAMES[0])),
    ("header of a later part", lambda s: setattr(s[2], "n_kv", 2**60), "S102", "model-00003-of-00003.gguf"),
]


@pytest.mark.parametrize(("name", "damage", "code", "words"), SPLIT_CASES, ids=[row[0] for row in SPLIT_CASES])
def test_damage_to_a_split_set_is_found(
    tmp_path: Path, name: str, damage: Callable[[list[File]], object], code: str, words: str
) -> None:
    shards = split(model(), PARTS)
    damage(shards)
    for number, shard in enumerate(shards):
        shard.write(tmp_path / f"model-{number + 1:05d}-of-00003.gguf")
    report = checks.run(tmp_path / "model-00001-of-00003.gguf")
    assert report.exit_code() == 1
    assert any(words in finding.message for finding in report.findings if finding.code == code), report.findings


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_part_is_named(tmp_path: Path, missing: int) -> None:
    paths = write_split(model(), tmp_path, PARTS)
    paths[missing].unlink()
    report = checks.run(paths[2 if missing < 2 else 0])
    found = [finding.message for finding in report.findings if finding.code == "S120"]
    assert len(found) == 1
    assert f"part {missing + 1} of 3" in found[0]
    assert report.exit_code() == 1
    with pytest.raises(SourceError, match="cannot be opened"):
        reader.open(paths[missing])


def test_a_part_under_a_foreign_name_is_told(tmp_path: Path) -> None:
    path = split(model(), PARTS)[1].write(tmp_path / "model.gguf")
    report = checks.run(path, select=["S121"])
    assert [finding.message.split(",")[0] for finding in report.findings] == ["the file is part 2 of 3 of a split set"]


def test_a_merged_set_is_healthy(tmp_path: Path) -> None:
    merged = model().add("split.no", i32(0)).add("split.count", i32(0)).add("split.tensors.count", i32(27))
    assert validated(tmp_path, merged, select=["S"]).findings == ()


# -- hostile files ---------------------------------------------------------------------------------------------------

_CHILD = """
import json, resource, sys, time
from ggufkit import checks
from ggufkit.reader import open as warm
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
results = []
for path in sys.argv[1:]:
    start = time.monotonic()
    report = checks.run(path)
    results.append((report.exit_code(), time.monotonic() - start))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"results": results, "grown_kb": grown}))
"""


def _hostile() -> dict[str, File | bytes]:
    return {
        "u8 array of 2^63": with_value("a", array("u8", [], count=2**63)),
        "u64 array of 2^60": with_value("a", array("u64", [], count=2**60)),
        "string array of 2^61": with_value("a", array("string", [], count=2**61)),
        "nested count of 2^60": with_value("a", nested(count=2**60)),
        "arrays of empty arrays": with_value("a", nested(*[nested()] * 4000)),
        "nested 4,000 deep": with_value("a", towers(4_000)),
        "n_kv 2^63": no_tensors(n_kv=2**63, tail=bytes(60_000)),
        "n_tensors 2^63": no_tensors(n_tensors=2**63, tail=bytes(60_000)),
        "as many empty keys as fit": no_tensors(n_kv=60_000 // 13, tail=bytes(60_000)),
        "as many empty names as fit": no_tensors(n_tensors=60_000 // 24, tail=bytes(60_000)),
        "huge tensors": two_huge_tensors(),
        "zero rows of 2^62": one_tensor(dims=(2**62, 0)),
        "alignment 2^30": with_value("general.alignment", 2**30),
        "string of 2^40": with_value("a", string("", length=2**40)),
        "huge name": one_tensor(name="n" * 60_000),
        "dims of ones": one_tensor(n_dims=0xFFFF_FFFF),
        "huge vocabulary rows": with_rows(2**40),
        "blocks of nowhere": many_blocks(),
        "tensors on one another": piled_up(1_500),
        "equal tokens": with_value("tokenizer.ggml.tokens", ["a"] * 6_000),
    }


def with_rows(rows: int) -> File:
    file = model()
    file["token_embd.weight"].dims = (64, rows)
    file.tensors = file.tensors[:1]
    file["token_embd.weight"].data = b""
    return file


def piled_up(count: int) -> bytes:
    """Tensors of 64 kB each that all lie on the same bytes."""
    header = b"GGUF" + struct.pack("<IQQ", 3, count, 0)
    table = (
        struct.pack("<Q", 9) + b"t.%07d" % number + struct.pack("<IQIQ", 1, 1 << 14, 0, 0) for number in range(count)
    )
    return header + b"".join(table) + bytes(1 << 17)


def many_blocks() -> File:
    file = model().set("qwen2.block_count", 512)
    file.tensors = []
    file.tensor("token_embd.weight", b"", shape=[2**31, 64], type="F32")
    return file


@pytest.mark.skipif(sys.platform != "linux", reason="measures with /proc and RLIMIT_AS")
def test_hostile_files_cost_neither_memory_nor_time(tmp_path: Path) -> None:
    paths = []
    for number, made in enumerate(_hostile().values()):
        paths.append(tmp_path / f"{number}.gguf")
        paths[-1].write_bytes(made if isinstance(made, bytes) else made.encode())
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, *map(str, paths)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr
    outcome = json.loads(child.stdout)
    assert outcome["grown_kb"] < 32 * 1024
    for name, (_, seconds) in zip(_hostile(), outcome["results"], strict=True):
        assert seconds < 10, name


def test_many_tensors_on_one_place_are_told_in_time(tmp_path: Path) -> None:
    """Where each is held against all others, or each is read, this takes minutes."""
    report = validated(tmp_path, piled_up(20_000))
    assert report.exit_code() == 1
    assert report.tensors_checked < 100
    assert {"S203", "S204"} <= {finding.code for finding in report.findings}


# -- random damage ---------------------------------------------------------------------------------------------------

_SMALL = (
    File()
    .add("general.architecture", "qwen2")
    .add("general.alignment", 32)
    .add("tokens", array("string", ["a", "bc", ""]))
    .add("deep", nested(array("u8", [1, 2]), nested(array("string", ["x"]))))
    .add("floats", array("f32", [0.5]))
    .add("big", u64(2**40))
    .add("eps", f32(1e-6))
    .add("flag", True)
)
_SMALL.tensor("token_embd.weight", np.ones((4, 32), np.float32))
_SMALL.tensor("blk.0.attn_q.weight", bytes(34), shape=[1, 32], type="Q8_0")
SMALL = _SMALL.encode()

_mutations = st.lists(
    st.one_of(
        st.tuples(st.just("byte"), st.integers(0, len(SMALL) - 1), st.integers(0, 255)),
        st.tuples(st.just("u32"), st.integers(0, len(SMALL) - 4), st.sampled_from([0, 1, 9, 31, 2**31, 2**32 - 1])),
        st.tuples(st.just("u64"), st.integers(0, len(SMALL) - 8), st.sampled_from([0, 2**31, 2**62, 2**63, U64 - 1])),
        st.tuples(st.just("cut"), st.integers(0, len(SMALL)), st.just(0)),
        st.tuples(st.just("insert"), st.integers(0, len(SMALL)), st.integers(0, 255)),
    ),
    min_size=1,
    max_size=4,
)


def mutated(mutations: list[tuple[str, int, int]]) -> bytes:
    data = bytearray(SMALL)
    for kind, at, value in mutations:
        match kind:
            case "byte":
                data[at : at + 1] = bytes([value])
            case "u32":
                data[at : at + 4] = struct.pack("<I", value)
            case "u64":
                data[at : at + 8] = struct.pack("<Q", value)
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = bytes([value])
    return bytes(data)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_mutations)
@example([("cut", 0, 0)])
@example([("u64", 8, 2**62)])
def test_only_our_errors_leave_a_damaged_file(tmp_path: Path, mutations: list[tuple[str, int, int]]) -> None:
    read_everything(written(tmp_path, mutated(mutations)))


def read_everything(path: Path) -> None:
    """Open, decode all metadata and read all tensors; GgufkitError is what may come of it."""
    with suppress(GgufkitError), reader.open(path) as gguf:
        for key in gguf.metadata:
            with suppress(GgufkitError):
                gguf.metadata[key]
        for tensor in gguf.tensors.values():
            with suppress(GgufkitError):
                gguf.read(tensor)


def test_only_our_errors_leave_thousands_of_damaged_files(tmp_path: Path) -> None:
    """The same with single changes drawn by a seeded generator, which is quicker than drawing them well."""
    rng = random.Random(7)
    for _ in range(4000):
        at = rng.randrange(len(SMALL) - 8)
        value = rng.choice([0, 1, 9, 255, 2**31, 2**32 - 1, 2**62, 2**63, U64 - 1, rng.getrandbits(64)])
        kind = rng.choice(["byte", "u32", "u64", "insert", "cut"])
        read_everything(written(tmp_path, mutated([(kind, at, value % {"u64": U64, "u32": 2**32}.get(kind, 256))])))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_mutations)
def test_validating_a_damaged_file_gives_a_report(tmp_path: Path, mutations: list[tuple[str, int, int]]) -> None:
    """No rule fails, whatever the file: `the rule itself failed` would be a bug of ours."""
    report = checks.run(written(tmp_path, mutated(mutations)))
    assert [skip for skip in report.skipped if "itself failed" in skip.why] == []
    assert report.exit_code() in (0, 1, 3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text("abc._", min_size=1, max_size=20),
        st.one_of(
            st.integers(-(2**31), 2**32 - 1),
            st.floats(width=32, allow_nan=False),
            st.booleans(),
            st.text(),
            st.lists(st.text(), min_size=1),
            st.lists(st.floats(width=32, allow_nan=False), min_size=1),
        ),
        max_size=8,
    ),
    st.booleans(),
)
def test_what_is_written_is_read(tmp_path: Path, metadata: dict[str, object], big: bool) -> None:
    file = File(big=big)
    for key, value in metadata.items():
        file.add(key, value)
    with reader.open(written(tmp_path, file)) as gguf:
        read = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in gguf.metadata.items()}
    assert read == {key: value for key, value in metadata.items() if key != "general.alignment"}


def test_a_value_type_is_named_as_in_the_specification() -> None:
    assert [(type_.name.lower(), int(type_)) for type_ in ValueType][6:10] == [
        *[("float32", 6), ("bool", 7), ("string", 8), ("array", 9)]
    ]


def test_other_files_are_not_gguf(tmp_path: Path) -> None:
    with pytest.raises(NotGGUF):
        reader.open(written(tmp_path, b"GGU"))

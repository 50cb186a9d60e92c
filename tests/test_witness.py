"""llama.cpp and transformers, engines of other people, compute what ours does: every step, at once and one by one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_model
from typer.testing import CliRunner

from ggufkit import demo, diagnosis, reader, witness
from ggufkit.cli import app
from ggufkit.compare import Comparison, compare
from ggufkit.errors import Unsupported, UsageError
from ggufkit.runtime import load
from ggufkit.runtime.engine import Edit
from ggufkit.runtime.record import Plan, record, write
from ggufkit.steps import Watch

IDS = [5, 9, 11, 20, 3, 100, 7, 8, 99, 64, 5, 9, 11]
PACKAGES = {"llama.cpp": "llama_cpp", "transformers": "transformers"}
#: largest relative error of a step against the reference: of int8 activations, and of float32 in another order
NOISE = {"llama.cpp": 0.3, "transformers": 1e-4}


def _installed(name: str) -> bool:
    return importlib.util.find_spec(PACKAGES[name]) is not None


def _needs(name: str) -> tuple[pytest.MarkDecorator, ...]:
    reason = f"needs {PACKAGES[name]}: pip install 'ggufkit[{witness.WITNESSES[name].extra}]'"
    return pytest.mark.oracle, pytest.mark.skipif(not _installed(name), reason=reason)


BOTH = [pytest.param(name, marks=_needs(name)) for name in PACKAGES]
LLAMA_CPP, TRANSFORMERS = BOTH


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_a_missing_package_is_said_with_the_extra_that_brings_it(name, monkeypatch):
    real = witness.import_module

    def refuse(module: str):
        if module.startswith("ggufkit.witness."):
            raise ModuleNotFoundError("No module named it", name=PACKAGES[name])
        return real(module)

    monkeypatch.setattr(witness, "import_module", refuse)
    with reader.open(demo.MODEL) as gguf, pytest.raises(Unsupported, match=PACKAGES[name]) as error:
        witness.load(name, gguf)
    assert witness.WITNESSES[name].extra in str(error.value.help)
    assert error.value.exit_code == 3


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_the_command_ends_with_3_and_writes_nothing_without_it(name, monkeypatch, tmp_path):
    def refuse(module: str):
        raise ModuleNotFoundError("No module named it", name=PACKAGES[name])

    monkeypatch.setattr(witness, "import_module", refuse)
    out = tmp_path / "theirs.safetensors"
    done = CliRunner().invoke(app, ["trace", str(demo.MODEL), "--tokens", "1,2", "--engine", name, "-o", str(out)])
    assert done.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def against_reference(name: str, path: Path, ids: list[int], *, decode: bool, dtype: str | None = None) -> Comparison:
    with reader.open(path) as gguf:
        plan = Plan(ids, decode=decode)
        return compare(record(witness.load(name, gguf, dtype), plan), record(load(gguf, "reference"), plan))


def worst(comparison: Comparison) -> tuple[str, float]:
    return max(((row.name, row.error) for row in comparison.rows), key=lambda row: row[1])


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("name", BOTH)
class TestEveryStep:
    def test_of_the_demo_model(self, name, decode):
        found = against_reference(name, demo.MODEL, IDS, decode=decode)
        assert (found.agree, found.only_a, found.only_b) == (True, (), ())
        assert worst(found)[1] < NOISE[name], worst(found)

    @pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
    def test_of_a_float_model_without_noise(self, name, decode, arch, tmp_path):
        path = tiny_model(tmp_path / "float.gguf", type="F32", arch=arch)
        dtype = "float32"  # of llama.cpp's cache; float16 is its default
        found = against_reference(name, path, IDS, decode=decode, dtype=dtype)
        assert found.agree
        assert found.only_b == ()
        assert worst(found)[1] < 1e-4, worst(found)


@pytest.mark.parametrize("name", BOTH)
class TestAsAnEngine:
    def test_the_logits_are_those_of_the_last_position_or_of_all(self, name):
        with reader.open(demo.MODEL) as gguf:
            engine = witness.load(name, gguf)
            every = engine.forward(IDS, engine.new_cache(32), logits="all")
            last = engine.forward(IDS, engine.new_cache(32))
        assert every.shape == (len(IDS), engine.config.n_vocab)
        np.testing.assert_allclose(last, every[-1:], atol=1e-4)

    def test_with_the_last_logits_alone_the_last_steps_have_one_row(self, name):
        rows: dict[str, int] = {}
        with reader.open(demo.MODEL) as gguf:
            engine = witness.load(name, gguf)
            tap = Watch(lambda step, layer, array: rows.update({step: len(array)}))
            engine.forward(IDS, engine.new_cache(32), tap=tap)
        assert {step: n for step, n in rows.items() if n != len(IDS)} == {"result_norm": 1, "result_output": 1}

    def test_the_cache_can_be_cut_and_continued(self, name):
        with reader.open(demo.MODEL) as gguf:
            engine = witness.load(name, gguf)
            cache = engine.new_cache(32)
            engine.forward(IDS, cache)
            cache.truncate(6)
            again = engine.forward(IDS[6:], cache)
            whole = engine.forward(IDS, engine.new_cache(32))
            cache.truncate(0)
            fresh = engine.forward(IDS, cache)
        assert cache.length == len(IDS)
        np.testing.assert_allclose(again, whole, atol=0.5 if name == "llama.cpp" else 1e-3)
        np.testing.assert_allclose(fresh, whole, atol=1e-3)

    def test_an_error_in_a_tap_comes_back(self, name):
        def fail(*_: object) -> None:
            raise ZeroDivisionError

        with reader.open(demo.MODEL) as gguf:
            engine = witness.load(name, gguf)
            with pytest.raises(ZeroDivisionError):
                engine.forward(IDS, engine.new_cache(32), tap=Watch(fail, frozenset({"kq"})))

    def test_what_it_cannot_do_is_refused(self, name):
        with reader.open(demo.MODEL) as gguf:
            engine = witness.load(name, gguf)
            with pytest.raises(Unsupported):
                engine.patched([Edit("output_norm.weight", 0, b"\0\0\0\0")])
            with pytest.raises(UsageError):
                engine.new_cache(8).truncate(1)
            with pytest.raises(UsageError, match="float"):
                witness.load(name, gguf, "float64")

    def test_diagnose_finds_nothing_wrong_with_it(self, name, tmp_path):
        with reader.open(demo.MODEL) as gguf:
            for decode in (False, True):
                write(tmp_path / "theirs.safetensors", witness.load(name, gguf), Plan(IDS, decode=decode))
                found = diagnosis.diagnose(gguf, tmp_path / "theirs.safetensors")
                assert found.exit_code == 0
                assert found.numbers.faults == ()


@pytest.mark.parametrize("name", [LLAMA_CPP])
class TestLlamaCpp:
    def test_a_struct_of_another_layout_is_refused_with_its_reason(self, name, monkeypatch):
        with reader.open(demo.MODEL) as gguf:
            engine = witness.load(name, gguf)
            monkeypatch.setattr(engine.ggml, "name", lambda pointer: pointer + 8)
            with pytest.raises(Unsupported, match=r"not understood.*name"):
                engine.forward(IDS, engine.new_cache(32), tap=Watch(lambda *_: None))

    def test_a_file_that_it_refuses_is_said(self, name, tmp_path):
        path = tmp_path / "demo.gguf"
        path.write_bytes(demo.MODEL.read_bytes())
        with reader.open(path) as gguf:
            path.unlink()  # it stays open
            path.write_bytes(b"something else")
            with pytest.raises(Unsupported, match=r"llama\.cpp refuses"):
                witness.load(name, gguf)


@pytest.mark.real_model
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("name", BOTH)
def test_the_real_model_agrees_at_every_step_and_is_diagnosed_healthy(name, decode, real_model, tmp_path):
    ids = [151644, 872, 198, 7985, 264, 6386, 38242, 911, 41578, 10901, 13, 151645]
    theirs = tmp_path / "theirs.safetensors"
    with reader.open(real_model) as gguf:
        plan = Plan(ids, decode=decode)
        write(theirs, witness.load(name, gguf), plan)
        ours = record(load(gguf, "reference"), plan)
        found = compare(diagnosis.foreign.load(theirs), ours)
        assert found.agree, found.first
        assert len(found.rows) == len(ours.arrays) == 483
        answer = diagnosis.diagnose(gguf, theirs)
    assert answer.exit_code == 0, answer.numbers

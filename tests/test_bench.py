"""What bench measures and what it counts; how fast anything is, no test asserts."""

from __future__ import annotations

import io

import pytest
from tiny_models import tiny_model

from ggufkit import reader
from ggufkit.errors import UsageError
from ggufkit.report.text import bench as text
from ggufkit.report.text.style import console
from ggufkit.runtime.bench import Measured, benchmark, weights_per_token
from ggufkit.runtime.reference import ReferenceEngine


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def gguf(request, tmp_path_factory):
    return reader.open(tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf", type="Q8_0", tied=request.param))


def test_every_asked_length_is_measured_as_often_as_asked(gguf):
    seen = []
    found = benchmark(
        ReferenceEngine(gguf), gguf, pp=(3, 7), tg=(2,), repeats=3, progress=lambda *done: seen.append(done)
    )
    assert [(test.name, test.n_tokens, len(test.rates)) for test in found.tests] == [
        ("pp3", 3, 3),
        ("pp7", 7, 3),
        ("tg2", 2, 3),
    ]
    assert all(rate > 0 for test in found.tests for rate in test.rates)
    assert seen[0] == ("pp3", 0, 4)
    assert found.first_token_seconds > 0


def test_a_token_needs_every_weight_but_the_embedding_table(gguf):
    engine = ReferenceEngine(gguf)
    table = gguf.tensors["token_embd.weight"]
    everything = sum(tensor.nbytes for tensor in gguf.tensors.values())
    row = table.nbytes // table.n_rows
    expected = everything if engine.config.tied else everything - table.nbytes + row
    assert weights_per_token(gguf, engine) == expected


def test_mean_and_deviation_are_those_of_the_repeats():
    assert (Measured("pp1", 1, (1.0, 2.0, 3.0)).mean, Measured("pp1", 1, (1.0, 2.0, 3.0)).std) == (2.0, 1.0)
    assert Measured("pp1", 1, (5.0,)).std == 0.0


@pytest.mark.parametrize("asked", [{"pp": (0,)}, {"tg": (100_000_000,)}, {"repeats": 0}])
def test_what_cannot_be_measured_is_refused(gguf, asked):
    with pytest.raises(UsageError):
        benchmark(ReferenceEngine(gguf), gguf, **asked)


class Copying(ReferenceEngine):
    def copy_rate(self):
        return 2e9


def test_an_engine_that_can_says_how_fast_its_memory_is(gguf):
    assert benchmark(ReferenceEngine(gguf), gguf, pp=(), tg=(1,), repeats=1).copy_rate is None
    found = benchmark(Copying(gguf), gguf, pp=(), tg=(1,), repeats=1)
    assert found.copy_rate == 2e9
    written = io.StringIO()
    text.report(console(written), "m.gguf", found)
    assert "2.0 GB/s, read and written (100%)" in written.getvalue()
    assert f"({found.tests[0].weight_rate / 2e9:.0%})" in written.getvalue()


class Following(ReferenceEngine):
    """Chooses the tokens that it says itself."""

    def forward(self, ids, cache, **wanted):
        assert cache.n_ctx == 1, "only the first token is timed this way"
        return super().forward(ids, cache, **wanted)

    def follow(self, token, cache, n, sampler):
        for _ in range(n):
            choice = sampler(super().forward([token], cache)[0])
            token = choice.id
            yield choice


def test_an_engine_that_says_many_tokens_is_measured_saying_them(gguf):
    found = benchmark(Following(gguf), gguf, pp=(), tg=(3,), repeats=2)
    assert found.tests[0].rates[0] > 0

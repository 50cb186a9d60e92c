"""The key/value cache of the NumPy engines."""

from __future__ import annotations

import pytest
from tiny_models import tiny_model

from ggufkit import reader
from ggufkit.errors import UsageError
from ggufkit.runtime.cache import ArrayCache
from ggufkit.runtime.reference import ReferenceEngine


@pytest.fixture
def gguf(tmp_path):
    with reader.open(tiny_model(tmp_path / "m.gguf")) as opened:
        yield opened


@pytest.mark.parametrize("n_ctx", [0, -1])
def test_a_cache_holds_something(gguf, n_ctx):
    with pytest.raises(UsageError, match="holds nothing"):
        ReferenceEngine(gguf).new_cache(n_ctx)


@pytest.mark.parametrize("length", [-1, 5])
def test_a_cache_cannot_be_cut_to_what_it_lacks(gguf, length):
    cache = ReferenceEngine(gguf).new_cache(8)
    cache.length = 4
    with pytest.raises(UsageError, match="cannot be cut"):
        cache.truncate(length)


def test_a_cache_too_large_for_any_machine_says_its_size(gguf):
    config = ReferenceEngine(gguf).config
    with pytest.raises(UsageError, match=r"take [\d,]+\.\d GB"):
        ArrayCache(config, 1 << 50)

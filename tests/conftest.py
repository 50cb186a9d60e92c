"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import real_model as models


def _fetched(model: models.Model) -> Path:
    try:
        return models.path(model)
    except models.Unavailable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def real_model() -> Path:
    """qwen2.5-coder-0.5b-instruct-q4_k_m.gguf; mark the test `real_model`."""
    return _fetched(models.QWEN)


@pytest.fixture(scope="session")
def smol_model() -> Path:
    """SmolLM2-135M-Instruct.Q4_1.gguf, a llama architecture; mark the test `real_model`."""
    return _fetched(models.SMOL)

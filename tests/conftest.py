"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import real_model as models


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Plain `pytest` is quick and offline: real models are for those who name one or ask with `-m real_model`."""
    if os.environ.get(models.QWEN.variable) or "real_model" in config.option.markexpr:
        return
    reason = f"needs a real model: pytest -m real_model fetches it (491 MB), {models.QWEN.variable} names a copy"
    for item in items:
        if item.get_closest_marker("real_model"):
            item.add_marker(pytest.mark.skip(reason=reason))


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

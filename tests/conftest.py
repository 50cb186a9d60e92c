"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import real_model as models

_MOST_WORKERS = 8


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs on all processors, a part of it in one process; `-n` decides otherwise.

    Real models stay in one process, since each copy takes gigabytes.
    """
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and "real_model" not in config.option.markexpr
    can = config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput")
    if whole and can and config.option.numprocesses is None and not config.option.usepdb:
        config.option.numprocesses = min(os.cpu_count() or 1, _MOST_WORKERS)
        config.option.dist = "worksteal"  # neighbours stay together: they share fixtures
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the workers' products would fight over the processors


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

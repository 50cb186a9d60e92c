"""What the machine offers, and the advice that follows."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from ggufkit import doctor
from ggufkit.doctor import Check, Driver, State
from ggufkit.errors import DeviceError


class FakeLibrary:
    """The driver's library as far as it is asked: every function returns 0, or the code that `fail` gives it."""

    def __init__(self, version: int, gpus: int, fail: dict[str, int] | None = None) -> None:
        self._version, self._gpus, self._fail = version, gpus, fail or {}

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            if name == "cuDriverGetVersion":
                args[0]._obj.value = self._version
            elif name == "cuDeviceGetCount":
                args[0]._obj.value = self._gpus
            elif name == "cuDeviceGetName":
                args[0].value = b"NVIDIA Test"
            return self._fail.get(name, 0)

        return call


def with_driver(monkeypatch: pytest.MonkeyPatch, driver: Driver | None) -> tuple[Check, ...]:
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: driver)
    return tuple(doctor._gpu())


def test_the_driver_is_asked_through_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeLibrary(13_020, 2))
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    driver = doctor.nvidia_driver()
    assert driver is not None
    assert driver.cuda == (13, 2)
    assert len(driver.gpus) == 2
    assert driver.gpus[0].startswith("NVIDIA Test (compute ")


@pytest.mark.parametrize("failing", ["cuInit", "cuDriverGetVersion", "cuDeviceGetCount"])
def test_a_driver_that_does_not_work_is_none(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeLibrary(12_040, 1, {failing: 100}))
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    assert doctor.nvidia_driver() is None


def test_no_library_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert doctor.nvidia_driver() is None


@pytest.mark.parametrize(("cuda", "extra"), [((12, 0), "cuda12"), ((12, 9), "cuda12"), ((13, 0), "cuda13")])
def test_the_extra_that_fits_the_driver(cuda: tuple[int, int], extra: str) -> None:
    assert doctor.extra_for(Driver(cuda, ("gpu",))) == extra


def test_without_a_gpu_nothing_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = with_driver(monkeypatch, None)
    assert check.state is State.ABSENT
    assert check.help is None


def test_a_gpu_without_cupy_gets_the_exact_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    *_, cupy = with_driver(monkeypatch, Driver((13, 0), ("NVIDIA Test",)))
    assert cupy.state is State.ABSENT
    assert cupy.help == "pip install 'ggufkit[cuda13]'"


def test_an_old_driver_is_to_be_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, cupy = with_driver(monkeypatch, Driver((11, 8), ("NVIDIA Test",)))
    assert "update" in (cupy.help or "")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (RuntimeError("CUDA driver version is insufficient"), "pip install 'ggufkit[cuda12]'"),
        (DeviceError("the driver is insufficient", help="update the driver"), "update the driver"),
    ],
)
def test_a_broken_installation_is_reported_not_raised(
    monkeypatch: pytest.MonkeyPatch, error: Exception, advice: str
) -> None:
    def broken() -> str:
        raise error

    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor, "_cupy", broken)
    checks = with_driver(monkeypatch, Driver((12, 4), ("NVIDIA Test",)))
    assert checks[-1].state is State.BROKEN
    assert "insufficient" in checks[-1].found
    assert checks[-1].help == advice
    assert not doctor.healthy(checks)


def test_a_missing_package_is_broken_and_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", {"no-such-package-here": "nothing"})
    check = next(iter(doctor._packages()))
    assert check.state is State.BROKEN
    assert check.help == "pip install no-such-package-here"


def test_this_machine() -> None:
    checks = doctor.examine()
    names = {check.name for check in checks}
    assert {"ggufkit", "Python", "processor", "numpy", "GPU"} <= names
    assert doctor.healthy(checks)
    assert doctor.cpu_count() >= 1


def test_memory_comes_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.memory_bytes()
    assert found is None or found[0] >= found[1] > 0


def test_memory_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "Path", lambda name: SimpleNamespace(read_text=lambda **_: {}[name]))
    monkeypatch.setattr(doctor.os, "sysconf", lambda name: {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": 4096}[name])
    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    assert doctor.memory_bytes() == (409_600, 409_600)

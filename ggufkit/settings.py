"""Settings of a project: `[tool.ggufkit]` in pyproject.toml, or ggufkit.toml; the command line goes before them.

[tool.ggufkit]
ignore = ["M108"]
profile = "llama.cpp"
min-severity = "warning"
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ggufkit.errors import UsageError
from ggufkit.findings import Severity

_PROFILES = ("llama.cpp", "spec")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a project has settled; None or empty where it says nothing."""

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    profile: Literal["llama.cpp", "spec"] | None = None
    min_severity: Severity | None = None


def find(folder: Path) -> Settings:
    """The settings of the nearest ggufkit.toml or pyproject.toml with a [tool.ggufkit], from `folder` upwards.

    Raises:
        UsageError: such a file is no TOML, or holds a setting that does not exist.
    """
    for place in (folder, *folder.parents):
        for name in ("ggufkit.toml", "pyproject.toml"):
            path = place / name
            if path.is_file() and (table := _table(path)) is not None:
                return _settings(table, str(path))
    return Settings()


def _table(path: Path) -> dict[str, Any] | None:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        if path.name == "pyproject.toml":  # somebody else's file: its errors are not ours to report
            return None
        raise UsageError(f"no TOML: {error}", path=str(path)) from error
    if path.name == "ggufkit.toml":
        return document
    table = document.get("tool", {}).get("ggufkit")
    return table if isinstance(table, dict) else None


def _settings(table: dict[str, Any], path: str) -> Settings:
    known = {"select", "ignore", "profile", "min-severity"}
    if unknown := table.keys() - known:
        raise UsageError(f"there is no setting {min(unknown)!r}", path=path, expected=", ".join(sorted(known)))
    profile, severity = table.get("profile"), table.get("min-severity")
    if profile not in (None, *_PROFILES):
        raise UsageError(f"profile is {profile!r}", path=path, expected=" or ".join(_PROFILES))
    if severity not in (None, *Severity):
        raise UsageError(f"min-severity is {severity!r}", path=path, expected=", ".join(Severity))
    return Settings(
        _codes(table.get("select", []), "select", path),
        _codes(table.get("ignore", []), "ignore", path),
        profile,
        None if severity is None else Severity(severity),
    )


def _codes(value: Any, name: str, path: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(code, str) for code in value):
        raise UsageError(f"{name} is no list of codes", path=path, expected=f'{name} = ["M108"]')
    return tuple(value)

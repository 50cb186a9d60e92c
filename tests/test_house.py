"""The house is built as CONTRIBUTING says: who may import whom, what loads when, and where things are found."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ggufkit import checks, demo
from ggufkit.report import markdown

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ggufkit"
MODULES = sorted(PACKAGE.rglob("*.py"))
TEXTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]

#: who → what it must not import; the flow goes one way
FORBIDDEN = {
    "source": ("cli", "report", "checks", "runtime", "stats", "reader"),
    "sniff": ("cli", "report", "checks", "runtime", "stats", "reader"),
    "reader": ("cli", "report", "checks", "runtime", "stats"),
    "container": ("cli", "report", "checks", "runtime", "stats", "reader"),
    "arch": ("cli", "report", "checks", "runtime", "stats", "reader"),
    "quants": ("cli", "report", "checks", "runtime", "stats", "reader", "container"),
    "stats": ("cli", "report", "checks", "runtime"),
    "tokenizer": ("cli", "report", "checks", "runtime", "stats"),
    "vocabulary": ("cli", "report", "checks", "runtime", "stats"),
    "chat": ("cli", "report", "checks", "runtime", "stats"),
    "trace": ("cli", "report", "checks", "runtime"),
    "runtime": ("cli", "report", "checks", "tokenizer", "chat", "conversation"),
    "witness": ("cli", "report", "checks", "tokenizer", "chat", "conversation"),
    "checks": ("cli", "report", "runtime"),
    "overview": ("cli", "report", "checks", "runtime", "stats"),
    "memory": ("cli", "report", "checks", "runtime", "stats"),
    "plot": ("cli", "checks", "runtime"),
    "doctor": ("cli", "report", "checks"),
    "conversation": ("cli", "report", "checks"),
    "report": ("cli", "reader", "stats", "source"),
}
#: file → what it alone of its part may import
ALLOWED = {
    "checks/behaviour.py": {"runtime"},
    "checks/ablate.py": {"runtime"},
    "checks/running.py": {"runtime"},
}
#: a package that somebody pays for when it is loaded → the parts that may
HEAVY = {
    "typer": ("cli",),
    "rich": ("cli", "report"),
    "matplotlib": ("plot.py", "plot"),
    "cupy": ("gpu.py", "runtime/cuda", "stats"),
    "torch": ("witness",),
    "transformers": ("witness",),
    "llama_cpp": ("witness",),
}


def imports(path: Path, *, top_only: bool = False) -> Iterator[str]:
    """The full names of the modules that a file imports, but for those that only type checkers see."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: list[ast.AST] = list(tree.body) if top_only else list(_running(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes outside `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from _running(node)


def part_of(path: Path) -> str:
    """`checks` for ggufkit/checks/numeric.py, `reader` for ggufkit/reader.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
class TestEachFile:
    def test_imports_follow_the_flow(self, path: Path) -> None:
        forbidden = set(FORBIDDEN.get(part_of(path), ())) - ALLOWED.get(path.relative_to(PACKAGE).as_posix(), set())
        wrong = {name for name in imports(path) if name.split(".")[:1] == ["ggufkit"] and name.split(".")[1:2]}
        assert {name for name in wrong if name.split(".")[1] in forbidden} == set()

    def test_heavy_packages_stay_where_they_belong(self, path: Path) -> None:
        inside = path.relative_to(PACKAGE).as_posix()
        used = {name.split(".")[0] for name in imports(path)}
        wrong = {name for name in used & HEAVY.keys() if not inside.startswith(HEAVY[name])}
        assert wrong == set()

    def test_it_opens_by_saying_what_it_is_for(self, path: Path) -> None:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring, "every file opens with what it is for"
        assert docstring[0].isupper() or docstring.startswith(("`", "ggufkit", "llama.cpp"))


class TestWhatLoads:
    """A command that only looks must answer at once."""

    HEAVY = ("numpy", "cupy", "numba", "llvmlite", "matplotlib", "tokenizers", "safetensors", "torch", "pydantic")

    def loaded(self, *args: str) -> set[str]:
        code = (
            "import json, sys; from ggufkit.__main__ import main; sys.argv = ['ggufkit', *sys.argv[1:]]\n"
            "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
            "print('\\n' + json.dumps(sorted(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
        return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}

    def test_help_loads_nothing_heavy(self) -> None:
        assert self.loaded("--help") & {*self.HEAVY, "jinja2"} == set()

    @pytest.mark.parametrize("args", [(), ("--json",), ("--tensors",), ("--metadata",)])
    def test_inspect_loads_nothing_heavy(self, args: tuple[str, ...]) -> None:
        assert self.loaded("inspect", str(demo.MODEL), *args) & set(self.HEAVY) == set()

    def test_the_package_itself_loads_nothing(self) -> None:
        code = "import sys; before = set(sys.modules); import ggufkit; print(*sorted(set(sys.modules) - before))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) <= {"ggufkit", "importlib", "importlib._bootstrap", "warnings", "typing"} | {
            name for name in done.stdout.split() if not name.startswith(("ggufkit.", "numpy", "rich", "typer"))
        }

    def test_the_public_names(self) -> None:
        import ggufkit

        for name in ggufkit.__all__:
            assert getattr(ggufkit, name) is not None
        with pytest.raises(AttributeError):
            ggufkit.nonsense  # noqa: B018


class TestPromises:
    """What CONTRIBUTING says about how a thing is added."""

    def test_the_rule_page_is_current(self) -> None:
        page = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
        assert page == markdown.rules(checks.RULES.values()) + "\n", "run: ggufkit rules --markdown > docs/rules.md"

    @pytest.mark.parametrize("code", sorted(checks.RULES))
    def test_a_rule_documents_itself_and_is_tested(self, code: str) -> None:
        rule = checks.RULES[code]
        assert [part for part in ("What.", "Why.", "Case.", "Fix.") if part not in rule.doc] == []
        tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
        assert code in tests or rule.name in tests

    def test_codes_belong_to_a_family_and_are_three_digits(self) -> None:
        assert [code for code in checks.RULES if not re.fullmatch(rf"[{''.join(checks.FAMILIES)}]\d{{3}}", code)] == []

    def test_the_house_list_names_every_part(self) -> None:
        listed = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
        parts = {path.name for path in PACKAGE.iterdir() if not path.name.startswith(("_", "py.typed"))}
        assert [name for name in sorted(parts) if f"{name}" not in listed] == []

    def test_what_the_house_list_names_is_there(self) -> None:
        text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
        block = text.partition("```")[2].partition("```")[0]
        named = re.findall(r"[\w/]+\.(?:py|md|yml|toml)\b", block)
        there = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if ".git" not in path.parts}
        assert [name for name in named if not any(path.endswith(name) for path in there)] == []


class TestTexts:
    @pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
    def test_links_lead_somewhere(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        targets = [target for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in target]
        assert [target for target in targets if not (path.parent / target).exists()] == []

    @pytest.mark.parametrize("path", [*TEXTS, *MODULES], ids=lambda path: path.relative_to(ROOT).as_posix())
    def test_no_path_of_somebody_s_machine(self, path: Path) -> None:
        assert re.findall(r"(?<![\w.])/(?:home|root|work|Users)/\w+", path.read_text(encoding="utf-8")) == []

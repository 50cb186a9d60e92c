"""The kept bad files: each is still refused by the rule that its name begins with, the good ones still load."""

from __future__ import annotations

from pathlib import Path

import pytest

from ggufkit import checks
from ggufkit.findings import Severity

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.gguf"))


def test_there_is_a_corpus() -> None:
    assert len(CORPUS) > 60
    assert all(path.stat().st_size <= 2048 for path in CORPUS)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_a_kept_file_gets_the_verdict_in_its_name(path: Path) -> None:
    code = path.stem.split("-")[0].upper()
    report = checks.run(path)
    if code == "GOOD":
        assert [finding for finding in report.findings if finding.severity is Severity.ERROR] == []
    else:
        assert code in {finding.code for finding in report.findings}
        assert report.exit_code() != 0

"""Write the corpus anew: every hand-made bad header of test_reader below 2 kB, and the good ones beside them.

    python tests/corpus/make.py

The files are kept in the repository so that a change of the builder cannot quietly change what is tested, and as
seeds for fuzzers. A file's name begins with the rule that must refuse it, or with `good`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

from test_reader import MORE_MUST_FAIL, MUST_FAIL, MUST_LOAD  # noqa: E402

LARGEST = 2048


def write(name: str, made: object) -> None:
    data = made if isinstance(made, bytes) else made.encode()  # type: ignore[attr-defined]
    if len(data) <= LARGEST:
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        (HERE / f"{slug}.gguf").write_bytes(data)


def main() -> None:
    for old in HERE.glob("*.gguf"):
        old.unlink()
    for case in (*MUST_FAIL, *MORE_MUST_FAIL):
        write(f"{case.code} {case.name}", case.make())
    for name, make in MUST_LOAD:
        write(f"good {name}", make())


if __name__ == "__main__":
    main()

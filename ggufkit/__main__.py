"""`python -m ggufkit`, and what the installed `ggufkit` command calls."""

from __future__ import annotations

from ggufkit.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()

"""Threads for NumPy and compiled kernels, which compute without the interpreter's lock; made once."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

_MOST = 8


@cache
def pool() -> ThreadPoolExecutor:
    """The threads that everybody shares. What they run must not wait for other work of theirs."""
    return ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST), thread_name_prefix="ggufkit")

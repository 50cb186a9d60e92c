"""Runs of like things in a long sequence that is seen piece by piece: blocks of zeros, unmarked blocks, equal bytes.

A piece is summed up in a few numbers, and two neighbouring pieces add up to what their whole would have given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ggufkit.stats.results import ByteRun, Span

#: a run of equal bytes shorter than this is not worth a mention, and need not be found
SHORTEST_BYTE_RUN = 16


@dataclass(frozen=True, slots=True)
class Runs:
    """Where a yes-no sequence says yes.

    Attributes:
        length: of the sequence.
        count: how often it says yes; first and last are the places.
        before, after: length of the run at the beginning and at the end.
        start, longest: the longest run (the first of equals).
    """

    length: int = 0
    count: int = 0
    first: int = -1
    last: int = -1
    before: int = 0
    after: int = 0
    start: int = 0
    longest: int = 0

    @classmethod
    def of(cls, flags: npt.NDArray[np.bool_]) -> Runs:
        """Sum up a sequence: bool [n]."""
        places = np.flatnonzero(flags)
        if len(places) == 0:
            return cls(len(flags))
        breaks = np.flatnonzero(np.diff(places) > 1)
        begins = np.concatenate([[0], breaks + 1])
        lengths = np.diff(np.concatenate([begins, [len(places)]]))
        best = int(lengths.argmax())
        first, last = int(places[0]), int(places[-1])
        return cls(
            len(flags),
            len(places),
            first,
            last,
            int(lengths[0]) if first == 0 else 0,
            int(lengths[-1]) if last == len(flags) - 1 else 0,
            int(places[begins[best]]),
            int(lengths[best]),
        )

    def __add__(self, other: Runs) -> Runs:
        """The sequence followed by another."""
        across = self.after + other.before
        candidates = [
            (self.longest, -self.start),
            (across, -(self.length - self.after)),
            (other.longest, -(self.length + other.start)),
        ]
        longest, start = max(candidates)
        return Runs(
            self.length + other.length,
            self.count + other.count,
            self.first if self.count else self._moved(other.first),
            self._moved(other.last) if other.count else self.last,
            self.before + other.before if self.before == self.length else self.before,
            other.after + self.after if other.after == other.length else other.after,
            -start if longest else 0,
            longest,
        )

    def _moved(self, place: int) -> int:
        return self.length + place if place >= 0 else -1

    @property
    def span(self) -> Span | None:
        """The longest run."""
        return Span(self.start, self.longest) if self.longest else None


@dataclass(frozen=True, slots=True)
class ByteRuns:
    """Runs of equal bytes. Only runs of `SHORTEST_BYTE_RUN` and those at the two ends are known exactly.

    Attributes:
        length: bytes in all.
        before, after: the runs at the beginning and the end.
        equal: the longest run; zero: the longest of zero bytes; both the first of equals.
    """

    length: int = 0
    before: ByteRun | None = None
    after: ByteRun | None = None
    equal: ByteRun | None = None
    zero: ByteRun | None = None

    @classmethod
    def of(cls, data: npt.NDArray[np.uint8]) -> ByteRuns:
        """Sum up bytes: uint8 [n]."""
        if len(data) == 0:
            return cls()
        same = np.zeros(-(-len(data) // 8) * 8, np.bool_)
        np.equal(data[1:], data[:-1], out=same[: len(data) - 1])
        before = int(same[: len(data)].argmin()) + 1  # same[-1] is False: there is no next byte
        after = _run_at_end(same[: len(data) - 1]) + 1
        runs = _long_runs(data, same) if (same.view(np.uint64) == 0x0101010101010101).any() else []
        return cls(
            len(data),
            ByteRun(int(data[0]), 0, before),
            ByteRun(int(data[-1]), len(data) - after, after),
            _longest(runs),
            _longest([run for run in runs if run.value == 0]),
        )

    def __add__(self, other: ByteRuns) -> ByteRuns:
        """The bytes followed by others."""
        if self.before is None or self.after is None:
            return other
        if other.before is None or other.after is None:
            return self
        before, after, moved = self.before, _move(other.after, self.length), _move(other.before, self.length)
        runs = []
        if self.after.value == other.before.value:
            across = ByteRun(self.after.value, self.after.start, self.after.length + other.before.length)
            before = across if self.after.start == 0 else before
            after = across if moved.start + moved.length == self.length + other.length else after
            runs = [across] if across.length >= SHORTEST_BYTE_RUN else []
        equal = [self.equal, *runs, other.equal and _move(other.equal, self.length)]
        zero = [self.zero, *(run for run in runs if run.value == 0), other.zero and _move(other.zero, self.length)]
        return ByteRuns(self.length + other.length, before, after, _longest(equal), _longest(zero))


def _run_at_end(flags: npt.NDArray[np.bool_]) -> int:
    """How many flags at the end are set; looks at all of them only if it has to."""
    for tail in (flags[-1024:], flags):
        clear = np.flatnonzero(~tail)
        if len(clear):
            return len(tail) - 1 - int(clear[-1])
    return len(flags)


def _move(run: ByteRun, by: int) -> ByteRun:
    return ByteRun(run.value, run.start + by, run.length)


def _longest(runs: list[ByteRun] | list[ByteRun | None]) -> ByteRun | None:
    return max((run for run in runs if run is not None), key=lambda run: (run.length, -run.start), default=None)


def _long_runs(data: npt.NDArray[np.uint8], same: npt.NDArray[np.bool_]) -> list[ByteRun]:
    """The longest runs, one a value; `same[i]` says that byte i equals the next one."""
    edges = np.flatnonzero(np.diff(same[: len(data)], prepend=False, append=False))
    starts, lengths = edges[::2], edges[1::2] - edges[::2] + 1
    enough = lengths >= SHORTEST_BYTE_RUN
    best: dict[int, ByteRun] = {}
    for start, length in zip(starts[enough].tolist(), lengths[enough].tolist(), strict=True):
        value = int(data[start])
        if value not in best or length > best[value].length:
            best[value] = ByteRun(value, start, length)
    return list(best.values())

"""How the numbers of one chunk lie in memory, for the NumPy pass, the compiled pass and whoever adds them up.

A chunk is a run of whole rows, or a piece of one very long row. Scanning it fills arrays by block and by row, a
histogram, and two small arrays of single numbers whose places are named here.
"""

from __future__ import annotations

from typing import NamedTuple

#: bins of the histogram: sign, exponent and two bits of mantissa of a float32
BINS = 2048

#: the compiled pass keeps four histograms; a stride of a power of two would put their bins into one cache set
HISTOGRAM_STRIDE = BINS + 16

#: places in the array of integers: elements, then blocks (EQUAL: to the one before; N_KEPT: keys that were sampled).
#: TINY_... count values other than zero that fall into the lowest bin of their sign (below 2^-128), where the compiled
#: pass counts the zeros
N_ZERO, N_NAN, N_INF, FIRST_NAN, FIRST_INF, MIN_AT, MAX_AT, OFF_BF16, OFF_F16 = range(9)
ZERO_BLOCKS, BAD_BLOCKS, UNMARKED_BLOCKS, EQUAL_BLOCKS, N_KEPT, TINY_PLUS, TINY_MINUS = range(9, 16)
N_INTS = 16

#: places in the array of floats: four sums of powers about the pivot, then the extremes
MIN, MAX = 4, 5
N_SUMS = 6

#: lanes of the compiled pass's sums: each of the four is kept as eight
LANES = 8

#: histogram bins that the compiled pass gathers before it counts them
BIN_ROOM = 1024

#: flags of a block: it bears the quantizer's mark; its scale is zero, so that it needs none; all codes are equal
MARKED, EXEMPT, UNIFORM = 1, 2, 4

#: how many of the values off a grid are remembered
GRID_FIRST = 8

#: the level of a block with something not finite; one of nothing but zeros has level 0
BAD_LEVEL = -1

#: steps of the level to an octave of rms: the level counts eighths of an octave of the mean square
LEVELS_PER_OCTAVE = 16

#: a block with this deviation or more, in steps of the level, is an outlier
OUTLIER = 3 * LEVELS_PER_OCTAVE

#: bins of the histogram of deviations, one for each step of the level
DEVIATION_BINS = 256


#: units whose scale is smaller than this may hold such tiny values, and are looked at one by one
TINY_SCALE = 2.0**-100


class Mark(NamedTuple):
    """Where the quantizer puts a block's smallest and largest code.

    Mode 0: anywhere; 1: the smallest is `low`; 2: the smallest is `low` and the largest `high`; 3: one of the two
    is, and the other does not go beyond.
    """

    mode: int
    low: int = 0
    high: int = 0


#: what `fingerprint.marked` asks of the codes, by type; its other conditions concern the scales alone
CODE_MARKS = {
    "Q8_0": Mark(3, -127, 127),
    "Q4_0": Mark(1, -8),
    "Q5_0": Mark(1, -16),
    "Q4_1": Mark(2, 0, 15),
    "Q5_1": Mark(2, 0, 31),
}

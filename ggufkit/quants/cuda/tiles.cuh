// How packed weights lie in device memory, for every block type the same way, and the parts the decoders share.
//
// A matrix is cut into tiles of 16 rows, a tile into chunks of 128 columns (256 for the K types). A chunk holds the
// bits of its blocks and nothing else: as many bytes as the file has, in an order that suits a warp. It is a row of
// planes, each read with one wide load a lane, followed by the scales:
//
//     low plane   4, 2 or 8 bits a code     high plane   the 5th, 3rd or 5th-and-6th bit     head   scales, mins
//
// A step is 16 rows x 32 columns, the operand of one product of the tensor cores. Of it lane 4g + t holds four words of
// four codes each (one code a byte):
//
//     word 0   row g,     columns 4t .. 4t+3           word 2   row g,     columns 16 + 4t .. 16 + 4t+3
//     word 1   row g + 8, columns 4t .. 4t+3           word 3   row g + 8, columns 16 + 4t .. 16 + 4t+3
//
// The low plane of 4 bits is, per two steps, 16 bytes a lane: words 0 and 1 of a step share 32 bits (low and high
// nibbles), words 2 and 3 the next 32. The low plane of 2 bits has 32 bits a step and lane: word w in the bits 2w,
// 2w+1 of each byte. A high plane of 1 bit has 32 bits for two steps: word w of step s in bit 4(s & 1) + w of each byte.
//
// Codes come out as bytes that the tensor cores multiply. Types with a min have unsigned codes as the file has them.
// The others have signed values, code minus half the range: their top bit is flipped when they are packed, and they
// come out at the top of the byte, where they are two's complement of 2^n times the value without further ado.
//
// A decoder is a struct with
//     COLS, GROUP, BYTES   columns and bytes of a chunk; columns that share a scale
//     MINS, UNIT           whether a group has a min (and codes are unsigned); what a code of 1 stands for
//     Head, head()         the lane's part of the scales, for the rows g and g + 8
//     pair()               the codes of the steps 2p and 2p + 1
//     scale(), factor()    of one group and row, and what all groups of the row share; `low` is 0 or 1 (row g + 8)
//     least(), least_factor()   the same of the min:   value = factor · scale · UNIT · code + least_factor · least
// `p`, `low` and `group` (which counts within the chunk) are known when the kernel is compiled: loops are unrolled.

#define STEP 32
#define TILE_ROWS 16

typedef u32 Codes[4];

// Two steps of the 4-bit plane, a code's bits at `AT` of its byte.
template <int AT>
DEVICE void nibbles(const u8* plane, int lane, int pair, Codes (&a)[2]) {
    const uint4 w = load16(plane + pair * 512 + lane * 16);
    const u32 words[4] = {w.x, w.y, w.z, w.w}, mask = 0x0f0f0f0fu << AT;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        a[i / 2][i % 2 * 2] = words[i] << AT & mask;
        a[i / 2][i % 2 * 2 + 1] = words[i] >> (4 - AT) & mask;
    }
}

// Two steps of the 2-bit plane, added to `a` at bit `AT` of each byte.
template <int AT>
DEVICE void crumbs(u32 even, u32 odd, Codes (&a)[2]) {
    const u32 mask = 0x03030303u << AT;
#pragma unroll
    for (int w = 0; w < 4; w++) {
        const int by = AT - 2 * w;
        a[0][w] |= (by >= 0 ? even << (by & 31) : even >> (-by & 31)) & mask;
        a[1][w] |= (by >= 0 ? odd << (by & 31) : odd >> (-by & 31)) & mask;
    }
}

// Two steps of a 1-bit plane, added to `a` at bit `AT` of each byte.
template <int AT>
DEVICE void single_bits(u32 bits, Codes (&a)[2]) {
    const u32 mask = 0x01010101u << AT;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int by = AT - i;
        a[i / 4][i % 4] |= (by >= 0 ? bits << (by & 31) : bits >> (-by & 31)) & mask;
    }
}

// Two steps of the 8-bit plane: 16 bytes a lane and step, word after word.
DEVICE void bytes_pair(const u8* plane, int lane, int pair, Codes (&a)[2]) {
#pragma unroll
    for (int s = 0; s < 2; s++) {
        const uint4 w = load16(plane + (2 * pair + s) * 512 + lane * 16);
        a[s][0] = w.x, a[s][1] = w.y, a[s][2] = w.z, a[s][3] = w.w;
    }
}

DEVICE void no_codes(Codes (&a)[2]) {
#pragma unroll
    for (int i = 0; i < 8; i++) a[i / 4][i % 4] = 0;
}

DEVICE u32 word_of(uint4 v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
DEVICE u32 word_of(uint2 v, int i) { return i == 0 ? v.x : v.y; }
DEVICE u32 byte_of(u32 word, int i) { return word >> (8 * i) & 0xff; }

// An unsigned byte of a word as a float, less `zero`: its bits under the exponent of 2^23, no conversion.
DEVICE float byte_float(u32 word, int i, float zero = 0) {
    return bits_float(__byte_perm(word, 0x4b000000u, 0x7440 | i)) - (8388608.0f + zero);
}

// Four f16 numbers of one row, one a group: the head of the types with blocks of 32.
DEVICE float half_of(uint2 four, int group) {
    const u32 pair = word_of(four, group / 2);
    return group & 1 ? high_half(pair) : low_half(pair);
}

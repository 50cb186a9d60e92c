// From the file's blocks to tiles (quants/cuda/tiles.cuh), on the device, once at load.
//
// A thread makes one 32-bit word of a chunk at a time by asking for the elements that belong there, so there is one
// description of each type's blocks (`code`, and the words of its head) and one of each plane. Two sources feed a tile: `upper` its rows
// 0..7, `lower` its rows 8..15; an ordinary matrix is both (lower begins 8 rows on), and the gate and up matrices of
// one layer may share their tiles, so that the product of a gate row and its up row meet in one warp.

struct Rows {  // what one half of a tile is made of
    const u8* first;  // the row that lies in tile 0
    int stride;       // rows from tile to tile
    int count;        // rows that exist, from `first` on
};

// The blocks of one type. LOW bits of a code lie in the low plane, HIGH in the high plane; FLIP is the top bit of the types
// whose codes are signed (tiles.cuh).
struct Raw32 { static constexpr int BLOCK = 32, COLS = 128; };
struct RawK { static constexpr int BLOCK = 256, COLS = 256; };

DEVICE u32 byte_at(const u8* block, int i) { return block[i]; }
DEVICE u32 two_bytes(const u8* at) { return at[0] | at[1] << 8; }
DEVICE u32 four_bytes(const u8* at) { return two_bytes(at) | two_bytes(at + 2) << 16; }
DEVICE u32 bits_at(const u8* bytes, int byte, int shift, u32 mask) { return bytes[byte] >> shift & mask; }

template <int BITS, bool MINS>
struct RawBlocks32 : Raw32 {
    static constexpr int QH = MINS ? 4 : 2, QS = QH + (BITS == 5 ? 4 : 0), SIZE = QS + 16;
    static constexpr int LOW = 4, HIGH = BITS - 4, FLIP = MINS ? 0 : 1 << (BITS - 1);
    static DEVICE u32 code(const u8* b, int i) {
        const u32 low = bits_at(b + QS, i % 16, i / 16 * 4, 15);
        return BITS == 4 ? low : low | bits_at(b + QH, i / 8, i % 8, 1) << 4;
    }
};
struct RawQ8_0 : Raw32 {
    static constexpr int SIZE = 34, LOW = 8, HIGH = 0, FLIP = 0;
    static DEVICE u32 code(const u8* b, int i) { return b[2 + i]; }
};
struct RawW8 {  // made by the loader: an f32 scale and 16 signed bytes
    static constexpr int BLOCK = 16, COLS = 128, SIZE = 20, LOW = 8, HIGH = 0, FLIP = 0;
    static DEVICE u32 code(const u8* b, int i) { return b[4 + i]; }
};
DEVICE u32 two_bits_k(const u8* qs, int i) { return bits_at(qs, i / 128 * 32 + i % 32, i % 128 / 32 * 2, 3); }
DEVICE u32 four_bits_k(const u8* qs, int i) { return bits_at(qs, i / 64 * 32 + i % 32, i % 64 / 32 * 4, 15); }
DEVICE u32 one_bit_k(const u8* qh, int i) { return bits_at(qh, i % 32, i / 32, 1); }

struct RawQ2_K : RawK {
    static constexpr int SIZE = 84, LOW = 2, HIGH = 0, FLIP = 0;
    static DEVICE u32 code(const u8* b, int i) { return two_bits_k(b + 16, i); }
};
struct RawQ3_K : RawK {
    static constexpr int SIZE = 110, LOW = 2, HIGH = 1, FLIP = 4;
    static DEVICE u32 code(const u8* b, int i) { return two_bits_k(b + 32, i) | one_bit_k(b, i) << 2; }
};
struct RawQ4_K : RawK {
    static constexpr int SIZE = 144, LOW = 4, HIGH = 0, FLIP = 0;
    static DEVICE u32 code(const u8* b, int i) { return four_bits_k(b + 16, i); }
};
struct RawQ5_K : RawK {
    static constexpr int SIZE = 176, LOW = 4, HIGH = 1, FLIP = 0;
    static DEVICE u32 code(const u8* b, int i) { return four_bits_k(b + 48, i) | one_bit_k(b + 16, i) << 4; }
};
struct RawQ6_K : RawK {
    static constexpr int SIZE = 210, LOW = 4, HIGH = 2, FLIP = 32;
    static DEVICE u32 code(const u8* b, int i) {
        const int half = i / 128, j = i % 128;
        return bits_at(b, half * 64 + j % 64, j / 64 * 4, 15) | bits_at(b + 128, half * 32 + j % 32, j / 32 * 2, 3) << 4;
    }
};

// One chunk of one tile: where its sixteen rows are.
struct Place {
    Rows upper, lower;
    int row_bytes, columns, tile, chunk;

    DEVICE const u8* row(int r) const {  // null: there is no such row
        const Rows& half = r < 8 ? upper : lower;
        const int index = tile * half.stride + r % 8;
        return index < half.count ? half.first + (long long)index * row_bytes : nullptr;
    }
};

template <class T>
DEVICE const u8* block_of(const Place& p, int r, int column) {
    const u8* row = p.row(r);
    const int at = p.chunk * T::COLS + column;
    return row && at < p.columns ? row + (long long)(at / T::BLOCK) * T::SIZE : nullptr;
}

template <class T>
DEVICE u32 code_of(const Place& p, int r, int column) {
    const u8* block = block_of<T>(p, r, column);
    return block ? T::code(block, (p.chunk * T::COLS + column) % T::BLOCK) ^ T::FLIP : 0;
}

// The column of byte b of word `w` of a step, and the row: see tiles.cuh.
DEVICE int step_column(int step, int w, int lane, int b) { return step * STEP + w / 2 * 16 + lane % 4 * 4 + b; }
DEVICE int step_row(int w, int lane) { return lane / 4 + w % 2 * 8; }

template <class T>
DEVICE u32 low_word(const Place& p, int at) {
    const int part = at / 128, lane = at % 128 / 4, i = at % 4;
    u32 word = 0;
    for (int b = 0; b < 4; b++) {
        if (T::LOW == 8) word |= code_of<T>(p, step_row(i, lane), step_column(part, i, lane, b)) << (8 * b);
        if (T::LOW == 4)
            for (int k = 0; k < 2; k++) {
                const int step = part * 2 + i / 2, w = i % 2 * 2 + k;
                word |= (code_of<T>(p, step_row(w, lane), step_column(step, w, lane, b)) & 15) << (8 * b + 4 * k);
            }
        if (T::LOW == 2)
            for (int w = 0; w < 4; w++)
                word |= (code_of<T>(p, step_row(w, lane), step_column(part * 4 + i, w, lane, b)) & 3) << (8 * b + 2 * w);
    }
    return word;
}

template <class T>
DEVICE u32 high_word(const Place& p, int at) {
    u32 word = 0;
    if (T::HIGH == 1) {
        const int pairs = T::COLS / 64, lane = at / pairs, pair = at % pairs;
        for (int b = 0; b < 4; b++)
            for (int i = 0; i < 8; i++) {
                const int w = i % 4, step = pair * 2 + i / 4;
                const u32 code = code_of<T>(p, step_row(w, lane), step_column(step, w, lane, b));
                word |= (code >> T::LOW & 1) << (8 * b + i);
            }
    }
    if (T::HIGH == 2) {
        const int part = at / 128, lane = at % 128 / 4, i = at % 4;
        for (int b = 0; b < 4; b++)
            for (int w = 0; w < 4; w++) {
                const u32 code = code_of<T>(p, step_row(w, lane), step_column(part * 4 + i, w, lane, b));
                word |= (code >> T::LOW & 3) << (8 * b + 2 * w);
            }
    }
    return word;
}

// The f16 at byte `field` of two blocks, side by side.
DEVICE u32 two_fields(const u8* first, const u8* second, int field) {
    return (first ? two_bytes(first + field) : 0) | (second ? two_bytes(second + field) : 0) << 16;
}
DEVICE u32 field(const u8* block, int at) { return block ? four_bytes(block + at) : 0; }

template <class T>
DEVICE u32 head_of_32(const Place& p, int at) {  // f16 [16 rows][4 groups] of d at byte 0, then of m at byte 2
    const int row = at % 32 / 2, group = at % 2 * 2;
    return two_fields(block_of<T>(p, row, group * 32), block_of<T>(p, row, group * 32 + 32), at / 32 * 2);
}

template <class T>
DEVICE u32 rows_of_d(const Place& p, int at, int byte) {  // f16 [16 rows]
    return two_fields(block_of<T>(p, 2 * at, 0), block_of<T>(p, 2 * at + 1, 0), byte);
}

DEVICE u32 head_word(RawBlocks32<4, false>, const Place& p, int at) { return head_of_32<RawBlocks32<4, false>>(p, at); }
DEVICE u32 head_word(RawBlocks32<4, true>, const Place& p, int at) { return head_of_32<RawBlocks32<4, true>>(p, at); }
DEVICE u32 head_word(RawBlocks32<5, false>, const Place& p, int at) { return head_of_32<RawBlocks32<5, false>>(p, at); }
DEVICE u32 head_word(RawBlocks32<5, true>, const Place& p, int at) { return head_of_32<RawBlocks32<5, true>>(p, at); }
DEVICE u32 head_word(RawQ8_0, const Place& p, int at) { return head_of_32<RawQ8_0>(p, at); }
DEVICE u32 head_word(RawW8, const Place& p, int at) { return field(block_of<RawW8>(p, at / 8, at % 8 * 16), 0); }
DEVICE u32 head_word(RawQ2_K, const Place& p, int at) {
    return at < 64 ? field(block_of<RawQ2_K>(p, at / 4, 0), at % 4 * 4) : field(block_of<RawQ2_K>(p, at - 64, 0), 80);
}
DEVICE u32 head_word(RawQ3_K, const Place& p, int at) {
    return at < 48 ? field(block_of<RawQ3_K>(p, at % 16, 0), 96 + at / 16 * 4) : rows_of_d<RawQ3_K>(p, at - 48, 108);
}
DEVICE u32 head_word(RawQ4_K, const Place& p, int at) { return field(block_of<RawQ4_K>(p, at / 4, 0), at % 4 * 4); }
DEVICE u32 head_word(RawQ5_K, const Place& p, int at) { return field(block_of<RawQ5_K>(p, at / 4, 0), at % 4 * 4); }
DEVICE u32 head_word(RawQ6_K, const Place& p, int at) {
    if (at < 64) return field(block_of<RawQ6_K>(p, at / 4, 0), 192 + at % 4 * 4) ^ 0x80808080u;
    return rows_of_d<RawQ6_K>(p, at - 64, 208);
}

// F32, F16, BF16: `SIZE` bytes an element, two elements of a half in one word.
template <int BYTES_EACH>
struct RawFloats {
    static constexpr int BLOCK = 1, COLS = 128, SIZE = BYTES_EACH;
    static DEVICE u32 word(const Place& p, int at) {
        const int lane = at % 128 / 4, i = at % 4, piece = at / 128;
        if (SIZE == 4) return field(block_of<RawFloats>(p, lane / 4 + piece / 2 % 2 * 8, piece / 4 * STEP + piece % 2 * 16 + lane % 4 * 4 + i), 0);
        const int row = lane / 4 + piece % 2 * 8, column = piece / 2 * STEP + i / 2 * 16 + lane % 4 * 4 + i % 2 * 2;
        return two_fields(block_of<RawFloats>(p, row, column), block_of<RawFloats>(p, row, column + 1), 0);
    }
};

template <class T>
DEVICE u32 chunk_word(const Place& p, int at) {
    const int low = T::COLS * T::LOW / 2, high = T::COLS * T::HIGH / 2;  // words: 16 rows, 32 bits
    if (at < low) return low_word<T>(p, at);
    return at < low + high ? high_word<T>(p, at - low) : head_word(T(), p, at - low - high);
}

// grid: (chunks of a row, tiles). `to` is the first tile; a chunk has `words` words.
#define REPACK(NAME, WORD)                                                                                          \
    extern "C" __global__ void repack_##NAME(u32* to, const u8* upper, const u8* lower, int stride, int n_upper,     \
                                             int n_lower, int row_bytes, int columns, int words) {                   \
        Place p = {{upper, stride, n_upper}, {lower, stride, n_lower}, row_bytes, columns, (int)blockIdx.y,          \
                   (int)blockIdx.x};                                                                                 \
        u32* chunk = to + ((long long)blockIdx.y * gridDim.x + blockIdx.x) * words;                                  \
        for (int i = threadIdx.x; i < words; i += blockDim.x) chunk[i] = WORD(p, i);                                 \
    }

#define RAW_Q4_0 RawBlocks32<4, false>
#define RAW_Q4_1 RawBlocks32<4, true>
#define RAW_Q5_0 RawBlocks32<5, false>
#define RAW_Q5_1 RawBlocks32<5, true>
REPACK(Q4_0, (chunk_word<RAW_Q4_0>))
REPACK(Q4_1, (chunk_word<RAW_Q4_1>))
REPACK(Q5_0, (chunk_word<RAW_Q5_0>))
REPACK(Q5_1, (chunk_word<RAW_Q5_1>))
REPACK(Q8_0, chunk_word<RawQ8_0>)
REPACK(W8, chunk_word<RawW8>)
REPACK(Q2_K, chunk_word<RawQ2_K>)
REPACK(Q3_K, chunk_word<RawQ3_K>)
REPACK(Q4_K, chunk_word<RawQ4_K>)
REPACK(Q5_K, chunk_word<RawQ5_K>)
REPACK(Q6_K, chunk_word<RawQ6_K>)
REPACK(F32, RawFloats<4>::word)
REPACK(F16, RawFloats<2>::word)
REPACK(BF16, RawFloats<2>::word)

// Cosine and sine of each angle of the rotary embedding, [n / half positions][half], from double precision. grid: n / 256.
extern "C" __global__ void rotations(float2* to, const double* frequencies, int half, int n, double scale) {
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= n) return;
    const double angle = (double)(i / half) / scale * frequencies[i % half];
    to[i] = {(float)cos(angle), (float)sin(angle)};
}

// Decoders of plain floats, F32, F16 and BF16: a chunk of 128 columns in the order of the steps. Of a step lane 4g + t
// holds row g, then row g + 8, each with the columns 4t .. 4t+3 and 16 + 4t .. 16 + 4t+3: 16 bytes for a row of halves,
// two times 16 for one of floats. Every load of a warp is one contiguous piece.
//
// values(): the lane's 8 values of step `step` and row g (low = 0) or g + 8 (low = 1).

struct F32 {
    static constexpr int COLS = 128, BYTES = 8192;
    static DEVICE void values(const u8* chunk, int lane, int step, int low, float (&v)[8]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4 w = load16(chunk + ((step * 2 + low) * 2 + half) * 512 + lane * 16);
            v[half * 4] = bits_float(w.x), v[half * 4 + 1] = bits_float(w.y);
            v[half * 4 + 2] = bits_float(w.z), v[half * 4 + 3] = bits_float(w.w);
        }
    }
};

template <bool BRAIN>
struct Halves {
    static constexpr int COLS = 128, BYTES = 4096;
    static DEVICE void values(const u8* chunk, int lane, int step, int low, float (&v)[8]) {
        const uint4 w = load16(chunk + (step * 2 + low) * 512 + lane * 16);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 two = word_of(w, i);
            v[2 * i] = BRAIN ? bits_float(two << 16) : low_half(two);
            v[2 * i + 1] = BRAIN ? bits_float(two & 0xffff0000u) : high_half(two);
        }
    }
};
typedef Halves<false> F16;
typedef Halves<true> BF16;

// Decoders of the types with blocks of 32 and one scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0; and of what every other type
// is converted to: W8, signed bytes with an f32 scale for 16. Head: f16 [16 rows][4 groups] of scales, then of mins.

struct NoFactor {  // what the types without a super-block have in common
    template <class HEAD>
    static DEVICE float factor(const HEAD&, int) { return 1; }
    template <class HEAD>
    static DEVICE float least_factor(const HEAD&, int) { return 1; }
};

template <int BITS, bool WITH_MINS>
struct Blocks32 : NoFactor {
    static constexpr int COLS = 128, GROUP = 32, LOW = 1024, HEAD = LOW + (BITS == 5 ? 256 : 0);
    static constexpr int BYTES = HEAD + (WITH_MINS ? 256 : 128);
    static constexpr bool MINS = WITH_MINS;
    static constexpr int AT = MINS ? 0 : 8 - BITS;
    static constexpr float UNIT = 1.0f / (1 << AT);
    struct Head { uint2 d[2], m[2], high; };

    static DEVICE Head head(const u8* chunk, int lane) {
        Head h;
        const u8* at = chunk + HEAD + lane / 4 * 8;
        h.d[0] = load8(at), h.d[1] = load8(at + 64);
        if (MINS) h.m[0] = load8(at + 128), h.m[1] = load8(at + 192);
        if (BITS == 5) h.high = load8(chunk + LOW + lane * 8);
        return h;
    }
    static DEVICE void pair(const u8* chunk, const Head& h, int lane, int p, Codes (&a)[2]) {
        nibbles<AT>(chunk, lane, p, a);
        if (BITS == 5) single_bits<AT + 4>(word_of(h.high, p), a);
    }
    static DEVICE float scale(const Head& h, int low, int group) { return half_of(h.d[low], group); }
    static DEVICE float least(const Head& h, int low, int group) { return half_of(h.m[low], group); }
};
typedef Blocks32<4, false> Q4_0;
typedef Blocks32<4, true> Q4_1;
typedef Blocks32<5, false> Q5_0;
typedef Blocks32<5, true> Q5_1;

struct Q8_0 : NoFactor {
    static constexpr int COLS = 128, GROUP = 32, BYTES = 2048 + 128;
    static constexpr bool MINS = false;
    static constexpr float UNIT = 1;
    struct Head { uint2 d[2]; };

    static DEVICE Head head(const u8* chunk, int lane) {
        Head h;
        h.d[0] = load8(chunk + 2048 + lane / 4 * 8), h.d[1] = load8(chunk + 2112 + lane / 4 * 8);
        return h;
    }
    static DEVICE void pair(const u8* chunk, const Head&, int lane, int p, Codes (&a)[2]) { bytes_pair(chunk, lane, p, a); }
    static DEVICE float scale(const Head& h, int low, int group) { return half_of(h.d[low], group); }
    static DEVICE float least(const Head&, int, int) { return 0; }
};

struct W8 : NoFactor {
    static constexpr int COLS = 128, GROUP = 16, BYTES = 2048 + 512;
    static constexpr bool MINS = false;
    static constexpr float UNIT = 1;
    struct Head { const float* d; };

    static DEVICE Head head(const u8* chunk, int lane) {
        Head h;
        h.d = (const float*)(chunk + 2048) + lane / 4 * 8;
        return h;
    }
    static DEVICE void pair(const u8* chunk, const Head&, int lane, int p, Codes (&a)[2]) { bytes_pair(chunk, lane, p, a); }
    static DEVICE float scale(const Head& h, int low, int group) { return h.d[low * 64 + group]; }
    static DEVICE float least(const Head&, int, int) { return 0; }
};

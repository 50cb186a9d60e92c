// Decoders of the K family: chunks of 256 columns, one block of each of the 16 rows.
//
//     Q2_K   2-bit plane 1024; scales [16 rows][16]; d, dmin [16 rows] (f16 pairs)
//     Q3_K   2-bit plane 1024; 1-bit plane 512; scales three words [3][16 rows]; d [16 rows] (f16)
//     Q4_K   4-bit plane 2048; [16 rows] d, dmin (f16), 12 bytes of 6-bit scales and mins
//     Q5_K   4-bit plane 2048; 1-bit plane 512; head as Q4_K
//     Q6_K   4-bit plane 2048; 2-bit plane 1024; scales [16 rows][16] (bytes, 128 more than they mean); d [16 rows] (f16)
//
// The small scales stay packed as the file has them; their layout: quants/k.py.

// The 1-bit plane of 256 columns has 16 bytes a lane, the 2-bit plane two times 16.
DEVICE uint4 plane_part(const u8* plane, int lane, int part = 0) { return load16(plane + part * 512 + lane * 16); }

DEVICE u32 even_crumbs(const uint4 (&parts)[2], int p) { return word_of(parts[p / 2], p % 2 * 2); }
DEVICE u32 odd_crumbs(const uint4 (&parts)[2], int p) { return word_of(parts[p / 2], p % 2 * 2 + 1); }

struct Q2_K {
    static constexpr int COLS = 256, GROUP = 16, BYTES = 1024 + 256 + 64;
    static constexpr bool MINS = true;
    static constexpr float UNIT = 1;
    struct Head { uint4 low[2], scales[2]; u32 d[2]; };

    static DEVICE Head head(const u8* chunk, int lane) {
        Head h;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = lane / 4 + 8 * r;
            h.low[r] = plane_part(chunk, lane, r);
            h.scales[r] = load16(chunk + 1024 + row * 16);
            h.d[r] = ((const u32*)(chunk + 1280))[row];
        }
        return h;
    }
    static DEVICE void pair(const u8*, const Head& h, int, int p, Codes (&a)[2]) {
        no_codes(a);
        crumbs<0>(even_crumbs(h.low, p), odd_crumbs(h.low, p), a);
    }
    static DEVICE float scale(const Head& h, int low, int group) {
        return byte_float(word_of(h.scales[low], group / 4) & 0x0f0f0f0fu, group % 4);
    }
    static DEVICE float least(const Head& h, int low, int group) {
        return byte_float(word_of(h.scales[low], group / 4) >> 4 & 0x0f0f0f0fu, group % 4);
    }
    static DEVICE float factor(const Head& h, int low) { return low_half(h.d[low]); }
    static DEVICE float least_factor(const Head& h, int low) { return -high_half(h.d[low]); }
};

struct Q3_K {
    static constexpr int COLS = 256, GROUP = 16, BYTES = 1024 + 512 + 192 + 32;
    static constexpr bool MINS = false;
    static constexpr float UNIT = 1.0f / 32;
    struct Head { uint4 low[2], high; u32 scales[2][4]; float d[2]; };

    static DEVICE Head head(const u8* chunk, int lane) {
        Head h;
        h.high = plane_part(chunk + 1024, lane);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = lane / 4 + 8 * r;
            h.low[r] = plane_part(chunk, lane, r);
            const u32* words = (const u32*)(chunk + 1536);
            const u32 first = words[row], second = words[16 + row], top = words[32 + row];
            h.scales[r][0] = (first & 0x0f0f0f0fu) | (top << 4 & 0x30303030u);
            h.scales[r][1] = (second & 0x0f0f0f0fu) | (top << 2 & 0x30303030u);
            h.scales[r][2] = (first >> 4 & 0x0f0f0f0fu) | (top & 0x30303030u);
            h.scales[r][3] = (second >> 4 & 0x0f0f0f0fu) | (top >> 2 & 0x30303030u);
            h.d[r] = half_to_float(((const u16*)(chunk + 1728))[row]);
        }
        return h;
    }
    static DEVICE void pair(const u8*, const Head& h, int, int p, Codes (&a)[2]) {
        no_codes(a);
        crumbs<5>(even_crumbs(h.low, p), odd_crumbs(h.low, p), a);
        single_bits<7>(word_of(h.high, p), a);
    }
    static DEVICE float scale(const Head& h, int low, int group) {
        return byte_float(h.scales[low][group / 4], group % 4, 32);
    }
    static DEVICE float least(const Head&, int, int) { return 0; }
    static DEVICE float factor(const Head& h, int low) { return h.d[low]; }
    static DEVICE float least_factor(const Head&, int) { return 0; }
};

template <int BITS>
struct Sixes {  // Q4_K and Q5_K
    static constexpr int COLS = 256, GROUP = 32, LOW = 2048, HEAD = LOW + (BITS == 5 ? 512 : 0);
    static constexpr int BYTES = HEAD + 256;
    static constexpr bool MINS = true;
    static constexpr float UNIT = 1;
    struct Head { u32 d[2], scales[2][2], mins[2][2]; uint4 high; };

    static DEVICE Head head(const u8* chunk, int lane) {
        Head h;
        if (BITS == 5) h.high = plane_part(chunk + LOW, lane);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const uint4 w = load16(chunk + HEAD + (lane / 4 + 8 * r) * 16);
            h.d[r] = w.x;
            h.scales[r][0] = w.y & 0x3f3f3f3fu;
            h.mins[r][0] = w.z & 0x3f3f3f3fu;
            h.scales[r][1] = (w.w & 0x0f0f0f0fu) | (w.y >> 2 & 0x30303030u);
            h.mins[r][1] = (w.w >> 4 & 0x0f0f0f0fu) | (w.z >> 2 & 0x30303030u);
        }
        return h;
    }
    static DEVICE void pair(const u8* chunk, const Head& h, int lane, int p, Codes (&a)[2]) {
        nibbles<0>(chunk, lane, p, a);
        if (BITS == 5) single_bits<4>(word_of(h.high, p), a);
    }
    static DEVICE float scale(const Head& h, int low, int group) { return byte_float(h.scales[low][group / 4], group % 4); }
    static DEVICE float least(const Head& h, int low, int group) { return byte_float(h.mins[low][group / 4], group % 4); }
    static DEVICE float factor(const Head& h, int low) { return low_half(h.d[low]); }
    static DEVICE float least_factor(const Head& h, int low) { return -high_half(h.d[low]); }
};
typedef Sixes<4> Q4_K;
typedef Sixes<5> Q5_K;

struct Q6_K {
    static constexpr int COLS = 256, GROUP = 16, BYTES = 2048 + 1024 + 256 + 32;
    static constexpr bool MINS = false;
    static constexpr float UNIT = 1.0f / 4;
    struct Head { uint4 high[2], scales[2]; float d[2]; };

    static DEVICE Head head(const u8* chunk, int lane) {
        Head h;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = lane / 4 + 8 * r;
            h.high[r] = plane_part(chunk + 2048, lane, r);
            h.scales[r] = load16(chunk + 3072 + row * 16);
            h.d[r] = half_to_float(((const u16*)(chunk + 3328))[row]);
        }
        return h;
    }
    static DEVICE void pair(const u8* chunk, const Head& h, int lane, int p, Codes (&a)[2]) {
        nibbles<2>(chunk, lane, p, a);
        crumbs<6>(even_crumbs(h.high, p), odd_crumbs(h.high, p), a);
    }
    static DEVICE float scale(const Head& h, int low, int group) {
        return byte_float(word_of(h.scales[low], group / 4), group % 4, 128);
    }
    static DEVICE float least(const Head&, int, int) { return 0; }
    static DEVICE float factor(const Head& h, int low) { return h.d[low]; }
    static DEVICE float least_factor(const Head&, int) { return 0; }
};

// What decoding one token and running a prompt have in common: the model's macros, rows of the embedding, the cache's
// numbers and the running softmax.
//
// Macros: N_EMBD, N_FF, N_HEAD, N_HEAD_KV, HEAD_DIM, N_LAYER, N_VOCAB, NORM_EPS, QKV_BIAS, QK_NORM, TYPES (a bit for
// each type that the model has), EMBD_TYPE, KV_HALF.

#define Q_WIDTH (N_HEAD * HEAD_DIM)
#define KV_WIDTH (N_HEAD_KV * HEAD_DIM)
#define QKV_WIDTH (Q_WIDTH + 2 * KV_WIDTH)
#define LANES_A_KEY (HEAD_DIM <= 32 ? 4 : HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : 32)  // 8 channels each

// Norms and biases, float32: the layers one after the other, each with these parts, then the output norm.
#define PADDED(n) (((n) + 31) / 32 * 32)
enum {
    V_ATTN_NORM = 0,
    V_FFN_NORM = V_ATTN_NORM + PADDED(N_EMBD),
    V_BIAS = V_FFN_NORM + PADDED(N_EMBD),
    V_Q_NORM = V_BIAS + (QKV_BIAS ? PADDED(QKV_WIDTH) : 0),
    V_K_NORM = V_Q_NORM + (QK_NORM ? PADDED(HEAD_DIM) : 0),
    V_LAYER = V_K_NORM + (QK_NORM ? PADDED(HEAD_DIM) : 0)
};

// The values of a chunk by one warp: put(row, column, four values) for every row of the tile and every four columns.
template <class B, class PUT>
DEVICE void unpack_codes(const u8* chunk, int lane, PUT put) {
    const typename B::Head h = B::head(chunk, lane);
#pragma unroll
    for (int p = 0; p < B::COLS / 64; p++) {
        Codes a[2];
        B::pair(chunk, h, lane, p, a);
#pragma unroll
        for (int i = 0; i < 8; i++) {  // word i % 4 of step i / 4
            const int step = p * 2 + i / 4, half = i % 4 / 2, low = i % 2;
            const int group = B::GROUP == 32 ? step : step * 2 + half;
            const float scale = B::factor(h, low) * B::scale(h, low, group) * B::UNIT;
            const float least = B::MINS ? B::least_factor(h, low) * B::least(h, low, group) : 0.0f;
            float v[4];
#pragma unroll
            for (int b = 0; b < 4; b++) {
                const u32 word = a[i / 4][i % 4];
                const float code = B::MINS ? byte_float(word, b) : (float)(s8)byte_of(word, b);
                v[b] = B::MINS ? fmaf(scale, code, least) : scale * code;
            }
            put(lane / 4 + low * 8, step * STEP + half * 16 + lane % 4 * 4, float4{v[0], v[1], v[2], v[3]});
        }
    }
}

template <class B, class PUT>
DEVICE void unpack_floats(const u8* chunk, int lane, PUT put) {
#pragma unroll 1
    for (int i = 0; i < 8; i++) {
        const int step = i / 2, low = i % 2, column = step * STEP + lane % 4 * 4;
        float v[8];
        B::values(chunk, lane, step, low, v);
        put(lane / 4 + low * 8, column, float4{v[0], v[1], v[2], v[3]});
        put(lane / 4 + low * 8, column + 16, float4{v[4], v[5], v[6], v[7]});
    }
}

struct ChunkShape {
    int columns, bytes;
};

// Of a type that the model has.
DEVICE ChunkShape chunk_shape(int type) {
#define CASE(T) if (HAS(T) && type == TYPE_##T) return {T::COLS, T::BYTES};
    ALL_TYPES(CASE, CASE)
#undef CASE
    return {128, 0};
}

template <class PUT>
DEVICE void unpack(int type, const u8* chunk, int lane, PUT put) {
#define CODES(T) if (HAS(T) && type == TYPE_##T) return unpack_codes<T>(chunk, lane, put);
#define FLOATS(T) if (HAS(T) && type == TYPE_##T) return unpack_floats<T>(chunk, lane, put);
    ALL_TYPES(CODES, FLOATS)
#undef CODES
#undef FLOATS
}

// Row `token` of token_embd to shared or device memory, by `warps` warps.
DEVICE void embed(const u8* embd, int token, float* to, int warp, int warps, int lane) {
    const ChunkShape shape = chunk_shape(EMBD_TYPE);
    const int chunks = (N_EMBD + shape.columns - 1) / shape.columns;
    for (int i = warp; i < chunks; i += warps)
        unpack(EMBD_TYPE, embd + ((long long)(token / TILE_ROWS) * chunks + i) * shape.bytes, lane,
               [&](int row, int column, float4 v) {
                   column += i * shape.columns;
                   if (row == token % TILE_ROWS && column < N_EMBD) *(float4*)(to + column) = v;
               });
}

#if KV_HALF
typedef u16 Cached;
DEVICE Cached to_cache(float x) { return float_to_half(x); }
DEVICE float from_cache(Cached x) { return half_to_float(x); }
#else
typedef float Cached;
DEVICE Cached to_cache(float x) { return x; }
DEVICE float from_cache(Cached x) { return x; }
#endif

struct Eight {
    float at[8];
};

DEVICE Eight read_eight(const float* from) {
    const float4 a = *(const float4*)from, b = *(const float4*)(from + 4);
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

// Eight numbers of the cache as they lie there.
struct CachedEight {
#if KV_HALF
    uint4 raw;
    DEVICE void load(const Cached* from) { raw = load_shared_line(from); }
    DEVICE void store(Cached* to) const { *(uint4*)to = raw; }
    DEVICE void round(const Eight& e) {
        raw = {halves(e.at[0], e.at[1]), halves(e.at[2], e.at[3]), halves(e.at[4], e.at[5]), halves(e.at[6], e.at[7])};
    }
    DEVICE Eight floats() const {
        return {{low_half(raw.x), high_half(raw.x), low_half(raw.y), high_half(raw.y), low_half(raw.z), high_half(raw.z),
                 low_half(raw.w), high_half(raw.w)}};
    }
#else
    uint4 raw[2];
    DEVICE void load(const Cached* from) { raw[0] = load_shared_line(from), raw[1] = load_shared_line(from + 4); }
    DEVICE void store(Cached* to) const { *(uint4*)to = raw[0], *(uint4*)(to + 4) = raw[1]; }
    DEVICE void round(const Eight& e) {
        for (int i = 0; i < 2; i++)
            raw[i] = {__float_as_uint(e.at[4 * i]), __float_as_uint(e.at[4 * i + 1]), __float_as_uint(e.at[4 * i + 2]),
                      __float_as_uint(e.at[4 * i + 3])};
    }
    DEVICE Eight floats() const {
        return {{bits_float(raw[0].x), bits_float(raw[0].y), bits_float(raw[0].z), bits_float(raw[0].w), bits_float(raw[1].x),
                 bits_float(raw[1].y), bits_float(raw[1].z), bits_float(raw[1].w)}};
    }
#endif
};

#define SCORE_SCALE (1.0f / sqrtf((float)HEAD_DIM))

struct Softened {  // a running softmax-weighted sum: the largest score, the sum of powers, the weighted values
    float most, sum;
    Eight values;
};

DEVICE float power(float score, float most) { return score == -INF ? 0.0f : expf(score - most); }

// Some keys more. A score of -INF is no key.
template <int N>
DEVICE void add_keys(Softened& s, const float (&scores)[N], const Eight (&v)[N]) {
    float most = s.most;
#pragma unroll
    for (int n = 0; n < N; n++) most = fmaxf(most, scores[n]);
    const float old = power(s.most, most);
    s.most = most, s.sum *= old;
#pragma unroll
    for (int i = 0; i < 8; i++) s.values.at[i] *= old;
#pragma unroll
    for (int n = 0; n < N; n++) {
        const float share = power(scores[n], most);
        s.sum += share;
#pragma unroll
        for (int i = 0; i < 8; i++) s.values.at[i] = fmaf(share, v[n].at[i], s.values.at[i]);
    }
}

// The sums of a warp's groups of lanes as one. Every lane is left with `MERGED` of the values, the first of which is
// channel `offset` of its eight.
#define MERGED (LANES_A_KEY / 4)
DEVICE int merge_groups(Softened& mine, int lane) {
    float most = mine.most;
#pragma unroll
    for (int step = LANES_A_KEY; step < 32; step <<= 1) most = fmaxf(most, __shfl_xor_sync(FULL, most, step));
    const float factor = power(mine.most, most);
    mine.most = most, mine.sum *= factor;
#pragma unroll
    for (int i = 0; i < 8; i++) mine.values.at[i] *= factor;
    int offset = 0, n = 4;
#pragma unroll
    for (int step = LANES_A_KEY; step < 32; step <<= 1, n >>= 1) {
        const bool upper = lane & step;
        mine.sum += __shfl_xor_sync(FULL, mine.sum, step);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i >= n) break;
            const float other = upper ? mine.values.at[i] : mine.values.at[n + i];
            const float own = upper ? mine.values.at[n + i] : mine.values.at[i];
            mine.values.at[i] = own + __shfl_xor_sync(FULL, other, step);
        }
        if (upper) offset += n;
    }
    return offset;
}

// What decoding one token and running a prompt have in common: the model's macros, rows of the embedding, the cache's
// numbers and the running softmax.
//
// Macros: N_EMBD, N_FF, N_HEAD, N_HEAD_KV, HEAD_DIM, N_LAYER, N_VOCAB, NORM_EPS, QKV_BIAS, QK_NORM, TYPES (a bit for
// each type that the model has), EMBD_TYPE, KV_HALF.

#define Q_WIDTH (N_HEAD * HEAD_DIM)
#define KV_WIDTH (N_HEAD_KV * HEAD_DIM)
#define QKV_WIDTH (Q_WIDTH + 2 * KV_WIDTH)
#define LANES_A_KEY (HEAD_DIM <= 32 ? 4 : HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : 32)  // 8 channels each

struct Layer {
    const float *attn_norm, *ffn_norm, *qkv_bias, *q_norm, *k_norm;
};

// The values of a chunk by one warp: put(row, column, four values) for every row of the tile and every four columns.
template <class B, class PUT>
DEVICE void unpack_codes(const u8* chunk, int lane, PUT put) {
    const typename B::Head head = B::head(chunk, lane);
#pragma unroll
    for (int p = 0; p < B::COLS / 64; p++) {
        Codes a[2];
        B::pair(chunk, head, lane, p, a);
#pragma unroll
        for (int i = 0; i < 8; i++) {  // word i % 4 of step i / 4
            const int step = p * 2 + i / 4, half = i % 4 / 2, low = i % 2;
            const int group = B::GROUP == 32 ? step : step * 2 + half;
            const float scale = B::scale(head, low, group), least = B::MINS ? B::least(head, low, group) : 0.0f;
            float v[4];
#pragma unroll
            for (int b = 0; b < 4; b++) {
                const u32 byte = byte_of(a[i / 4][i % 4], b);
                const float code = B::SIGNED ? (float)(s8)byte : small_float(byte) - B::ZERO;
                v[b] = B::MINS ? fmaf(scale, code, least) : scale * code;
            }
            put(lane / 4 + low * 8, step * STEP + half * 16 + lane % 4 * 4, float4{v[0], v[1], v[2], v[3]});
        }
    }
}

template <class B, class PUT>
DEVICE void unpack_floats(const u8* chunk, int lane, PUT put) {
#pragma unroll
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

DEVICE Eight load_cached(const Cached* from) {
    Eight e;
#if KV_HALF
    const uint4 w = load_shared_line(from);
    for (int i = 0; i < 4; i++) e.at[2 * i] = low_half(word_of(w, i)), e.at[2 * i + 1] = high_half(word_of(w, i));
#else
    const uint4 w = load_shared_line(from), z = load_shared_line(from + 4);
    for (int i = 0; i < 4; i++) e.at[i] = bits_float(word_of(w, i)), e.at[4 + i] = bits_float(word_of(z, i));
#endif
    return e;
}

struct Softened {  // a running softmax-weighted sum: the largest score, the sum of powers, the weighted values
    float most, sum;
    Eight values;
};

DEVICE float power(float score, float most) { return score == -INF ? 0.0f : expf(score - most); }

DEVICE void add_key(Softened& s, float score, const Eight& v) {
    const float most = fmaxf(s.most, score), old = power(s.most, most), now = expf(score - most);
    s.most = most, s.sum = s.sum * old + now;
    for (int i = 0; i < 8; i++) s.values.at[i] = fmaf(now, v.at[i], s.values.at[i] * old);
}


// The sums of a warp's groups of lanes as one.
DEVICE void merge_groups(Softened& mine) {
    for (int step = LANES_A_KEY; step < 32; step <<= 1) {
        const float other = __shfl_xor_sync(FULL, mine.most, step), most = fmaxf(mine.most, other);
        const float old = power(mine.most, most), its = power(other, most);
        mine.sum = mine.sum * old + __shfl_xor_sync(FULL, mine.sum, step) * its;
        for (int i = 0; i < 8; i++)
            mine.values.at[i] = mine.values.at[i] * old + __shfl_xor_sync(FULL, mine.values.at[i], step) * its;
        mine.most = most;
    }
}

// A whole token in one launch: every multiprocessor runs one block from the embedding to the logits, for as many
// tokens as asked.
//
// The layers are five phases. Each block owns some tiles of every matrix; it takes the phase's input vector,
// multiplies its tiles and hands its rows on:
//
//     QKV    x (E) -> norm -> q, k, v with biases          every block that owns rows of q, k, v or of the output
//     attend q, k, v -> rope -> scores, softmax, values    one block a head and stretch of keys; also writes the cache
//     OUT    attention (HD) -> x1 = x + product
//     GATE   x1 -> norm -> silu(gate) · up (F)
//     DOWN   a slice of F -> partial sums of x1 + product   (the next QKV adds the slices in order)
//     HEAD   after the last layer: x -> norm -> logits, the largest, the next token
//
// Vectors travel between blocks as words with an epoch (device.cuh), one epoch a layer and token: the reader waits
// for each word, so there is no barrier over the grid. A vector is overwritten one layer later; everybody who reads
// it takes part in the phase it is read for, without whose output nobody gets as far as overwriting it.
//
// Weights do not wait for anything. Each warp has a list of its pieces (`units`) for the whole token and a ring in shared
// memory; one more warp, the courier, copies the units there as soon as there is room, across phases and layers.
// Where the device has no bulk copies (before 9.0), there is no courier and units are read where they lie. The order
// of every sum is fixed, so two runs agree in every bit.
//
// Compiled for one model (macros: model.cuh) and one plan: WARPS, SLICES, MAX_SPLITS, VECTOR_CHUNKS, SLOTS, RING_BYTES,
// GATES.

#define THREADS (WARPS * 32)  // that work; the courier's 32 come on top
#define COURIER (RING_BYTES > 0)
#define CHUNKS_OF(columns) (((columns) + 127) / 128)
#define KEYS_AT_ONCE (THREADS / LANES_A_KEY)
#ifndef KEYS_A_SPLIT
#define KEYS_A_SPLIT 192
#endif

enum { QKV, OUT, GATE, DOWN, PHASES, HEAD = PHASES };

struct Plan {
    const uint4* units;       // what each warp multiplies, in order: see Unit
    const uint2* lists;       // [block][warp] first unit, number of units
    const uint4* spans;       // [layer · PHASES + phase][block]: see Span
    const uint2* tiles;       // row; slot | pieces << 11 | valid rows << 22
    const float* vectors;     // norms and biases: model.cuh
    const u8* embd;           // token_embd as tiles
    const float2* rope;       // [position][HEAD_DIM / 2] cos, sin
    // vectors on their way between blocks
    uint2 *qkv, *heads, *shares, *x1, *act, *x2, *best;
};

// Steps of one token for a trace, [layer][TRACE_SIZE]; the scores lie elsewhere, [layer][head][keys].
enum {
    T_ATTN_NORM = 0,
    T_PROJ = T_ATTN_NORM + N_EMBD,
    T_BIAS = T_PROJ + QKV_WIDTH,
    T_HEAD_NORM = T_BIAS + QKV_WIDTH,
    T_ROPE = T_HEAD_NORM + Q_WIDTH + KV_WIDTH,
    T_KQV = T_ROPE + Q_WIDTH + KV_WIDTH,
    T_ATTN_OUT = T_KQV + Q_WIDTH,
    T_FFN_INP = T_ATTN_OUT + N_EMBD,
    T_FFN_NORM = T_FFN_INP + N_EMBD,
    T_GATE = T_FFN_NORM + N_EMBD,
    T_UP = T_GATE + N_FF,
    T_ACT = T_UP + N_FF,
    T_DOWN = T_ACT + N_FF,
    T_L_OUT = T_DOWN + SLICES * N_EMBD,
    TRACE_SIZE = T_L_OUT + N_EMBD
};

struct Span {  // what one block does in one phase
    uint4 raw;
    DEVICE int first_tile() const { return raw.x; }
    DEVICE int tiles() const { return raw.y & 0xffff; }
    DEVICE bool takes_part() const { return raw.y >> 16 & 1; }
    DEVICE bool paired() const { return raw.y >> 17 & 1; }  // gate and up rows share tiles
    DEVICE bool mins() const { return raw.y >> 18 & 1; }    // some tile's type has them
    DEVICE int first_chunk() const { return raw.z; }        // of the input vector, 128 columns each
    DEVICE int chunks() const { return raw.w; }
};

struct Unit {  // some chunks of one tile
    uint4 raw;
    DEVICE const u8* source() const { return (const u8*)((u64)raw.y << 32 | raw.x); }
    DEVICE u32 bytes() const { return (raw.z & 0xfff) * 16; }
    DEVICE u32 place() const { return (raw.z >> 12 & 0xfff) * 16; }  // in the ring
    DEVICE u32 ahead() const { return raw.z >> 24 & 7; }  // units that may wait in the ring when this is fetched
    DEVICE u32 skips() const { return raw.z >> 27; }      // phases that the warp has no part in before this one
    DEVICE int type() const { return raw.w & 31; }
    DEVICE int chunk() const { return raw.w >> 5 & 511; }
    DEVICE int slot() const { return raw.w >> 14 & 2047; }
    DEVICE int count() const { return raw.w >> 25 & 7; }
    DEVICE bool begins() const { return raw.w >> 28 & 1; }
    DEVICE bool ends() const { return raw.w >> 29 & 1; }
    DEVICE bool last() const { return raw.w >> 30 & 1; }  // of this warp in this phase
    DEVICE bool empty() const { return raw.w >> 31; }
};

struct Shared {
    u8* ring;
    Vector x;
    float *red, *residual1, *residual2, *squares, *q, *k, *v, *merge, *rms;
    u64* gates;
    Plan* plan;
    u32* used;  // units that each warp is done with
};

#define CACHED_FLOATS (2 * N_EMBD + CHUNKS_OF(N_EMBD) + WARPS + 3 * HEAD_DIM + WARPS * (HEAD_DIM + 2) + 8)
#define SHARED_TOTAL                                                                                   \
    (WARPS * RING_BYTES + VECTOR_BYTES(VECTOR_CHUNKS) + SLOTS * 64 + WARPS * GATES * 8 + (int)sizeof(Plan) + \
     CACHED_FLOATS * 4)

DEVICE Shared shared_at(u8* at) {
    Shared s;
    s.ring = at, at += WARPS * RING_BYTES;
    s.x = vector_at(at, VECTOR_CHUNKS), at += VECTOR_BYTES(VECTOR_CHUNKS);
    s.red = (float*)at, at += SLOTS * 64;
    s.gates = (u64*)at, at += WARPS * GATES * 8;
    s.plan = (Plan*)at, at += sizeof(Plan);
    float* f = (float*)at;
    s.residual1 = f, f += N_EMBD;
    s.residual2 = f, f += N_EMBD;
    s.q = f, f += HEAD_DIM;
    s.k = f, f += HEAD_DIM;
    s.v = f, f += HEAD_DIM;
    s.merge = f, f += WARPS * (HEAD_DIM + 2);
    s.rms = f, f += 8;
    s.used = (u32*)f, f += WARPS;
    s.squares = f;
    return s;
}

DEVICE void sync_workers() { sync_first(THREADS); }

DEVICE float4 times(float4 a, float4 b) { return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w}; }
DEVICE float4 plus(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }
DEVICE float squares(float4 a) { return a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w; }

// --- words between blocks ------------------------------------------------------------------------------------------

DEVICE float take(const uint2* from, u32 epoch) {
    uint2 word = peek_word(from);
    while (word.y != epoch) word = peek_word(from);
    return bits_float(word.x);
}

DEVICE float2 take2(const uint2* from, u32 epoch) {
    uint4 two = peek_words(from);
    while (two.y != epoch || two.w != epoch) two = peek_words(from);
    return {bits_float(two.x), bits_float(two.z)};
}

DEVICE float4 take4(const uint2* from, u32 epoch) {
    uint4 a = peek_words(from), b = peek_words(from + 2);
    while (a.y != epoch || a.w != epoch || b.y != epoch || b.w != epoch) a = peek_words(from), b = peek_words(from + 2);
    return {bits_float(a.x), bits_float(a.z), bits_float(b.x), bits_float(b.z)};
}

// The sum of SLICES vectors, N_EMBD apart, in order; two of them are waited for at once.
DEVICE float4 take_slices(const uint2* from, u32 epoch) {
    float4 sum;
#pragma unroll
    for (int slice = 0; slice < SLICES; slice += 2) {
        const uint2 *one = from + slice * N_EMBD, *two = slice + 1 < SLICES ? one + N_EMBD : one;
        uint4 a, b, c, d;
        do {
            a = peek_words(one), b = peek_words(one + 2), c = peek_words(two), d = peek_words(two + 2);
        } while (a.y != epoch || a.w != epoch || b.y != epoch || b.w != epoch || c.y != epoch || c.w != epoch ||
                 d.y != epoch || d.w != epoch);
        const float4 x = {bits_float(a.x), bits_float(a.z), bits_float(b.x), bits_float(b.z)};
        sum = slice ? plus(sum, x) : x;
        if (slice + 1 < SLICES) sum = plus(sum, {bits_float(c.x), bits_float(c.z), bits_float(d.x), bits_float(d.z)});
    }
    return sum;
}

DEVICE void give(uint2* to, float value, u32 epoch) { put_word(to, __float_as_uint(value), epoch); }

// --- a warp's stream of weights ------------------------------------------------------------------------------------

// The list is read 32 units at a time, one a lane, and the next 32 long before they are needed.
struct Stream {
    const uint4* list;
    u32 length;      // units a token
    u32 used;        // units multiplied
    u32 arrivals;    // of these, the ones that were copied: they number the gates
    u32 idle;        // phases to skip
    uint4 even, odd; // this lane's unit of the two batches of 32 at hand
    Unit now;
    const u8* ring;
    u64* gates;
    volatile u32* told;  // `used`, as the courier knows it

    DEVICE uint4 batch(u32 number) const { return list[(number * 32 + threadIdx.x % 32) % length]; }

    DEVICE Unit unit(u32 at) const {
        const uint4 mine = at & 32 ? odd : even;
        const int lane = at & 31;
        Unit unit;
        unit.raw = {__shfl_sync(FULL, mine.x, lane), __shfl_sync(FULL, mine.y, lane), __shfl_sync(FULL, mine.z, lane),
                    __shfl_sync(FULL, mine.w, lane)};
        return unit;
    }

    DEVICE void open(const Shared& s, int warp) {
        const uint2 mine = s.plan->lists[blockIdx.x * WARPS + warp];
        list = s.plan->units + mine.x, length = mine.y;
        used = arrivals = 0;
        even = batch(0), odd = batch(1);
        now = unit(0);
        idle = now.skips();
        ring = s.ring + warp * RING_BYTES, gates = s.gates + warp * GATES, told = s.used + warp;
    }

    // Wait until the unit's weights are at hand.
    DEVICE void expect() const {
#if HAS_BULK_COPY
        if (COURIER && !now.empty()) gate_wait(gates + arrivals % GATES, arrivals / GATES & 1);
#endif
    }
    DEVICE const u8* weights() const { return COURIER ? ring + now.place() : now.source(); }

    DEVICE void next() {
        if (!now.empty()) arrivals++;
        used++;
        if (used % 64 == 0) odd = batch(used / 32 + 1);
        if (used % 64 == 32) even = batch(used / 32 + 1);
        __syncwarp();  // all lanes have read the place that is free now
        if (threadIdx.x % 32 == 0) *told = used;
        now = unit(used);
    }
};

#if HAS_BULK_COPY
// The courier: lane w serves warp w for `tokens` tokens.
DEVICE void carry(const Shared& s, int lane, u32 tokens) {
    if (lane >= WARPS) return;
    const uint2 mine = s.plan->lists[blockIdx.x * WARPS + lane];
    const uint4* list = s.plan->units + mine.x;
    const u32 length = mine.y, total = length * tokens;
    const u64 policy = read_once();
    volatile u32* used = s.used + lane;
    u64* gates = s.gates + lane * GATES;
    u8* ring = s.ring + lane * RING_BYTES;
    Unit unit, soon;
    u32 at = length > 1 ? 1 : 0, copies = 0;
    unit.raw = list[0], soon.raw = list[at];
    for (u32 fetched = 0; fetched < total;) {
        if (fetched > *used + unit.ahead()) {
            pause();
            continue;
        }
        if (!unit.empty()) {
            copy_start(ring + unit.place(), unit.source(), unit.bytes(), gates + copies % GATES, policy);
            copies++;
        }
        fetched++;
        at = at + 1 == length ? 0 : at + 1;
        unit = soon;
        soon.raw = list[at];
    }
}
#endif

// Multiply this warp's units of the phase; the sums of each piece of a tile go to its slot.
DEVICE void run_units(Stream& stream, const Shared& s, int lane) {
    if (stream.idle) {
        stream.idle--;
        return;
    }
    float acc[2] = {0, 0};
#pragma unroll 1
    for (bool more = true; more; stream.next()) {
        const Unit unit = stream.now;
        more = !unit.last();
        stream.expect();
        if (unit.empty()) continue;
        if (unit.begins()) acc[0] = acc[1] = 0;
        multiply(unit.type(), stream.weights(), unit.count(), s.x, unit.chunk(), lane, acc);
        if (!unit.ends()) continue;
        gather(!is_float_type(unit.type()), lane, acc);
        if (lane % 4 == 0) {
            s.red[unit.slot() * 16 + lane / 4] = acc[0];
            s.red[unit.slot() * 16 + lane / 4 + 8] = acc[1];
        }
    }
    stream.idle = stream.now.skips();
}

// --- what a block has to say at the end of a phase -----------------------------------------------------------------

struct Tile {
    uint2 raw;
    DEVICE int row() const { return raw.x; }
    DEVICE int slot() const { return raw.y & 2047; }
    DEVICE int pieces() const { return raw.y >> 11 & 2047; }
    DEVICE int valid() const { return raw.y >> 22; }
};

DEVICE Tile tile_at(const Plan& plan, const Span& span, int index) {
    Tile tile;
    tile.raw = plan.tiles[span.first_tile() + index];
    return tile;
}

DEVICE float row_sum(const Shared& s, const Tile& tile, int row) {
    const float* at = s.red + tile.slot() * 16 + row;
    float sum = at[0];
#pragma unroll 4
    for (int i = 1; i < tile.pieces(); i++) sum += at[i * 16];
    return sum;
}

// 1 / sqrt(mean(x²) + eps) from the sums that the warps left.
DEVICE float inverse_rms(const Shared& s, int lane) {
    constexpr int chunks = CHUNKS_OF(N_EMBD);
    constexpr int span = chunks > 16 ? 32 : chunks > 8 ? 16 : chunks > 4 ? 8 : 4;
    float sum = 0;
#pragma unroll 1
    for (int i = lane % span; i < chunks; i += span) sum += s.squares[i];
#pragma unroll
    for (int step = span / 2; step; step >>= 1) sum += __shfl_xor_sync(FULL, sum, step);
    return rsqrtf(sum * (1.0f / N_EMBD) + NORM_EPS);
}

// --- attention -----------------------------------------------------------------------------------------------------

// A head of q or k by one warp: norm, rotation; `to` gets HEAD_DIM channels.
DEVICE void turn_head(const uint2* from, const float* norm, const float2* rope, float* to, u32 epoch, float* traced_norm,
                      int lane) {
    constexpr int half = HEAD_DIM / 2, each = (half + 31) / 32;
    float low[each], high[each], low_norm[each], high_norm[each], squares = 0;
    float2 turn[each];
#pragma unroll
    for (int n = 0; n < each; n++) {  // before the wait
        const int i = min(lane + 32 * n, half - 1);
        turn[n] = rope[i];
        if (QK_NORM) low_norm[n] = norm[i], high_norm[n] = norm[half + i];
    }
#pragma unroll
    for (int n = 0; n < each; n++) {
        const int i = lane + 32 * n;
        low[n] = i < half ? take(from + i, epoch) : 0.0f;
        high[n] = i < half ? take(from + half + i, epoch) : 0.0f;
        squares += low[n] * low[n] + high[n] * high[n];
    }
    const float factor = QK_NORM ? 1.0f / sqrtf(warp_sum(squares) / HEAD_DIM + NORM_EPS) : 1.0f;
#pragma unroll
    for (int n = 0; n < each; n++) {
        const int i = lane + 32 * n;
        if (i >= half) continue;
        if (QK_NORM) low[n] = low[n] * factor * low_norm[n], high[n] = high[n] * factor * high_norm[n];
        if (QK_NORM && traced_norm) traced_norm[i] = low[n], traced_norm[half + i] = high[n];
        to[i] = low[n] * turn[n].x - high[n] * turn[n].y;
        to[half + i] = low[n] * turn[n].y + high[n] * turn[n].x;
    }
}

struct Call {  // one launch
    Cached *keys, *values;  // [layer][kv head][n_ctx][HEAD_DIM]
    int n_ctx, position, layer;
    int splits, length;  // stretches of keys, and keys in each
    u32 epoch;
    float* trace;   // steps of this layer, or null
    float* scores;  // [head][position + 1] of this layer, or null
};

// What a lane reads of KEYS_IN_FLIGHT keys at once; as many again are on their way.
#define KEYS_IN_FLIGHT (KV_HALF ? 2 : 1)
struct Keys {
    CachedEight k[KEYS_IN_FLIGHT], v[KEYS_IN_FLIGHT];

    // Those of positions base, base + KEYS_AT_ONCE, … below `end`.
    DEVICE void load(const Cached* keys, const Cached* values, int base, int end) {
#pragma unroll
        for (int i = 0; i < KEYS_IN_FLIGHT; i++) {
            const int key = base + i * KEYS_AT_ONCE;
            k[i] = {}, v[i] = {};
            if (key < end) k[i].load(keys + (long long)key * HEAD_DIM), v[i].load(values + (long long)key * HEAD_DIM);
        }
    }
};

// One head over one stretch of the keys. Groups of LANES_A_KEY lanes take every KEYS_AT_ONCE-th key.
DEVICE void attend(const Plan& plan, const Shared& s, const Call& call, int head, int split, int warp, int lane) {
    const int kv_head = head / (N_HEAD / N_HEAD_KV), n_keys = call.position + 1;
    const int first = split * call.length, end = min(first + call.length, n_keys);
    const bool keeper = end == n_keys && head % (N_HEAD / N_HEAD_KV) == 0;  // writes this position's key and value
    const int group = threadIdx.x / LANES_A_KEY, channel = threadIdx.x % LANES_A_KEY * 8;
    const bool inside = channel < HEAD_DIM;
    const long long cache = ((long long)call.layer * N_HEAD_KV + kv_head) * call.n_ctx * HEAD_DIM + channel;
    Cached *keys = call.keys + cache, *values = call.values + cache;
    const int cached_end = inside ? min(end, call.position) : 0;  // this position's key comes from the projections
    Keys window, next;
    window.load(keys, values, first + group, cached_end);
    const float2* rope = plan.rope + (long long)call.position * (HEAD_DIM / 2);
    const float* vectors = plan.vectors + (long long)call.layer * V_LAYER;
    if (warp < 2) {
        const bool query = warp == 0;
        const int at = query ? head * HEAD_DIM : Q_WIDTH + kv_head * HEAD_DIM;
        float* traced = call.trace && (query ? split == 0 : keeper) ? call.trace + T_HEAD_NORM + at : nullptr;
        turn_head(plan.qkv + at, vectors + (query ? V_Q_NORM : V_K_NORM), rope, query ? s.q : s.k, call.epoch, traced, lane);
    } else if (warp == 2) {
        for (int i = lane; i < HEAD_DIM; i += 32)
            s.v[i] = take(plan.qkv + Q_WIDTH + KV_WIDTH + kv_head * HEAD_DIM + i, call.epoch);
    }
    sync_workers();
    if (call.trace)
        for (int i = threadIdx.x; i < HEAD_DIM; i += THREADS) {
            if (split == 0) call.trace[T_ROPE + head * HEAD_DIM + i] = s.q[i];
            if (keeper) call.trace[T_ROPE + Q_WIDTH + kv_head * HEAD_DIM + i] = s.k[i];
        }
    Softened mine = {-INF, 0, {}};
    Eight q = {};
    if (inside) q = read_eight(s.q + channel);
    const int stride = KEYS_IN_FLIGHT * KEYS_AT_ONCE;
    const auto take_in = [&](Keys& window, int base) {
        float all[KEYS_IN_FLIGHT];
        Eight v[KEYS_IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < KEYS_IN_FLIGHT; i++) {
            const int key = base + i * KEYS_AT_ONCE + group;
            if (inside && key == call.position) {
                window.k[i].round(read_eight(s.k + channel)), window.v[i].round(read_eight(s.v + channel));
                if (keeper) window.k[i].store(keys + (long long)key * HEAD_DIM);
                if (keeper) window.v[i].store(values + (long long)key * HEAD_DIM);
            }
            const Eight k = window.k[i].floats();
            v[i] = window.v[i].floats();
            float score = 0;
#pragma unroll
            for (int c = 0; c < 8; c++) score = fmaf(q.at[c], k.at[c], score);
#pragma unroll
            for (int step = LANES_A_KEY / 2; step; step >>= 1) score += __shfl_xor_sync(FULL, score, step);
            all[i] = key < end ? score * SCORE_SCALE : -INF;
            if (call.scores && key < end && channel == 0) call.scores[(long long)head * n_keys + key] = all[i];
        }
        add_keys(mine, all, v);
    };
#pragma unroll 1
    for (int base = first; base < end; base += 2 * stride) {  // the next keys are on their way while these are taken in
        next.load(keys, values, base + stride + group, cached_end);
        take_in(window, base);
        if (base + stride >= end) break;
        window.load(keys, values, base + 2 * stride + group, cached_end);
        take_in(next, base + stride);
    }
    const int offset = channel + merge_groups(mine, lane);
    float* part = s.merge + warp * (HEAD_DIM + 2);
    if (inside)
#pragma unroll
        for (int i = 0; i < MERGED; i++) part[offset + i] = mine.values.at[i];
    if (lane == 0) part[HEAD_DIM] = mine.most, part[HEAD_DIM + 1] = mine.sum;
    sync_workers();
    if (warp * 32 < HEAD_DIM) {  // the warps' parts: lane w weighs part w
        const float* its = s.merge + min(lane, WARPS - 1) * (HEAD_DIM + 2) + HEAD_DIM;
        const float its_most = lane < WARPS ? its[0] : -INF;
        float most = its_most;
        for (int step = 16; step; step >>= 1) most = fmaxf(most, __shfl_xor_sync(FULL, most, step));
        const float factor = power(its_most, most), sum = warp_sum(lane < WARPS ? its[1] * factor : 0.0f);
        const int i = threadIdx.x, task = head * MAX_SPLITS + split;
        float value = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            value = fmaf(s.merge[w * (HEAD_DIM + 2) + min(i, HEAD_DIM - 1)], __shfl_sync(FULL, factor, w), value);
        if (i < HEAD_DIM) give(plan.heads + task * HEAD_DIM + i, __fdividef(value, sum), call.epoch);
        if (i == 0 && call.splits > 1) give(plan.shares + task * 2, most, call.epoch);
        if (i == 0 && call.splits > 1) give(plan.shares + task * 2 + 1, sum, call.epoch);
    }
    if (keeper) __threadfence();  // the cache is read by others one token later
    sync_workers();              // the next task of this block reuses the buffers
}

// Four channels of the attention's output, several stretches of keys merged; BATCH of them are asked for at once.
#define BATCH 3
DEVICE float4 take_stretches(const Plan& plan, int column, int splits, u32 epoch) {
    const int task = column / HEAD_DIM * MAX_SPLITS;
    const uint2 *shares = plan.shares + task * 2, *parts = plan.heads + task * HEAD_DIM + column % HEAD_DIM;
    float most = -INF, sum = 0;
    float4 value = {0, 0, 0, 0};
#pragma unroll 1
    for (int first = 0; first < splits; first += BATCH) {
        uint4 share[BATCH], left[BATCH], right[BATCH];
        bool there;
        do {
            there = true;
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                const int split = min(first + i, splits - 1);
                share[i] = peek_words(shares + split * 2);
                left[i] = peek_words(parts + split * HEAD_DIM), right[i] = peek_words(parts + split * HEAD_DIM + 2);
            }
#pragma unroll
            for (int i = 0; i < BATCH; i++)
                there &= share[i].y == epoch && share[i].w == epoch && left[i].y == epoch && left[i].w == epoch &&
                         right[i].y == epoch && right[i].w == epoch;
        } while (!there);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            if (first + i >= splits) break;
            const float its = bits_float(share[i].x), larger = fmaxf(most, its);
            const float old = power(most, larger), now = power(its, larger) * bits_float(share[i].z);
            value.x = fmaf(bits_float(left[i].x), now, value.x * old);
            value.y = fmaf(bits_float(left[i].z), now, value.y * old);
            value.z = fmaf(bits_float(right[i].x), now, value.z * old);
            value.w = fmaf(bits_float(right[i].z), now, value.w * old);
            sum = sum * old + now, most = larger;
        }
    }
    const float share = __fdividef(1.0f, sum);
    return {value.x * share, value.y * share, value.z * share, value.w * share};
}

// --- the largest logit ---------------------------------------------------------------------------------------------

struct Best {  // of the logits seen: the largest, the first index that has it, the sum of exp(logit - largest)
    float value;
    int index;
    float sum;
};

DEVICE bool beats(float value, int index, const Best& best) {
    return value > best.value || (value == best.value && index < best.index);
}

DEVICE Best best_of_warp(Best mine) {
    const float before = mine.value;
#pragma unroll 1
    for (int step = 16; step; step >>= 1) {
        const float value = __shfl_xor_sync(FULL, mine.value, step);
        const int index = __shfl_xor_sync(FULL, mine.index, step);
        if (beats(value, index, mine)) mine.value = value, mine.index = index;
    }
    mine.sum = warp_sum(mine.sum * power(before, mine.value));
    return mine;
}

// What the blocks found, by one warp.
DEVICE Best take_best(const Plan& plan, u32 epoch, int lane) {
    Best mine = {-INF, 0x7fffffff, 0};
    for (int block = lane; block < (int)gridDim.x; block += 32) {
        const float2 found = take2(plan.best + block * 4, epoch);
        const float more = take(plan.best + block * 4 + 2, epoch), before = mine.value;
        if (beats(found.x, __float_as_int(found.y), mine)) mine.value = found.x, mine.index = __float_as_int(found.y);
        mine.sum = mine.sum * power(before, mine.value) + more * power(found.x, mine.value);
    }
    mine = best_of_warp(mine);
    if (mine.index >= N_VOCAB) mine.index = 0;  // every logit is NaN
    return mine;
}

// --- the phases ----------------------------------------------------------------------------------------------------

// What a block is doing. `bring` fetches a phase's vector into shared memory, `hand_on` gives its rows away.
struct Block {
    const Plan& plan;
    const Shared& s;
    Cached *keys, *values;
    int n_ctx, position, n_given, n;  // n: the layer
    int splits, length;      // stretches of the keys, and keys in each
    u32 epoch;
    float *trace, *scores;  // of the whole token, or null
    int* ids;
    float *chances, *logits;
    const int warp, lane;
    const bool leads;  // the first block keeps the books
    Span span;
    Tile tile;         // of this thread's first row, and that row's bias
    float bias, rms;   // of the vector that was normed; 1 for the others

    DEVICE const float* vectors() const { return plan.vectors + (long long)n * V_LAYER; }
    DEVICE float* traced() const { return trace ? trace + (long long)n * TRACE_SIZE : nullptr; }
    DEVICE float* traced_ends() const { return trace + (long long)N_LAYER * TRACE_SIZE; }  // embd, result_norm

    // What the rows of a phase need and does not depend on its vector: asked for as early as its address is known.
    DEVICE void look_ahead(const Span& next, int phase) {
        span = next;
        const int index = threadIdx.x >> (phase == GATE && span.paired() ? 3 : 4);
        tile.raw = {0, 0};
        if (index < span.tiles()) tile = tile_at(plan, span, index);
    }
    DEVICE void look_further(int phase) {
        if (QKV_BIAS && phase == QKV && threadIdx.x % TILE_ROWS < tile.valid())
            bias = vectors()[V_BIAS + tile.row() + threadIdx.x % TILE_ROWS];
    }

    // The token at step `at` of this launch: a given one, or what the previous head found. All wait for that head in either case:
    // nobody begins a token before everybody has read the last vector of the one before.
    DEVICE int token(int at) const {
        if (at == 0) return ids[0];
        if (warp == 0) {
            const Best best = take_best(plan, epoch - 1, lane);
            if (lane == 0) s.merge[0] = __int_as_float(at < n_given ? ids[at] : best.index);
            if (lane == 0 && leads && at >= n_given) ids[at] = best.index, chances[at] = -logf(best.sum);
        }
        sync_workers();
        return __float_as_int(s.merge[0]);
    }

    DEVICE void attention() const {
        float* to = scores ? scores + (long long)n * N_HEAD * (position + 1) : nullptr;
        const Call call = {keys, values, n_ctx, position, n, splits, length, epoch, traced(), to};
#pragma unroll 1
        for (int task = gridDim.x - 1 - blockIdx.x; task < N_HEAD * splits; task += gridDim.x)
            attend(plan, s, call, task % N_HEAD, task / N_HEAD, warp, lane);
    }

    // Where a phase's vector comes from: the words, and with which epoch they are due.
    DEVICE const uint2* source(int phase, int column) const {
        switch (phase) {
            case OUT: return plan.heads + column / HEAD_DIM * (MAX_SPLITS * HEAD_DIM) + column % HEAD_DIM;
            case GATE: return plan.x1 + column;
            case DOWN: return plan.act + column;
            default: return plan.x2 + column;
        }
    }

    DEVICE float4 take_four(int phase, int column) const {
        const bool after_down = phase == QKV || phase == HEAD;
        if (phase == QKV && n == 0) return *(const float4*)(s.residual1 + column);  // the embedding
        if (phase == OUT && splits > 1) return take_stretches(plan, column, splits, epoch);
        const uint2* from = source(phase, column);
        return after_down ? take_slices(from, epoch - 1) : take4(from, epoch);  // the first slice contains x1
    }

    // The norm's factor is left out here; it is applied to the rows.
    DEVICE void bring(int phase, int at) const {
        if (phase == QKV && n == 0) {
            embed(plan.embd, token(at), s.residual1, warp, WARPS, lane);
            sync_workers();
        }
        const int width = phase == OUT ? Q_WIDTH : phase == DOWN ? N_FF : N_EMBD;
        const int first = phase == DOWN ? span.first_chunk() : 0, chunks = phase == DOWN ? span.chunks() : CHUNKS_OF(width);
        const bool normed = phase != OUT && phase != DOWN;
        const float* weight = vectors() + (phase == GATE ? V_FFN_NORM : V_ATTN_NORM);  // behind the layers: the output norm
        float* residual = phase == GATE ? s.residual2 : s.residual1;
#pragma unroll 1
        for (int chunk = warp; chunk < chunks; chunk += WARPS) {
            const int column = (first + chunk) * 128 + lane * 4;
            float4 x = {0, 0, 0, 0}, w = {1, 1, 1, 1};
            if (column < width) {
                if (normed) w = *(const float4*)(weight + column);
                x = take_four(phase, column);
                if (normed) *(float4*)(residual + column) = x;
                if (trace && leads && phase == OUT) *(float4*)(traced() + T_KQV + column) = x;
            }
            write_digits(s.x, chunk, times(x, w), lane, span.mins());
            if (!normed) continue;
            const float sum = warp_sum(squares(x));
            if (lane == 0) s.squares[chunk] = sum;
        }
    }

    // Gate and up rows lie in the halves of one tile, or in two tiles that follow each other.
    DEVICE void hand_on(int phase) const {
        const bool halves = phase == GATE && span.paired(), twins = phase == GATE && !span.paired();
        const int log_rows = halves ? 3 : 4, log_apart = twins ? 1 : 0;
        float* to = traced();
#pragma unroll 1
        for (int i = threadIdx.x; i < span.tiles() >> log_apart << log_rows; i += THREADS) {
            const bool first = i < THREADS && !twins;
            const Tile mine = first ? tile : tile_at(plan, span, i >> log_rows << log_apart);
            const int place = i & ((1 << log_rows) - 1), row = mine.row() + place;
            if (place >= mine.valid()) continue;
            const float product = row_sum(s, mine, place) * rms;
            if (phase == QKV) {
                const float biased = !QKV_BIAS ? product : product + (first ? bias : vectors()[V_BIAS + row]);
                give(plan.qkv + row, biased, epoch);
                if (to) to[T_PROJ + row] = product, to[T_BIAS + row] = biased;
            } else if (phase == OUT) {
                const float sum = product + s.residual1[row];
                give(plan.x1 + row, sum, epoch);
                if (to) to[T_ATTN_OUT + row] = product, to[T_FFN_INP + row] = sum;
            } else if (phase == GATE) {
                const Tile other = twins ? tile_at(plan, span, (i >> 4 << 1) + 1) : mine;
                const float up = row_sum(s, other, halves ? place + 8 : place) * rms;
                const float act = __fdividef(product, 1.0f + expf(-product)) * up;
                give(plan.act + row, act, epoch);
                if (to) to[T_GATE + row] = product, to[T_UP + row] = up, to[T_ACT + row] = act;
            } else {  // row r of slice i counts as row i · N_EMBD + r
                give(plan.x2 + row, row < N_EMBD ? product + s.residual2[row] : product, epoch);
                if (to) to[T_DOWN + row] = product;
            }
        }
        if (to && leads && (phase == QKV || phase == GATE)) trace_vector(to, phase);
    }

    // The normed vector, and where it came from, which the phase before had no block that sees all of it.
    DEVICE void trace_vector(float* to, int phase) const {
        const float *x = phase == GATE ? s.residual2 : s.residual1;
        const float* weight = vectors() + (phase == GATE ? V_FFN_NORM : V_ATTN_NORM);
        float* normed = phase == HEAD ? traced_ends() + N_EMBD : to + (phase == GATE ? T_FFN_NORM : T_ATTN_NORM);
        float* before = phase == GATE ? nullptr : n ? to - TRACE_SIZE + T_L_OUT : traced_ends();
#pragma unroll 1
        for (int i = threadIdx.x; i < N_EMBD; i += THREADS) {
            normed[i] = x[i] * rms * weight[i];
            if (before) before[i] = x[i];
        }
    }

    DEVICE void finish() const {
        Best mine = {-INF, 0x7fffffff, 0};
        Tile coming = tile;
#pragma unroll 1
        for (int i = threadIdx.x; i < span.tiles() * TILE_ROWS; i += THREADS) {
            const Tile here = coming;
            if (i + THREADS < span.tiles() * TILE_ROWS) coming = tile_at(plan, span, (i + THREADS) / TILE_ROWS);
            const int place = i % TILE_ROWS, row = here.row() + place;
            if (place >= here.valid()) continue;
            const float logit = row_sum(s, here, place) * rms, before = mine.value;
            if (logits) logits[row] = logit;
            if (beats(logit, row, mine)) mine.value = logit, mine.index = row;
            mine.sum = mine.sum * power(before, mine.value) + power(logit, mine.value);
        }
        if (trace && leads) trace_vector(traced(), HEAD);
        mine = best_of_warp(mine);
        float *values = s.merge, *indices = values + WARPS, *sums = indices + WARPS;
        if (lane == 0) values[warp] = mine.value, indices[warp] = __int_as_float(mine.index), sums[warp] = mine.sum;
        sync_workers();
        if (warp) return;
        const int other = min(lane, WARPS - 1);
        mine = best_of_warp({values[other], __float_as_int(indices[other]), lane < WARPS ? sums[lane] : 0.0f});
        if (lane) return;
        uint2* to = plan.best + blockIdx.x * 4;
        give(to, mine.value, epoch), give(to + 1, __int_as_float(mine.index), epoch), give(to + 2, mine.sum, epoch);
    }
};

// ids[i] is the token at `position` + i; the first `n_given` are given, the others up to ids[n_tokens] are written: the index
// of the largest logit; `chances` gets the log-probability of each of these. `logits` (the last token's stay), `trace` and `scores` (which ask
// for n_tokens = 1) may be null. `epoch` is 1 at the first launch and grows by n_tokens · (N_LAYER + 1).
extern "C" __global__ void __launch_bounds__(THREADS + (COURIER ? 32 : 0), 1)
decode(const Plan* plan_at, Cached* keys, Cached* values, int n_ctx, int position, int n_tokens, int n_given, u32 epoch,
       int* ids, float* chances, float* logits, float* trace, float* scores) {
    SHARED_BYTES(memory);
    const Shared s = shared_at(memory);
    const Plan& plan = *s.plan;  // kept at hand: registers are scarce
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x < sizeof(Plan) / 8) ((u64*)s.plan)[threadIdx.x] = ((const u64*)plan_at)[threadIdx.x];
    if (threadIdx.x < WARPS) s.used[threadIdx.x] = 0;
    if (threadIdx.x == 0) prepare_vector(s.x);
#if HAS_BULK_COPY
    if (COURIER && threadIdx.x < WARPS * GATES) gate_init(s.gates + threadIdx.x);
    gates_ready();
#endif
    __syncthreads();
#if HAS_BULK_COPY
    if (COURIER && warp == WARPS) return carry(s, lane, n_tokens);
#endif
    Stream stream;
    stream.open(s, warp);
    Span coming;
    coming.raw = plan.spans[blockIdx.x];
    Block block = {plan, s, keys, values, n_ctx, position, n_given, 0, 1, 0, epoch, trace, scores, ids, chances, logits, warp, lane,
                   blockIdx.x == 0, coming, {}, 0, 0};
    for (int at = 0; at < n_tokens; at++, block.position++) {
        const int n_keys = block.position + 1, wanted = min((n_keys + KEYS_A_SPLIT - 1) / KEYS_A_SPLIT, MAX_SPLITS);
        block.splits = max(min(wanted, (int)gridDim.x / N_HEAD), 1);
        block.length = (n_keys + block.splits - 1) / block.splits;
#pragma unroll 1
        for (int step = 0; step <= N_LAYER * PHASES; step++) {
            const bool head = step == N_LAYER * PHASES;
            const int phase = head ? HEAD : step % PHASES;
            block.n = step / PHASES;
            block.look_ahead(coming, phase);
            coming.raw = plan.spans[(long long)(head ? 0 : step + 1) * gridDim.x + blockIdx.x];
            if (phase == OUT) block.attention();
            if (block.span.takes_part()) block.bring(phase, at);
            block.look_further(phase);
            if (!stream.idle) stream.expect();
            sync_workers();
            run_units(stream, s, lane);
            const bool normed = phase != OUT && phase != DOWN;
            if (normed && warp == WARPS - 1) {  // which never has more to multiply than the others
                const float rms = inverse_rms(s, lane);
                if (lane == 0) *s.rms = rms;
            }
            sync_workers();
            block.rms = normed ? *s.rms : 1.0f;
            if (head)
                block.finish();
            else
                block.hand_on(phase);
            if (phase == DOWN || head) block.epoch++;
        }
        sync_workers();
    }
    if (block.leads && warp == 0) {
        const Best best = take_best(plan, block.epoch - 1, lane);
        if (lane == 0) ids[n_tokens] = best.index, chances[n_tokens] = -logf(best.sum);
    }
}

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
// Weights do not wait for anything. Each warp knows the list of its pieces (`units`) for the whole token and copies
// them into its own ring in shared memory as soon as there is room, across phases and layers; where the device has no
// bulk copies (before 9.0), units are read where they lie. The order of every sum is fixed, so two runs agree in
// every bit.
//
// Compiled for one model (macros: model.cuh) and one plan: WARPS, SLICES, MAX_SPLITS, VECTOR_CHUNKS, SLOTS, RING_BYTES,
// GATES.

#define THREADS (WARPS * 32)
#define CHUNKS_OF(columns) (((columns) + 127) / 128)
#define KEYS_AT_ONCE (THREADS / LANES_A_KEY)
#ifndef KEYS_A_SPLIT
#define KEYS_A_SPLIT 256
#endif

enum { QKV, OUT, GATE, DOWN, PHASES, HEAD = PHASES };

struct Plan {
    const uint4* units;       // what each warp multiplies, in order: see Unit
    const uint2* lists;       // [block][warp] first unit, number of units
    const uint4* spans;       // [layer · PHASES + phase][block]: see Span
    const uint2* tiles;       // row; slot | pieces << 11 | valid rows << 22
    const Layer* layers;
    const u8* embd;           // token_embd as tiles
    const float* output_norm;
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
    float *red, *residual1, *residual2, *squares, *q, *k, *v, *merge;
    u64* gates;
};

#define CACHED_FLOATS (2 * N_EMBD + CHUNKS_OF(N_EMBD) + 3 * HEAD_DIM + WARPS * (HEAD_DIM + 2) + 8)
#define SHARED_TOTAL                                                                                   \
    (WARPS * RING_BYTES + (VECTOR_CHUNKS * VECTOR_BYTES_PER_128 + 15) / 16 * 16 + SLOTS * 64 + WARPS * GATES * 8 + \
     CACHED_FLOATS * 4)

DEVICE Shared shared_at(u8* at) {
    Shared s;
    s.ring = at, at += WARPS * RING_BYTES;
    s.x = vector_at(at, VECTOR_CHUNKS), at += (VECTOR_CHUNKS * VECTOR_BYTES_PER_128 + 15) / 16 * 16;
    s.red = (float*)at, at += SLOTS * 64;
    s.gates = (u64*)at, at += WARPS * GATES * 8;
    float* f = (float*)at;
    s.residual1 = f, f += N_EMBD;
    s.residual2 = f, f += N_EMBD;
    s.q = f, f += HEAD_DIM;
    s.k = f, f += HEAD_DIM;
    s.v = f, f += HEAD_DIM;
    s.merge = f, f += WARPS * (HEAD_DIM + 2) + 8;
    s.squares = f;
    return s;
}

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

DEVICE void give(uint2* to, float value, u32 epoch) { put_word(to, __float_as_uint(value), epoch); }

// --- a warp's stream of weights ------------------------------------------------------------------------------------

struct Stream {
    const uint4* list;
    u32 length, total;       // units a token; units until the launch ends
    u32 fetched, used;       // units of which the copy was started; units multiplied
    u32 copies, arrivals;    // the same without the empty ones: they number the gates
    u32 idle;                // phases to skip
    Unit now, soon, coming;  // being multiplied, the one after it, the next to fetch
    u32 soon_at, coming_at;  // places in the list
    u8* ring;
    u64* gates;

    DEVICE u32 after(u32 at) const { return at + 1 == length ? 0 : at + 1; }

    DEVICE void open(const Plan& plan, const Shared& s, int warp, int tokens) {
        const uint2 mine = plan.lists[blockIdx.x * WARPS + warp];
        list = plan.units + mine.x, length = mine.y, total = mine.y * tokens;
        fetched = used = copies = arrivals = coming_at = 0;
        now.raw = coming.raw = list[0];
        idle = now.skips();
        soon_at = after(0);
        soon.raw = list[soon_at];
        ring = s.ring + warp * RING_BYTES, gates = s.gates + warp * GATES;
#if HAS_BULK_COPY
        if (threadIdx.x % 32 == 0)
            for (int i = 0; i < GATES; i++) gate_init(gates + i);
        gates_ready();
        __syncwarp();
#endif
    }

    // Start every copy that there is room for.
    DEVICE void fetch() {
#if HAS_BULK_COPY
        while (fetched < total && fetched <= used + coming.ahead()) {
            if (!coming.empty()) {
                if (threadIdx.x % 32 == 0)
                    copy_start(ring + coming.place(), coming.source(), coming.bytes(), gates + copies % GATES);
                copies++;
            }
            fetched++;
            coming_at = after(coming_at);
            coming.raw = list[coming_at];
        }
#endif
    }

    DEVICE const u8* weights() {
#if HAS_BULK_COPY
        gate_wait(gates + arrivals % GATES, arrivals / GATES & 1);
        return ring + now.place();
#else
        return now.source();
#endif
    }

    DEVICE void next() {
        if (!now.empty()) arrivals++;
        used++;
        soon_at = after(soon_at);
        now = soon;
        soon.raw = list[soon_at];
        __syncwarp();  // all lanes have read the place that is free now
        fetch();
    }
};

// Multiply this warp's units of the phase; the sums of each piece of a tile go to its slot.
DEVICE void run_units(Stream& stream, const Shared& s, int lane) {
    if (stream.idle) {
        stream.idle--;
        return;
    }
    float acc[2] = {0, 0};
    for (bool more = true; more; stream.next()) {
        const Unit unit = stream.now;
        more = !unit.last();
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
    for (int i = 1; i < tile.pieces(); i++) sum += at[i * 16];
    return sum;
}

// 1 / sqrt(mean(x²) + eps), from the sums that the warps left.
DEVICE float inverse_rms(const Shared& s) {
    float sum = 0;
    for (int i = 0; i < CHUNKS_OF(N_EMBD); i++) sum += s.squares[i];
    return 1.0f / sqrtf(sum / N_EMBD + NORM_EPS);
}

// --- the vectors' ways into shared memory --------------------------------------------------------------------------

DEVICE float4 times(float4 a, float4 b) { return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w}; }
DEVICE float4 plus(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

// One chunk of a normed vector: the norm's factor is left out, it is applied to the rows.
DEVICE void write_normed(const Shared& s, int chunk, float4 x, float4 weight, float* residual, int lane) {
    const int column = chunk * 128 + lane * 4;
    if (column < N_EMBD) *(float4*)(residual + column) = x;
    const float sum = warp_sum(x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w);
    if (lane == 0) s.squares[chunk] = sum;
    write_digits(s.x, chunk, times(x, weight), lane);
}

template <class GET>
DEVICE void take_normed(const Shared& s, const float* weight, float* residual, int warp, int lane, GET get) {
    for (int chunk = warp; chunk < CHUNKS_OF(N_EMBD); chunk += WARPS) {
        const int column = chunk * 128 + lane * 4;
        float4 w = {0, 0, 0, 0}, x = {0, 0, 0, 0};
        if (column < N_EMBD) {
            w = *(const float4*)(weight + column);
            x = get(column);
        }
        write_normed(s, chunk, x, w, residual, lane);
    }
}

// The residual stream after a layer: the slices of the down projection, of which the first contains x1.
DEVICE float4 take_x2(const Plan& plan, int column, u32 epoch) {
    float4 x = take4(plan.x2 + column, epoch);
    for (int slice = 1; slice < SLICES; slice++) x = plus(x, take4(plan.x2 + slice * N_EMBD + column, epoch));
    return x;
}

// --- attention -----------------------------------------------------------------------------------------------------

// A head of q or k by one warp: norm, rotation; `to` gets HEAD_DIM channels.
DEVICE void turn_head(const uint2* from, const float* norm, const float2* rope, float* to, u32 epoch, float* traced_norm,
                      int lane) {
    const int half = HEAD_DIM / 2, each = (HEAD_DIM / 2 + 31) / 32;
    float low[each], high[each], squares = 0;
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
        if (QK_NORM) low[n] = low[n] * factor * norm[i], high[n] = high[n] * factor * norm[half + i];
        if (QK_NORM && traced_norm) traced_norm[i] = low[n], traced_norm[half + i] = high[n];
        const float2 turn = rope[i];
        to[i] = low[n] * turn.x - high[n] * turn.y;
        to[half + i] = low[n] * turn.y + high[n] * turn.x;
    }
}

struct Call {  // one launch
    Cached *keys, *values;  // [layer][kv head][n_ctx][HEAD_DIM]
    int n_ctx, position, layer;
    u32 epoch;
    float* trace;   // steps of this layer, or null
    float* scores;  // [head][position + 1] of this layer, or null
};

// One head over one stretch of the keys. Groups of LANES_A_KEY lanes take every KEYS_AT_ONCE-th key.
DEVICE void attend(const Plan& plan, const Shared& s, const Call& call, int head, int split, int splits, int warp, int lane) {
    const int kv_head = head / (N_HEAD / N_HEAD_KV), n_keys = call.position + 1;
    const int length = (n_keys + splits - 1) / splits, first = split * length, end = min(first + length, n_keys);
    const bool keeper = end == n_keys && head % (N_HEAD / N_HEAD_KV) == 0;  // writes this position's key and value
    const long long cache = ((long long)call.layer * N_HEAD_KV + kv_head) * call.n_ctx * HEAD_DIM;
    const float2* rope = plan.rope + (long long)call.position * (HEAD_DIM / 2);
    const Layer& layer = plan.layers[call.layer];
    const uint2* qkv = plan.qkv;
    if (warp == 0) {
        float* traced = call.trace && split == 0 ? call.trace + T_HEAD_NORM + head * HEAD_DIM : nullptr;
        turn_head(qkv + head * HEAD_DIM, layer.q_norm, rope, s.q, call.epoch, traced, lane);
    } else if (warp == 1) {
        float* traced = call.trace && keeper ? call.trace + T_HEAD_NORM + Q_WIDTH + kv_head * HEAD_DIM : nullptr;
        turn_head(qkv + Q_WIDTH + kv_head * HEAD_DIM, layer.k_norm, rope, s.k, call.epoch, traced, lane);
    } else if (warp == 2) {
        for (int i = lane; i < HEAD_DIM; i += 32)
            s.v[i] = take(qkv + Q_WIDTH + KV_WIDTH + kv_head * HEAD_DIM + i, call.epoch);
    }
    __syncthreads();
    if (call.trace) {
        float* to = call.trace + T_ROPE;
        for (int i = threadIdx.x; i < HEAD_DIM; i += THREADS) {
            if (split == 0) to[head * HEAD_DIM + i] = s.q[i];
            if (keeper) to[Q_WIDTH + kv_head * HEAD_DIM + i] = s.k[i];
        }
    }
    const int group = threadIdx.x / LANES_A_KEY, channel = threadIdx.x % LANES_A_KEY * 8;
    const bool inside = channel < HEAD_DIM;
    Softened mine = {-INF, 0, {}};
    Eight q = {}, k = {}, v = {};
    if (inside)
        for (int i = 0; i < 8; i++) q.at[i] = s.q[channel + i];
    for (int base = first; base < end; base += KEYS_AT_ONCE) {
        const int key = base + group;
        const bool there = key < end;
        if (there && inside && key == call.position) {
            for (int i = 0; i < 8; i++) {
                const Cached new_k = to_cache(s.k[channel + i]), new_v = to_cache(s.v[channel + i]);
                k.at[i] = from_cache(new_k), v.at[i] = from_cache(new_v);
                if (keeper) call.keys[cache + (long long)key * HEAD_DIM + channel + i] = new_k;
                if (keeper) call.values[cache + (long long)key * HEAD_DIM + channel + i] = new_v;
            }
        } else if (there && inside) {
            k = load_cached(call.keys + cache + (long long)key * HEAD_DIM + channel);
            v = load_cached(call.values + cache + (long long)key * HEAD_DIM + channel);
        }
        float score = 0;
        for (int i = 0; i < 8; i++) score = fmaf(q.at[i], k.at[i], score);
        for (int step = LANES_A_KEY / 2; step; step >>= 1) score += __shfl_xor_sync(FULL, score, step);
        score = score / sqrtf((float)HEAD_DIM);
        if (there) add_key(mine, score, v);
        if (there && call.scores && channel == 0) call.scores[(long long)head * n_keys + key] = score;
    }
    merge_groups(mine);
    float* part = s.merge + warp * (HEAD_DIM + 2);
    if (lane < LANES_A_KEY && inside)
        for (int i = 0; i < 8; i++) part[channel + i] = mine.values.at[i];
    if (lane == 0) part[HEAD_DIM] = mine.most, part[HEAD_DIM + 1] = mine.sum;
    __syncthreads();
    for (int i = threadIdx.x; i < HEAD_DIM; i += THREADS) {
        float most = -INF, sum = 0, value = 0;
        for (int w = 0; w < WARPS; w++) most = fmaxf(most, s.merge[w * (HEAD_DIM + 2) + HEAD_DIM]);
        for (int w = 0; w < WARPS; w++) {
            const float* other = s.merge + w * (HEAD_DIM + 2);
            const float factor = power(other[HEAD_DIM], most);
            value = fmaf(other[i], factor, value), sum = fmaf(other[HEAD_DIM + 1], factor, sum);
        }
        const int task = head * MAX_SPLITS + split;
        give(plan.heads + task * HEAD_DIM + i, value / sum, call.epoch);
        if (i == 0 && splits > 1) give(plan.shares + task * 2, most, call.epoch), give(plan.shares + task * 2 + 1, sum, call.epoch);
    }
    if (keeper) __threadfence();  // the cache is read by others one token later
    __syncthreads();              // the next task of this block reuses the buffers
}

// Four channels of the attention's output, the stretches of keys merged.
DEVICE float4 take_heads(const Plan& plan, int column, int splits, u32 epoch) {
    const int head = column / HEAD_DIM, task = head * MAX_SPLITS;
    const uint2* from = plan.heads + task * HEAD_DIM + column % HEAD_DIM;
    if (splits == 1) return take4(from, epoch);
    float most = -INF, sum = 0;
    float4 value = {0, 0, 0, 0};
    for (int i = 0; i < splits; i++) {
        const float2 share = take2(plan.shares + (task + i) * 2, epoch);
        const float4 part = take4(from + i * HEAD_DIM, epoch);
        const float larger = fmaxf(most, share.x), old = power(most, larger), now = power(share.x, larger) * share.y;
        value = {value.x * old + part.x * now, value.y * old + part.y * now, value.z * old + part.z * now,
                 value.w * old + part.w * now};
        sum = sum * old + now, most = larger;
    }
    return {value.x / sum, value.y / sum, value.z / sum, value.w / sum};
}

// --- the largest logit ---------------------------------------------------------------------------------------------

struct Best {  // of the logits seen: the largest, the first index that has it, the sum of exp(logit - largest)
    float value;
    int index;
    float sum;
};

DEVICE Best better(Best a, Best b) {
    const bool second = b.value > a.value || (b.value == a.value && b.index < a.index);
    const float most = fmaxf(a.value, b.value);
    Best best = second ? b : a;
    best.sum = a.sum * power(a.value, most) + b.sum * power(b.value, most);
    return best;
}

DEVICE Best best_of_warp(Best mine) {
    for (int step = 16; step; step >>= 1) {
        Best other;
        other.value = __shfl_xor_sync(FULL, mine.value, step);
        other.index = __shfl_xor_sync(FULL, mine.index, step);
        other.sum = __shfl_xor_sync(FULL, mine.sum, step);
        mine = better(mine, other);
    }
    return mine;
}

// What the blocks found, by one warp.
DEVICE Best take_best(const Plan& plan, u32 epoch, int lane) {
    Best mine = {-INF, 0x7fffffff, 0};
    for (int block = lane; block < (int)gridDim.x; block += 32) {
        const float2 found = take2(plan.best + block * 4, epoch);
        const float sum = take(plan.best + block * 4 + 2, epoch);
        mine = better(mine, {found.x, __float_as_int(found.y), sum});
    }
    mine = best_of_warp(mine);
    if (mine.index >= N_VOCAB) mine.index = 0;  // every logit is NaN
    return mine;
}

// --- the phases ----------------------------------------------------------------------------------------------------

// What a block is doing. `before_*` brings the phase's vector into shared memory, `after_*` hands the rows on.
struct Block {
    const Plan& plan;
    const Shared& s;
    Cached *keys, *values;
    int n_ctx, position, n, splits;  // n: the layer
    u32 epoch;
    float *trace, *scores;  // of the whole token, or null
    int* ids;
    float *chances, *logits;
    Span span;
    const int warp, lane;
    const bool leads;  // the first block keeps the books

    DEVICE float* traced() const { return trace ? trace + (long long)n * TRACE_SIZE : nullptr; }
    DEVICE float* traced_ends() const { return trace + (long long)N_LAYER * TRACE_SIZE; }  // embd, result_norm

    // Call see(tile, place, row) for every row of the block's tiles.
    template <class SEE>
    DEVICE void each_row(SEE see) const {
        for (int i = threadIdx.x; i < span.tiles() * TILE_ROWS; i += THREADS) {
            const Tile tile = tile_at(plan, span, i / TILE_ROWS);
            const int place = i % TILE_ROWS;
            if (place < tile.valid()) see(tile, place, tile.row() + place);
        }
    }

    DEVICE void trace_norm(float* to, const float* x, float rms, const float* weight) const {
        if (trace && leads)
            for (int i = threadIdx.x; i < N_EMBD; i += THREADS) to[i] = x[i] * rms * weight[i];
    }

    // The token at step `at` of this launch: the given one, or what the previous head found.
    DEVICE int token(int at) const {
        if (at == 0) return ids[0];
        if (warp == 0) {
            const Best best = take_best(plan, epoch - 1, lane);
            if (lane == 0) s.merge[0] = __int_as_float(best.index);
            if (lane == 0 && leads) ids[at] = best.index, chances[at] = -logf(best.sum);
        }
        __syncthreads();
        return __float_as_int(s.merge[0]);
    }

    DEVICE void before_qkv(int at) const {
        const float* weight = plan.layers[n].attn_norm;
        if (n == 0) {
            embed(plan.embd, token(at), s.residual1, warp, WARPS, lane);
            __syncthreads();
            take_normed(s, weight, s.residual1, warp, lane, [&](int i) { return *(const float4*)(s.residual1 + i); });
        } else {
            take_normed(s, weight, s.residual1, warp, lane, [&](int i) { return take_x2(plan, i, epoch - 1); });
        }
    }

    DEVICE void after_qkv() const {
        const Layer& layer = plan.layers[n];
        float* to = traced();
        const float rms = inverse_rms(s);
        each_row([&](const Tile& tile, int place, int row) {
            const float product = row_sum(s, tile, place) * rms;
            const float biased = QKV_BIAS ? product + layer.qkv_bias[row] : product;
            give(plan.qkv + row, biased, epoch);
            if (to) to[T_PROJ + row] = product, to[T_BIAS + row] = biased;
        });
        trace_norm(to + T_ATTN_NORM, s.residual1, rms, layer.attn_norm);
        if (to && leads)
            for (int i = threadIdx.x; i < N_EMBD; i += THREADS)
                (n ? to - TRACE_SIZE + T_L_OUT : traced_ends())[i] = s.residual1[i];
    }

    DEVICE void attention() const {
        float* to = scores ? scores + (long long)n * N_HEAD * (position + 1) : nullptr;
        const Call call = {keys, values, n_ctx, position, n, epoch, traced(), to};
        for (int task = gridDim.x - 1 - blockIdx.x; task < N_HEAD * splits; task += gridDim.x)
            attend(plan, s, call, task % N_HEAD, task / N_HEAD, splits, warp, lane);
    }

    DEVICE void before_out() const {
        for (int chunk = warp; chunk < CHUNKS_OF(Q_WIDTH); chunk += WARPS) {
            const int column = chunk * 128 + lane * 4;
            float4 x = {0, 0, 0, 0};
            if (column < Q_WIDTH) x = take_heads(plan, column, splits, epoch);
            if (trace && leads && column < Q_WIDTH) *(float4*)(traced() + T_KQV + column) = x;
            write_digits(s.x, chunk, x, lane);
        }
    }

    DEVICE void after_out() const {
        float* to = traced();
        each_row([&](const Tile& tile, int place, int row) {
            const float product = row_sum(s, tile, place), sum = product + s.residual1[row];
            give(plan.x1 + row, sum, epoch);
            if (to) to[T_ATTN_OUT + row] = product, to[T_FFN_INP + row] = sum;
        });
    }

    DEVICE void before_gate() const {
        take_normed(s, plan.layers[n].ffn_norm, s.residual2, warp, lane,
                    [&](int i) { return take4(plan.x1 + i, epoch); });
    }

    // Gate and up rows lie in the halves of one tile, or in two tiles that follow each other.
    DEVICE void after_gate() const {
        const float rms = inverse_rms(s);
        const int rows = span.paired() ? 8 : 16, tiles = span.paired() ? 1 : 2;
        float* to = traced();
        for (int i = threadIdx.x; i < span.tiles() / tiles * rows; i += THREADS) {
            const int place = i % rows;
            const Tile first = tile_at(plan, span, i / rows * tiles), second = tile_at(plan, span, i / rows * tiles + tiles - 1);
            if (place >= first.valid()) continue;
            const int row = first.row() + place;
            const float gate = row_sum(s, first, place) * rms, up = row_sum(s, second, tiles == 1 ? place + 8 : place) * rms;
            const float act = gate / (1.0f + expf(-gate)) * up;
            give(plan.act + row, act, epoch);
            if (to) to[T_GATE + row] = gate, to[T_UP + row] = up, to[T_ACT + row] = act;
        }
        trace_norm(to + T_FFN_NORM, s.residual2, rms, plan.layers[n].ffn_norm);
    }

    DEVICE void before_down() const {
        for (int chunk = warp; chunk < span.chunks(); chunk += WARPS) {
            const int column = (span.first_chunk() + chunk) * 128 + lane * 4;
            float4 x = {0, 0, 0, 0};
            if (column < N_FF) x = take4(plan.act + column, epoch);
            write_digits(s.x, chunk, x, lane);
        }
    }

    // Row r of slice i counts as row i · N_EMBD + r.
    DEVICE void after_down() const {
        float* to = traced();
        each_row([&](const Tile& tile, int place, int row) {
            const float product = row_sum(s, tile, place);
            give(plan.x2 + row, row < N_EMBD ? product + s.residual2[row] : product, epoch);
            if (to) to[T_DOWN + row] = product;
        });
    }

    DEVICE void before_head() const {
        take_normed(s, plan.output_norm, s.residual1, warp, lane, [&](int i) { return take_x2(plan, i, epoch - 1); });
    }

    DEVICE void after_head() const {
        const float rms = inverse_rms(s);
        Best mine = {-INF, 0x7fffffff, 0};
        each_row([&](const Tile& tile, int place, int row) {
            const float logit = row_sum(s, tile, place) * rms;
            if (logits) logits[row] = logit;
            mine = better(mine, {logit, row, 1.0f});
        });
        trace_norm(traced_ends() + N_EMBD, s.residual1, rms, plan.output_norm);
        if (trace && leads)
            for (int i = threadIdx.x; i < N_EMBD; i += THREADS) (traced() - TRACE_SIZE + T_L_OUT)[i] = s.residual1[i];
        mine = best_of_warp(mine);
        float* all = s.merge + warp * 3;
        if (lane == 0) all[0] = mine.value, all[1] = __int_as_float(mine.index), all[2] = mine.sum;
        __syncthreads();
        if (threadIdx.x) return;
        for (int w = 1; w < WARPS; w++)
            mine = better(mine, {s.merge[w * 3], __float_as_int(s.merge[w * 3 + 1]), s.merge[w * 3 + 2]});
        uint2* to = plan.best + blockIdx.x * 4;
        give(to, mine.value, epoch), give(to + 1, __int_as_float(mine.index), epoch), give(to + 2, mine.sum, epoch);
    }

    DEVICE void before(int phase, int at) const {
        if (phase == OUT) attention();
        if (!span.takes_part()) return;
        switch (phase) {
            case QKV: before_qkv(at); break;
            case OUT: before_out(); break;
            case GATE: before_gate(); break;
            case DOWN: before_down(); break;
            default: before_head();
        }
    }

    DEVICE void after(int phase) const {
        switch (phase) {
            case QKV: after_qkv(); break;
            case OUT: after_out(); break;
            case GATE: after_gate(); break;
            case DOWN: after_down(); break;
            default: after_head();
        }
    }
};

// ids[i] is the token at `position` + i; ids[0] is given, ids[1] … ids[n_tokens] are written: the index of the largest
// logit; `chances` gets the log-probability of each. `logits` (the last token's stay), `trace` and `scores` (which ask
// for n_tokens = 1) may be null. `epoch` is 1 at the first launch and grows by n_tokens · (N_LAYER + 1).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
decode(const Plan* plan_at, Cached* keys, Cached* values, int n_ctx, int position, int n_tokens, u32 epoch, int* ids,
       float* chances, float* logits, float* trace, float* scores) {
    SHARED_BYTES(memory);
    const Plan plan = *plan_at;
    const Shared s = shared_at(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Stream stream;
    stream.open(plan, s, warp, n_tokens);
    stream.fetch();
    Span coming;
    coming.raw = plan.spans[blockIdx.x];
    Block block = {plan, s, keys, values, n_ctx, position, 0, 1, epoch, trace, scores, ids, chances, logits, coming, warp, lane,
                   blockIdx.x == 0};
    for (int at = 0; at < n_tokens; at++, block.position++) {
        const int stretches = min((block.position + KEYS_A_SPLIT) / KEYS_A_SPLIT, MAX_SPLITS);
        block.splits = max(min(stretches, (int)gridDim.x / N_HEAD), 1);
        for (int step = 0; step <= N_LAYER * PHASES; step++) {
            const bool head = step == N_LAYER * PHASES;
            const int phase = head ? HEAD : step % PHASES;
            block.n = step / PHASES;
            block.span = coming;
            coming.raw = plan.spans[(long long)(head ? 0 : step + 1) * gridDim.x + blockIdx.x];
            block.before(phase, at);
            __syncthreads();
            run_units(stream, s, lane);
            __syncthreads();
            block.after(phase);
            if (phase == DOWN || head) block.epoch++;
        }
        __syncthreads();
    }
    if (block.leads && warp == 0) {
        const Best best = take_best(plan, block.epoch - 1, lane);
        if (lane == 0) ids[n_tokens] = best.index, chances[n_tokens] = -logf(best.sum);
    }
}

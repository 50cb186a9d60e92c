// Many positions at once: what lies between the large matrix products of a prompt, which cuBLAS computes.
//
// Weights are widened from their tiles to a plain matrix in the products' precision (`widen`), one layer at a time.
// Activations pass from kernel to kernel in float32, [positions][width]; each kernel that feeds a product writes its
// input in the products' precision, `Wide`: f32 in exact mode, else f16 with a power of two for each row, so
// that no activation is too large for it. The product's rows are multiplied by that power afterwards, by whoever
// reads them (`factor`). Sums are float32 throughout, and attention never holds a score in less.
//
// Fused kernels also write the steps inside them where a trace asks (pointers that are otherwise null).
// Macros: model.cuh, and WIDE_HALF (0 or 1).

#if WIDE_HALF
typedef u16 Wide;
DEVICE Wide to_wide(float x) { return float_to_half(x); }
DEVICE void put_four(Wide* to, float4 x) { *(uint2*)to = {halves(x.x, x.y), halves(x.z, x.w)}; }
#else
typedef float Wide;
DEVICE Wide to_wide(float x) { return x; }
DEVICE void put_four(Wide* to, float4 x) { *(float4*)to = x; }
#endif

// --- over a block --------------------------------------------------------------------------------------------------

#define MAX_WARPS 32

DEVICE float block_sum(float value, float* scratch) {
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < (int)blockDim.x / 32; i++) sum += scratch[i];
    return sum;
}

DEVICE u32 block_max(u32 value, float* scratch) {
    value = warp_max(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = bits_float(value);
    __syncthreads();
    u32 most = 0;
    for (int i = 0; i < (int)blockDim.x / 32; i++) most = max(most, __float_as_uint(scratch[i]));
    return most;
}

DEVICE u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// The power of two that brings a row whose largest magnitude has these bits to about 2^8; 1 for f32, and for rows
// that are zero or not finite.
DEVICE float row_power(u32 most) {
    const int exponent = most >> 23;
    return !WIDE_HALF || exponent == 0 || exponent == 255 ? 1.0f : bits_float((u32)min(max(262 - exponent, 1), 253) << 23);
}

// --- weights -------------------------------------------------------------------------------------------------------

struct Widening {  // one matrix, or a run of its tiles
    const u8* from;
    Wide* to;         // row after row; tile row r goes to row 16 · tile + r
    int type, columns, rows, first_warp;  // rows that exist; where its chunks begin in the numbering of all chunks
};

// A warp a chunk, over all the matrices of `jobs`.
extern "C" __global__ void __launch_bounds__(256) widen(const Widening* jobs, int n_jobs, int n_chunks) {
    const int lane = threadIdx.x % 32, index = blockIdx.x * 8 + threadIdx.x / 32;
    if (index >= n_chunks) return;
    int number = 0;
    while (number + 1 < n_jobs && jobs[number + 1].first_warp <= index) number++;
    const Widening job = jobs[number];
    const ChunkShape shape = chunk_shape(job.type);
    const int per_tile = (job.columns + shape.columns - 1) / shape.columns, mine = index - job.first_warp;
    const int tile = mine / per_tile, first = mine % per_tile * shape.columns;
    unpack(job.type, job.from + (long long)mine * shape.bytes, lane, [&](int row, int column, float4 v) {
        row += tile * TILE_ROWS, column += first;
        if (row < job.rows && column < job.columns) put_four(job.to + (long long)row * job.columns + column, v);
    });
}

// --- rows ----------------------------------------------------------------------------------------------------------

// grid: a block of 256 a position.
extern "C" __global__ void __launch_bounds__(256) embed_rows(const u8* embd, const int* ids, float* x) {
    embed(embd, ids[blockIdx.x], x + (long long)blockIdx.x * N_EMBD, threadIdx.x / 32, 8, threadIdx.x % 32);
}

// x += product · factor, then the RMS norm of x as the next product's input. `product` may be null (nothing to
// add), `wide` too (no product follows). grid: a block of 256 a position. `exact` is the norm in float32, for a trace or null; `added` the product.
extern "C" __global__ void __launch_bounds__(256)
add_norm(float* x, const float* product, const float* factor, const float* weight, Wide* wide, float* power, float* added,
         float* exact) {
    SHARED_BYTES(memory);
    float* scratch = (float*)memory;
    const long long row = (long long)blockIdx.x * N_EMBD;
    const float scale = product ? factor[blockIdx.x] : 0.0f;
    float squares = 0;
    for (int i = threadIdx.x; i < N_EMBD; i += 256) {
        if (product) {
            const float more = product[row + i] * scale;
            if (added) added[row + i] = more;
            x[row + i] += more;
        }
        squares += x[row + i] * x[row + i];
    }
    const float rms = 1.0f / sqrtf(block_sum(squares, scratch) / N_EMBD + NORM_EPS);
    u32 most = 0;
    for (int i = threadIdx.x; i < N_EMBD; i += 256) most = max(most, magnitude(x[row + i] * rms * weight[i]));
    const float up = row_power(block_max(most, scratch));
    for (int i = threadIdx.x; i < N_EMBD; i += 256) {
        const float normed = x[row + i] * rms * weight[i];
        if (exact) exact[row + i] = normed;
        if (wide) wide[row + i] = to_wide(normed * up);
    }
    if (threadIdx.x == 0 && power) power[blockIdx.x] = 1.0f / up;
}

// Rows of float32 as input of a product. grid: a block of 256 a row.
extern "C" __global__ void __launch_bounds__(256) narrow(const float* x, int width, Wide* wide, float* power) {
    SHARED_BYTES(memory);
    const long long row = (long long)blockIdx.x * width;
    u32 most = 0;
    for (int i = threadIdx.x; i < width; i += 256) most = max(most, magnitude(x[row + i]));
    const float up = row_power(block_max(most, (float*)memory));
    for (int i = threadIdx.x; i < width; i += 256) wide[row + i] = to_wide(x[row + i] * up);
    if (threadIdx.x == 0) power[blockIdx.x] = 1.0f / up;
}

// silu(gate) · up. Columns of `product`: with `paired` eight gate rows, then their eight up rows, and so on; else all gate rows,
// then all up rows, `apart` columns later. `act` is also the scratch between the two passes. grid: a block of 256 a position.
extern "C" __global__ void __launch_bounds__(256)
silu_times(const float* product, const float* factor, int width, int apart, float* act, Wide* wide, float* power,
           float* gates, float* ups) {
    SHARED_BYTES(memory);
    const float* from = product + (long long)blockIdx.x * width;
    const long long row = (long long)blockIdx.x * N_FF;
    const float scale = factor[blockIdx.x];
    const bool paired = apart == 8;
    u32 most = 0;
    for (int i = threadIdx.x; i < N_FF; i += 256) {
        const int at = paired ? i / 8 * 16 + i % 8 : i;
        const float gate = from[at] * scale, up = from[at + apart] * scale;
        const float value = gate / (1.0f + expf(-gate)) * up;
        if (gates) gates[row + i] = gate, ups[row + i] = up;
        act[row + i] = value;
        most = max(most, magnitude(value));
    }
    const float up = row_power(block_max(most, (float*)memory));
    for (int i = threadIdx.x; i < N_FF; i += 256) wide[row + i] = to_wide(act[row + i] * up);
    if (threadIdx.x == 0) power[blockIdx.x] = 1.0f / up;
}

// --- queries, keys, values -----------------------------------------------------------------------------------------

// From the product of q, k and v: bias, norm of each head, rotation; q to `queries` [position][head][HEAD_DIM], keys and values into
// the cache. grid: (heads of q, k and v, positions), a warp each.
extern "C" __global__ void __launch_bounds__(32)
turn(const float* product, const float* factor, const float* bias, const float* q_norm, const float* k_norm,
     const float2* rope, float* queries, Cached* keys, Cached* values, int n_ctx, int position, int layer,
     float* t_product, float* t_biased, float* t_normed, float* t_turned) {
    const int head = blockIdx.x, row = blockIdx.y, lane = threadIdx.x, half = HEAD_DIM / 2;
    const int kind = head < N_HEAD ? 0 : head < N_HEAD + N_HEAD_KV ? 1 : 2;
    const int kv_head = head - N_HEAD - (kind == 2 ? N_HEAD_KV : 0);
    const long long from = (long long)row * QKV_WIDTH + head * HEAD_DIM;
    const long long normed = (long long)row * (Q_WIDTH + KV_WIDTH) + head * HEAD_DIM;
    const long long cached = (((long long)layer * N_HEAD_KV + kv_head) * n_ctx + position + row) * HEAD_DIM;
    const float scale = factor[row];
    constexpr int each = (HEAD_DIM / 2 + 31) / 32;
    float low[each], high[each], squares = 0;
#pragma unroll
    for (int n = 0; n < each; n++) {
        const int i = lane + 32 * n;
        low[n] = i < half ? product[from + i] * scale : 0.0f;
        high[n] = i < half ? product[from + half + i] * scale : 0.0f;
        if (i < half && t_product) t_product[from + i] = low[n], t_product[from + half + i] = high[n];
        if (QKV_BIAS && i < half) low[n] += bias[head * HEAD_DIM + i], high[n] += bias[head * HEAD_DIM + half + i];
        if (i < half && t_biased) t_biased[from + i] = low[n], t_biased[from + half + i] = high[n];
        squares += low[n] * low[n] + high[n] * high[n];
    }
    const float rms = QK_NORM ? 1.0f / sqrtf(warp_sum(squares) / HEAD_DIM + NORM_EPS) : 1.0f;
    const float* norm = kind == 0 ? q_norm : k_norm;
#pragma unroll
    for (int n = 0; n < each; n++) {
        const int i = lane + 32 * n;
        if (i >= half) continue;
        if (kind == 2) {
            values[cached + i] = to_cache(low[n]), values[cached + half + i] = to_cache(high[n]);
            continue;
        }
        if (QK_NORM) low[n] = low[n] * rms * norm[i], high[n] = high[n] * rms * norm[half + i];
        if (QK_NORM && t_normed) t_normed[normed + i] = low[n], t_normed[normed + half + i] = high[n];
        const float2 by = rope[(long long)(position + row) * half + i];
        const float first = low[n] * by.x - high[n] * by.y, second = low[n] * by.y + high[n] * by.x;
        if (t_turned) t_turned[normed + i] = first, t_turned[normed + half + i] = second;
        if (kind == 0) {
            const long long to = ((long long)row * N_HEAD + head) * HEAD_DIM;
            queries[to + i] = first, queries[to + half + i] = second;
        } else {
            keys[cached + i] = to_cache(first), keys[cached + half + i] = to_cache(second);
        }
    }
}

// --- attention -----------------------------------------------------------------------------------------------------

// Plain float32 arithmetic: exact mode, and heads that the tensor cores' kernel does not fit. A warp takes ROWS positions of one
// head, its groups of LANES_A_KEY lanes every so many keys; `scores` [position][head][n_keys] is for a trace or null.
// grid: (heads, blocks of 8 · ROWS positions), 256 threads.
#define ROWS 2
extern "C" __global__ void __launch_bounds__(256)
attend_exact(const float* queries, const Cached* keys, const Cached* values, int n_ctx, int position, int n, int layer,
             float* out, float* scores) {
    const int head = blockIdx.x, lane = threadIdx.x % 32, row = (blockIdx.y * 8 + threadIdx.x / 32) * ROWS;
    const int channel = lane % LANES_A_KEY * 8, group = lane / LANES_A_KEY, groups = 32 / LANES_A_KEY;
    const bool inside = channel < HEAD_DIM;
    const int n_keys = position + n, last = scores ? n_keys - 1 : min(position + row + ROWS - 1, n_keys - 1);
    const long long cache = ((long long)layer * N_HEAD_KV + head / (N_HEAD / N_HEAD_KV)) * n_ctx * HEAD_DIM + channel;
    if (row >= n) return;
    Softened sums[ROWS];
    Eight q[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        sums[r] = {-INF, 0, {}};
        q[r] = {};
        if (inside && row + r < n)
            for (int i = 0; i < 8; i++) q[r].at[i] = queries[((long long)(row + r) * N_HEAD + head) * HEAD_DIM + channel + i];
    }
    for (int base = 0; base <= last; base += groups) {
        const int key = base + group;
        CachedEight cached_k = {}, cached_v = {};
        if (inside && key <= last) {
            cached_k.load(keys + cache + (long long)key * HEAD_DIM);
            cached_v.load(values + cache + (long long)key * HEAD_DIM);
        }
        const Eight k = cached_k.floats(), v = cached_v.floats();
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float score = 0;
            for (int i = 0; i < 8; i++) score = fmaf(q[r].at[i], k.at[i], score);
            for (int step = LANES_A_KEY / 2; step; step >>= 1) score += __shfl_xor_sync(FULL, score, step);
            score *= SCORE_SCALE;
            if (scores && key <= last && row + r < n && channel == 0)
                scores[((long long)(row + r) * N_HEAD + head) * n_keys + key] = score;
            const float only[1] = {key <= position + row + r && key <= last ? score : -INF};
            const Eight values_of[1] = {v};
            add_keys(sums[r], only, values_of);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int offset = merge_groups(sums[r], lane);
        if (inside && row + r < n)
            for (int i = 0; i < MERGED; i++)
                out[((long long)(row + r) * N_HEAD + head) * HEAD_DIM + channel + offset + i] = sums[r].values.at[i] / sums[r].sum;
    }
}

#if KV_HALF && HEAD_DIM % 16 == 0 && HEAD_DIM <= 128
// The tensor cores' way (arXiv:2307.08691): 4 warps take 64 positions of one head, 16 each, and go over the keys in
// tiles of 64; probabilities never leave the registers. q is split into two halves, a coarse and a fine one, so that
// scores have float32's precision in q. grid: (blocks of 64 positions, heads), 128 threads.
#define TILE 64
#define PITCH (HEAD_DIM + 8)  // halves from row to row in shared memory: no two rows of a product in one bank
extern "C" __global__ void __launch_bounds__(128)
attend(const float* queries, const Cached* keys, const Cached* values, int n_ctx, int position, int n, int layer,
       float* out, float* scores) {
    SHARED_BYTES(memory);
    u16 *key_tile = (u16*)memory, *value_tile = key_tile + TILE * PITCH;
    const int head = blockIdx.y, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int block = (int)gridDim.x - 1 - (int)blockIdx.x;  // the longest first
    const int row = block * TILE + threadIdx.x / 32 * 16 + g, n_keys = position + n;
    const long long cache = ((long long)layer * N_HEAD_KV + head / (N_HEAD / N_HEAD_KV)) * n_ctx * HEAD_DIM;
    constexpr int DEPTH = HEAD_DIM / 16;
    u32 coarse[DEPTH][4], fine[DEPTH][4];
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
#pragma unroll
        for (int w = 0; w < 4; w++) {
            const int r = row + w % 2 * 8, channel = d * 16 + w / 2 * 8 + 2 * t;
            float2 q = {0, 0};
            if (r < n) q = *(const float2*)(queries + ((long long)r * N_HEAD + head) * HEAD_DIM + channel);
            coarse[d][w] = halves(q.x, q.y);
            fine[d][w] = halves(q.x - low_half(coarse[d][w]), q.y - high_half(coarse[d][w]));
        }
    float most[2] = {-INF, -INF}, sums[2] = {0, 0}, sum[DEPTH * 2][4];
#pragma unroll
    for (int d = 0; d < DEPTH * 2; d++) sum[d][0] = sum[d][1] = sum[d][2] = sum[d][3] = 0;
    const int end = scores ? n_keys : min(position + (block + 1) * TILE, n_keys);
    for (int base = 0; base < end; base += TILE) {
        __syncthreads();
        for (int i = threadIdx.x; i < TILE * HEAD_DIM / 8; i += 128) {
            const int key = i / (HEAD_DIM / 8), channel = i % (HEAD_DIM / 8) * 8;
            uint4 k = {0, 0, 0, 0}, v = {0, 0, 0, 0};
            if (base + key < n_keys) {
                k = load16(keys + cache + (long long)(base + key) * HEAD_DIM + channel);
                v = load16(values + cache + (long long)(base + key) * HEAD_DIM + channel);
            }
            *(uint4*)(key_tile + key * PITCH + channel) = k;
            *(uint4*)(value_tile + key * PITCH + channel) = v;
        }
        __syncthreads();
        float s[TILE / 8][4];
#pragma unroll
        for (int j = 0; j < TILE / 8; j++) {
            s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0;
            const u16* from = key_tile + (j * 8 + g) * PITCH + 2 * t;
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                const u32 b0 = *(const u32*)(from + d * 16), b1 = *(const u32*)(from + d * 16 + 8);
                mma_halves(s[j], fine[d], b0, b1);
                mma_halves(s[j], coarse[d], b0, b1);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int at = position + row + 8 * r;
            float now = most[r];
#pragma unroll
            for (int j = 0; j < TILE / 8; j++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int key = base + j * 8 + 2 * t + c;
                    float& score = s[j][2 * r + c];
                    score *= SCORE_SCALE;
                    if (scores && row + 8 * r < n && key < n_keys)
                        scores[((long long)(row + 8 * r) * N_HEAD + head) * n_keys + key] = score;
                    if (key > at || key >= n_keys) score = -INF;
                    now = fmaxf(now, score);
                }
            now = fmaxf(now, __shfl_xor_sync(FULL, now, 1));
            now = fmaxf(now, __shfl_xor_sync(FULL, now, 2));
            const float old = power(most[r], now);
            most[r] = now, sums[r] *= old;
#pragma unroll
            for (int d = 0; d < DEPTH * 2; d++) sum[d][2 * r] *= old, sum[d][2 * r + 1] *= old;
#pragma unroll
            for (int j = 0; j < TILE / 8; j++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    float& score = s[j][2 * r + c];
                    score = power(score, now);
                    sums[r] += score;
                }
        }
#pragma unroll
        for (int j = 0; j < TILE / 16; j++) {
            const u32 a[4] = {halves(s[2 * j][0], s[2 * j][1]), halves(s[2 * j][2], s[2 * j][3]),
                              halves(s[2 * j + 1][0], s[2 * j + 1][1]), halves(s[2 * j + 1][2], s[2 * j + 1][3])};
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                u32 b[4];
                load_transposed(value_tile + (j * 16 + lane % 16) * PITCH + d * 16 + lane / 16 * 8, b);
                mma_halves(sum[2 * d], a, b[0], b[1]);
                mma_halves(sum[2 * d + 1], a, b[2], b[3]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = sums[r];
        total += __shfl_xor_sync(FULL, total, 1);
        total += __shfl_xor_sync(FULL, total, 2);
        if (row + 8 * r >= n) continue;
        float* to = out + ((long long)(row + 8 * r) * N_HEAD + head) * HEAD_DIM + 2 * t;
#pragma unroll
        for (int d = 0; d < DEPTH * 2; d++) {
            to[d * 8] = sum[d][2 * r] / total;
            to[d * 8 + 1] = sum[d][2 * r + 1] / total;
        }
    }
}
#endif

// Probabilities from scores, for a trace: row [position][head] of n_keys. grid: rows, 256 threads.
extern "C" __global__ void __launch_bounds__(256) soften(float* scores, int n_keys, int position) {
    SHARED_BYTES(memory);
    float* row = scores + (long long)blockIdx.x * n_keys;
    const int end = position + blockIdx.x / N_HEAD + 1;
    float most = -INF, sum = 0;
    for (int i = 0; i < end; i++) most = fmaxf(most, row[i]);
    for (int i = threadIdx.x; i < n_keys; i += 256) sum += i < end ? expf(row[i] - most) : 0.0f;
    sum = block_sum(sum, (float*)memory);
    for (int i = threadIdx.x; i < n_keys; i += 256) row[i] = i < end ? expf(row[i] - most) / sum : 0.0f;
}

// One row of logits, or of any product with a matrix whose columns are N_EMBD, by float32 activations: x in, out float32.
// grid: tiles, 128 threads.
extern "C" __global__ void __launch_bounds__(128)
project(const u8* tiles, int type, int rows, const float* x, float* out) {
    SHARED_BYTES(memory);
    const Vector v = vector_at(memory, (N_EMBD + 127) / 128);
    float* red = (float*)(memory + VECTOR_BYTES((N_EMBD + 127) / 128));
    if (threadIdx.x == 0) prepare_vector(v);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int chunk = warp; chunk < (N_EMBD + 127) / 128; chunk += 4) {
        const int column = chunk * 128 + lane * 4;
        float4 four = {0, 0, 0, 0};
        if (column < N_EMBD) four = *(const float4*)(x + column);
        write_digits(v, chunk, four, lane);
    }
    __syncthreads();
    const ChunkShape shape = chunk_shape(type);
    const int per_tile = (N_EMBD + shape.columns - 1) / shape.columns;
    for (int tile = blockIdx.x; tile * TILE_ROWS < rows; tile += gridDim.x) {
        float acc[2] = {0, 0};
        for (int i = warp; i < per_tile; i += 4)
            multiply(type, tiles + ((long long)tile * per_tile + i) * shape.bytes, 1, v, i * (shape.columns / 128), lane, acc);
        gather(!is_float_type(type), lane, acc);
        if (lane % 4 == 0) red[warp * 16 + lane / 4] = acc[0], red[warp * 16 + lane / 4 + 8] = acc[1];
        __syncthreads();
        const int row = tile * TILE_ROWS + threadIdx.x;
        if (threadIdx.x < TILE_ROWS && row < rows)
            out[row] = red[threadIdx.x] + red[16 + threadIdx.x] + red[32 + threadIdx.x] + red[48 + threadIdx.x];
        __syncthreads();
    }
}

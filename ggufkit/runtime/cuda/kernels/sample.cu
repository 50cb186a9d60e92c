// The next token from logits, on the device: one block, launched between two launches of the decoding kernel, so that
// a sampled token never leaves the device either. The filters are those of runtime/sampling.py, in its order, and the
// same number drawn on the host picks the same token there and here.
//
// What has no filter that asks for an order (temperature, min-p) is weighed in the order of the vocabulary. Top-k and top-p
// ask for the likeliest first: a histogram of the distances to the largest logit says how near a token must be; those that are
// near enough are few, and sorted in shared memory. If they are too many, or the logits are not finite, the
// log-probability is NaN and the host chooses.
//
// Sums are in double precision in an order that is always the same; the histogram is of integers.

#define THREADS 1024
#define WARPS (THREADS / 32)
#define BINS 2048
#define BINS_A_NAT 16.0f
#define SHARE_UNIT 1099511627776.0f  // 2^40: what a weight of 1 is in the histogram
#define CANDIDATES 4096

// A logit and its index as one number: the larger logit is larger, of equal ones the smaller index.
DEVICE u64 entry_of(float logit, int index) {
    const u32 bits = __float_as_uint(logit + 0.0f);  // no negative zero
    return (u64)(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | (u32)~index;
}
DEVICE int index_of(u64 entry) { return (int)~(u32)entry; }
DEVICE float logit_of(u64 entry) {
    const u32 order = (u32)(entry >> 32);
    return bits_float(order >> 31 ? order & 0x7fffffffu : ~order);
}

template <class WEIGHT>
DEVICE double sum_by_warp(int begin, int end, WEIGHT weight) {
    double sum = 0;
    for (int i = begin + threadIdx.x % 32; i < end; i += 32) sum += weight(i);
    for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(FULL, sum, step);
    return sum;
}

// The first of `n` indices at which the running sum of the weights exceeds `share` of `whole` (of all weights together, if
// that is 0), or reaches it; where rounding leaves none, the last that has a weight. For the whole block; `sums` [WARPS].
// The range is cut into as many parts as there are warps, the right part again, until one index is left.
template <class WEIGHT>
DEVICE int find(int n, WEIGHT weight, double share, double whole, bool reached, double* sums) {
    int begin = 0, end = n;
    double before = 0, target = share * whole;
    for (bool first = true; first || end - begin > 1; first = false) {
        const int part = (end - begin + WARPS - 1) / WARPS, from = min(begin + (int)threadIdx.x / 32 * part, end);
        const double mine = sum_by_warp(from, min(from + part, end), weight);
        __syncthreads();
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = mine;
        __syncthreads();
        if (first && whole == 0) {
            double all = 0;
            for (int i = 0; i < WARPS; i++) all += sums[i];
            target = share * all;
        }
        int chosen = 0;
        double running = before;
        for (int i = 0; i < WARPS; i++) {
            if (!(sums[i] > 0)) continue;
            chosen = i, before = running, running += sums[i];
            if (reached ? running >= target : running > target) break;
        }
        begin = min(begin + chosen * part, end), end = min(begin + part, end);
    }
    return begin;
}

// Into falling order; `n` is a power of two.
DEVICE void sort(u64* entries, int n) {
    for (int size = 2; size <= n; size <<= 1)
        for (int step = size / 2; step; step >>= 1) {
            for (int i = threadIdx.x; i < n / 2; i += THREADS) {
                const int left = 2 * i - (i & (step - 1)), right = left + step;
                const u64 a = entries[left], b = entries[right];
                if ((a < b) == ((left & size) == 0)) entries[left] = b, entries[right] = a;
            }
            __syncthreads();
        }
}

struct Scratch {
    double sums[WARPS];
    u32 n;  // candidates
    union {
        struct {
            u64 shares[BINS];
            u32 counts[BINS];
        };
        u64 entries[CANDIDATES];
    };
};

// How far below the largest a logit may be, in bins, to be among the `top_k` likeliest or, with 0, those that have
// `top_p` of `whole`; how many are that near is left in `count`.
DEVICE int last_bin(Scratch& s, const float* logits, int n, float most, int top_k, double top_p, double whole, int& count) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) s.counts[i] = 0, s.shares[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += THREADS) {
        const float below = most - logits[i];
        if (!(below * BINS_A_NAT < BINS)) continue;
        atomicAdd(&s.counts[(int)(below * BINS_A_NAT)], 1u);
        if (!top_k) atomicAdd(&s.shares[(int)(below * BINS_A_NAT)], (u64)(expf(-below) * SHARE_UNIT));
    }
    __syncthreads();
    const int last =
        top_k ? find(BINS, [&](int i) { return (double)s.counts[i]; }, top_k, 1, true, s.sums)
              : find(BINS, [&](int i) { return (double)s.shares[i] / SHARE_UNIT; }, top_p, whole, true, s.sums);
    count = (int)sum_by_warp(0, last + 1, [&](int i) { return (double)s.counts[i]; });
    return last;
}

// Before: *id is the likeliest token, *chance its log-probability. After: the token chosen, and its own. `top_k` 0, `top_p` 1 and
// `log_min_p` -INF are off; `uniform` is a number from [0, 1). grid: one block.
extern "C" __global__ void __launch_bounds__(THREADS)
choose(const float* logits, int n, int top_k, double top_p, float log_min_p, float per_temperature, double uniform, int* id,
       float* chance) {
    SHARED_BYTES(memory);
    Scratch& s = *(Scratch*)memory;
    const float certain = *chance, most = logits[*id];
    if (!(certain <= 0.0f) || most - most != 0.0f) {  // NaN or an infinity
        if (threadIdx.x == 0) *chance = bits_float(0x7fc00000u);
        return;
    }
    const float least = most + log_min_p;
    const auto weight = [&](float logit) { return logit >= least ? (double)expf((logit - most) * per_temperature) : 0.0; };
    int chosen;
    __syncthreads();  // everybody has read *id and *chance
    if (top_k == 0 && top_p >= 1) {
        chosen = find(n, [&](int i) { return weight(logits[i]); }, uniform, 0, false, s.sums);
    } else {
        const double whole = exp(-(double)certain);
        int count;
        const int last = last_bin(s, logits, n, most, top_k, top_p, whole, count);
        if (count > CANDIDATES || count < min(top_k, n)) {
            if (threadIdx.x == 0) *chance = bits_float(0x7fc00000u);
            return;
        }
        __syncthreads();
        int padded = 2;
        while (padded < count) padded <<= 1;
        for (int i = threadIdx.x; i < padded; i += THREADS) s.entries[i] = 0;
        if (threadIdx.x == 0) s.n = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += THREADS) {
            const float below = most - logits[i];
            if (below * BINS_A_NAT < BINS && (int)(below * BINS_A_NAT) <= last)
                s.entries[atomicAdd(&s.n, 1u)] = entry_of(logits[i], i);
        }
        __syncthreads();
        sort(s.entries, padded);
        int kept = top_k ? min(count, top_k) : count;
        if (top_p < 1) {
            const auto share = [&](int i) { return (double)expf(logit_of(s.entries[i]) - most); };
            kept = find(kept, share, top_p, top_k ? 0 : whole, true, s.sums) + 1;
        }
        chosen = index_of(s.entries[find(kept, [&](int i) { return weight(logit_of(s.entries[i])); }, uniform, 0, false, s.sums)]);
    }
    if (threadIdx.x == 0) *id = chosen, *chance = certain + (logits[chosen] - most);
}

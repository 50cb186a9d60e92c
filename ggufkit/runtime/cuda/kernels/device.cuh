// What every kernel here stands on: fixed-width names, wide loads, the tensor cores' integer product, asynchronous
// copies into shared memory and words that carry their own flag. This file holds all the inline PTX of the
// project, so that the kernels themselves are plain C++. Nothing is included: NVRTC needs no headers for it.
//
// Compute capability 7.5 and newer; what a newer one does better is chosen by __CUDA_ARCH__.

typedef unsigned char u8;
typedef signed char s8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef EMULATED  // the CPU emulation in tests/ brings its own versions of everything below

#define DEVICE __device__ __forceinline__
#define FULL 0xffffffffu
#define SHARED_BYTES(name) extern __shared__ __align__(128) u8 name[]

#if __CUDA_ARCH__ >= 900
#define HAS_BULK_COPY 1
#else
#define HAS_BULK_COPY 0
#endif

DEVICE float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

DEVICE u16 float_to_half(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

// --- the tensor cores' 8-bit product -------------------------------------------------------------------------------
//
// c = begin + a (16 x k, rows) · b (k x 8, columns), 32-bit integers; b is signed. With g = lane / 4 and t = lane % 4 a
// lane holds
//     a[0] row g,  k 4t..4t+3      a[1] row g+8, the same k      (a[2], a[3]: the same rows, k + 16)
//     b    column g, k 4t..4t+3 (second word: k + 16)
//     c[0] row g, column 2t   c[1] row g, column 2t+1   c[2], c[3]: row g+8
// Sums begin with MAGIC_BITS, the bits of 1.5 · 2^23, under which a small integer is its own float. `begin` comes from
// memory: a constant would be put together anew, four instructions each time.

#define MAGIC 12582912.0f
#define MAGIC_BITS 0x4b400000

#define MMA_K16(TYPE)                                                                                                \
    asm("mma.sync.aligned.m16n8k16.row.col.s32." TYPE ".s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"        \
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])                                                             \
        : "r"(a0), "r"(a1), "r"(b), "r"(begin.x), "r"(begin.y), "r"(begin.z), "r"(begin.w))
#define MMA_K32(TYPE)                                                                                                \
    asm("mma.sync.aligned.m16n8k32.row.col.s32." TYPE ".s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};" \
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])                                                             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(begin.x), "r"(begin.y), \
          "r"(begin.z), "r"(begin.w))
#define MMA_8X8(TYPE, C0, C1, A, B)                                                                                  \
    asm("mma.sync.aligned.m8n8k16.row.col.s32." TYPE ".s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"                         \
        : "+r"(C0), "+r"(C1) : "r"(A), "r"(B))

template <bool SIGNED>
DEVICE void mma_k16(int (&c)[4], u32 a0, u32 a1, u32 b, const uint4& begin) {
#if __CUDA_ARCH__ >= 800
    if (SIGNED)
        MMA_K16("s8");
    else
        MMA_K16("u8");
#else
    c[0] = begin.x, c[1] = begin.y, c[2] = begin.z, c[3] = begin.w;
    if (SIGNED) {
        MMA_8X8("s8", c[0], c[1], a0, b);
        MMA_8X8("s8", c[2], c[3], a1, b);
    } else {
        MMA_8X8("u8", c[0], c[1], a0, b);
        MMA_8X8("u8", c[2], c[3], a1, b);
    }
#endif
}

template <bool SIGNED>
DEVICE void mma_k32(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, const uint4& begin) {
#if __CUDA_ARCH__ >= 800
    if (SIGNED)
        MMA_K32("s8");
    else
        MMA_K32("u8");
#else
    mma_k16<SIGNED>(c, a[0], a[1], b0, begin);
    if (SIGNED) {
        MMA_8X8("s8", c[0], c[1], a[2], b1);
        MMA_8X8("s8", c[2], c[3], a[3], b1);
    } else {
        MMA_8X8("u8", c[0], c[1], a[2], b1);
        MMA_8X8("u8", c[2], c[3], a[3], b1);
    }
#endif
}

// --- the tensor cores' product of halves ---------------------------------------------------------------------------
//
// c += a (16 x 16) · b (16 x 8), f16 operands, f32 sums. A lane holds, two halves a word,
//     a[0] row g, k 2t 2t+1   a[1] row g+8, the same k   a[2], a[3]: the same rows, k + 8
//     b0   k 2t 2t+1, column g   b1: k + 8               c as above
DEVICE void mma_halves(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// Four 8 x 8 blocks of halves from shared memory, each transposed: lane i brings the address of row i % 8 of block i / 8
// and gets, of every block, the rows 2t and 2t + 1 of column g.
DEVICE void load_transposed(const u16* at, u32 (&r)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((u32)__cvta_generic_to_shared(at)) : "memory");
}

DEVICE u32 warp_max(u32 value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(FULL, value);
#else
    for (int step = 16; step; step >>= 1) value = max(value, __shfl_xor_sync(FULL, value, step));
    return value;
#endif
}

// --- words with a flag ---------------------------------------------------------------------------------------------
//
// One multiprocessor hands a value to another as an 8-byte word (value, epoch). Such a word is written and read
// whole, so whoever sees the epoch that he waits for also has the value: no barrier, no fence.

DEVICE void put_word(uint2* at, u32 value, u32 epoch) {
    asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1,%2};" ::"l"(at), "r"(value), "r"(epoch) : "memory");
}

DEVICE uint4 peek_words(const uint2* at) {  // two words; `at` lies on 16 bytes
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
    return v;
}

DEVICE uint2 peek_word(const uint2* at) {
    uint2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at) : "memory");
    return v;
}

// What another multiprocessor may have written during this launch: past the first-level cache.
DEVICE uint4 load_shared_line(const void* at) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
    return v;
}

// Leave the processor to others for a moment.
DEVICE void pause() { __nanosleep(20); }

// A barrier of the block's first `threads` threads.
DEVICE void sync_first(u32 threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }

// --- asynchronous copies into shared memory ------------------------------------------------------------------------

#if HAS_BULK_COPY
DEVICE u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

DEVICE void gate_init(u64* gate) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(gate)) : "memory");
}

DEVICE void gates_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Weights are read once a token: they shall not push what is read again out of the second-level cache.
DEVICE u64 read_once() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Fill `to` with `bytes` (a multiple of 16) from device memory; `gate` opens when they have arrived.
DEVICE void copy_start(void* to, const void* from, u32 bytes, u64* gate, u64 policy) {
    const u32 address = shared_address(gate);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(address), "l"(policy) : "memory");
}

DEVICE void gate_wait(u64* gate, u32 parity) {
    asm volatile("{\n.reg .pred open;\n"
                 "again:\nmbarrier.try_wait.parity.shared::cta.b64 open, [%0], %1;\n@!open bra again;\n}"
                 ::"r"(shared_address(gate)), "r"(parity) : "memory");
}
#endif

#endif  // EMULATED

#define INF __uint_as_float(0x7f800000u)

DEVICE uint4 load16(const void* at) { return *(const uint4*)at; }
DEVICE uint2 load8(const void* at) { return *(const uint2*)at; }
DEVICE float bits_float(u32 bits) { return __uint_as_float(bits); }
DEVICE float bf16_to_float(u16 bits) { return bits_float((u32)bits << 16); }
DEVICE float low_half(u32 pair) { return half_to_float((u16)pair); }
DEVICE float high_half(u32 pair) { return half_to_float((u16)(pair >> 16)); }

DEVICE u32 halves(float low, float high) { return float_to_half(low) | (u32)float_to_half(high) << 16; }

DEVICE float warp_sum(float value) {
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(FULL, value, step);
    return value;
}

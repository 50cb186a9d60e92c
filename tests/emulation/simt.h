// A GPU made of fibers: every thread of every block is a coroutine on one CPU core, and what threads do together
// (barriers, shuffles, the tensor cores' product) waits until all of them have come. Enough of CUDA C++ to run the kernels
// of ggufkit unchanged, slowly, where there is no GPU.
#pragma once
#define _GNU_SOURCE
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define EMULATED 1
#define __device__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(...)
#define DEVICE inline
#define FULL 0xffffffffu
#define HAS_BULK_COPY 1
#define SHARED_BYTES(name) unsigned char* name = simt::shared()
using std::max;
using std::min;

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct Dim { unsigned x, y, z; };

namespace simt {
struct Barrier {  // of one warp or block
    int size = 0, arrived = 0;
    unsigned long long generation = 0;
    unsigned char slots[2][32][64];
};
struct Fiber {
    ucontext_t context;
    std::vector<unsigned char> stack;
    Dim thread, block;
    Barrier *warp, *whole, *first;  // `first`: of the block's first threads, however many a kernel says
    unsigned char* shared;
    bool done = false;
};
inline Fiber* current;
inline ucontext_t scheduler;
inline Dim grid, threads;
inline std::function<void()> body;
inline unsigned long long moves;  // grows whenever some fiber gets past something

inline void yield() { swapcontext(&current->context, &scheduler); }
inline unsigned char* shared() { return current->shared; }
inline void run_body() {
    body();
    current->done = true;
    moves++;
    swapcontext(&current->context, &scheduler);
}
// Wait until everybody of `b` is here; returns the slots that this round wrote.
inline int arrive(Barrier* b, const void* data, size_t size, int lane) {
    const auto generation = b->generation;
    const int side = generation & 1;
    if (data) memcpy(b->slots[side][lane], data, size);
    if (++b->arrived == b->size) b->arrived = 0, b->generation++, moves++;
    while (b->generation == generation) yield();
    return side;
}
inline int lane() { return current->thread.x % 32; }
template <class T> T exchange(T value, int from) {
    Barrier* b = current->warp;
    const int side = arrive(b, &value, sizeof(T), lane());
    T got;
    memcpy(&got, b->slots[side][from & 31], sizeof(T));
    return got;
}
// Run `count` blocks from `first` on at the same time.
inline bool run_blocks(Dim g, unsigned first, unsigned blocks, unsigned n_threads, size_t shared_bytes) {
    std::vector<std::vector<unsigned char>> memory(blocks);
    std::vector<Barrier> whole(blocks), first_threads(blocks), warps(blocks * (n_threads / 32));
    std::vector<Fiber> fibers(blocks * n_threads);
    for (unsigned b = 0; b < blocks; b++) {
        memory[b].resize(shared_bytes + 128);
        for (auto& c : memory[b]) c = 0xfb;  // whoever reads what nobody wrote finds a NaN
        whole[b].size = n_threads;
        for (unsigned t = 0; t < n_threads; t++) {
            Fiber& f = fibers[b * n_threads + t];
            const unsigned n = first + b;
            f.thread = {t, 0, 0}, f.block = {n % g.x, n / g.x % g.y, n / (g.x * g.y)};
            f.whole = &whole[b], f.first = &first_threads[b], f.warp = &warps[b * (n_threads / 32) + t / 32];
            f.warp->size = 32;
            f.shared = (unsigned char*)(((uintptr_t)memory[b].data() + 127) & ~(uintptr_t)127);
            f.stack.resize(96 << 10);
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
            f.context.uc_link = &scheduler;
            makecontext(&f.context, (void (*)())run_body, 0);
        }
    }
    size_t left = fibers.size();
    unsigned long long seen = moves;
    int idle = 0;
    while (left) {
        left = 0;
        for (auto& f : fibers) {
            if (f.done) continue;
            left++;
            current = &f;
            swapcontext(&scheduler, &f.context);
        }
        if (moves == seen) {
            if (++idle > 20) {
                fprintf(stderr, "simt: deadlock, %zu threads wait\n", left);
                return false;
            }
        } else {
            idle = 0, seen = moves;
        }
    }
    return true;
}
// A launch: all blocks at once when they talk to each other, else one after the other.
inline bool launch(Dim g, unsigned n_threads, size_t shared_bytes, bool together, std::function<void()> kernel) {
    grid = g, threads = {n_threads, 1, 1}, body = kernel;
    const unsigned blocks = g.x * g.y * g.z;
    if (together) return run_blocks(g, 0, blocks, n_threads, shared_bytes);
    for (unsigned b = 0; b < blocks; b++)
        if (!run_blocks(g, b, 1, n_threads, shared_bytes)) return false;
    return true;
}
}  // namespace simt

#define threadIdx (simt::current->thread)
#define blockIdx (simt::current->block)
#define gridDim (simt::grid)
#define blockDim (simt::threads)

static inline void __syncthreads() { simt::arrive(simt::current->whole, nullptr, 0, 0); }
static inline void pause() { simt::yield(); }
static inline void sync_first(unsigned n) {
    simt::current->first->size = n;
    simt::arrive(simt::current->first, nullptr, 0, 0);
}
static inline void __syncwarp() { simt::arrive(simt::current->warp, nullptr, 0, 0); }
static inline void __threadfence() {}
template <class T> static inline T atomicAdd(T* at, T more) { const T before = *at; *at += more; simt::moves++; return before; }
template <class T> static inline T __shfl_xor_sync(unsigned, T v, int mask) { return simt::exchange(v, simt::lane() ^ mask); }
template <class T> static inline T __shfl_sync(unsigned, T v, int from) { return simt::exchange(v, from); }
static inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
static inline float __int_as_float(int u) { float f; memcpy(&f, &u, 4); return f; }
static inline int __float_as_int(float f) { int u; memcpy(&u, &f, 4); return u; }
static inline float rsqrtf(float x) { return (float)(1 / std::sqrt((double)x)); }
static inline float __fdividef(float x, float y) { return x / y; }
static inline int __float2int_rn(float f) { return f != f ? 0 : (int)nearbyintf(f); }
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
    unsigned char bytes[8];
    memcpy(bytes, &a, 4), memcpy(bytes + 4, &b, 4);
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= (unsigned)bytes[s >> (4 * i) & 7] << (8 * i);
    return r;
}
static inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (int)(signed char)(a >> (8 * i)) * (int)(signed char)(b >> (8 * i));
    return c;
}

typedef unsigned char u8;
typedef signed char s8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

static inline float half_to_float(u16 h) { _Float16 x; memcpy(&x, &h, 2); return (float)x; }
static inline u16 float_to_half(float f) { _Float16 x = (_Float16)f; u16 h; memcpy(&h, &x, 2); return h; }
static inline u32 warp_max(u32 v) { for (int s = 16; s; s >>= 1) v = max(v, __shfl_xor_sync(FULL, v, s)); return v; }

#define MAGIC 12582912.0f
#define MAGIC_BITS 0x4b400000
template <bool SIGNED> static inline void mma_words(int (&c)[4], const u32* a, const u32* b, int halves, const uint4& begin) {
    c[0] = begin.x, c[1] = begin.y, c[2] = begin.z, c[3] = begin.w;
    struct Words { u32 a[4], b[2]; } mine = {};
    for (int i = 0; i < 2 * halves; i++) mine.a[i] = a[i];
    for (int i = 0; i < halves; i++) mine.b[i] = b[i];
    simt::Barrier* w = simt::current->warp;
    const int side = simt::arrive(w, &mine, sizeof mine, simt::lane());
    const int g = simt::lane() / 4, t = simt::lane() % 4;
    for (int r = 0; r < 2; r++)
        for (int n = 0; n < 2; n++)
            for (int q = 0; q < 4; q++) {
                Words x, y;
                memcpy(&x, w->slots[side][g * 4 + q], sizeof x);
                memcpy(&y, w->slots[side][(2 * t + n) * 4 + q], sizeof y);
                for (int h = 0; h < halves; h++)
                    for (int k = 0; k < 4; k++) {
                        const u32 byte = x.a[h * 2 + r] >> (8 * k) & 255;
                        c[r * 2 + n] += (SIGNED ? (int)(s8)byte : (int)byte) * (int)(s8)(y.b[h] >> (8 * k) & 255);
                    }
            }
}
template <bool SIGNED> static inline void mma_k16(int (&c)[4], u32 a0, u32 a1, u32 b, const uint4& begin) {
    const u32 a[2] = {a0, a1};
    mma_words<SIGNED>(c, a, &b, 1, begin);
}
template <bool SIGNED> static inline void mma_k32(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, const uint4& begin) {
    const u32 b[2] = {b0, b1};
    mma_words<SIGNED>(c, a, b, 2, begin);
}

static inline void mma_halves(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    struct Words { u32 a[4], b[2]; } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    simt::Barrier* w = simt::current->warp;
    const int side = simt::arrive(w, &mine, sizeof mine, simt::lane());
    const int g = simt::lane() / 4, t = simt::lane() % 4;
    for (int r = 0; r < 2; r++)
        for (int n = 0; n < 2; n++)
            for (int q = 0; q < 4; q++) {
                Words x, y;
                memcpy(&x, w->slots[side][g * 4 + q], sizeof x);
                memcpy(&y, w->slots[side][(2 * t + n) * 4 + q], sizeof y);
                for (int h = 0; h < 2; h++)
                    for (int k = 0; k < 2; k++)
                        c[r * 2 + n] += half_to_float((u16)(x.a[h * 2 + r] >> (16 * k))) * half_to_float((u16)(y.b[h] >> (16 * k)));
            }
}
static inline void load_transposed(const u16* at, u32 (&r)[4]) {
    simt::Barrier* w = simt::current->warp;
    const int side = simt::arrive(w, &at, sizeof at, simt::lane());
    const int g = simt::lane() / 4, t = simt::lane() % 4;
    for (int m = 0; m < 4; m++) {
        const u16 *even, *odd;
        memcpy(&even, w->slots[side][m * 8 + 2 * t], sizeof even);
        memcpy(&odd, w->slots[side][m * 8 + 2 * t + 1], sizeof odd);
        r[m] = even[g] | (u32)odd[g] << 16;
    }
}

static inline void put_word(uint2* at, u32 value, u32 epoch) { *at = {value, epoch}; simt::moves++; }
static inline uint4 peek_words(const uint2* at) { simt::yield(); return {at[0].x, at[0].y, at[1].x, at[1].y}; }
static inline uint2 peek_word(const uint2* at) { simt::yield(); return *at; }
static inline uint4 load_shared_line(const void* at) { return *(const uint4*)at; }

static inline void gate_init(u64* gate) { *gate = 0; }
static inline void gates_ready() {}
static inline u64 read_once() { return 0; }
static inline void copy_start(void* to, const void* from, u32 bytes, u64* gate, u64) {
    memcpy(to, from, bytes);
    ++*gate;
    simt::moves++;
}
static inline void gate_wait(u64* gate, u32 parity) { while ((*gate & 1) == parity) simt::yield(); }

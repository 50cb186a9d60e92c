// One row tile times one activation vector, exactly.
//
// Codes are small integers and the tensor cores multiply small integers without error. So the activation vector is
// written as integers, too: within 128 columns x = scale · (65536 d0 + 256 d1 + d2) with signed byte digits, 22 bits
// below the largest element, which is what float32 keeps of a sum that this element takes part in. The three digits are the
// columns 0, 2 and 4 of the 8 that a product offers (the even ones, so that each lane finds the result of one
// digit), and 16 rows x 32 columns x 3 digits cost one instruction. Per group of columns that share a scale the
// integer sum becomes a float and is weighted; a NaN or an infinity makes the scale of its 128 columns NaN, so
// that nothing non-finite is ever rounded away.
//
// What a product needs of the vector lies in shared memory (`Vector`):
//     digits   [64 columns][digit][t][step][half] words of four columns: what lane (digit, t) multiplies by in two steps
//     sums16, sums32   [group][4] floats: the sum of each digit over the group (the fourth is 0), for types with mins
//     scale    [128 columns]
//     plain    [column] floats, for matrices of floats; only there when the model has any
//
// The type numbers are the file's; W8 stands for all that is converted.

#define TYPE_F32 0
#define TYPE_F16 1
#define TYPE_Q4_0 2
#define TYPE_Q4_1 3
#define TYPE_Q5_0 6
#define TYPE_Q5_1 7
#define TYPE_Q8_0 8
#define TYPE_Q2_K 10
#define TYPE_Q3_K 11
#define TYPE_Q4_K 12
#define TYPE_Q5_K 13
#define TYPE_Q6_K 14
#define TYPE_BF16 30
#define TYPE_W8 31
#define HAS(type) (TYPES >> TYPE_##type & 1u)
#define ALL_TYPES(CODES, FLOATS)                                                                                \
    CODES(Q5_0) CODES(Q8_0) CODES(Q4_K) CODES(Q6_K) CODES(Q5_K) CODES(Q4_0) CODES(Q4_1) CODES(Q5_1) CODES(Q2_K) \
    CODES(Q3_K) CODES(W8) FLOATS(F16) FLOATS(BF16) FLOATS(F32)
#define HAS_FLOATS (HAS(F32) || HAS(F16) || HAS(BF16))
#define HAS_MINS (HAS(Q4_1) || HAS(Q5_1) || HAS(Q2_K) || HAS(Q4_K) || HAS(Q5_K))

struct Vector {
    u32* digits;
    float *sums16, *sums32, *scale, *plain;
    uint4* begin;  // what integer sums begin with
};
#define VECTOR_BYTES(chunks) (((chunks) * VECTOR_BYTES_PER_128 + 15) / 16 * 16 + 16)
#define VECTOR_BYTES_PER_128 (384 + 128 + 64 + 4 + (HAS_FLOATS ? 512 : 0))

// Lay the vector's parts out behind each other from `at` on.
DEVICE Vector vector_at(u8* at, int chunks) {
    Vector v;
    v.begin = (uint4*)at, at += 16;
    v.digits = (u32*)at, at += chunks * 384;
    v.sums16 = (float*)at, at += chunks * 128;
    v.sums32 = (float*)at, at += chunks * 64;
    v.plain = (float*)at, at += HAS_FLOATS ? chunks * 512 : 0;
    v.scale = (float*)at;
    return v;
}

// Once, by one thread.
DEVICE void prepare_vector(const Vector& v) { *v.begin = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS}; }

// The lowest bytes of four integers as one word.
DEVICE u32 low_bytes(int x0, int x1, int x2, int x3) {
    return __byte_perm(__byte_perm(x0, x1, 0x0040), __byte_perm(x2, x3, 0x0040), 0x5410);
}

// A warp writes 128 columns of the vector: lane i brings the columns 4i .. 4i+3 of chunk `chunk`. Without `mins` nobody who
// multiplies asks for the sums.
DEVICE void write_digits(const Vector& v, int chunk, float4 x, int lane, bool mins = true) {
    if (HAS_FLOATS) *(float4*)(v.plain + chunk * 128 + lane * 4) = x;
    const u32 most = warp_max(max(max(__float_as_uint(x.x) & 0x7fffffffu, __float_as_uint(x.y) & 0x7fffffffu),
                                  max(__float_as_uint(x.z) & 0x7fffffffu, __float_as_uint(x.w) & 0x7fffffffu)));
    const u32 exponent = max(most >> 23, 24u);  // biased; smaller vectors are treated as if they were 2^-103 large
    const bool finite = most < 0x7f800000u;
    const float to_int = finite ? bits_float((275 - exponent) << 23) : 0.0f;  // 2^(21 - exponent)
    int x0 = __float2int_rn(x.x * to_int), x1 = __float2int_rn(x.y * to_int);
    int x2 = __float2int_rn(x.z * to_int), x3 = __float2int_rn(x.w * to_int);
    const int half = lane / 4 % 2, t = lane % 4;
    u32* to = v.digits + chunk * 96 + lane / 16 * 48 + t * 4 + lane / 8 % 2 * 2 + half;
    int sums[3];
#pragma unroll
    for (int digit = 2; digit >= 0; digit--) {
        const u32 word = low_bytes(x0, x1, x2, x3);
        to[digit * 16] = word;
        sums[digit] = __dp4a((int)word, 0x01010101, 0);
        x0 = (x0 + 128) >> 8, x1 = (x1 + 128) >> 8, x2 = (x2 + 128) >> 8, x3 = (x3 + 128) >> 8;
    }
    if (lane == 0) v.scale[chunk] = finite ? bits_float((exponent - 21) << 23) : bits_float(0x7fc00000u);
    if (!HAS_MINS || !mins) return;
#pragma unroll
    for (int digit = 0; digit < 3; digit++) {
        sums[digit] += __shfl_xor_sync(FULL, sums[digit], 1);
        sums[digit] += __shfl_xor_sync(FULL, sums[digit], 2);
    }
    const int mine = t == 0 ? sums[0] : t == 1 ? sums[1] : t == 2 ? sums[2] : 0;
    const int both = mine + __shfl_xor_sync(FULL, mine, 4);
    v.sums16[(chunk * 8 + lane / 4) * 4 + t] = (float)mine;
    if (half == 0) v.sums32[(chunk * 4 + lane / 8) * 4 + t] = (float)both;
}

// A group's integer sums, weighed, for the rows g and g + 8 and this lane's digit.
template <class B>
DEVICE void weigh(const int (&c)[4], const float* sum, const typename B::Head& h, int group, float (&part)[2],
                  float (&least)[2]) {
    part[0] = fmaf(__int_as_float(c[0]) - MAGIC, B::scale(h, 0, group), part[0]);
    part[1] = fmaf(__int_as_float(c[2]) - MAGIC, B::scale(h, 1, group), part[1]);
    if (!B::MINS) return;
    const float digits = *sum;
    least[0] = fmaf(B::least(h, 0, group), digits, least[0]);
    least[1] = fmaf(B::least(h, 1, group), digits, least[1]);
}

// `count` chunks of a tile by the vector from its 128-column piece `at` on, added to `acc` (rows g and g + 8).
template <class B>
DEVICE void multiply_codes(const u8* chunk, int count, const Vector& v, int at, int lane, float (&acc)[2]) {
    const int t = lane % 4, column = lane / 4;
    const bool multiplies = (column & 1) == 0 && column < 6;
    const u32* digits = v.digits + at * 96 + column / 2 * 16 + t * 4;
    const float *sums = (B::GROUP == 32 ? v.sums32 + at * 16 : v.sums16 + at * 32) + t, *scale = v.scale + at;
    const uint4 begin = *v.begin;
#pragma unroll 1
    for (; count; count--) {
        const typename B::Head h = B::head(chunk, lane);
#pragma unroll
        for (int piece = 0; piece < B::COLS / 128; piece++) {
            float part[2] = {0, 0}, least[2] = {0, 0};
#pragma unroll
            for (int p = 0; p < 2; p++) {
                Codes a[2];
                B::pair(chunk, h, lane, piece * 2 + p, a);
                uint4 b = {0, 0, 0, 0};
                if (multiplies) b = load16(digits + p * 48);
#pragma unroll
                for (int s = 0; s < 2; s++) {
                    const int step = p * 2 + s, inside = piece * 4 + step;
                    const u32 b0 = s ? b.z : b.x, b1 = s ? b.w : b.y;
                    if (B::GROUP == 32) {
                        int c[4];
                        mma_k32<!B::MINS>(c, a[s], b0, b1, begin);
                        weigh<B>(c, sums + step * 4, h, inside, part, least);
                    } else {
                        int c[4], d[4];
                        mma_k16<!B::MINS>(c, a[s][0], a[s][1], b0, begin);
                        mma_k16<!B::MINS>(d, a[s][2], a[s][3], b1, begin);
                        weigh<B>(c, sums + step * 8, h, inside * 2, part, least);
                        weigh<B>(d, sums + step * 8 + 4, h, inside * 2 + 1, part, least);
                    }
                }
            }
            const float by = *scale;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                acc[r] = fmaf(part[r], B::factor(h, r) * B::UNIT * by, acc[r]);
                if (B::MINS) acc[r] = fmaf(least[r], B::least_factor(h, r) * by, acc[r]);
            }
            digits += 96, sums += B::GROUP == 32 ? 16 : 32, scale++;
        }
        chunk += B::BYTES;
    }
}

template <class B>
DEVICE void multiply_floats(const u8* chunk, int count, const Vector& v, int at, int lane, float (&acc)[2]) {
#pragma unroll 1
    for (int i = 0; i < count * 4; i++) {
        const int step = i % 4;
        const float* x = v.plain + at * 128 + i * STEP + lane % 4 * 4;
        const float4 left = *(const float4*)x, right = *(const float4*)(x + 16);
#pragma unroll
        for (int low = 0; low < 2; low++) {
            float w[8];
            B::values(chunk, lane, step, low, w);
            acc[low] = fmaf(w[0], left.x, fmaf(w[1], left.y, fmaf(w[2], left.z, fmaf(w[3], left.w, acc[low]))));
            acc[low] = fmaf(w[4], right.x, fmaf(w[5], right.y, fmaf(w[6], right.z, fmaf(w[7], right.w, acc[low]))));
        }
        if (step == 3) chunk += B::BYTES;
    }
}

DEVICE bool is_float_type(int type) { return type == TYPE_F32 || type == TYPE_F16 || type == TYPE_BF16; }

// `count` chunks in a row, of any type that the model has.
DEVICE void multiply(int type, const u8* chunk, int count, const Vector& v, int at, int lane, float (&acc)[2]) {
#define CODES(T) if (HAS(T) && type == TYPE_##T) return multiply_codes<T>(chunk, count, v, at, lane, acc);
#define FLOATS(T) if (HAS(T) && type == TYPE_##T) return multiply_floats<T>(chunk, count, v, at, lane, acc);
    ALL_TYPES(CODES, FLOATS)
#undef CODES
#undef FLOATS
}

// The tile's 16 sums from what the lanes of a warp have accumulated: lane 4g gets rows g and g + 8.
DEVICE void gather(bool codes, int lane, float (&acc)[2]) {
    const int t = lane % 4;
    const float weight = !codes ? 1.0f : t == 0 ? 65536.0f : t == 1 ? 256.0f : 1.0f;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum = codes && t == 3 ? 0.0f : acc[r] * weight;
        sum += __shfl_xor_sync(FULL, sum, 1);
        acc[r] = sum + __shfl_xor_sync(FULL, sum, 2);
    }
}

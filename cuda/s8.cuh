/* s8.cuh - LLM.int8(): what the kernels of linear_8bit share.
 *
 *   s8_linear.cu  the front: which of the kernels below run
 *   s8_rows.cu    outlier columns of a batch; rows of x to int8
 *   s8_few.cu     the product for few rows of x: W straight from memory to the tensor cores
 *   s8_tiles.cu   the product for many rows
 *   s8_plain.cu   the product without tensor cores, for any k and alignment
 *
 * Every product ends alike, with everything in its epilogue:
 *   y = sum over blocks of float(int32 sum) * (x_scale * w_scale)     exact sums, in block order
 *     + sum over outliers of x * dequantised w                        add_outliers()
 *     + bias
 */
#ifndef BNBQ_S8_CUH
#define BNBQ_S8_CUH

#include "launch.cuh"

/* Which elements of a row stay float: those that are outliers themselves, those in a column with
 * an outlier in any row (the rows look at each other), or those in columns found by a launch
 * before. */
enum outlier_rule { OWN, ALL_ROWS, FLAGGED };

enum {
    CHUNK = 32 /* columns of a word of flags */,
    S8_MAX_K = 1 << 17 /* 2^17 * 127 * 128 < 2^31 */
};

/* One call. Rows of x and of q start at multiples of 16 bytes. */
struct s8_linear {
    matrix x, y;
    bnbq_weight8 w;
    const void *bias; /* [n] or NULL */
    bnbq_dtype bias_dtype;
    int64_t m, n, k;
    int64_t block, blocks; /* columns that share a scale of W; how often */
    outlier_rule rule;
    float threshold; /* an outlier is not less; Inf: only NaN and Inf are outliers */
    bool wide_y;     /* 4 columns of y may be stored at once */
    /* Working space; `padded` is k rounded up to whole chunks. */
    int64_t padded;
    int8_t *q;            /* [m, padded]: 0 for outliers and past k */
    uint2 *rows;          /* [m]: bits of x_scale = absmax / 127; not 0 if the row has outliers */
    uint8_t *flags;       /* bit c % 8 of byte c / 8: column c of a row is to stay float */
    int64_t flags_stride; /* bytes to the flags of the next row; 0: all rows share theirs */
};

bnbq_status run_s8_rows(bnbq_cuda_call *call, const s8_linear &op);
/* True if the product for one row can quantise it too. */
bool s8_one_row_fits(const s8_linear &op);
bnbq_status run_s8_one_row(bnbq_cuda_call *call, const s8_linear &op);
bnbq_status run_s8_few(bnbq_cuda_call *call, const s8_linear &op);
bnbq_status run_s8_tiles(bnbq_cuda_call *call, const s8_linear &op);
bnbq_status run_s8_plain(bnbq_cuda_call *call, const s8_linear &op);

enum { S8_FEW = 64 /* rows of x, at most, for run_s8_few */ };

DEVICE float inv127() {
    return (float)(1.0 / 127);
}

DEVICE int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

DEVICE float x_scale_of(uint2 row) {
    return bits_float(row.x);
}

/* absmax / 127 of row j of W, block b. */
DEVICE float w_scale_of(const s8_linear &op, int64_t j, int64_t b) {
    return mul_rn(op.w.absmax[j * op.blocks + b], inv127());
}

/* The specification's order and roundings. */
DEVICE void add_scaled(float *y, float sum, float x_scale, float w_scale) {
    *y = add_rn(*y, mul_rn(sum, mul_rn(x_scale, w_scale)));
}

DEVICE float add_bias(const s8_linear &op, float y, int64_t j) {
    return op.bias ? add_rn(y, load_float(op.bias, op.bias_dtype, j)) : y;
}

/* Columns c .. c + 7 of a row of x, all of which exist. c % 8 == 0; X: the dtype of x. */
template <bnbq_dtype X> DEVICE void load8(float v[8], const s8_linear &op, int64_t row, int64_t c) {
    int64_t at = row * op.x.ld + c;
    if (X == BNBQ_F32) {
        const float4 *from = (const float4 *)((const float *)op.x.data + at);
        float4 a = from[0], b = from[1];
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
        v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
        uint4 words = *(const uint4 *)((const uint16_t *)op.x.data + at);
        uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            uint16_t bits = (uint16_t)(pairs[i / 2] >> i % 2 * 16);
            v[i] = X == BNBQ_BF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
        }
    }
}

/* The same with zeros past k. */
template <bnbq_dtype X>
DEVICE void load8_or_zeros(float v[8], const s8_linear &op, int64_t row, int64_t c) {
    if (c + 8 <= op.k)
        return load8<X>(v, op, row, c);
#pragma unroll
    for (int i = 0; i < 8; i++)
        v[i] = c + i < op.k ? load_float(op.x.data, X, row * op.x.ld + c + i) : 0.0f;
}

/* Bit i: v[i] is an outlier by itself. */
DEVICE uint32_t find_outliers(const float v[8], float threshold) {
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < 8; i++)
        mask |= (bits_float(float_bits(v[i]) & 0x7fffffff) < threshold ? 0u : 1u) << i;
    return mask;
}

/* Bit i: column c + i is an outlier in one of rows first, first + step, ... of x. */
template <bnbq_dtype X>
DEVICE uint32_t find_in_rows(const s8_linear &op, int64_t first, int64_t step, int64_t c) {
    uint32_t mask = 0;
    float v[8];
    if (c + 8 <= op.k) {
#pragma unroll 8
        for (int64_t row = first; row < op.m; row += step) { /* 8 loads under way */
            load8<X>(v, op, row, c);
            mask |= find_outliers(v, op.threshold);
        }
    } else {
        for (int64_t row = first; row < op.m; row += step) {
            load8_or_zeros<X>(v, op, row, c);
            mask |= find_outliers(v, op.threshold);
        }
    }
    return mask;
}

/* All THREADS of the block: one row of x to q[padded], its flags to flags[padded / 8] unless they
 * are there already (FLAGGED), both in global or in shared memory. Returns what op.rows holds.
 * The row is read twice, the second time from a cache. scratch: [2 * THREADS / WARP]. */
template <bnbq_dtype X, int THREADS>
DEVICE uint2 quantize_row(const s8_linear &op, int64_t row, int8_t *q, uint8_t *flags,
                          uint32_t *scratch) {
    const float tiny = 1e-36f; /* keeps the scale finite */
    int thread = (int)threadIdx.x, warp = thread / WARP;
    uint32_t greatest = 0, any = 0;
    float v[8];
    for (int64_t c = 8 * thread; c < op.padded; c += 8 * THREADS) {
        load8_or_zeros<X>(v, op, row, c);
        uint32_t mask = op.rule == OWN        ? find_outliers(v, op.threshold)
                        : op.rule == ALL_ROWS ? find_in_rows<X>(op, 0, 1, c)
                                              : flags[c / 8];
        if (op.rule != FLAGGED)
            flags[c / 8] = (uint8_t)mask;
        any |= mask;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            uint32_t bits = mask >> i & 1 ? 0 : float_bits(v[i]) & 0x7fffffff;
            greatest = bits > greatest ? bits : greatest;
        }
    }
    greatest = greatest_of(greatest, WARP);
    any = vote(any != 0);
    if (thread % WARP == 0) {
        scratch[2 * warp] = greatest;
        scratch[2 * warp + 1] = any;
    }
    sync_threads();
#pragma unroll
    for (int i = 0; i < THREADS / WARP; i++) {
        uint32_t other = scratch[2 * i];
        greatest = other > greatest ? other : greatest;
        any |= scratch[2 * i + 1];
    }
    float absmax = bits_float(greatest);
    float scale = mul_rn(127.0f, div_rn(1.0f, absmax > tiny ? absmax : tiny));
    for (int64_t c = 8 * thread; c < op.padded; c += 8 * THREADS) {
        load8_or_zeros<X>(v, op, row, c);
        uint32_t mask = flags[c / 8], words[2] = {0, 0}; /* this thread wrote it */
#pragma unroll
        for (int i = 0; i < 8; i++) {
            uint32_t code = mask >> i & 1 ? 0 : (uint32_t)round_to_int(mul_rn(v[i], scale)) & 255;
            words[i / 4] |= code << i % 4 * 8;
        }
        *(uint2 *)(q + c) = {words[0], words[1]};
    }
    return {float_bits(mul_rn(absmax, inv127())), any};
}

/* ---------------------------------------------------------------- outliers on tensor cores */

/* The float product of x's outliers with W, on bf16 or fp16 tensor cores without rounding its
 * operands: an int8 code is exact in both, fp32 x is cut into three bf16, and the scale of W is
 * applied to the fp32 sum of a block of columns.
 *
 * A chunk is 32 aligned columns, with zeros in place of what is no outlier; chunks without any are
 * skipped. Why not only the columns that are outliers, gathered: a sector of W holds 32 columns of
 * a row, so the traffic is the same, but gathered bytes are 8 loads instead of one; and a row's
 * sums would be grouped by the outliers of other rows. Like this they depend on nothing but the
 * row: adding a chunk in which it has none changes no bit.
 *
 * Of a chunk, columns 8t .. 8t + 7 go to lane t of four: four to the first mma, four to the second.
 * The order along k is free as long as both operands have the same, and all kernels. Loads are not
 * predicated: rows past the last one repeat it and are not stored, columns past k meet zeros of x.
 */
template <bnbq_dtype X> struct outlier_math {
    enum { PLANES = X == BNBQ_F32 ? 3 : 1 };
    /* A code q is in the operand as q * unit: bf16 x reaches 3e38, and the sum of x * q shall not
     * overflow where that of x * w does not. */
    DEVICE float unit() {
        return X == BNBQ_F16 ? 1.0f : 0x1p-24f;
    }
    DEVICE uint32_t pack(float low, float high) {
        return X == BNBQ_F16 ? pack_f16(low, high) : pack_bf16(low, high);
    }
    DEVICE void mma(float d[4], const uint32_t a[4], const uint32_t b[2]) {
        if (X == BNBQ_F16)
            mma_f16(d, a, b);
        else
            mma_bf16(d, a, b);
    }
};

/* Eight codes to pairs of floats, q * unit: two words for each mma, low k and high k. A byte
 * becomes the lowest of a float whose last bit is one unit: no conversion, of which a
 * multiprocessor does 16 per clock only. */
template <bnbq_dtype X> DEVICE void unpack_codes(uint32_t pairs[4], uint2 codes) {
    float base = outlier_math<X>::unit() * 0x1p23f, zero = base + outlier_math<X>::unit() * 128;
    uint32_t words[2] = {codes.x ^ 0x80808080, codes.y ^ 0x80808080}; /* q + 128 */
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float pair[2];
#pragma unroll
        for (int h = 0; h < 2; h++)
            pair[h] = bits_float(permute_bytes(words[i / 2], float_bits(base),
                                               0x7650 + (uint32_t)(i % 2 * 2 + h))) -
                      zero;
        pairs[i] = outlier_math<X>::pack(pair[0], pair[1]);
    }
}

/* The top 16 bits of each, and what they leave of it; all of it if it is NaN or Inf. */
DEVICE uint32_t cut_bf16(float *low, float *high) {
    uint32_t word = 0;
    float *values[2] = {low, high};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t bits = float_bits(*values[i]), top = bits & 0xffff0000u;
        bool finite = (bits & 0x7f800000) != 0x7f800000;
        if ((bits & 0x7fffffff) > 0x7f800000)
            top |= 0x400000; /* a NaN whose payload is cut off is one still */
        *values[i] = finite ? add_rn(*values[i], -bits_float(top)) : 0.0f;
        word |= top >> 16 << 16 * i;
    }
    return word;
}

/* find_outliers() of eight 16-bit floats. */
template <bnbq_dtype X> DEVICE uint32_t find_outliers_of(const uint32_t pairs[4], float limit) {
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        uint16_t bits = (uint16_t)(pairs[i / 2] >> i % 2 * 16);
        v[i] = X == BNBQ_BF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
    }
    return find_outliers(v, limit);
}

/* Columns c .. c + 7 of a row of x, or one of the planes that add up to them, to such pairs; zero
 * where they are no outliers: mask has the flags of these columns. */
template <bnbq_dtype X>
DEVICE void load_outliers(uint32_t pairs[4], const s8_linear &op, int64_t token, int c,
                          uint32_t mask, int plane) {
    /* Flagged columns stay whole unless each row has outliers of its own. */
    float limit = op.rule == OWN ? op.threshold : 0.0f;
    if constexpr (X == BNBQ_F32) {
        float v[8];
        load8<X>(v, op, token, c);
        mask &= find_outliers(v, limit);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float low = mask >> 2 * i & 1 ? v[2 * i] : 0.0f;
            float high = mask >> (2 * i + 1) & 1 ? v[2 * i + 1] : 0.0f;
            for (int rest = 0; rest <= plane; rest++)
                pairs[i] = cut_bf16(&low, &high);
        }
    } else {
        uint4 words = *(const uint4 *)((const uint16_t *)op.x.data + token * op.x.ld + c);
        uint32_t loaded[4] = {words.x, words.y, words.z, words.w};
        if (limit > 0)
            mask &= find_outliers_of<X>(loaded, limit);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t keep = (mask >> 2 * i & 1) * 0xffffu | (mask >> (2 * i + 1) & 1) * 0xffff0000u;
            pairs[i] = loaded[i] & keep;
        }
    }
}

/* y += the scaled sum of a block of columns; and the next sum is zero. */
template <bnbq_dtype X> DEVICE void add_outlier_sum(float *y, float *sum, float w_scale) {
    *y = add_rn(*y, mul_rn(mul_rn(*sum, w_scale), 1 / outlier_math<X>::unit()));
    *sum = 0;
}

/* All threads of the block: the flags of rows token0 .. token0 + count of x, or'ed, to `words`.
 * A barrier must follow. */
DEVICE void gather_flags(const s8_linear &op, int64_t token0, int count, uint32_t *words) {
    for (int64_t i = threadIdx.x; i < op.padded / CHUNK; i += blockDim.x) {
        uint32_t word = 0;
        for (int64_t row = token0; row < token0 + count; row++) {
            word |= ((const uint32_t *)(op.flags + row * op.flags_stride))[i];
            if (op.flags_stride == 0)
                break;
        }
        words[i] = word;
    }
}

#endif

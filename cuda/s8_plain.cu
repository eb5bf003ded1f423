/* s8_plain.cu - the int8 product without tensor cores: below sm_80, and for a k or an address that
 * no 16-byte load takes, or a k whose sums need 64 bits. Correct everywhere, not tuned.
 *
 * A warp multiplies one row of W with TOKENS rows of x; lanes take 4 columns each, by dp4a. Lanes'
 * sums are integers, so their order means nothing; outliers are added up by lane, which is by
 * column, so that a row's result depends on nothing but the row.
 */
#include "s8.cuh"

enum { THREADS = 256, WARPS = THREADS / WARP, TOKENS = 8, STEP = 4 * WARP };

/* 4 codes of W, of which `count` are left in the row. */
DEVICE uint32_t load4(const int8_t *w, int64_t count, bool aligned) {
    if (aligned && count >= 4)
        return *(const uint32_t *)w;
    uint32_t word = 0;
    for (int i = 0; i < 4; i++)
        word |= i < count ? (uint32_t)(uint8_t)w[i] << 8 * i : 0;
    return word;
}

DEVICE float sum_floats(float value) {
    for (int mask = 1; mask < WARP; mask *= 2)
        value = add_rn(value, shuffle_xor_float(value, mask));
    return value;
}

DEVICE int64_t sum_ints(int64_t value) {
    for (int mask = 1; mask < WARP; mask *= 2) {
        uint32_t low = shuffle_xor((uint32_t)value, mask);
        uint32_t high = shuffle_xor((uint32_t)((uint64_t)value >> 32), mask);
        value += (int64_t)((uint64_t)high << 32 | low);
    }
    return value;
}

/* Warp: the float product of row `token` of x's outliers with row j of W. */
DEVICE float multiply_outliers(const s8_linear &op, int64_t token, int64_t j) {
    const uint32_t *flags = (const uint32_t *)(op.flags + token * op.flags_stride);
    int lane = (int)threadIdx.x % WARP;
    float sum = 0;
    for (int64_t c = lane; c < op.k; c += CHUNK) {
        if (!(flags[c / CHUNK] >> lane & 1))
            continue;
        float absmax = op.w.absmax[j * op.blocks + c / op.block];
        float w = mul_rn(mul_rn((float)op.w.qweight[j * op.k + c], absmax), inv127());
        sum = add_rn(sum, mul_rn(load_float(op.x.data, op.x.dtype, token * op.x.ld + c), w));
    }
    return sum_floats(sum);
}

__global__ void __launch_bounds__(THREADS, 2) plain_kernel(const __grid_constant__ s8_linear op) {
    int lane = (int)threadIdx.x % WARP;
    int64_t j = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (j >= op.n)
        return; /* the whole warp */
    const int8_t *w = op.w.qweight + j * op.k;
    bool aligned = ((uintptr_t)op.w.qweight | (uintptr_t)op.k) % 4 == 0;
    for (int64_t i0 = (int64_t)blockIdx.y * TOKENS; i0 < op.m; i0 += (int64_t)gridDim.y * TOKENS) {
        float y[TOKENS] = {};
        for (int64_t b = 0; b < op.blocks; b++) {
            int64_t start = b * op.block, end = start + op.block < op.k ? start + op.block : op.k;
            int64_t sums[TOKENS] = {};
            for (int64_t c = start + 4 * lane; c < end; c += STEP) {
                uint32_t codes = load4(w + c, end - c, aligned);
#pragma unroll
                for (int i = 0; i < TOKENS; i++)
                    if (i0 + i < op.m)
                        sums[i] +=
                            dot_s8(codes, *(const uint32_t *)(op.q + (i0 + i) * op.padded + c), 0);
            }
            float scale = w_scale_of(op, j, b);
#pragma unroll
            for (int i = 0; i < TOKENS; i++)
                if (i0 + i < op.m)
                    add_scaled(&y[i], (float)sum_ints(sums[i]), x_scale_of(op.rows[i0 + i]), scale);
        }
#pragma unroll
        for (int i = 0; i < TOKENS; i++) {
            if (i0 + i >= op.m)
                continue;
            if (op.rows[i0 + i].y)
                y[i] = add_rn(y[i], multiply_outliers(op, i0 + i, j));
            if (lane == 0)
                store_float(op.y.data, op.y.dtype, (i0 + i) * op.y.ld + j, add_bias(op, y[i], j));
        }
    }
}

bnbq_status run_s8_plain(bnbq_cuda_call *call, const s8_linear &op) {
    int64_t groups = ceil_div(op.m, TOKENS), most = 65535;
    return launch<plain_kernel>(
        call, dim3((unsigned)ceil_div(op.n, WARPS), (unsigned)(groups < most ? groups : most)),
        THREADS, 0, op);
}

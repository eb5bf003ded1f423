/* s8_few.cu - the int8 product for up to 64 rows of x: W once, at the speed of the memory.
 *
 * Rows of W are the A operand of m16n8k32 and come straight from global memory into registers, in
 * the order along k in which a 16-byte load gives them: lane t of four holds 16 neighbouring
 * columns of rows g and g + 8, that is words 0, 1 for one mma and 2, 3 for the next. x has the same
 * order at no cost. DEPTH such loads per lane are in flight. 8 warps take every 8th 64 columns, so
 * a block reads 512 bytes of a row together; their int32 sums meet in shared memory, where any
 * order gives the same. From 17 rows of x on a warp has 32 rows of W: a fragment of x, which comes
 * from L2, then serves two.
 *
 * One row of x: every block quantises it itself while its first loads of W are under way, and keeps
 * it in shared memory. Several rows are not quantised here: 16 rows of 4096 in each of 256 blocks
 * would cost as many instructions as the product.
 *
 * Counted (sm_90a, main loop, instructions per weight and lane): 1.2 for up to 8 rows, 1.5 for 16,
 * 1.6 for 32, 2.7 for 64; W by LDG.128. At 4.3 TB/s an H200 reads 16.5 weights per clock and
 * multiprocessor, of which it can issue 104 down to 48: predicted to be bound by memory.
 *
 * With scales per block of columns a float sum must follow the blocks in order, so a warp takes all
 * of k, in loads of 8 bytes: 32 columns, the least blocksize. Blocks are single warps then. That
 * form is for correctness on a rare format: it has a third of the bytes in flight.
 */
#include "s8.cuh"

template <int COLUMNS, bool BLOCKED, bool ONE> struct few_shape {
    enum {
        C = COLUMNS,                          /* tiles of 8 rows of x */
        R = !BLOCKED && COLUMNS >= 4 ? 2 : 1, /* tiles of 16 rows of W */
        WARPS = BLOCKED ? 1 : 8,
        THREADS = WARPS * WARP,
        WORDS = BLOCKED ? 2 : 4, /* of a lane's load */
        STEP = 16 * WORDS,       /* columns of a warp's load */
        DEPTH = COLUMNS <= 2 ? 4 : 2,
        RESIDENT = BLOCKED        ? 8
                   : COLUMNS <= 2 ? 2
                                  : 1,
        SUMS = BLOCKED ? 0 : WARPS * R * C * 4 * WARP, /* in shared memory */
        SCRATCH = ONE ? 2 * WARPS : 0,
        OWN_SHARED = (SUMS + SCRATCH) * (int)sizeof(int32_t),
    };
};

enum { UNASKED_SHARED = 48 * 1024 /* what any block may have, on any device */ };

template <int WORDS>
DEVICE void load_codes_of_w(uint32_t words[WORDS], const int8_t *from, bool valid) {
    if constexpr (WORDS == 4) {
        uint4 loaded = valid ? load_stream128(from) : uint4{0, 0, 0, 0};
        words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
    } else {
        uint2 loaded = valid ? load_stream64(from) : uint2{0, 0};
        words[0] = loaded.x, words[1] = loaded.y;
    }
}

template <int WORDS>
DEVICE void load_codes_of_x(uint32_t words[WORDS], const int8_t *from, bool valid) {
    if constexpr (WORDS == 4) {
        uint4 loaded = valid ? *(const uint4 *)from : uint4{0, 0, 0, 0};
        words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
    } else {
        uint2 loaded = valid ? *(const uint2 *)from : uint2{0, 0};
        words[0] = loaded.x, words[1] = loaded.y;
    }
}

/* Warp: y[c] is the D fragment of rows row0 .. of W and rows token0 + 8 c of x. flags: the words,
 * in shared memory, of the columns in which any of these has an outlier. */
template <bnbq_dtype X, bool BLOCKED, int C>
DEVICE void add_outliers_of(float y[C][4], const s8_linear &op, const uint32_t *flags, int64_t row0,
                            int64_t token0) {
    using math = outlier_math<X>;
    int lane = (int)threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int words = (int)(op.padded / CHUNK), block_chunks = (int)(op.block / CHUNK), block = 0;
    float sums[C][4] = {};
    auto add_block = [&]() {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float w_scale = w_scale_of(op, least(row0 + i / 2 * 8 + g, op.n - 1), block);
#pragma unroll
            for (int j = 0; j < C; j++)
                add_outlier_sum<X>(&y[j][i], &sums[j][i], w_scale);
        }
    };
#pragma unroll 1
    for (int first = 0; first < words; first += WARP) {
        uint32_t mine = first + lane < words ? flags[first + lane] : 0, some = vote(mine != 0);
#pragma unroll 1
        for (int word = first; some; word++, some >>= 1) {
            if (!(some & 1))
                continue;
            if (BLOCKED && word / block_chunks != block) {
                add_block();
                block = word / block_chunks;
            }
            uint32_t mask = shuffle(mine, word - first) >> 8 * t & 255;
            int c = (int)least(word * CHUNK + 8 * t, op.k - 8);
            uint32_t a[2][4];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int64_t j = least(row0 + 8 * h + g, op.n - 1);
                uint32_t pairs[4];
                unpack_codes<X>(pairs, *(const uint2 *)(op.w.qweight + j * op.k + c));
#pragma unroll
                for (int p = 0; p < 4; p++)
                    a[p / 2][h + p % 2 * 2] = pairs[p];
            }
#pragma unroll 1
            for (int plane = 0; plane < math::PLANES; plane++) {
#pragma unroll
                for (int j = 0; j < C; j++) {
                    uint32_t b[4];
                    load_outliers<X>(b, op, least(token0 + 8 * j + g, op.m - 1), c, mask, plane);
                    math::mma(sums[j], a[0], b);
                    math::mma(sums[j], a[1], b + 2);
                }
            }
        }
    }
    add_block();
}

template <bool BLOCKED, int C>
DEVICE void add_outliers(float y[C][4], const s8_linear &op, const uint32_t *flags, int64_t row0,
                         int64_t token0) {
    if (op.x.dtype == BNBQ_F32)
        add_outliers_of<BNBQ_F32, BLOCKED, C>(y, op, flags, row0, token0);
    else if (op.x.dtype == BNBQ_BF16)
        add_outliers_of<BNBQ_BF16, BLOCKED, C>(y, op, flags, row0, token0);
    else
        add_outliers_of<BNBQ_F16, BLOCKED, C>(y, op, flags, row0, token0);
}

/* D fragments of rows row0.. of W and token0.. of x. */
template <int C>
DEVICE void store_fragments(const s8_linear &op, float y[C][4], int64_t row0, int64_t token0) {
    int lane = (int)threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int c = 0; c < C; c++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int64_t j = row0 + g + i / 2 * 8, token = token0 + 8 * c + 2 * t + i % 2;
            if (j < op.n && token < op.m)
                store_float(op.y.data, op.y.dtype, token * op.y.ld + j, add_bias(op, y[c][i], j));
        }
    }
}

template <int COLUMNS, bool BLOCKED, bool ONE>
__global__ void __launch_bounds__(few_shape<COLUMNS, BLOCKED, ONE>::THREADS,
                                  few_shape<COLUMNS, BLOCKED, ONE>::RESIDENT)
    few_kernel(const __grid_constant__ s8_linear op) {
#if HAS_MMA
    using shape = few_shape<COLUMNS, BLOCKED, ONE>;
    constexpr int C = shape::C, R = shape::R, WARPS = shape::WARPS, WORDS = shape::WORDS,
                  STEP = shape::STEP, DEPTH = shape::DEPTH;
    int32_t *sums = (int32_t *)shared_memory();
    int8_t *x_codes = (int8_t *)(sums + shape::SUMS + shape::SCRATCH); /* ONE */
    uint32_t *flags = (uint32_t *)(x_codes + (ONE ? op.padded : 0));
    int lane = (int)threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int warp = (int)threadIdx.x / WARP, k = (int)op.k;
    int64_t row0 = (int64_t)blockIdx.x * 16 * R;

    const int8_t *w_rows[R][2], *x_rows[C];
#pragma unroll
    for (int r = 0; r < 2 * R; r++)
        w_rows[r / 2][r % 2] = op.w.qweight + least(row0 + 8 * r + g, op.n - 1) * op.k;
#pragma unroll
    for (int c = 0; c < C; c++)
        x_rows[c] = ONE ? x_codes : op.q + least(8 * c + g, op.m - 1) * op.padded;
    uint32_t w[DEPTH][R][2][WORDS], x[DEPTH][C][WORDS];
    auto load = [&](int d, int step) {
        int at = (step * WARPS + warp) * STEP + 4 * WORDS * t;
#pragma unroll
        for (int r = 0; r < 2 * R; r++)
            load_codes_of_w<WORDS>(w[d][r / 2][r % 2], w_rows[r / 2][r % 2] + at, at < k);
#pragma unroll
        for (int c = 0; c < (ONE ? 0 : C); c++)
            load_codes_of_x<WORDS>(x[d][c], x_rows[c] + at, at < k);
    };
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        load(d, d);

    uint2 one_row = {};
    bool any;
    if constexpr (ONE) {
        uint8_t *bytes = (uint8_t *)flags;
        uint32_t *scratch = (uint32_t *)sums + shape::SUMS;
        constexpr int THREADS = shape::THREADS;
        one_row = op.x.dtype == BNBQ_F32
                      ? quantize_row<BNBQ_F32, THREADS>(op, 0, x_codes, bytes, scratch)
                  : op.x.dtype == BNBQ_BF16
                      ? quantize_row<BNBQ_BF16, THREADS>(op, 0, x_codes, bytes, scratch)
                      : quantize_row<BNBQ_F16, THREADS>(op, 0, x_codes, bytes, scratch);
        any = one_row.y;
        sync_threads();
    } else {
        any = vote((lane < op.m && op.rows[lane].y) ||
                   (lane + WARP < op.m && op.rows[lane + WARP].y));
    }

    int32_t acc[R][C][4] = {};
    float y[C][4] = {}; /* from here on for BLOCKED */
    float x_scales[C][2], w_scales[2];
    int block = 0;
    /* Of the block to come, while its columns are multiplied. */
    auto load_scales = [&]() {
        for (int h = 0; h < 2; h++)
            w_scales[h] =
                block < op.blocks ? w_scale_of(op, least(row0 + 8 * h + g, op.n - 1), block) : 0.0f;
    };
    if constexpr (BLOCKED) {
        load_scales();
#pragma unroll
        for (int i = 0; i < 2 * C; i++)
            x_scales[i / 2][i % 2] =
                x_scale_of(op.rows[least(8 * (i / 2) + 2 * t + i % 2, op.m - 1)]);
    }
    int steps = (k + WARPS * STEP - 1) / (WARPS * STEP);
#pragma unroll 1 /* more of it spills on 12.0 */
    for (int step = 0; step < steps; step += DEPTH) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) { /* past the last step all is zero */
            if constexpr (ONE) {
                int at = ((step + d) * WARPS + warp) * STEP + 4 * WORDS * t;
                load_codes_of_x<WORDS>(x[d][0], x_codes + at, g == 0 && at < k);
            }
#pragma unroll
            for (int i = 0; i < WORDS; i += 2) {
#pragma unroll
                for (int r = 0; r < R; r++) {
                    uint32_t a[4] = {w[d][r][0][i], w[d][r][1][i], w[d][r][0][i + 1],
                                     w[d][r][1][i + 1]};
#pragma unroll
                    for (int c = 0; c < C; c++)
                        mma_s8(acc[r][c], a, &x[d][c][i]);
                }
            }
            load(d, step + d + DEPTH);
            if constexpr (BLOCKED) {
                int start = (step + d) * STEP, end = start + STEP;
                if (start < k && (!(end & ((int)op.block - 1)) || end >= k)) {
#pragma unroll
                    for (int i = 0; i < 4 * C; i++) {
                        add_scaled(&y[i / 4][i % 4], (float)acc[0][i / 4][i % 4],
                                   x_scales[i / 4][i % 2], w_scales[i / 2 % 2]);
                        acc[0][i / 4][i % 4] = 0;
                    }
                    block++;
                    load_scales();
                }
            }
        }
    }

    if (any && !ONE)
        gather_flags(op, 0, (int)op.m, flags);
    if constexpr (BLOCKED) {
        sync_threads();
        if (any)
            add_outliers<true, C>(y, op, flags, row0, 0);
        store_fragments<C>(op, y, row0, 0);
    } else {
#pragma unroll
        for (int i = 0; i < R * C * 4; i++)
            sums[(warp * R * C * 4 + i) * WARP + lane] = acc[i / 4 / C][i / 4 % C][i % 4];
        sync_threads();
        for (int tile = warp; tile < R * C; tile += WARPS) {
            int64_t j0 = row0 + 16 * (tile / C), token0 = 8 * (tile % C);
            float tile_y[1][4] = {};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int64_t j = j0 + g + i / 2 * 8, token = token0 + 2 * t + i % 2;
                int32_t sum = 0;
#pragma unroll
                for (int part = 0; part < WARPS; part++)
                    sum += sums[((part * R * C + tile) * 4 + i) * WARP + lane];
                if (j < op.n && token < op.m)
                    add_scaled(&tile_y[0][i], (float)sum,
                               x_scale_of(ONE ? one_row : op.rows[token]), w_scale_of(op, j, 0));
            }
            if (any)
                add_outliers<false, 1>(tile_y, op, flags, j0, token0);
            store_fragments<1>(op, tile_y, j0, token0);
        }
    }
#endif
}

template <int COLUMNS, bool BLOCKED, bool ONE>
static bnbq_status launch_few(bnbq_cuda_call *call, const s8_linear &op, int64_t more_shared) {
    using shape = few_shape<COLUMNS, BLOCKED, ONE>;
    return launch<few_kernel<COLUMNS, BLOCKED, ONE>>(
        call, dim3((unsigned)ceil_div(op.n, 16 * shape::R)), shape::THREADS,
        shape::OWN_SHARED + (size_t)more_shared, op);
}

/* One row and its flags. */
static int64_t row_shared(const s8_linear &op) {
    return op.padded + op.padded / 8;
}

bool s8_one_row_fits(const s8_linear &op) {
    return op.m == 1 && !op.w.blocksize &&
           few_shape<1, false, true>::OWN_SHARED + row_shared(op) <= UNASKED_SHARED;
}

bnbq_status run_s8_one_row(bnbq_cuda_call *call, const s8_linear &op) {
    return launch_few<1, false, true>(call, op, row_shared(op));
}

bnbq_status run_s8_few(bnbq_cuda_call *call, const s8_linear &op) {
    int64_t flags = S8_MAX_K / 8; /* always: a kernel is allowed what its first launch asks for */
    if (op.w.blocksize)
        return op.m <= 16 ? launch_few<2, true, false>(call, op, flags)
                          : launch_few<8, true, false>(call, op, flags);
    return op.m <= 8    ? launch_few<1, false, false>(call, op, flags)
           : op.m <= 16 ? launch_few<2, false, false>(call, op, flags)
           : op.m <= 32 ? launch_few<4, false, false>(call, op, flags)
                        : launch_few<8, false, false>(call, op, flags);
}

/* s8_tiles.cu - the int8 product for many rows of x: tiles of 128 rows of W by 128 rows of x; by
 * mma as follows, and for 9.0 also by warpgroup products (at the end).
 *
 * Stages of 64 columns of both come by cp.async, STAGES - 1 ahead, and go to m16n8k32 by ldmatrix.
 * Rows of a stage are 64 bytes, two in a line of 128; the 16-byte pieces of a row are exchanged by
 * row / 2 % 4, so that neither the copies nor the eight rows of an ldmatrix meet in a bank. W is
 * the A operand, as in s8_few.cu: outliers then have the same fragments, and the same bits, here.
 *
 * 4 warps of 64 x 64: 8 ldmatrix.x4 feed 32 mma. With 8 warps of 64 x 32 it would be 12 for 32, and
 * shared memory (128 bytes per clock) rather than the tensor cores the limit. There are 8 warps
 * where W has scales per block, as the float sums beside the int32 ones need the registers, and
 * where a multiprocessor has no room for two blocks (all but 9.0 and 10.0).
 *
 * Outliers come after the main loop: their sums take the registers of the int32 ones, while y waits
 * in shared memory. Adding each chunk to y in registers was tried: it spills.
 *
 * Counted (sm_90a, 4 warps): 163 instructions for 64 mma in the main loop, 240 registers; a chunk
 * of outliers is about 430 for 64 mma of 16 bits, predicted to cost as much as three chunks of the
 * main loop. No outliers: one load per row of x, and a vote.
 *
 * y goes through shared memory anyway: a fragment holds two rows of x, of which memory would see 16
 * bytes each. Blocks run through up to GROUP tiles of x before they go to the next rows of W, so
 * both stay in L2.
 */
#include "hopper.cuh"
#include "s8.cuh"

enum {
    TILE = 128,
    STAGE_K = 64,
    STAGES = 4,
    SIDE_BYTES = TILE * STAGE_K, /* of a stage: W, then x */
    RING_BYTES = STAGES * 2 * SIDE_BYTES,
    Y_LD = TILE + 4, /* floats; the lanes of a fragment then lie in 32 banks */
    Y_BYTES = TILE * Y_LD * (int)sizeof(float),
    WORK_BYTES = RING_BYTES > Y_BYTES ? RING_BYTES : Y_BYTES,
    GROUP = 16,
};

/* In shared memory, behind the stages. */
struct tile_notes {
    float x_scales[TILE];
    uint32_t any[8]; /* per warp: it saw a row that has outliers */
    /* The block's tile. Outside the main loop they are read from here each time: kept in
     * registers, with the addresses that follow from them, they would not fit beside the sums. */
    int row0, token0;
};

/* The stage of outliers is not in the ring: y is. The flags follow it. */
enum {
    OUTLIERS_AT = WORK_BYTES + ((int)sizeof(tile_notes) + 15) / 16 * 16,
    SHARED = OUTLIERS_AT + 2 * SIDE_BYTES + S8_MAX_K / 8, /* 98.5 KB: of 99 on 8.6, 8.9 and 12.0 */
};

#if HAS_MMA

/* Where piece c of a row of a stage lies. */
DEVICE int piece_at(int row, int c) {
    return row * STAGE_K + ((c ^ row / 2 % 4) * 16);
}

/* What a thread copies of one side of every stage: one piece of each of N rows. Rows past the last
 * one repeat it. */
template <int N> struct piece_source {
    const int8_t *from;
    int offsets[N];
};

template <int N>
DEVICE piece_source<N> find_pieces(const int8_t *from, int64_t ld, int64_t rows, int k) {
    piece_source<N> source = {from, {}};
    int row = (int)threadIdx.x / 4, c = (int)threadIdx.x % 4 * 16;
#pragma unroll
    for (int i = 0; i < N; i++)
        source.offsets[i] = (int)(least(row + i * (TILE / N), rows - 1) * ld) + (c < k ? c : 0);
    return source;
}

/* Columns c .. c + 63, of which this thread's piece is zeros if it is not valid. */
template <int N>
DEVICE void copy_pieces(char *side, const piece_source<N> &source, int c, bool valid) {
    char *to = side + piece_at((int)threadIdx.x / 4, (int)threadIdx.x % 4);
    const int8_t *from = source.from + (valid ? c : 0);
#pragma unroll
    for (int i = 0; i < N; i++)
        copy_async16(to + i * (TILE / N) * STAGE_K, from + source.offsets[i], valid);
}

/* All threads: y, which lies in shared memory, += the float product of outliers, chunk by chunk. A
 * chunk has 32 columns of 16 bits and so fills a row of a stage; pair i of lane p lies where the
 * fragments of s8_few.cu have it. */
template <bnbq_dtype X, bool BLOCKED, int PIECES, int R, int C>
DEVICE void add_outliers(const s8_linear &op, char *shared, int warp_row, int warp_token) {
    float *y = (float *)shared;
    const tile_notes *notes = (const tile_notes *)(shared + WORK_BYTES);
    char *w_side = shared + OUTLIERS_AT, *x_side = w_side + SIDE_BYTES;
    uint32_t *flags = (uint32_t *)(x_side + SIDE_BYTES);
    int thread = (int)threadIdx.x, p = thread % 4, lane = thread % WARP;
    int words = (int)(op.padded / CHUNK), block_chunks = (int)(op.block / CHUNK), block = 0;
    int w_at = piece_at(warp_row + lane % 16, lane / 16);
    int x_at = piece_at(warp_token + lane % 8, lane / 8); /* all 64 bytes of 8 rows */
    float sums[R][C][4] = {};
    auto add_block = [&]() {
#pragma unroll
        for (int i = 0; i < 2 * R; i++) {
            int64_t row = warp_row + 8 * i + lane / 4;
            float w_scale = w_scale_of(op, least(notes->row0 + row, op.n - 1), block);
#pragma unroll
            for (int j = 0; j < 2 * C; j++)
                add_outlier_sum<X>(&y[(warp_token + j / 2 * 8 + lane % 4 * 2 + j % 2) * Y_LD + row],
                                   &sums[i / 2][j / 2][i % 2 * 2 + j % 2], w_scale);
        }
    };
    gather_flags(op, notes->token0, (int)least(op.m - notes->token0, TILE), flags);
    sync_threads();
#pragma unroll 1
    for (int word = 0; word < words; word++) {
        if (!flags[word])
            continue;
        if (BLOCKED && word / block_chunks != block) {
            add_block();
            block = word / block_chunks;
        }
        uint32_t mask = flags[word] >> 8 * p & 255;
        int c = (int)least(word * CHUNK + 8 * p, op.k - 8);
#pragma unroll 1
        for (int plane = 0; plane < outlier_math<X>::PLANES; plane++) {
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                int row = thread / 4 + i * (TILE / PIECES);
                int64_t j = least(notes->row0 + row, op.n - 1);
                int64_t token = least(notes->token0 + row, op.m - 1);
                uint32_t codes[4], x[4];
                unpack_codes<X>(codes, *(const uint2 *)(op.w.qweight + j * op.k + c));
                load_outliers<X>(x, op, token, c, mask, plane);
#pragma unroll
                for (int pair = 0; pair < 4; pair++) {
                    int at = piece_at(row, pair) + 4 * p;
                    *(uint32_t *)(w_side + at) = codes[pair];
                    *(uint32_t *)(x_side + at) = x[pair];
                }
            }
            sync_threads();
            uint32_t a[R][2][4];
#pragma unroll
            for (int i = 0; i < 2 * R; i++)
                load_matrix4(a[i / 2][i % 2],
                             w_side + (w_at ^ 32 * (i % 2)) + i / 2 * 16 * STAGE_K);
#pragma unroll
            for (int j = 0; j < C; j++) {
                uint32_t b[4];
                load_matrix4(b, x_side + x_at + j * 8 * STAGE_K);
#pragma unroll
                for (int r = 0; r < R; r++) {
                    outlier_math<X>::mma(sums[r][j], a[r][0], b);
                    outlier_math<X>::mma(sums[r][j], a[r][1], b + 2);
                }
            }
            sync_threads(); /* the stage is read */
        }
    }
    add_block();
}

/* Four columns of y from shared memory, whose first is j. */
DEVICE void store_columns(const s8_linear &op, int64_t token, int64_t j, const float4 &y,
                          const float bias[4]) {
    float v[4] = {y.x, y.y, y.z, y.w};
    if (op.bias) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            v[i] = add_rn(v[i], bias[i]);
    }
    int64_t at = token * op.y.ld + j;
    if (!op.wide_y || j + 4 > op.n) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (j + i < op.n)
                store_float(op.y.data, op.y.dtype, at + i, v[i]);
    } else if (op.y.dtype == BNBQ_F32) {
        *(float4 *)((float *)op.y.data + at) = {v[0], v[1], v[2], v[3]};
    } else {
        bool bf16 = op.y.dtype == BNBQ_BF16;
        *(uint2 *)((uint16_t *)op.y.data +
                   at) = {bf16 ? pack_bf16(v[0], v[1]) : pack_f16(v[0], v[1]),
                          bf16 ? pack_bf16(v[2], v[3]) : pack_f16(v[2], v[3])};
    }
}

/* The rows of W and of x that this block multiplies: through up to GROUP tiles of x first. */
DEVICE void find_tile(const s8_linear &op, int *row0, int *token0) {
    unsigned row_tiles = (unsigned)((op.n + TILE - 1) / TILE),
             token_tiles = (unsigned)((op.m + TILE - 1) / TILE);
    unsigned group = blockIdx.x / (row_tiles * GROUP), rest = blockIdx.x % (row_tiles * GROUP);
    unsigned in_group = (unsigned)least(token_tiles - group * GROUP, GROUP);
    *token0 = (int)(group * GROUP + rest % in_group) * TILE;
    *row0 = (int)(rest / in_group) * TILE;
}

/* All threads; a barrier must follow. */
DEVICE void note_tile(const s8_linear &op, tile_notes *notes, int row0, int token0) {
    int thread = (int)threadIdx.x, tokens = (int)least(op.m - token0, TILE);
    bool mine_any = false;
    for (int i = thread; i < TILE; i += (int)blockDim.x) {
        uint2 row = i < tokens ? op.rows[(int64_t)token0 + i] : uint2{0, 0};
        notes->x_scales[i] = x_scale_of(row);
        mine_any |= row.y != 0;
    }
    uint32_t warp_any = vote(mine_any);
    if (thread % WARP == 0)
        notes->any[thread / WARP] = warp_any;
    if (thread == 0) {
        notes->row0 = row0;
        notes->token0 = token0;
    }
}

/* All threads, each of which has put its part of y into shared memory: outliers, bias, and y to
 * where it belongs. Outliers in PASSES parts of x need fewer registers, and stage W as often. */
template <bool BLOCKED, int WARPS, int PASSES = 1>
DEVICE void finish_tile(const s8_linear &op, char *shared, int warp_row, int warp_token) {
    constexpr int R = 4, C = TILE / (WARPS / 2) / 8 / PASSES, PIECES = TILE * 4 / (WARPS * WARP);
    const float *tile = (const float *)shared;
    const tile_notes *notes = (const tile_notes *)(shared + WORK_BYTES);
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++)
        any |= notes->any[i];
#pragma unroll 1
    for (int pass = 0; any && pass < PASSES; pass++) {
        int first = warp_token + pass * 8 * C;
        if (op.x.dtype == BNBQ_F32)
            add_outliers<BNBQ_F32, BLOCKED, PIECES, R, C>(op, shared, warp_row, first);
        else if (op.x.dtype == BNBQ_BF16)
            add_outliers<BNBQ_BF16, BLOCKED, PIECES, R, C>(op, shared, warp_row, first);
        else
            add_outliers<BNBQ_F16, BLOCKED, PIECES, R, C>(op, shared, warp_row, first);
        if (PASSES > 1)
            sync_threads();
    }
    sync_threads();
    int token0 = notes->token0, tokens = (int)least(op.m - token0, TILE);
    int64_t j = notes->row0 + 4 * lane;
    float bias[4] = {};
    for (int i = 0; op.bias && i < 4; i++)
        bias[i] = j + i < op.n ? load_float(op.bias, op.bias_dtype, j + i) : 0.0f;
    for (int i = warp; i < tokens; i += WARPS)
        store_columns(op, token0 + i, j, *(const float4 *)(tile + i * Y_LD + 4 * lane), bias);
}

#endif

template <bool BLOCKED, int WARPS>
__global__ void __launch_bounds__(WARPS *WARP, 8 / WARPS)
    tiles_kernel(const __grid_constant__ s8_linear op) {
#if HAS_MMA
    constexpr int THREADS = WARPS * WARP, R = 4, C = TILE / (WARPS / 2) / 8;
    char *shared = (char *)shared_memory();
    tile_notes *notes = (tile_notes *)(shared + WORK_BYTES);
    int thread = (int)threadIdx.x, lane = thread % WARP, g = lane / 4, t = lane % 4;
    int warp = thread / WARP, k = (int)op.k;
    int warp_row = warp % 2 * 64, warp_token = warp / 2 * (C * 8);

    int row0, token0;
    find_tile(op, &row0, &token0);
    int tokens = (int)least(op.m - token0, TILE);

    constexpr int PIECES = TILE * 4 / THREADS;
    auto w_pieces = find_pieces<PIECES>(op.w.qweight + (int64_t)row0 * op.k, op.k, op.n - row0, k);
    auto x_pieces = find_pieces<PIECES>(op.q + (int64_t)token0 * op.padded, op.padded, tokens, k);
    auto copy_stage = [&](int step) {
        char *stage = shared + step % STAGES * (2 * SIDE_BYTES);
        bool valid = step * STAGE_K + thread % 4 * 16 < k;
        copy_pieces(stage, w_pieces, step * STAGE_K, valid);
        copy_pieces(stage + SIDE_BYTES, x_pieces, step * STAGE_K, valid);
    };
    int steps = (k + STAGE_K - 1) / STAGE_K;
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps)
            copy_stage(step);
        commit_copies();
    }

    note_tile(op, notes, row0, token0);
    int32_t acc[R][C][4] = {};
    float y[R][C][4] = {};
    /* The sums since the last call belong to block b of W's scales. */
    auto add_block = [&](int b) {
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int64_t j = least(notes->row0 + warp_row + 16 * r + 8 * h + g, op.n - 1);
                float w_scale = w_scale_of(op, j, b);
#pragma unroll
                for (int c = 0; c < C; c++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        add_scaled(&y[r][c][2 * h + i], (float)acc[r][c][2 * h + i],
                                   notes->x_scales[warp_token + 8 * c + 2 * t + i], w_scale);
                        acc[r][c][2 * h + i] = 0;
                    }
                }
            }
        }
    };
    /* Of the row of a stage whose address this lane gives to ldmatrix; columns 32 later are 2
     * pieces further, which after the exchange is the other bit. */
    int w_at = piece_at(warp_row + lane % 16, lane / 16);
    int x_at = piece_at(warp_token + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    for (int step = 0, block = 0; step < steps; step++) {
        wait_copies<STAGES - 2>();
        sync_threads(); /* everybody's copies are there, and the stage before is read */
        if (step + STAGES - 1 < steps)
            copy_stage(step + STAGES - 1);
        commit_copies();
        const char *w_side = shared + step % STAGES * (2 * SIDE_BYTES),
                   *x_side = w_side + SIDE_BYTES;
#pragma unroll
        for (int s = 0; s < STAGE_K / 32; s++) {
            uint32_t a[R][4], b[C / 2][4];
#pragma unroll
            for (int r = 0; r < R; r++)
                load_matrix4(a[r], w_side + (w_at ^ 32 * s) + r * 16 * STAGE_K);
#pragma unroll
            for (int c = 0; c < C; c += 2)
                load_matrix4(b[c / 2], x_side + (x_at ^ 32 * s) + c * 8 * STAGE_K);
#pragma unroll
            for (int r = 0; r < R; r++) {
#pragma unroll
                for (int c = 0; c < C; c++)
                    mma_s8(acc[r][c], a[r], &b[c / 2][c % 2 * 2]);
            }
            if constexpr (BLOCKED) {
                int start = step * STAGE_K + 32 * s, end = start + 32;
                if (start < k && (!(end & ((int)op.block - 1)) || end >= k))
                    add_block(block++);
            }
        }
    }
    wait_copies<0>();
    sync_threads();
    if constexpr (!BLOCKED)
        add_block(0);

    float *tile = (float *)shared;
#pragma unroll
    for (int i = 0; i < R * C * 4; i++) {
        int r = i / 4 / C, c = i / 4 % C;
        tile[(warp_token + 8 * c + 2 * t + i % 2) * Y_LD + warp_row + 16 * r + i / 2 % 2 * 8 + g] =
            y[r][c][i % 4];
    }
    finish_tile<BLOCKED, WARPS>(op, shared, warp_row, warp_token);
#endif
}

/* The same tile by warpgroup products: two warpgroups with 64 rows of W each, both operands in
 * swizzled shared memory. A stage has 128 columns; of two stages one is copied while the other is
 * multiplied, and two blocks of a multiprocessor make up for what waits. */
enum { WIDE_STAGE_K = TILE_BYTES, WIDE_SIDE_BYTES = TILE * TILE_BYTES };
static_assert(4 * WIDE_SIDE_BYTES <= WORK_BYTES && WIDE_SIDE_BYTES % SWIZZLE_ATOM == 0, "");

__global__ void __launch_bounds__(8 * WARP, 2)
    wgmma_tiles_kernel(const __grid_constant__ s8_linear op) {
#if HAS_WGMMA
    constexpr int PIECES = 4; /* of 16 bytes per thread and side */
    char *shared = (char *)shared_memory();
    tile_notes *notes = (tile_notes *)(shared + WORK_BYTES);
    int thread = (int)threadIdx.x, lane = thread % WARP, warp = thread / WARP, k = (int)op.k;
    int row0, token0;
    find_tile(op, &row0, &token0);
    const int8_t *w = op.w.qweight + (int64_t)row0 * op.k;
    const int8_t *x = op.q + (int64_t)token0 * op.padded;
    const int last_row = (int)least(op.n - row0, TILE) - 1;
    const int last_token = (int)least(op.m - token0, TILE) - 1;
    const int to = swizzled(thread / 8, thread % 8);
    auto copy_stage = [&](int step) {
        char *stage = shared + step % 2 * (2 * WIDE_SIDE_BYTES) + to;
        int c = step * WIDE_STAGE_K + thread % 8 * 16;
        bool valid = c < k;
        c = valid ? c : 0;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            char *piece = stage + i * (TILE / PIECES * TILE_BYTES);
            int row = thread / 8 + i * (TILE / PIECES); /* those past the last one repeat it */
            int w_row = row < last_row ? row : last_row,
                x_row = row < last_token ? row : last_token;
            copy_async16(piece, w + w_row * k + c, valid);
            copy_async16(piece + WIDE_SIDE_BYTES, x + x_row * (int)op.padded + c, valid);
        }
        commit_copies();
    };
    const int steps = (k + WIDE_STAGE_K - 1) / WIDE_STAGE_K;
    copy_stage(0);
    note_tile(op, notes, row0, token0);
    int32_t acc[TILE / 2] = {};
    for (int step = 0; step < steps; step++) {
        wait_copies<0>();
        fence_async_proxy();
        sync_threads(); /* the stage is there, and the other one has been multiplied */
        if (step + 1 < steps)
            copy_stage(step + 1);
        const char *stage = shared + step % 2 * (2 * WIDE_SIDE_BYTES);
        uint64_t a = tile_descriptor(shared_address(stage + warp / 4 * (64 * TILE_BYTES)));
        uint64_t b = tile_descriptor(shared_address(stage + WIDE_SIDE_BYTES));
        pin(acc);
        fence_products();
#pragma unroll
        for (int s = 0; s < 4; s++)
            multiply_s8(acc, step_descriptor(a, s), step_descriptor(b, s));
        commit_products();
        wait_products<0>();
        pin(acc);
    }
    sync_threads(); /* all stages are read */
    float *tile = (float *)shared;
    int g = lane / 4, t = lane % 4;
    float w_scales[2];
    for (int h = 0; h < 2; h++)
        w_scales[h] = w_scale_of(op, least(row0 + warp * 16 + 8 * h + g, op.n - 1), 0);
#pragma unroll
    for (int i = 0; i < TILE / 2; i++) {
        int token = i / 4 * 8 + 2 * t + i % 2, h = i / 2 % 2;
        float y = 0.0f;
        add_scaled(&y, (float)acc[i], notes->x_scales[token], w_scales[h]);
        tile[token * Y_LD + warp * 16 + 8 * h + g] = y;
    }
    finish_tile<false, 8, 2>(op, shared, warp % 2 * 64, warp / 2 * 32);
#endif
}

bnbq_status run_s8_tiles(bnbq_cuda_call *call, const s8_linear &op) {
    device_facts facts;
    TRY(get_facts(call, &facts));
    dim3 grid((unsigned)(ceil_div(op.n, TILE) * ceil_div(op.m, TILE)));
    if (op.w.blocksize)
        return launch<tiles_kernel<true, 8>>(call, grid, 8 * WARP, SHARED, op);
    if (facts.capability == 90 && wgmma_is_on())
        return launch<wgmma_tiles_kernel>(call, grid, 8 * WARP, SHARED, op);
    if (facts.shared_limit < 2 * SHARED)
        return launch<tiles_kernel<false, 8>>(call, grid, 8 * WARP, SHARED, op);
    return launch<tiles_kernel<false, 4>>(call, grid, 4 * WARP, SHARED, op);
}

/* q4_mma.cuh - y = x . W^T on tensor cores for packed 4-bit weights as they lie: 16-bit x, any m.
 *
 * One kernel for few and many rows of x ("tokens" here): mma.m16n8k16 with rows of W as its A
 * operand and tokens as columns of B. The order of k inside a step of 64 is free as long as both
 * operands agree on it, so a lane loads 8 neighbouring bytes of row g (and g + 8) straight into
 * registers, 16 weights that are its share of four mma, and x comes from shared memory in that
 * order: no repacking, no shuffle, no shared memory for W. With blocks of 32 a lane loads 4 bytes
 * of each half instead, so that an mma never mixes two blocks.
 *
 * Decoding: a table in shared memory turns a byte of codes into two 16-bit codebook values. Each of
 * its 256 entries is stored once per lane, so that every lane finds it in its own bank. An entry
 * takes 256 bytes, not the 128 that it needs: then the address is "byte 1 = codes, byte 0 = 4 *
 * lane", one PRMT, and a weight costs half a PRMT and half an LDS. The gaps hold the ring of x.
 *
 * Scales multiply the sums of a step in fp32, so what is rounded to 16 bits is the codebook, not
 * the weight: more exact than rounding each product of scale and value, no overflow or underflow of
 * fp16 whatever the absmax, and an FFMA per mma and lane instead of unpacking, two FMUL and a CVT
 * per byte. That holds for many tokens as well, where the scaling of weights would be shared by
 * more mma: wider entries would make shared memory the bound (wavefronts per mma with 64 tokens,
 * counted: 0.5 for the table and 1 for x now; an fp32 table takes 1 and 1; predicted room: 1.6).
 *
 * A block has groups of rows, and warps that take turns at the steps of k; their sums are added in
 * a fixed order at the end. The order of additions follows from the number of tokens in a tile
 * alone, and a token's sums never meet another's. Counted on sm_90a, main loop, for plain and
 * double-quantised scales; KB of weights in flight with two blocks per multiprocessor:
 *
 *   tokens x tiles   rows of W   warps: rows x k   instructions per weight   KB in flight
 *        8 x 1           16           1 x 8              2.5   3.2              64   48
 *        8 x 2           32           1 x 8              2.0   2.7              64   48
 *       16 x 1           32           2 x 4              3.0   3.2              40   32
 *       16 x 2           64           2 x 4              2.5   2.9              32   32
 *       32 x 1           64           4 x 2              3.4   3.9              32   32
 *       64 x 2          128           4 x 1              4.5   4.7 (per mma)
 *
 * No spills on any architecture; at most 128 registers up to 32 tokens (two blocks of 256 threads),
 * 168 or 255 with 64 (three blocks of 128 threads, or two).
 *
 * Rejected: W through cp.async (more traffic of shared memory for the same bytes), 128 tokens per
 * block (spills), the decoding of scales as a kernel of its own (an eighth more traffic). Not
 * written: k split over blocks, which would serve n <= 2048 (needs clusters, or a second launch).
 */
#ifndef BNBQ_Q4_MMA_CUH
#define BNBQ_Q4_MMA_CUH

#include "q4_linear.cuh"

extern "C" {
#include "float16.h"
}

enum {
    STEP = 64,          /* columns of W, and of x, that a warp takes at a time */
    ENTRY = 256,        /* bytes from one entry of the table to the next: 128 used, then a gap */
    GAP = 128,          /* a gap holds one step of one token */
    TABLE = 256 * ENTRY /* bytes */
};

/* Codebook values rounded to 16 bits. */
struct q4_codebook16 {
    uint16_t values[16];
};

template <int TOKENS, int TILES, bool HALVES, bool DOUBLE> struct q4_shape {
    static constexpr int ROW_WARPS = TOKENS < 64 ? TOKENS / 8 : 4;
    static constexpr int K_WARPS = TOKENS < 64 ? 8 / ROW_WARPS : 1;
    static constexpr int GROUP = ROW_WARPS * WARP; /* threads that share steps of x */
    static constexpr int THREADS = GROUP * K_WARPS;
    static constexpr int ROWS = 16 * TILES * ROW_WARPS;
    /* Steps of W in registers. Of few tokens nothing else hides the latency of memory, and 48
     * registers are left for it, or 32; of many, a step takes longer than a load. */
    static constexpr int STEP_REGISTERS = TILES * (4 + 2 * (HALVES ? 2 : 1) * (DOUBLE ? 2 : 1));
    static constexpr int DEPTH = TOKENS == 8    ? 48 / STEP_REGISTERS
                                 : TOKENS == 16 ? 32 / STEP_REGISTERS
                                 : TOKENS == 32 ? 4
                                                : 1;
    static constexpr int HALVES_AT_ONCE = TOKENS < 64 ? 1 : 2; /* of a step, decoded */
    /* The ring of x takes all gaps. */
    static constexpr int STAGE = K_WARPS * TOKENS * ENTRY; /* bytes */
    static constexpr int STAGES = TABLE / STAGE;
    static constexpr int COPIES = TOKENS * 8 / GROUP; /* of 16 bytes, per thread and step */
    /* Per multiprocessor. */
    static constexpr int MIN_BLOCKS = TOKENS == 64 && !HALVES && !DOUBLE ? 3 : 2;
    static constexpr int LD = ROWS + 4; /* of the sums at the end: no bank conflicts */
    static constexpr size_t SUMS = K_WARPS * TOKENS * LD * sizeof(float);
    static constexpr size_t LOOP = TABLE + (DOUBLE ? sizeof(dynamic_map) : 0);
    static constexpr size_t SHARED = LOOP > SUMS ? LOOP : SUMS;
};

template <bnbq_dtype TYPE> DEVICE void mma(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    if (TYPE == BNBQ_BF16)
        mma_bf16(d, a, b);
    else
        mma_f16(d, a, b);
}

/* Two codebook values of byte i of the word, the first in the low half. */
DEVICE uint32_t decode_pair(const char *table, uint32_t lane4, uint32_t word, int i) {
    return *(const uint32_t *)(table + permute_bytes(word, lane4, 0x5504u | (uint32_t)i << 4));
}

/* HALVES: blocks of 32. */
template <bnbq_dtype TYPE, int TOKENS, int TILES, bool HALVES, bool DOUBLE>
__global__ void __launch_bounds__((q4_shape<TOKENS, TILES, HALVES, DOUBLE>::THREADS),
                                  (q4_shape<TOKENS, TILES, HALVES, DOUBLE>::MIN_BLOCKS))
    q4_mma_kernel(const __grid_constant__ q4_operands op,
                  const __grid_constant__ q4_codebook16 codebook,
                  const __grid_constant__ q4_scales<DOUBLE> scales) {
#if HAS_MMA
    using S = q4_shape<TOKENS, TILES, HALVES, DOUBLE>;
    char *memory = (char *)shared_memory();
    const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    const int g = lane / 4, t = lane % 4;
    const int k_warp = warp / S::ROW_WARPS, row_warp = warp % S::ROW_WARPS;
    const int64_t row0 = (int64_t)blockIdx.x * S::ROWS, token0 = q4_tile() * TOKENS;
    if (token0 >= op.m)
        return;

    /* In each round a warp takes the step round * K_WARPS + k_warp. Behind the last step it takes
     * that one again with zeros for x, so that no warp leaves the others' way. */
    const int steps = (int)((op.k + STEP - 1) / STEP);
    const int rounds = (steps + S::K_WARPS - 1) / S::K_WARPS;
    auto step_of = [&](int round) {
        const int step = round * S::K_WARPS + k_warp, last = steps - 1;
        return (uint32_t)(step < last ? step : last);
    };

    const int rows_left = (int)(op.n - row0 < S::ROWS ? op.n - row0 : S::ROWS);
    const int tokens_left = (int)(op.m - token0 < TOKENS ? op.m - token0 : TOKENS);

    /* W: this lane's rows; those behind the last one read the last one and are not stored. */
    const uint8_t *codes[TILES][2];
    uint32_t first_block[TILES][2];
    uint2 w[S::DEPTH][TILES][2];
    raw_scale<DOUBLE> raw[S::DEPTH][TILES][2][HALVES ? 2 : 1];
#pragma unroll
    for (int r = 0; r < TILES; r++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int at = (row_warp * TILES + r) * 16 + i * 8 + g;
            const int64_t row = row0 + (at < rows_left ? at : rows_left - 1);
            codes[r][i] = opaque(op.qweight + row * (op.k / 2) + t * (HALVES ? 4 : 8));
            first_block[r][i] = opaque((uint32_t)(row * (op.k >> op.blocksize_log2)));
        }
    auto load_weights = [&](int slot, int round) {
        if (round >= rounds)
            return;
        const uint32_t step = step_of(round);
#pragma unroll
        for (int r = 0; r < TILES; r++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint8_t *at = codes[r][i] + (uint64_t)step * (STEP / 2);
                if constexpr (HALVES) {
                    const bool whole = (int64_t)step * STEP + 32 < op.k;
                    const uint32_t block = first_block[r][i] + step * 2;
                    /* Not load_stream32: the second half of a sector should find it in L1. */
                    w[slot][r][i].x = load_read_only32(at);
                    w[slot][r][i].y = whole ? load_read_only32(at + 16) : 0;
                    load_scale(op.absmax, block, &raw[slot][r][i][0]);
                    raw[slot][r][i][1] = {};
                    if (whole)
                        load_scale(op.absmax, block + 1, &raw[slot][r][i][1]);
                } else {
                    w[slot][r][i] = load_stream64(at);
                    load_scale(op.absmax, first_block[r][i] + (step * STEP >> op.blocksize_log2),
                               &raw[slot][r][i][0]);
                }
            }
    };

    /* x: eight threads copy one step of a token, 128 bytes, to its gap. Chunk c of 16 bytes goes to
     * place c ^ g, and for HALVES c = 4h + t takes the place of 2t + h: what the lanes of a warp
     * read together then lies in different banks. */
    const int member = (int)threadIdx.x % S::GROUP, chunk = member % 8;
    const int place = HALVES ? chunk % 4 * 2 + chunk / 4 : chunk;
    const int apart = S::GROUP / 8; /* tokens between two of a thread's: 4 or 8n */
    const uint16_t *from[S::COPIES];
#pragma unroll
    for (int i = 0; i < S::COPIES; i++) {
        const int token = member / 8 + i * apart;
        from[i] = opaque((const uint16_t *)op.x.data +
                         (token0 + (token < tokens_left ? token : 0)) * op.x.ld + chunk * 8);
    }
    const uint32_t to = opaque(
        (uint32_t)((k_warp * TOKENS + member / 8) * ENTRY + GAP + (place ^ member / 8 % 8) * 16));
    /* Where this lane reads its share of token g, both halves of a step. */
    const uint32_t tokens =
        opaque((uint32_t)((k_warp * TOKENS + g) * ENTRY + GAP + (2 * t ^ g) * 16));
    auto copy_x = [&](int round) {
        if (round < rounds) {
            const uint32_t step = step_of(round);
            const bool exists = round * S::K_WARPS + k_warp < steps;
            const bool whole = !HALVES || (int64_t)step * STEP + chunk * 8 < op.k;
#pragma unroll
            for (int i = 0; i < S::COPIES; i++)
                copy_async16_cached(memory + round % S::STAGES * S::STAGE + i * apart * ENTRY +
                                        (to ^ (uint32_t)(i * apart % 8 * 16)),
                                    whole ? from[i] + (uint64_t)step * STEP
                                          : (const uint16_t *)op.x.data,
                                    exists && whole && member / 8 + i * apart < tokens_left);
        }
        commit_copies(); /* of any number: groups are counted */
    };

#pragma unroll
    for (int s = 0; s < S::DEPTH; s++)
        load_weights(s, s);
#pragma unroll
    for (int s = 0; s < S::STAGES - 1; s++)
        copy_x(s);
    for (int e = warp; e < 256; e += S::THREADS / WARP)
        *(uint32_t *)(memory + e * ENTRY + lane * 4) =
            codebook.values[e / 16] | (uint32_t)codebook.values[e % 16] << 16;
    const float *map = (const float *)(memory + TABLE);
    float offset = 0;
    if constexpr (DOUBLE) {
        for (int i = (int)threadIdx.x; i < 256; i += S::THREADS)
            ((float *)(memory + TABLE))[i] = scales.map.values[i];
        offset = *op.absmax.offset;
    }
    sync_threads();

    float sums[TILES][TOKENS / 8][4] = {};
    for (int round0 = 0; round0 < rounds; round0 += S::DEPTH) {
#pragma unroll
        for (int slot = 0; slot < S::DEPTH; slot++) {
            const int round = round0 + slot;
            if (round >= rounds)
                break;
            wait_copies<S::STAGES - 2>();
            if constexpr (S::ROW_WARPS == 1)
                sync_warp();
            else
                sync_threads();
            copy_x(round + S::STAGES - 1); /* to where the round before has been read from */

            float scale[TILES][2][HALVES ? 2 : 1];
            float part[TILES][TOKENS / 8][4];
            const char *ring = memory + round % S::STAGES * S::STAGE;
#pragma unroll
            for (int h0 = 0; h0 < 2; h0 += S::HALVES_AT_ONCE) {
                uint32_t a[TILES][S::HALVES_AT_ONCE * 2][4];
#pragma unroll
                for (int r = 0; r < TILES; r++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
#pragma unroll
                        for (int h = h0; h < h0 + S::HALVES_AT_ONCE; h++) {
                            const uint32_t word = h ? w[slot][r][i].y : w[slot][r][i].x;
#pragma unroll
                            for (int j = 0; j < 4; j++)
                                a[r][2 * (h - h0) + j / 2][j % 2 * 2 + i] =
                                    decode_pair(memory, (uint32_t)lane * 4, word, j);
                            if (h == 0 || HALVES)
                                scale[r][i][h] = decode_scale(raw[slot][r][i][h], map, offset);
                        }
                if (S::HALVES_AT_ONCE == 2)
                    load_weights(slot, round + S::DEPTH);
#pragma unroll
                for (int tile = 0; tile < TOKENS / 8; tile++)
#pragma unroll
                    for (int h = h0; h < h0 + S::HALVES_AT_ONCE; h++) {
                        const uint4 b =
                            *(const uint4 *)(ring + tile * 8 * ENTRY + (tokens ^ (uint32_t)h * 16));
                        const uint32_t b0[2] = {b.x, b.y}, b1[2] = {b.z, b.w};
#pragma unroll
                        for (int r = 0; r < TILES; r++) {
                            float(&d)[4] = part[r][tile];
                            if (h == 0 || HALVES)
                                d[0] = d[1] = d[2] = d[3] = 0;
                            mma<TYPE>(d, a[r][2 * (h - h0)], b0);
                            mma<TYPE>(d, a[r][2 * (h - h0) + 1], b1);
                            if (h == 1 || HALVES)
#pragma unroll
                                for (int i = 0; i < 4; i++)
                                    sums[r][tile][i] += d[i] * scale[r][i / 2][HALVES ? h : 0];
                        }
                    }
            }
            if (S::HALVES_AT_ONCE == 1)
                load_weights(slot, round + S::DEPTH);
        }
    }

    wait_copies<0>();
    sync_threads(); /* the table has been read for the last time */
    float *all = (float *)memory;
#pragma unroll
    for (int r = 0; r < TILES; r++)
#pragma unroll
        for (int tile = 0; tile < TOKENS / 8; tile++)
#pragma unroll
            for (int d = 0; d < 4; d++) {
                const int token = tile * 8 + 2 * t + d % 2;
                const int row = (row_warp * TILES + r) * 16 + d / 2 * 8 + g;
                all[(k_warp * TOKENS + token) * S::LD + row] = sums[r][tile][d];
            }
    sync_threads();
    for (int i = (int)threadIdx.x; i < TOKENS * S::ROWS; i += S::THREADS) {
        const int token = i / S::ROWS, row = i % S::ROWS;
        if (token >= tokens_left || row >= rows_left)
            continue;
        float sum = all[token * S::LD + row];
#pragma unroll
        for (int part = 1; part < S::K_WARPS; part++)
            sum += all[(part * TOKENS + token) * S::LD + row];
        q4_store(op, token0 + token, row0 + row, sum);
    }
#endif
}

template <bnbq_dtype TYPE, int TOKENS, int TILES, bool HALVES, bool DOUBLE>
bnbq_status q4_launch_mma(bnbq_cuda_call *call, const q4_operands *op, const bnbq_format *format) {
    using S = q4_shape<TOKENS, TILES, HALVES, DOUBLE>;
    q4_codebook16 codebook;
    for (int i = 0; i < 16; i++)
        codebook.values[i] = TYPE == BNBQ_BF16 ? bnbq_f32_to_bf16(format->codebook[i])
                                               : bnbq_f32_to_f16(format->codebook[i]);
    return launch<q4_mma_kernel<TYPE, TOKENS, TILES, HALVES, DOUBLE>>(
        call, q4_grid(op, S::ROWS, TOKENS), S::THREADS, S::SHARED, *op, codebook,
        q4_get_scales<DOUBLE>());
}

template <bnbq_dtype TYPE, int TOKENS, int TILES, bool HALVES = false>
bnbq_status q4_launch_shape(bnbq_cuda_call *call, const q4_operands *op,
                            const bnbq_format *format) {
    return op->absmax.codes ? q4_launch_mma<TYPE, TOKENS, TILES, HALVES, true>(call, op, format)
                            : q4_launch_mma<TYPE, TOKENS, TILES, HALVES, false>(call, op, format);
}

template <bnbq_dtype TYPE>
bnbq_status q4_mma(bnbq_cuda_call *call, const q4_operands *op, const bnbq_format *format,
                   q4_shape_id shape) {
    switch (shape) {
    case Q4_8x1: return q4_launch_shape<TYPE, 8, 1>(call, op, format);
    case Q4_8x2: return q4_launch_shape<TYPE, 8, 2>(call, op, format);
    case Q4_16x1: return q4_launch_shape<TYPE, 16, 1>(call, op, format);
    case Q4_16x2: return q4_launch_shape<TYPE, 16, 2>(call, op, format);
    case Q4_32x1: return q4_launch_shape<TYPE, 32, 1>(call, op, format);
    case Q4_64x2: return q4_launch_shape<TYPE, 64, 2>(call, op, format);
    case Q4_HALVES_16x1: return q4_launch_shape<TYPE, 16, 1, true>(call, op, format);
    default: return q4_launch_shape<TYPE, 64, 1, true>(call, op, format);
    }
}

#endif

/* q4_fma.cu - y = x . W^T in fp32 arithmetic for any layout of a packed 4-bit weight.
 *
 * For what q4_mma.cuh leaves: fp32 as the compute dtype, blocks that cross rows, rows that start in
 * the middle of a byte, processors before 8.0. Weights are those of reference.py to the bit (value
 * times scale, rounded once); sums are fused multiply-adds.
 *
 *   stream  few rows of x: a block takes the same rows of W, its threads take turns at words of 8
 *           codes. Words are aligned in the flattened weight, so a word never holds two blocks,
 *           wherever the row starts. With k % 8 == 0 all rows start on a word and four of them
 *           share what is read of x.
 *   tile    many rows of x: 64 x 64 of y from shared memory, 4 x 4 per thread.
 */
#include "q4_linear.cuh"

enum {
    THREADS = 256,
    WARPS = THREADS / WARP,
    WORD = 8, /* codes */
    VALUES = 16 * WARP * 4 + sizeof(dynamic_map),
};

/* Shared memory of both kernels begins with the codebook, each value once per lane, so that every
 * lane reads its own bank, and the map of double quantisation. */
struct tables {
    const float *codebook, *map;
    float offset;
};

DEVICE tables load_tables(const q4_operands &op, const q4_codebook &codebook,
                          const dynamic_map &map) {
    float *values = (float *)shared_memory();
    for (int i = (int)threadIdx.x; i < 16 * WARP; i += THREADS)
        values[i] = codebook.values[i / WARP];
    if (op.absmax.codes)
        values[16 * WARP + threadIdx.x] = map.values[threadIdx.x];
    return {values + threadIdx.x % WARP, values + 16 * WARP,
            op.absmax.codes ? *op.absmax.offset : 0.0f};
}

DEVICE float scale_of(const q4_operands &op, const tables &at, int64_t block) {
    if (!op.absmax.codes)
        return op.absmax.absmax[block];
    return add_rn(
        mul_rn(at.map[op.absmax.codes[block]], op.absmax.absmax2[block / BNBQ_ABSMAX_BLOCK]),
        at.offset);
}

/* Bytes 4i .. 4i + 3, zeros behind the last one. */
DEVICE uint32_t load_word(const q4_operands &op, int64_t i) {
    const uint8_t *bytes = op.qweight + 4 * i;
    const int64_t left = (op.n * op.k + 1) / 2 - 4 * i;
    if (left >= 4 && (uintptr_t)bytes % 4 == 0)
        return load_stream32(bytes);
    uint32_t word = 0;
    for (int b = 0; b < 4 && b < left; b++)
        word |= (uint32_t)bytes[b] << 8 * b;
    return word;
}

/* Element e of a word: the high nibble of a byte comes first. */
DEVICE float value_of(const tables &at, uint32_t word, int e) {
    return at.codebook[(word >> (e / 2 * 8 + (e % 2 ? 0 : 4)) & 15) * WARP];
}

/* Columns column .. column + 7 of a row of x, zeros outside of it. */
DEVICE void load_x(const q4_operands &op, int64_t token, int64_t column, float x[WORD]) {
    const int64_t at = token * op.x.ld + column;
    if (column % WORD != 0 || column < 0 || column + WORD > op.k) {
#pragma unroll
        for (int e = 0; e < WORD; e++)
            x[e] = column + e >= 0 && column + e < op.k ? load_float(op.x.data, op.x.dtype, at + e)
                                                        : 0.0f;
    } else if (op.x.dtype == BNBQ_F32) {
        const float4 *words = (const float4 *)((const float *)op.x.data + at);
        const float4 low = words[0], high = words[1];
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
        x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    } else {
        const uint4 words = *(const uint4 *)((const uint16_t *)op.x.data + at);
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int e = 0; e < WORD; e++) {
            const uint16_t bits = (uint16_t)(word[e / 2] >> e % 2 * 16);
            x[e] = op.x.dtype == BNBQ_BF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
        }
    }
}

/* ROWS > 1 needs k % 8 == 0. */
template <int ROWS, int TOKENS>
__global__ void __launch_bounds__(THREADS, 1) /* or 10.0 spills at 128 registers */
    stream_kernel(const __grid_constant__ q4_operands op, const __grid_constant__ q4_codebook book,
                  const __grid_constant__ dynamic_map map) {
    const int64_t row0 = (int64_t)blockIdx.x * ROWS, token0 = q4_tile() * TOKENS;
    const tables at = load_tables(op, book, map);
    sync_threads();

    const int64_t first = row0 * op.k / WORD, skipped = row0 * op.k % WORD; /* elements before */
    const int64_t words = (skipped + op.k + WORD - 1) / WORD;
    float sums[ROWS][TOKENS] = {};
    for (int64_t i = threadIdx.x; i < words; i += THREADS) {
        const int64_t column = i * WORD - skipped;
        float x[TOKENS][WORD];
#pragma unroll
        for (int m = 0; m < TOKENS; m++)
            if (token0 + m < op.m)
                load_x(op, token0 + m, column, x[m]);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (row0 + r >= op.n)
                continue;
            const int64_t at_word = first + r * (op.k / WORD) + i;
            const uint32_t word = load_word(op, at_word);
            const float scale = scale_of(op, at, at_word * WORD >> op.blocksize_log2);
#pragma unroll
            for (int e = 0; e < WORD; e++) {
                /* Of another row where x is zero. */
                const float w = mul_rn(value_of(at, word, e), scale);
#pragma unroll
                for (int m = 0; m < TOKENS; m++)
                    if (token0 + m < op.m)
                        sums[r][m] += w * x[m][e];
            }
        }
    }

    float *partial = (float *)((char *)shared_memory() + VALUES); /* [WARPS][ROWS * TOKENS] */
    const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int m = 0; m < TOKENS; m++) {
            float sum = sums[r][m];
            for (int mask = WARP / 2; mask > 0; mask /= 2)
                sum += shuffle_xor_float(sum, mask);
            if (lane == 0)
                partial[(warp * ROWS + r) * TOKENS + m] = sum;
        }
    sync_threads();
    const int m = (int)threadIdx.x / ROWS, r = (int)threadIdx.x % ROWS;
    if (m >= TOKENS || token0 + m >= op.m || row0 + r >= op.n)
        return;
    float sum = 0;
    for (int i = 0; i < WARPS; i++)
        sum += partial[(i * ROWS + r) * TOKENS + m];
    q4_store(op, token0 + m, row0 + r, sum);
}

enum {
    TILE = 64,  /* rows of W and of x */
    CHUNK = 32, /* columns at a time */
    TILE_LD = TILE + 4,
};

__global__ void __launch_bounds__(THREADS)
    tile_kernel(const __grid_constant__ q4_operands op, const __grid_constant__ q4_codebook book,
                const __grid_constant__ dynamic_map map) {
    const int64_t row0 = (int64_t)blockIdx.x * TILE, token0 = q4_tile() * TILE;
    const tables at = load_tables(op, book, map);
    float *w = (float *)((char *)shared_memory() + VALUES), *x = w + CHUNK * TILE_LD;

    /* Loading: one row, 8 columns. Computing: 4 rows of W and 4 of x. */
    const int loaded = (int)threadIdx.x % TILE, part = (int)threadIdx.x / TILE * WORD;
    const int row = (int)threadIdx.x % 16 * 4, token = (int)threadIdx.x / 16 * 4;
    float sums[4][4] = {};
    for (int64_t k0 = 0; k0 < op.k; k0 += CHUNK) {
        sync_threads(); /* the tables are there; the chunk before has been read */
        const int64_t column = k0 + part;
        float values[WORD] = {};
        if (token0 + loaded < op.m)
            load_x(op, token0 + loaded, column, values);
#pragma unroll
        for (int e = 0; e < WORD; e++)
            x[(part + e) * TILE_LD + loaded] = values[e];
        const int64_t start = (row0 + loaded) * op.k + column; /* in the flattened weight */
        uint32_t word = 0;
        int64_t at_word = -1;
        float scale = 0;
#pragma unroll
        for (int e = 0; e < WORD; e++) {
            float value = 0;
            if (row0 + loaded < op.n && column + e < op.k) {
                if ((start + e) / WORD != at_word) {
                    at_word = (start + e) / WORD;
                    word = load_word(op, at_word);
                    scale = scale_of(op, at, at_word * WORD >> op.blocksize_log2);
                }
                value = mul_rn(value_of(at, word, (int)((start + e) % WORD)), scale);
            }
            w[(part + e) * TILE_LD + loaded] = value;
        }
        sync_threads();
#pragma unroll 8
        for (int c = 0; c < CHUNK; c++) {
            const float4 a = *(const float4 *)(w + c * TILE_LD + row);
            const float4 b = *(const float4 *)(x + c * TILE_LD + token);
            const float rows[4] = {a.x, a.y, a.z, a.w}, tokens[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int n = 0; n < 4; n++)
                    sums[m][n] += rows[n] * tokens[m];
        }
    }
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            if (token0 + token + m < op.m && row0 + row + n < op.n)
                q4_store(op, token0 + token + m, row0 + row + n, sums[m][n]);
}

template <int ROWS, int TOKENS>
static bnbq_status launch_stream(bnbq_cuda_call *call, const q4_operands *op,
                                 const q4_codebook &codebook, const dynamic_map &map) {
    return launch<stream_kernel<ROWS, TOKENS>>(call, q4_grid(op, ROWS, TOKENS), THREADS,
                                               VALUES + WARPS * ROWS * TOKENS * sizeof(float), *op,
                                               codebook, map);
}

bnbq_status q4_fma(bnbq_cuda_call *call, const q4_operands *op, const bnbq_format *format,
                   bool batch_invariant) {
    q4_codebook codebook;
    for (int i = 0; i < 16; i++)
        codebook.values[i] = format->codebook[i];
    const dynamic_map map = get_dynamic_map();
    if (op->m > 8 && !batch_invariant)
        return launch<tile_kernel>(call, q4_grid(op, TILE, TILE), THREADS,
                                   VALUES + 2 * CHUNK * TILE_LD * sizeof(float), *op, codebook,
                                   map);
    if (op->k % WORD != 0)
        return op->m == 1 ? launch_stream<1, 1>(call, op, codebook, map)
                          : launch_stream<1, 8>(call, op, codebook, map);
    return op->m == 1   ? launch_stream<4, 1>(call, op, codebook, map)
           : op->m <= 4 ? launch_stream<4, 4>(call, op, codebook, map)
                        : launch_stream<4, 8>(call, op, codebook, map);
}

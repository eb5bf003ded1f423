/* quantize4.cu - 4-bit weights: quantise and dequantise. reference.py defines every bit.
 *
 * A block of threads takes UNITS units (units.cuh) per thread, all loaded before the first is used:
 * 64 bytes in flight per thread when quantising. A block of weights lies within a unit row of one
 * warp (up to 128 or 256 weights), and its absmax is a few shuffles; larger ones, up to 4096, are
 * several neighbouring rows, whose maxima meet in 32 words of shared memory.
 *
 * Encoding looks up, by the cell of width 1 / 15.5 in which x lies, the thresholds within the cell
 * and the codes beside them; lane l holds those of cell l. There is one threshold at most, but two
 * in one cell of fp4. So a weight costs a multiplication, 6 instructions for its code (2 of them
 * shuffles; 9 and 3 for fp4) and no branch. Decoding is one shuffle of a codebook that lies across
 * the lanes the same way.
 *
 * Counted in SASS for sm_90a, blocks of 64, whole units, slow paths of the reciprocal aside:
 * instructions per weight, and wavefronts of the load/store unit per 32 weights of a lane
 *     quantise    bf16 16.6, 100   fp4 19.6, 132   fp32 22.7
 *     dequantise  bf16  5.7, 56   double quantised 7.3, 61   fp32 7.3
 * An H200 needs 6.4 bf16 weights per clock and multiprocessor at memory speed; 128 lanes issue 7.7
 * (fp4 6.5) when quantising, 22 when dequantising, the load/store unit allows 10.2 (7.8) and 18. So
 * memory is predicted to be the limit; nobody has timed it.
 *
 * Rejected: tables in shared memory (as many wavefronts, and tables to fill); a search in four
 * steps (11 instructions, 3 shuffles); selecting thresholds in registers (19); 15 comparisons (30).
 */
#include "absmax.cuh"
#include "units.cuh"

#include <math.h>

enum { THREADS = 256, WARPS = THREADS / WARP, UNITS = 4 };
static_assert(UNITS * WARPS == WARP, "rows of a block of threads: as many as there are lanes");

/* Least divisor of a block, as reference.TINY_4BIT. */
#define TINY 1e-38f

/* ---------------------------------------------------------------- quantise */

/* By lane; cell -1 is that of lane 31. Shuffles look at the lowest five bits alone. */
struct cell_tables {
    float first[WARP], second[WARP]; /* thresholds in the cell, ascending; Inf: there is none */
    uint32_t codes[WARP]; /* of x above none, one, two of them, four bits each from the highest */
    bool has_second;
};

#define CELLS_PER_UNIT 15.5f /* cells -16 .. 15 hold -1 .. 1, and 0 is where one starts */

static cell_tables get_cell_tables(const bnbq_format *format) {
    cell_tables tables = {};
    for (int lane = 0; lane < WARP; lane++) {
        int cell = lane < WARP / 2 ? lane : lane - WARP, below = 0, inside = 0;
        float found[15];
        for (float threshold : format->thresholds) {
            int other = (int)floor((double)threshold * CELLS_PER_UNIT);
            below += other < cell;
            if (other == cell)
                found[inside++] = threshold;
        }
        tables.first[lane] = inside > 0 ? found[0] : INFINITY;
        tables.second[lane] = inside > 1 ? found[1] : INFINITY;
        tables.has_second |= inside > 1;
        for (int i = 0; i <= inside; i++)
            tables.codes[lane] |= (uint32_t)format->order[below + i] << (28 - 4 * i);
    }
    return tables;
}

/* Warp: the codes of x, four bits each in the lowest bits, the first one highest. */
template <int N, bool SECOND>
DEVICE uint32_t encode(const cell_tables &tables, const float (&x)[N]) {
    int lane = (int)threadIdx.x % WARP;
    float first = tables.first[lane], second = tables.second[lane];
    uint32_t codes = tables.codes[lane], result = 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
        int cell = (int)floor_of_product(x[i], CELLS_PER_UNIT);
        uint32_t code = shuffle(codes, cell);
        code = shuffle_float(first, cell) < x[i] ? code << 4 : code;
        if (SECOND)
            code = shuffle_float(second, cell) < x[i] ? code << 4 : code;
        result = result << 4 | code >> 28;
    }
    return result;
}

/* Values before a thread's next unit, and before the next block of threads: a whole number of
 * blocks of weights. */
template <bnbq_dtype DTYPE> constexpr int STRIDE = THREADS *UNIT<DTYPE>;
template <bnbq_dtype DTYPE> constexpr int TILE = UNITS *STRIDE<DTYPE>;
static_assert(TILE<BNBQ_F32> == 4096, "the largest block size divides it");

template <bnbq_dtype DTYPE>
using codes_of = std::conditional_t<UNIT<DTYPE> == 8, uint32_t, uint16_t>;

template <bnbq_dtype DTYPE>
__global__ void __launch_bounds__(THREADS)
    quantize4_kernel(const element_of<DTYPE> *w, int64_t count,
                     const __grid_constant__ cell_tables tables, int log2_blocksize, bool wide,
                     uint8_t *qweight, float *absmax) {
    constexpr int N = UNIT<DTYPE>;
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    int start = (int)threadIdx.x * N; /* in the tile */
    int64_t tile = (int64_t)blockIdx.x * TILE<DTYPE>, tile_block = tile >> log2_blocksize;
    int left = left_of(count - tile),
        whole_blocks = left_of((count >> log2_blocksize) - tile_block);

    uint4 units[UNITS];
#pragma unroll
    for (int u = 0; u < UNITS; u++)
        units[u] = load_unit<DTYPE>(w + tile + start + u * STRIDE<DTYPE>,
                                    left - start - u * STRIDE<DTYPE>, wide);

    int lanes = (1 << log2_blocksize) / N; /* that share an absmax */
    uint32_t greatest[UNITS];
#pragma unroll
    for (int u = 0; u < UNITS; u++)
        greatest[u] = greatest_of(greatest_magnitude<DTYPE>(units[u]), lanes < WARP ? lanes : WARP);
    if (lanes > WARP) {
        uint32_t *rows = (uint32_t *)shared_memory();
        if (lane == 0) {
#pragma unroll
            for (int u = 0; u < UNITS; u++)
                rows[u * WARPS + warp] = greatest[u];
        }
        sync_threads();
        uint32_t all = greatest_of(rows[lane], lanes / WARP);
#pragma unroll
        for (int u = 0; u < UNITS; u++)
            greatest[u] = shuffle(all, u * WARPS + warp);
    }

#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        int first = start + u * STRIDE<DTYPE>, block = first >> log2_blocksize;
        uint32_t tiny = float_bits(TINY), bits = greatest[u] > tiny ? greatest[u] : tiny;
        bool whole = block < whole_blocks;
        float divisor = bits_float(bits), x[N];
        if (first < left && first == block << log2_blocksize)
            absmax[tile_block + block] = bits_float(whole ? greatest[u] : bits);
        widen<DTYPE>(units[u], x);
        if (whole) {
            float inverse = reciprocal_rn(divisor);
#pragma unroll
            for (int i = 0; i < N; i++)
                x[i] = mul_rn(x[i], inverse);
        } else { /* the short block at the end is divided: bitsandbytes' bytes */
#pragma unroll
            for (int i = 0; i < N; i++)
                x[i] = div_rn(x[i], divisor);
        }
        uint32_t codes =
            tables.has_second ? encode<N, true>(tables, x) : encode<N, false>(tables, x);
        codes = permute_bytes(codes, 0, 0x0123) >> (32 - 4 * N); /* the first one goes first */
        store_codes(qweight + (tile + first) / 2, (left - first + 1) / 2, wide,
                    (codes_of<DTYPE>)codes);
    }
}

bnbq_status bnbq_cuda_quantize_4bit(bnbq_cuda_call *call, const bnbq_tensor *w,
                                    const struct bnbq_format *format, int64_t blocksize,
                                    uint8_t *qweight, float *absmax) {
    device_guard guard(call);
    TRY(guard.status);
    const void *data;
    TRY(load_flat(call, w, &data));
    int64_t count = count_of(w);
    bool wide = is_aligned_to(data, 16) && is_aligned_to(qweight, 4);
    return with_dtype(w->dtype, [&](auto dtype) {
        constexpr bnbq_dtype DTYPE = decltype(dtype)::value;
        dim3 grid((unsigned)ceil_div(count, TILE<DTYPE>));
        return launch<quantize4_kernel<DTYPE>>(
            call, grid, THREADS, WARP * sizeof(uint32_t), (const element_of<DTYPE> *)data, count,
            get_cell_tables(format), log2_of(blocksize), wide, qweight, absmax);
    });
}

/* ---------------------------------------------------------------- dequantise */

/* `map` stays in constant memory. */
DEVICE float load_scale(const bnbq_absmax &absmax, const dynamic_map &map, int64_t block) {
    if (absmax.absmax)
        return absmax.absmax[block];
    float value = map.values[absmax.codes[block]];
    return decode_absmax(value, absmax.absmax2[block / BNBQ_ABSMAX_BLOCK], *absmax.offset);
}

template <bnbq_dtype DTYPE>
__global__ void __launch_bounds__(THREADS)
    dequantize4_kernel(const uint8_t *qweight, const __grid_constant__ bnbq_absmax absmax,
                       const __grid_constant__ dynamic_map map,
                       const __grid_constant__ bnbq_format format, int64_t count,
                       int log2_blocksize, bool wide, element_of<DTYPE> *out) {
    constexpr int N = UNIT<DTYPE>;
    int start = (int)threadIdx.x * N;
    int64_t tile = (int64_t)blockIdx.x * TILE<DTYPE>, tile_block = tile >> log2_blocksize;
    int left = left_of(count - tile);
    float codebook = format.codebook[threadIdx.x % 16], scales[UNITS];
    uint32_t codes[UNITS];
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        int first = start + u * STRIDE<DTYPE>;
        codes[u] =
            load_codes<codes_of<DTYPE>>(qweight + (tile + first) / 2, (left - first + 1) / 2, wide);
    }
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        int first = start + u * STRIDE<DTYPE>;
        scales[u] = 0.0f;
        if (first < left)
            scales[u] = load_scale(absmax, map, tile_block + (first >> log2_blocksize));
    }
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        int first = start + u * STRIDE<DTYPE>;
        float values[N];
#pragma unroll
        for (int i = 0; i < N; i++) {
            uint32_t code = codes[u] >> (i / 2 * 8 + (i % 2 ? 0 : 4));
            values[i] = mul_rn(shuffle_float(codebook, (int)code), scales[u]);
        }
        store_unit<DTYPE>(out + tile + first, left - first, wide, narrow<DTYPE>(values));
    }
}

bnbq_status bnbq_cuda_dequantize_4bit(bnbq_cuda_call *call, const bnbq_weight4 *w,
                                      const bnbq_tensor *out) {
    device_guard guard(call);
    TRY(guard.status);
    void *data;
    TRY(open_flat(call, out, &data));
    int64_t count = w->n * w->k;
    bool wide = is_aligned_to(data, 16) && is_aligned_to(w->qweight, 4);
    TRY(with_dtype(out->dtype, [&](auto dtype) {
        constexpr bnbq_dtype DTYPE = decltype(dtype)::value;
        dim3 grid((unsigned)ceil_div(count, TILE<DTYPE>));
        return launch<dequantize4_kernel<DTYPE>>(
            call, grid, THREADS, 0, w->qweight, w->absmax, get_dynamic_map(), *w->format, count,
            log2_of(w->blocksize), wide, (element_of<DTYPE> *)data);
    }));
    return close_flat(call, data, out);
}

/* ---------------------------------------------------------------- scales */

enum {
    ROW = BNBQ_ABSMAX_BLOCK,
    ROWS = WARP,      /* of a block of threads: one lane adds one up */
    PADDED = ROW + 4, /* words: lanes' 16-byte reads from shared memory hit different banks */
    PER_LANE = ROW / WARP,
};

/* The first sums of reference.sum_in_order. */
__global__ void __launch_bounds__(THREADS)
    sum_kernel(const float *absmax, int64_t count, double *sums) {
    float *rows = (float *)shared_memory();
    int64_t first = (int64_t)blockIdx.x * ROWS;
    static_assert((int)THREADS == (int)ROW, "a thread has one column");
#pragma unroll 16
    for (int i = 0; i < ROWS; i++) {
        int64_t index = (first + i) * ROW + threadIdx.x;
        rows[i * PADDED + threadIdx.x] = index < count ? absmax[index] : 0.0f;
    }
    sync_threads();
    if (threadIdx.x >= ROWS || (first + threadIdx.x) * ROW >= count)
        return;
    double sum = 0.0;
#pragma unroll 8
    for (int i = 0; i < ROW; i += 4) {
        float4 four = *(const float4 *)&rows[threadIdx.x * PADDED + i];
        sum = add_rn_f64(add_rn_f64(sum, four.x), four.y);
        sum = add_rn_f64(add_rn_f64(sum, four.z), four.w);
    }
    sums[first + threadIdx.x] = sum;
}

/* Warp: of up to 256 values, first to last. */
DEVICE double sum_row(const double *values, int64_t count) {
    int lane = (int)threadIdx.x % WARP;
    double sum = 0.0, mine[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        mine[i] = i * WARP + lane < count ? values[i * WARP + lane] : 0.0;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
#pragma unroll 4
        for (int from = 0; from < WARP; from++)
            sum = add_rn_f64(sum, shuffle_double(mine[i], from));
    return sum;
}

/* The sums that follow, each level behind the one before, and the mean of `count` values. */
__global__ void __launch_bounds__(THREADS)
    mean_kernel(double *sums, int64_t rows, int64_t count, float *offset) {
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    while (rows > 1) {
        double *next = sums + rows;
        int64_t next_rows = (rows + ROW - 1) / ROW;
        for (int64_t row = warp; row < next_rows; row += WARPS) {
            double sum = sum_row(sums + row * ROW, rows - row * ROW);
            if (lane == 0)
                next[row] = sum;
        }
        sync_threads();
        sums = next;
        rows = next_rows;
    }
    if (threadIdx.x == 0)
        *offset = count ? (float)div_rn_f64(sums[0], (double)count) : 0.0f;
}

/* A warp per block: the nearest value of the map is the number of midpoints below, found in eight
 * steps. */
__global__ void __launch_bounds__(THREADS)
    quantize_absmax_kernel(const float *absmax, int64_t count, const float *offset,
                           const __grid_constant__ dynamic_map map, uint8_t *codes,
                           float *absmax2) {
    float *midpoints = (float *)shared_memory();
    if (threadIdx.x < 255)
        midpoints[threadIdx.x] =
            mul_rn(add_rn(map.values[threadIdx.x], map.values[threadIdx.x + 1]), 0.5f);
    sync_threads();
    int lane = (int)threadIdx.x % WARP;
    int64_t block = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP, first = block * ROW + lane;
    float x[PER_LANE];
    uint32_t greatest = 0, tiny = float_bits(TINY);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int64_t index = first + i * WARP;
        x[i] = index < count ? add_rn(absmax[index], -*offset) : 0.0f;
        uint32_t bits = float_bits(x[i]) & 0x7fffffff;
        greatest = bits > greatest ? bits : greatest;
    }
    greatest = greatest_of(greatest, WARP);
    float inverse = reciprocal_rn(bits_float(greatest > tiny ? greatest : tiny));
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        float scaled = mul_rn(x[i], inverse);
        int below = 0;
#pragma unroll
        for (int step = 128; step > 0; step /= 2)
            below += midpoints[below + step - 1] < scaled ? step : 0;
        if (first + i * WARP < count)
            codes[first + i * WARP] = (uint8_t)below;
    }
    if (lane == 0 && first < count)
        absmax2[block] = bits_float(greatest);
}

bnbq_status bnbq_cuda_quantize_absmax(bnbq_cuda_call *call, const float *absmax, int64_t count,
                                      uint8_t *codes, float *absmax2, float *offset) {
    device_guard guard(call);
    TRY(guard.status);
    int64_t rows = ceil_div(count, ROW), levels = 0;
    for (int64_t level = rows; level > 1; level = ceil_div(level, ROW))
        levels += level;
    double *sums;
    TRY(get_space(call, levels + 1, &sums));
    TRY(launch<sum_kernel>(call, dim3((unsigned)ceil_div(rows, ROWS)), THREADS,
                           ROWS * PADDED * sizeof(float), absmax, count, sums));
    TRY(launch<mean_kernel>(call, dim3(1), THREADS, 0, sums, rows, count, offset));
    return launch<quantize_absmax_kernel>(call, dim3((unsigned)ceil_div(rows, WARPS)), THREADS,
                                          ROW * sizeof(float), absmax, count, offset,
                                          get_dynamic_map(), codes, absmax2);
}

__global__ void __launch_bounds__(THREADS)
    dequantize_absmax_kernel(const __grid_constant__ bnbq_absmax absmax,
                             const __grid_constant__ dynamic_map map, int64_t count, float *out) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < count)
        out[i] = load_scale(absmax, map, i);
}

bnbq_status bnbq_cuda_dequantize_absmax(bnbq_cuda_call *call, const bnbq_absmax *absmax,
                                        int64_t count, float *out) {
    device_guard guard(call);
    TRY(guard.status);
    return launch<dequantize_absmax_kernel>(call, dim3((unsigned)ceil_div(count, THREADS)), THREADS,
                                            0, *absmax, get_dynamic_map(), count, out);
}

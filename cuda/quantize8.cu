/* quantize8.cu - int8 weights: quantise and dequantise. reference.py defines every bit.
 *
 * Quantising, a team of threads has a segment, which is what shares an absmax: a row, or a block of
 * columns. Segments of up to a warp's units (units.cuh) take one per lane, with several segments
 * side by side in the warp; longer ones eight per thread, held in registers between the search for
 * the absmax and the encoding, by teams of 32 to 512 threads. So memory is read once, unless a row
 * is longer than 512 threads hold (32768 values of 16 bits, 16384 of fp32): what is beyond is read
 * again, from the second-level cache.
 *
 * Rounding adds 1.5 * 2^23: the sum's low byte is the nearest integer, ties to even, for |x| below
 * 2^22, at a quarter of the cost of a conversion. A unit of dequantised values crosses segments
 * only if k is odd or so: there a loop looks for the next scale, elsewhere a unit has one.
 *
 * Counted in SASS for sm_90a, whole units, slow paths of the reciprocal aside, instructions per
 * bf16 weight: quantise rows 8.6, blocks of 64 columns 19.8; dequantise 14.7, two thirds of which
 * place a unit in its row. An H200 needs 5.5 weights per clock and multiprocessor at memory speed;
 * 128 lanes issue 14.9, 6.5 and 8.7. So memory is predicted to be the limit; nobody has timed it.
 */
#include "units.cuh"

enum { THREADS = 256, MOST_THREADS = 512, MOST_WARPS = MOST_THREADS / WARP };

/* Least divisor, as reference.TINY_8BIT: 127 * (1 / 1e-36) is finite. */
#define TINY 1e-36f

/* Codes of a unit. */
template <bnbq_dtype DTYPE>
using codes_of = std::conditional_t<UNIT<DTYPE> == 8, uint64_t, uint32_t>;

/* ---------------------------------------------------------------- quantise */

/* The low bytes of four words. */
DEVICE uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return permute_bytes(permute_bytes(a, b, 0x0040), permute_bytes(c, d, 0x0040), 0x5410);
}

template <bnbq_dtype DTYPE> DEVICE codes_of<DTYPE> encode(const uint4 &unit, float scale) {
    constexpr int N = UNIT<DTYPE>;
    float values[N];
    widen<DTYPE>(unit, values);
    uint32_t rounded[N];
#pragma unroll
    for (int i = 0; i < N; i++)
        rounded[i] = float_bits(add_rn(mul_rn(values[i], scale), 12582912.0f));
    codes_of<DTYPE> codes = 0;
#pragma unroll
    for (int i = 0; i < N; i += 4)
        codes |=
            (codes_of<DTYPE>)low_bytes(rounded[i], rounded[i + 1], rounded[i + 2], rounded[i + 3])
            << 8 * i;
    return codes;
}

/* The greatest of a team's bits; `team` is a power of two, teams of more than a warp lie in whole
 * warps. All threads of the block. */
DEVICE uint32_t greatest_of_team(uint32_t bits, int team) {
    bits = greatest_of(bits, team < WARP ? team : WARP);
    if (team <= WARP)
        return bits;
    uint32_t *warps = (uint32_t *)shared_memory();
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, members = team / WARP;
    if (lane == 0)
        warps[warp] = bits;
    sync_threads();
    return greatest_of(warps[(warp & -members) + (lane & (members - 1))], members);
}

/* Segments of a row start every `step` columns. UNITS: that a thread holds; whole ones, if their
 * codes may be stored whole. */
template <bnbq_dtype DTYPE, int UNITS>
__global__ void __launch_bounds__(MOST_THREADS)
    quantize8_kernel(const __grid_constant__ matrix w, int64_t step, int64_t segments_of_row,
                     int log2_team, bool wide, int8_t *qweight, float *absmax) {
    constexpr int N = UNIT<DTYPE>;
    int team = 1 << log2_team, member = (int)threadIdx.x & (team - 1), stride = team * N;
    int64_t segment = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) >> log2_team;
    int64_t row = segments_of_row == 1 ? segment : segment / segments_of_row,
            start = (segment - row * segments_of_row) * step;
    int64_t count = row < w.rows ? (step < w.cols - start ? step : w.cols - start) : 0;
    const element_of<DTYPE> *from =
        (const element_of<DTYPE> *)w.data + row * w.ld + start + member * N;
    int8_t *to = qweight + row * w.cols + start + member * N;
    int64_t left = count - member * N;         /* from there on */
    int whole = wide ? left_of(left) - N : -1; /* units start up to here */
    int mine = whole < 0 ? 0 : (whole / N + team) >> log2_team;
    int held = (mine < UNITS ? mine : UNITS) * stride;

    uint4 units[UNITS];
    uint32_t greatest = 0;
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        units[u] = {0, 0, 0, 0};
        if (u * stride <= whole)
            units[u] = load_stream128(from + u * stride);
    }
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        uint32_t bits = greatest_magnitude<DTYPE>(units[u]);
        greatest = bits > greatest ? bits : greatest;
    }
    for (int64_t i = held; i < left; i += stride) {
        uint4 unit = load_unit<DTYPE>(from + i, left_of(left - i), true);
        uint32_t bits = greatest_magnitude<DTYPE>(unit);
        greatest = bits > greatest ? bits : greatest;
    }
    greatest = greatest_of_team(greatest, team);

    if (member == 0 && row < w.rows)
        absmax[segment] = bits_float(greatest);
    uint32_t tiny = float_bits(TINY);
    float scale = mul_rn(127.0f, reciprocal_rn(bits_float(greatest > tiny ? greatest : tiny)));
#pragma unroll
    for (int u = 0; u < UNITS; u++)
        if (u * stride <= whole)
            *(codes_of<DTYPE> *)(to + u * stride) = encode<DTYPE>(units[u], scale);
    for (int64_t i = held; i < left; i += stride) {
        uint4 unit = load_unit<DTYPE>(from + i, left_of(left - i), true);
        store_codes(to + i, left_of(left - i), wide, encode<DTYPE>(unit, scale));
    }
}

bnbq_status bnbq_cuda_quantize_8bit(bnbq_cuda_call *call, const bnbq_tensor *w, int64_t blocksize,
                                    int8_t *qweight, float *absmax) {
    enum { MANY = 8 }; /* units of a thread */
    device_guard guard(call);
    TRY(guard.status);
    matrix x;
    TRY(load_matrix(call, w, w->dtype, &x));
    x.rows = 1; /* those of no columns too: their absmax is 0 */
    for (int d = 0; d < w->ndim - 1; d++)
        x.rows *= w->shape[d];
    int64_t per_unit = 16 / (int64_t)bnbq_dtype_size(w->dtype);
    bool wide = x.cols % per_unit == 0 && is_aligned_to(qweight, (size_t)per_unit);
    /* Blocks that follow one another are as good as rows. */
    if (blocksize && x.cols % blocksize == 0 && x.ld == x.cols)
        x = {x.data, x.dtype, x.rows * (x.cols / blocksize), blocksize, blocksize};
    int64_t step = blocksize ? blocksize : x.cols;
    int64_t segments_of_row = blocksize ? ceil_div(x.cols, blocksize) : 1;
    int64_t units = ceil_div(step < x.cols ? step : x.cols, per_unit);
    bool few = units <= WARP;
    int log2_team = few ? 0 : 5;
    while (few ? 1 << log2_team < units
               : (MANY << log2_team) < units && 1 << log2_team < MOST_THREADS)
        log2_team++;
    int threads = 1 << log2_team > THREADS ? 1 << log2_team : (int)THREADS;
    dim3 grid((unsigned)ceil_div(x.rows * segments_of_row, threads >> log2_team));
    return with_dtype(w->dtype, [&](auto dtype) {
        constexpr bnbq_dtype DTYPE = decltype(dtype)::value;
        auto launcher = few ? launch<quantize8_kernel<DTYPE, 1>, matrix, int64_t, int64_t, int,
                                     bool, int8_t *, float *>
                            : launch<quantize8_kernel<DTYPE, MANY>, matrix, int64_t, int64_t, int,
                                     bool, int8_t *, float *>;
        return launcher(call, grid, (unsigned)threads, MOST_WARPS * sizeof(uint32_t), x, step,
                        segments_of_row, log2_team, wide, qweight, absmax);
    });
}

/* ---------------------------------------------------------------- dequantise */

enum { UNITS = 4 };

template <class T> DEVICE float decode(T codes, int i, float scale) {
    const float inverse127 = 1.0f / 127;
    return mul_rn(mul_rn((float)(int8_t)(codes >> 8 * i), scale), inverse127);
}

template <bnbq_dtype DTYPE>
__global__ void __launch_bounds__(THREADS)
    dequantize8_kernel(const int8_t *qweight, const float *absmax, int64_t count, int64_t k,
                       int64_t step, int log2_step, bool wide, element_of<DTYPE> *out) {
    constexpr int N = UNIT<DTYPE>, STRIDE = THREADS * N;
    int64_t tile = (int64_t)blockIdx.x * (UNITS * STRIDE), segments = (k + step - 1) / step;
    int64_t tile_row = tile / k, tile_column = tile - tile_row * k;
    int start = (int)threadIdx.x * N, left = left_of(count - tile);
    codes_of<DTYPE> codes[UNITS];
#pragma unroll
    for (int u = 0; u < UNITS; u++)
        codes[u] = load_codes<codes_of<DTYPE>>(qweight + tile + start + u * STRIDE,
                                               left - start - u * STRIDE, wide);
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        int first = start + u * STRIDE;
        if (first >= left)
            return;
        int64_t column = tile_column + first, row = column / k;
        column -= row * k;
        int64_t block = column >> log2_step, end = (block + 1) * step < k ? (block + 1) * step : k;
        int64_t segment = (tile_row + row) * segments + block;
        float scale = absmax[segment];
        if (column + N <= end) {
            float values[N];
#pragma unroll
            for (int i = 0; i < N; i++)
                values[i] = decode(codes[u], i, scale);
            store_unit<DTYPE>(out + tile + first, left - first, wide, narrow<DTYPE>(values));
            continue;
        }
#pragma unroll 1
        for (int i = 0; i < N && first + i < left; i++, column++) {
            if (column == end) {
                column = end == k ? 0 : column;
                end = column + step < k ? column + step : k;
                scale = absmax[++segment];
            }
            store_float(out, DTYPE, tile + first + i, decode(codes[u], i, scale));
        }
    }
}

bnbq_status bnbq_cuda_dequantize_8bit(bnbq_cuda_call *call, const bnbq_weight8 *w,
                                      const bnbq_tensor *out) {
    device_guard guard(call);
    TRY(guard.status);
    void *data;
    TRY(open_flat(call, out, &data));
    int64_t count = w->n * w->k, step = w->blocksize ? w->blocksize : w->k;
    int log2_step = w->blocksize ? __builtin_ctzll((uint64_t)w->blocksize) : 63;
    int64_t per_unit = 16 / (int64_t)bnbq_dtype_size(out->dtype);
    dim3 grid((unsigned)ceil_div(count, THREADS * UNITS * per_unit));
    bool wide = is_aligned_to(data, 16) && is_aligned_to(w->qweight, (size_t)per_unit);
    TRY(with_dtype(out->dtype, [&](auto dtype) {
        constexpr bnbq_dtype DTYPE = decltype(dtype)::value;
        return launch<dequantize8_kernel<DTYPE>>(call, grid, THREADS, 0, w->qweight, w->absmax,
                                                 count, w->k, step, log2_step, wide,
                                                 (element_of<DTYPE> *)data);
    }));
    return close_flat(call, data, out);
}

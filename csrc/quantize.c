/* quantize.c - op fronts: quantise and dequantise weights, and scales a second time.
 *
 * Work goes over the flattened weight in chunks of whole blocks, one task each. The 4-bit kernels
 * read and write any float dtype; what is strided, and int8, goes through f32 in pieces that stay
 * in the first-level cache. NaN and Inf are looked for in the scales that come out.
 */
#include "fronts.h"
#include "kernels.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#ifdef __AVX2__
#error "quantize.c is baseline code: compile it without -mavx2 or -march"
#endif

enum {
    PIECE = 4096,         /* elements, 16 KB of f32; a multiple of every 4-bit block size */
    CHUNK = 65536,        /* elements per task, or this many whole rows of a transposed weight */
    TRANSPOSED_ROWS = 32, /* one or two cache lines of a column */
};

/* Index of the first NaN or Inf, or -1. Two loops: the first one is vector code. */
static int64_t first_not_finite(const float *w, int64_t count) {
    int found = 0;
    for (int64_t i = 0; i < count; i++)
        found |= !(fabsf(w[i]) < INFINITY);
    for (int64_t i = 0; found && i < count; i++)
        if (!(fabsf(w[i]) < INFINITY))
            return i;
    return -1;
}

static bool is_contiguous(const bnbq_view *view) {
    return view->rows == 1 && view->col_stride == 1;
}

/* *bad = the lesser of *bad and index, and the same with -1 for none. */
static void lower(_Atomic int64_t *bad, int64_t index) {
    int64_t known = atomic_load(bad);
    while ((known < 0 || index < known) && !atomic_compare_exchange_weak(bad, &known, index))
        ;
}

static bnbq_status finish(bool done, int64_t bad_index, int64_t *bad) {
    if (!done)
        return BNBQ_NO_MEMORY;
    if (bad_index < 0)
        return BNBQ_OK;
    *bad = bad_index;
    return BNBQ_NOT_FINITE;
}

/* ---------------------------------------------------------------- 4 bit */

typedef struct quantize4 {
    bnbq_view w;
    int64_t count, blocksize;
    int64_t chunk, piece; /* elements per task, and at a time */
    const bnbq_format *format;
    uint8_t *qweight;
    float *absmax;
    _Atomic int64_t bad;
} quantize4;

static bool quantize4_task(void *context, int64_t task) {
    quantize4 *op = context;
    float *scratch = bnbq_scratch(BNBQ_SCRATCH_ROW, (size_t)op->piece * sizeof(float));
    if (!scratch)
        return false;
    int64_t end = bnbq_min(op->count, (task + 1) * op->chunk);
    for (int64_t start = task * op->chunk; start < end; start += op->piece) {
        int64_t count = bnbq_min(op->piece, end - start), block = start / op->blocksize;
        bool direct = is_contiguous(&op->w);
        bnbq_dtype dtype = direct ? op->w.dtype : BNBQ_F32;
        const void *w = direct ? op->w.data + start * (int64_t)bnbq_dtype_size(dtype)
                               : (const char *)bnbq_load_flat(&op->w, start, count, scratch);
        bnbq_q4()->quantize(w, dtype, count, op->format, op->blocksize, op->qweight + start / 2,
                            op->absmax + block);
        int64_t bad = first_not_finite(op->absmax + block, bnbq_ceil_div(count, op->blocksize));
        if (bad >= 0) {
            start += bad * op->blocksize;
            count = bnbq_min(op->blocksize, end - start);
            const float *values = bnbq_load_flat(&op->w, start, count, scratch);
            lower(&op->bad, start + first_not_finite(values, count));
            break;
        }
    }
    return true;
}

bnbq_status bnbq_quantize_4bit(const bnbq_tensor *w, const struct bnbq_format *format,
                               int64_t blocksize, uint8_t *qweight, float *absmax, int64_t *bad) {
    quantize4 op = {.w = bnbq_view_flat(w),
                    .format = format,
                    .blocksize = blocksize,
                    .qweight = qweight,
                    .absmax = absmax,
                    .chunk = CHUNK,
                    .piece = PIECE,
                    .bad = -1};
    op.count = op.w.rows * op.w.cols;
    if (is_contiguous(&op.w))
        op.piece = CHUNK;
    else if (bnbq_is_transposed(&op.w))
        op.chunk = op.piece = bnbq_ceil_div(op.w.cols * TRANSPOSED_ROWS, PIECE) * PIECE;
    bool done = bnbq_parallel_for(quantize4_task, &op, bnbq_ceil_div(op.count, op.chunk));
    return finish(done, op.bad, bad);
}

typedef struct dequantize4 {
    const bnbq_weight4 *w;
    bnbq_view out;
    int64_t count;
} dequantize4;

static bool dequantize4_task(void *context, int64_t task) {
    const dequantize4 *op = context;
    const bnbq_weight4 *w = op->w;
    float *scratch = bnbq_scratch(BNBQ_SCRATCH_ROW, PIECE * sizeof(float));
    if (!scratch)
        return false;
    int64_t end = bnbq_min(op->count, (task + 1) * CHUNK);
    for (int64_t start = task * CHUNK; start < end; start += PIECE) {
        int64_t count = bnbq_min(PIECE, end - start), block = start / w->blocksize;
        float decoded[PIECE / 32];
        const float *absmax = decoded;
        if (w->absmax.absmax)
            absmax = w->absmax.absmax + block;
        else
            bnbq_load_absmax(&w->absmax, block, bnbq_ceil_div(count, w->blocksize), decoded);
        bool direct = is_contiguous(&op->out);
        bnbq_dtype dtype = direct ? op->out.dtype : BNBQ_F32;
        void *out =
            direct ? op->out.data + start * (int64_t)bnbq_dtype_size(dtype) : (void *)scratch;
        bnbq_q4()->dequantize(w->qweight + start / 2, absmax, w->format->codebook, count,
                              w->blocksize, dtype, out);
        if (!direct)
            bnbq_store_flat(&op->out, start, count, scratch);
    }
    return true;
}

bnbq_status bnbq_dequantize_4bit(const bnbq_weight4 *w, const bnbq_tensor *out) {
    dequantize4 op = {.w = w, .out = bnbq_view_flat(out), .count = w->n * w->k};
    bool done = bnbq_parallel_for(dequantize4_task, &op, bnbq_ceil_div(op.count, CHUNK));
    return done ? BNBQ_OK : BNBQ_NO_MEMORY;
}

/* ---------------------------------------------------------------- scales */

typedef struct quantize_scales {
    const float *absmax;
    int64_t count;
    uint8_t *codes;
    float *absmax2, *offset;
    double *sums; /* of blocks */
} quantize_scales;

static int64_t block_end(int64_t block, int64_t count) {
    return bnbq_min((block + 1) * BNBQ_ABSMAX_BLOCK, count);
}

static bool sum_task(void *context, int64_t block) {
    const quantize_scales *op = context;
    double sum = 0.0;
    for (int64_t i = block * BNBQ_ABSMAX_BLOCK; i < block_end(block, op->count); i++)
        sum += op->absmax[i];
    op->sums[block] = sum;
    return true;
}

/* The sums of blocks become one, in place, and *offset their mean. An order of its own, so that it
 * does not depend on threads or vector width: reference.sum_in_order. */
static bool mean_task(void *context, int64_t task) {
    (void)task;
    const quantize_scales *op = context;
    for (int64_t count = bnbq_ceil_div(op->count, BNBQ_ABSMAX_BLOCK), blocks; count > 1;
         count = blocks) {
        blocks = bnbq_ceil_div(count, BNBQ_ABSMAX_BLOCK);
        for (int64_t block = 0; block < blocks; block++) {
            double sum = 0.0;
            for (int64_t i = block * BNBQ_ABSMAX_BLOCK; i < block_end(block, count); i++)
                sum += op->sums[i];
            op->sums[block] = sum;
        }
    }
    *op->offset = op->count ? (float)(op->sums[0] / (double)op->count) : 0.0f;
    return true;
}

/* Indices of the nearest values of the dynamic map: how many of its 255 midpoints are below each x.
 * Eight searches side by side, without branches: 6 ns a scale where one after the other took 12,
 * and with branches 20. */
static void nearest8(const float *x, const float *midpoints, uint8_t *codes) {
    int below[8] = {0};
    for (int step = 128; step > 0; step /= 2)
        for (int i = 0; i < 8; i++)
            below[i] += (midpoints[below[i] + step - 1] < x[i]) * step;
    for (int i = 0; i < 8; i++)
        codes[i] = (uint8_t)below[i];
}

static bool quantize_scales_task(void *context, int64_t block) {
    const quantize_scales *op = context;
    int64_t start = block * BNBQ_ABSMAX_BLOCK, count = block_end(block, op->count) - start;
    const float *absmax = op->absmax + start;
    float offset = *op->offset, greatest = 0.0f;
    for (int64_t i = 0; i < count; i++)
        if (fabsf(absmax[i] - offset) > greatest)
            greatest = fabsf(absmax[i] - offset);
    float inverse = 1.0f / (greatest > 1e-38f ? greatest : 1e-38f);
    float midpoints[255], scaled[BNBQ_ABSMAX_BLOCK] = {0};
    for (int i = 0; i < 255; i++)
        midpoints[i] = (bnbq_dynamic_map[i] + bnbq_dynamic_map[i + 1]) / 2;
    for (int64_t i = 0; i < count; i++) /* not above 1 but by an ulp, which changes nothing */
        scaled[i] = (absmax[i] - offset) * inverse;
    uint8_t codes[BNBQ_ABSMAX_BLOCK];
    for (int64_t i = 0; i < count; i += 8)
        nearest8(scaled + i, midpoints, codes + i);
    memcpy(op->codes + start, codes, (size_t)count);
    op->absmax2[block] = greatest;
    return true;
}

bnbq_status bnbq_quantize_absmax(const float *absmax, int64_t count, uint8_t *codes, float *absmax2,
                                 float *offset) {
    int64_t blocks = bnbq_ceil_div(count, BNBQ_ABSMAX_BLOCK);
    double *sums = bnbq_scratch(BNBQ_SCRATCH_EXTRA, (size_t)blocks * sizeof *sums);
    if (!sums)
        return BNBQ_NO_MEMORY;
    quantize_scales op = {absmax, count, codes, absmax2, offset, sums};
    bnbq_run_tasks(sum_task, &op, blocks, count);
    bnbq_serial_for(mean_task, &op, 1);
    if (!isfinite(*offset)) /* the sum cannot overflow here: a scale is NaN or Inf */
        return BNBQ_NOT_FINITE;
    bnbq_run_tasks(quantize_scales_task, &op, blocks, count * 16); /* a search per element */
    return BNBQ_OK;
}

/* Eight at a time from one 64-bit load: half the time of the plain loop, which matters because a
 * product with one row of x waits for this. Permutes of the map in 16 registers of AVX-512 took a
 * third of that in L1 and made the product no faster: the codes' way from memory is what counts. */
static void decode8(const uint8_t *codes, float scale, float offset, float *out) {
    uint64_t eight = 0;
    float values[8];
    for (int i = 0; i < 8; i++)
        eight |= (uint64_t)codes[i] << 8 * i; /* compiles to a load */
    for (int i = 0; i < 8; i++)
        values[i] = bnbq_dynamic_map[eight >> 8 * i & 255];
    for (int i = 0; i < 8; i++)
        out[i] = values[i] * scale + offset;
}

void bnbq_load_absmax(const bnbq_absmax *absmax, int64_t start, int64_t count, float *out) {
    if (absmax->absmax) {
        memcpy(out, absmax->absmax + start, (size_t)count * sizeof *out);
        return;
    }
    const uint8_t *codes = absmax->codes + start;
    float offset = *absmax->offset;
    for (int64_t i = 0; i < count;) {
        int64_t block = (start + i) / BNBQ_ABSMAX_BLOCK;
        int64_t end = bnbq_min(count, (block + 1) * BNBQ_ABSMAX_BLOCK - start);
        float scale = absmax->absmax2[block];
        for (; i + 8 <= end; i += 8)
            decode8(codes + i, scale, offset, out + i);
        for (; i < end; i++)
            out[i] = bnbq_dynamic_map[codes[i]] * scale + offset;
    }
}

/* ---------------------------------------------------------------- 8 bit */

typedef struct quantize8 {
    bnbq_view w;
    int64_t blocksize, blocks, task_rows;
    int8_t *qweight;
    float *absmax;
    _Atomic int64_t bad;
} quantize8;

static bool quantize8_task(void *context, int64_t task) {
    quantize8 *op = context;
    int64_t k = op->w.cols, end = bnbq_min(op->w.rows, (task + 1) * op->task_rows);
    int64_t begin = task * op->task_rows, together = bnbq_is_transposed(&op->w) ? end - begin : 1;
    float *scratch = bnbq_scratch(BNBQ_SCRATCH_ROW, (size_t)(together * k) * sizeof(float));
    if (!scratch)
        return false;
    if (together > 1)
        bnbq_load_flat(&op->w, begin * k, together * k, scratch);
    for (int64_t row = begin; row < end; row++) {
        const float *w = scratch + (row - begin) * k;
        if (together == 1)
            w = bnbq_load(&op->w, row, 0, k, scratch);
        int64_t outliers = 0; /* NaN and Inf */
        for (int64_t b = 0; b < op->blocks; b++) {
            int64_t start = b * op->blocksize, count = bnbq_min(op->blocksize, k - start);
            outliers +=
                bnbq_s8()->quantize(w + start, count, INFINITY, op->qweight + row * k + start,
                                    &op->absmax[row * op->blocks + b]);
        }
        if (outliers > 0) {
            lower(&op->bad, row * k + first_not_finite(w, k));
            break;
        }
    }
    return true;
}

bnbq_status bnbq_quantize_8bit(const bnbq_tensor *w, int64_t blocksize, int8_t *qweight,
                               float *absmax, int64_t *bad) {
    quantize8 op = {.w = bnbq_view_rows(w), .qweight = qweight, .absmax = absmax, .bad = -1};
    int64_t k = op.w.cols;
    op.blocksize = blocksize ? blocksize : bnbq_max(k, 1);
    op.blocks = blocksize ? bnbq_ceil_div(k, blocksize) : 1;
    op.task_rows = bnbq_max(1, CHUNK / bnbq_max(k, 1));
    if (bnbq_is_transposed(&op.w))
        op.task_rows = bnbq_max(TRANSPOSED_ROWS, op.task_rows);
    bool done = bnbq_parallel_for(quantize8_task, &op, bnbq_ceil_div(op.w.rows, op.task_rows));
    return finish(done, op.bad, bad);
}

typedef struct dequantize8 {
    const bnbq_weight8 *w;
    bnbq_view out;
    int64_t task_rows;
} dequantize8;

static bool dequantize8_task(void *context, int64_t task) {
    const dequantize8 *op = context;
    const bnbq_weight8 *w = op->w;
    int64_t block = w->blocksize ? w->blocksize : w->k, blocks = bnbq_ceil_div(w->k, block);
    int64_t end = bnbq_min(w->n, (task + 1) * op->task_rows);
    float *scratch = bnbq_scratch(BNBQ_SCRATCH_ROW, PIECE * sizeof(float));
    if (!scratch)
        return false;
    for (int64_t row = task * op->task_rows; row < end; row++) {
        for (int64_t start = 0; start < w->k; start += PIECE) {
            int64_t count = bnbq_min(PIECE, w->k - start);
            for (int64_t i = 0; i < count;) {
                int64_t b = (start + i) / block,
                        part = bnbq_min((b + 1) * block - start, count) - i;
                bnbq_s8()->dequantize(w->qweight + row * w->k + start + i, part,
                                      w->absmax[row * blocks + b], scratch + i);
                i += part;
            }
            bnbq_store_flat(&op->out, row * w->k + start, count, scratch);
        }
    }
    return true;
}

bnbq_status bnbq_dequantize_8bit(const bnbq_weight8 *w, const bnbq_tensor *out) {
    dequantize8 op = {.w = w, .out = bnbq_view_flat(out)};
    if (w->n * w->k == 0)
        return BNBQ_OK;
    op.task_rows = bnbq_max(1, CHUNK / w->k);
    bool done = bnbq_parallel_for(dequantize8_task, &op, bnbq_ceil_div(w->n, op.task_rows));
    return done ? BNBQ_OK : BNBQ_NO_MEMORY;
}

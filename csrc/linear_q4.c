/* linear_q4.c - op front: y = x . W^T + bias and gx = gy . W for a packed 4-bit weight.
 *
 * Forward, for each pass over the rows of x (bnbq_cut in fronts.h):
 *   pack   every row of x, rounded to the compute dtype, goes to the kernel's packed form, once
 *   tile   a task multiplies one part of the rows with one tile of W into an f32 tile of y,
 *          adds the bias and narrows the sum into y
 * When blocks cross rows (k % blocksize != 0) kernels cannot take the rows of W as they lie: the
 * flat path decodes a few rows to f32 and takes dot products, correct for every shape and not fast.
 */
#include "fronts.h"
#include "kernels.h"

#include <string.h>

#ifdef __AVX2__
#error "linear_q4.c is baseline code: compile it without -mavx2 or -march"
#endif

enum {
    PACK_ROWS = 8, /* rows of activations per packing task */
    FLAT_ROWS = 8, /* rows of W that the flat path decodes at a time, per pass over x */
    MIN_TILE_N = 16,
    MIN_TILE_K = 256, /* narrower strips of W would visit more pages for the same bytes */
};

static bool rows_hold_whole_blocks(const bnbq_weight4 *w) {
    return w->k % w->blocksize == 0;
}

/* Elements [start, start + count) of the flattened weight: start may be odd, blocks may end
 * anywhere. */
static void decode_span(const bnbq_weight4 *w, int64_t start, int64_t count, float *out) {
    const bnbq_q4_kernels *kernels = bnbq_q4();
    for (int64_t i = 0; i < count;) {
        int64_t at = start + i, block = at / w->blocksize;
        int64_t part = bnbq_min((block + 1) * w->blocksize - at, count - i);
        float absmax;
        bnbq_load_absmax(&w->absmax, block, 1, &absmax);
        if (at % 2) { /* one element, so that the rest starts on a byte */
            out[i] = w->format->codebook[w->qweight[at / 2] & 15] * absmax;
            part = 1;
        } else {
            kernels->dequantize(w->qweight + at / 2, &absmax, w->format->codebook, part,
                                w->blocksize, BNBQ_F32, out + i);
        }
        i += part;
    }
}

/* ---------------------------------------------------------------- forward */

typedef struct forward {
    bnbq_view x, y;
    const bnbq_view *bias; /* NULL: none */
    const bnbq_weight4 *w;
    bnbq_dtype compute_dtype;
    const bnbq_q4_linear *linear; /* NULL: the flat path */
    int64_t m0;                   /* the first row of this pass */
    bnbq_cut cut;
    char *packed; /* one packed form per part */
    size_t part_bytes;
} forward;

static bool pack_task(void *context, int64_t task) {
    const forward *op = context;
    int64_t k = op->w->k, end = bnbq_min(op->cut.m, (task + 1) * PACK_ROWS);
    float *scratch = bnbq_scratch(BNBQ_SCRATCH_ROW, (size_t)k * sizeof(float));
    if (!scratch)
        return false;
    for (int64_t i = task * PACK_ROWS; i < end; i++) {
        const float *x = bnbq_load_rounded(&op->x, op->m0 + i, op->compute_dtype, scratch);
        int64_t part = i / op->cut.part_rows, row = i % op->cut.part_rows;
        char *packed = op->packed + (size_t)part * op->part_bytes;
        if (op->linear)
            op->linear->pack(x, row, bnbq_part_size(&op->cut, part), k, packed);
        else
            bnbq_copy_row((float *)packed + row * k, x, k);
    }
    return true;
}

static bool tile_task(void *context, int64_t task) {
    const forward *op = context;
    const bnbq_weight4 *w = op->w;
    /* The parts of one tile follow each other: they share its rows of W. */
    int64_t part = task % op->cut.parts, n0 = task / op->cut.parts * op->cut.tile_cols;
    int64_t m = bnbq_part_size(&op->cut, part), rows = bnbq_min(op->cut.tile_cols, w->n - n0);
    int64_t blocks = w->k / w->blocksize;
    float *tile = bnbq_scratch(BNBQ_SCRATCH_TILE, (size_t)(m * BNBQ_TILE_N) * sizeof(float));
    void *scratch = bnbq_scratch(BNBQ_SCRATCH_KERNEL, op->linear->scratch_bytes(m, w->k));
    const float *absmax = w->absmax.absmax ? w->absmax.absmax + n0 * blocks : NULL;
    if (!tile || !scratch)
        return false;
    if (!absmax) {
        float *decoded = bnbq_scratch(BNBQ_SCRATCH_ABSMAX, (size_t)(rows * blocks) * sizeof(float));
        if (!decoded)
            return false;
        bnbq_load_absmax(&w->absmax, n0 * blocks, rows * blocks, decoded);
        absmax = decoded;
    }
    bnbq_q4_rows tile_of_w = {w->qweight + n0 * (w->k / 2), absmax, w->format->codebook, w->k,
                              w->blocksize};
    op->linear->run(op->packed + (size_t)part * op->part_bytes, m, &tile_of_w, rows, tile,
                    BNBQ_TILE_N, scratch);
    bnbq_store_tile(&op->y, op->bias, op->m0 + part * op->cut.part_rows, m, n0, rows, tile);
    return true;
}

/* A fixed order of additions, sixteen partial sums. */
static float dot(const float *x, const float *w, int64_t k) {
    float sums[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= k; i += 16)
        for (int j = 0; j < 16; j++)
            sums[j] += x[i + j] * w[i + j];
    for (int j = 0; i + j < k; j++)
        sums[j] += x[i + j] * w[i + j];
    for (int width = 8; width > 0; width /= 2)
        for (int j = 0; j < width; j++)
            sums[j] += sums[j + width];
    return sums[0];
}

static bool flat_tile_task(void *context, int64_t task) {
    const forward *op = context;
    int64_t part = task % op->cut.parts, n0 = task / op->cut.parts * op->cut.tile_cols;
    int64_t m = bnbq_part_size(&op->cut, part), rows = bnbq_min(op->cut.tile_cols, op->w->n - n0);
    int64_t k = op->w->k;
    float *tile = bnbq_scratch(BNBQ_SCRATCH_TILE, (size_t)(m * BNBQ_TILE_N) * sizeof(float));
    float *w = bnbq_scratch(BNBQ_SCRATCH_KERNEL, (size_t)(rows * k) * sizeof(float));
    if (!tile || !w)
        return false;
    decode_span(op->w, n0 * k, rows * k, w);
    const float *x = (const float *)(op->packed + (size_t)part * op->part_bytes);
    for (int64_t i = 0; i < m; i++)
        for (int64_t n = 0; n < rows; n++)
            tile[i * BNBQ_TILE_N + n] = dot(x + i * k, w + n * k, k);
    bnbq_store_tile(&op->y, op->bias, op->m0 + part * op->cut.part_rows, m, n0, rows, tile);
    return true;
}

static bool run_pass(forward *op, int64_t m) {
    int64_t k = op->w->k, n = op->w->n;
    op->cut = op->linear ? bnbq_cut_pass(m, n, BNBQ_TILE_N, MIN_TILE_N)
                         : bnbq_cut_pass(m, n, FLAT_ROWS, FLAT_ROWS);
    size_t bytes = op->linear ? op->linear->packed_bytes(op->cut.part_rows, k)
                              : (size_t)(op->cut.part_rows * k) * sizeof(float);
    op->part_bytes = (bytes + 63) / 64 * 64;
    op->packed = bnbq_scratch(BNBQ_SCRATCH_X, (size_t)op->cut.parts * op->part_bytes);
    return op->packed && bnbq_run_tasks(pack_task, op, bnbq_ceil_div(m, PACK_ROWS), m * k) &&
           bnbq_run_tasks(op->linear ? tile_task : flat_tile_task, op,
                          op->cut.tiles * op->cut.parts, m * n * k);
}

bnbq_status bnbq_linear_4bit(const bnbq_tensor *x, const bnbq_weight4 *w, const bnbq_tensor *bias,
                             bnbq_dtype compute_dtype, bool int8_activations,
                             const bnbq_tensor *y) {
    forward op = {
        .x = bnbq_view_rows(x), .y = bnbq_view_rows(y), .w = w, .compute_dtype = compute_dtype};
    bnbq_view bias_row;
    int64_t m = op.x.rows;
    if (m == 0 || w->n == 0)
        return BNBQ_OK;
    if (bias) {
        bias_row = bnbq_view_rows(bias);
        op.bias = &bias_row;
    }
    if (rows_hold_whole_blocks(w) && w->k > 0 && int8_activations) {
        const bnbq_w4a8_kernels *kernels = bnbq_w4a8();
        op.linear = w->blocksize < 64 ? &kernels->blocks32 : &kernels->blocks64;
    } else if (rows_hold_whole_blocks(w) && w->k > 0) {
        const bnbq_q4_kernels *kernels = bnbq_q4();
        op.linear = &kernels->linear;
        for (int i = 0; compute_dtype == BNBQ_BF16 && i < BNBQ_BF16_FORMS; i++)
            if (kernels->bf16[i].min_m > 0 && kernels->bf16[i].min_m <= m &&
                !bnbq_batch_invariant())
                op.linear = &kernels->bf16[i].linear;
    }
    int64_t step = bnbq_pass_rows(m, w->k, BNBQ_PASS_ELEMENTS);
    for (op.m0 = 0; op.m0 < m; op.m0 += step) {
        if (!run_pass(&op, bnbq_min(step, m - op.m0)))
            return BNBQ_NO_MEMORY;
    }
    return BNBQ_OK;
}

/* ---------------------------------------------------------------- backward */

typedef struct backward {
    bnbq_view gy, gx;
    const bnbq_weight4 *w;
    bnbq_dtype compute_dtype;
    const bnbq_q4_kernels *kernels;
    bool bf16;           /* by the kernel that rounds weights to bf16 */
    const float *absmax; /* f32 for all of W; NULL: the flat path */
    int64_t m0;
    bnbq_cut cut;
    float *g; /* f32[m, n]; or in bf16, with row stride ldg: */
    const uint16_t *g_bf16;
    int64_t ldg;
} backward;

static bool load_gradient_task(void *context, int64_t task) {
    const backward *op = context;
    int64_t n = op->w->n, end = bnbq_min(op->cut.m, (task + 1) * PACK_ROWS);
    for (int64_t i = task * PACK_ROWS; i < end; i++) {
        float *row = op->g + i * n;
        const float *g = bnbq_load_rounded(&op->gy, op->m0 + i, op->compute_dtype, row);
        bnbq_copy_row(row, g, n);
    }
    return true;
}

static bool load_gradient(backward *op) {
    if (op->bf16)
        return (op->g_bf16 = bnbq_bf16_rows(&op->gy, op->m0, op->cut.m, &op->ldg)) != NULL;
    op->g = bnbq_scratch(BNBQ_SCRATCH_X, (size_t)(op->cut.m * op->w->n) * sizeof(float));
    return op->g && bnbq_run_tasks(load_gradient_task, op, bnbq_ceil_div(op->cut.m, PACK_ROWS),
                                   op->cut.m * op->w->n);
}

/* gx = g . W[:, k0 .. k0 + cols) with n ascending, as the kernels do it. row: f32[cols]. */
static void flat_backward(const backward *op, const float *g, int64_t m, int64_t k0, int64_t cols,
                          float *gx, float *row) {
    memset(gx, 0, (size_t)(m * BNBQ_TILE_K) * sizeof *gx);
    for (int64_t n = 0; n < op->w->n; n++) {
        decode_span(op->w, n * op->w->k + k0, cols, row);
        for (int64_t i = 0; i < m; i++)
            for (int64_t c = 0; c < cols; c++)
                gx[i * BNBQ_TILE_K + c] += g[i * op->w->n + n] * row[c];
    }
}

static bool backward_task(void *context, int64_t task) {
    const backward *op = context;
    const bnbq_weight4 *w = op->w;
    int64_t part = task % op->cut.parts, k0 = task / op->cut.parts * op->cut.tile_cols;
    int64_t m0 = part * op->cut.part_rows, m = bnbq_part_size(&op->cut, part);
    int64_t cols = bnbq_min(op->cut.tile_cols, w->k - k0);
    float *tile = bnbq_scratch(BNBQ_SCRATCH_TILE, (size_t)(m * BNBQ_TILE_K) * sizeof(float));
    void *scratch = bnbq_scratch(BNBQ_SCRATCH_KERNEL, BNBQ_BACKWARD_SCRATCH);
    if (!tile || !scratch)
        return false;
    bnbq_q4_rows rows = {w->qweight, op->absmax, w->format->codebook, w->k, w->blocksize};
    if (op->bf16)
        op->kernels->backward_bf16(op->g_bf16 + m0 * op->ldg, op->ldg, m, &rows, w->n, k0, cols,
                                   tile, BNBQ_TILE_K, scratch);
    else if (op->absmax)
        op->kernels->backward(op->g + m0 * w->n, w->n, m, &rows, w->n, k0, cols, tile, BNBQ_TILE_K,
                              scratch);
    else
        flat_backward(op, op->g + m0 * w->n, m, k0, cols, tile, scratch);
    bnbq_store_rows(&op->gx, op->m0 + m0, m, k0, cols, tile, BNBQ_TILE_K);
    return true;
}

typedef struct decode_scales {
    const bnbq_absmax *absmax;
    int64_t count;
    float *out;
} decode_scales;

enum { SCALES = 16384 }; /* per task */

static bool decode_scales_task(void *context, int64_t task) {
    const decode_scales *op = context;
    int64_t start = task * SCALES;
    bnbq_load_absmax(op->absmax, start, bnbq_min(SCALES, op->count - start), op->out + start);
    return true;
}

/* Backward kernels take all rows of W, so all scales as f32: an eighth of the packed bytes at a
 * block of 64. */
static const float *all_scales(const bnbq_weight4 *w) {
    if (w->absmax.absmax)
        return w->absmax.absmax;
    decode_scales op = {&w->absmax, w->n * (w->k / w->blocksize), NULL};
    op.out = bnbq_scratch(BNBQ_SCRATCH_EXTRA, (size_t)op.count * sizeof(float));
    if (op.out)
        bnbq_parallel_for(decode_scales_task, &op, bnbq_ceil_div(op.count, SCALES));
    return op.out;
}

bnbq_status bnbq_linear_4bit_backward(const bnbq_tensor *gy, const bnbq_weight4 *w,
                                      bnbq_dtype compute_dtype, const bnbq_tensor *gx) {
    backward op = {.gy = bnbq_view_rows(gy),
                   .gx = bnbq_view_rows(gx),
                   .w = w,
                   .compute_dtype = compute_dtype,
                   .kernels = bnbq_q4()};
    int64_t m = op.gx.rows;
    if (m == 0 || w->k == 0)
        return BNBQ_OK;
    if (rows_hold_whole_blocks(w) && w->n > 0 && !(op.absmax = all_scales(w)))
        return BNBQ_NO_MEMORY;
    op.bf16 = op.absmax && compute_dtype == BNBQ_BF16 && op.kernels->backward_bf16 &&
              !bnbq_batch_invariant();
    int64_t step = bnbq_pass_rows(m, w->n, BNBQ_PASS_ELEMENTS);
    for (op.m0 = 0; op.m0 < m; op.m0 += step) {
        op.cut = bnbq_cut_pass(bnbq_min(step, m - op.m0), w->k, BNBQ_TILE_K, MIN_TILE_K);
        if (!load_gradient(&op) || !bnbq_run_tasks(backward_task, &op, op.cut.tiles * op.cut.parts,
                                                   op.cut.m * w->n * w->k))
            return BNBQ_NO_MEMORY;
    }
    return BNBQ_OK;
}

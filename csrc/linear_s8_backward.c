/* linear_s8_backward.c - op front: gx = gy . W for an int8 weight.
 *
 * gx[m, c] = sum over n of (gy * (absmax / 127)) * q[n, c]: the scale goes to the gradient, once
 * per block of columns. With one scale per row of W that is once per pass, otherwise per tile. The
 * kernel for bf16 takes the gradient as it is and scales W, so that each is rounded no more often
 * than in the float layer.
 */
#include "fronts.h"
#include "kernels.h"

#include <string.h>

#ifdef __AVX2__
#error "linear_s8_backward.c is baseline code: compile it without -mavx2 or -march"
#endif

static const float inv127 = (float)(1.0 / 127);

enum {
    LOAD_ROWS = 8,    /* rows of the gradient per task */
    MIN_TILE_K = 256, /* columns per tile: narrower strips of W visit more pages */
};

typedef struct backward {
    bnbq_view gy, gx;
    const bnbq_weight8 *w;
    const bnbq_s8_kernels *kernels;
    int64_t m0;
    bnbq_cut cut; /* of one block of columns */
    int64_t blocks;
    bool bf16;              /* by the kernel for it */
    float *g;               /* f32[m, n]: gy, scaled already when there is one block; or in bf16, */
    const uint16_t *g_bf16; /* with row stride ldg */
    int64_t ldg;
} backward;

static void scale_gradient(const backward *op, const float *g, int64_t block, float *out) {
    for (int64_t n = 0; n < op->w->n; n++)
        out[n] = g[n] * (op->w->absmax[n * op->blocks + block] * inv127);
}

static bool load_gradient_task(void *context, int64_t task) {
    const backward *op = context;
    int64_t n = op->w->n, end = bnbq_min(op->cut.m, (task + 1) * LOAD_ROWS);
    for (int64_t i = task * LOAD_ROWS; i < end; i++) {
        float *row = op->g + i * n;
        const float *g = bnbq_load(&op->gy, op->m0 + i, 0, n, row);
        if (op->blocks == 1)
            scale_gradient(op, g, 0, row);
        else
            bnbq_copy_row(row, g, n);
    }
    return true;
}

static bool load_gradient(backward *op) {
    if (op->bf16)
        return (op->g_bf16 = bnbq_bf16_rows(&op->gy, op->m0, op->cut.m, &op->ldg)) != NULL;
    op->g = bnbq_scratch(BNBQ_SCRATCH_X, (size_t)(op->cut.m * op->w->n) * sizeof(float));
    return op->g && bnbq_run_tasks(load_gradient_task, op, bnbq_ceil_div(op->cut.m, LOAD_ROWS),
                                   op->cut.m * op->w->n);
}

/* gx[m, cols], row stride BNBQ_TILE_K, from row m0 of the pass and column k0 of `block`. */
static bool multiply_f32(const backward *op, int64_t m0, int64_t m, int64_t block, int64_t k0,
                         int64_t cols, float *gx, void *scratch) {
    const bnbq_weight8 *w = op->w;
    const float *g = op->g + m0 * w->n;
    if (op->blocks > 1) {
        float *scaled = bnbq_scratch(BNBQ_SCRATCH_ROW, (size_t)(m * w->n) * sizeof(float));
        if (!scaled)
            return false;
        for (int64_t i = 0; i < m; i++)
            scale_gradient(op, g + i * w->n, block, scaled + i * w->n);
        g = scaled;
    }
    op->kernels->backward(g, w->n, m, w->qweight + k0, w->k, w->n, cols, gx, BNBQ_TILE_K, scratch);
    return true;
}

static bool backward_task(void *context, int64_t task) {
    const backward *op = context;
    const bnbq_weight8 *w = op->w;
    int64_t part = task % op->cut.parts, tile = task / op->cut.parts;
    int64_t block = tile / op->cut.tiles, start = tile % op->cut.tiles * op->cut.tile_cols;
    int64_t k0 = block * bnbq_block_of(w) + start;
    int64_t cols = bnbq_min(bnbq_min(op->cut.tile_cols, bnbq_block_of(w) - start), w->k - k0);
    int64_t m0 = part * op->cut.part_rows, m = bnbq_part_size(&op->cut, part);
    if (cols <= 0)
        return true; /* the last block of a row may be short */
    float *gx = bnbq_scratch(BNBQ_SCRATCH_TILE, (size_t)(m * BNBQ_TILE_K) * sizeof(float));
    void *scratch = bnbq_scratch(BNBQ_SCRATCH_KERNEL, BNBQ_BACKWARD_SCRATCH);
    if (!gx || !scratch)
        return false;
    if (w->n == 0)
        memset(gx, 0, (size_t)(m * BNBQ_TILE_K) * sizeof *gx);
    else if (op->bf16)
        op->kernels->backward_bf16(op->g_bf16 + m0 * op->ldg, op->ldg, m, w->qweight + k0, w->k,
                                   w->absmax + block, op->blocks, w->n, cols, gx, BNBQ_TILE_K,
                                   scratch);
    else if (!multiply_f32(op, m0, m, block, k0, cols, gx, scratch))
        return false;
    bnbq_store_rows(&op->gx, op->m0 + m0, m, k0, cols, gx, BNBQ_TILE_K);
    return true;
}

bnbq_status bnbq_linear_8bit_backward(const bnbq_tensor *gy, const bnbq_weight8 *w,
                                      const bnbq_tensor *gx) {
    backward op = {.gy = bnbq_view_rows(gy),
                   .gx = bnbq_view_rows(gx),
                   .w = w,
                   .kernels = bnbq_s8(),
                   .blocks = bnbq_ceil_div(w->k, bnbq_block_of(w))};
    int64_t m = op.gx.rows;
    if (m == 0 || w->k == 0)
        return BNBQ_OK;
    op.bf16 = w->n > 0 && op.gy.dtype == BNBQ_BF16 && op.kernels->backward_bf16 &&
              !bnbq_batch_invariant();
    /* Every worker holds a scaled copy of its part when there are blocks: keep it at 1 MB. */
    int64_t most = op.blocks > 1 && !op.bf16 ? 1 << 18 : BNBQ_PASS_ELEMENTS;
    int64_t step = bnbq_pass_rows(m, w->n, most);
    for (op.m0 = 0; op.m0 < m; op.m0 += step) {
        op.cut = bnbq_cut_pass(bnbq_min(step, m - op.m0), bnbq_min(bnbq_block_of(w), w->k),
                               BNBQ_TILE_K, MIN_TILE_K);
        if (!load_gradient(&op) ||
            !bnbq_run_tasks(backward_task, &op, op.blocks * op.cut.tiles * op.cut.parts,
                            op.cut.m * w->n * w->k))
            return BNBQ_NO_MEMORY;
    }
    return BNBQ_OK;
}

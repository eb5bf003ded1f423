/* fronts.h - what the op fronts (quantize.c, linear_*.c) share: strided tensors read
 * and written through the edge kernels, and how work is cut into tasks. Kernels do not see it.
 */
#ifndef BNBQ_FRONTS_H
#define BNBQ_FRONTS_H

#include "bnbq.h"
#include "threads.h"

#include <string.h>

/* A tensor as rows x cols, with the leading dimensions that lie regularly in memory merged. */
typedef struct bnbq_view {
    char *data;
    bnbq_dtype dtype;
    int outer; /* dimensions that remain before the columns */
    int64_t shape[BNBQ_MAX_DIMS], strides[BNBQ_MAX_DIMS]; /* of those, in elements */
    int64_t rows, cols, col_stride;
} bnbq_view;

/* The last dimension stays the columns: for activations. */
bnbq_view bnbq_view_rows(const bnbq_tensor *tensor);
/* Everything that can be merged is: for weights, taken in row-major order. A contiguous tensor is
 * one row. Element i of the tensor is (i / cols, i % cols). */
bnbq_view bnbq_view_flat(const bnbq_tensor *tensor);

/* Columns [col, col + count) of a row as f32: a pointer into the tensor when it holds just that,
 * otherwise `scratch`, f32[count], filled. */
const float *bnbq_load(const bnbq_view *view, int64_t row, int64_t col, int64_t count,
                       float *scratch);
/* Into those columns of rows [row, row + rows), from src with row stride lds. */
void bnbq_store_rows(const bnbq_view *view, int64_t row, int64_t rows, int64_t col, int64_t count,
                     const float *src, int64_t lds);
/* Elements [start, start + count) in row-major order. */
const float *bnbq_load_flat(const bnbq_view *view, int64_t start, int64_t count, float *scratch);
void bnbq_store_flat(const bnbq_view *view, int64_t start, int64_t count, const float *src);
/* Rows lie side by side: many of them are best loaded in one go. */
bool bnbq_is_transposed(const bnbq_view *view);
/* Row of an activation, rounded to `dtype` on the way to f32. */
const float *bnbq_load_rounded(const bnbq_view *view, int64_t row, bnbq_dtype dtype,
                               float *scratch);

/* Rows [row, row + rows) in bf16, row i at i * *ld: where they lie, or rounded to
 * BNBQ_SCRATCH_X if they are no bf16, no rows of neighbours, or odd in length, and then with a zero
 * behind each. NULL: no memory. */
const uint16_t *bnbq_bf16_rows(const bnbq_view *view, int64_t row, int64_t rows, int64_t *ld);

/* A matrix product goes over the activations in passes of at most BNBQ_TILE_M rows that are packed
 * once; a pass is cut into parts (rows) and tiles (columns of the result), and a task is one part
 * times one tile. The cut is a function of the shape alone: the thread count never shows. */
typedef struct bnbq_cut {
    int64_t m; /* rows of the pass */
    int64_t part_rows, parts;
    int64_t tile_cols, tiles;
} bnbq_cut;

/* Rows per pass over x[m, width]: passes of equal size, none with more than `most` elements unless
 * it is small. */
int64_t bnbq_pass_rows(int64_t m, int64_t width, int64_t most);
/* Tiles have max_tile columns, or down to min_tile where that feeds more threads. */
bnbq_cut bnbq_cut_pass(int64_t m, int64_t cols, int64_t max_tile, int64_t min_tile);

/* Elements of a pass by default: 32 MB of f32. */
enum { BNBQ_PASS_ELEMENTS = 1 << 23 };

/* bnbq_parallel_for if `work` (multiplications, or elements moved) is worth waking threads. */
bool bnbq_run_tasks(bnbq_task *run, void *context, int64_t tasks, int64_t work);

/* The tile, f32[rows, count] with row stride BNBQ_TILE_N, gets its bias (NULL: none) and goes to
 * those rows and columns of y. */
void bnbq_store_tile(const bnbq_view *y, const bnbq_view *bias, int64_t row, int64_t rows,
                     int64_t col, int64_t count, float *tile);

/* A row to where it is wanted, unless it was loaded there already. An empty tensor may be NULL,
 * which memcpy does not take even for no bytes. */
static inline void bnbq_copy_row(float *dst, const float *src, int64_t count) {
    if (dst != src && count > 0)
        memcpy(dst, src, (size_t)count * sizeof *src);
}

static inline int64_t bnbq_min(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static inline int64_t bnbq_max(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static inline int64_t bnbq_ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

/* Rows of a part: the last one may have fewer. */
static inline int64_t bnbq_part_size(const bnbq_cut *cut, int64_t part) {
    return bnbq_min(cut->part_rows, cut->m - part * cut->part_rows);
}

/* Columns of an int8 weight that share a scale. */
static inline int64_t bnbq_block_of(const bnbq_weight8 *w) {
    return w->blocksize ? w->blocksize : bnbq_max(w->k, 1);
}

#endif

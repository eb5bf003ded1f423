/* fronts.c - strided tensors as rows of f32, and how work is cut into tasks. */
#include "fronts.h"

#include "kernels.h"

#include <string.h>

#ifdef __AVX2__
#error "fronts.c is baseline code: compile it without -mavx2 or -march"
#endif

/* Elements that are gathered or rounded at a time, on the stack. */
enum { PIECE = 512 };

/* ---------------------------------------------------------------- views */

static void add_dimension(bnbq_view *view, int64_t shape, int64_t stride) {
    if (shape == 1)
        return;
    int last = view->outer - 1;
    if (last >= 0 && view->strides[last] == shape * stride) {
        view->shape[last] *= shape;
        view->strides[last] = stride;
        return;
    }
    view->shape[view->outer] = shape;
    view->strides[view->outer] = stride;
    view->outer++;
}

static bnbq_view view_leading(const bnbq_tensor *tensor, int dimensions) {
    bnbq_view view = {.data = tensor->data, .dtype = tensor->dtype, .rows = 1};
    for (int d = 0; d < dimensions; d++)
        add_dimension(&view, tensor->shape[d], tensor->strides[d]);
    return view;
}

static void count_rows(bnbq_view *view) {
    view->rows = 1;
    for (int d = 0; d < view->outer; d++)
        view->rows *= view->shape[d];
}

bnbq_view bnbq_view_rows(const bnbq_tensor *tensor) {
    bnbq_view view = view_leading(tensor, tensor->ndim - 1);
    view.cols = tensor->shape[tensor->ndim - 1];
    view.col_stride = view.cols == 1 ? 1 : tensor->strides[tensor->ndim - 1];
    count_rows(&view);
    return view;
}

bnbq_view bnbq_view_flat(const bnbq_tensor *tensor) {
    bnbq_view view = view_leading(tensor, tensor->ndim);
    view.cols = view.col_stride = 1;
    if (view.outer > 0) {
        view.outer--;
        view.cols = view.shape[view.outer];
        view.col_stride = view.strides[view.outer];
    }
    count_rows(&view);
    return view;
}

static char *element(const bnbq_view *view, int64_t row, int64_t col) {
    int64_t offset = col * view->col_stride;
    for (int d = view->outer - 1; d > 0; d--) {
        offset += row % view->shape[d] * view->strides[d];
        row /= view->shape[d];
    }
    if (view->outer > 0)
        offset += row * view->strides[0];
    return view->data + offset * (int64_t)bnbq_dtype_size(view->dtype);
}

/* ---------------------------------------------------------------- reading and writing */

static void gather(const char *src, int64_t stride, int64_t count, size_t size, void *dst) {
    if (size == 4)
        for (int64_t i = 0; i < count; i++)
            ((uint32_t *)dst)[i] = ((const uint32_t *)src)[i * stride];
    else
        for (int64_t i = 0; i < count; i++)
            ((uint16_t *)dst)[i] = ((const uint16_t *)src)[i * stride];
}

static void scatter(const void *src, int64_t stride, int64_t count, size_t size, char *dst) {
    if (size == 4)
        for (int64_t i = 0; i < count; i++)
            ((uint32_t *)dst)[i * stride] = ((const uint32_t *)src)[i];
    else
        for (int64_t i = 0; i < count; i++)
            ((uint16_t *)dst)[i * stride] = ((const uint16_t *)src)[i];
}

const float *bnbq_load(const bnbq_view *view, int64_t row, int64_t col, int64_t count,
                       float *scratch) {
    const char *src = element(view, row, col);
    if (view->col_stride == 1) {
        if (view->dtype == BNBQ_F32)
            return (const float *)src;
        bnbq_edge()->widen(src, view->dtype, count, scratch);
        return scratch;
    }
    const bnbq_edge_kernels *edge = bnbq_edge();
    size_t size = bnbq_dtype_size(view->dtype);
    uint32_t piece[PIECE];
    for (int64_t i = 0; i < count; i += PIECE) {
        int64_t part = bnbq_min(PIECE, count - i);
        gather(src + i * view->col_stride * (int64_t)size, view->col_stride, part, size, piece);
        edge->widen(piece, view->dtype, part, scratch + i);
    }
    return scratch;
}

static void store(const bnbq_edge_kernels *edge, const bnbq_view *view, int64_t row, int64_t col,
                  int64_t count, const float *src) {
    char *dst = element(view, row, col);
    if (view->col_stride == 1) {
        edge->narrow(src, count, view->dtype, dst);
        return;
    }
    size_t size = bnbq_dtype_size(view->dtype);
    uint32_t piece[PIECE];
    for (int64_t i = 0; i < count; i += PIECE) {
        int64_t part = bnbq_min(PIECE, count - i);
        edge->narrow(src + i, part, view->dtype, piece);
        scatter(piece, view->col_stride, part, size, dst + i * view->col_stride * (int64_t)size);
    }
}

/* Finding the kernels takes about as long as storing the row of a tile. */
void bnbq_store_rows(const bnbq_view *view, int64_t row, int64_t rows, int64_t col, int64_t count,
                     const float *src, int64_t lds) {
    const bnbq_edge_kernels *edge = bnbq_edge();
    for (int64_t i = 0; i < rows; i++)
        store(edge, view, row + i, col, count, src + i * lds);
}

void bnbq_store_tile(const bnbq_view *y, const bnbq_view *bias, int64_t row, int64_t rows,
                     int64_t col, int64_t count, float *tile) {
    float scratch[BNBQ_TILE_N];
    const float *b = bias ? bnbq_load(bias, 0, col, count, scratch) : NULL;
    for (int64_t i = 0; b && i < rows; i++)
        for (int64_t j = 0; j < count; j++)
            tile[i * BNBQ_TILE_N + j] += b[j];
    bnbq_store_rows(y, row, rows, col, count, tile, BNBQ_TILE_N);
}

/* Whole rows of a transposed matrix, whose elements are neighbours down the columns. Through a
 * small tile, so that each cache line of both sides is touched once: with a power of two between
 * lines they would evict each other. */
static void load_transposed(const bnbq_view *view, int64_t row, int64_t rows, float *out) {
    enum { ROWS = 64, COLUMNS = 16, AHEAD = 16 };
    int64_t size = (int64_t)bnbq_dtype_size(view->dtype);
    float tile[ROWS][COLUMNS], column[ROWS];
    for (int64_t r0 = 0; r0 < rows; r0 += ROWS) {
        int64_t height = bnbq_min(ROWS, rows - r0);
        for (int64_t c0 = 0; c0 < view->cols; c0 += COLUMNS) {
            int64_t width = bnbq_min(COLUMNS, view->cols - c0);
            for (int64_t c = 0; c < width; c++) {
                const char *src = element(view, row + r0, c0 + c);
                /* Each column is in a page of its own: no hardware prefetch crosses over. */
                for (int64_t b = 0; c0 + c + AHEAD < view->cols && b < height * size; b += 64)
                    __builtin_prefetch(src + AHEAD * view->col_stride * size + b);
                bnbq_edge()->widen(src, view->dtype, height, column);
                for (int64_t r = 0; r < height; r++)
                    tile[r][c] = column[r];
            }
            for (int64_t r = 0; r < height; r++)
                memcpy(out + (r0 + r) * view->cols + c0, tile[r], (size_t)width * sizeof(float));
        }
    }
}

bool bnbq_is_transposed(const bnbq_view *view) {
    return view->outer == 1 && view->strides[0] == 1 && view->col_stride != 1;
}

const float *bnbq_load_flat(const bnbq_view *view, int64_t start, int64_t count, float *scratch) {
    int64_t row = start / view->cols, col = start % view->cols;
    if (count <= view->cols - col)
        return bnbq_load(view, row, col, count, scratch);
    for (int64_t i = 0; i < count; row++, col = 0) {
        int64_t whole = col == 0 ? (count - i) / view->cols : 0;
        if (whole > 1 && bnbq_is_transposed(view)) {
            load_transposed(view, row, whole, scratch + i);
            i += whole * view->cols;
            row += whole - 1;
            continue;
        }
        int64_t part = bnbq_min(view->cols - col, count - i);
        const float *src = bnbq_load(view, row, col, part, scratch + i);
        if (src != scratch + i)
            memcpy(scratch + i, src, (size_t)part * sizeof *src);
        i += part;
    }
    return scratch;
}

void bnbq_store_flat(const bnbq_view *view, int64_t start, int64_t count, const float *src) {
    const bnbq_edge_kernels *edge = bnbq_edge();
    int64_t row = start / view->cols, col = start % view->cols;
    for (int64_t i = 0; i < count; row++, col = 0) {
        int64_t part = bnbq_min(view->cols - col, count - i);
        store(edge, view, row, col, part, src + i);
        i += part;
    }
}

const float *bnbq_load_rounded(const bnbq_view *view, int64_t row, bnbq_dtype dtype,
                               float *scratch) {
    const float *x = bnbq_load(view, row, 0, view->cols, scratch);
    if (dtype == BNBQ_F32 || dtype == view->dtype)
        return x;
    const bnbq_edge_kernels *edge = bnbq_edge();
    uint16_t piece[PIECE];
    for (int64_t i = 0; i < view->cols; i += PIECE) {
        int64_t part = bnbq_min(PIECE, view->cols - i);
        edge->narrow(x + i, part, dtype, piece);
        edge->widen(piece, dtype, part, scratch + i);
    }
    return scratch;
}

typedef struct bf16_copy {
    const bnbq_view *view;
    int64_t row, rows, ld;
    uint16_t *out;
} bf16_copy;

enum { COPY_ROWS = 8 }; /* per task */

static bool bf16_copy_task(void *context, int64_t task) {
    const bf16_copy *op = context;
    int64_t cols = op->view->cols, end = bnbq_min(op->rows, (task + 1) * COPY_ROWS);
    float piece[PIECE];
    for (int64_t i = task * COPY_ROWS; i < end; i++) {
        uint16_t *out = op->out + i * op->ld;
        for (int64_t c = 0; c < cols; c += PIECE) {
            int64_t part = bnbq_min(PIECE, cols - c);
            const float *from = bnbq_load(op->view, op->row + i, c, part, piece);
            bnbq_edge()->narrow(from, part, BNBQ_BF16, out + c);
        }
        if (op->ld > cols)
            out[cols] = 0;
    }
    return true;
}

const uint16_t *bnbq_bf16_rows(const bnbq_view *view, int64_t row, int64_t rows, int64_t *ld) {
    if (view->dtype == BNBQ_BF16 && view->col_stride == 1 && view->outer <= 1 &&
        view->cols % 2 == 0) {
        *ld = view->outer == 1 ? view->strides[0] : 0;
        return (const uint16_t *)element(view, row, 0);
    }
    *ld = view->cols + view->cols % 2;
    bf16_copy op = {view, row, rows, *ld, NULL};
    op.out = bnbq_scratch(BNBQ_SCRATCH_X, (size_t)(rows * *ld) * sizeof *op.out);
    if (op.out && !bnbq_run_tasks(bf16_copy_task, &op, bnbq_ceil_div(rows, COPY_ROWS), rows * *ld))
        return NULL;
    return op.out;
}

/* ---------------------------------------------------------------- cutting work */

int64_t bnbq_pass_rows(int64_t m, int64_t width, int64_t most) {
    int64_t rows = bnbq_min(BNBQ_TILE_M, bnbq_max(32, most / bnbq_max(width, 1)));
    return bnbq_ceil_div(m, bnbq_ceil_div(m, rows));
}

bnbq_cut bnbq_cut_pass(int64_t m, int64_t cols, int64_t max_tile, int64_t min_tile) {
    /* Few rows: a tile is memory traffic only, so many small ones spread best. Many rows: a tile
     * re-reads the packed activations, so tiles stay wide and the rows are split instead, but not
     * below 64, where decoding the tile would no longer be shared by enough of them. */
    enum { FEW_ROWS = 16, TASKS_FOR_FEW = 64, TASKS_FOR_MANY = 16, LEAST_PART = 64 };
    bnbq_cut cut = {.m = m, .tile_cols = max_tile, .parts = 1};
    if (m <= FEW_ROWS)
        while (cut.tile_cols > min_tile && cols < cut.tile_cols * TASKS_FOR_FEW)
            cut.tile_cols /= 2;
    cut.tiles = bnbq_ceil_div(cols, cut.tile_cols);
    if (cut.tiles > 0 && cut.tiles < TASKS_FOR_MANY && m > LEAST_PART)
        cut.parts = bnbq_min(bnbq_ceil_div(TASKS_FOR_MANY, cut.tiles), m / LEAST_PART);
    cut.part_rows = bnbq_ceil_div(bnbq_ceil_div(m, cut.parts), 32) * 32; /* whole tile registers */
    cut.part_rows = bnbq_min(cut.part_rows, m);
    cut.parts = bnbq_ceil_div(m, cut.part_rows);
    return cut;
}

bool bnbq_run_tasks(bnbq_task *run, void *context, int64_t tasks, int64_t work) {
    /* Entering and leaving a pool takes 2 to 10 us when its threads still spin; 2^18
     * multiplications take about that long on one processor. */
    enum { LEAST_WORK = 1 << 18 };
    return (work < LEAST_WORK ? bnbq_serial_for : bnbq_parallel_for)(run, context, tasks);
}

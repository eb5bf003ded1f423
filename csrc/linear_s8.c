/* linear_s8.c - op front: LLM.int8(), y = x . W^T + bias for an int8 weight.
 *
 *   columns   which columns of x hold an outlier in any row; not batch-invariant
 * and then, for each pass over the rows of x (bnbq_cut in fronts.h):
 *   quantize  every row of x by its own absmax to int8, into the kernel's packed form
 *   outliers  only if there are any: which elements of which rows stay float
 *   tile      exact int32 products, scaled to f32; plus the float product of the outliers; plus the
 *             bias; narrowed into y
 * Columns are cut where the scale of W changes and where int32 could overflow; a `span` below is
 * one such range of columns, and has a packed form of its own.
 */
#include "float16.h"
#include "fronts.h"
#include "kernels.h"

#include <math.h>
#include <string.h>

#ifdef __AVX2__
#error "linear_s8.c is baseline code: compile it without -mavx2 or -march"
#endif

static const float inv127 = (float)(1.0 / 127);

enum {
    PACK_ROWS = 8,      /* rows of activations per task */
    MIN_TILE_N = 32,    /* rows of W per tile, at least */
    STRETCH = 64,       /* elements of a row that are searched for outliers together */
    MANY_OUTLIERS = 16, /* one of so many columns: their product may be in bf16 */
};

/* Columns of the span that starts at `start`. */
static int64_t span_at(const bnbq_weight8 *w, int64_t start) {
    int64_t block = bnbq_block_of(w), end = bnbq_min(w->k, (start / block + 1) * block);
    return bnbq_min(end - start, BNBQ_MAX_K_S8);
}

/* The elements of x that stay float, row by row with ascending columns. `columns` lists those that
 * occur in any row, ascending; an element names its column by its place in that list. When whole
 * columns are outliers every row has an element in each and the places are 0, 1, 2, ... */
typedef struct outliers {
    int64_t *first; /* [m + 1]: row i has elements first[i] .. first[i + 1] */
    int64_t *place; /* [first[m]]; NULL: whole columns */
    float *value;   /* [first[m]] */
    int64_t *columns, count;
    uint16_t *value_bf16; /* [m, ldv] instead of value, for the kernel that multiplies in bf16 */
    int64_t ldv;
} outliers;

typedef struct forward {
    bnbq_view x, y;
    const bnbq_view *bias; /* NULL: none */
    const bnbq_weight8 *w;
    const bnbq_s8_kernels *kernels;
    float threshold;
    bool whole_columns; /* an outlier makes one of its column in every row */
    bool bf16;          /* and the kernel for many outlier columns of bf16 multiplies them */
    uint8_t *flags;     /* [k]: which columns those are */
    int64_t m0;         /* the first row of this pass */
    bnbq_cut cut;
    char *packed; /* per part: one packed form per span */
    size_t part_bytes;
    float *x_scale; /* [m]: absmax / 127 of the rows */
    outliers out;
} forward;

static size_t span_bytes(const forward *op, int64_t m, int64_t columns) {
    return (op->kernels->packed_bytes(m, columns) + 63) / 64 * 64;
}

/* Vector code, unlike a loop that stops at the first one: most stretches have none. */
static bool has_outlier(const float *x, int64_t count, float threshold) {
    int found = 0;
    for (int64_t c = 0; c < count; c++)
        found |= !(fabsf(x[c]) < threshold);
    return found;
}

/* Rows of the whole batch, whatever the passes are. Every writer of a flag writes 1. */
static bool flag_columns_task(void *context, int64_t task) {
    const forward *op = context;
    int64_t k = op->w->k, end = bnbq_min(op->x.rows, (task + 1) * PACK_ROWS);
    float *scratch = bnbq_scratch(BNBQ_SCRATCH_ROW, (size_t)k * sizeof(float));
    if (!scratch)
        return false;
    for (int64_t i = task * PACK_ROWS; i < end; i++) {
        const float *x = bnbq_load(&op->x, i, 0, k, scratch);
        for (int64_t c0 = 0; c0 < k; c0 += STRETCH) {
            int64_t count = bnbq_min(STRETCH, k - c0);
            bool found = has_outlier(x + c0, count, op->threshold);
            for (int64_t c = c0; found && c < c0 + count; c++)
                if (!(fabsf(x[c]) < op->threshold))
                    __atomic_store_n(&op->flags[c], 1, __ATOMIC_RELAXED);
        }
    }
    return true;
}

static bool flag_columns(forward *op) {
    int64_t k = op->w->k;
    op->out.columns = bnbq_scratch(BNBQ_SCRATCH_COLUMNS, (size_t)k * (sizeof(int64_t) + 1));
    if (!op->out.columns)
        return false;
    op->flags = (uint8_t *)(op->out.columns + k);
    memset(op->flags, 0, (size_t)k);
    if (!bnbq_run_tasks(flag_columns_task, op, bnbq_ceil_div(op->x.rows, PACK_ROWS),
                        op->x.rows * k))
        return false;
    for (int64_t c = 0; c < k; c++)
        if (op->flags[c])
            op->out.columns[op->out.count++] = c;
    op->whole_columns = op->out.count > 0; /* without any the rule per row finds none either */
    /* A few are faster, and more exact, in fp32. */
    op->bf16 = op->whole_columns && op->x.dtype == BNBQ_BF16 &&
               op->kernels->multiply_outliers_bf16 && op->out.count >= k / MANY_OUTLIERS;
    op->out.ldv = op->out.count + (op->bf16 ? op->out.count % 2 : 0);
    return true;
}

/* Row i: its elements in outlier columns go to their list and are Inf for the kernel, which knows
 * outliers by their value. */
static void take_columns(const forward *op, int64_t i, float *x) {
    const outliers *out = &op->out;
    for (int64_t p = 0; p < out->count; p++) {
        float *element = x + out->columns[p];
        if (op->bf16)
            out->value_bf16[i * out->ldv + p] = bnbq_f32_to_bf16(*element);
        else
            out->value[i * out->ldv + p] = *element;
        *element = INFINITY;
    }
    if (op->bf16 && out->count % 2)
        out->value_bf16[i * out->ldv + out->count] = 0;
}

static bool quantize_task(void *context, int64_t task) {
    const forward *op = context;
    int64_t k = op->w->k, end = bnbq_min(op->cut.m, (task + 1) * PACK_ROWS);
    float *scratch = bnbq_scratch(BNBQ_SCRATCH_ROW, (size_t)k * (sizeof(float) + 1));
    if (!scratch)
        return false;
    int8_t *q = (int8_t *)(scratch + k);
    for (int64_t i = task * PACK_ROWS; i < end; i++) {
        int64_t part = i / op->cut.part_rows, row = i % op->cut.part_rows,
                m = bnbq_part_size(&op->cut, part);
        const float *x = bnbq_load(&op->x, op->m0 + i, 0, k, scratch);
        if (op->whole_columns) {
            bnbq_copy_row(scratch, x, k);
            take_columns(op, i, scratch);
            x = scratch;
        }
        float absmax;
        op->out.first[i + 1] = op->kernels->quantize(x, k, op->threshold, q, &absmax);
        op->x_scale[i] = absmax * inv127;
        char *packed = op->packed + (size_t)part * op->part_bytes;
        for (int64_t start = 0; start < k;) {
            int64_t columns = span_at(op->w, start);
            op->kernels->pack(q + start, row, m, columns, packed);
            packed += span_bytes(op, m, columns);
            start += columns;
        }
    }
    return true;
}

/* Second look at the rows that have outliers; the column itself stands in for its place. */
static bool collect_task(void *context, int64_t i) {
    const forward *op = context;
    int64_t next = op->out.first[i], k = op->w->k;
    if (next == op->out.first[i + 1])
        return true;
    float *scratch = bnbq_scratch(BNBQ_SCRATCH_ROW, (size_t)k * sizeof(float));
    if (!scratch)
        return false;
    const float *x = bnbq_load(&op->x, op->m0 + i, 0, k, scratch);
    for (int64_t c = 0; next < op->out.first[i + 1]; c++) {
        if (c % STRETCH == 0 && !has_outlier(x + c, bnbq_min(STRETCH, k - c), op->threshold)) {
            c += STRETCH - 1;
        } else if (!(fabsf(x[c]) < op->threshold)) {
            op->out.place[next] = c;
            op->out.value[next++] = x[c];
        }
    }
    return true;
}

/* After the rows are quantised: their counts of outliers become the lists. */
static bool collect_outliers(forward *op) {
    outliers *out = &op->out;
    int64_t k = op->w->k;
    for (int64_t i = 0; i < op->cut.m; i++)
        out->first[i + 1] += out->first[i];
    int64_t total = out->first[op->cut.m];
    if (total == 0 || op->whole_columns)
        return true;
    int64_t *memory = bnbq_scratch(BNBQ_SCRATCH_EXTRA, (size_t)(2 * k + total) * sizeof(int64_t) +
                                                           (size_t)total * sizeof(float));
    if (!memory)
        return false;
    int64_t *place_of = memory; /* [k] */
    out->columns = memory + k;
    out->count = 0;
    out->place = memory + 2 * k;
    out->value = (float *)(memory + 2 * k + total);
    if (!bnbq_run_tasks(collect_task, op, op->cut.m, op->cut.m * k))
        return false;
    memset(place_of, 0, (size_t)k * sizeof *place_of);
    for (int64_t i = 0; i < total; i++)
        place_of[out->place[i]] = 1;
    for (int64_t c = 0; c < k; c++) {
        if (place_of[c]) {
            place_of[c] = out->count;
            out->columns[out->count++] = c;
        }
    }
    for (int64_t i = 0; i < total; i++)
        out->place[i] = place_of[out->place[i]];
    return true;
}

/* y[m, rows] = the int8 product of a part with a tile, scaled. ints: i32[m, BNBQ_TILE_N], longs:
 * the same of i64, only used for blocks of more than BNBQ_MAX_K_S8 columns. */
static void multiply(const forward *op, int64_t part, int64_t n0, int64_t rows, float *y,
                     int32_t *ints, int64_t *longs, void *scratch) {
    const bnbq_weight8 *w = op->w;
    int64_t m = bnbq_part_size(&op->cut, part), block = bnbq_block_of(w),
            blocks = bnbq_ceil_div(w->k, block);
    const char *packed = op->packed + (size_t)part * op->part_bytes;
    const float *x_scale = op->x_scale + part * op->cut.part_rows;
    memset(y, 0, (size_t)(m * BNBQ_TILE_N) * sizeof *y);
    for (int64_t b = 0; b < blocks; b++) {
        int64_t end = bnbq_min(w->k, (b + 1) * block), start = b * block;
        bool one_span = span_at(w, start) == end - start;
        float w_scale[BNBQ_TILE_N];
        for (int64_t j = 0; j < rows; j++)
            w_scale[j] = w->absmax[(n0 + j) * blocks + b] * inv127;
        if (!one_span)
            memset(longs, 0, (size_t)(m * BNBQ_TILE_N) * sizeof *longs);
        while (start < end) {
            int64_t columns = span_at(w, start);
            op->kernels->run(packed, m, w->qweight + n0 * w->k + start, w->k, rows, columns, ints,
                             BNBQ_TILE_N, scratch);
            for (int64_t i = 0; !one_span && i < m; i++)
                for (int64_t j = 0; j < rows; j++)
                    longs[i * BNBQ_TILE_N + j] += ints[i * BNBQ_TILE_N + j];
            packed += span_bytes(op, m, columns);
            start += columns;
        }
        for (int64_t i = 0; i < m; i++) {
            const int64_t at = i * BNBQ_TILE_N;
            if (one_span)
                op->kernels->scale(ints + at, rows, x_scale[i], w_scale, y + at);
            for (int64_t j = 0; !one_span && j < rows; j++)
                y[at + j] += (float)longs[at + j] * (x_scale[i] * w_scale[j]);
        }
    }
}

/* sums[m, BNBQ_TILE_N] = the float product of a part's outliers with a tile. A row adds up its own
 * outliers in ascending columns, whatever other rows have. The weight is dequantised first: x * q
 * could overflow where the float layer's product does not. */
static void multiply_outliers_f32(const forward *op, int64_t part, int64_t n0, int64_t rows,
                                  float *sums) {
    const outliers *out = &op->out;
    const bnbq_weight8 *w = op->w;
    int64_t m0 = part * op->cut.part_rows, m = bnbq_part_size(&op->cut, part);
    int64_t block = bnbq_block_of(w), blocks = bnbq_ceil_div(w->k, block);
    const int64_t *first = out->first + m0;
    memset(sums, 0, (size_t)(m * BNBQ_TILE_N) * sizeof *sums);
    int64_t cursor[BNBQ_TILE_M];
    memcpy(cursor, first, (size_t)m * sizeof *cursor);
    float absmax[BNBQ_TILE_N];
    _Alignas(64) float decoded[BNBQ_OUTLIER_COLUMNS * BNBQ_TILE_N];
    if (rows < BNBQ_TILE_N) /* the others' values are not used, but must not slow anything down */
        memset(decoded, 0, sizeof decoded);
    for (int64_t begin = 0, end; begin < out->count; begin = end) {
        /* columns that share scales */
        int64_t limit = bnbq_min(out->count, begin + BNBQ_OUTLIER_COLUMNS);
        int64_t b = out->columns[begin] / block;
        for (end = begin + 1; end < limit && out->columns[end] < (b + 1) * block;)
            end++;
        for (int64_t j = 0; j < rows; j++)
            absmax[j] = w->absmax[(n0 + j) * blocks + b];
        op->kernels->decode_columns(w->qweight + n0 * w->k, w->k, rows, out->columns + begin,
                                    end - begin, absmax, decoded);
        if (!out->place)
            op->kernels->add_outliers(out->value + first[0] + begin, out->count, m, NULL, begin,
                                      end - begin, decoded, sums);
        for (int64_t i = 0; out->place && i < m; i++) {
            const int64_t *place = out->place + cursor[i];
            int64_t count = 0;
            while (cursor[i] + count < first[i + 1] && place[count] < end)
                count++;
            op->kernels->add_outliers(out->value + cursor[i], 0, 1, place, begin, count, decoded,
                                      sums + i * BNBQ_TILE_N);
            cursor[i] += count;
        }
    }
}

/* y += that product. */
static void add_outliers(const forward *op, int64_t part, int64_t n0, int64_t rows, float *y,
                         float *sums, void *scratch) {
    const outliers *out = &op->out;
    const bnbq_weight8 *w = op->w;
    int64_t m0 = part * op->cut.part_rows, m = bnbq_part_size(&op->cut, part);
    const int64_t *first = out->first + m0;
    if (first[0] == first[m])
        return;
    if (op->bf16) {
        const int64_t blocks = bnbq_ceil_div(w->k, bnbq_block_of(w));
        const bnbq_s8_rows tile = {w->qweight + n0 * w->k, w->absmax + n0 * blocks, w->k,
                                   bnbq_block_of(w)};
        op->kernels->multiply_outliers_bf16(out->value_bf16 + m0 * out->ldv, out->ldv, m, &tile,
                                            rows, out->columns, out->count, sums, scratch);
    } else {
        multiply_outliers_f32(op, part, n0, rows, sums);
    }
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; first[i] < first[i + 1] && j < rows; j++)
            y[i * BNBQ_TILE_N + j] += sums[i * BNBQ_TILE_N + j];
}

static bool tile_task(void *context, int64_t task) {
    const forward *op = context;
    int64_t part = task % op->cut.parts, n0 = task / op->cut.parts * op->cut.tile_cols;
    int64_t m = bnbq_part_size(&op->cut, part), rows = bnbq_min(op->cut.tile_cols, op->w->n - n0);
    int64_t k = op->w->k, size = m * BNBQ_TILE_N;
    bool needs_longs = bnbq_block_of(op->w) > BNBQ_MAX_K_S8;
    /* Of the longest span, and of the last one, which may be shorter. */
    size_t scratch_bytes = op->bf16 ? BNBQ_BACKWARD_SCRATCH : 0;
    for (int64_t start = 0; start < k; start += span_at(op->w, start)) {
        size_t bytes = op->kernels->scratch_bytes(m, span_at(op->w, start));
        scratch_bytes = bytes > scratch_bytes ? bytes : scratch_bytes;
    }
    float *y = bnbq_scratch(BNBQ_SCRATCH_TILE, (size_t)size * (2 * 4 + (needs_longs ? 8 : 0)));
    void *scratch = bnbq_scratch(BNBQ_SCRATCH_KERNEL, scratch_bytes);
    if (!y || !scratch)
        return false;
    int32_t *ints = (int32_t *)(y + size);
    multiply(op, part, n0, rows, y, ints, (int64_t *)(y + 2 * size), scratch);
    add_outliers(op, part, n0, rows, y, (float *)ints, scratch);
    bnbq_store_tile(&op->y, op->bias, op->m0 + part * op->cut.part_rows, m, n0, rows, y);
    return true;
}

static bool run_pass(forward *op, int64_t m) {
    int64_t k = op->w->k, n = op->w->n;
    op->cut = bnbq_cut_pass(m, n, BNBQ_TILE_N, MIN_TILE_N);
    op->part_bytes = 0;
    for (int64_t start = 0; start < k; start += span_at(op->w, start))
        op->part_bytes += span_bytes(op, op->cut.part_rows, span_at(op->w, start));
    op->packed = bnbq_scratch(BNBQ_SCRATCH_X, (size_t)op->cut.parts * op->part_bytes);
    op->out.first = bnbq_scratch(BNBQ_SCRATCH_ABSMAX,
                                 (size_t)(m + 1) * sizeof(int64_t) + (size_t)m * sizeof(float));
    if (op->whole_columns) {
        op->out.value = bnbq_scratch(BNBQ_SCRATCH_EXTRA,
                                     (size_t)(m * op->out.ldv) * (op->bf16 ? 2 : sizeof(float)));
        op->out.value_bf16 = (uint16_t *)op->out.value;
    }
    if (!op->packed || !op->out.first || (op->whole_columns && !op->out.value))
        return false;
    op->out.first[0] = 0;
    op->x_scale = (float *)(op->out.first + m + 1);
    return bnbq_run_tasks(quantize_task, op, bnbq_ceil_div(m, PACK_ROWS), m * k) &&
           collect_outliers(op) &&
           bnbq_run_tasks(tile_task, op, op->cut.tiles * op->cut.parts, m * n * k);
}

bnbq_status bnbq_linear_8bit(const bnbq_tensor *x, const bnbq_weight8 *w, const bnbq_tensor *bias,
                             float threshold, const bnbq_tensor *y) {
    forward op = {.x = bnbq_view_rows(x),
                  .y = bnbq_view_rows(y),
                  .w = w,
                  .kernels = bnbq_s8(),
                  .threshold = threshold > 0 ? threshold : INFINITY};
    bnbq_view bias_row;
    int64_t m = op.x.rows;
    if (m == 0 || w->n == 0)
        return BNBQ_OK;
    if (bias) {
        bias_row = bnbq_view_rows(bias);
        op.bias = &bias_row;
    }
    if (threshold > 0 && !bnbq_batch_invariant() && !flag_columns(&op))
        return BNBQ_NO_MEMORY;
    int64_t step = bnbq_pass_rows(m, w->k, BNBQ_PASS_ELEMENTS);
    for (op.m0 = 0; op.m0 < m; op.m0 += step) {
        if (!run_pass(&op, bnbq_min(step, m - op.m0)))
            return BNBQ_NO_MEMORY;
    }
    return BNBQ_OK;
}

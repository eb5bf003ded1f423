/* linear_experts.c - op front: the products of linear_q4.c and linear_s8.c for a mixture of
 * experts.
 *
 * The rows of x come sorted by expert; each expert's rows go through the front of a single weight,
 * so a row's result is what that gives, and the weights of experts without rows are not read. What
 * is gained over a loop outside is one entry into the pool of threads instead of one per expert.
 */
#include "formats.h"
#include "fronts.h"

#ifdef __AVX2__
#error "linear_experts.c is baseline code: compile it without -mavx2 or -march"
#endif

/* Experts per thread from which it does not matter that the last ones leave threads idle. */
enum { ENOUGH_EXPERTS = 4 };

typedef struct product product;
struct product {
    /* One expert's rows. */
    bnbq_status (*multiply)(const product *op, int64_t expert, const bnbq_tensor *x,
                            const bnbq_tensor *y);
    const bnbq_experts *experts;
    const bnbq_tensor *x, *y, *bias; /* of a gradient, x is gy and y is gx */
    const bnbq_weight4 *w4;
    const bnbq_weight8 *w8;
    bnbq_dtype compute_dtype;
    bool int8_activations;
    float threshold;
};

/* ---------------------------------------------------------------- one expert */

static bnbq_weight4 expert_of_4(const product *op, int64_t expert) {
    bnbq_weight4 w = *op->w4;
    int64_t blocks = bnbq_ceil_div(w.n * w.k, w.blocksize);
    w.qweight += expert * bnbq_ceil_div(w.n * w.k, 2);
    if (w.absmax.absmax) {
        w.absmax.absmax += expert * blocks;
    } else {
        w.absmax.codes += expert * blocks;
        w.absmax.absmax2 += expert * bnbq_ceil_div(blocks, BNBQ_ABSMAX_BLOCK);
        w.absmax.offset += expert;
    }
    return w;
}

static bnbq_weight8 expert_of_8(const product *op, int64_t expert) {
    bnbq_weight8 w = *op->w8;
    w.qweight += expert * w.n * w.k;
    w.absmax += expert * w.n * (w.blocksize ? bnbq_ceil_div(w.k, w.blocksize) : 1);
    return w;
}

/* Rows [start, stop) of a matrix. One with a single row may have lost that dimension. */
static bnbq_tensor rows_of(const bnbq_tensor *tensor, int64_t start, int64_t stop) {
    bnbq_tensor rows = *tensor;
    if (rows.ndim > 1) {
        rows.data =
            (char *)rows.data + start * rows.strides[0] * (int64_t)bnbq_dtype_size(rows.dtype);
        rows.shape[0] = stop - start;
    }
    return rows;
}

static const bnbq_tensor *bias_of(const product *op, int64_t expert, bnbq_tensor *storage) {
    if (!op->bias)
        return NULL;
    *storage = rows_of(op->bias, expert, expert + 1);
    return storage;
}

static bnbq_status forward_4bit(const product *op, int64_t expert, const bnbq_tensor *x,
                                const bnbq_tensor *y) {
    bnbq_tensor bias;
    bnbq_weight4 w = expert_of_4(op, expert);
    return bnbq_linear_4bit(x, &w, bias_of(op, expert, &bias), op->compute_dtype,
                            op->int8_activations, y);
}

static bnbq_status backward_4bit(const product *op, int64_t expert, const bnbq_tensor *gy,
                                 const bnbq_tensor *gx) {
    bnbq_weight4 w = expert_of_4(op, expert);
    return bnbq_linear_4bit_backward(gy, &w, op->compute_dtype, gx);
}

static bnbq_status forward_8bit(const product *op, int64_t expert, const bnbq_tensor *x,
                                const bnbq_tensor *y) {
    bnbq_tensor bias;
    bnbq_weight8 w = expert_of_8(op, expert);
    return bnbq_linear_8bit(x, &w, bias_of(op, expert, &bias), op->threshold, y);
}

static bnbq_status backward_8bit(const product *op, int64_t expert, const bnbq_tensor *gy,
                                 const bnbq_tensor *gx) {
    bnbq_weight8 w = expert_of_8(op, expert);
    return bnbq_linear_8bit_backward(gy, &w, gx);
}

/* ---------------------------------------------------------------- all of them */

static int64_t first_row(const product *op, int64_t expert) {
    return expert > 0 ? op->experts->ends[expert - 1] : 0;
}

static bool expert_task(void *context, int64_t expert) {
    const product *op = context;
    int64_t start = first_row(op, expert), stop = op->experts->ends[expert];
    if (start == stop)
        return true;
    bnbq_tensor x = rows_of(op->x, start, stop), y = rows_of(op->y, start, stop);
    return op->multiply(op, expert, &x, &y) == BNBQ_OK;
}

/* Do the experts share the threads out about evenly, if each is one thread's work? */
static bool experts_are_even(const product *op) {
    int64_t threads = bnbq_thread_count(), busy = 0, largest = 0, count = op->experts->count;
    for (int64_t expert = 0; expert < count; expert++) {
        int64_t rows = op->experts->ends[expert] - first_row(op, expert);
        busy += rows > 0;
        largest = bnbq_max(largest, rows);
    }
    return largest * threads <= op->experts->ends[count - 1] &&
           (busy % threads == 0 || busy >= ENOUGH_EXPERTS * threads);
}

/* Rows without an expert. */
static bool clear_rest(const product *op) {
    bnbq_view y = bnbq_view_rows(op->y);
    int64_t start = op->experts->ends[op->experts->count - 1];
    if (start == y.rows)
        return true;
    float *zeros = bnbq_scratch(BNBQ_SCRATCH_TILE, (size_t)y.cols * sizeof(float));
    if (!zeros)
        return false;
    memset(zeros, 0, (size_t)y.cols * sizeof(float));
    bnbq_store_rows(&y, start, y.rows - start, 0, y.cols, zeros, 0);
    return true;
}

static bnbq_status run(product op, int64_t weights) {
    int64_t count = op.experts->count;
    if (!clear_rest(&op))
        return BNBQ_NO_MEMORY;
    if (experts_are_even(&op))
        return bnbq_run_tasks(expert_task, &op, count, op.experts->ends[count - 1] * weights)
                   ? BNBQ_OK
                   : BNBQ_NO_MEMORY;
    for (int64_t expert = 0; expert < count; expert++) /* each by all threads */
        if (!expert_task(&op, expert))
            return BNBQ_NO_MEMORY;
    return BNBQ_OK;
}

bnbq_status bnbq_linear_4bit_experts(const bnbq_tensor *x, const bnbq_weight4 *w,
                                     const bnbq_experts *experts, const bnbq_tensor *bias,
                                     bnbq_dtype compute_dtype, bool int8_activations,
                                     const bnbq_tensor *y) {
    return run((product){.multiply = forward_4bit,
                         .experts = experts,
                         .x = x,
                         .y = y,
                         .bias = bias,
                         .w4 = w,
                         .compute_dtype = compute_dtype,
                         .int8_activations = int8_activations},
               w->n * w->k);
}

bnbq_status bnbq_linear_4bit_experts_backward(const bnbq_tensor *gy, const bnbq_weight4 *w,
                                              const bnbq_experts *experts, bnbq_dtype compute_dtype,
                                              const bnbq_tensor *gx) {
    return run((product){.multiply = backward_4bit,
                         .experts = experts,
                         .x = gy,
                         .y = gx,
                         .w4 = w,
                         .compute_dtype = compute_dtype},
               w->n * w->k);
}

bnbq_status bnbq_linear_8bit_experts(const bnbq_tensor *x, const bnbq_weight8 *w,
                                     const bnbq_experts *experts, const bnbq_tensor *bias,
                                     float threshold, const bnbq_tensor *y) {
    return run((product){.multiply = forward_8bit,
                         .experts = experts,
                         .x = x,
                         .y = y,
                         .bias = bias,
                         .w8 = w,
                         .threshold = threshold},
               w->n * w->k);
}

bnbq_status bnbq_linear_8bit_experts_backward(const bnbq_tensor *gy, const bnbq_weight8 *w,
                                              const bnbq_experts *experts, const bnbq_tensor *gx) {
    return run((product){.multiply = backward_8bit, .experts = experts, .x = gy, .y = gx, .w8 = w},
               w->n * w->k);
}

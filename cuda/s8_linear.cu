/* s8_linear.cu - the front of LLM.int8(): y = x . W^T + bias, one to three launches.
 *
 *   1 row                    s8_few quantises it too: 1 launch
 *   up to ALL_ROWS_MOST      quantise, product: 2
 *   more rows, paper's rule  columns, quantise, product: 3. Every row needs the columns of all rows
 *   more rows, rule per row  quantise, product: 2
 */
#include "s8.cuh"

#include <math.h>

/* Rows that every block of the quantising kernel looks through for outlier columns: 16 rows of
 * 4096 are 128 KB of L2 for each. */
enum { ALL_ROWS_MOST = 16 };

/* What the kernels with tensor cores ask for: rows of W at multiples of 16 bytes, sums in int32. */
static bool suits_mma(const s8_linear &op, const device_facts &facts) {
    return facts.capability >= 80 && op.k > 0 && op.k % 16 == 0 && op.k <= S8_MAX_K &&
           (uintptr_t)op.w.qweight % 16 == 0;
}

static bnbq_status get_working_space(bnbq_cuda_call *call, s8_linear *op) {
    op->flags_stride = op->rule == FLAGGED ? 0 : op->padded / 8;
    TRY(get_space(call, op->m * op->padded, &op->q));
    TRY(get_space(call, op->m, &op->rows));
    return get_space(call, op->rule == FLAGGED ? op->padded / 8 : op->m * op->flags_stride,
                     &op->flags);
}

static bnbq_status run(bnbq_cuda_call *call, s8_linear *op) {
    device_facts facts;
    TRY(get_facts(call, &facts));
    bool mma = suits_mma(*op, facts);
    if (mma && s8_one_row_fits(*op))
        return run_s8_one_row(call, *op);
    TRY(get_working_space(call, op));
    TRY(run_s8_rows(call, *op));
    if (!mma)
        return run_s8_plain(call, *op);
    return op->m <= S8_FEW ? run_s8_few(call, *op) : run_s8_tiles(call, *op);
}

bnbq_status bnbq_cuda_linear_8bit(bnbq_cuda_call *call, const bnbq_tensor *x, const bnbq_weight8 *w,
                                  const bnbq_tensor *bias, float threshold, const bnbq_tensor *y) {
    if (count_of(y) == 0)
        return BNBQ_OK;
    device_guard guard(call);
    TRY(guard.status);
    s8_linear op = {};
    op.w = *w;
    op.n = w->n;
    op.k = w->k;
    op.m = count_of(y) / w->n;
    op.block = w->blocksize ? w->blocksize : op.k;
    op.blocks = op.k ? ceil_div(op.k, op.block) : 0;
    op.padded = ceil_div(op.k, CHUNK) * CHUNK;
    op.threshold = threshold > 0 ? threshold : (float)INFINITY;
    bool columns = threshold > 0 && !call->batch_invariant && op.m > 1;
    op.rule = !columns ? OWN : op.m <= ALL_ROWS_MOST ? ALL_ROWS : FLAGGED;
    if (op.k > 0)
        TRY(load_matrix(call, x, x->dtype, &op.x));
    if (bias) {
        TRY(load_flat(call, bias, &op.bias));
        op.bias_dtype = bias->dtype;
    }
    TRY(open_result(call, y, &op.y));
    int64_t row_bytes = op.y.ld * (int64_t)bnbq_dtype_size(op.y.dtype);
    op.wide_y = (uintptr_t)op.y.data % 16 == 0 && row_bytes % 16 == 0;
    TRY(run(call, &op));
    return close_result(call, &op.y, y);
}

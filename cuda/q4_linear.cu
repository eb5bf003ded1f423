/* q4_linear.cu - the front of bnbq_cuda_linear_4bit: which kernel takes which problem. */
#include "q4_linear.cuh"

struct q4_problem {
    int64_t m, n, k, blocksize;
    bnbq_dtype compute_dtype;
    bool batch_invariant;
    int capability, multiprocessors;
};

/* The bounds are predictions, not measurements: how many blocks keep the multiprocessors busy. */
static q4_shape_id choose(const q4_problem &p) {
    const int64_t processors = p.multiprocessors;
    if (p.compute_dtype == BNBQ_F32 || p.capability < 80 || p.k == 0 || p.k % p.blocksize != 0 ||
        p.k > INT32_MAX || p.n > UINT32_MAX / (p.k / p.blocksize))
        return Q4_FMA;
    /* One order of additions for every m: one number of tokens for every m. */
    const int64_t m = p.batch_invariant ? 16 : p.m;
    if (m > 32 && p.capability == 90 && wgmma_is_on() && p.k < INT32_MAX - 1024 &&
        m < INT32_MAX - 128 && p.n < INT32_MAX - 128)
        return Q4_WGMMA;
    if (p.blocksize == 32)
        return m <= 16 ? Q4_HALVES_16x1 : Q4_HALVES_64x1;
    if (m <= 8)
        return ceil_div(p.n, 32) * 8 >= processors * 7 ? Q4_8x2 : Q4_8x1;
    if (m <= 16)
        return ceil_div(p.n, 64) * 8 >= processors * 7 ? Q4_16x2 : Q4_16x1;
    if (m <= 32)
        return Q4_32x1;
    return 2 * ceil_div(p.n, 128) * ceil_div(m, 64) >= processors ? Q4_64x2 : Q4_32x1;
}

bnbq_status bnbq_cuda_linear_4bit(bnbq_cuda_call *call, const bnbq_tensor *x, const bnbq_weight4 *w,
                                  const bnbq_tensor *bias, bnbq_dtype compute_dtype,
                                  const bnbq_tensor *y) {
    if (count_of(y) == 0)
        return BNBQ_OK;
    device_guard guard(call);
    TRY(guard.status);
    device_facts facts;
    TRY(get_facts(call, &facts));
    q4_operands op = {};
    op.m = count_of(y) / w->n;
    op.n = w->n;
    op.k = w->k;
    op.qweight = w->qweight;
    op.absmax = w->absmax;
    op.blocksize_log2 = log2_of(w->blocksize);
    if (bias) {
        op.bias = bias->data;
        op.bias_dtype = bias->dtype;
        op.bias_stride = bias->strides[0];
    }
    TRY(open_result(call, y, &op.y));
    if (w->k > 0)
        TRY(load_matrix(call, x, compute_dtype, &op.x));
    const q4_problem problem = {op.m,
                                op.n,
                                op.k,
                                w->blocksize,
                                compute_dtype,
                                call->batch_invariant,
                                facts.capability,
                                facts.multiprocessors};
    q4_shape_id shape = (uintptr_t)w->qweight % 8 == 0 ? choose(problem) : Q4_FMA;
    TRY(shape == Q4_WGMMA            ? q4_wgmma(call, &op, w->format)
        : shape == Q4_FMA            ? q4_fma(call, &op, w->format, call->batch_invariant)
        : compute_dtype == BNBQ_BF16 ? q4_mma_bf16(call, &op, w->format, shape)
                                     : q4_mma_f16(call, &op, w->format, shape));
    return close_result(call, &op.y, y);
}

const char *bnbq_cuda_explain_4bit(int64_t m, int64_t n, int64_t k, int64_t blocksize,
                                   bnbq_dtype compute_dtype, bool batch_invariant, int capability,
                                   int multiprocessors) {
    switch (
        choose({m, n, k, blocksize, compute_dtype, batch_invariant, capability, multiprocessors})) {
    case Q4_8x1: return "mma 8x1";
    case Q4_8x2: return "mma 8x2";
    case Q4_16x1: return "mma 16x1";
    case Q4_16x2: return "mma 16x2";
    case Q4_32x1: return "mma 32x1";
    case Q4_64x2: return "mma 64x2";
    case Q4_HALVES_16x1: return "mma 16x1, blocks of 32";
    case Q4_WGMMA: return "wgmma";
    case Q4_HALVES_64x1: return "mma 64x1, blocks of 32";
    default: return m > 8 && !batch_invariant ? "fma tile" : "fma stream";
    }
}

/* q4_mma_f16.cu - the instances for f16: a file of their own, so that they compile side by side. */
#include "q4_mma.cuh"

bnbq_status q4_mma_f16(bnbq_cuda_call *call, const q4_operands *op, const bnbq_format *format,
                       q4_shape_id shape) {
    return q4_mma<BNBQ_F16>(call, op, format, shape);
}

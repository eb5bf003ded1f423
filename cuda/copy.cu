/* copy.cu - strided tensors to contiguous ones and back, with a change of dtype on the way. */
#include "launch.cuh"

enum { THREADS = 256 };

DEVICE int64_t offset_of(const bnbq_tensor &tensor, int64_t i) {
    int64_t offset = 0;
    for (int d = tensor.ndim - 1; d >= 0; d--) {
        offset += i % tensor.shape[d] * tensor.strides[d];
        i /= tensor.shape[d];
    }
    return offset;
}

/* Element i in row-major order, whatever the shapes: they hold equally many. */
__global__ void __launch_bounds__(THREADS)
    copy_kernel(const __grid_constant__ bnbq_tensor from, const __grid_constant__ bnbq_tensor to,
                int64_t count) {
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count;
         i += (int64_t)gridDim.x * THREADS)
        store_float(to.data, to.dtype, offset_of(to, i),
                    load_float(from.data, from.dtype, offset_of(from, i)));
}

bnbq_status copy_tensor(bnbq_cuda_call *call, const bnbq_tensor *from, const bnbq_tensor *to) {
    const int64_t most_blocks = 1 << 20;
    int64_t count = count_of(from), blocks = ceil_div(count, THREADS);
    return launch<copy_kernel>(call, dim3((unsigned)(blocks < most_blocks ? blocks : most_blocks)),
                               THREADS, 0, *from, *to, count);
}

/* Row-major strides. */
static bnbq_tensor packed_like(const bnbq_tensor *tensor, bnbq_dtype dtype, int64_t ld,
                               void *data) {
    bnbq_tensor packed = *tensor;
    packed.data = data;
    packed.dtype = dtype;
    int64_t stride = 1;
    for (int d = tensor->ndim - 1; d >= 0; d--) {
        packed.strides[d] = stride;
        stride *= d == tensor->ndim - 1 ? ld : tensor->shape[d];
    }
    return packed;
}

/* True if the leading dimensions are rows `*ld` apart and the last one has no gaps. */
static bool is_matrix(const bnbq_tensor *tensor, int64_t *ld) {
    int last = tensor->ndim - 1;
    if (tensor->shape[last] > 1 && tensor->strides[last] != 1)
        return false;
    *ld = tensor->shape[last];
    int64_t stride = 0; /* of the dimension before, times its size */
    for (int d = last - 1; d >= 0; d--) {
        if (tensor->shape[d] == 1)
            continue;
        if (stride == 0)
            *ld = tensor->strides[d];
        else if (tensor->strides[d] != stride)
            return false;
        stride = tensor->strides[d] * tensor->shape[d];
    }
    return *ld >= tensor->shape[last];
}

static bool is_aligned(const void *data, int64_t ld, int64_t rows, size_t size) {
    return (uintptr_t)data % 16 == 0 && (rows == 1 || (size_t)ld * size % 16 == 0);
}

bnbq_status load_matrix(bnbq_cuda_call *call, const bnbq_tensor *tensor, bnbq_dtype dtype,
                        matrix *result) {
    int64_t cols = tensor->shape[tensor->ndim - 1], count = count_of(tensor), ld;
    int64_t size = (int64_t)bnbq_dtype_size(dtype), rows = cols ? count / cols : 0;
    if (tensor->dtype == dtype && is_matrix(tensor, &ld) &&
        is_aligned(tensor->data, ld, rows, (size_t)size)) {
        *result = {tensor->data, dtype, rows, cols, ld};
        return BNBQ_OK;
    }
    ld = ceil_div(cols * size, 16) * 16 / size;
    char *space;
    TRY(get_space(call, rows * ld * size, &space));
    bnbq_tensor to = packed_like(tensor, dtype, ld, space);
    *result = {space, dtype, rows, cols, ld};
    return copy_tensor(call, tensor, &to);
}

bnbq_status open_result(bnbq_cuda_call *call, const bnbq_tensor *tensor, matrix *result) {
    int64_t cols = tensor->shape[tensor->ndim - 1], count = count_of(tensor), ld;
    void *data = tensor->data;
    if (!is_matrix(tensor, &ld)) {
        char *space;
        TRY(get_space(call, count * (int64_t)bnbq_dtype_size(tensor->dtype), &space));
        data = space;
        ld = cols;
    }
    *result = {data, tensor->dtype, cols ? count / cols : 0, cols, ld};
    return BNBQ_OK;
}

bnbq_status close_result(bnbq_cuda_call *call, const matrix *result, const bnbq_tensor *tensor) {
    if (result->data == tensor->data)
        return BNBQ_OK;
    bnbq_tensor from = packed_like(tensor, tensor->dtype, result->ld, result->data);
    return copy_tensor(call, &from, tensor);
}

static bool is_flat(const bnbq_tensor *tensor) {
    int64_t cols = tensor->shape[tensor->ndim - 1], ld;
    return count_of(tensor) == 0 ||
           (is_matrix(tensor, &ld) && (ld == cols || count_of(tensor) == cols));
}

static bnbq_tensor flat_like(const bnbq_tensor *tensor, void *data) {
    return packed_like(tensor, tensor->dtype, tensor->shape[tensor->ndim - 1], data);
}

bnbq_status open_flat(bnbq_cuda_call *call, const bnbq_tensor *tensor, void **data) {
    *data = tensor->data;
    if (is_flat(tensor))
        return BNBQ_OK;
    char *space;
    TRY(get_space(call, count_of(tensor) * (int64_t)bnbq_dtype_size(tensor->dtype), &space));
    *data = space;
    return BNBQ_OK;
}

bnbq_status close_flat(bnbq_cuda_call *call, void *data, const bnbq_tensor *tensor) {
    if (data == tensor->data)
        return BNBQ_OK;
    bnbq_tensor from = flat_like(tensor, data);
    return copy_tensor(call, &from, tensor);
}

bnbq_status load_flat(bnbq_cuda_call *call, const bnbq_tensor *tensor, const void **data) {
    void *space;
    TRY(open_flat(call, tensor, &space));
    *data = space;
    if (space == tensor->data)
        return BNBQ_OK;
    bnbq_tensor to = flat_like(tensor, space);
    return copy_tensor(call, tensor, &to);
}

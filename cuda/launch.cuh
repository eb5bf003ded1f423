/* launch.cuh - the host side of this folder: launching, working space, and tensors as matrices. */
#ifndef BNBQ_LAUNCH_CUH
#define BNBQ_LAUNCH_CUH

#include "device.cuh"

extern "C" {
#include "bnbq_cuda.h"
#include "formats.h"
}

#include <atomic>
#include <utility>

/* Go on if it is BNBQ_OK, otherwise return what went wrong. */
#define TRY(expression)                                                                            \
    do {                                                                                           \
        bnbq_status try_status = (expression);                                                     \
        if (try_status != BNBQ_OK)                                                                 \
            return try_status;                                                                     \
    } while (0)

#ifdef BNBQ_EMULATE
#define BOTH static inline
#else
#define BOTH static inline __host__ __device__
#endif

BOTH int64_t lesser(int64_t a, int64_t b) {
    return a < b ? a : b;
}
BOTH int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

/* The call's device for as long as this lives. */
class device_guard {
  public:
    explicit device_guard(bnbq_cuda_call *call);
    ~device_guard();
    bnbq_status status;

  private:
    int previous;
};

struct device_facts {
    int capability;      /* 10 * major + minor */
    int multiprocessors; /* of the device */
    int shared_limit;    /* bytes of shared memory that a block may ask for */
};

/* Asked of the driver once per device. */
bnbq_status get_facts(bnbq_cuda_call *call, device_facts *facts);

/* BNBQ_CUDA_WGMMA=1: kernels with the warpgroup products of 9.0. Off until somebody has seen them
 * right on a GPU, since the emulator's idea of these comes from the same reading of the manual as
 * the kernels. */
bool wgmma_is_on();

/* For launch() below. */
bnbq_status launch_kernel(bnbq_cuda_call *call, const void *kernel, std::atomic<uint64_t> *prepared,
                          dim3 grid, unsigned threads, size_t shared, void **arguments);

/* Run kernel<<<grid, threads, shared>>>(arguments...) on the call's stream. An empty grid is no
 * work. At most 2^31 - 1 blocks along x and 65535 along y and z. */
template <auto KERNEL, class... P, class... A>
bnbq_status launch_as(void (*)(P...), bnbq_cuda_call *call, dim3 grid, unsigned threads,
                      size_t shared, A... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0)
        return BNBQ_OK;
#ifdef BNBQ_EMULATE
    emulator::last_call = {call->device, call->stream, call->batch_invariant};
    if (emulator::next_failure)
        return launch_kernel(call, nullptr, nullptr, grid, threads, shared, nullptr);
    emulator::run(__PRETTY_FUNCTION__, grid, dim3(threads), shared,
                  [&] { KERNEL(P(arguments)...); });
    return BNBQ_OK;
#else
    static std::atomic<uint64_t> prepared; /* devices on which it may use much shared memory */
    return [&](P... values) {
        void *pointers[] = {(void *)&values...};
        return launch_kernel(call, (const void *)KERNEL, &prepared, grid, threads, shared,
                             pointers);
    }(P(arguments)...);
#endif
}

template <auto KERNEL, class... A>
bnbq_status launch(bnbq_cuda_call *call, dim3 grid, unsigned threads, size_t shared,
                   A... arguments) {
    return launch_as<KERNEL>(KERNEL, call, grid, threads, shared, arguments...);
}

template <class T> bnbq_status get_space(bnbq_cuda_call *call, int64_t count, T **space) {
    *space = (T *)call->allocate(call->owner, (size_t)(count ? count : 1) * sizeof(T));
    return *space ? BNBQ_OK : BNBQ_NO_MEMORY;
}

/* copy.cu: the same shape, any strides, any float dtypes; rounded to nearest even. */
bnbq_status copy_tensor(bnbq_cuda_call *call, const bnbq_tensor *from, const bnbq_tensor *to);

/* A matrix with contiguous rows: what the kernels take. */
struct matrix {
    void *data;
    bnbq_dtype dtype;
    int64_t rows, cols, ld; /* elements */
};

/* The tensor as a matrix of that dtype whose rows start at multiples of 16 bytes: where it lies if
 * it is one, otherwise a copy. */
bnbq_status load_matrix(bnbq_cuda_call *call, const bnbq_tensor *tensor, bnbq_dtype dtype,
                        matrix *result);
/* A contiguous matrix for results: the tensor itself where it is one. */
bnbq_status open_result(bnbq_cuda_call *call, const bnbq_tensor *tensor, matrix *result);
/* After the last kernel that writes to it. */
bnbq_status close_result(bnbq_cuda_call *call, const matrix *result, const bnbq_tensor *tensor);
/* The tensor's elements in row-major order without gaps: where it lies, or a copy. */
bnbq_status load_flat(bnbq_cuda_call *call, const bnbq_tensor *tensor, const void **data);
/* Such space for results, and after the last kernel that writes to it. */
bnbq_status open_flat(bnbq_cuda_call *call, const bnbq_tensor *tensor, void **data);
bnbq_status close_flat(bnbq_cuda_call *call, void *data, const bnbq_tensor *tensor);

static inline int64_t count_of(const bnbq_tensor *tensor) {
    int64_t count = 1;
    for (int d = 0; d < tensor->ndim; d++)
        count *= tensor->shape[d];
    return count;
}

/* One float of any dtype; i counts elements. */
DEVICE float load_float(const void *data, bnbq_dtype dtype, int64_t i) {
    if (dtype == BNBQ_F32)
        return ((const float *)data)[i];
    uint16_t bits = ((const uint16_t *)data)[i];
    return dtype == BNBQ_BF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}
DEVICE void store_float(void *data, bnbq_dtype dtype, int64_t i, float value) {
    if (dtype == BNBQ_F32)
        ((float *)data)[i] = value;
    else
        ((uint16_t *)data)[i] =
            (uint16_t)(dtype == BNBQ_BF16 ? pack_bf16(value, 0.0f) : pack_f16(value, 0.0f));
}

#endif

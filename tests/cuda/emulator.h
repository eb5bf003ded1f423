/* emulator.h - enough of a GPU, on the CPU, to run the kernels of cuda/ unchanged.
 *
 * Each thread of a block is a fiber with a stack of its own; barriers and warp collectives are
 * where fibers wait for one another. Between those a fiber runs alone, so a race shows as a wrong
 * result under one order of fibers or another: emulator_set_order() picks the order, and tests run
 * several. What the hardware leaves open is taken at its worst:
 *   - asynchronous copies and products happen when they are waited for, not before;
 *   - shared memory starts as NaN, has exactly the size that was asked for, and is a heap block of
 *     its own, as are tensors: AddressSanitizer sees every access past an end;
 *   - misaligned accesses, barriers that some threads never reach, blocks that are too large for
 *     the device, are errors that end the process with a message.
 * Blocks run one after the other, so kernels whose blocks wait for each other cannot run here.
 */
#ifndef BNBQ_EMULATOR_H
#define BNBQ_EMULATOR_H

#include <stddef.h>
#include <stdint.h>

#include <functional>

#include "float16.h"

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace emulator {

extern dim3 thread, block, block_size, grid_size; /* of the fiber that runs */

[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
int lane();
void *shared_memory();
void sync_threads();
void sync_warp();
uint32_t shuffle(uint32_t value, int lane);
uint32_t vote(bool predicate);
void mma_16bit(float d[4], const uint32_t a[4], const uint32_t b[2], float (*widen)(uint16_t));
void mma_s8(int32_t d[4], const uint32_t a[4], const uint32_t b[2]);
void load_matrix(uint32_t *fragment, int matrices, const void *row);
void copy_async(void *shared, const void *global, bool valid);
void commit_copies();
void wait_copies(int pending);
/* Warpgroup products of hopper.cuh. d and a are where they will be when they are needed. */
uint32_t shared_offset(const void *shared);
void fence_async_proxy();
void product_16bit(float *d, int columns, const uint32_t *a, uint64_t b, float (*widen)(uint16_t));
void product_s8(int32_t *d, int columns, uint64_t a, uint64_t b);
void commit_products();
void wait_products(int pending);
/* Run a grid to its end; `thread` is the kernel with its arguments. */
void run(const char *name, dim3 grid, dim3 block, size_t shared,
         const std::function<void()> &thread);

template <class T> T *aligned(const void *address) {
    if ((uintptr_t)address % alignof(T) != 0)
        fail("an access of %zu bytes at a misaligned address", sizeof(T));
    return (T *)address;
}

} // namespace emulator

#define threadIdx emulator::thread
#define blockIdx emulator::block
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

/* What the tests set. Orders: 0 ascending, 1 descending, n: shuffled by that seed. */
extern "C" {
void emulator_set_order(uint32_t order);
void emulator_set_device(int compute_capability, int processors, size_t shared_limit);
void emulator_fail_next_launch(const char *message); /* once; a string that stays */
int64_t emulator_launches(void);                     /* so far */
/* What the latest launch was given. */
void emulator_last_call(int *device, void **stream, bool *batch_invariant);
}

namespace emulator {
struct device {
    int compute_capability, processors;
    size_t shared_limit;
};
struct call {
    int device;
    void *stream;
    bool batch_invariant;
};
extern device current_device;
extern call last_call;
extern const char *next_failure;
} // namespace emulator

#endif

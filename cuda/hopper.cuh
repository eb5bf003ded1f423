/* hopper.cuh - the warpgroup product of compute capability 9.0, in the manner of device.cuh.
 *
 * A warpgroup is four neighbouring warps of a block, the first one's index a multiple of four. Its
 * product D[64, N] += A[64, K] . B[K, N] has K = 16 for 16-bit floats and 32 for int8. Warp w of
 * the group holds rows 16w .. 16w + 15 of D, and of A if A is in registers, as fragments of
 * mma.m16n8k16: d[4j .. 4j + 3] are those of columns 8j .. 8j + 7.
 *
 * A tile in shared memory has rows of 128 bytes along K (one row of A per row, one column of B per
 * row), 1024-byte aligned, in which 16-byte chunk c of row r lies at chunk c ^ (r % 8): the
 * "128-byte swizzle" of the PTX manual, K-major.
 *
 * Products are asynchronous: between issue and wait_products neither the tiles, nor d, nor a
 * fragment may be touched. What ordinary stores and cp.async wrote to a tile is seen by products
 * only after fence_async_proxy() in the writing thread and a barrier.
 */
#ifndef BNBQ_HOPPER_CUH
#define BNBQ_HOPPER_CUH

#include "device.cuh"

#if defined(BNBQ_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_WGMMA 1
#else
#define HAS_WGMMA 0
#endif

enum { TILE_BYTES = 128, SWIZZLE_ATOM = 1024 };

/* Byte offset in a tile of 16-byte chunk `chunk` of row `row`. */
DEVICE int swizzled(int row, int chunk) {
    return row * TILE_BYTES + (chunk ^ (row & 7)) * 16;
}

/* Bits 0-13 address / 16, 16-29 leading offset (unused in this layout, 1), 32-45 bytes between
 * groups of eight rows / 16, 62-63 layout: 1 is the 128-byte swizzle. */
DEVICE uint64_t tile_descriptor(uint32_t address) {
    return (uint64_t)(address >> 4 & 0x3fff) | UINT64_C(1) << 16 |
           (uint64_t)(SWIZZLE_ATOM >> 4) << 32 | UINT64_C(1) << 62;
}
/* The descriptor for the k-th 32 bytes of the rows: K = 16 of 16 bits, 32 of 8. */
DEVICE uint64_t step_descriptor(uint64_t tile, int step) {
    return tile + 2 * (uint64_t)step;
}

#ifdef BNBQ_EMULATE

DEVICE uint32_t shared_address(const void *shared) {
    return emulator::shared_offset(shared);
}
DEVICE int reread_thread() {
    return (int)threadIdx.x;
}
DEVICE void fence_async_proxy() {
    emulator::fence_async_proxy();
}
DEVICE void fence_products() {}
DEVICE void commit_products() {
    emulator::commit_products();
}
template <int PENDING> DEVICE void wait_products() {
    emulator::wait_products(PENDING);
}
template <int N> DEVICE void pin(float (&)[N]) {}
template <int N> DEVICE void pin(int32_t (&)[N]) {}
template <bool BF16, int N>
DEVICE void multiply_floats(float (&d)[N], const uint32_t (&a)[4], uint64_t b) {
    emulator::product_16bit(d, 2 * N, a, b, BF16 ? bnbq_bf16_to_f32 : bnbq_f16_to_f32);
}
template <int N> DEVICE void multiply_s8(int32_t (&d)[N], uint64_t a, uint64_t b) {
    emulator::product_s8(d, 2 * N, a, b);
}

#else

DEVICE uint32_t shared_address(const void *shared) {
    return (uint32_t)__cvta_generic_to_shared(shared);
}
/* threadIdx.x anew, so that nothing that is computed from it takes registers before. */
DEVICE int reread_thread() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}
DEVICE void fence_async_proxy() {
#if HAS_WGMMA
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
/* Warpgroup: registers written before are seen by the products after. */
DEVICE void fence_products() {
#if HAS_WGMMA
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
/* Warpgroup: the products since the last call are a group. */
DEVICE void commit_products() {
#if HAS_WGMMA
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
/* Warpgroup: at most PENDING groups, the latest ones, are still under way. */
template <int PENDING> DEVICE void wait_products() {
#if HAS_WGMMA
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#endif
}
/* Keeps the compiler from moving accumulators across products that are under way. */
template <int N> DEVICE void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+f"(d[i])::"memory");
}
template <int N> DEVICE void pin(int32_t (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+r"(d[i])::"memory");
}

/* Operand lists of the products: registers %0 to %127 as text and as constraints, by 32. */
#define TEXT_0                                                                                     \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "             \
    "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TEXT_1                                                                                     \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TEXT_2                                                                                     \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define TEXT_3                                                                                     \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "             \
    "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, "               \
    "%123, %124, %125, %126, %127"
#define FOUR(kind, i) kind(d[i]), kind(d[i + 1]), kind(d[i + 2]), kind(d[i + 3])
#define EIGHT(kind, i) FOUR(kind, i), FOUR(kind, i + 4)
#define BOUND_64(kind) EIGHT(kind, 0), EIGHT(kind, 8), EIGHT(kind, 16), EIGHT(kind, 24)
#define BOUND_128(kind)                                                                            \
    BOUND_64(kind), EIGHT(kind, 32), EIGHT(kind, 40), EIGHT(kind, 48), EIGHT(kind, 56)
#define BOUND_256(kind)                                                                            \
    BOUND_128(kind), EIGHT(kind, 64), EIGHT(kind, 72), EIGHT(kind, 80), EIGHT(kind, 88),           \
        EIGHT(kind, 96), EIGHT(kind, 104), EIGHT(kind, 112), EIGHT(kind, 120)
#define TEXT_64 TEXT_0
#define TEXT_128 TEXT_0 ", " TEXT_1
#define TEXT_256 TEXT_0 ", " TEXT_1 ", " TEXT_2 ", " TEXT_3

#define FLOAT_PRODUCT(columns, type, a0, a1, a2, a3, tile)                                         \
    asm volatile("{ .reg .pred add; setp.eq.u32 add, 0, 0;\n"                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type             \
                 " {" TEXT_##columns "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " tile                  \
                                     ", add, 1, 1, 0; }"                                           \
                 : BOUND_##columns("+f")                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define S8_PRODUCT(columns, tile_a, tile_b)                                                        \
    asm volatile("{ .reg .pred add; setp.eq.u32 add, 0, 0;\n"                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k32.s32.s8.s8"                      \
                 " {" TEXT_##columns "}, " tile_a ", " tile_b ", add; }"                           \
                 : BOUND_##columns("+r")                                                           \
                 : "l"(a), "l"(b))

/* Warpgroup: d += A . B in fp32 with A in registers; N accumulators are 2 * N columns. */
template <bool BF16, int N>
DEVICE void multiply_floats(float (&d)[N], const uint32_t (&a)[4], uint64_t b) {
    static_assert(N == 32 || N == 64 || N == 128, "64, 128 or 256 columns");
#if HAS_WGMMA
    if constexpr (N == 32) {
        if constexpr (BF16)
            FLOAT_PRODUCT(64, "bf16", "%32", "%33", "%34", "%35", "%36");
        else
            FLOAT_PRODUCT(64, "f16", "%32", "%33", "%34", "%35", "%36");
    } else if constexpr (N == 64) {
        if constexpr (BF16)
            FLOAT_PRODUCT(128, "bf16", "%64", "%65", "%66", "%67", "%68");
        else
            FLOAT_PRODUCT(128, "f16", "%64", "%65", "%66", "%67", "%68");
    } else {
        if constexpr (BF16)
            FLOAT_PRODUCT(256, "bf16", "%128", "%129", "%130", "%131", "%132");
        else
            FLOAT_PRODUCT(256, "f16", "%128", "%129", "%130", "%131", "%132");
    }
#endif
}
/* Warpgroup: d += A . B in int32, both operands tiles. */
template <int N> DEVICE void multiply_s8(int32_t (&d)[N], uint64_t a, uint64_t b) {
    static_assert(N == 32 || N == 64 || N == 128, "64, 128 or 256 columns");
#if HAS_WGMMA
    if constexpr (N == 32)
        S8_PRODUCT(64, "%32", "%33");
    else if constexpr (N == 64)
        S8_PRODUCT(128, "%64", "%65");
    else
        S8_PRODUCT(256, "%128", "%129");
#endif
}

#endif

#endif

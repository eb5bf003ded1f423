/* device.cuh - what the kernels use of the GPU: one function per instruction, nothing else.
 *
 * Every function has two bodies: the PTX, and the same in plain C++ for the emulator
 * (tests/cuda/emulator.h), which runs the kernels of this folder on a CPU. So kernels use these
 * functions for everything that C++ does not have, no CUDA header, and shared memory only through
 * shared_memory().
 *
 * Functions that say "warp" are collective: all 32 lanes call them. Fragments are those of the PTX
 * manual, "Matrix fragments for mma.m16n8k16" and ".m16n8k32": with g = lane / 4 and t = lane % 4
 *   A  rows g and g + 8; a[0] (g, low k), a[1] (g + 8, low k), a[2] (g, high k), a[3] (g + 8, high
 * k) B  column g; b[0] low k, b[1] high k D  d[0], d[1] = row g, columns 2t and 2t + 1; d[2], d[3]
 * = row g + 8 where a word holds k = 2t, 2t + 1 (16-bit) or 4t .. 4t + 3 (8-bit), + half of k if
 * high.
 */
#ifndef BNBQ_DEVICE_CUH
#define BNBQ_DEVICE_CUH

#include <stdint.h>
#include <string.h>

#ifdef BNBQ_EMULATE
#include "emulator.h"
#define DEVICE static inline
#else
#include <cuda_runtime.h>
#define DEVICE static __device__ __forceinline__
#endif

/* mma.m16n8k16 of 16-bit floats and cp.async came with 8.0; below it kernels that use them are
 * empty and never launched. */
#if defined(BNBQ_EMULATE) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800)
#define HAS_MMA 1
#else
#define HAS_MMA 0
#endif

enum { WARP = 32 };

#ifdef BNBQ_EMULATE

/* ---------------------------------------------------------------- the emulator's bodies */

DEVICE void *shared_memory() {
    return emulator::shared_memory();
}
DEVICE void sync_threads() {
    emulator::sync_threads();
}
DEVICE void sync_warp() {
    emulator::sync_warp();
}
DEVICE uint32_t shuffle(uint32_t value, int lane) {
    return emulator::shuffle(value, lane & 31);
}
DEVICE uint32_t shuffle_xor(uint32_t value, int mask) {
    return emulator::shuffle(value, emulator::lane() ^ mask);
}
DEVICE uint32_t vote(bool predicate) {
    return emulator::vote(predicate);
}
DEVICE uint32_t float_bits(float value) {
    return bnbq_bits(value);
}
DEVICE float bits_float(uint32_t bits) {
    return bnbq_float(bits);
}
DEVICE float mul_rn(float a, float b) {
    return a * b; /* compiled with -ffp-contract=off */
}
DEVICE float add_rn(float a, float b) {
    return a + b;
}
DEVICE double add_rn_f64(double a, double b) {
    return a + b;
}
DEVICE float div_rn(float a, float b) {
    return a / b;
}
DEVICE double div_rn_f64(double a, double b) {
    return a / b;
}
DEVICE float reciprocal_rn(float a) {
    return 1.0f / a;
}
DEVICE int32_t round_to_int(float value) {
    return (int32_t)__builtin_rintf(value);
}
DEVICE uint32_t floor_of_product(float a, float b) {
    double product = __builtin_floor((double)a * b); /* exact */
    return 0x4b400000u + (uint32_t)(__builtin_fabs(product) < 0x1p22 ? (int32_t)product : 0);
}
DEVICE uint32_t pack_bf16(float low, float high) {
    return bnbq_f32_to_bf16(low) | (uint32_t)bnbq_f32_to_bf16(high) << 16;
}
DEVICE uint32_t pack_f16(float low, float high) {
    return bnbq_f32_to_f16(low) | (uint32_t)bnbq_f32_to_f16(high) << 16;
}
DEVICE float f16_to_f32(uint16_t value) {
    return bnbq_f16_to_f32(value);
}
DEVICE int32_t dot_s8(uint32_t a, uint32_t b, int32_t sum) {
    for (int i = 0; i < 32; i += 8)
        sum += (int8_t)(a >> i) * (int8_t)(b >> i);
    return sum;
}
DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++)
        result |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}
DEVICE void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    emulator::mma_16bit(d, a, b, bnbq_bf16_to_f32);
}
DEVICE void mma_f16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    emulator::mma_16bit(d, a, b, bnbq_f16_to_f32);
}
DEVICE void mma_s8(int32_t d[4], const uint32_t a[4], const uint32_t b[2]) {
    emulator::mma_s8(d, a, b);
}
DEVICE void load_matrix4(uint32_t fragment[4], const void *row) {
    emulator::load_matrix(fragment, 4, row);
}
DEVICE void load_matrix2(uint32_t fragment[2], const void *row) {
    emulator::load_matrix(fragment, 2, row);
}
DEVICE uint32_t load_read_only32(const void *global) {
    return *emulator::aligned<const uint32_t>(global);
}
DEVICE uint32_t load_stream32(const void *global) {
    return *emulator::aligned<const uint32_t>(global);
}
DEVICE uint2 load_stream64(const void *global) {
    return *emulator::aligned<const uint2>(global);
}
DEVICE uint4 load_stream128(const void *global) {
    return *emulator::aligned<const uint4>(global);
}
DEVICE void copy_async16(void *shared, const void *global, bool valid) {
    emulator::copy_async(shared, global, valid);
}
DEVICE void copy_async16_cached(void *shared, const void *global, bool valid) {
    emulator::copy_async(shared, global, valid);
}
DEVICE void commit_copies() {
    emulator::commit_copies();
}
template <int PENDING> DEVICE void wait_copies() {
    emulator::wait_copies(PENDING);
}
template <class T> DEVICE T *opaque(T *pointer) {
    return pointer;
}
DEVICE uint32_t opaque(uint32_t value) {
    return value;
}
DEVICE uint32_t atomic_or(uint32_t *address, uint32_t bits) {
    uint32_t old = *address;
    *address = old | bits;
    return old;
}

#else

/* ---------------------------------------------------------------- the GPU's */

/* Dynamic shared memory, 1024-byte aligned; its size is an argument of launch(). */
DEVICE void *shared_memory() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return memory;
}
DEVICE void sync_threads() {
    __syncthreads();
}
DEVICE void sync_warp() {
    __syncwarp();
}
/* Warp: the value of that lane. */
DEVICE uint32_t shuffle(uint32_t value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}
DEVICE uint32_t shuffle_xor(uint32_t value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
DEVICE uint32_t vote(bool predicate) {
    return __ballot_sync(0xffffffffu, predicate);
}
DEVICE uint32_t float_bits(float value) {
    return __float_as_uint(value);
}
DEVICE float bits_float(uint32_t bits) {
    return __uint_as_float(bits);
}
/* Arithmetic that defines stored bytes: one IEEE rounding each, never fused, subnormals kept. */
DEVICE float mul_rn(float a, float b) {
    return __fmul_rn(a, b);
}
DEVICE float add_rn(float a, float b) {
    return __fadd_rn(a, b);
}
DEVICE double add_rn_f64(double a, double b) {
    return __dadd_rn(a, b);
}
DEVICE float div_rn(float a, float b) {
    return __fdiv_rn(a, b);
}
DEVICE double div_rn_f64(double a, double b) {
    return __ddiv_rn(a, b);
}
DEVICE float reciprocal_rn(float a) {
    return __frcp_rn(a);
}
/* In the lowest 22 bits, for |a * b| < 2^21: a quarter of the cost of a conversion. */
DEVICE uint32_t floor_of_product(float a, float b) {
    return __float_as_uint(__fmaf_rd(a, b, 12582912.0f)); /* 1.5 * 2^23 */
}
/* Ties to even; |value| < 2^31. */
DEVICE int32_t round_to_int(float value) {
    return __float2int_rn(value);
}
/* Two 16-bit floats in a word, each rounded to nearest even. */
DEVICE uint32_t pack_bf16(float low, float high) {
#if __CUDA_ARCH__ >= 800
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    uint32_t word = 0;
    float values[2] = {low, high};
    for (int i = 0; i < 2; i++) {
        uint32_t bits = __float_as_uint(values[i]);
        bool nan = (bits & 0x7fffffff) > 0x7f800000;
        uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        word |= (nan ? bits >> 16 | 0x40 : rounded) << 16 * i;
    }
    return word;
#endif
}
DEVICE uint32_t pack_f16(float low, float high) {
    uint16_t a, b;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(a) : "f"(low));
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b) : "f"(high));
    return a | (uint32_t)b << 16;
}
DEVICE float f16_to_f32(uint16_t value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
    return result;
}
/* sum + the four products of the signed bytes. */
DEVICE int32_t dot_s8(uint32_t a, uint32_t b, int32_t sum) {
    return __dp4a((int32_t)a, (int32_t)b, sum);
}
/* Byte i of the result is byte (selector >> 4i & 7) of a (0..3) and b (4..7). */
DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}
#if HAS_MMA
#define MMA(shape, types, kind)                                                                    \
    asm volatile("mma.sync.aligned." shape ".row.col." types                                       \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                \
                 : kind(d[0]), kind(d[1]), kind(d[2]), kind(d[3])                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#else
#define MMA(shape, types, kind)
#endif
/* Warp: d += A . B in fp32, or in int32; fragments as above. */
DEVICE void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    MMA("m16n8k16", "f32.bf16.bf16.f32", "+f");
}
DEVICE void mma_f16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    MMA("m16n8k16", "f32.f16.f16.f32", "+f");
}
DEVICE void mma_s8(int32_t d[4], const uint32_t a[4], const uint32_t b[2]) {
    MMA("m16n8k32", "s32.s8.s8.s32", "+r");
}
#undef MMA
/* Warp: fragment[i] is word t of row g of the i-th matrix of 8 rows of 16 bytes; lane 8i + r gives
 * the shared address of row r of matrix i. */
DEVICE void load_matrix4(uint32_t fragment[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}
DEVICE void load_matrix2(uint32_t fragment[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}
/* A word that no kernel in flight writes and whose neighbours are read soon: it stays in L1. */
DEVICE uint32_t load_read_only32(const void *global) {
    uint32_t word;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(word) : "l"(global));
    return word;
}
/* Bytes that are read once and that no kernel in flight writes: weights. */
DEVICE uint32_t load_stream32(const void *global) {
    uint32_t word;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(word) : "l"(global));
    return word;
}
DEVICE uint2 load_stream64(const void *global) {
    uint2 words;
#if __CUDA_ARCH__ >= 800
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words.x), "=r"(words.y)
                 : "l"(global));
#else
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words.x), "=r"(words.y)
                 : "l"(global));
#endif
    return words;
}
DEVICE uint4 load_stream128(const void *global) {
    uint4 words;
#if __CUDA_ARCH__ >= 800
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(global));
#else
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(global));
#endif
    return words;
}
/* 16 bytes to shared memory, or zeros if not valid (`global` is then not read, but must be an
 * address of the tensor). Both 16-byte aligned. Done when wait_copies says so and, for other
 * threads' copies, after a barrier behind it. */
DEVICE void copy_async16(void *shared, const void *global, bool valid) {
#if HAS_MMA
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(shared)),
                 "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
#endif
}
/* The same by way of the L1 cache: for what other blocks of this multiprocessor will copy too. */
DEVICE void copy_async16_cached(void *shared, const void *global, bool valid) {
#if HAS_MMA
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(shared)),
                 "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
#endif
}
/* The copies of this thread since the last call are a group. */
DEVICE void commit_copies() {
#if HAS_MMA
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
/* At most PENDING of this thread's groups, the latest ones, are still under way. */
template <int PENDING> DEVICE void wait_copies() {
#if HAS_MMA
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}
/* The value, without the compiler's knowledge of how it was computed: it otherwise computes it
 * again at each use, or takes it apart and adds the part that all lanes share at each access. */
template <class T> DEVICE T *opaque(T *pointer) {
    asm("" : "+l"(pointer));
    return pointer;
}
DEVICE uint32_t opaque(uint32_t value) {
    asm("" : "+r"(value));
    return value;
}
DEVICE uint32_t atomic_or(uint32_t *address, uint32_t bits) {
    return atomicOr(address, bits);
}

#endif

/* ---------------------------------------------------------------- both */

DEVICE float bf16_to_f32(uint16_t value) {
    return bits_float((uint32_t)value << 16);
}
/* Warp: the greatest of 2 * mask neighbours' values; NaN is greater than any number. `bits` are
 * those of floats without their sign, which compare as integers do. */
DEVICE uint32_t greatest_of(uint32_t bits, int lanes) {
    for (int mask = 1; mask < lanes; mask *= 2) {
        uint32_t other = shuffle_xor(bits, mask);
        bits = other > bits ? other : bits;
    }
    return bits;
}
DEVICE float shuffle_float(float value, int lane) {
    return bits_float(shuffle(float_bits(value), lane));
}
DEVICE float shuffle_xor_float(float value, int mask) {
    return bits_float(shuffle_xor(float_bits(value), mask));
}

DEVICE double shuffle_double(double value, int lane) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits = (uint64_t)shuffle((uint32_t)(bits >> 32), lane) << 32 | shuffle((uint32_t)bits, lane);
    memcpy(&value, &bits, sizeof bits);
    return value;
}

#endif

/* selftest.cpp - the emulator itself: that it computes what the PTX manual says, and that it sees
 * what is wrong with a kernel. One case per run: ./selftest CASE ORDER */
#include "launch.cuh"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { THREADS = 64 };

static uint32_t noise(uint32_t i) {
    return (i * 2654435761u) >> 7;
}

/* ---------------------------------------------------------------- fragments
 *
 * One warp multiplies A[16, 16] by B[16, 8], or A[16, 32] by B[32, 8] in 8 bits, with operands put
 * into fragments element by element, from the manual's formulas and not the emulator's. */

static __global__ void multiply_16bit(const float *a, const float *b, float *d) {
    int g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4;
    uint32_t fa[4], fb[2];
    for (int i = 0; i < 4; i++) { /* row = g + 8 (i odd), k = 2t + 8 (i >= 2) */
        const float *at = a + (g + 8 * (i & 1)) * 16 + 2 * t + 8 * (i >> 1);
        fa[i] = pack_bf16(at[0], at[1]);
    }
    for (int i = 0; i < 2; i++)
        fb[i] = pack_bf16(b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 8 * i + 1) * 8 + g]);
    float sum[4] = {1, 1, 1, 1};
    mma_bf16(sum, fa, fb);
    for (int i = 0; i < 4; i++)
        d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

static __global__ void multiply_8bit(const int8_t *a, const int8_t *b, int32_t *d) {
    int g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4;
    uint32_t fa[4] = {0, 0, 0, 0}, fb[2] = {0, 0};
    for (int j = 0; j < 4; j++) {
        for (int i = 0; i < 4; i++)
            fa[i] |= (uint32_t)(uint8_t)a[(g + 8 * (i & 1)) * 32 + 4 * t + j + 16 * (i >> 1)]
                     << 8 * j;
        for (int i = 0; i < 2; i++)
            fb[i] |= (uint32_t)(uint8_t)b[(4 * t + j + 16 * i) * 8 + g] << 8 * j;
    }
    int32_t sum[4] = {1, 1, 1, 1};
    mma_s8(sum, fa, fb);
    for (int i = 0; i < 4; i++)
        d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

static int check_fragments(bnbq_cuda_call *call) {
    float a[16 * 16], b[16 * 8], d[16 * 8];
    int8_t a8[16 * 32], b8[32 * 8];
    int32_t d8[16 * 8];
    for (uint32_t i = 0; i < 512; i++) { /* values that bf16 holds, so that sums are exact */
        if (i < 256)
            a[i] = (float)(noise(i) % 256) - 128;
        if (i < 128)
            b[i] = (float)(noise(i + 999) % 256) - 128;
        a8[i] = (int8_t)noise(i);
        if (i < 256)
            b8[i] = (int8_t)noise(i + 999);
    }
    launch<multiply_16bit>(call, dim3(1), WARP, 0, a, b, d);
    launch<multiply_8bit>(call, dim3(1), WARP, 0, a8, b8, d8);
    for (int row = 0; row < 16; row++) {
        for (int column = 0; column < 8; column++) {
            float sum = 1;
            int32_t sum8 = 1;
            for (int k = 0; k < 16; k++)
                sum += a[row * 16 + k] * b[k * 8 + column];
            for (int k = 0; k < 32; k++)
                sum8 += a8[row * 32 + k] * b8[k * 8 + column];
            if (sum != d[row * 8 + column] || sum8 != d8[row * 8 + column])
                return 1;
        }
    }
    return 0;
}

/* ldmatrix and cp.async: 32 rows of 8 16-bit elements, matrix i holds rows 8i to 8i + 7. */
static __global__ void stage_matrices(const uint16_t *rows, uint32_t *fragments) {
    char *shared = (char *)shared_memory();
    int lane = (int)threadIdx.x;
    copy_async16(shared + lane * 16, rows + lane * 8, lane != 5);
    commit_copies();
    wait_copies<0>();
    sync_warp();
    uint32_t fragment[4];
    load_matrix4(fragment, shared + lane * 16);
    for (int i = 0; i < 4; i++)
        fragments[i * WARP + lane] = fragment[i];
}

static int check_staging(bnbq_cuda_call *call) {
    alignas(16) uint16_t rows[32 * 8];
    uint32_t fragments[4 * WARP];
    for (uint16_t i = 0; i < 256; i++)
        rows[i] = (uint16_t)(i + 1);
    launch<stage_matrices>(call, dim3(1), WARP, 512, rows, fragments);
    for (int i = 0; i < 4 * WARP; i++) {
        int row = i / WARP * 8 + i % WARP / 4, column = i % 4 * 2;
        uint32_t low = row == 5 ? 0 : (uint32_t)rows[row * 8 + column],
                 high = row == 5 ? 0 : low + 1;
        if (fragments[i] != (low | high << 16))
            return 1;
    }
    return 0;
}

static __global__ void exchange(uint32_t *out) {
    uint32_t lane = threadIdx.x % 32, t = threadIdx.x;
    out[t] = shuffle(t, 3) + (shuffle_xor(t, 5) << 8);
    out[THREADS + t] = vote(lane % 3 == 0);
    out[2 * THREADS + t] = permute_bytes(0x33221100 + lane, 0x77665544, 0x7250);
    out[3 * THREADS + t] = (uint32_t)dot_s8(0x80ff017f, 0x7f02ff7f, 10);
    out[4 * THREADS + t] = greatest_of(t ^ 21, 8);
}

static int check_exchange(bnbq_cuda_call *call) {
    uint32_t out[5 * THREADS];
    launch<exchange>(call, dim3(1), THREADS, 0, out);
    for (uint32_t t = 0; t < THREADS; t++) {
        uint32_t warp = t / 32 * 32, lane = t % 32, greatest = 0;
        for (uint32_t i = t / 8 * 8; i < t / 8 * 8 + 8; i++)
            greatest = (i ^ 21) > greatest ? i ^ 21 : greatest;
        if (out[t] != warp + 3 + ((t ^ 5) << 8) || out[THREADS + t] != 0x49249249u ||
            out[2 * THREADS + t] != (0x77225500 | lane) ||
            out[3 * THREADS + t] != (uint32_t)(10 + 127 * 127 - 1 - 2 - 128 * 127) ||
            out[4 * THREADS + t] != greatest)
            return 1;
    }
    return 0;
}

/* ---------------------------------------------------------------- faults that must be seen */

/* Each thread reads what its neighbour wrote; without a barrier some order reads NaN. */
template <bool BARRIER> static __global__ void neighbours(float *out) {
    float *shared = (float *)shared_memory();
    shared[threadIdx.x] = (float)threadIdx.x;
    if (BARRIER)
        sync_threads();
    out[threadIdx.x] = shared[(threadIdx.x + 1) % THREADS];
}

template <bool BARRIER> static int check_neighbours(bnbq_cuda_call *call) {
    float out[THREADS];
    launch<neighbours<BARRIER>>(call, dim3(1), THREADS, THREADS * sizeof(float), out);
    for (int i = 0; i < THREADS; i++)
        if (out[i] != (float)((i + 1) % THREADS))
            return 1;
    return 0;
}

/* A copy that is read before it was waited for is not there yet. */
static __global__ void hasty(const float *in, float *out) {
    float *shared = (float *)shared_memory();
    copy_async16(shared + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
    commit_copies();
    float early = shared[4 * threadIdx.x];
    wait_copies<0>();
    out[threadIdx.x] = early;
}

static int check_hasty(bnbq_cuda_call *call) {
    alignas(16) float in[4 * WARP] = {}, out[WARP];
    launch<hasty>(call, dim3(1), WARP, sizeof in, in, out);
    return isnan(out[0]) ? 1 : 0;
}

static __global__ void divergent() {
    if (threadIdx.x != 7)
        sync_threads();
}

static __global__ void beyond_shared() {
    ((volatile char *)shared_memory())[THREADS] = 1;
}

static __global__ void misaligned(const char *bytes) {
    load_stream128(bytes + 8);
}

template <auto KERNEL, class... A>
static int run_faulty(bnbq_cuda_call *call, size_t shared, A... arguments) {
    launch<KERNEL>(call, dim3(1), THREADS, shared, arguments...);
    return 0;
}

int main(int count, char **arguments) {
    bnbq_cuda_call call = {};
    alignas(16) char bytes[64] = {};
    if (count != 3)
        return 2;
    const char *name = arguments[1];
    emulator_set_order((uint32_t)atoi(arguments[2]));
    if (!strcmp(name, "fragments"))
        return check_fragments(&call);
    if (!strcmp(name, "staging"))
        return check_staging(&call);
    if (!strcmp(name, "exchange"))
        return check_exchange(&call);
    if (!strcmp(name, "barrier"))
        return check_neighbours<true>(&call);
    if (!strcmp(name, "missing barrier"))
        return check_neighbours<false>(&call);
    if (!strcmp(name, "hasty"))
        return check_hasty(&call);
    if (!strcmp(name, "divergent barrier"))
        return run_faulty<divergent>(&call, 0);
    if (!strcmp(name, "beyond shared memory"))
        return run_faulty<beyond_shared>(&call, THREADS);
    if (!strcmp(name, "misaligned"))
        return run_faulty<misaligned>(&call, 0, (const char *)bytes);
    if (!strcmp(name, "too much shared memory"))
        return run_faulty<beyond_shared>(&call, 1 << 20);
    return 2;
}

/* checkasm.c - compares one table of each family with the scalar one, slot by slot.
 *
 *     cc -DCHECK_Q4=bnbq_q4_neon -DCHECK_S8=bnbq_s8_neon -DCHECK_W4A8=bnbq_w4a8_scalar checkasm.c
 *         <kernel files> formats.c -lm
 *
 * No Python and no library, so that it runs under an emulator of another processor. Integers and
 * everything that reference.py defines bit by bit must be equal; sums must lie within a bound
 * derived from their length, and must not change a bit with m, the position in the batch or the
 * cut of the work. Every buffer ends at an unreadable page (up to its alignment) and stands
 * between canaries; packed, scratch and y are filled with NaN patterns before use.
 *
 * Arguments: a file of golden vectors, the seed of the random cases (optional), their number
 * (optional). Exit status 0, or 1 after the first failure; the last line is a summary.
 */
#define _GNU_SOURCE
#include "../csrc/float16.h"
#include "../csrc/kernels.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static const bnbq_q4_kernels *const q4 = &CHECK_Q4, *const q4_scalar = &bnbq_q4_scalar;
static const bnbq_s8_kernels *const s8 = &CHECK_S8, *const s8_scalar = &bnbq_s8_scalar;
static const bnbq_w4a8_kernels *const w4a8 = &CHECK_W4A8, *const w4a8_scalar = &bnbq_w4a8_scalar;

#ifdef CHECK_TILES_RELEASED
bool amx_trap_released(void); /* amx_trap.c */
#else
static bool amx_trap_released(void) {
    return true;
}
#endif

/* ------------------------------------------------------------------ failing, random numbers */

static char current[256]; /* what runs now: printed when it crashes too */
static int64_t cases;

#define CASE(...) (cases++, snprintf(current, sizeof current, __VA_ARGS__))

static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "FAILED %s: ", current);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    exit(1);
}

static void crashed(int signal_number) {
    const char *text =
        signal_number == SIGSEGV ? "FAILED, access outside a buffer in: " : "FAILED, signal in: ";
    if (write(2, text, strlen(text)) < 0 || write(2, current, strlen(current)) < 0 ||
        write(2, "\n", 1) < 0)
        _exit(2);
    _exit(1);
}

static uint64_t state;

static uint32_t random_bits(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

static int64_t random_below(int64_t count) {
    return (int64_t)(random_bits() % (uint64_t)count);
}

static float uniform(void) {
    return (float)((int32_t)random_bits() * 0x1p-31);
}

static float normal(void) { /* near enough */
    return uniform() + uniform() + uniform();
}

/* ------------------------------------------------------------------ guarded buffers */

enum { ARENAS = 11, ARENA = 8 << 20, CANARY = 0xa5, FRONT = 512, POISON = 0xff };

static struct arena {
    uint8_t *base, *data;
    size_t size;
} arenas[ARENAS];

static size_t page;

static void create_arenas(void) {
    page = (size_t)sysconf(_SC_PAGESIZE);
    for (int i = 0; i < ARENAS; i++) {
        uint8_t *p = mmap(NULL, ARENA + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED || mprotect(p + page, ARENA, PROT_READ | PROT_WRITE))
            fail("no memory");
        arenas[i].base = p + page;
    }
}

/* `size` bytes as close to the end of arena i as the alignment allows. */
static void *guarded(int i, size_t size, size_t align) {
    struct arena *a = &arenas[i];
    if (size + FRONT + align > ARENA)
        fail("case too large: %zu bytes", size);
    a->size = size;
    a->data = a->base + (ARENA - size) / align * align;
    memset(a->data - FRONT, CANARY, FRONT);
    memset(a->data, POISON, size);
    memset(a->data + size, CANARY, (size_t)(a->base + ARENA - (a->data + size)));
    return a->data;
}

static void check_canaries(void) {
    for (int i = 0; i < ARENAS; i++) {
        const struct arena *a = &arenas[i];
        if (a->data == NULL)
            continue;
        for (const uint8_t *p = a->data - FRONT; p < a->base + ARENA; p++)
            if (p == a->data)
                p = a->data + a->size - 1;
            else if (*p != CANARY)
                fail("wrote at offset %td of buffer %d of %zu bytes", p - a->data, i, a->size);
    }
    if (!amx_trap_released())
        fail("left the tiles configured");
}

enum { IN, IN2, OUT, OUT2, WANT, WANT2, PACKED, SCRATCH, W, SCALES, ALONE };

#define FLOATS(i, count) ((float *)guarded(i, (size_t)(count)*4, 4))
#define BYTES(i, count) guarded(i, (size_t)(count), 1)

static void same(const char *what, const void *a, const void *b, size_t bytes) {
    const uint8_t *p = a, *q = b;
    for (size_t i = 0; i < bytes; i++)
        if (p[i] != q[i])
            fail("%s differs at byte %zu of %zu: %02x, want %02x", what, i, bytes, p[i], q[i]);
}

/* ------------------------------------------------------------------ q4: codes */

/* Kinds of weights that sit on the edges of the encoding. */
enum { KINDS = 8 };

static void fill_weights(float *w, int64_t count, int64_t blocksize, int kind,
                         const bnbq_format *format) {
    for (int64_t i = 0; i < count; i++) {
        switch (kind) {
        case 0: w[i] = normal(); break;
        case 1: /* blocks of very different scales, denormal to huge */
            w[i] = ldexpf(uniform(), (int)(i / blocksize * 53 % 276) - 149);
            break;
        case 2: { /* absmax 1, then each threshold and its neighbours */
            float t = format->thresholds[i % 15];
            w[i] = i % 3 == 0 ? t : nextafterf(t, i % 3 == 1 ? 2.0f : -2.0f);
            if (i % blocksize == 0 || w[i] < -1.0f)
                w[i] = 1.0f;
            break;
        }
        case 3: w[i] = i % 2 ? -0.0f : 0.0f; break;
        case 4: /* one extreme of either sign in zeros */
            w[i] = i % blocksize == blocksize / 3 ? (i / blocksize % 2 ? 3e38f : -7.5f) : 0.0f;
            break;
        case 5: { /* thresholds of any absmax: an ulp in the scaling changes a code */
            static float level;
            level = i % blocksize == 0 ? 1.5f + uniform() / 2 : level;
            w[i] = level * format->thresholds[i % 15];
            w[i] = i % blocksize == 0 || !(fabsf(w[i]) < level) ? -level : w[i];
            break;
        }
        case 6: /* what no block may hold, in some of them */
            w[i] = normal();
            if (i / blocksize % 3 == 1 && i % 7 == 5) {
                static const float odd[] = {NAN, INFINITY, -INFINITY};
                w[i] = odd[i / 7 % 3];
            }
            break;
        default: { /* absmax around the least divisor */
            static const float levels[] = {1e-38f, 1.1e-38f, 0.9e-38f, 1e-45f, FLT_MIN, FLT_MAX};
            float level = levels[i / blocksize % 6];
            w[i] = i % 5 == 0 ? level : i % 5 == 1 ? -level : level * uniform();
        }
        }
    }
}

static const char *const float_names[] = {"f32", "bf16", "f16"};

/* count values in a float dtype, at the end of buffer i. */
static void *narrowed(int i, const float *w, int64_t count, bnbq_dtype dtype) {
    void *out = guarded(i, (size_t)count * bnbq_dtype_size(dtype), bnbq_dtype_size(dtype));
    for (int64_t j = 0; j < count; j++)
        switch (dtype) {
        case BNBQ_BF16: ((uint16_t *)out)[j] = bnbq_f32_to_bf16(w[j]); break;
        case BNBQ_F16: ((uint16_t *)out)[j] = bnbq_f32_to_f16(w[j]); break;
        default: ((float *)out)[j] = w[j];
        }
    return out;
}

static void check_q4_codes(void) {
    static const int64_t blocks[] = {32, 64, 128, 256, 512, 1024, 2048, 4096};
    for (int f = 0; f < BNBQ_FORMATS; f++)
        for (int b = 0; b < 8; b++)
            for (int kind = 0; kind < KINDS; kind++)
                for (int c = 0; c < 10; c++) {
                    const bnbq_format *format = &bnbq_formats[f];
                    const int64_t bs = blocks[b];
                    const int64_t counts[10] = {
                        1,      2,           bs - 1,      bs,     bs + 1,
                        2 * bs, 3 * bs + 31, 5 * bs + 33, bs / 2, 1 + random_below(7 * bs)};
                    const int64_t count = counts[c], codes = (count + 1) / 2;
                    const int64_t scales = (count + bs - 1) / bs;
                    const bnbq_dtype dtype = (bnbq_dtype)((b + kind + c) % 3);
                    CASE("q4 quantize %s %s count %" PRId64 " blocksize %" PRId64 " kind %d",
                         format->name, float_names[dtype], count, bs, kind);
                    float *floats = FLOATS(IN, count);
                    fill_weights(floats, count, bs, kind, format);
                    const void *w = narrowed(IN2, floats, count, dtype);
                    uint8_t *got = BYTES(OUT, codes), *want = BYTES(WANT, codes);
                    float *absmax = FLOATS(OUT2, scales), *want_absmax = FLOATS(WANT2, scales);
                    q4_scalar->quantize(w, dtype, count, format, bs, want, want_absmax);
                    q4->quantize(w, dtype, count, format, bs, got, absmax);
                    same("absmax", absmax, want_absmax, (size_t)scales * 4);
                    for (int64_t i = 0; i < codes; i++)
                        if (!isfinite(absmax[2 * i / bs])) /* any code will do */
                            got[i] = want[i];
                    same("qweight", got, want, (size_t)codes);
                    check_canaries();

                    CASE("q4 dequantize %s %s count %" PRId64 " blocksize %" PRId64, format->name,
                         float_names[dtype], count, bs);
                    for (int64_t i = 0; i < codes; i++)
                        got[i] = (uint8_t)random_bits();
                    const size_t size = bnbq_dtype_size(dtype), bytes = (size_t)count * size;
                    void *out = guarded(WANT, bytes, size), *want_out = guarded(IN, bytes, size);
                    const float *codebook = format->codebook;
                    q4_scalar->dequantize(got, absmax, codebook, count, bs, dtype, want_out);
                    q4->dequantize(got, absmax, codebook, count, bs, dtype, out);
                    same("w", out, want_out, bytes);
                    check_canaries();
                }
}

/* ------------------------------------------------------------------ q4: products */

typedef struct q4_case {
    bnbq_q4_rows w;
    int64_t rows, m, ldy;
    float *x, *dense; /* dense: the weights that the product should use */
} q4_case;

enum { X_NORMAL, X_ONE_HOT, X_WIDE, X_KINDS };

static void random_rows(bnbq_q4_rows *w, int64_t rows, int64_t k, int64_t blocksize) {
    const bnbq_format *format = &bnbq_formats[random_below(BNBQ_FORMATS)];
    uint8_t *qweight = BYTES(W, rows * (k / 2));
    float *absmax = FLOATS(SCALES, rows * (k / blocksize));
    for (int64_t i = 0; i < rows * (k / 2); i++)
        qweight[i] = (uint8_t)random_bits();
    for (int64_t i = 0; i < rows * (k / blocksize); i++)
        absmax[i] = ldexpf(1.5f + uniform() / 2, (int)random_below(12) - 8);
    *w = (bnbq_q4_rows){qweight, absmax, format->codebook, k, blocksize};
}

static float to_bf16(float value) {
    return bnbq_bf16_to_f32(bnbq_f32_to_bf16(value));
}

static void linear(const bnbq_q4_linear *l, const float *x, int64_t m, const bnbq_q4_rows *w,
                   int64_t rows, float *y, int64_t ldy) {
    const int64_t k = w->k;
    void *packed = guarded(PACKED, l->packed_bytes(m, k), 64);
    for (int64_t i = 0; i < m; i++) {
        const int64_t row = m % 2 ? (i * 2 + 1) % m : m - 1 - i; /* any order will do */
        l->pack(x + row * k, row, m, k, packed);
    }
    void *scratch = guarded(SCRATCH, l->scratch_bytes(m, k), 64);
    l->run(packed, m, w, rows, y, ldy, scratch);
}

static void check_q4_linear(const char *name, const bnbq_q4_linear *l, bool bf16, int64_t m,
                            int64_t rows, int64_t k, int64_t blocksize, int kind) {
    CASE("q4 %s m %" PRId64 " rows %" PRId64 " k %" PRId64 " blocksize %" PRId64 " x kind %d", name,
         m, rows, k, blocksize, kind);
    bnbq_q4_rows w;
    random_rows(&w, rows, k, blocksize);
    float *dense = FLOATS(WANT, rows * k), *x = FLOATS(IN, m * k);
    /* Either the codebook or the weights are rounded to bf16. */
    const bool weights = q4->level == BNBQ_ISA_AMX || q4->level == BNBQ_ISA_NEONBF16;
    float codebook[16];
    for (int i = 0; i < 16; i++)
        codebook[i] = bf16 && !weights ? to_bf16(w.codebook[i]) : w.codebook[i];
    q4_scalar->dequantize(w.qweight, w.absmax, codebook, rows * k, blocksize, BNBQ_F32, dense);
    for (int64_t i = 0; bf16 && weights && i < rows * k; i++)
        dense[i] = to_bf16(dense[i]);
    for (int64_t i = 0; i < m * k; i++) {
        x[i] = kind == X_WIDE ? ldexpf(normal(), (int)random_below(80) - 40) : normal();
        x[i] = bf16 ? to_bf16(x[i]) : x[i];
        if (kind == X_ONE_HOT)
            x[i] = i % k == (i / k * 37 + m + rows) % k ? 1.0f : 0.0f;
    }
    const int64_t ldy = rows + random_below(3) * 5;
    float *y = guarded(OUT, (size_t)((m - 1) * ldy + rows) * 4, 64);
    linear(l, x, m, &w, rows, y, ldy);
    check_canaries();
    for (int64_t i = 0; i < m; i++)
        for (int64_t c = rows; c < ldy && i + 1 < m; c++)
            if (bnbq_bits(y[i * ldy + c]) != 0xffffffff)
                fail("wrote between the rows of y");
    for (int64_t i = 0; i < m; i++)
        for (int64_t r = 0; r < rows; r++) {
            double sum = 0, size = 0;
            for (int64_t j = 0; j < k; j++) {
                double product = (double)x[i * k + j] * dense[r * k + j];
                sum += product;
                size += fabs(product);
            }
            double bound = kind == X_ONE_HOT ? 0 : (k / 4 + 24) * 0x1p-24 * size;
            if (!(fabs(y[i * ldy + r] - sum) <= bound))
                fail("y[%" PRId64 ", %" PRId64 "] = %.9g, want %.9g +- %.2g", i, r,
                     (double)y[i * ldy + r], sum, bound);
        }
    /* One row alone, and one column alone, give the same bits. */
    const int64_t i = random_below(m), r = random_below(rows);
    float *alone = guarded(ALONE, (size_t)rows * 4, 64);
    linear(l, x + i * k, 1, &w, rows, alone, rows);
    same("y of a row alone", alone, y + i * ldy, (size_t)rows * 4);
    bnbq_q4_rows one = w;
    one.qweight += r * (k / 2);
    one.absmax += r * (k / blocksize);
    linear(l, x, m, &one, 1, alone = guarded(ALONE, (size_t)m * 4, 64), 1);
    for (int64_t j = 0; j < m; j++)
        same("y of one column of W^T alone", alone + j, y + j * ldy + r, 4);
    check_canaries();
}

static void check_bf16_forms(int64_t m, int64_t rows, int64_t k, int64_t blocksize, int kind) {
    static const char *const names[BNBQ_BF16_FORMS] = {"bf16[0]", "bf16[1]"};
    for (int i = 0; i < BNBQ_BF16_FORMS; i++)
        if (q4->bf16[i].min_m > 0)
            check_q4_linear(names[i], &q4->bf16[i].linear, q4->bf16[i].linear.run != q4->linear.run,
                            m, rows, k, blocksize, kind);
}

/* gx[m, cols] = gy[m, n] . dense[n, cols], and nothing written between the rows of gx. */
static void check_gradient(const float *gx, int64_t ldgx, int64_t m, int64_t cols, const float *gy,
                           int64_t ldg, int64_t n, const float *dense, int64_t ld) {
    check_canaries();
    for (int64_t j = 0; j < (m - 1) * ldgx + cols; j++) {
        const int64_t i = j / ldgx, c = j % ldgx;
        double sum = 0, size = 0;
        if (c >= cols) {
            if (bnbq_bits(gx[j]) != 0xffffffff)
                fail("wrote between the rows of gx");
            continue;
        }
        for (int64_t r = 0; r < n; r++) {
            sum += (double)gy[i * ldg + r] * dense[r * ld + c];
            size += fabs((double)gy[i * ldg + r] * dense[r * ld + c]);
        }
        if (!(fabs(gx[j] - sum) <= (double)(n + 2) * 0x1p-24 * size))
            fail("gx[%" PRId64 ", %" PRId64 "] = %.9g, want %.9g", i, c, (double)gx[j], sum);
    }
}

static void *backward_scratch(void) {
    return guarded(SCRATCH, BNBQ_BACKWARD_SCRATCH, 64);
}

static float *gradient(int64_t count, bool bf16) {
    float *gy = FLOATS(IN, count);
    for (int64_t i = 0; i < count; i++)
        gy[i] = bf16 ? to_bf16(normal()) : normal();
    return gy;
}

/* A gradient as the bf16 kernels take it: nothing behind a row is read but one zero if n is odd. */
static const uint16_t *gradient_bf16(const float *gy, int64_t ldg, int64_t m, int64_t n,
                                     int64_t *ld) {
    *ld = n + n % 2 + random_below(3);
    uint16_t *out = guarded(IN2, (size_t)((m - 1) * *ld + n + n % 2) * 2, 2);
    for (int64_t i = 0; i < m; i++) {
        for (int64_t r = 0; r < n; r++)
            out[i * *ld + r] = bnbq_f32_to_bf16(gy[i * ldg + r]);
        if (n % 2)
            out[i * *ld + n] = 0;
    }
    return out;
}

static void q4_backward(bool bf16, const float *gy, int64_t ldg, int64_t m, const bnbq_q4_rows *w,
                        int64_t n, int64_t k0, int64_t cols, float *gx, int64_t ldgx) {
    if (bf16) {
        int64_t ld;
        const uint16_t *rows = gradient_bf16(gy, ldg, m, n, &ld);
        q4->backward_bf16(rows, ld, m, w, n, k0, cols, gx, ldgx, backward_scratch());
    } else {
        q4->backward(gy, ldg, m, w, n, k0, cols, gx, ldgx, backward_scratch());
    }
}

static void check_q4_backward(bool bf16, int64_t m, int64_t n, int64_t k, int64_t blocksize,
                              int64_t k0, int64_t cols) {
    CASE("q4 backward%s m %" PRId64 " n %" PRId64 " k %" PRId64 " blocksize %" PRId64 " k0 %" PRId64
         " cols %" PRId64,
         bf16 ? "_bf16" : "", m, n, k, blocksize, k0, cols);
    bnbq_q4_rows w;
    random_rows(&w, n, k, blocksize);
    const int64_t ldg = n + random_below(3), ldgx = cols + random_below(3) * 7;
    float *dense = FLOATS(WANT, n * k), *gy = gradient((m - 1) * ldg + n, bf16);
    q4_scalar->dequantize(w.qweight, w.absmax, w.codebook, n * k, blocksize, BNBQ_F32, dense);
    for (int64_t i = 0; bf16 && i < n * k; i++)
        dense[i] = to_bf16(dense[i]);
    float *gx = guarded(OUT, (size_t)((m - 1) * ldgx + cols) * 4, 64);
    q4_backward(bf16, gy, ldg, m, &w, n, k0, cols, gx, ldgx);
    check_gradient(gx, ldgx, m, cols, gy, ldg, n, dense + k0, k);
    const int64_t step = bf16 && blocksize > 32 ? 64 : 32;
    const int64_t i = random_below(m), from = cols > step ? step : 0;
    float *alone = guarded(ALONE, (size_t)(cols - from) * 4, 64);
    q4_backward(bf16, gy + i * ldg, ldg, 1, &w, n, k0 + from, cols - from, alone, cols - from);
    same("gx of one row, cut elsewhere", alone, gx + i * ldgx + from, (size_t)(cols - from) * 4);
    check_canaries();
}

static void check_q4_products(int64_t random_cases) {
    static const int64_t ms[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96};
    static const int64_t rows[] = {1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64};
    static const int64_t ks[] = {32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 416, 512, 768};
    for (int64_t t = 0; t < random_cases; t++) {
        const int64_t m = t < 18 ? ms[t] : ms[random_below(18)];
        const int64_t n = t < 16 ? rows[15 - t] : rows[random_below(16)];
        const int64_t k = t < 14 ? ks[t] : ks[random_below(14)];
        int64_t bs = 32;
        while (k % (2 * bs) == 0 && random_below(3))
            bs *= 2;
        for (int kind = 0; kind < X_KINDS; kind++) {
            check_q4_linear("linear", &q4->linear, false, m, n, k, bs, kind);
            check_bf16_forms(m, n, k, bs, kind);
        }
        const int64_t k0 = 32 * random_below(k / 32), most = k - k0 < 256 ? k - k0 : 256;
        check_q4_backward(false, m, 1 + random_below(150), k, bs, k0,
                          t % 2 ? most : 2 + 2 * random_below(most / 2));
        const int64_t step = bs > 32 ? 64 : 32, start = k0 / step * step;
        const int64_t steps = (k - start < 256 ? k - start : 256) / step;
        if (q4->backward_bf16)
            check_q4_backward(true, m, 1 + random_below(300), k, bs, start,
                              step * (t % 2 ? steps : 1 + random_below(steps)));
    }
    check_q4_linear("linear", &q4->linear, false, 3, 64, 4096, 4096, X_ONE_HOT);
    check_bf16_forms(48, 64, 4096, 64, X_NORMAL);
    check_bf16_forms(BNBQ_TILE_M, 40, 160, 32, X_NORMAL);
    check_q4_linear("linear", &q4->linear, false, BNBQ_TILE_M, 40, 160, 32, X_NORMAL);
    for (int bf16 = 0; bf16 <= (q4->backward_bf16 != NULL); bf16++) {
        check_q4_backward(bf16, BNBQ_TILE_M, 33, 512, 64, 256, 256);
        check_q4_backward(bf16, 7, 1025, 512, 128, 0,
                          192); /* what is decoded at once, many times */
        check_q4_backward(bf16, 6, 1025, 288, 32, 0, 224);
    }
}

/* ------------------------------------------------------------------ w4a8 */

/* Every bit, for any m, cut and position. */
static void check_w4a8(int64_t m, int64_t rows, int64_t k, int64_t blocksize, int kind) {
    CASE("w4a8 m %" PRId64 " rows %" PRId64 " k %" PRId64 " blocksize %" PRId64 " x kind %d", m,
         rows, k, blocksize, kind);
    const bool narrow = blocksize < 64;
    const bnbq_q4_linear *l = narrow ? &w4a8->blocks32 : &w4a8->blocks64;
    const bnbq_q4_linear *l_scalar = narrow ? &w4a8_scalar->blocks32 : &w4a8_scalar->blocks64;
    bnbq_q4_rows w;
    random_rows(&w, rows, k, blocksize);
    float *x = FLOATS(IN, m * k);
    for (int64_t i = 0; i < m * k; i++) {
        static const float odd[] = {NAN, INFINITY, -INFINITY};
        const float kinds[] = {
            normal(),
            i % 2 ? 127.0f : -127.0f,                          /* the greatest sums */
            ldexpf(uniform(), (int)(i / 32 * 53 % 276) - 149), /* steps denormal to huge */
            random_below(400) == 0 ? odd[random_below(3)] : normal(),
        };
        x[i] = kinds[kind];
    }
    const int64_t ldy = rows + random_below(3) * 5;
    const size_t bytes = (size_t)((m - 1) * ldy + rows) * 4;
    float *y = guarded(OUT, bytes, 64), *want = guarded(WANT, bytes, 64);
    linear(l_scalar, x, m, &w, rows, want, ldy);
    linear(l, x, m, &w, rows, y, ldy);
    check_canaries();
    same("y", y, want, bytes); /* and the gaps between its rows untouched */
    const int64_t i = random_below(m);
    float *alone = guarded(ALONE, (size_t)rows * 4, 64);
    linear(l, x + i * k, 1, &w, rows, alone, rows);
    same("y of a row alone", alone, y + i * ldy, (size_t)rows * 4);
}

static void check_w4a8_products(int64_t random_cases) {
    static const int64_t ms[] = {1, 2, 3, 4, 5, 7, 8, 9, 13, 17, 31, 33, 64, 67};
    for (int64_t t = 0; t < random_cases; t++) {
        const int64_t m = ms[t % 14], rows = 1 + (t < 64 ? t : random_below(64));
        const int64_t bs = t % 8 < 5 ? 32 << t % 8 : 64;
        const int64_t k = bs * (1 + random_below(bs < 128 ? 12 : 3));
        check_w4a8(m, rows, k, bs, (int)(t / 3 % 4));
    }
    check_w4a8(BNBQ_TILE_M, 40, 192, 64, 0);
    check_w4a8(3, 64, 4096, 4096, 1);
}

/* ------------------------------------------------------------------ s8 */

static void check_s8_codes(void) {
    for (int64_t t = 0; t < 1200; t++) {
        const int64_t count = t < 300 ? t : random_below(5000);
        const float threshold = t % 3 == 0 ? INFINITY : t % 3 == 1 ? 6.0f : 0.75f;
        const int kind = (int)(t / 3 % 5);
        CASE("s8 quantize count %" PRId64 " threshold %g kind %d", count, (double)threshold, kind);
        float *x = FLOATS(IN, count);
        for (int64_t i = 0; i < count; i++) {
            const float kinds[5] = {
                normal() * 3,
                i == 0 ? 127.0f : (float)(random_below(255) - 127) + 0.5f, /* ties: scale 1 */
                i % 2 ? -0.0f : 0.0f,
                ldexpf(uniform(), (int)random_below(276) - 149),
                ldexpf(uniform(), -120 - (int)random_below(20)),
            };
            x[i] = kinds[kind];
            if (kind == 0 && random_below(40) == 0) {
                static const float odd[] = {NAN, INFINITY, -INFINITY, 6.0f, -6.0f, 1e38f};
                x[i] = odd[random_below(6)];
            }
        }
        int8_t *q = BYTES(OUT, count), *want = BYTES(WANT, count);
        float *absmax = FLOATS(OUT2, 1), *want_absmax = FLOATS(WANT2, 1);
        const int64_t want_outliers = s8_scalar->quantize(x, count, threshold, want, want_absmax);
        const int64_t outliers = s8->quantize(x, count, threshold, q, absmax);
        if (outliers != want_outliers)
            fail("%" PRId64 " outliers, want %" PRId64, outliers, want_outliers);
        same("absmax", absmax, want_absmax, 4);
        same("q", q, want, (size_t)count);
        check_canaries();

        CASE("s8 dequantize count %" PRId64, count);
        for (int64_t i = 0; i < count; i++)
            q[i] = (int8_t)random_bits();
        float *w = FLOATS(IN2, count), *want_w = FLOATS(WANT2, count);
        const float scale = ldexpf(1.5f + uniform() / 2, (int)random_below(250) - 149);
        s8_scalar->dequantize(q, count, scale, want_w);
        s8->dequantize(q, count, scale, w);
        same("w", w, want_w, (size_t)count * 4);
        check_canaries();
    }
}

static void check_s8_linear(int64_t m, int64_t rows, int64_t k, int kind) {
    CASE("s8 linear m %" PRId64 " rows %" PRId64 " k %" PRId64 " kind %d", m, rows, k, kind);
    const int64_t ldw = k + random_below(3) * 3, ldy = rows + random_below(3) * 5;
    int8_t *x = BYTES(IN, m * k), *w = BYTES(W, (rows - 1) * ldw + k);
    for (int64_t i = 0; i < m * k; i++)
        x[i] = kind ? -128 : (int8_t)random_bits();
    for (int64_t i = 0; i < (rows - 1) * ldw + k; i++)
        w[i] = kind == 1 ? -128 : kind == 2 ? 127 : (int8_t)random_bits();
    void *packed = guarded(PACKED, s8->packed_bytes(m, k), 64);
    for (int64_t i = 0; i < m; i++) {
        const int64_t row = m % 2 ? (i * 2 + 1) % m : m - 1 - i;
        s8->pack(x + row * k, row, m, k, packed);
    }
    const size_t bytes = (size_t)((m - 1) * ldy + rows) * 4;
    int32_t *y = guarded(OUT, bytes, 64), *want = guarded(WANT, bytes, 64);
    void *scratch = guarded(SCRATCH, s8->scratch_bytes(m, k), 64);
    s8_scalar->run(x, m, w, ldw, rows, k, want, ldy, NULL); /* its packed form is x */
    s8->run(packed, m, w, ldw, rows, k, y, ldy, scratch);
    same("y", y, want, bytes); /* and the gaps between its rows untouched */
    check_canaries();
}

/* Scales, and the outliers' float product: the same bits everywhere. */
static void check_s8_epilogue(int64_t m, int64_t rows, int64_t count) {
    enum { N = BNBQ_TILE_N };
    CASE("s8 epilogue m %" PRId64 " rows %" PRId64 " count %" PRId64, m, rows, count);
    const int64_t k = count + random_below(200), ldw = k + random_below(3), begin = 7;
    int8_t *w = BYTES(W, (rows - 1) * ldw + k);
    for (int64_t i = 0; i < (rows - 1) * ldw + k; i++)
        w[i] = (int8_t)random_bits();
    float *scales = FLOATS(SCALES, rows);
    for (int64_t j = 0; j < rows; j++)
        scales[j] = ldexpf(1.5f + uniform() / 2, (int)random_below(60) - 30);
    int64_t columns[BNBQ_OUTLIER_COLUMNS], place[BNBQ_OUTLIER_COLUMNS], places = 0;
    for (int64_t c = 0; c < count; c++) {
        columns[c] = c * k / count;
        if (random_below(3))
            place[places++] = begin + c;
    }
    const size_t bytes = (size_t)count * N * 4, y_bytes = (size_t)m * N * 4;
    float *decoded = guarded(OUT, bytes, 64), *want_decoded = guarded(WANT, bytes, 64);
    s8_scalar->decode_columns(w, ldw, rows, columns, count, scales, want_decoded);
    s8->decode_columns(w, ldw, rows, columns, count, scales, decoded);
    same("decoded", decoded, want_decoded, bytes); /* what lies past the rows too */
    check_canaries();

    for (int64_t i = 0; i < count * N; i++)
        decoded[i] = normal();
    const int64_t ldv = count + random_below(5);
    float *value = FLOATS(IN, (m - 1) * ldv + count);
    for (int64_t i = 0; i < (m - 1) * ldv + count; i++)
        value[i] = 40 * normal();
    float *y = guarded(OUT2, y_bytes, 64), *want_y = guarded(WANT2, y_bytes, 64);
    for (int64_t i = 0; i < m * N; i++)
        y[i] = want_y[i] = normal();
    s8_scalar->add_outliers(value, ldv, m, NULL, begin, count, decoded, want_y);
    s8->add_outliers(value, ldv, m, NULL, begin, count, decoded, y);
    same("sums of columns", y, want_y, y_bytes);
    s8_scalar->add_outliers(value, 0, 1, place, begin, places, decoded, want_y);
    s8->add_outliers(value, 0, 1, place, begin, places, decoded, y);
    same("sums of a row", y, want_y, y_bytes);
    int32_t *ints = guarded(IN2, (size_t)rows * 4, 4);
    for (int64_t j = 0; j < rows; j++)
        ints[j] = (int32_t)random_bits();
    s8_scalar->scale(ints, rows, value[0], scales, want_y);
    s8->scale(ints, rows, value[0], scales, y);
    same("scaled sums", y, want_y, y_bytes); /* and nothing past the rows */
    check_canaries();
}

typedef struct s8_scales { /* of the rows of W: only the bf16 kernel scales them */
    const float *absmax;
    int64_t ld;
} s8_scales;

static void s8_backward(bool bf16, const float *gy, int64_t ldg, int64_t m, const int8_t *w,
                        int64_t ldw, s8_scales scales, int64_t n, int64_t cols, float *gx,
                        int64_t ldgx) {
    if (bf16) {
        int64_t ld;
        const uint16_t *rows = gradient_bf16(gy, ldg, m, n, &ld);
        s8->backward_bf16(rows, ld, m, w, ldw, scales.absmax, scales.ld, n, cols, gx, ldgx,
                          backward_scratch());
    } else {
        s8->backward(gy, ldg, m, w, ldw, n, cols, gx, ldgx, backward_scratch());
    }
}

static void check_s8_backward(bool bf16, int64_t m, int64_t n, int64_t cols) {
    CASE("s8 backward%s m %" PRId64 " n %" PRId64 " cols %" PRId64, bf16 ? "_bf16" : "", m, n,
         cols);
    const int64_t ldg = n + random_below(3), ldw = cols + random_below(20);
    const int64_t ldgx = cols + random_below(3) * 7, size = (n - 1) * ldw + cols;
    const int64_t lds = 1 + random_below(3);
    int8_t *w = BYTES(W, size);
    float *absmax = FLOATS(SCALES, (n - 1) * lds + 1);
    float *dense = FLOATS(WANT, size), *gy = gradient((m - 1) * ldg + n, bf16);
    for (int64_t i = 0; i < size; i++)
        dense[i] = w[i] = (int8_t)random_bits();
    for (int64_t r = 0; bf16 && r < n; r++) {
        absmax[r * lds] = ldexpf(1.5f + uniform() / 2, (int)random_below(12) - 8);
        s8_scalar->dequantize(w + r * ldw, cols, absmax[r * lds], dense + r * ldw);
        for (int64_t c = 0; c < cols; c++)
            dense[r * ldw + c] = to_bf16(dense[r * ldw + c]);
    }
    const s8_scales scales = {absmax, lds};
    float *gx = guarded(OUT, (size_t)((m - 1) * ldgx + cols) * 4, 64);
    s8_backward(bf16, gy, ldg, m, w, ldw, scales, n, cols, gx, ldgx);
    check_gradient(gx, ldgx, m, cols, gy, ldg, n, dense, ldw);
    const int64_t i = random_below(m), from = cols / 3;
    float *alone = guarded(ALONE, (size_t)(cols - from) * 4, 64);
    s8_backward(bf16, gy + i * ldg, ldg, 1, w + from, ldw, scales, n, cols - from, alone,
                cols - from);
    same("gx of one row, cut elsewhere", alone, gx + i * ldgx + from, (size_t)(cols - from) * 4);
    check_canaries();
}

static void multiply_outliers(const float *value, int64_t ldv, int64_t m, const bnbq_s8_rows *w,
                              int64_t rows, const int64_t *columns, int64_t count, float *sums) {
    int64_t ld;
    const uint16_t *bf16 = gradient_bf16(value, ldv, m, count, &ld);
    s8->multiply_outliers_bf16(bf16, ld, m, w, rows, columns, count, sums, backward_scratch());
}

static void check_s8_outliers(int64_t m, int64_t rows, int64_t k, int64_t blocksize) {
    enum { N = BNBQ_TILE_N };
    CASE("s8 multiply_outliers_bf16 m %" PRId64 " rows %" PRId64 " k %" PRId64
         " blocksize %" PRId64,
         m, rows, k, blocksize);
    const int64_t blocks = (k + blocksize - 1) / blocksize, share = 1 + random_below(20);
    int8_t *q = BYTES(W, rows * k);
    float *absmax = FLOATS(SCALES, rows * blocks);
    for (int64_t i = 0; i < rows * k; i++)
        q[i] = (int8_t)random_bits();
    for (int64_t i = 0; i < rows * blocks; i++)
        absmax[i] = ldexpf(1.5f + uniform() / 2, (int)random_below(12) - 8);
    int64_t *columns = guarded(WANT2, (size_t)k * 8, 8), count = 0;
    for (int64_t c = 0; c < k; c++)
        if (random_below(share) == 0 || (c == k - 1 && count == 0))
            columns[count++] = c;
    float *dense = FLOATS(WANT, count * rows); /* [count, rows] */
    for (int64_t p = 0; p < count; p++)
        for (int64_t j = 0; j < rows; j++) {
            const int64_t c = columns[p];
            s8_scalar->dequantize(q + j * k + c, 1, absmax[j * blocks + c / blocksize],
                                  dense + p * rows + j);
            dense[p * rows + j] = to_bf16(dense[p * rows + j]);
        }
    const bnbq_s8_rows w = {q, absmax, k, blocksize};
    float *value = gradient(m * count, true);
    float *sums = guarded(OUT, (size_t)((m - 1) * N + rows) * 4, 64);
    multiply_outliers(value, count, m, &w, rows, columns, count, sums);
    check_gradient(sums, N, m, rows, value, count, count, dense, rows);
    const int64_t i = random_below(m), j = random_below(rows);
    float *alone = guarded(ALONE, (size_t)rows * 4, 64);
    multiply_outliers(value + i * count, count, 1, &w, rows, columns, count, alone);
    same("sums of a row alone", alone, sums + i * N, (size_t)rows * 4);
    const bnbq_s8_rows one = {q + j * k, absmax + j * blocks, k, blocksize};
    alone = guarded(ALONE, (size_t)((m - 1) * N + 1) * 4, 64);
    multiply_outliers(value, count, m, &one, 1, columns, count, alone);
    for (int64_t r = 0; r < m; r++)
        same("sums of one row of W alone", alone + r * N, sums + r * N + j, 4);
    check_canaries();
}

static void check_s8_products(int64_t random_cases) {
    static const int64_t ms[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 17, 31, 33, 65};
    for (int64_t t = 0; t < random_cases; t++) {
        const int64_t m = t < 18 ? ms[t] : ms[random_below(18)];
        const int64_t rows = t < 64 ? 1 + t : 1 + random_below(64);
        const int64_t k = t < 140 ? 1 + t : 1 + random_below(700);
        check_s8_linear(m, rows, k, t % 4 == 3 ? 1 + (int)(t / 4 % 2) : 0);
        for (int bf16 = 0; bf16 <= (s8->backward_bf16 != NULL); bf16++)
            check_s8_backward(bf16, m, 1 + random_below(bf16 ? 300 : 150), 1 + random_below(256));
        check_s8_epilogue(m, rows, t < 64 ? 64 - t : 1 + random_below(BNBQ_OUTLIER_COLUMNS));
        if (s8->multiply_outliers_bf16)
            check_s8_outliers(m, rows, k, t % 3 ? k : 32 << t % 4);
    }
    if (s8->multiply_outliers_bf16)
        check_s8_outliers(BNBQ_TILE_M, 64, 4099, 4099);
    check_s8_linear(BNBQ_TILE_M, 64, 67, 0);
    check_s8_linear(6, 3, BNBQ_MAX_K_S8, 2);
    check_s8_linear(1, 17, 20000, 1);
    for (int bf16 = 0; bf16 <= (s8->backward_bf16 != NULL); bf16++)
        check_s8_backward(bf16, BNBQ_TILE_M, 257, 256);
}

/* (2^24 + 1) - 2^24 is 0 in fp32 and 1 in any other order: sums go over n in ascending order. */
static void check_ascending(void) {
    enum { N = 130, COLS = 64 };
    float *gy = FLOATS(IN, N), *absmax = FLOATS(SCALES, N);
    uint8_t *ones = memset(BYTES(W, N * COLS / 2), 0xff, N * COLS / 2); /* nf4's last value is 1 */
    int8_t *codes = memset(BYTES(IN2, N * COLS), 1, N * COLS);
    for (int r = 0; r < N; r++)
        absmax[r] = 1.0f;
    const bnbq_q4_rows w = {ones, absmax, bnbq_formats[0].codebook, COLS, COLS};
    for (int first = 0; first + 2 < N; first++) {
        CASE("order of sums, from row %d", first);
        for (int r = 0; r < N; r++)
            gy[r] = r == first ? 0x1p24f : r == first + 1 ? 1.0f : r == first + 2 ? -0x1p24f : 0.0f;
        float *gx = guarded(OUT, COLS * 4, 64);
        q4->backward(gy, N, 1, &w, N, 0, COLS, gx, COLS, backward_scratch());
        float *gx8 = guarded(OUT2, COLS * 4, 64);
        s8->backward(gy, N, 1, codes, COLS, N, COLS, gx8, COLS, backward_scratch());
        for (int c = 0; c < COLS; c++)
            if (gx[c] != 0.0f || gx8[c] != 0.0f)
                fail("q4 gives %g and s8 %g, want 0", (double)gx[c], (double)gx8[c]);
        check_canaries();
    }
}

/* ------------------------------------------------------------------ golden vectors */

static const void *next_part(FILE *file, int i, size_t bytes, size_t align) {
    void *part = guarded(i, bytes, align);
    if (fread(part, 1, bytes, file) != bytes)
        fail("the file ends");
    return part;
}

/* Records as test_checkasm.py writes them: the head; f32 values[count], codes,
 * f32 absmax[ceil(count / blocksize)], and f32[count] that these decode to. int8: one block. */
static void check_golden(const char *path) {
    struct {
        char name[8]; /* of a 4-bit format, or "int8" */
        int64_t blocksize, count;
    } head;
    CASE("golden vectors in %s", path);
    const int64_t before = cases;
    FILE *file = fopen(path, "rb");
    if (!file)
        fail("no such file");
    while (fread(&head, sizeof head, 1, file) == 1) {
        const int64_t count = head.count, bs = head.blocksize;
        CASE("golden %s count %" PRId64 " blocksize %" PRId64, head.name, count, bs);
        const bnbq_format *format = bnbq_find_format(head.name);
        const size_t floats = (size_t)count * 4, scales = (size_t)((count + bs - 1) / bs);
        const size_t codes = (size_t)(format ? (count + 1) / 2 : count);
        const float *w = next_part(file, IN, floats, 4);
        const void *want = next_part(file, WANT, codes, 1);
        const void *want_absmax = next_part(file, WANT2, scales * 4, 4);
        const void *want_dense = next_part(file, IN2, floats, 4);
        void *q = BYTES(OUT, codes);
        float *absmax = FLOATS(OUT2, scales), *dense = FLOATS(ALONE, count);
        if (format) {
            q4->quantize(w, BNBQ_F32, count, format, bs, q, absmax);
            q4->dequantize(q, absmax, format->codebook, count, bs, BNBQ_F32, dense);
        } else {
            if (s8->quantize(w, count, INFINITY, q, absmax) != 0)
                fail("outliers");
            s8->dequantize(q, count, *absmax, dense);
        }
        same("codes", q, want, codes);
        same("absmax", absmax, want_absmax, scales * 4);
        same("w", dense, want_dense, floats);
        check_canaries();
    }
    if (cases == before)
        fail("none in it");
    fclose(file);
}

int main(int argc, char **argv) {
    if (argc < 2)
        fail("no file of golden vectors");
    state = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    const int64_t random_cases = argc > 3 ? strtoll(argv[3], NULL, 10) : 150;
    signal(SIGSEGV, crashed);
    signal(SIGBUS, crashed);
    CASE("tables");
    if (!q4->quantize || !q4->dequantize || !q4->linear.run || !q4->backward || !s8->quantize ||
        !s8->dequantize || !s8->run || !s8->scale || !s8->decode_columns || !s8->add_outliers ||
        !s8->backward || !w4a8->blocks32.run || !w4a8->blocks64.run)
        fail("an empty slot");
    for (int i = 0; i + 1 < BNBQ_BF16_FORMS; i++)
        if (q4->bf16[i + 1].min_m > 0 && q4->bf16[i + 1].min_m <= q4->bf16[i].min_m)
            fail("bf16 forms out of order");
    create_arenas();
    check_golden(argv[1]);
    check_q4_codes();
    check_q4_products(random_cases);
    check_w4a8_products(random_cases);
    check_s8_codes();
    check_s8_products(random_cases);
    check_ascending();
    printf("q4 %s (needs %#x), s8 %s (needs %#x), w4a8 %s: %" PRId64 " cases equal scalar\n",
           q4->isa, q4->needs, s8->isa, s8->needs, w4a8->isa, cases);
    return 0;
}

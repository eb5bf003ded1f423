/* kernels.h - the contract of every kernel: one struct of function pointers per family.
 *
 * Families, not formats, name kernels:
 *   edge  fp16, bf16 <-> fp32 at the edges of every operation
 *   q4    4-bit index into a codebook of 16, one scale per block
 *   s8    signed 8-bit integers
 *   w4a8  4-bit weights of q4 times activations in int8
 *
 * An instruction set is a row of functions: kernels/<family>_<isa>.c exports one const table
 * bnbq_<family>_<isa>. A row without a kernel of its own names the one it borrows; no slot is
 * NULL unless it says so. Kernels have preconditions (asserted in debug builds), never errors: they
 * do not allocate, start threads, print or know Python. Each result depends only on the row of x
 * and the rows of W that define it, never on m, on the position in a batch or on how the front cut
 * the work, except that a front may choose another function of the table for another m.
 *
 * Alignment: `packed`, `scratch` and `y` come 64-byte aligned; everything else is aligned to its
 * element only. Unless said, buffers do not overlap.
 */
#ifndef BNBQ_KERNELS_H
#define BNBQ_KERNELS_H

#include "bnbq.h"
#include "cpu.h"
#include "formats.h"

/* Of kernels: a function that constant arguments specialise. */
#define BNBQ_INLINE static inline __attribute__((always_inline))

/* Instruction sets in the order in which BNBQ_ISA caps them. */
typedef enum bnbq_isa {
    BNBQ_ISA_SCALAR,
    BNBQ_ISA_NEON,
    BNBQ_ISA_I8MM,
    BNBQ_ISA_NEONBF16,
    BNBQ_ISA_AVX2,
    BNBQ_ISA_AVX512,
    BNBQ_ISA_AVX512BF16,
    BNBQ_ISA_AMX,
    BNBQ_ISAS,
} bnbq_isa;

/* What the fronts cut the work into. */
enum {
    BNBQ_TILE_M = 512,         /* rows of x per call of a linear kernel, at most */
    BNBQ_TILE_N = 64,          /* rows of W per call of a linear kernel, at most */
    BNBQ_TILE_K = 256,         /* columns of W per call of a backward kernel, at most */
    BNBQ_MAX_K_S8 = 1 << 17,   /* k of an int8 product, at most: 2^17 * 127 * 128 < 2^31 */
    BNBQ_OUTLIER_COLUMNS = 64, /* columns of W per call of decode_columns, at most */
    BNBQ_BF16_FORMS = 2,       /* of a bf16 product in one table */
};

typedef struct bnbq_edge_kernels {
    const char *isa;
    bnbq_isa level;
    uint32_t needs;
    /* count values of src (BNBQ_F32, BNBQ_BF16 or BNBQ_F16, contiguous) as f32; exact. */
    void (*widen)(const void *src, bnbq_dtype dtype, int64_t count, float *dst);
    /* count values of f32 to dtype; round to nearest even, NaN stays NaN, overflow gives Inf. */
    void (*narrow)(const float *src, int64_t count, bnbq_dtype dtype, void *dst);
} bnbq_edge_kernels;

/* Rows of one packed 4-bit weight; k % blocksize == 0. */
typedef struct bnbq_q4_rows {
    const uint8_t *qweight; /* [rows, k/2]: element 2i of a row is the high nibble of byte i */
    const float *absmax;    /* [rows, k/blocksize] */
    const float *codebook;  /* [16] */
    int64_t k;
    int64_t blocksize; /* 32, 64, ... 4096 */
} bnbq_q4_rows;

/* y = x . W^T in two steps, so that a kernel can order the activations to suit the stored order of
 * the weight (which is never rearranged). The front packs up to BNBQ_TILE_M rows of x once and
 * then runs tiles of W against them. */
typedef struct bnbq_q4_linear {
    /* bytes of the packed form of x[m, k]; 1 <= m <= BNBQ_TILE_M, k % 32 == 0 */
    size_t (*packed_bytes)(int64_t m, int64_t k);
    /* write row i of m into `packed`. x: f32[k]. Rows are packed in any order, by any thread. */
    void (*pack)(const float *x, int64_t i, int64_t m, int64_t k, void *packed);
    size_t (*scratch_bytes)(int64_t m, int64_t k);
    /* y[m, rows] = x . W^T, row stride ldy; 1 <= rows <= BNBQ_TILE_N. Sums in fp32. */
    void (*run)(const void *packed, int64_t m, const bnbq_q4_rows *w, int64_t rows, float *y,
                int64_t ldy, void *scratch);
} bnbq_q4_linear;

typedef struct bnbq_q4_form {
    int64_t min_m; /* rows of x from which on it is the fastest; 0: there is no such form */
    bnbq_q4_linear linear;
} bnbq_q4_form;

typedef struct bnbq_q4_kernels {
    const char *isa;
    bnbq_isa level;
    uint32_t needs;
    /* w: count values of a float dtype; count >= 1, whole blocks or, at the end of a weight, one
     * short block. qweight: u8[ceil(count/2)], absmax: f32[ceil(count/blocksize)]. reference.py
     * defines every bit, the short block's too. An odd count pads the last byte with the code of 0.
     * NaN or Inf in a block shows in its absmax, which is then one of them; its codes mean nothing.
     */
    void (*quantize)(const void *w, bnbq_dtype dtype, int64_t count, const bnbq_format *format,
                     int64_t blocksize, uint8_t *qweight, float *absmax);
    /* w[i] = codebook[code i] * absmax[i / blocksize], rounded to fp32 and then to dtype (a float
     * dtype); count >= 1, any. */
    void (*dequantize)(const uint8_t *qweight, const float *absmax, const float *codebook,
                       int64_t count, int64_t blocksize, bnbq_dtype dtype, void *w);
    /* Weights and activations as they are in fp32: serves every compute dtype. */
    bnbq_q4_linear linear;
    /* For x of bf16 values, with either the codebook or each weight rounded to bf16 once. In
     * ascending min_m: the front takes the last whose min_m is not above m, and `linear` where
     * there is none. */
    bnbq_q4_form bf16[BNBQ_BF16_FORMS];
    /* gx[m, cols] = gy[m, n] . W[n, k0 .. k0+cols), sums in fp32 over n in ascending order.
     * w describes all n rows; k0 % 32 == 0, 1 <= cols <= BNBQ_TILE_K, cols even,
     * 1 <= m <= BNBQ_TILE_M. gy: f32, row stride ldg. gx: f32, row stride ldgx, 64-byte aligned.
     * scratch: BNBQ_BACKWARD_SCRATCH bytes. */
    void (*backward)(const float *gy, int64_t ldg, int64_t m, const bnbq_q4_rows *w, int64_t n,
                     int64_t k0, int64_t cols, float *gx, int64_t ldgx, void *scratch);
    /* The same with gy in bf16 and each weight rounded to bf16 once; NULL: there is none. If n is
     * odd, there is a zero behind each row of gy. k0 and cols are multiples of 64, or of 32 if the
     * blocksize is 32. */
    void (*backward_bf16)(const uint16_t *gy, int64_t ldg, int64_t m, const bnbq_q4_rows *w,
                          int64_t n, int64_t k0, int64_t cols, float *gx, int64_t ldgx,
                          void *scratch);
} bnbq_q4_kernels;

enum { BNBQ_BACKWARD_SCRATCH = 128 * 1024 };

/* Rows of one int8 weight. */
typedef struct bnbq_s8_rows {
    const int8_t *qweight; /* [rows, k] */
    const float *absmax;   /* [rows, ceil(k / blocksize)] */
    int64_t k, blocksize;
} bnbq_s8_rows;

typedef struct bnbq_s8_kernels {
    const char *isa;
    bnbq_isa level;
    uint32_t needs;
    /* One row (or block) of x, f32[count], count >= 0. An element is an outlier when it is not
     * finite or |x| >= threshold (threshold > 0, +Inf for none). absmax = max |x| over the others
     * (0 if there are none); q[i] = rint(x[i] * s) with s = 127 * (1 / max(absmax, 1e-36)) in fp32
     * and ties to even; outliers give q[i] = 0. Returns the number of outliers. */
    int64_t (*quantize)(const float *x, int64_t count, float threshold, int8_t *q, float *absmax);
    /* w[i] = (q[i] * absmax) * (1/127), two fp32 roundings in that order. */
    void (*dequantize)(const int8_t *q, int64_t count, float absmax, float *w);
    /* The exact int32 product y[m, rows] = x[m, k] . w[rows, k]^T for any int8 values, in two
     * steps as above. 1 <= k <= BNBQ_MAX_K_S8. */
    size_t (*packed_bytes)(int64_t m, int64_t k);
    void (*pack)(const int8_t *x, int64_t i, int64_t m, int64_t k, void *packed);
    size_t (*scratch_bytes)(int64_t m, int64_t k);
    void (*run)(const void *packed, int64_t m, const int8_t *w, int64_t ldw, int64_t rows,
                int64_t k, int32_t *y, int64_t ldy, void *scratch);
    /* y[j] += f32(sums[j]) * (x_scale * w_scale[j]) for one row of y; j < rows <= BNBQ_TILE_N. */
    void (*scale)(const int32_t *sums, int64_t rows, float x_scale, const float *w_scale, float *y);
    /* decoded[c, j] = (w[j, columns[c]] * absmax[j]) * (1/127); c < count <= BNBQ_OUTLIER_COLUMNS,
     * j < rows. decoded: f32[count, BNBQ_TILE_N], 64-byte aligned. */
    void (*decode_columns)(const int8_t *w, int64_t ldw, int64_t rows, const int64_t *columns,
                           int64_t count, const float *absmax, float *decoded);
    /* sums[i, j] += value[i, e] * decoded[place[e] - begin, j] for e = 0, 1, ... count - 1, each
     * product rounded; j < BNBQ_TILE_N. place NULL: begin, begin + 1, ... value has row stride ldv.
     * sums: f32[m, BNBQ_TILE_N]. decoded, sums: 64-byte aligned. */
    void (*add_outliers)(const float *value, int64_t ldv, int64_t m, const int64_t *place,
                         int64_t begin, int64_t count, const float *decoded, float *sums);
    /* Both for many outlier columns and x of bf16: sums[m, rows] = value[m, count] . dequantised
     * w[rows, columns]^T, each weight rounded to bf16 once; NULL: there is none. count >= 1 columns
     * ascend; value is bf16 with row stride ldv and, if count is odd, a zero behind each row. sums
     * has row stride BNBQ_TILE_N. scratch: BNBQ_BACKWARD_SCRATCH bytes. */
    void (*multiply_outliers_bf16)(const uint16_t *value, int64_t ldv, int64_t m,
                                   const bnbq_s8_rows *w, int64_t rows, const int64_t *columns,
                                   int64_t count, float *sums, void *scratch);
    /* gx[m, cols] = gy[m, n] . w[n, cols], w: i8 with row stride ldw, sums in fp32 over n in
     * ascending order; 1 <= cols <= BNBQ_TILE_K, 1 <= m <= BNBQ_TILE_M. */
    void (*backward)(const float *gy, int64_t ldg, int64_t m, const int8_t *w, int64_t ldw,
                     int64_t n, int64_t cols, float *gx, int64_t ldgx, void *scratch);
    /* gx[m, cols] = gy[m, n] . dequantised w[n, cols], where row r of w has the scale
     * absmax[r * ldabsmax], each weight is rounded to bf16 once and gy is bf16; NULL: there is
     * none. If n is odd, there is a zero behind each row of gy. */
    void (*backward_bf16)(const uint16_t *gy, int64_t ldg, int64_t m, const int8_t *w, int64_t ldw,
                          const float *absmax, int64_t ldabsmax, int64_t n, int64_t cols, float *gx,
                          int64_t ldgx, void *scratch);
} bnbq_s8_kernels;

/* The product of q4 with x rounded to int8 in blocks of columns, each with a scale, and the
 * codebook rounded to int8. Sums over a block are exact and added up in ascending order:
 * reference.py defines every bit, for any m. A row of x that is not finite gives NaN. */
typedef struct bnbq_w4a8_kernels {
    const char *isa;
    bnbq_isa level;
    uint32_t needs;
    bnbq_q4_linear blocks32, blocks64; /* columns per block of x: min(blocksize, 64) */
} bnbq_w4a8_kernels;

/* The rows, one file each: kernels/<family>_<isa>.c. Which exist depends on the processor. */
extern const bnbq_edge_kernels bnbq_edge_scalar, bnbq_edge_avx2;
extern const bnbq_q4_kernels bnbq_q4_scalar, bnbq_q4_avx2, bnbq_q4_avx512;
extern const bnbq_q4_kernels bnbq_q4_avx512bf16, bnbq_q4_amx, bnbq_q4_neon, bnbq_q4_neon_bf16;
extern const bnbq_s8_kernels bnbq_s8_scalar, bnbq_s8_avx2, bnbq_s8_avx512vnni;
extern const bnbq_s8_kernels bnbq_s8_avx512bf16, bnbq_s8_amx, bnbq_s8_neon, bnbq_s8_neon_i8mm;
extern const bnbq_w4a8_kernels bnbq_w4a8_scalar, bnbq_w4a8_avx2, bnbq_w4a8_avx512vnni;

/* registry.c: the rows of each family, slowest first, and the one in use: the last whose `needs`
 * this processor has and whose level is not above the cap. */
const bnbq_edge_kernels *bnbq_edge(void);
const bnbq_q4_kernels *bnbq_q4(void);
const bnbq_s8_kernels *bnbq_s8(void);
const bnbq_w4a8_kernels *bnbq_w4a8(void);

const char *bnbq_isa_name(bnbq_isa isa); /* "scalar", "avx512bf16", ... */
/* Parse a name; false when it is none of the above. */
bool bnbq_parse_isa(const char *name, bnbq_isa *isa);
/* Cap what is used from the next call on, for the whole process. */
void bnbq_set_isa(bnbq_isa cap);
bnbq_isa bnbq_get_isa(void); /* the highest level in use under the cap */

/* For listings: row i of a family ("edge", "q4", "s8", "w4a8"), false past the end. */
typedef struct bnbq_row_info {
    const char *family, *isa;
    bnbq_isa level;
    uint32_t needs, missing; /* feature bits; missing == 0: this processor can run it */
    bool in_use;
    /* q4: for bf16, weights or codebook are rounded to it from the least to the most rows of x;
     * 0, 0: never; INT64_MAX: any more */
    int64_t bf16_min_m, bf16_max_m;
} bnbq_row_info;
bool bnbq_row(const char *family, int i, bnbq_row_info *info);

/* Always use one function per table, whatever m is (set_batch_invariant). */
void bnbq_set_batch_invariant(bool on);
bool bnbq_batch_invariant(void);

#endif

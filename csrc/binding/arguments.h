/* arguments.h - the arguments that are no tensors, and what shapes packed weights may have.
 *
 * As in tensor.h, what can fail sets a Python exception and returns NULL or false.
 */
#ifndef BNBQ_BINDING_ARGUMENTS_H
#define BNBQ_BINDING_ARGUMENTS_H

#include "tensor.h"

#include "formats.h"

bool bnbq_get_int(const bnbq_call *call, PyObject *object, const char *name, int64_t *value);
/* `zero`: 0 is a blocksize too. */
bool bnbq_get_blocksize(const bnbq_call *call, PyObject *object, bool zero, int64_t *value);
const bnbq_format *bnbq_get_format(const bnbq_call *call, PyObject *object);
/* `other` stands for None. */
bool bnbq_get_compute_dtype(const bnbq_call *call, PyObject *object, bnbq_dtype other,
                            bnbq_dtype *dtype);
/* "int8" or None. */
bool bnbq_get_activations(const bnbq_call *call, PyObject *object, bool *int8);

/* Raise "arg has shape (2, 3), wanted ..."; returns false. */
bool bnbq_wrong_shape(const bnbq_call *call, const bnbq_arg *arg, const char *wanted, ...);
bool bnbq_expect_count(const bnbq_call *call, const bnbq_arg *arg, int64_t count);

typedef struct bnbq_packed4 {
    bnbq_arg *qweight, *absmax;
    bnbq_arg *absmax2, *offset; /* NULL without double quantisation */
} bnbq_packed4;

/* From three arguments: absmax, absmax2 or None, absmax_offset or None. */
bool bnbq_view_scales(bnbq_call *call, PyObject *const *args, bnbq_packed4 *packed);
/* From four: qweight and those. */
bool bnbq_view_packed4(bnbq_call *call, PyObject *const *args, bnbq_packed4 *packed);

/* Of the tensors of experts the first dimension is theirs, and the scales and weights below are the
 * first one's; `experts` 0 stands for a single weight. */

/* `count` scales, as the core takes them. */
bool bnbq_check_scales(const bnbq_call *call, const bnbq_packed4 *packed, int64_t experts,
                       int64_t count, bnbq_absmax *absmax);
/* The weight [n, k] that these tensors hold, whatever the shape of qweight. */
bool bnbq_check_packed4(bnbq_call *call, const bnbq_packed4 *packed, int64_t experts, int64_t n,
                        int64_t k, const bnbq_format *format, int64_t blocksize, bnbq_weight4 *w);
/* qweight i8[n, k], absmax f32[n] or f32[n, ceil(k / blocksize)] */
bool bnbq_check_packed8(bnbq_call *call, const bnbq_arg *qweight, const bnbq_arg *absmax,
                        int64_t experts, int64_t blocksize, bnbq_weight8 *w);

static inline int64_t bnbq_blocks(int64_t count, int64_t size) {
    return count / size + (count % size != 0);
}

#endif

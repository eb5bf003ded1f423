/* arguments.c - the arguments that are no tensors, and what shapes packed weights may have; see
 * arguments.h. */
#include "arguments.h"

#include <stdarg.h>
#include <string.h>

bool bnbq_get_int(const bnbq_call *call, PyObject *object, const char *name, int64_t *value) {
    if (!PyLong_Check(object) || PyBool_Check(object))
        return bnbq_fail(call, PyExc_TypeError, "%s is %R, wanted an int", name, object);
    int overflow;
    *value = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (overflow != 0)
        return bnbq_fail(call, PyExc_ValueError, "%s is %R, which is too large", name, object);
    return true;
}

bool bnbq_get_blocksize(const bnbq_call *call, PyObject *object, bool zero, int64_t *value) {
    if (!bnbq_get_int(call, object, "blocksize", value))
        return false;
    if (bnbq_valid_blocksize(*value) || (zero && *value == 0))
        return true;
    return bnbq_fail(call, PyExc_ValueError,
                     "blocksize is %R, wanted %s32, 64, 128, 256, 512, 1024, 2048 or 4096", object,
                     zero ? "0 (one block per row), " : "");
}

const bnbq_format *bnbq_get_format(const bnbq_call *call, PyObject *object) {
    if (!PyUnicode_Check(object)) {
        bnbq_fail(call, PyExc_TypeError, "quant_type is %R, wanted a str", object);
        return NULL;
    }
    Py_ssize_t size = 0;
    const char *name = PyUnicode_AsUTF8AndSize(object, &size);
    PyErr_Clear(); /* lone surrogates and embedded zeros: no format has such a name */
    const bnbq_format *format =
        name == NULL || strlen(name) != (size_t)size ? NULL : bnbq_find_format(name);
    if (format == NULL) {
        char known[64] = "";
        for (int i = 0; i < BNBQ_FORMATS; i++) {
            strcat(known, i == 0 ? "" : ", ");
            strcat(known, bnbq_formats[i].name);
        }
        bnbq_fail(call, PyExc_ValueError, "quant_type is %R, wanted one of %s", object, known);
    }
    return format;
}

bool bnbq_get_compute_dtype(const bnbq_call *call, PyObject *object, bnbq_dtype other,
                            bnbq_dtype *dtype) {
    static const char *const names[] = {"float32", "bfloat16", "float16"};
    *dtype = other;
    if (object == Py_None)
        return true;
    if (!PyUnicode_Check(object))
        return bnbq_fail(call, PyExc_TypeError, "compute_dtype is %R, wanted a str or None",
                         object);
    for (int i = BNBQ_F32; i <= BNBQ_F16; i++) {
        if (PyUnicode_CompareWithASCIIString(object, names[i]) == 0) {
            *dtype = (bnbq_dtype)i;
            return true;
        }
    }
    return bnbq_fail(call, PyExc_ValueError,
                     "compute_dtype is %R, wanted 'float32', 'bfloat16', 'float16' or None",
                     object);
}

bool bnbq_get_activations(const bnbq_call *call, PyObject *object, bool *int8) {
    *int8 = object != Py_None;
    if (!*int8)
        return true;
    if (!PyUnicode_Check(object))
        return bnbq_fail(call, PyExc_TypeError, "activations is %R, wanted a str or None", object);
    return PyUnicode_CompareWithASCIIString(object, "int8") == 0 ||
           bnbq_fail(call, PyExc_ValueError, "activations is %R, wanted 'int8' or None", object);
}

bool bnbq_wrong_shape(const bnbq_call *call, const bnbq_arg *view, const char *wanted, ...) {
    va_list arguments;
    va_start(arguments, wanted);
    PyObject *shape = bnbq_shape(view), *text = PyUnicode_FromFormatV(wanted, arguments);
    va_end(arguments);
    if (shape != NULL && text != NULL)
        bnbq_fail(call, PyExc_ValueError, "%s has shape %S, wanted %U", view->name, shape, text);
    Py_XDECREF(shape);
    Py_XDECREF(text);
    return false;
}

bool bnbq_expect_count(const bnbq_call *call, const bnbq_arg *view, int64_t count) {
    if (view->count == count)
        return true;
    return bnbq_wrong_shape(call, view, "%lld elements", (long long)count);
}

/* n * k, which must be a possible number of elements. */
static bool get_size(const bnbq_call *call, int64_t n, int64_t k, int64_t *size) {
    if (!__builtin_mul_overflow(n, k, size))
        return true;
    return bnbq_fail(call, PyExc_ValueError, "a weight [n = %lld, k = %lld] is too large",
                     (long long)n, (long long)k);
}

/* ------------------------------------------------------------------ weights */

bool bnbq_view_scales(bnbq_call *call, PyObject *const *args, bnbq_packed4 *packed) {
    bool nested = args[1] != Py_None;
    if (nested != (args[2] != Py_None))
        return bnbq_fail(call, PyExc_TypeError, "%s is None and %s is not; wanted both or none",
                         nested ? "absmax_offset" : "absmax2",
                         nested ? "absmax2" : "absmax_offset");
    packed->absmax = bnbq_packed_input(call, args[0], "absmax", nested ? BNBQ_IS_U8 : BNBQ_IS_F32);
    packed->absmax2 = packed->offset = NULL;
    if (packed->absmax == NULL || !nested)
        return packed->absmax != NULL;
    packed->absmax2 = bnbq_packed_input(call, args[1], "absmax2", BNBQ_IS_F32);
    if (packed->absmax2 == NULL)
        return false;
    packed->offset = bnbq_packed_input(call, args[2], "absmax_offset", BNBQ_IS_F32);
    return packed->offset != NULL;
}

bool bnbq_view_packed4(bnbq_call *call, PyObject *const *args, bnbq_packed4 *packed) {
    packed->qweight = bnbq_packed_input(call, args[0], "qweight", BNBQ_IS_U8);
    return packed->qweight != NULL && bnbq_view_scales(call, args + 1, packed);
}

bool bnbq_check_scales(const bnbq_call *call, const bnbq_packed4 *packed, int64_t count,
                       bnbq_absmax *absmax) {
    *absmax = (bnbq_absmax){0};
    if (!bnbq_expect_count(call, packed->absmax, count))
        return false;
    if (packed->absmax2 == NULL) {
        absmax->absmax = packed->absmax->dl.data;
        return true;
    }
    if (!bnbq_expect_count(call, packed->absmax2, bnbq_blocks(count, BNBQ_ABSMAX_BLOCK)) ||
        !bnbq_expect_count(call, packed->offset, 1))
        return false;
    absmax->codes = packed->absmax->dl.data;
    absmax->absmax2 = packed->absmax2->dl.data;
    absmax->offset = packed->offset->dl.data;
    return true;
}

bool bnbq_check_packed4(bnbq_call *call, const bnbq_packed4 *packed, const char *n_from, int64_t n,
                        const char *k_from, int64_t k, const bnbq_format *format, int64_t blocksize,
                        bnbq_weight4 *w) {
    const DLTensor *q = &packed->qweight->dl;
    if (n_from != NULL && q->ndim == 2 && q->shape[1] > 1) {
        if (k != q->shape[1] * 2)
            return bnbq_fail(call, PyExc_ValueError, "%s has %lld columns, the weight has k = %lld",
                             k_from, (long long)k, (long long)q->shape[1] * 2);
        if (n != q->shape[0])
            return bnbq_fail(call, PyExc_ValueError, "%s has %lld columns, the weight has n = %lld",
                             n_from, (long long)n, (long long)q->shape[0]);
    }
    int64_t size;
    if (!get_size(call, n, k, &size))
        return false;
    if (packed->qweight->count != bnbq_blocks(size, 2))
        return bnbq_wrong_shape(call, packed->qweight,
                                "%lld bytes for a weight [n = %lld, k = %lld]",
                                (long long)bnbq_blocks(size, 2), (long long)n, (long long)k);
    call->n = n, call->k = k;
    *w = (bnbq_weight4){
        .qweight = q->data, .format = format, .n = n, .k = k, .blocksize = blocksize};
    return bnbq_check_scales(call, packed, bnbq_blocks(size, blocksize), &w->absmax);
}

bool bnbq_check_packed8(bnbq_call *call, const bnbq_arg *qweight, const bnbq_arg *absmax,
                        int64_t blocksize, bnbq_weight8 *w) {
    if (qweight->dl.ndim != 2)
        return bnbq_wrong_shape(call, qweight, "(n, k)");
    int64_t n = qweight->dl.shape[0], k = qweight->dl.shape[1], count;
    if (!get_size(call, n, blocksize == 0 ? 1 : bnbq_blocks(k, blocksize), &count) ||
        !bnbq_expect_count(call, absmax, count))
        return false;
    call->n = n, call->k = k;
    *w = (bnbq_weight8){.qweight = qweight->dl.data,
                        .absmax = absmax->dl.data,
                        .n = n,
                        .k = k,
                        .blocksize = blocksize};
    return true;
}

/* ------------------------------------------------------------------ weights of experts */

/* Each expert has `count` of the elements. */
static bool expect_experts(const bnbq_call *call, const bnbq_arg *arg, int64_t experts,
                           int64_t count) {
    if (arg->dl.ndim > 0 && arg->dl.shape[0] == experts && arg->count == experts * count)
        return true;
    return bnbq_wrong_shape(call, arg, "%lld experts of %lld elements", (long long)experts,
                            (long long)count);
}

bool bnbq_check_experts4(const bnbq_call *call, const bnbq_packed4 *packed, int64_t experts,
                         const char *n_from, int64_t n, const char *k_from, int64_t k,
                         const bnbq_format *format, int64_t blocksize, bnbq_weight4 *w) {
    const DLTensor *q = &packed->qweight->dl;
    if (q->ndim == 3 && k != q->shape[2] * 2)
        return bnbq_fail(call, PyExc_ValueError, "%s has %lld columns, the weights have k = %lld",
                         k_from, (long long)k, (long long)q->shape[2] * 2);
    if (q->ndim == 3 && n != q->shape[1])
        return bnbq_fail(call, PyExc_ValueError, "%s has %lld columns, the weights have n = %lld",
                         n_from, (long long)n, (long long)q->shape[1]);
    int64_t size, all;
    if (!get_size(call, n, k, &size) || !get_size(call, experts, size, &all))
        return false;
    int64_t blocks = bnbq_blocks(size, blocksize);
    *w = (bnbq_weight4){
        .qweight = q->data, .format = format, .n = n, .k = k, .blocksize = blocksize};
    if (!expect_experts(call, packed->qweight, experts, bnbq_blocks(size, 2)) ||
        !expect_experts(call, packed->absmax, experts, blocks))
        return false;
    if (packed->absmax2 == NULL) {
        w->absmax.absmax = packed->absmax->dl.data;
        return true;
    }
    w->absmax.codes = packed->absmax->dl.data;
    w->absmax.absmax2 = packed->absmax2->dl.data;
    w->absmax.offset = packed->offset->dl.data;
    return expect_experts(call, packed->absmax2, experts, bnbq_blocks(blocks, BNBQ_ABSMAX_BLOCK)) &&
           expect_experts(call, packed->offset, experts, 1);
}

bool bnbq_check_experts8(const bnbq_call *call, const bnbq_arg *qweight, const bnbq_arg *absmax,
                         int64_t experts, int64_t blocksize, bnbq_weight8 *w) {
    const DLTensor *q = &qweight->dl;
    if (q->ndim != 3 || q->shape[0] != experts)
        return bnbq_wrong_shape(call, qweight, "(%lld, n, k)", (long long)experts);
    int64_t n = q->shape[1], k = q->shape[2];
    *w = (bnbq_weight8){
        .qweight = q->data, .absmax = absmax->dl.data, .n = n, .k = k, .blocksize = blocksize};
    return expect_experts(call, absmax, experts,
                          n * (blocksize == 0 ? 1 : bnbq_blocks(k, blocksize)));
}

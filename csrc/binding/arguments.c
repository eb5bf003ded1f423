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

/* `count` elements; or, of the tensors of experts, so many for each. */
static bool expect(const bnbq_call *call, const bnbq_arg *view, int64_t experts, int64_t count) {
    int64_t all;
    if (experts == 0)
        return bnbq_expect_count(call, view, count);
    if (view->dl.ndim > 0 && view->dl.shape[0] == experts &&
        !__builtin_mul_overflow(experts, count, &all) && view->count == all)
        return true;
    return bnbq_wrong_shape(call, view, "%lld experts of %lld elements", (long long)experts,
                            (long long)count);
}

bool bnbq_check_scales(const bnbq_call *call, const bnbq_packed4 *packed, int64_t experts,
                       int64_t count, bnbq_absmax *absmax) {
    *absmax = (bnbq_absmax){0};
    if (!expect(call, packed->absmax, experts, count))
        return false;
    if (packed->absmax2 == NULL) {
        absmax->absmax = packed->absmax->dl.data;
        return true;
    }
    if (!expect(call, packed->absmax2, experts, bnbq_blocks(count, BNBQ_ABSMAX_BLOCK)) ||
        !expect(call, packed->offset, experts, 1))
        return false;
    absmax->codes = packed->absmax->dl.data;
    absmax->absmax2 = packed->absmax2->dl.data;
    absmax->offset = packed->offset->dl.data;
    return true;
}

bool bnbq_check_packed4(bnbq_call *call, const bnbq_packed4 *packed, int64_t experts, int64_t n,
                        int64_t k, const bnbq_format *format, int64_t blocksize, bnbq_weight4 *w) {
    int64_t size;
    if (!get_size(call, n, k, &size))
        return false;
    int64_t bytes = bnbq_blocks(size, 2);
    if (experts == 0 && packed->qweight->count != bytes)
        return bnbq_wrong_shape(call, packed->qweight,
                                "%lld bytes for a weight [n = %lld, k = %lld]", (long long)bytes,
                                (long long)n, (long long)k);
    if (!expect(call, packed->qweight, experts, bytes))
        return false;
    call->n = n, call->k = k;
    *w = (bnbq_weight4){.qweight = packed->qweight->dl.data,
                        .format = format,
                        .n = n,
                        .k = k,
                        .blocksize = blocksize};
    return bnbq_check_scales(call, packed, experts, bnbq_blocks(size, blocksize), &w->absmax);
}

bool bnbq_check_packed8(bnbq_call *call, const bnbq_arg *qweight, const bnbq_arg *absmax,
                        int64_t experts, int64_t blocksize, bnbq_weight8 *w) {
    const DLTensor *q = &qweight->dl;
    if (experts == 0 && q->ndim != 2)
        return bnbq_wrong_shape(call, qweight, "(n, k)");
    if (experts > 0 && (q->ndim != 3 || q->shape[0] != experts))
        return bnbq_wrong_shape(call, qweight, "(%lld, n, k)", (long long)experts);
    int64_t n = q->shape[q->ndim - 2], k = q->shape[q->ndim - 1], count;
    if (!get_size(call, n, blocksize == 0 ? 1 : bnbq_blocks(k, blocksize), &count) ||
        !expect(call, absmax, experts, count))
        return false;
    call->n = n, call->k = k;
    *w = (bnbq_weight8){
        .qweight = q->data, .absmax = absmax->dl.data, .n = n, .k = k, .blocksize = blocksize};
    return true;
}

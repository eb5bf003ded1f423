/* ops_quantize.c - weights to packed bytes and back, as Python functions; see ops.h. */
#include "operation.h"

#include "arguments.h"

#include <string.h>

/* What an element, or a scale, counts for in multiplications. */
enum { PER_ELEMENT = 8 };

#define RUN(view, on_cpu, on_cuda)                                                                 \
    BNBQ_RUN(status, &call, (double)(view)->count *PER_ELEMENT, on_cpu, on_cuda)

/* "w has nan at index (3, 17)" */
static void not_finite(const bnbq_call *call, const bnbq_arg *view, int64_t flat) {
    const char *element = view->dl.data;
    const int size = view->dtype == BNBQ_F32 ? 4 : 2;
    PyObject *index = PyTuple_New(view->dl.ndim);
    for (int i = view->dl.ndim - 1; index != NULL && i >= 0; i--) {
        int64_t position = flat % view->dl.shape[i];
        flat /= view->dl.shape[i];
        element += position * view->dl.strides[i] * size;
        PyObject *item = PyLong_FromLongLong(position);
        if (item == NULL || PyTuple_SetItem(index, i, item) < 0)
            Py_CLEAR(index);
    }
    if (index == NULL)
        return;
    uint32_t bits = 0, infinity = view->dtype == BNBQ_F16 ? 0x7c000000 : 0x7f800000;
    memcpy((char *)&bits + 4 - size, element, (size_t)size); /* little endian: the upper half */
    bnbq_fail(call, PyExc_ValueError, "%s has %s at index %S", view->name,
              (bits & 0x7fffffff) > infinity ? "nan"
              : bits >> 31                   ? "-inf"
                                             : "inf",
              index);
    Py_DECREF(index);
}

static PyObject *finish(bnbq_call *call, bnbq_status status) {
    return bnbq_finish_operation(call, status, Py_NewRef(Py_None));
}

/* ------------------------------------------------------------------ 4 bit */

PyObject *bnbq_py_quantize_4bit(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    bnbq_call call;
    bnbq_arg *w, *qweight, *absmax;
    const bnbq_format *format;
    int64_t blocksize, bad = 0;
    bnbq_tensor rows;
    bnbq_status status = BNBQ_OK;

    if (!bnbq_begin_operation(&call, module, "quantize_4bit", nargs, 5) ||
        !(w = bnbq_input(&call, args[0], "w", BNBQ_IS_FLOAT)) ||
        !(qweight = bnbq_packed_output(&call, args[1], "qweight", BNBQ_IS_U8)) ||
        !(absmax = bnbq_packed_output(&call, args[2], "absmax", BNBQ_IS_F32)) ||
        !(format = bnbq_get_format(&call, args[3])) ||
        !bnbq_get_blocksize(&call, args[4], false, &blocksize) ||
        !bnbq_expect_count(&call, qweight, bnbq_blocks(w->count, 2)) ||
        !bnbq_expect_count(&call, absmax, bnbq_blocks(w->count, blocksize)) ||
        !bnbq_finish(&call) || !bnbq_rows(&call, w, &rows))
        return bnbq_abandon_operation(&call, NULL);
    if (w->count > 0)
        RUN(w,
            bnbq_quantize_4bit(&rows, format, blocksize, qweight->dl.data, absmax->dl.data, &bad),
            bnbq_cuda_quantize_4bit(&call.cuda, &rows, format, blocksize, qweight->dl.data,
                                    absmax->dl.data));
    if (status == BNBQ_NOT_FINITE)
        not_finite(&call, w, bad);
    return finish(&call, status);
}

PyObject *bnbq_py_dequantize_4bit(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    bnbq_call call;
    bnbq_packed4 packed;
    bnbq_arg *out;
    const bnbq_format *format;
    int64_t blocksize, k;
    bnbq_weight4 w;
    bnbq_tensor rows;
    bnbq_status status = BNBQ_OK;

    if (!bnbq_begin_operation(&call, module, "dequantize_4bit", nargs, 7) ||
        !bnbq_view_packed4(&call, args, &packed) ||
        !(out = bnbq_output(&call, args[4], "out", BNBQ_IS_FLOAT)) ||
        !(format = bnbq_get_format(&call, args[5])) ||
        !bnbq_get_blocksize(&call, args[6], false, &blocksize) || !bnbq_has_columns(&call, out))
        return bnbq_abandon_operation(&call, NULL);
    k = bnbq_columns(out);
    if (!bnbq_check_packed4(&call, &packed, 0, k == 0 ? 0 : out->count / k, k, format, blocksize,
                            &w) ||
        !bnbq_finish(&call) || !bnbq_rows(&call, out, &rows))
        return bnbq_abandon_operation(&call, NULL);
    if (out->count > 0)
        RUN(out, bnbq_dequantize_4bit(&w, &rows), bnbq_cuda_dequantize_4bit(&call.cuda, &w, &rows));
    return finish(&call, status);
}

PyObject *bnbq_py_quantize_absmax(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    bnbq_call call;
    bnbq_arg *absmax, *codes, *absmax2, *offset;
    bnbq_status status;

    if (!bnbq_begin_operation(&call, module, "quantize_absmax", nargs, 4) ||
        !(absmax = bnbq_packed_input(&call, args[0], "absmax", BNBQ_IS_F32)) ||
        !(codes = bnbq_packed_output(&call, args[1], "codes", BNBQ_IS_U8)) ||
        !(absmax2 = bnbq_packed_output(&call, args[2], "absmax2", BNBQ_IS_F32)) ||
        !(offset = bnbq_packed_output(&call, args[3], "absmax_offset", BNBQ_IS_F32)) ||
        !bnbq_expect_count(&call, codes, absmax->count) ||
        !bnbq_expect_count(&call, absmax2, bnbq_blocks(absmax->count, BNBQ_ABSMAX_BLOCK)) ||
        !bnbq_expect_count(&call, offset, 1) || !bnbq_finish(&call))
        return bnbq_abandon_operation(&call, NULL);
    RUN(absmax,
        bnbq_quantize_absmax(absmax->dl.data, absmax->count, codes->dl.data, absmax2->dl.data,
                             offset->dl.data),
        bnbq_cuda_quantize_absmax(&call.cuda, absmax->dl.data, absmax->count, codes->dl.data,
                                  absmax2->dl.data, offset->dl.data));
    return finish(&call, status);
}

PyObject *bnbq_py_dequantize_absmax(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    bnbq_call call;
    bnbq_packed4 packed;
    bnbq_arg *out;
    bnbq_absmax absmax;
    bnbq_status status;

    if (!bnbq_begin_operation(&call, module, "dequantize_absmax", nargs, 4))
        return NULL;
    for (int i = 1; i < 3; i++) {
        if (args[i] == Py_None) {
            bnbq_fail(&call, PyExc_TypeError, "%s is None, wanted a tensor",
                      i == 1 ? "absmax2" : "absmax_offset");
            return NULL;
        }
    }
    if (!bnbq_view_scales(&call, args, &packed) ||
        !(out = bnbq_packed_output(&call, args[3], "out", BNBQ_IS_F32)) ||
        !bnbq_expect_count(&call, out, packed.absmax->count) ||
        !bnbq_check_scales(&call, &packed, 0, packed.absmax->count, &absmax) || !bnbq_finish(&call))
        return bnbq_abandon_operation(&call, NULL);
    RUN(out, (bnbq_load_absmax(&absmax, 0, out->count, out->dl.data), BNBQ_OK),
        bnbq_cuda_dequantize_absmax(&call.cuda, &absmax, out->count, out->dl.data));
    return finish(&call, status);
}

/* ------------------------------------------------------------------ 8 bit */

/* `matrix`, of floats, has the shape of the packed weight. */
static bool check_matrix8(bnbq_call *call, const bnbq_arg *matrix, const bnbq_arg *qweight,
                          const bnbq_arg *absmax, PyObject *blocksize, bnbq_weight8 *packed,
                          bnbq_tensor *rows) {
    int64_t size;
    if (!bnbq_get_blocksize(call, blocksize, true, &size) ||
        !bnbq_check_packed8(call, qweight, absmax, 0, size, packed))
        return false;
    if (matrix->dl.ndim != 2 || matrix->dl.shape[0] != packed->n ||
        matrix->dl.shape[1] != packed->k)
        return bnbq_wrong_shape(call, matrix, "that of qweight, (%lld, %lld)", (long long)packed->n,
                                (long long)packed->k);
    return bnbq_finish(call) && bnbq_rows(call, matrix, rows);
}

PyObject *bnbq_py_quantize_8bit(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    bnbq_call call;
    bnbq_arg *w, *qweight, *absmax;
    int64_t bad = 0;
    bnbq_weight8 packed;
    bnbq_tensor rows;
    bnbq_status status;

    if (!bnbq_begin_operation(&call, module, "quantize_8bit", nargs, 4) ||
        !(w = bnbq_input(&call, args[0], "w", BNBQ_IS_FLOAT)) ||
        !(qweight = bnbq_packed_output(&call, args[1], "qweight", BNBQ_IS_I8)) ||
        !(absmax = bnbq_packed_output(&call, args[2], "absmax", BNBQ_IS_F32)) ||
        !check_matrix8(&call, w, qweight, absmax, args[3], &packed, &rows))
        return bnbq_abandon_operation(&call, NULL);
    RUN(w, bnbq_quantize_8bit(&rows, packed.blocksize, qweight->dl.data, absmax->dl.data, &bad),
        bnbq_cuda_quantize_8bit(&call.cuda, &rows, packed.blocksize, qweight->dl.data,
                                absmax->dl.data));
    if (status == BNBQ_NOT_FINITE)
        not_finite(&call, w, bad);
    return finish(&call, status);
}

PyObject *bnbq_py_dequantize_8bit(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    bnbq_call call;
    bnbq_arg *qweight, *absmax, *out;
    bnbq_weight8 packed;
    bnbq_tensor rows;
    bnbq_status status = BNBQ_OK;

    if (!bnbq_begin_operation(&call, module, "dequantize_8bit", nargs, 4) ||
        !(qweight = bnbq_packed_input(&call, args[0], "qweight", BNBQ_IS_I8)) ||
        !(absmax = bnbq_packed_input(&call, args[1], "absmax", BNBQ_IS_F32)) ||
        !(out = bnbq_output(&call, args[2], "out", BNBQ_IS_FLOAT)) ||
        !check_matrix8(&call, out, qweight, absmax, args[3], &packed, &rows))
        return bnbq_abandon_operation(&call, NULL);
    if (out->count > 0)
        RUN(out, bnbq_dequantize_8bit(&packed, &rows),
            bnbq_cuda_dequantize_8bit(&call.cuda, &packed, &rows));
    return finish(&call, status);
}

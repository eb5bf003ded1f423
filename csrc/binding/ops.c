/* ops.c - one function per operation: view the tensors, check, release the GIL, call, raise.
 *
 * Tensors on a GPU take the same way as those on the CPU up to the call: then RUN branches.
 *
 * All are positional-only; keywords, defaults and documentation live in bnbq/ops.py. Where a
 * caller gives an int instead of `out`, the result is allocated here, of the kind, dtype and
 * device of the input and with that many columns: for a small layer this costs a third of what
 * torch.empty does.
 */
#include "ops.h"

#include "arguments.h"
#include "device.h"

#include <string.h>

/* The GIL is kept for less work than this, in multiplications: some 2 us for a vector kernel.
 * Giving it up and taking it back costs 0.1 us alone, but up to 5 ms (sys.getswitchinterval) where
 * another thread is waiting for it. */
static const double keep_gil = 1 << 15;
/* What a quantised or dequantised element, or a scale, counts for. */
enum { PER_ELEMENT = 8 };

/* status = the core's function or that of the GPU, where the tensors are; `work` is for the core.
 */
#define RUN(work, on_cpu, on_cuda)                                                                 \
    do {                                                                                           \
        if (bnbq_on_cuda(&call)) {                                                                 \
            status = BNBQ_DEVICE_ERROR;                                                            \
            if (bnbq_enter_cuda(&call)) {                                                          \
                status = on_cuda;                                                                  \
                bnbq_leave_cuda(&call);                                                            \
            }                                                                                      \
        } else {                                                                                   \
            PyThreadState *thread = (double)(work) < keep_gil ? NULL : PyEval_SaveThread();        \
            status = on_cpu;                                                                       \
            if (thread != NULL)                                                                    \
                PyEval_RestoreThread(thread);                                                      \
        }                                                                                          \
    } while (0)

static double elements(const bnbq_arg *view) {
    return (double)view->count * PER_ELEMENT;
}

static bool begin(bnbq_call *call, PyObject *module, const char *op, Py_ssize_t got,
                  Py_ssize_t wanted) {
    bnbq_begin(call, PyModule_GetState(module), op);
    if (got != wanted)
        return bnbq_fail(call, PyExc_TypeError, "got %zd arguments, wanted %zd", got, wanted);
    return true;
}

static int64_t columns(const bnbq_arg *view) {
    return view->dl.shape[view->dl.ndim - 1];
}

static bool has_columns(const bnbq_call *call, const bnbq_arg *view) {
    return view->dl.ndim > 0 || bnbq_wrong_shape(call, view, "at least one dimension");
}

static bool same_rows(const bnbq_call *call, const bnbq_arg *x, const bnbq_arg *out) {
    bool same = x->dl.ndim == out->dl.ndim;
    for (int i = 0; same && i < x->dl.ndim - 1; i++)
        same = x->dl.shape[i] == out->dl.shape[i];
    if (same)
        return true;
    PyObject *shape = bnbq_shape(x);
    if (shape != NULL)
        bnbq_wrong_shape(call, out, "the leading dimensions of %s, %S", x->name, shape);
    Py_XDECREF(shape);
    return false;
}

static PyObject *none(void) {
    Py_INCREF(Py_None);
    return Py_None;
}

/* The output: a tensor, or for `object` an int a new one like x with that many columns, or for None
 * one with `width` columns (-1: None is not allowed). *result is what to return to Python. */
static bnbq_arg *view_result(bnbq_call *call, PyObject *object, PyObject *x_object,
                             const bnbq_arg *x, int64_t width, PyObject **result) {
    bool is_none = object == Py_None && width >= 0;
    if (!is_none && !PyLong_Check(object)) {
        *result = none();
        return bnbq_output(call, object, "out", BNBQ_IS_FLOAT);
    }
    if (!is_none && !bnbq_get_int(call, object, "out", &width))
        return NULL;
    if (width < 0) {
        bnbq_fail(call, PyExc_ValueError, "out is %R, wanted at least 0 columns", object);
        return NULL;
    }
    return bnbq_new_output(call, x_object, x, width, result);
}

static bool view_bias(bnbq_call *call, PyObject *object, int64_t n, bnbq_tensor *storage,
                      bnbq_tensor **bias) {
    *bias = NULL;
    if (object == Py_None)
        return true;
    bnbq_arg *view = bnbq_input(call, object, "bias", BNBQ_IS_FLOAT);
    if (view == NULL)
        return false;
    if (view->dl.ndim != 1 || view->count != n)
        return bnbq_wrong_shape(call, view, "(%lld,)", (long long)n);
    *bias = storage;
    return bnbq_rows(call, view, storage);
}

/* "linear4bit on cuda:0, x (2, 4096), weight (4096, 4096): out of memory" */
static void device_error(const bnbq_call *call) {
    const bnbq_arg *first = &call->args[0];
    char device[BNBQ_DEVICE_TEXT], weight[64] = "";
    bnbq_describe_device(call->device, device);
    if (call->n >= 0)
        PyOS_snprintf(weight, sizeof weight, ", weight (%lld, %lld)", (long long)call->n,
                      (long long)call->k);
    PyObject *shape = bnbq_shape(first);
    if (shape != NULL)
        PyErr_Format(PyExc_RuntimeError, "%s on %s, %s %S%s: %s", call->op, device, first->name,
                     shape, weight, call->cuda.error);
    Py_XDECREF(shape);
}

/* A result that nobody gets, whether or not an exception is set: freeing its memory may run Python.
 */
static void drop(PyObject *result) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    Py_XDECREF(result);
    PyErr_Restore(type, value, traceback);
}

static PyObject *finish(bnbq_call *call, bnbq_status status, PyObject *result) {
    if (status != BNBQ_OK) {
        drop(result);
        result = NULL;
        if (PyErr_Occurred() != NULL) { /* torch has said what is wrong */
        } else if (status == BNBQ_NO_MEMORY && bnbq_on_cuda(call)) {
            bnbq_no_cuda_memory(call, "no memory for working space");
        } else if (status == BNBQ_NO_MEMORY) {
            bnbq_fail(call, PyExc_MemoryError, "no memory for working space");
        } else if (status == BNBQ_NOT_FINITE) { /* of a weight: with its index, before this */
            bnbq_fail(call, PyExc_ValueError, "absmax has a NaN or an Inf, wanted finite scales");
        } else {
            device_error(call);
        }
    }
    bnbq_release(call);
    return result;
}

static PyObject *abandon(bnbq_call *call, PyObject *result) {
    bnbq_release(call);
    drop(result);
    return NULL;
}

/* For gradients bnbq_cuda.h says why; experts on a GPU are multiplied one by one. */
static bnbq_status no_gpu_kernel(bnbq_call *call) {
    PyOS_snprintf(call->cuda.error, sizeof call->cuda.error,
                  "a GPU has no kernel for this; bnbq.ops does it with others");
    return BNBQ_DEVICE_ERROR;
}

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

/* ------------------------------------------------------------------ 4 bit */

PyObject *bnbq_py_quantize_4bit(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    bnbq_call call;
    bnbq_arg *w, *qweight, *absmax;
    const bnbq_format *format;
    int64_t blocksize, bad = 0;
    bnbq_tensor rows;
    bnbq_status status = BNBQ_OK;

    if (!begin(&call, module, "quantize_4bit", nargs, 5))
        return NULL;
    if (!(w = bnbq_input(&call, args[0], "w", BNBQ_IS_FLOAT)) ||
        !(qweight = bnbq_packed_output(&call, args[1], "qweight", BNBQ_IS_U8)) ||
        !(absmax = bnbq_packed_output(&call, args[2], "absmax", BNBQ_IS_F32)) ||
        !(format = bnbq_get_format(&call, args[3])) ||
        !bnbq_get_blocksize(&call, args[4], false, &blocksize) ||
        !bnbq_expect_count(&call, qweight, bnbq_blocks(w->count, 2)) ||
        !bnbq_expect_count(&call, absmax, bnbq_blocks(w->count, blocksize)) ||
        !bnbq_finish(&call) || !bnbq_rows(&call, w, &rows))
        return abandon(&call, NULL);
    if (w->count > 0)
        RUN(elements(w),
            bnbq_quantize_4bit(&rows, format, blocksize, qweight->dl.data, absmax->dl.data, &bad),
            bnbq_cuda_quantize_4bit(&call.cuda, &rows, format, blocksize, qweight->dl.data,
                                    absmax->dl.data));
    if (status == BNBQ_NOT_FINITE) {
        not_finite(&call, w, bad);
        return abandon(&call, NULL);
    }
    return finish(&call, status, none());
}

PyObject *bnbq_py_dequantize_4bit(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    bnbq_call call;
    bnbq_packed4 packed;
    bnbq_arg *out;
    const bnbq_format *format;
    int64_t blocksize;
    bnbq_weight4 w;
    bnbq_tensor rows;
    bnbq_status status = BNBQ_OK;

    if (!begin(&call, module, "dequantize_4bit", nargs, 7))
        return NULL;
    if (!bnbq_view_packed4(&call, args, &packed) ||
        !(out = bnbq_output(&call, args[4], "out", BNBQ_IS_FLOAT)) ||
        !(format = bnbq_get_format(&call, args[5])) ||
        !bnbq_get_blocksize(&call, args[6], false, &blocksize) || !has_columns(&call, out) ||
        !bnbq_check_packed4(&call, &packed, NULL, columns(out) == 0 ? 0 : out->count / columns(out),
                            NULL, columns(out), format, blocksize, &w) ||
        !bnbq_finish(&call) || !bnbq_rows(&call, out, &rows))
        return abandon(&call, NULL);
    if (out->count > 0)
        RUN(elements(out), bnbq_dequantize_4bit(&w, &rows),
            bnbq_cuda_dequantize_4bit(&call.cuda, &w, &rows));
    return finish(&call, status, none());
}

PyObject *bnbq_py_quantize_absmax(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    bnbq_call call;
    bnbq_arg *absmax, *codes, *absmax2, *offset;
    bnbq_status status;

    if (!begin(&call, module, "quantize_absmax", nargs, 4))
        return NULL;
    if (!(absmax = bnbq_packed_input(&call, args[0], "absmax", BNBQ_IS_F32)) ||
        !(codes = bnbq_packed_output(&call, args[1], "codes", BNBQ_IS_U8)) ||
        !(absmax2 = bnbq_packed_output(&call, args[2], "absmax2", BNBQ_IS_F32)) ||
        !(offset = bnbq_packed_output(&call, args[3], "absmax_offset", BNBQ_IS_F32)) ||
        !bnbq_expect_count(&call, codes, absmax->count) ||
        !bnbq_expect_count(&call, absmax2, bnbq_blocks(absmax->count, BNBQ_ABSMAX_BLOCK)) ||
        !bnbq_expect_count(&call, offset, 1) || !bnbq_finish(&call))
        return abandon(&call, NULL);
    RUN(elements(absmax),
        bnbq_quantize_absmax(absmax->dl.data, absmax->count, codes->dl.data, absmax2->dl.data,
                             offset->dl.data),
        bnbq_cuda_quantize_absmax(&call.cuda, absmax->dl.data, absmax->count, codes->dl.data,
                                  absmax2->dl.data, offset->dl.data));
    return finish(&call, status, none());
}

PyObject *bnbq_py_dequantize_absmax(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    bnbq_call call;
    bnbq_packed4 packed;
    bnbq_arg *out;
    bnbq_absmax absmax;
    bnbq_status status;

    if (!begin(&call, module, "dequantize_absmax", nargs, 4))
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
        !bnbq_check_scales(&call, &packed, packed.absmax->count, &absmax) || !bnbq_finish(&call))
        return abandon(&call, NULL);
    RUN(elements(out), (bnbq_load_absmax(&absmax, 0, out->count, out->dl.data), BNBQ_OK),
        bnbq_cuda_dequantize_absmax(&call.cuda, &absmax, out->count, out->dl.data));
    return finish(&call, status, none());
}

PyObject *bnbq_py_linear4bit(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    bnbq_call call;
    bnbq_packed4 packed;
    bnbq_arg *x, *out;
    const bnbq_format *format;
    bnbq_dtype compute;
    int64_t blocksize;
    bool int8_activations;
    bnbq_weight4 w;
    bnbq_tensor x_rows, out_rows, bias_row, *bias;
    PyObject *result = NULL;
    bnbq_status status = BNBQ_OK;

    if (!begin(&call, module, "linear4bit", nargs, 11))
        return NULL;
    if (!(x = bnbq_input(&call, args[0], "x", BNBQ_IS_FLOAT)) || !has_columns(&call, x) ||
        !bnbq_view_packed4(&call, args + 1, &packed) ||
        !(out = view_result(&call, args[6], args[0], x, -1, &result)) ||
        !same_rows(&call, x, out) || !(format = bnbq_get_format(&call, args[7])) ||
        !bnbq_get_blocksize(&call, args[8], false, &blocksize) ||
        !bnbq_get_compute_dtype(&call, args[9], x->dtype, &compute) ||
        !bnbq_get_activations(&call, args[10], &int8_activations) ||
        !bnbq_check_packed4(&call, &packed, "out", columns(out), "x", columns(x), format, blocksize,
                            &w) ||
        !view_bias(&call, args[5], w.n, &bias_row, &bias) || !bnbq_finish(&call) ||
        !bnbq_rows(&call, x, &x_rows) || !bnbq_rows(&call, out, &out_rows))
        return abandon(&call, result);
    if (out->count > 0)
        RUN((double)x->count * (double)w.n,
            bnbq_linear_4bit(&x_rows, &w, bias, compute, int8_activations, &out_rows),
            bnbq_cuda_linear_4bit(&call.cuda, &x_rows, &w, bias, compute, &out_rows));
    return finish(&call, status, result);
}

PyObject *bnbq_py_linear4bit_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    bnbq_call call;
    bnbq_packed4 packed;
    bnbq_arg *gy, *out;
    const bnbq_format *format;
    bnbq_dtype compute;
    int64_t blocksize;
    bnbq_weight4 w;
    bnbq_tensor gy_rows, out_rows;
    PyObject *result = NULL;
    bnbq_status status = BNBQ_OK;

    if (!begin(&call, module, "linear4bit_backward", nargs, 9))
        return NULL;
    if (!(gy = bnbq_input(&call, args[0], "gy", BNBQ_IS_FLOAT)) || !has_columns(&call, gy) ||
        !bnbq_view_packed4(&call, args + 1, &packed) ||
        !(out = view_result(&call, args[5], args[0], gy, -1, &result)) ||
        !same_rows(&call, gy, out) || !(format = bnbq_get_format(&call, args[6])) ||
        !bnbq_get_blocksize(&call, args[7], false, &blocksize) ||
        !bnbq_get_compute_dtype(&call, args[8], gy->dtype, &compute) ||
        !bnbq_check_packed4(&call, &packed, "gy", columns(gy), "out", columns(out), format,
                            blocksize, &w) ||
        !bnbq_finish(&call) || !bnbq_rows(&call, gy, &gy_rows) || !bnbq_rows(&call, out, &out_rows))
        return abandon(&call, result);
    if (out->count > 0)
        RUN((double)gy->count * (double)w.k,
            bnbq_linear_4bit_backward(&gy_rows, &w, compute, &out_rows), no_gpu_kernel(&call));
    return finish(&call, status, result);
}

/* ------------------------------------------------------------------ 8 bit */

static bool get_threshold(const bnbq_call *call, PyObject *object, double *threshold) {
    *threshold = PyFloat_AsDouble(object);
    if (*threshold == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        return bnbq_fail(call, PyExc_TypeError, "threshold is %R, wanted a float", object);
    }
    return *threshold >= 0 ||
           bnbq_fail(call, PyExc_ValueError, "threshold is %R, wanted at least 0", object);
}

PyObject *bnbq_py_quantize_8bit(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    bnbq_call call;
    bnbq_arg *w, *qweight, *absmax;
    int64_t blocksize, bad = 0;
    bnbq_weight8 packed;
    bnbq_tensor rows;
    bnbq_status status = BNBQ_OK;

    if (!begin(&call, module, "quantize_8bit", nargs, 4))
        return NULL;
    if (!(w = bnbq_input(&call, args[0], "w", BNBQ_IS_FLOAT)) ||
        !(qweight = bnbq_packed_output(&call, args[1], "qweight", BNBQ_IS_I8)) ||
        !(absmax = bnbq_packed_output(&call, args[2], "absmax", BNBQ_IS_F32)) ||
        !bnbq_get_blocksize(&call, args[3], true, &blocksize) ||
        !bnbq_check_packed8(&call, qweight, absmax, blocksize, &packed))
        return abandon(&call, NULL);
    if (w->dl.ndim != 2 || w->dl.shape[0] != packed.n || w->dl.shape[1] != packed.k) {
        bnbq_wrong_shape(&call, w, "that of qweight, (%lld, %lld)", (long long)packed.n,
                         (long long)packed.k);
        return abandon(&call, NULL);
    }
    if (!bnbq_finish(&call) || !bnbq_rows(&call, w, &rows))
        return abandon(&call, NULL);
    RUN(elements(w), bnbq_quantize_8bit(&rows, blocksize, qweight->dl.data, absmax->dl.data, &bad),
        bnbq_cuda_quantize_8bit(&call.cuda, &rows, blocksize, qweight->dl.data, absmax->dl.data));
    if (status == BNBQ_NOT_FINITE) {
        not_finite(&call, w, bad);
        return abandon(&call, NULL);
    }
    return finish(&call, status, none());
}

PyObject *bnbq_py_dequantize_8bit(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    bnbq_call call;
    bnbq_arg *qweight, *absmax, *out;
    int64_t blocksize;
    bnbq_weight8 packed;
    bnbq_tensor rows;
    bnbq_status status = BNBQ_OK;

    if (!begin(&call, module, "dequantize_8bit", nargs, 4))
        return NULL;
    if (!(qweight = bnbq_packed_input(&call, args[0], "qweight", BNBQ_IS_I8)) ||
        !(absmax = bnbq_packed_input(&call, args[1], "absmax", BNBQ_IS_F32)) ||
        !(out = bnbq_output(&call, args[2], "out", BNBQ_IS_FLOAT)) ||
        !bnbq_get_blocksize(&call, args[3], true, &blocksize) ||
        !bnbq_check_packed8(&call, qweight, absmax, blocksize, &packed))
        return abandon(&call, NULL);
    if (out->dl.ndim != 2 || out->dl.shape[0] != packed.n || out->dl.shape[1] != packed.k) {
        bnbq_wrong_shape(&call, out, "that of qweight, (%lld, %lld)", (long long)packed.n,
                         (long long)packed.k);
        return abandon(&call, NULL);
    }
    if (!bnbq_finish(&call) || !bnbq_rows(&call, out, &rows))
        return abandon(&call, NULL);
    if (out->count > 0)
        RUN(elements(out), bnbq_dequantize_8bit(&packed, &rows),
            bnbq_cuda_dequantize_8bit(&call.cuda, &packed, &rows));
    return finish(&call, status, none());
}

PyObject *bnbq_py_linear8bitlt(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    bnbq_call call;
    bnbq_arg *x, *qweight, *absmax, *out;
    int64_t blocksize;
    bnbq_weight8 w;
    bnbq_tensor x_rows, out_rows, bias_row, *bias;
    PyObject *result = NULL;
    double threshold;
    bnbq_status status = BNBQ_OK;

    if (!begin(&call, module, "linear8bitlt", nargs, 7) ||
        !get_threshold(&call, args[5], &threshold))
        return NULL;
    if (!(x = bnbq_input(&call, args[0], "x", BNBQ_IS_FLOAT)) || !has_columns(&call, x) ||
        !(qweight = bnbq_packed_input(&call, args[1], "qweight", BNBQ_IS_I8)) ||
        !(absmax = bnbq_packed_input(&call, args[2], "absmax", BNBQ_IS_F32)) ||
        !bnbq_get_blocksize(&call, args[6], true, &blocksize) ||
        !bnbq_check_packed8(&call, qweight, absmax, blocksize, &w) ||
        !(out = view_result(&call, args[4], args[0], x, w.n, &result)) || !same_rows(&call, x, out))
        return abandon(&call, result);
    if (columns(x) != w.k || columns(out) != w.n) {
        const bnbq_arg *wrong = columns(x) != w.k ? x : out;
        bnbq_fail(&call, PyExc_ValueError, "%s has %lld columns, the weight has %s = %lld",
                  wrong->name, (long long)columns(wrong), wrong == x ? "k" : "n",
                  (long long)(wrong == x ? w.k : w.n));
        return abandon(&call, result);
    }
    if (!view_bias(&call, args[3], w.n, &bias_row, &bias) || !bnbq_finish(&call) ||
        !bnbq_rows(&call, x, &x_rows) || !bnbq_rows(&call, out, &out_rows))
        return abandon(&call, result);
    if (out->count > 0)
        RUN((double)x->count * (double)w.n,
            bnbq_linear_8bit(&x_rows, &w, bias, (float)threshold, &out_rows),
            bnbq_cuda_linear_8bit(&call.cuda, &x_rows, &w, bias, (float)threshold, &out_rows));
    return finish(&call, status, result);
}

PyObject *bnbq_py_linear8bitlt_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    bnbq_call call;
    bnbq_arg *gy, *qweight, *absmax, *out;
    int64_t blocksize;
    bnbq_weight8 w;
    bnbq_tensor gy_rows, out_rows;
    PyObject *result = NULL;
    bnbq_status status = BNBQ_OK;

    if (!begin(&call, module, "linear8bitlt_backward", nargs, 5))
        return NULL;
    if (!(gy = bnbq_input(&call, args[0], "gy", BNBQ_IS_FLOAT)) || !has_columns(&call, gy) ||
        !(qweight = bnbq_packed_input(&call, args[1], "qweight", BNBQ_IS_I8)) ||
        !(absmax = bnbq_packed_input(&call, args[2], "absmax", BNBQ_IS_F32)) ||
        !bnbq_get_blocksize(&call, args[4], true, &blocksize) ||
        !bnbq_check_packed8(&call, qweight, absmax, blocksize, &w) ||
        !(out = view_result(&call, args[3], args[0], gy, w.k, &result)) ||
        !same_rows(&call, gy, out))
        return abandon(&call, result);
    if (columns(gy) != w.n || columns(out) != w.k) {
        const bnbq_arg *wrong = columns(gy) != w.n ? gy : out;
        bnbq_fail(&call, PyExc_ValueError, "%s has %lld columns, the weight has %s = %lld",
                  wrong->name, (long long)columns(wrong), wrong == gy ? "n" : "k",
                  (long long)(wrong == gy ? w.n : w.k));
        return abandon(&call, result);
    }
    if (!bnbq_finish(&call) || !bnbq_rows(&call, gy, &gy_rows) || !bnbq_rows(&call, out, &out_rows))
        return abandon(&call, result);
    if (out->count > 0)
        RUN((double)gy->count * (double)w.k, bnbq_linear_8bit_backward(&gy_rows, &w, &out_rows),
            no_gpu_kernel(&call));
    return finish(&call, status, result);
}

/* ------------------------------------------------------------------ experts */

/* From a list of ints: ascending, none behind the last of `rows`. Free with PyMem_Free. */
static bool get_ends(const bnbq_call *call, PyObject *object, int64_t rows, bnbq_experts *experts) {
    if (!PyList_Check(object) || PyList_Size(object) == 0)
        return bnbq_fail(call, PyExc_TypeError, "ends is %R, wanted a list of ints", object);
    experts->count = PyList_Size(object);
    int64_t *ends = PyMem_Malloc((size_t)experts->count * sizeof(int64_t)), last = 0;
    experts->ends = ends;
    if (ends == NULL)
        return bnbq_fail(call, PyExc_MemoryError, "no memory for ends");
    for (Py_ssize_t i = 0; i < experts->count; last = ends[i++]) {
        if (!bnbq_get_int(call, PyList_GetItem(object, i), "an end", &ends[i]))
            return false;
        if (ends[i] < last || ends[i] > rows)
            return bnbq_fail(call, PyExc_ValueError, "ends[%zd] is %lld, wanted %lld to %lld", i,
                             (long long)ends[i], (long long)last, (long long)rows);
    }
    return true;
}

static bool is_matrix(const bnbq_call *call, const bnbq_arg *view) {
    return view->dl.ndim == 2 || bnbq_wrong_shape(call, view, "(rows, columns)");
}

static bool view_biases(bnbq_call *call, PyObject *object, int64_t experts, int64_t n,
                        bnbq_tensor *storage, bnbq_tensor **bias) {
    *bias = NULL;
    if (object == Py_None)
        return true;
    bnbq_arg *view = bnbq_input(call, object, "bias", BNBQ_IS_FLOAT);
    if (view == NULL)
        return false;
    if (view->dl.ndim != 2 || view->dl.shape[0] != experts || view->dl.shape[1] != n)
        return bnbq_wrong_shape(call, view, "(%lld, %lld)", (long long)experts, (long long)n);
    *bias = storage;
    return bnbq_rows(call, view, storage);
}

static PyObject *finish_experts(bnbq_call *call, bnbq_status status, bnbq_experts *experts,
                                PyObject *result) {
    PyMem_Free((void *)experts->ends);
    return finish(call, status, result);
}

static PyObject *abandon_experts(bnbq_call *call, bnbq_experts *experts, PyObject *result) {
    PyMem_Free((void *)experts->ends);
    return abandon(call, result);
}

PyObject *bnbq_py_linear4bit_experts(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    bnbq_call call;
    bnbq_packed4 packed;
    bnbq_arg *x, *out;
    const bnbq_format *format;
    bnbq_dtype compute;
    int64_t blocksize;
    bool int8_activations;
    bnbq_experts experts = {0};
    bnbq_weight4 w;
    bnbq_tensor x_rows, out_rows, bias_rows, *bias;
    PyObject *result = NULL;
    bnbq_status status = BNBQ_OK;

    if (!begin(&call, module, "linear4bit_experts", nargs, 12))
        return NULL;
    if (!(x = bnbq_input(&call, args[0], "x", BNBQ_IS_FLOAT)) || !is_matrix(&call, x) ||
        !get_ends(&call, args[1], x->dl.shape[0], &experts) ||
        !bnbq_view_packed4(&call, args + 2, &packed) ||
        !(out = view_result(&call, args[7], args[0], x, -1, &result)) ||
        !same_rows(&call, x, out) || !(format = bnbq_get_format(&call, args[8])) ||
        !bnbq_get_blocksize(&call, args[9], false, &blocksize) ||
        !bnbq_get_compute_dtype(&call, args[10], x->dtype, &compute) ||
        !bnbq_get_activations(&call, args[11], &int8_activations) ||
        !bnbq_check_experts4(&call, &packed, experts.count, "out", columns(out), "x", columns(x),
                             format, blocksize, &w) ||
        !view_biases(&call, args[6], experts.count, w.n, &bias_rows, &bias) ||
        !bnbq_finish(&call) || !bnbq_rows(&call, x, &x_rows) || !bnbq_rows(&call, out, &out_rows))
        return abandon_experts(&call, &experts, result);
    if (out->count > 0)
        RUN((double)x->count * (double)w.n,
            bnbq_linear_4bit_experts(&x_rows, &w, &experts, bias, compute, int8_activations,
                                     &out_rows),
            no_gpu_kernel(&call));
    return finish_experts(&call, status, &experts, result);
}

PyObject *bnbq_py_linear4bit_experts_backward(PyObject *module, PyObject *const *args,
                                              Py_ssize_t nargs) {
    bnbq_call call;
    bnbq_packed4 packed;
    bnbq_arg *gy, *out;
    const bnbq_format *format;
    bnbq_dtype compute;
    int64_t blocksize;
    bnbq_experts experts = {0};
    bnbq_weight4 w;
    bnbq_tensor gy_rows, out_rows;
    PyObject *result = NULL;
    bnbq_status status = BNBQ_OK;

    if (!begin(&call, module, "linear4bit_experts_backward", nargs, 10))
        return NULL;
    if (!(gy = bnbq_input(&call, args[0], "gy", BNBQ_IS_FLOAT)) || !is_matrix(&call, gy) ||
        !get_ends(&call, args[1], gy->dl.shape[0], &experts) ||
        !bnbq_view_packed4(&call, args + 2, &packed) ||
        !(out = view_result(&call, args[6], args[0], gy, -1, &result)) ||
        !same_rows(&call, gy, out) || !(format = bnbq_get_format(&call, args[7])) ||
        !bnbq_get_blocksize(&call, args[8], false, &blocksize) ||
        !bnbq_get_compute_dtype(&call, args[9], gy->dtype, &compute) ||
        !bnbq_check_experts4(&call, &packed, experts.count, "gy", columns(gy), "out", columns(out),
                             format, blocksize, &w) ||
        !bnbq_finish(&call) || !bnbq_rows(&call, gy, &gy_rows) || !bnbq_rows(&call, out, &out_rows))
        return abandon_experts(&call, &experts, result);
    if (out->count > 0)
        RUN((double)gy->count * (double)w.k,
            bnbq_linear_4bit_experts_backward(&gy_rows, &w, &experts, compute, &out_rows),
            no_gpu_kernel(&call));
    return finish_experts(&call, status, &experts, result);
}

static bool expect_columns(const bnbq_call *call, const bnbq_arg *view, const char *what,
                           int64_t wanted) {
    return columns(view) == wanted ||
           bnbq_fail(call, PyExc_ValueError, "%s has %lld columns, the weights have %s = %lld",
                     view->name, (long long)columns(view), what, (long long)wanted);
}

PyObject *bnbq_py_linear8bitlt_experts(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    bnbq_call call;
    bnbq_arg *x, *qweight, *absmax, *out;
    int64_t blocksize;
    bnbq_experts experts = {0};
    bnbq_weight8 w;
    bnbq_tensor x_rows, out_rows, bias_rows, *bias;
    PyObject *result = NULL;
    double threshold;
    bnbq_status status = BNBQ_OK;

    if (!begin(&call, module, "linear8bitlt_experts", nargs, 7) ||
        !get_threshold(&call, args[5], &threshold))
        return NULL;
    if (!(x = bnbq_input(&call, args[0], "x", BNBQ_IS_FLOAT)) || !is_matrix(&call, x) ||
        !get_ends(&call, args[1], x->dl.shape[0], &experts) ||
        !(qweight = bnbq_packed_input(&call, args[2], "qweight", BNBQ_IS_I8)) ||
        !(absmax = bnbq_packed_input(&call, args[3], "absmax", BNBQ_IS_F32)) ||
        !bnbq_get_blocksize(&call, args[6], true, &blocksize) ||
        !bnbq_check_experts8(&call, qweight, absmax, experts.count, blocksize, &w) ||
        !expect_columns(&call, x, "k", w.k) ||
        !(out = view_result(&call, Py_None, args[0], x, w.n, &result)) ||
        !view_biases(&call, args[4], experts.count, w.n, &bias_rows, &bias) ||
        !bnbq_finish(&call) || !bnbq_rows(&call, x, &x_rows) || !bnbq_rows(&call, out, &out_rows))
        return abandon_experts(&call, &experts, result);
    if (out->count > 0)
        RUN((double)x->count * (double)w.n,
            bnbq_linear_8bit_experts(&x_rows, &w, &experts, bias, (float)threshold, &out_rows),
            no_gpu_kernel(&call));
    return finish_experts(&call, status, &experts, result);
}

PyObject *bnbq_py_linear8bitlt_experts_backward(PyObject *module, PyObject *const *args,
                                                Py_ssize_t nargs) {
    bnbq_call call;
    bnbq_arg *gy, *qweight, *absmax, *out;
    int64_t blocksize;
    bnbq_experts experts = {0};
    bnbq_weight8 w;
    bnbq_tensor gy_rows, out_rows;
    PyObject *result = NULL;
    bnbq_status status = BNBQ_OK;

    if (!begin(&call, module, "linear8bitlt_experts_backward", nargs, 5))
        return NULL;
    if (!(gy = bnbq_input(&call, args[0], "gy", BNBQ_IS_FLOAT)) || !is_matrix(&call, gy) ||
        !get_ends(&call, args[1], gy->dl.shape[0], &experts) ||
        !(qweight = bnbq_packed_input(&call, args[2], "qweight", BNBQ_IS_I8)) ||
        !(absmax = bnbq_packed_input(&call, args[3], "absmax", BNBQ_IS_F32)) ||
        !bnbq_get_blocksize(&call, args[4], true, &blocksize) ||
        !bnbq_check_experts8(&call, qweight, absmax, experts.count, blocksize, &w) ||
        !expect_columns(&call, gy, "n", w.n) ||
        !(out = view_result(&call, Py_None, args[0], gy, w.k, &result)) || !bnbq_finish(&call) ||
        !bnbq_rows(&call, gy, &gy_rows) || !bnbq_rows(&call, out, &out_rows))
        return abandon_experts(&call, &experts, result);
    if (out->count > 0)
        RUN((double)gy->count * (double)w.k,
            bnbq_linear_8bit_experts_backward(&gy_rows, &w, &experts, &out_rows),
            no_gpu_kernel(&call));
    return finish_experts(&call, status, &experts, result);
}

/* ops_linear.c - products with packed weights, as Python functions; see ops.h.
 *
 * Each exists for one weight and for the weights of experts; the latter takes `ends` behind x and
 * is the same otherwise. A gradient is a product too: its "x" is gy and its out is gx.
 */
#include "operation.h"

#include "arguments.h"

typedef struct product {
    bnbq_call call;
    PyObject *const *args; /* those behind x and `ends` */
    PyObject *x_object;
    bnbq_arg *x, *out;
    bnbq_experts experts; /* count 0: one weight for all rows */
    bnbq_tensor x_rows, out_rows, bias_rows;
    const bnbq_tensor *bias; /* NULL: none */
    PyObject *result;        /* what is returned to Python */
} product;

#define RUN(on_cpu, on_cuda)                                                                       \
    BNBQ_RUN(status, &p.call, (double)p.x->count *(double)bnbq_columns(p.out), on_cpu, on_cuda)

/* ------------------------------------------------------------------ a product */

/* From a list of ints: ascending, none behind the last of `rows`. */
static bool get_ends(product *p, PyObject *object, int64_t rows) {
    const bnbq_call *call = &p->call;
    if (!PyList_Check(object) || PyList_Size(object) == 0)
        return bnbq_fail(call, PyExc_TypeError, "ends is %R, wanted a list of ints", object);
    p->experts.count = PyList_Size(object);
    int64_t *ends = PyMem_Malloc((size_t)p->experts.count * sizeof(int64_t)), last = 0;
    p->experts.ends = ends; /* until end_product */
    if (ends == NULL)
        return bnbq_fail(call, PyExc_MemoryError, "no memory for ends");
    for (Py_ssize_t i = 0; i < p->experts.count; last = ends[i++]) {
        if (!bnbq_get_int(call, PyList_GetItem(object, i), "an end", &ends[i]))
            return false;
        if (ends[i] < last || ends[i] > rows)
            return bnbq_fail(call, PyExc_ValueError, "ends[%zd] is %lld, wanted %lld to %lld", i,
                             (long long)ends[i], (long long)last, (long long)rows);
    }
    return true;
}

static bool begin_product(product *p, PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                          const char *op, Py_ssize_t wanted, const char *name, bool of_experts) {
    p->experts = (bnbq_experts){0};
    p->bias = NULL;
    p->result = NULL;
    if (!bnbq_begin_operation(&p->call, module, op, nargs, wanted + of_experts))
        return false;
    p->args = args + 1 + of_experts;
    p->x_object = args[0];
    p->x = bnbq_input(&p->call, p->x_object, name, BNBQ_IS_FLOAT);
    if (p->x == NULL)
        return false;
    if (!of_experts)
        return bnbq_has_columns(&p->call, p->x);
    if (p->x->dl.ndim != 2)
        return bnbq_wrong_shape(&p->call, p->x, "(rows, columns)");
    return get_ends(p, args[1], p->x->dl.shape[0]);
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

/* The output: a tensor, or for an int a new one like x with that many columns, or for None one with
 * `width` columns (-1: None is not allowed). */
static bool view_out(product *p, PyObject *object, int64_t width) {
    bool is_none = object == Py_None && width >= 0;
    if (!is_none && !PyLong_Check(object)) {
        p->result = Py_NewRef(Py_None);
        p->out = bnbq_output(&p->call, object, "out", BNBQ_IS_FLOAT);
    } else {
        if (!is_none && !bnbq_get_int(&p->call, object, "out", &width))
            return false;
        if (width < 0)
            return bnbq_fail(&p->call, PyExc_ValueError, "out is %R, wanted at least 0 columns",
                             object);
        p->out = bnbq_new_output(&p->call, p->x_object, p->x, width, &p->result);
    }
    return p->out != NULL && same_rows(&p->call, p->x, p->out);
}

static bool expect_columns(const product *p, const bnbq_arg *view, const char *what,
                           int64_t wanted) {
    return bnbq_columns(view) == wanted ||
           bnbq_fail(&p->call, PyExc_ValueError, "%s has %lld columns, the weight%s %s = %lld",
                     view->name, (long long)bnbq_columns(view),
                     p->experts.count > 0 ? "s have" : " has", what, (long long)wanted);
}

/* bias[n], or bias[experts, n] */
static bool view_bias(product *p, PyObject *object, int64_t n) {
    if (object == Py_None)
        return true;
    const bnbq_arg *view = bnbq_input(&p->call, object, "bias", BNBQ_IS_FLOAT);
    if (view == NULL)
        return false;
    const int64_t experts = p->experts.count;
    if (experts == 0 && (view->dl.ndim != 1 || view->count != n))
        return bnbq_wrong_shape(&p->call, view, "(%lld,)", (long long)n);
    if (experts > 0 &&
        (view->dl.ndim != 2 || view->dl.shape[0] != experts || view->dl.shape[1] != n))
        return bnbq_wrong_shape(&p->call, view, "(%lld, %lld)", (long long)experts, (long long)n);
    p->bias = &p->bias_rows;
    return bnbq_rows(&p->call, view, &p->bias_rows);
}

/* After the last argument. */
static bool view_rows(product *p) {
    return bnbq_finish(&p->call) && bnbq_rows(&p->call, p->x, &p->x_rows) &&
           bnbq_rows(&p->call, p->out, &p->out_rows);
}

static PyObject *finish_product(product *p, bnbq_status status) {
    PyMem_Free((void *)p->experts.ends);
    return bnbq_finish_operation(&p->call, status, p->result);
}

static PyObject *abandon_product(product *p) {
    PyMem_Free((void *)p->experts.ends);
    return bnbq_abandon_operation(&p->call, p->result);
}

/* For gradients bnbq_cuda.h says why; experts on a GPU are multiplied one by one. */
static bnbq_status no_gpu_kernel(product *p) {
    PyOS_snprintf(p->call.cuda.error, sizeof p->call.cuda.error,
                  "a GPU has no kernel for this; bnbq.ops does it with others");
    return BNBQ_DEVICE_ERROR;
}

/* ------------------------------------------------------------------ 4 bit */

/* The packed tensors, the first four arguments; and from `rest` on out, quant_type, blocksize and
 * compute_dtype. */
static bool view_weight4(product *p, PyObject *const *rest, bool backward, bnbq_weight4 *w,
                         bnbq_dtype *compute) {
    bnbq_packed4 packed;
    const bnbq_format *format;
    int64_t blocksize;
    if (!bnbq_view_packed4(&p->call, p->args, &packed) || !view_out(p, rest[0], -1) ||
        !(format = bnbq_get_format(&p->call, rest[1])) ||
        !bnbq_get_blocksize(&p->call, rest[2], false, &blocksize) ||
        !bnbq_get_compute_dtype(&p->call, rest[3], p->x->dtype, compute))
        return false;
    const bnbq_arg *n_of = backward ? p->x : p->out, *k_of = backward ? p->out : p->x;
    const DLTensor *q = &packed.qweight->dl;
    const int last = p->experts.count > 0 ? 2 : 1;
    /* One column of bytes, bitsandbytes' shape, says nothing of n and k. */
    int64_t k = 0; /* too large for an int64: nothing has as many columns */
    if (q->ndim == last + 1 && q->shape[last] > 1 &&
        (!expect_columns(p, k_of, "k",
                         __builtin_mul_overflow(q->shape[last], 2, &k) ? INT64_MAX : k) ||
         !expect_columns(p, n_of, "n", q->shape[last - 1])))
        return false;
    return bnbq_check_packed4(&p->call, &packed, p->experts.count, bnbq_columns(n_of),
                              bnbq_columns(k_of), format, blocksize, w);
}

static PyObject *linear4(PyObject *module, PyObject *const *args, Py_ssize_t nargs, const char *op,
                         bool of_experts) {
    product p;
    bnbq_weight4 w;
    bnbq_dtype compute;
    bool int8_activations;
    bnbq_status status = BNBQ_OK;

    if (!begin_product(&p, module, args, nargs, op, 11, "x", of_experts) ||
        !view_weight4(&p, p.args + 5, false, &w, &compute) ||
        !bnbq_get_activations(&p.call, p.args[9], &int8_activations) ||
        !view_bias(&p, p.args[4], w.n) || !view_rows(&p))
        return abandon_product(&p);
    if (p.out->count > 0)
        RUN(of_experts
                ? bnbq_linear_4bit_experts(&p.x_rows, &w, &p.experts, p.bias, compute,
                                           int8_activations, &p.out_rows)
                : bnbq_linear_4bit(&p.x_rows, &w, p.bias, compute, int8_activations, &p.out_rows),
            of_experts
                ? no_gpu_kernel(&p)
                : bnbq_cuda_linear_4bit(&p.call.cuda, &p.x_rows, &w, p.bias, compute, &p.out_rows));
    return finish_product(&p, status);
}

static PyObject *linear4_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                                  const char *op, bool of_experts) {
    product p;
    bnbq_weight4 w;
    bnbq_dtype compute;
    bnbq_status status = BNBQ_OK;

    if (!begin_product(&p, module, args, nargs, op, 9, "gy", of_experts) ||
        !view_weight4(&p, p.args + 4, true, &w, &compute) || !view_rows(&p))
        return abandon_product(&p);
    if (p.out->count > 0)
        RUN(of_experts
                ? bnbq_linear_4bit_experts_backward(&p.x_rows, &w, &p.experts, compute, &p.out_rows)
                : bnbq_linear_4bit_backward(&p.x_rows, &w, compute, &p.out_rows),
            no_gpu_kernel(&p));
    return finish_product(&p, status);
}

/* ------------------------------------------------------------------ 8 bit */

/* The packed tensors, the first two arguments; out; blocksize. */
static bool view_weight8(product *p, PyObject *out, PyObject *blocksize, bool backward,
                         bnbq_weight8 *w) {
    const bnbq_arg *qweight, *absmax;
    int64_t size;
    return (qweight = bnbq_packed_input(&p->call, p->args[0], "qweight", BNBQ_IS_I8)) &&
           (absmax = bnbq_packed_input(&p->call, p->args[1], "absmax", BNBQ_IS_F32)) &&
           bnbq_get_blocksize(&p->call, blocksize, true, &size) &&
           bnbq_check_packed8(&p->call, qweight, absmax, p->experts.count, size, w) &&
           view_out(p, out, backward ? w->k : w->n) &&
           expect_columns(p, backward ? p->out : p->x, "k", w->k) &&
           expect_columns(p, backward ? p->x : p->out, "n", w->n);
}

static bool get_threshold(const bnbq_call *call, PyObject *object, double *threshold) {
    *threshold = PyFloat_AsDouble(object);
    if (*threshold == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        return bnbq_fail(call, PyExc_TypeError, "threshold is %R, wanted a float", object);
    }
    return *threshold >= 0 ||
           bnbq_fail(call, PyExc_ValueError, "threshold is %R, wanted at least 0", object);
}

static PyObject *linear8(PyObject *module, PyObject *const *args, Py_ssize_t nargs, const char *op,
                         bool of_experts) {
    product p;
    bnbq_weight8 w;
    double threshold;
    bnbq_status status = BNBQ_OK;

    if (!begin_product(&p, module, args, nargs, op, 7, "x", of_experts) ||
        !get_threshold(&p.call, p.args[4], &threshold) ||
        !view_weight8(&p, p.args[3], p.args[5], false, &w) || !view_bias(&p, p.args[2], w.n) ||
        !view_rows(&p))
        return abandon_product(&p);
    const float limit = (float)threshold;
    if (p.out->count > 0)
        RUN(of_experts
                ? bnbq_linear_8bit_experts(&p.x_rows, &w, &p.experts, p.bias, limit, &p.out_rows)
                : bnbq_linear_8bit(&p.x_rows, &w, p.bias, limit, &p.out_rows),
            of_experts
                ? no_gpu_kernel(&p)
                : bnbq_cuda_linear_8bit(&p.call.cuda, &p.x_rows, &w, p.bias, limit, &p.out_rows));
    return finish_product(&p, status);
}

static PyObject *linear8_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs,
                                  const char *op, bool of_experts) {
    product p;
    bnbq_weight8 w;
    bnbq_status status = BNBQ_OK;

    if (!begin_product(&p, module, args, nargs, op, 5, "gy", of_experts) ||
        !view_weight8(&p, p.args[2], p.args[3], true, &w) || !view_rows(&p))
        return abandon_product(&p);
    if (p.out->count > 0)
        RUN(of_experts ? bnbq_linear_8bit_experts_backward(&p.x_rows, &w, &p.experts, &p.out_rows)
                       : bnbq_linear_8bit_backward(&p.x_rows, &w, &p.out_rows),
            no_gpu_kernel(&p));
    return finish_product(&p, status);
}

/* ------------------------------------------------------------------ the functions of Python */

#define PRODUCT(name, run, of_experts)                                                             \
    PyObject *bnbq_py_##name(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {          \
        return run(module, args, nargs, #name, of_experts);                                        \
    }

PRODUCT(linear4bit, linear4, false)
PRODUCT(linear4bit_experts, linear4, true)
PRODUCT(linear4bit_backward, linear4_backward, false)
PRODUCT(linear4bit_experts_backward, linear4_backward, true)
PRODUCT(linear8bitlt, linear8, false)
PRODUCT(linear8bitlt_experts, linear8, true)
PRODUCT(linear8bitlt_backward, linear8_backward, false)
PRODUCT(linear8bitlt_experts_backward, linear8_backward, true)

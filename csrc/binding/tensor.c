/* tensor.c - checked views of tensors: dtype, device, shape, strides, overlap; see tensor.h. */
#include "device.h"
#include "memory.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

static const int dtype_size[] = {4, 2, 2, 1, 1};
static const char *const dtype_name[] = {"float32", "bfloat16", "float16", "uint8", "int8"};

void bnbq_begin(bnbq_call *call, bnbq_state *state, const char *op) {
    call->op = op;
    call->state = state;
    call->device = (DLDevice){DL_CPU, 0};
    call->n = -1;
    call->count = 0;
    call->cuda.error[0] = '\0';
    call->spaces = 0;
}

bool bnbq_fail(const bnbq_call *call, PyObject *type, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    PyObject *message = PyUnicode_FromFormatV(format, arguments);
    va_end(arguments);
    if (message != NULL) {
        PyErr_Format(type, "%s: %U", call->op, message);
        Py_DECREF(message);
    }
    return false;
}

PyObject *bnbq_tuple(const int64_t *shape, int ndim) {
    PyObject *tuple = PyTuple_New(ndim);
    for (int i = 0; tuple != NULL && i < ndim; i++) {
        PyObject *size = PyLong_FromLongLong(shape[i]);
        if (size == NULL || PyTuple_SetItem(tuple, i, size) < 0)
            Py_CLEAR(tuple);
    }
    return tuple;
}

PyObject *bnbq_shape(const bnbq_arg *view) {
    return bnbq_tuple(view->dl.shape, view->dl.ndim);
}

/* ------------------------------------------------------------------ dtype */

/* "float32, bfloat16 or float16" */
static void describe_kinds(unsigned kinds, char *text, size_t size) {
    text[0] = '\0';
    for (int i = BNBQ_F32; i <= BNBQ_I8; i++) {
        if (!(kinds >> i & 1))
            continue;
        unsigned later = kinds >> i >> 1;
        size_t used = strlen(text);
        PyOS_snprintf(text + used, size - used, "%s%s", dtype_name[i],
                      later == 0              ? ""
                      : (later & (later - 1)) ? ", "
                                              : " or ");
    }
}

static void describe_dtype(DLDataType dtype, char *text, size_t size) {
    static const char *const codes[] = {"int", "uint", "float", "handle", "bfloat", "complex"};
    if (dtype.code == DL_BOOL)
        PyOS_snprintf(text, size, "bool");
    else if (dtype.code >= 7 && dtype.bits == 8)
        PyOS_snprintf(text, size, "float8");
    else if (dtype.code < 6)
        PyOS_snprintf(text, size, "%s%d", codes[dtype.code], dtype.bits);
    else
        PyOS_snprintf(text, size, "DLPack type %d of %d bits", dtype.code, dtype.bits);
}

bool bnbq_wrong_dtype(const bnbq_call *call, const bnbq_arg *view, PyObject *got, unsigned kinds) {
    char wanted[64];
    describe_kinds(kinds, wanted, sizeof wanted);
    return bnbq_fail(call, PyExc_TypeError, "%s is %S, wanted %s", view->name, got, wanted);
}

static bool set_dtype(const bnbq_call *call, bnbq_arg *view, unsigned kinds) {
    static const DLDataType known[] = {
        [BNBQ_F32] = {DL_FLOAT, 32, 1}, [BNBQ_BF16] = {DL_BFLOAT, 16, 1},
        [BNBQ_F16] = {DL_FLOAT, 16, 1}, [BNBQ_U8] = {DL_UINT, 8, 1},
        [BNBQ_I8] = {DL_INT, 8, 1},
    };
    DLDataType dtype = view->dl.dtype;
    /* Only scales must be float32. A module may hold them as int32 of the same bits, out of reach
     * of whoever casts all that is floating point. */
    if (kinds == BNBQ_IS_F32 && !view->output && dtype.code == DL_INT && dtype.bits == 32)
        dtype.code = DL_FLOAT;
    for (int i = BNBQ_F32; i <= BNBQ_I8; i++) {
        if (dtype.code == known[i].code && dtype.bits == known[i].bits && dtype.lanes == 1 &&
            (kinds >> i & 1)) {
            view->dtype = (bnbq_dtype)i;
            return true;
        }
    }
    char got[48];
    describe_dtype(dtype, got, sizeof got);
    if (kinds == BNBQ_IS_F32 && !view->output && dtype.bits == 16)
        return bnbq_fail(call, PyExc_TypeError,
                         "%s is %s, wanted float32 (if DeepSpeed or FSDP2 has cast it: see "
                         "bnbq.protect_scales)",
                         view->name, got);
    PyObject *text = PyUnicode_FromString(got);
    if (text != NULL)
        bnbq_wrong_dtype(call, view, text, kinds);
    Py_XDECREF(text);
    return false;
}

/* ------------------------------------------------------------------ device */

/* Asked before the producer is asked for memory. Arguments seen earlier have passed. */
bool bnbq_check_device(bnbq_call *call, const char *name, DLDevice device) {
    char here[BNBQ_DEVICE_TEXT], there[BNBQ_DEVICE_TEXT];
    if (device.device_type == DL_CUDA_HOST || device.device_type == DL_ROCM_HOST)
        device.device_type = DL_CPU;
    if (device.device_type == DL_CPU)
        device.device_id = 0;
    bnbq_describe_device(device, there);
    if (call->count > 0) {
        if (device.device_type == call->device.device_type &&
            device.device_id == call->device.device_id)
            return true;
        bnbq_describe_device(call->device, here);
        return bnbq_fail(call, PyExc_RuntimeError,
                         "%s is on %s and %s on %s, wanted all on one device", call->args[0].name,
                         here, name, there);
    }
    call->device = device;
    if (device.device_type == DL_CPU ||
        (device.device_type == DL_CUDA && bnbq_cuda_toolkit() != NULL))
        return true;
    return bnbq_fail(call, PyExc_RuntimeError, "%s is on %s, and this build of bnbq %s", name,
                     there,
                     device.device_type != DL_CUDA ? "knows CPUs and CUDA only" : "has no CUDA");
}

/* ------------------------------------------------------------------ checks */

/* Fill in count and row-major strides, and see that every byte has an address. */
static bool measure(const bnbq_call *call, bnbq_arg *view) {
    DLTensor *dl = &view->dl;
    int64_t count = 1, size = dtype_size[view->dtype], span = 0, part;
    bool fits = dl->ndim >= 0 && (dl->ndim == 0 || dl->shape != NULL), empty = false;

    for (int i = 0; fits && i < dl->ndim; i++) {
        empty |= dl->shape[i] == 0;
        fits = dl->shape[i] >= 0;
    }
    for (int i = 0; fits && !empty && i < dl->ndim; i++)
        fits = !__builtin_mul_overflow(count, dl->shape[i], &count);
    view->count = empty ? 0 : count;
    if (fits && dl->strides == NULL && dl->ndim > 0) {
        if ((fits = dl->ndim <= BNBQ_ARG_DIMS)) {
            int64_t stride = 1;
            for (int i = dl->ndim - 1; i >= 0; i--) {
                view->strides[i] = stride;
                stride *= empty ? 1 : dl->shape[i];
            }
            dl->strides = view->strides;
        }
    }
    for (int i = 0; fits && !empty && i < dl->ndim; i++) {
        fits = dl->strides[i] != INT64_MIN &&
               !__builtin_mul_overflow(dl->shape[i] - 1, llabs(dl->strides[i]), &part) &&
               !__builtin_add_overflow(span, part, &span);
    }
    fits = fits && !__builtin_add_overflow(span, 1, &span) &&
           !__builtin_mul_overflow(span, size, &span);
    if (!fits)
        return bnbq_fail(call, PyExc_ValueError, "%s has an impossible shape or stride",
                         view->name);
    if (view->count > 0 && dl->data == NULL)
        return bnbq_fail(call, PyExc_RuntimeError,
                         "%s has no memory (a fake, meta or wrapped tensor?)", view->name);
    dl->data = (char *)dl->data + (dl->data != NULL ? dl->byte_offset : 0);
    dl->byte_offset = 0;
    if (view->count > 0 && (uintptr_t)dl->data % (uintptr_t)size != 0)
        return bnbq_fail(call, PyExc_ValueError, "%s is not aligned to its %d byte elements",
                         view->name, (int)size);
    return true;
}

static bool is_packed(const bnbq_arg *view) {
    int64_t stride = 1;
    if (view->count == 0)
        return true;
    for (int i = view->dl.ndim - 1; i >= 0; i--) {
        if (view->dl.shape[i] != 1 && view->dl.strides[i] != stride)
            return false;
        stride *= view->dl.shape[i];
    }
    return true;
}

/* True if no two elements share an address, as far as nesting shows: taken by ascending stride,
 * each dimension must step over everything that the ones before it cover. */
static bool is_disjoint(const bnbq_arg *view) {
    const DLTensor *dl = &view->dl;
    int64_t covered = 1; /* first to last element over the dimensions done */
    bool done[BNBQ_ARG_DIMS] = {false};
    if (view->count <= 1 || dl->ndim > BNBQ_ARG_DIMS)
        return view->count <= 1;
    for (;;) {
        int next = -1;
        for (int i = 0; i < dl->ndim; i++)
            if (!done[i] && dl->shape[i] > 1 &&
                (next < 0 || llabs(dl->strides[i]) < llabs(dl->strides[next])))
                next = i;
        if (next < 0)
            return true;
        int64_t stride = llabs(dl->strides[next]);
        if (stride < covered)
            return false;
        covered += stride * (dl->shape[next] - 1);
        done[next] = true;
    }
}

static bnbq_arg *take(bnbq_call *call, PyObject *object, const char *name, unsigned kinds,
                      bool output, bool packed) {
    bnbq_arg *view = &call->args[call->count];
    view->name = name;
    view->output = output;
    view->managed = NULL;
    bool ok = bnbq_find_memory(call, view, object, kinds) &&
              bnbq_check_device(call, name, view->dl.device) && set_dtype(call, view, kinds) &&
              measure(call, view);
    call->count++; /* from here on bnbq_release sees it, whatever happened */
    if (!ok)
        return NULL;
    if (packed && !is_packed(view)) {
        bnbq_fail(call, PyExc_ValueError, "%s is not contiguous", name);
        return NULL;
    }
    if (output && !packed && !is_packed(view) && !is_disjoint(view)) {
        bnbq_fail(call, PyExc_ValueError, "%s overlaps itself", name);
        return NULL;
    }
    return view;
}

bnbq_arg *bnbq_input(bnbq_call *call, PyObject *object, const char *name, unsigned kinds) {
    return take(call, object, name, kinds, false, false);
}

bnbq_arg *bnbq_output(bnbq_call *call, PyObject *object, const char *name, unsigned kinds) {
    return take(call, object, name, kinds, true, false);
}

bnbq_arg *bnbq_packed_input(bnbq_call *call, PyObject *object, const char *name, unsigned kinds) {
    return take(call, object, name, kinds, false, true);
}

bnbq_arg *bnbq_packed_output(bnbq_call *call, PyObject *object, const char *name, unsigned kinds) {
    return take(call, object, name, kinds, true, true);
}

bnbq_arg *bnbq_new_output(bnbq_call *call, PyObject *object, const bnbq_arg *like, int64_t width,
                          PyObject **result) {
    bnbq_arg *view = &call->args[call->count];
    view->name = "out";
    view->dtype = like->dtype;
    view->output = false; /* nobody else knows its memory: there is nothing to check */
    view->managed = NULL;
    *result = bnbq_allocate(call, view, object, like, width);
    bool ok = *result != NULL && measure(call, view);
    call->count++;
    return ok ? view : NULL;
}

/* First byte and the one after the last. */
static void extent(const bnbq_arg *view, uintptr_t *low, uintptr_t *high) {
    int64_t size = dtype_size[view->dtype], below = 0, above = 0;
    for (int i = 0; i < view->dl.ndim; i++) {
        int64_t reach = (view->dl.shape[i] - 1) * view->dl.strides[i];
        *(reach < 0 ? &below : &above) += reach;
    }
    *low = (uintptr_t)view->dl.data + (uintptr_t)(below * size);
    *high = (uintptr_t)view->dl.data + (uintptr_t)((above + 1) * size);
}

bool bnbq_finish(bnbq_call *call) {
    for (int i = 0; i < call->count; i++) {
        const bnbq_arg *output = &call->args[i];
        if (!output->output || output->count == 0)
            continue;
        uintptr_t low, high;
        extent(output, &low, &high);
        for (int j = 0; j < call->count; j++) {
            const bnbq_arg *other = &call->args[j];
            if (j == i || other->count == 0 || (other->output && j < i))
                continue;
            uintptr_t other_low, other_high;
            extent(other, &other_low, &other_high);
            if (low < other_high && other_low < high)
                return bnbq_fail(call, PyExc_ValueError, "%s shares memory with %s", output->name,
                                 other->name);
        }
    }
    return true;
}

void bnbq_release(bnbq_call *call) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback); /* a deleter may run Python */
    bnbq_free_spaces(call);
    for (int i = 0; i < call->count; i++) {
        bnbq_arg *view = &call->args[i];
        if (view->managed == NULL)
            continue;
        if (view->versioned) {
            DLManagedTensorVersioned *managed = view->managed;
            if (managed->deleter != NULL)
                managed->deleter(managed);
        } else {
            DLManagedTensor *managed = view->managed;
            if (managed->deleter != NULL)
                managed->deleter(managed);
        }
        view->managed = NULL;
    }
    call->count = 0;
    PyErr_Restore(type, value, traceback);
}

bool bnbq_rows(bnbq_call *call, const bnbq_arg *view, bnbq_tensor *out) {
    const DLTensor *dl = &view->dl;
    int last = dl->ndim - 1, n = 0;

    out->data = dl->data;
    out->dtype = view->dtype;
    for (int i = 0; i < last; i++) {
        int64_t size = dl->shape[i], stride = dl->strides[i], step, merged;
        if (size == 1)
            continue;
        if (n > 0 && !__builtin_mul_overflow(stride, size, &step) && out->strides[n - 1] == step &&
            !__builtin_mul_overflow(out->shape[n - 1], size, &merged)) {
            out->shape[n - 1] = merged;
            out->strides[n - 1] = stride;
        } else if (n < BNBQ_MAX_DIMS - 1) {
            out->shape[n] = size;
            out->strides[n++] = stride;
        } else {
            return bnbq_fail(call, PyExc_ValueError,
                             "%s has more than %d dimensions of unrelated strides", view->name,
                             BNBQ_MAX_DIMS);
        }
    }
    out->shape[n] = last < 0 ? 1 : dl->shape[last];
    out->strides[n] = last < 0 ? 1 : dl->strides[last];
    out->ndim = n + 1;
    return true;
}

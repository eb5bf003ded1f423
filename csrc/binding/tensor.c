/* tensor.c - from Python objects to checked views of memory; see tensor.h.
 *
 * Order of resolution: numpy.ndarray (NumPy's C API), torch.Tensor (the DLPack exchange API that
 * is cached in the module state), any type with that API, any object with __dlpack__(). The buffer
 * protocol is not in the limited API of Python 3.10.
 */
#include "tensor.h"

#include <stdarg.h>

#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#define NPY_TARGET_VERSION NPY_1_23_API_VERSION
#include <numpy/ndarrayobject.h>

_Static_assert(sizeof(npy_intp) == sizeof(int64_t), "bnbq needs a 64-bit platform");
_Static_assert(NPY_MAXDIMS <= BNBQ_ARG_DIMS, "room for the strides of any array");

static const int dtype_size[] = {4, 2, 2, 1, 1};
static const char *const dtype_name[] = {"float32", "bfloat16", "float16", "uint8", "int8"};

bool bnbq_tensor_import(void) {
    return PyArray_ImportNumPyAPI() == 0;
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

static PyObject *shape_tuple(const int64_t *shape, int ndim) {
    PyObject *tuple = PyTuple_New(ndim);
    for (int i = 0; tuple != NULL && i < ndim; i++) {
        PyObject *size = PyLong_FromLongLong(shape[i]);
        if (size == NULL || PyTuple_SetItem(tuple, i, size) < 0)
            Py_CLEAR(tuple);
    }
    return tuple;
}

PyObject *bnbq_shape(const bnbq_arg *view) {
    return shape_tuple(view->dl.shape, view->dl.ndim);
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

static bool wrong_dtype(const bnbq_call *call, const bnbq_arg *view, PyObject *got,
                        unsigned kinds) {
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
    for (int i = BNBQ_F32; i <= BNBQ_I8; i++) {
        if (dtype.code == known[i].code && dtype.bits == known[i].bits && dtype.lanes == 1 &&
            (kinds >> i & 1)) {
            view->dtype = (bnbq_dtype)i;
            return true;
        }
    }
    char got[48];
    describe_dtype(dtype, got, sizeof got);
    PyObject *text = PyUnicode_FromString(got);
    if (text != NULL)
        wrong_dtype(call, view, text, kinds);
    Py_XDECREF(text);
    return false;
}

/* ------------------------------------------------------------------ NumPy */

static bool is_bfloat16(PyArray_Descr *descr) {
    /* ml_dtypes registers bfloat16 as a user type; it is known by name only. */
    PyObject *name = PyObject_GetAttrString((PyObject *)descr, "name");
    bool yes = name != NULL && PyUnicode_CompareWithASCIIString(name, "bfloat16") == 0;
    Py_XDECREF(name);
    PyErr_Clear();
    return yes;
}

static bool view_array(bnbq_call *call, bnbq_arg *view, PyArrayObject *array, unsigned kinds) {
    PyArray_Descr *descr = PyArray_DESCR(array);
    DLDataType dtype = {0, 0, 1};
    switch (descr->type_num) {
    case NPY_FLOAT:
        dtype = (DLDataType){DL_FLOAT, 32, 1};
        break;
    case NPY_HALF:
        dtype = (DLDataType){DL_FLOAT, 16, 1};
        break;
    case NPY_UBYTE:
        dtype = (DLDataType){DL_UINT, 8, 1};
        break;
    case NPY_BYTE:
        dtype = (DLDataType){DL_INT, 8, 1};
        break;
    default:
        if (PyTypeNum_ISUSERDEF(descr->type_num) && is_bfloat16(descr) &&
            PyArray_ITEMSIZE(array) == 2) {
            dtype = (DLDataType){DL_BFLOAT, 16, 1};
            break;
        }
        return wrong_dtype(call, view, (PyObject *)descr, kinds);
    }
    if (!PyArray_ISNOTSWAPPED(array))
        return bnbq_fail(call, PyExc_TypeError, "%s is not in native byte order", view->name);
    if (view->output && !PyArray_ISWRITEABLE(array))
        return bnbq_fail(call, PyExc_ValueError, "%s is read-only", view->name);
    int ndim = PyArray_NDIM(array);
    view->dl = (DLTensor){.data = PyArray_DATA(array),
                          .device = {DL_CPU, 0},
                          .ndim = ndim,
                          .dtype = dtype,
                          .shape = (int64_t *)PyArray_DIMS(array),
                          .strides = view->strides};
    npy_intp itemsize = PyArray_ITEMSIZE(array);
    for (int i = 0; i < ndim; i++) {
        npy_intp stride = PyArray_STRIDE(array, i);
        if (stride % itemsize != 0 && PyArray_DIM(array, i) > 1)
            return bnbq_fail(
                call, PyExc_ValueError,
                "%s has a stride of %zd bytes, not a multiple of its %zd byte elements", view->name,
                (Py_ssize_t)stride, (Py_ssize_t)itemsize);
        view->strides[i] = stride / itemsize;
    }
    return true;
}

/* ------------------------------------------------------------------ DLPack */

/* Cache torch's types once it has been imported. A torch that is only half imported is left for
 * the next call. Errors mean "not yet". */
static void find_torch(bnbq_state *state) {
    PyObject *modules = PyImport_GetModuleDict(); /* borrowed */
    PyObject *torch = modules == NULL ? NULL : PyMapping_GetItemString(modules, "torch");
    PyObject *tensor = torch == NULL ? NULL : PyObject_GetAttrString(torch, "Tensor");
    PyObject *nn = tensor == NULL ? NULL : PyObject_GetAttrString(torch, "nn");
    PyObject *parameter = nn == NULL ? NULL : PyObject_GetAttrString(nn, "Parameter");
    PyObject *is_neg = parameter == NULL ? NULL : PyObject_GetAttrString(tensor, "is_neg");
    PyObject *dispatch =
        is_neg == NULL ? NULL : PyObject_GetAttrString(tensor, "__torch_dispatch__");
    if (dispatch != NULL && PyType_Check(tensor) && PyType_Check(parameter)) {
        PyObject *capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
        const DLExchangeApi *api =
            capsule == NULL ? NULL : PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
        Py_XDECREF(capsule); /* the table is static in torch */
        if (api != NULL && api->header.version.major == DLPACK_MAJOR && api->borrow != NULL)
            state->torch = api;
        state->is_neg = is_neg, is_neg = NULL;                          /* now owned by the state */
        state->plain_dispatch = dispatch, dispatch = NULL;              /* now owned by the state */
        state->parameter = (PyTypeObject *)parameter, parameter = NULL; /* likewise */
        state->tensor = (PyTypeObject *)tensor, tensor = NULL;          /* likewise */
    }
    PyErr_Clear();
    Py_XDECREF(dispatch);
    Py_XDECREF(is_neg);
    Py_XDECREF(parameter);
    Py_XDECREF(nn);
    Py_XDECREF(tensor);
    Py_XDECREF(torch);
}

/* The producer's exception, as a RuntimeError that names the argument. Those that are not about the
 * tensor (no memory, KeyboardInterrupt) pass unchanged. */
static bool explain(const bnbq_call *call, const char *name) {
    if (PyErr_ExceptionMatches(PyExc_MemoryError) || !PyErr_ExceptionMatches(PyExc_Exception))
        return false;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *text = value == NULL ? NULL : PyObject_Str(value);
    PyErr_Clear();
    bnbq_fail(call, PyExc_RuntimeError, "%s gives no access to its memory: %V", name, text,
              "(no message)");
    Py_XDECREF(text);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    return false;
}

static bool wrong_type(const bnbq_call *call, PyObject *error, const char *name, PyTypeObject *type,
                       const char *what) {
    PyObject *type_name = PyObject_GetAttrString((PyObject *)type, "__name__");
    if (type_name != NULL)
        bnbq_fail(call, error, "%s is a %S, %s", name, type_name, what);
    Py_XDECREF(type_name);
    return false;
}

/* The device must be readable from here, and this is asked before the producer is asked for memory.
 * Arguments seen earlier have passed, so they are on the CPU. */
static bool check_device(const bnbq_call *call, const char *name, DLDevice device) {
    if (device.device_type == DL_CPU || device.device_type == DL_CUDA_HOST ||
        device.device_type == DL_ROCM_HOST)
        return true;
    char text[48];
    if (device.device_type == DL_CUDA)
        PyOS_snprintf(text, sizeof text, "cuda:%d", (int)device.device_id);
    else
        PyOS_snprintf(text, sizeof text, "a device of DLPack type %d", (int)device.device_type);
    if (call->count > 0)
        return bnbq_fail(call, PyExc_RuntimeError,
                         "%s is on %s and %s on the CPU, wanted all on one device", name, text,
                         call->args[0].name);
    return bnbq_fail(call, PyExc_RuntimeError, "%s is on %s, and this build of bnbq %s", name, text,
                     device.device_type == DL_CUDA ? "has no CUDA" : "knows the CPU only");
}

/* Take over what a capsule from __dlpack__() holds: renaming it makes us the owner. */
static bool take_capsule(bnbq_call *call, bnbq_arg *view, PyObject *capsule) {
    uint64_t flags = 0;
    DLTensor *source;
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        if (managed->version.major != DLPACK_MAJOR)
            return bnbq_fail(call, PyExc_RuntimeError, "%s comes in DLPack %u.%u, wanted 1.x",
                             view->name, managed->version.major, managed->version.minor);
        if (PyCapsule_SetName(capsule, "used_dltensor_versioned") < 0)
            return false;
        view->managed = managed, view->versioned = true;
        flags = managed->flags;
        source = &managed->dl_tensor;
    } else if (PyCapsule_IsValid(capsule, "dltensor")) {
        DLManagedTensor *managed = PyCapsule_GetPointer(capsule, "dltensor");
        if (PyCapsule_SetName(capsule, "used_dltensor") < 0)
            return false;
        view->managed = managed, view->versioned = false;
        source = &managed->dl_tensor;
    } else {
        return bnbq_fail(call, PyExc_TypeError, "%s.__dlpack__() did not give a DLPack capsule",
                         view->name);
    }
    if (view->output && (flags & DL_FLAG_READ_ONLY))
        return bnbq_fail(call, PyExc_ValueError, "%s is read-only", view->name);
    view->dl = *source;
    return true;
}

static bool call_dlpack(bnbq_call *call, bnbq_arg *view, PyObject *object) {
    PyObject *device = NULL, *method = NULL, *empty = NULL, *keywords = NULL, *capsule = NULL;
    bool ok = false;
    DLDevice where;

    if (!PyObject_HasAttrString(object, "__dlpack__") || PyType_Check(object)) {
        return wrong_type(call, PyExc_TypeError, view->name, Py_TYPE(object),
                          "wanted a tensor or an array");
    }
    device = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    if (device == NULL ||
        !PyArg_ParseTuple(device, "ii:__dlpack_device__", &where.device_type, &where.device_id)) {
        explain(call, view->name);
        goto done;
    }
    if (!check_device(call, view->name, where))
        goto done;
    method = PyObject_GetAttrString(object, "__dlpack__");
    empty = PyTuple_New(0);
    keywords = Py_BuildValue("{s:(ii)}", "max_version", DLPACK_MAJOR, DLPACK_MINOR);
    if (method == NULL || empty == NULL || keywords == NULL)
        goto done;
    capsule = PyObject_Call(method, empty, keywords);
    if (capsule == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear(); /* a producer from before DLPack 1.0 knows no keywords */
        capsule = PyObject_Call(method, empty, NULL);
    }
    if (capsule == NULL) {
        explain(call, view->name);
        goto done;
    }
    ok = take_capsule(call, view, capsule);
done:
    Py_XDECREF(device);
    Py_XDECREF(method);
    Py_XDECREF(empty);
    Py_XDECREF(keywords);
    Py_XDECREF(capsule);
    return ok;
}

static bool borrow(bnbq_call *call, bnbq_arg *view, PyObject *object, const DLExchangeApi *api) {
    if (api->borrow(object, &view->dl) == 0)
        return true;
    return explain(call, view->name);
}

/* A torch tensor: its memory must be what the tensor means. */
static bool view_torch(bnbq_call *call, bnbq_arg *view, PyObject *object) {
    bnbq_state *state = call->state;
    PyTypeObject *type = Py_TYPE(object);

    if (type != state->tensor && type != state->parameter) {
        PyObject *dispatch = PyObject_GetAttrString((PyObject *)type, "__torch_dispatch__");
        bool plain = dispatch == state->plain_dispatch;
        Py_XDECREF(dispatch);
        PyErr_Clear();
        if (!plain)
            return wrong_type(call, PyExc_RuntimeError, view->name, type,
                              "which has no memory of its own");
    }
    if (state->torch != NULL) {
        if (!borrow(call, view, object, state->torch))
            return false;
    } else {
        PyObject *detached = PyObject_CallMethod(object, "detach", NULL);
        bool ok = detached != NULL && call_dlpack(call, view, detached);
        Py_XDECREF(detached); /* the capsule keeps the memory */
        if (!ok)
            return false;
    }
    if (view->dl.dtype.code == DL_FLOAT || view->dl.dtype.code == DL_BFLOAT) {
        /* DLPack does not say that a view is to be negated when read (z.conj().imag is one). */
        PyObject *negated = PyObject_CallFunctionObjArgs(state->is_neg, object, NULL);
        if (negated == NULL)
            return explain(call, view->name);
        Py_DECREF(negated); /* True and False live for ever */
        if (negated == Py_True)
            return bnbq_fail(call, PyExc_RuntimeError,
                             "%s has the negative bit set, wanted %s.resolve_neg()", view->name,
                             view->name);
    }
    return true;
}

static bool view_object(bnbq_call *call, bnbq_arg *view, PyObject *object, unsigned kinds) {
    bnbq_state *state = call->state;
    PyTypeObject *type = Py_TYPE(object);

    if (type == state->tensor || type == state->parameter)
        return view_torch(call, view, object);
    if (PyArray_Check(object))
        return view_array(call, view, (PyArrayObject *)object, kinds);
    if (state->tensor == NULL) {
        find_torch(state);
        if (type == state->tensor || type == state->parameter)
            return view_torch(call, view, object);
    }
    if (state->tensor != NULL && PyType_IsSubtype(type, state->tensor))
        return view_torch(call, view, object);

    PyObject *capsule = PyObject_GetAttrString((PyObject *)type, "__dlpack_c_exchange_api__");
    if (capsule != NULL && PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
        const DLExchangeApi *api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
        if (api->header.version.major == DLPACK_MAJOR && api->borrow != NULL) {
            bool ok = borrow(call, view, object, api);
            Py_DECREF(capsule);
            return ok;
        }
    }
    Py_XDECREF(capsule);
    PyErr_Clear();
    return call_dlpack(call, view, object);
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
    /* The margin lets bnbq_rows multiply a stride by the size of its dimension. */
    fits = fits && !__builtin_add_overflow(span, 1, &span) &&
           !__builtin_mul_overflow(span, size, &span) && span < INT64_MAX / 4;
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
    int64_t covered =
        1; /* elements between the first and the last of the dimensions done, plus 1 */
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
    bool ok = view_object(call, view, object, kinds) && check_device(call, name, view->dl.device) &&
              set_dtype(call, view, kinds) && measure(call, view);
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
}

static void allocation_failed(void *context, const char *kind, const char *message) {
    const bnbq_call *call = context;
    PyGILState_STATE gil = PyGILState_Ensure();
    bnbq_fail(call, strcmp(kind, "MemoryError") == 0 ? PyExc_MemoryError : PyExc_RuntimeError,
              "out cannot be allocated: %s", message);
    PyGILState_Release(gil);
}

PyObject *bnbq_allocate(bnbq_call *call, PyObject *object, const bnbq_arg *like, int64_t width) {
    const bnbq_state *state = call->state;
    int64_t shape[BNBQ_ARG_DIMS];
    int ndim = like->dl.ndim;

    if (ndim < 1 || ndim > BNBQ_ARG_DIMS) {
        bnbq_fail(call, PyExc_ValueError, "%s has %d dimensions, wanted 1 to %d", like->name, ndim,
                  BNBQ_ARG_DIMS);
        return NULL;
    }
    memcpy(shape, like->dl.shape, sizeof *shape * (size_t)ndim);
    shape[ndim - 1] = width;
    if (PyArray_Check(object)) {
        PyArray_Descr *descr = PyArray_DESCR((PyArrayObject *)object);
        Py_INCREF(descr); /* PyArray_Empty takes it */
        return PyArray_Empty(ndim, (npy_intp *)shape, descr, 0);
    }
    if (state->tensor != NULL && state->torch == NULL &&
        PyType_IsSubtype(Py_TYPE(object), state->tensor)) {
        PyObject *sizes = shape_tuple(shape, ndim);
        PyObject *tensor =
            sizes == NULL ? NULL : PyObject_CallMethod(object, "new_empty", "(O)", sizes);
        Py_XDECREF(sizes);
        return tensor;
    }
    if (state->torch == NULL || !PyType_IsSubtype(Py_TYPE(object), state->tensor)) {
        bnbq_fail(call, PyExc_TypeError, "out is an int; wanted a tensor for this kind of %s",
                  like->name);
        return NULL;
    }
    DLTensor wanted = {
        .device = like->dl.device, .ndim = ndim, .dtype = like->dl.dtype, .shape = shape};
    DLManagedTensorVersioned *managed;
    void *tensor;
    if (state->torch->allocate(&wanted, &managed, call, allocation_failed) != 0 ||
        state->torch->import_managed(managed, &tensor) != 0)
        return NULL;
    return tensor;
}

bool bnbq_rows(bnbq_call *call, const bnbq_arg *view, bnbq_tensor *out) {
    const DLTensor *dl = &view->dl;
    int last = dl->ndim - 1, n = 0;

    out->data = dl->data;
    out->dtype = view->dtype;
    for (int i = 0; i < last; i++) {
        int64_t size = dl->shape[i], stride = dl->strides[i];
        if (size == 1)
            continue;
        if (n > 0 && out->strides[n - 1] == stride * size) {
            out->shape[n - 1] *= size;
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

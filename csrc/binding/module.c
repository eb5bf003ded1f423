/* module.c - the extension module bnbq._bnbq: method table, state, and the calls about the process.
 *
 * Multi-phase initialisation, no static Python objects. The slots that declare free threading and
 * a GIL per interpreter are newer than the limited API that the wheel is built for.
 */
#include "ops.h" /* Python.h must come first */

#include "cpu.h"
#include "formats.h"
#include "kernels.h"
#include "threads.h"

#include "../../cuda/bnbq_cuda.h"

#include <stdlib.h>
#include <string.h>

#ifndef BNBQ_VERSION
#error "setup.py defines BNBQ_VERSION"
#endif

static const char *const families[] = {"edge", "q4", "s8", "w4a8"};
enum { FAMILIES = sizeof families / sizeof *families };

/* ------------------------------------------------------------------ instruction sets */

/* True when a row of this level runs here: such a name may be given to set_isa. */
static bool is_level_here(bnbq_isa level) {
    bnbq_row_info row;
    for (int f = 0; f < FAMILIES; f++)
        for (int i = 0; bnbq_row(families[f], i, &row); i++)
            if (row.level == level && row.missing == 0)
                return true;
    return false;
}

static bool append_name(PyObject *list, const char *name) {
    PyObject *item = PyUnicode_FromString(name);
    bool ok = item != NULL && PyList_Append(list, item) == 0;
    Py_XDECREF(item);
    return ok;
}

/* New reference: the list as a tuple; takes the list. NULL in gives NULL out. */
static PyObject *to_tuple(PyObject *list, bool ok) {
    PyObject *tuple = ok ? PyList_AsTuple(list) : NULL;
    Py_XDECREF(list);
    return tuple;
}

static PyObject *isas(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *list = PyList_New(0);
    bool ok = list != NULL;
    for (int level = 0; ok && level < BNBQ_ISAS; level++)
        if (is_level_here((bnbq_isa)level))
            ok = append_name(list, bnbq_isa_name((bnbq_isa)level));
    return to_tuple(list, ok);
}

static PyObject *isa(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyUnicode_FromString(bnbq_isa_name(bnbq_get_isa()));
}

static bool use_isa(PyObject *module, const char *name, const char *source) {
    bnbq_isa level;
    if (name != NULL && bnbq_parse_isa(name, &level) && is_level_here(level)) {
        bnbq_set_isa(level);
        return true;
    }
    PyObject *names = isas(module, NULL);
    if (names != NULL)
        PyErr_Format(PyExc_ValueError,
                     "%s: %s is not an instruction set of this CPU, wanted one of %S", source,
                     name == NULL ? "?" : name, names);
    Py_XDECREF(names);
    return false;
}

static PyObject *set_isa(PyObject *module, PyObject *name) {
    if (!PyUnicode_Check(name)) {
        PyErr_Format(PyExc_TypeError, "set_isa: name is %R, wanted a str", name);
        return NULL;
    }
    Py_ssize_t size = 0;
    const char *text = PyUnicode_AsUTF8AndSize(name, &size);
    PyErr_Clear(); /* lone surrogates */
    if (text != NULL && strlen(text) != (size_t)size)
        text = NULL;
    return use_isa(module, text, "set_isa") ? Py_NewRef(Py_None) : NULL;
}

static PyObject *feature_names(uint32_t features) {
    PyObject *list = PyList_New(0);
    bool ok = list != NULL;
    for (int bit = 0; ok && bit < 32; bit++) {
        const char *name = bnbq_cpu_feature_name(UINT32_C(1) << bit);
        if ((features >> bit & 1) && name != NULL)
            ok = append_name(list, name);
    }
    return to_tuple(list, ok);
}

static PyObject *cpu_features(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return feature_names(bnbq_cpu_features());
}

static PyObject *rows(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    bnbq_row_info row;
    PyObject *list = PyList_New(0);
    for (int f = 0; list != NULL && f < FAMILIES; f++) {
        for (int i = 0; list != NULL && bnbq_row(families[f], i, &row); i++) {
            PyObject *item = Py_BuildValue(
                "{s:s,s:s,s:s,s:N,s:N,s:O,s:L,s:L}", "family", row.family, "isa", row.isa, "level",
                bnbq_isa_name(row.level), "needs", feature_names(row.needs), "missing",
                feature_names(row.missing), "in_use", row.in_use ? Py_True : Py_False, "bf16_min_m",
                (long long)row.bf16_min_m, "bf16_max_m", (long long)row.bf16_max_m);
            if (item == NULL || PyList_Append(list, item) < 0)
                Py_CLEAR(list);
            Py_XDECREF(item);
        }
    }
    return list;
}

/* ------------------------------------------------------------------ threads, modes, facts */

static PyObject *thread_count(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyLong_FromLong(bnbq_thread_count());
}

static PyObject *set_thread_limit(PyObject *module, PyObject *threads) {
    (void)module;
    int overflow = 0;
    long count = PyLong_Check(threads) ? PyLong_AsLongAndOverflow(threads, &overflow) : -1;
    if (!PyLong_Check(threads))
        PyErr_Format(PyExc_TypeError, "set_thread_limit: threads is %R, wanted an int", threads);
    else if (overflow != 0 || count < 0 || count > 1 << 20)
        PyErr_Format(PyExc_ValueError,
                     "set_thread_limit: threads is %R, wanted 0 (no limit) to 1048576", threads);
    else {
        bnbq_set_thread_limit((int)count);
        return Py_NewRef(Py_None);
    }
    return NULL;
}

static PyObject *thread_backend(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyUnicode_FromString(bnbq_thread_backend());
}

static PyObject *set_batch_invariant(PyObject *module, PyObject *on) {
    (void)module;
    int truth = PyObject_IsTrue(on);
    if (truth < 0)
        return NULL;
    bnbq_set_batch_invariant(truth != 0);
    return Py_NewRef(Py_None);
}

static PyObject *batch_invariant(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyBool_FromLong(bnbq_batch_invariant());
}

static PyObject *formats(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *list = PyList_New(0);
    bool ok = list != NULL;
    for (int i = 0; ok && i < BNBQ_FORMATS; i++)
        ok = append_name(list, bnbq_formats[i].name);
    return to_tuple(list, ok);
}

static PyObject *build_info(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
#ifdef __clang__
    const char *compiler = "clang " __clang_version__;
#else
    const char *compiler = "gcc " __VERSION__;
#endif
#ifdef NDEBUG
    PyObject *asserts = Py_False;
#else
    PyObject *asserts = Py_True;
#endif
    return Py_BuildValue("{s:s,s:s,s:z,s:s,s:s,s:O}", "version", BNBQ_VERSION, "compiler", compiler,
                         "cuda", bnbq_cuda_toolkit(), "cuda_archs", bnbq_cuda_archs(), "sanitize",
                         BNBQ_SANITIZE, "asserts", asserts);
}

/* ------------------------------------------------------------------ the module */

#define OP(name, signature)                                                                        \
    { #name, (PyCFunction)(void (*)(void))bnbq_py_##name, METH_FASTCALL, #name signature }
#define CALL(name, arguments, signature)                                                           \
    { #name, name, arguments, #name signature }

static PyMethodDef methods[] = {
    OP(quantize_4bit, "(w, qweight_out, absmax_out, quant_type, blocksize, /)\n--\n\n"),
    OP(dequantize_4bit, "(qweight, absmax, absmax2, absmax_offset, out, quant_type, blocksize, /)"
                        "\n--\n\n"),
    OP(quantize_absmax, "(absmax, codes_out, absmax2_out, offset_out, /)\n--\n\n"),
    OP(dequantize_absmax, "(codes, absmax2, absmax_offset, out, /)\n--\n\n"),
    OP(quantize_8bit, "(w, qweight_out, absmax_out, blocksize, /)\n--\n\n"),
    OP(dequantize_8bit, "(qweight, absmax, out, blocksize, /)\n--\n\n"),
    OP(linear4bit,
       "(x, qweight, absmax, absmax2, absmax_offset, bias, out, quant_type, blocksize,"
       " compute_dtype, activations, /)\n--\n\nout may be an int: the columns of a new tensor."),
    OP(linear4bit_backward, "(gy, qweight, absmax, absmax2, absmax_offset, out, quant_type,"
                            " blocksize, compute_dtype, /)\n--\n\n"),
    OP(linear8bitlt, "(x, qweight, absmax, bias, out, threshold, blocksize, /)\n--\n\nout may be "
                     "None: a new tensor."),
    OP(linear8bitlt_backward, "(gy, qweight, absmax, out, blocksize, /)\n--\n\n"),
    OP(linear4bit_experts,
       "(x, ends, qweight, absmax, absmax2, absmax_offset, bias, out, quant_type, blocksize,"
       " compute_dtype, activations, /)\n--\n\nends is a list of ints."),
    OP(linear4bit_experts_backward, "(gy, ends, qweight, absmax, absmax2, absmax_offset, out,"
                                    " quant_type, blocksize, compute_dtype, /)\n--\n\n"),
    OP(linear8bitlt_experts,
       "(x, ends, qweight, absmax, bias, out, threshold, blocksize, /)\n--\n\n"),
    OP(linear8bitlt_experts_backward, "(gy, ends, qweight, absmax, out, blocksize, /)\n--\n\n"),
    CALL(isas, METH_NOARGS, "()\n--\n\nInstruction sets that this CPU runs, slowest first."),
    CALL(isa, METH_NOARGS, "()\n--\n\nThe highest instruction set in use."),
    CALL(set_isa, METH_O, "(name, /)\n--\n\nUse nothing above this instruction set."),
    CALL(rows, METH_NOARGS, "()\n--\n\nOne dict per kernel table."),
    CALL(cpu_features, METH_NOARGS, "()\n--\n\nNames of the features of this CPU."),
    CALL(thread_count, METH_NOARGS, "()\n--\n\nThreads that the next call would use."),
    CALL(set_thread_limit, METH_O, "(threads, /)\n--\n\n0: no limit of our own."),
    CALL(thread_backend, METH_NOARGS, "()\n--\n\nWho runs the threads."),
    CALL(set_batch_invariant, METH_O, "(on, /)\n--\n\nOne kernel for every batch size."),
    CALL(batch_invariant, METH_NOARGS, "()\n--\n\n"),
    CALL(formats, METH_NOARGS, "()\n--\n\nNames of the 4-bit formats."),
    CALL(build_info, METH_NOARGS, "()\n--\n\nHow this extension was built."),
    {NULL, NULL, 0, NULL},
};

/* BLOCKSIZES and ABSMAX_BLOCK, so that Python need not repeat them. */
static bool add_constants(PyObject *module) {
    PyObject *list = PyList_New(0);
    bool ok = list != NULL;
    for (long size = 1; ok && size <= 1 << 20; size *= 2) {
        PyObject *item = bnbq_valid_blocksize(size) ? PyLong_FromLong(size) : NULL;
        ok = item == NULL ? PyErr_Occurred() == NULL : PyList_Append(list, item) == 0;
        Py_XDECREF(item);
    }
    PyObject *sizes = to_tuple(list, ok);
    ok = sizes != NULL && PyModule_AddObjectRef(module, "BLOCKSIZES", sizes) == 0;
    Py_XDECREF(sizes);
    return ok && PyModule_AddIntConstant(module, "ABSMAX_BLOCK", BNBQ_ABSMAX_BLOCK) == 0;
}

static int execute(PyObject *module) {
    if (!bnbq_tensor_import() || !add_constants(module))
        return -1;
    const char *cap = getenv("BNBQ_ISA");
    return cap == NULL || *cap == '\0' || use_isa(module, cap, "BNBQ_ISA") ? 0 : -1;
}

static int traverse(PyObject *module, visitproc visit, void *arg) {
    bnbq_state *state = PyModule_GetState(module);
    Py_VISIT(state->tensor);
    Py_VISIT(state->parameter);
    Py_VISIT(state->is_neg);
    Py_VISIT(state->plain_dispatch);
    return 0;
}

static int clear(PyObject *module) {
    bnbq_state *state = PyModule_GetState(module);
    Py_CLEAR(state->tensor);
    Py_CLEAR(state->parameter);
    Py_CLEAR(state->is_neg);
    Py_CLEAR(state->plain_dispatch);
    state->torch = NULL;
    return 0;
}

static void destroy(void *module) {
    clear(module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)execute},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "bnbq._bnbq",
    .m_doc = "The C core of bnbq. Private: use bnbq.ops.",
    .m_size = sizeof(bnbq_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
    .m_free = destroy,
};

PyMODINIT_FUNC PyInit__bnbq(void) {
    return PyModuleDef_Init(&definition);
}

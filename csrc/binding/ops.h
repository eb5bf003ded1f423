/* ops.h - the operations as Python functions (METH_FASTCALL), for the method table of module.c.
 *
 * Each views its tensors, checks, releases the GIL, calls the core or its CUDA mirror, raises.
 *
 * All are positional-only; keywords, defaults and documentation live in bnbq/ops.py. Where a
 * caller gives an int or None instead of `out`, the result is allocated here, of the kind, dtype
 * and device of the input: for a small layer this costs a third of what torch.empty does.
 */
#ifndef BNBQ_BINDING_OPS_H
#define BNBQ_BINDING_OPS_H

#include "tensor.h"

typedef PyObject *bnbq_py_function(PyObject *module, PyObject *const *args, Py_ssize_t nargs);

bnbq_py_function bnbq_py_quantize_4bit, bnbq_py_dequantize_4bit;
bnbq_py_function bnbq_py_quantize_absmax, bnbq_py_dequantize_absmax;
bnbq_py_function bnbq_py_quantize_8bit, bnbq_py_dequantize_8bit;
bnbq_py_function bnbq_py_linear4bit, bnbq_py_linear4bit_backward;
bnbq_py_function bnbq_py_linear8bitlt, bnbq_py_linear8bitlt_backward;
bnbq_py_function bnbq_py_linear4bit_experts, bnbq_py_linear4bit_experts_backward;
bnbq_py_function bnbq_py_linear8bitlt_experts, bnbq_py_linear8bitlt_experts_backward;

#endif

/* Tensors as the stable part of PyTorch's interface hands them over: DLPack's exchange table, of version 1
   (https://dmlc.github.io/dlpack/latest/python_spec.html). It fills in all that a kernel asks about a tensor in 50 ns,
   where each of the seven methods that Python would call takes as long. */
#ifndef HF_SWIGLU_TENSORS_H
#define HF_SWIGLU_TENSORS_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "kernels.h"

/* Takes the tensor class and its `__dlpack_c_exchange_api__`. False for a version that is not known here. */
PyObject *use_exchange_table(PyObject *module, PyObject *const *args, Py_ssize_t count);

/* Fill in a job's operands, element count and dtype, from contiguous CPU tensors of one dtype; 0, and nothing raised, for
   anything else. The first takes tensors of one shape, of which None is an absent one; the second a packed [..., 2 * I]
   and its product [..., I]. */
int read_contiguous(PyObject *const *tensors, Job *job, int *dtype);
int read_packed(PyObject *gate_up, PyObject *out, Job *job, int *dtype);

#endif

/* Tensors read through DLPack's exchange API (https://dmlc.github.io/dlpack/latest/python_spec.html), the stable part of
   PyTorch's C interface. One call of 50 ns describes a tensor; each of the seven methods that Python would call takes as
   long. */
#ifndef HF_SWIGLU_DLPACK_TENSORS_H
#define HF_SWIGLU_DLPACK_TENSORS_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "kernels.h"

/* Python: use_dlpack_exchange_api(tensor class, its `__dlpack_c_exchange_api__`). Returns whether tensors can be read so;
   with anything but a capsule of a known version they no longer are. */
PyObject *use_dlpack_exchange_api(PyObject *module, PyObject *const *args, Py_ssize_t count);

/* Fill in the launch's operands and shape, and the dtype, from contiguous CPU tensors of one dtype. The first function
   takes tensors of one shape, with None for an absent one; the second a packed [..., 2 * I] and an output [..., I].
   Return 1; 0 where the tensors are anything else; -1 with RuntimeError raised where a tensor's storage was freed. */
int read_contiguous(PyObject *const *tensors, Launch *launch, int *dtype);
int read_packed(PyObject *gate_up, PyObject *out, Launch *launch, int *dtype);

#endif

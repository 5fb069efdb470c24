/* From torch.Tensor to address, shape, strides and dtype, through DLPack's exchange API, with the tests of each. */
#include "dlpack_tensors.h"

#include "dlpack.h"

static const DLPackExchangeAPI *exchange_api = NULL;
static PyObject *tensor_class = NULL;

PyObject *use_dlpack_exchange_api(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    static const char capsule_name[] = "dlpack_exchange_api";
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "use_dlpack_exchange_api: expected the tensor class and its "
                            "__dlpack_c_exchange_api__; got %zd arguments", count);
    Py_CLEAR(tensor_class);
    if (!PyCapsule_IsValid(args[1], capsule_name))
        Py_RETURN_FALSE;
    const DLPackExchangeAPI *api = PyCapsule_GetPointer(args[1], capsule_name);
    if (api->header.version.major != DLPACK_MAJOR_VERSION || api->dltensor_from_py_object_no_sync == NULL)
        Py_RETURN_FALSE;
    exchange_api = api;
    Py_INCREF(args[0]);
    tensor_class = args[0];
    Py_RETURN_TRUE;
}

static int kernel_dtype(const DLTensor *tensor)
{
    const DLDataType dtype = tensor->dtype;
    if (dtype.lanes != 1)
        return DTYPES;
    if (dtype.code == kDLBfloat && dtype.bits == 16)
        return BFLOAT16;
    if (dtype.code == kDLFloat && dtype.bits == 16)
        return FLOAT16;
    return dtype.code == kDLFloat && dtype.bits == 32 ? FLOAT32 : DTYPES;
}

/* The number of elements; -1 where they are not adjacent. */
static int64_t contiguous_elements(const DLTensor *tensor)
{
    int64_t count = 1;
    for (int i = tensor->ndim - 1; i >= 0; i--) {
        /* Without strides a tensor is contiguous by definition. */
        if (tensor->strides != NULL && tensor->shape[i] != 1 && tensor->strides[i] != count)
            return -1;
        count *= tensor->shape[i];
    }
    return count;
}

static int raise_freed(PyObject *object)
{
    PyObject *shape = PyObject_GetAttrString(object, "shape"), *tuple = shape == NULL ? NULL : PySequence_Tuple(shape);
    if (tuple != NULL)
        PyErr_Format(PyExc_RuntimeError, "hf_swiglu: the storage of a tensor of shape %R was freed (it has 0 bytes); use "
                     "the tensor before its storage is freed, or give the storage its size back", tuple);
    Py_XDECREF(tuple);
    Py_XDECREF(shape);
    return -1;
}

/* 1, or -1 with an error raised. The data of a tensor whose storage was freed is its offset in a storage at address 0:
   PyTorch's view of it need not be NULL. No storage has 2^40 bytes, and most addresses are larger; only for smaller ones
   the storage is asked. A storage that was made smaller, but not empty, cannot be told without asking, which costs 0.3 us
   for each tensor: it is not noticed here, nor by PyTorch's own operators. */
static int check_memory(PyObject *object, const DLTensor *tensor)
{
    if ((uint64_t)(uintptr_t)tensor->data >> 40 != 0)
        return 1;
    PyObject *storage = PyObject_CallMethod(object, "untyped_storage", NULL);
    PyObject *size = storage == NULL ? NULL : PyObject_CallMethod(storage, "nbytes", NULL);
    const long long bytes = size == NULL ? -1 : PyLong_AsLongLong(size);
    Py_XDECREF(size);
    Py_XDECREF(storage);
    if (bytes < 0)
        return -1;
    return bytes > 0 ? 1 : raise_freed(object);
}

/* Describes a contiguous CPU tensor of a dtype with a kernel: 1, 0 or -1 as in read_contiguous. */
static int read_tensor(PyObject *object, DLTensor *tensor, int64_t *elements)
{
    /* Subclasses may hold no memory of their own. */
    if (tensor_class == NULL || (PyObject *)Py_TYPE(object) != tensor_class)
        return 0;
    if (exchange_api->dltensor_from_py_object_no_sync(object, tensor) != 0) {
        PyErr_Clear();
        return 0;
    }
    *elements = contiguous_elements(tensor);
    if (*elements < 0 || tensor->device.device_type != kDLCPU || kernel_dtype(tensor) == DTYPES)
        return 0;
    return *elements == 0 ? 1 : check_memory(object, tensor);
}

static int agree(const DLTensor *a, const DLTensor *b, int ndim)
{
    if (a->ndim != b->ndim || kernel_dtype(a) != kernel_dtype(b))
        return 0;
    for (int i = 0; i < ndim; i++)
        if (a->shape[i] != b->shape[i])
            return 0;
    return 1;
}

static Operand operand_at(const DLTensor *tensor, int64_t row_stride)
{
    return (Operand){(char *)tensor->data + tensor->byte_offset, row_stride, 1};
}

int read_contiguous(PyObject *const *tensors, Launch *launch, int *dtype)
{
    DLTensor first, other;
    int64_t elements;
    launch->rows = 1;
    int found = read_tensor(tensors[0], &first, &launch->columns);
    if (found != 1)
        return found;
    *dtype = kernel_dtype(&first);
    launch->operand[0] = operand_at(&first, 0);
    for (int i = 1; i < launch->operands; i++) {
        if (tensors[i] == Py_None)
            continue;
        found = read_tensor(tensors[i], &other, &elements);
        if (found != 1)
            return found;
        if (!agree(&first, &other, first.ndim))
            return 0;
        launch->operand[i] = operand_at(&other, 0);
    }
    return 1;
}

int read_packed(PyObject *gate_up, PyObject *out, Launch *launch, int *dtype)
{
    DLTensor packed, result;
    int64_t packed_elements, elements;
    int found = read_tensor(gate_up, &packed, &packed_elements);
    if (found == 1)
        found = read_tensor(out, &result, &elements);
    if (found != 1)
        return found;
    const int last = packed.ndim - 1;
    if (last < 0 || !agree(&packed, &result, last) || packed.shape[last] != 2 * result.shape[last])
        return 0;
    *dtype = kernel_dtype(&packed);
    launch->columns = result.shape[last];
    launch->rows = launch->columns == 0 ? 0 : elements / launch->columns;
    launch->operand[0] = launch->operand[1] = operand_at(&packed, 2 * launch->columns);
    launch->operand[1].data += launch->columns * element_size(*dtype);
    launch->operand[2] = operand_at(&result, launch->columns);
    return 1;
}

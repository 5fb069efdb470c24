#include "tensors.h"

/* The layouts that the specification fixes, as far as they are used. */
typedef struct {
    void *data;
    struct { int32_t type, id; } device;
    int32_t dimensions;
    struct { uint8_t code, bits; uint16_t lanes; } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;

typedef struct {
    struct { uint32_t major, minor; } version;
    void *previous;
    void *allocate, *export_owned, *import_owned;
    int (*view)(void *tensor, DLTensor *out);
    void *current_stream;
} ExchangeTable;

enum { VERSION = 1, CPU_DEVICE = 1, FLOAT_CODE = 2, BFLOAT_CODE = 4 };

static const ExchangeTable *table = NULL;
static PyObject *tensor_class = NULL;

PyObject *use_exchange_table(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "expected the tensor class and its table, got %zd arguments", count);
    const ExchangeTable *found = PyCapsule_GetPointer(args[1], "dlpack_exchange_api");
    if (found == NULL)
        return NULL;
    if (found->version.major != VERSION || found->view == NULL)
        Py_RETURN_FALSE;
    Py_INCREF(args[0]);
    tensor_class = args[0];
    table = found;
    Py_RETURN_TRUE;
}

static int kernel_dtype(const DLTensor *tensor)
{
    if (tensor->dtype.lanes != 1)
        return DTYPES;
    if (tensor->dtype.code == BFLOAT_CODE && tensor->dtype.bits == 16)
        return BFLOAT16;
    if (tensor->dtype.code == FLOAT_CODE && tensor->dtype.bits == 16)
        return FLOAT16;
    return tensor->dtype.code == FLOAT_CODE && tensor->dtype.bits == 32 ? FLOAT32 : DTYPES;
}

/* How many elements, all side by side; -1 where they are not, or are in no memory of this process. */
static int64_t contiguous_elements(const DLTensor *tensor)
{
    int64_t count = 1;
    for (int i = tensor->dimensions - 1; i >= 0; i--) {
        if (tensor->shape[i] != 1 && tensor->strides[i] != count)
            return -1;
        count *= tensor->shape[i];
    }
    if (tensor->device.type != CPU_DEVICE || (tensor->data == NULL && count != 0))
        return -1;
    return count;
}

static int agree(const DLTensor *a, const DLTensor *b, int dimensions)
{
    if (a->dimensions != b->dimensions || kernel_dtype(a) != kernel_dtype(b))
        return 0;
    for (int i = 0; i < dimensions; i++)
        if (a->shape[i] != b->shape[i])
            return 0;
    return 1;
}

/* The number of elements; -1 for what is no contiguous CPU tensor of a dtype with a kernel. */
static int64_t read_tensor(PyObject *object, DLTensor *tensor)
{
    /* Subclasses may hold no memory of their own. */
    if ((PyObject *)Py_TYPE(object) != tensor_class)
        return -1;
    if (table->view(object, tensor) != 0) {
        PyErr_Clear();
        return -1;
    }
    return kernel_dtype(tensor) == DTYPES ? -1 : contiguous_elements(tensor);
}

static Operand operand_at(const DLTensor *tensor, int64_t row_stride)
{
    return (Operand){(char *)tensor->data + tensor->byte_offset, row_stride, 1};
}

int read_contiguous(PyObject *const *tensors, Job *job, int *dtype)
{
    DLTensor first, other;
    job->rows = 1;
    job->columns = read_tensor(tensors[0], &first);
    if (job->columns < 0)
        return 0;
    *dtype = kernel_dtype(&first);
    job->operand[0] = operand_at(&first, 0);
    for (int i = 1; i < job->operands; i++) {
        if (tensors[i] == Py_None)
            continue;
        if (read_tensor(tensors[i], &other) < 0 || !agree(&first, &other, first.dimensions))
            return 0;
        job->operand[i] = operand_at(&other, 0);
    }
    return 1;
}

int read_packed(PyObject *gate_up, PyObject *out, Job *job, int *dtype)
{
    DLTensor packed, result;
    if (read_tensor(gate_up, &packed) < 0)
        return 0;
    const int64_t elements = read_tensor(out, &result);
    const int last = packed.dimensions - 1;
    if (elements < 0 || last < 0 || !agree(&packed, &result, last) || packed.shape[last] != 2 * result.shape[last])
        return 0;
    *dtype = kernel_dtype(&packed);
    job->columns = result.shape[last];
    job->rows = job->columns == 0 ? 0 : elements / job->columns;
    job->operand[0] = job->operand[1] = operand_at(&packed, 2 * job->columns);
    job->operand[1].data += job->columns * element_size(*dtype);
    job->operand[2] = operand_at(&result, job->columns);
    return 1;
}

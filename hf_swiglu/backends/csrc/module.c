/* hf_swiglu.backends._cpu_kernels: the kernels and the choice of a CPU capability as Python functions. Kernels take
   tensors, or addresses and strides, whose shapes and dtypes agree: `_ops` checks them. */
#include "capabilities.h"
#include "dlpack_tensors.h"

#include <math.h>

/* Whether PyTorch's clamp passes the gradient at the limit itself, which depends on its release. */
static int clamp_passes_at_limit = 1;

static PyObject *set_clamp_passes_at_limit(PyObject *module, PyObject *value)
{
    const int passes = PyObject_IsTrue(value);
    if (passes < 0)
        return NULL;
    clamp_passes_at_limit = passes;
    Py_RETURN_NONE;
}

static PyObject *cpu_capability(PyObject *module, PyObject *unused)
{
    return PyUnicode_FromString(capability->name);
}

static PyObject *supported_cpu_capabilities(PyObject *module, PyObject *unused)
{
    PyObject *names = PyList_New(0);
    const CpuCapability *supported;
    for (int i = 0; names != NULL && (supported = supported_capability(i)) != NULL; i++) {
        PyObject *name = PyUnicode_FromString(supported->name);
        if (name == NULL || PyList_Append(names, name) < 0)
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *use_cpu_capability(PyObject *module, PyObject *name)
{
    const CpuCapability *supported;
    for (int i = 0; PyUnicode_Check(name) && (supported = supported_capability(i)) != NULL; i++) {
        if (PyUnicode_CompareWithASCIIString(name, supported->name) == 0) {
            capability = supported;
            Py_RETURN_NONE;
        }
    }
    return PyErr_Format(PyExc_ValueError, "use_cpu_capability: this processor cannot run %R; use one of "
                        "supported_cpu_capabilities()", name);
}

/* Reads the fields of Params after `power`. */
static int read_limits(PyObject *limits, Params *params)
{
    float *fields[] = {&params->alpha, &params->gate_limit, &params->act_limit, &params->up_limit, &params->up_offset};
    for (int i = 0; i < 5; i++) {
        PyObject *item = PySequence_GetItem(limits, i);
        if (item == NULL)
            return -1;
        *fields[i] = (float)PyFloat_AsDouble(item);
        Py_DECREF(item);
    }
    return PyErr_Occurred() ? -1 : 0;
}

/* x rounded to the dtype, as PyTorch rounds a limit before it compares. */
static float limit_in(long dtype, float x)
{
    if (dtype == FLOAT32 || x == 0.0f || !isfinite(x))
        return x;
    const int bits = dtype == BFLOAT16 ? 8 : 11, smallest = dtype == BFLOAT16 ? -126 : -14;
    const int exponent = ilogbf(x) > smallest ? ilogbf(x) : smallest;
    const double unit = ldexp(1.0, exponent + 1 - bits), nearest = nearbyint(x / unit) * unit;
    return (float)(dtype == FLOAT16 && fabs(nearest) > 65504.0 ? copysign(INFINITY, nearest) : nearest);
}

static void set_limits(Params *params, long dtype)
{
    float *limits[] = {&params->gate_limit, &params->act_limit, &params->up_limit};
    float *passes[] = {&params->gate_passes, &params->act_passes, &params->up_passes};
    /* On the CPU PyTorch rounds a scalar summand to the dtype too; a scalar factor stays in float32. */
    params->up_offset = limit_in(dtype, params->up_offset);
    for (int i = 0; i < 3; i++) {
        *limits[i] = limit_in(dtype, *limits[i]);
        *passes[i] = clamp_passes_at_limit ? *limits[i] : nextafterf(*limits[i], -INFINITY);
    }
}

static int choose_variant(const Params *params, int has_limits, int has_up)
{
    if (has_limits || (params->power == 1 && !has_up))
        return GENERAL;
    if (params->power == 1)
        return SILU_TIMES_UP;
    return has_up ? SWIGLU_TIMES_UP : SWIGLU_ALONE;
}

static Launch new_launch(int direction)
{
    return (Launch){.inputs = direction == FORWARD ? 2 : 3, .operands = direction == FORWARD ? 3 : 5};
}

/* Completes a launch whose operands and shape are known, and runs it. `limits` may be None. */
static int start(Launch *launch, int direction, long dtype, PyObject *threads, PyObject *power, PyObject *limits)
{
    Params *params = &launch->params;
    launch->threads = (int)PyLong_AsLong(threads);
    *params = (Params){.power = (int)PyLong_AsLong(power), .alpha = 1.0f, .gate_limit = INFINITY,
                       .act_limit = INFINITY, .up_limit = INFINITY};
    if (PyErr_Occurred() || (limits != Py_None && read_limits(limits, params) < 0))
        return -1;
    if (dtype < 0 || dtype >= DTYPES || params->power < 1 || params->power > 2) {
        PyErr_Format(PyExc_ValueError, "dtype must be 0 to 2 and power 1 or 2; got %ld and %d", dtype, params->power);
        return -1;
    }
    const int has_up = launch->operand[launch->inputs - 1].data != NULL;
    if (!has_up) {
        /* The kernels take 1 for it, which must stay 1. */
        params->up_limit = INFINITY;
        params->up_offset = 0.0f;
    }
    set_limits(params, dtype);
    launch->element_size = element_size((int)dtype);
    launch->kernel = capability->kernels[direction][dtype][choose_variant(params, limits != Py_None, has_up)];
    Py_BEGIN_ALLOW_THREADS
    launch_kernel(launch);
    Py_END_ALLOW_THREADS
    return 0;
}

/* Reads (row_stride, column_stride) of every operand from one flat tuple. */
static int read_strides(PyObject *strides, Launch *launch)
{
    for (int i = 0; i < launch->operands; i++) {
        PyObject *row_stride = PyTuple_GetItem(strides, 2 * i), *column_stride = PyTuple_GetItem(strides, 2 * i + 1);
        if (row_stride == NULL || column_stride == NULL)
            return -1;
        launch->operand[i].row_stride = PyLong_AsLongLong(row_stride);
        launch->operand[i].column_stride = PyLong_AsLongLong(column_stride);
    }
    return PyErr_Occurred() ? -1 : 0;
}

/* Arguments: threads, power, limits, dtype, rows, columns, strides, then one address for each operand. */
static PyObject *launch_strided(int direction, PyObject *const *args, Py_ssize_t count)
{
    enum { THREADS, POWER, LIMITS, DTYPE, ROWS, COLUMNS, STRIDES, ADDRESSES };
    Launch launch = new_launch(direction);
    if (count != ADDRESSES + launch.operands)
        return PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", ADDRESSES + launch.operands, count);
    const long dtype = PyLong_AsLong(args[DTYPE]);
    launch.rows = PyLong_AsLongLong(args[ROWS]);
    launch.columns = PyLong_AsLongLong(args[COLUMNS]);
    for (int i = 0; i < launch.operands; i++)
        launch.operand[i].data = PyLong_AsVoidPtr(args[ADDRESSES + i]);
    if (PyErr_Occurred() || read_strides(args[STRIDES], &launch) < 0)
        return NULL;
    if (start(&launch, direction, dtype, args[THREADS], args[POWER], args[LIMITS]) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* Arguments: threads, power, limits, then one tensor or None for each operand. */
static PyObject *launch_contiguous(int direction, PyObject *const *args, Py_ssize_t count)
{
    enum { THREADS, POWER, LIMITS, TENSORS };
    Launch launch = new_launch(direction);
    int dtype;
    if (count != TENSORS + launch.operands)
        return PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", TENSORS + launch.operands, count);
    const int found = read_contiguous(args + TENSORS, &launch, &dtype);
    if (found != 1)
        return found == 0 ? PyBool_FromLong(0) : NULL;
    if (start(&launch, direction, dtype, args[THREADS], args[POWER], args[LIMITS]) < 0)
        return NULL;
    Py_RETURN_TRUE;
}

/* Arguments: threads, power, limits, gate_up, out. */
static PyObject *swiglu_packed_fwd(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    enum { THREADS, POWER, LIMITS, GATE_UP, OUT, ARGUMENTS };
    Launch launch = new_launch(FORWARD);
    int dtype;
    if (count != ARGUMENTS)
        return PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", ARGUMENTS, count);
    const int found = read_packed(args[GATE_UP], args[OUT], &launch, &dtype);
    if (found != 1)
        return found == 0 ? PyBool_FromLong(0) : NULL;
    if (start(&launch, FORWARD, dtype, args[THREADS], args[POWER], args[LIMITS]) < 0)
        return NULL;
    Py_RETURN_TRUE;
}

#define DEFINE_METHOD(name, function, direction)                                          \
    static PyObject *name(PyObject *module, PyObject *const *args, Py_ssize_t count) \
    {                                                                                     \
        return function(direction, args, count);                                          \
    }
DEFINE_METHOD(swiglu_fwd, launch_contiguous, FORWARD)
DEFINE_METHOD(swiglu_bwd, launch_contiguous, BACKWARD)
DEFINE_METHOD(swiglu_fwd_strided, launch_strided, FORWARD)
DEFINE_METHOD(swiglu_bwd_strided, launch_strided, BACKWARD)

#define FAST(function) (PyCFunction)(void (*)(void))function, METH_FASTCALL
static PyMethodDef methods[] = {
    {"swiglu_fwd", FAST(swiglu_fwd), "gate, up, out; False unless all are contiguous CPU tensors"},
    {"swiglu_bwd", FAST(swiglu_bwd), "grad_out, gate, up, grad_gate, grad_up; False as in swiglu_fwd"},
    {"swiglu_packed_fwd", FAST(swiglu_packed_fwd), "gate_up, out; False as in swiglu_fwd"},
    {"swiglu_fwd_strided", FAST(swiglu_fwd_strided), "gate, up, out by addresses and strides"},
    {"swiglu_bwd_strided", FAST(swiglu_bwd_strided), "grad_out, gate, up, grad_gate, grad_up by addresses and strides"},
    {"use_dlpack_exchange_api", FAST(use_dlpack_exchange_api), "Read tensors by DLPack; False where it is unknown."},
    {"set_clamp_passes_at_limit", set_clamp_passes_at_limit, METH_O, "Whether clamp has a gradient at its limit."},
    {"cpu_capability", cpu_capability, METH_NOARGS, "The capability in use."},
    {"supported_cpu_capabilities", supported_cpu_capabilities, METH_NOARGS, "This processor's, best first."},
    {"use_cpu_capability", use_cpu_capability, METH_O, "Use another one; for tests."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_cpu_kernels", .m_size = -1, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__cpu_kernels(void)
{
#ifdef _OPENMP
    const long has_openmp = 1;
#else
    const long has_openmp = 0;
#endif
    choose_best_capability();
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL && PyModule_AddIntConstant(module, "has_openmp", has_openmp) < 0)
        Py_CLEAR(module);
    return module;
}

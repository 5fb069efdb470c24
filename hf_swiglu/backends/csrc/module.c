/* hf_swiglu.backends._cpu_kernels: the kernels as Python calls them, with tensors, or with addresses and strides for
   those. Nothing is checked here that cpu.py has checked. */
#include "tensors.h"

#include <math.h>
#include <string.h>

static const InstructionSet *chosen = &instruction_set_baseline;

static int can_run(const InstructionSet *set)
{
#ifdef HAVE_X86_INSTRUCTION_SETS
    if (set == &instruction_set_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (set == &instruction_set_avx2)
        /* Whatever has AVX2 has F16C, for which not every compiler can ask. */
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return set == &instruction_set_baseline;
}

/* Best first. */
static const InstructionSet *const instruction_sets[] = {
#ifdef HAVE_X86_INSTRUCTION_SETS
    &instruction_set_avx512, &instruction_set_avx2,
#endif
    &instruction_set_baseline,
};
enum { INSTRUCTION_SETS = sizeof instruction_sets / sizeof instruction_sets[0] };

/* Whether PyTorch's clamp passes the gradient at the limit itself, which depends on its release. */
static int passes_at_limit = 1;

static PyObject *set_passes_at_limit(PyObject *module, PyObject *value)
{
    passes_at_limit = PyObject_IsTrue(value);
    Py_RETURN_NONE;
}

static PyObject *instruction_set(PyObject *module, PyObject *unused)
{
    return PyUnicode_FromString(chosen->name);
}

static PyObject *supported_instruction_sets(PyObject *module, PyObject *unused)
{
    PyObject *names = PyList_New(0);
    for (int i = 0; names != NULL && i < INSTRUCTION_SETS; i++) {
        if (!can_run(instruction_sets[i]))
            continue;
        PyObject *name = PyUnicode_FromString(instruction_sets[i]->name);
        if (name == NULL || PyList_Append(names, name) < 0)
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *use_instruction_set(PyObject *module, PyObject *name)
{
    for (int i = 0; i < INSTRUCTION_SETS; i++) {
        if (PyUnicode_CompareWithASCIIString(name, instruction_sets[i]->name) == 0 && can_run(instruction_sets[i])) {
            chosen = instruction_sets[i];
            Py_RETURN_NONE;
        }
    }
    return PyErr_Format(PyExc_ValueError, "use_instruction_set: this processor cannot run %R; see "
                        "supported_instruction_sets()", name);
}

/* Reads the five limits of `Gating`; None stands for its defaults. */
static int read_limits(PyObject *limits, Gating *gating)
{
    float *fields[] = {&gating->alpha, &gating->gate_limit, &gating->act_limit, &gating->up_limit, &gating->up_offset};
    for (int i = 0; i < 5; i++) {
        PyObject *item = PySequence_GetItem(limits, i);
        if (item == NULL)
            return -1;
        *fields[i] = (float)PyFloat_AsDouble(item);
        Py_DECREF(item);
    }
    return PyErr_Occurred() ? -1 : 0;
}

/* A number in the tensors' dtype, as a limit is before PyTorch compares with it. */
static float limit_in(long dtype, float x)
{
    if (dtype == FLOAT32 || x == 0.0f || !isfinite(x))
        return x;
    const int bits = dtype == BFLOAT16 ? 8 : 11, smallest = dtype == BFLOAT16 ? -126 : -14;
    const int exponent = ilogbf(x) > smallest ? ilogbf(x) : smallest;
    const double unit = ldexp(1.0, exponent + 1 - bits), nearest = nearbyint(x / unit) * unit;
    return (float)(dtype == FLOAT16 && fabs(nearest) > 65504.0 ? copysign(INFINITY, nearest) : nearest);
}

static void set_limits(Gating *gating, long dtype)
{
    float *limits[] = {&gating->gate_limit, &gating->act_limit, &gating->up_limit};
    float *passes[] = {&gating->gate_passes, &gating->act_passes, &gating->up_passes};
    /* PyTorch adds a number in the tensors' dtype as well, on the CPU; it multiplies by one in float32. */
    gating->up_offset = limit_in(dtype, gating->up_offset);
    for (int i = 0; i < 3; i++) {
        *limits[i] = limit_in(dtype, *limits[i]);
        *passes[i] = passes_at_limit ? *limits[i] : nextafterf(*limits[i], -INFINITY);
    }
}

static int choose_variant(const Gating *gating, int has_limits, int has_up)
{
    if (has_limits || (gating->power == 1 && !has_up))
        return GENERAL;
    if (gating->power == 1)
        return SILU_TIMES_UP;
    return has_up ? SWIGLU_TIMES_UP : SWIGLU_ALONE;
}

/* Reads (row_stride, column_stride) of every operand from one flat tuple; None means one contiguous row. */
static int read_strides(PyObject *strides, Job *job)
{
    for (int i = 0; i < job->operands; i++) {
        Operand *operand = &job->operand[i];
        operand->row_stride = job->columns;
        operand->column_stride = 1;
        if (strides == Py_None)
            continue;
        PyObject *row_stride = PyTuple_GetItem(strides, 2 * i), *column_stride = PyTuple_GetItem(strides, 2 * i + 1);
        if (row_stride == NULL || column_stride == NULL)
            return -1;
        operand->row_stride = PyLong_AsLongLong(row_stride);
        operand->column_stride = PyLong_AsLongLong(column_stride);
    }
    return PyErr_Occurred() ? -1 : 0;
}

static Job new_job(int direction)
{
    return (Job){.inputs = direction == FORWARD ? 2 : 3, .operands = direction == FORWARD ? 3 : 5};
}

/* Runs a job whose operands are known. */
static int start(Job *job, int direction, long dtype, PyObject *threads, PyObject *power, PyObject *limits)
{
    job->threads = (int)PyLong_AsLong(threads);
    job->gating = (Gating){.power = (int)PyLong_AsLong(power), .alpha = 1.0f, .gate_limit = INFINITY,
                           .act_limit = INFINITY, .up_limit = INFINITY};
    if (PyErr_Occurred() || (limits != Py_None && read_limits(limits, &job->gating) < 0))
        return -1;
    if (dtype < 0 || dtype >= DTYPES || job->gating.power < 1 || job->gating.power > 2) {
        PyErr_Format(PyExc_ValueError, "dtype must be 0 to 2 and power 1 or 2; got %ld and %d", dtype,
                     job->gating.power);
        return -1;
    }
    const int has_up = job->operand[job->inputs - 1].data != NULL;
    if (!has_up) {
        /* The loops take 1 for it, which nothing may change. */
        job->gating.up_limit = INFINITY;
        job->gating.up_offset = 0.0f;
    }
    set_limits(&job->gating, dtype);
    job->element_size = element_size((int)dtype);
    job->run = chosen->run[direction][dtype][choose_variant(&job->gating, limits != Py_None, has_up)];
    Py_BEGIN_ALLOW_THREADS
    run_job(job);
    Py_END_ALLOW_THREADS
    return 0;
}

/* Arguments: threads, power, limits, dtype, rows, columns, strides, then one address for each operand. */
static PyObject *run_rows(int direction, PyObject *const *args, Py_ssize_t count)
{
    enum { THREADS, POWER, LIMITS, DTYPE, ROWS, COLUMNS, STRIDES, ADDRESSES };
    Job job = new_job(direction);
    if (count != ADDRESSES + job.operands)
        return PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", ADDRESSES + job.operands, count);
    long dtype = PyLong_AsLong(args[DTYPE]);
    job.rows = PyLong_AsLongLong(args[ROWS]);
    job.columns = PyLong_AsLongLong(args[COLUMNS]);
    for (int i = 0; i < job.operands; i++)
        job.operand[i].data = PyLong_AsVoidPtr(args[ADDRESSES + i]);
    if (PyErr_Occurred() || read_strides(args[STRIDES], &job) < 0)
        return NULL;
    if (start(&job, direction, dtype, args[THREADS], args[POWER], args[LIMITS]) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* Arguments: threads, power, limits, then one tensor or None for each operand. */
static PyObject *run_tensors(int direction, PyObject *const *args, Py_ssize_t count)
{
    enum { THREADS, POWER, LIMITS, TENSORS };
    Job job = new_job(direction);
    int dtype;
    if (count != TENSORS + job.operands)
        return PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", TENSORS + job.operands, count);
    if (!read_contiguous(args + TENSORS, &job, &dtype))
        Py_RETURN_FALSE;
    if (start(&job, direction, dtype, args[THREADS], args[POWER], args[LIMITS]) < 0)
        return NULL;
    Py_RETURN_TRUE;
}

/* Arguments: threads, power, limits, gate_up, out. */
static PyObject *packed_product(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    enum { THREADS, POWER, LIMITS, GATE_UP, OUT, ARGUMENTS };
    Job job = new_job(FORWARD);
    int dtype;
    if (count != ARGUMENTS)
        return PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", ARGUMENTS, count);
    if (!read_packed(args[GATE_UP], args[OUT], &job, &dtype))
        Py_RETURN_FALSE;
    if (start(&job, FORWARD, dtype, args[THREADS], args[POWER], args[LIMITS]) < 0)
        return NULL;
    Py_RETURN_TRUE;
}

#define DEFINE_METHOD(name, function, direction)                                          \
    static PyObject *name(PyObject *module, PyObject *const *args, Py_ssize_t count) \
    {                                                                                     \
        return function(direction, args, count);                                          \
    }
DEFINE_METHOD(product_rows, run_rows, FORWARD)
DEFINE_METHOD(product_backward_rows, run_rows, BACKWARD)
DEFINE_METHOD(product, run_tensors, FORWARD)
DEFINE_METHOD(product_backward, run_tensors, BACKWARD)

#define FAST(function) (PyCFunction)(void (*)(void))function, METH_FASTCALL
static PyMethodDef methods[] = {
    {"product", FAST(product), "gate, up, out; False for what only `product_rows` can do"},
    {"product_backward", FAST(product_backward), "grad, gate, up, grad_gate, grad_up; False as in `product`"},
    {"packed_product", FAST(packed_product), "gate_up, out; False as in `product`"},
    {"product_rows", FAST(product_rows), "gate, up, out, by their addresses and strides"},
    {"product_backward_rows", FAST(product_backward_rows), "grad, gate, up, grad_gate, grad_up, likewise"},
    {"use_exchange_table", FAST(use_exchange_table), "How `product` and `product_backward` may read tensors."},
    {"set_passes_at_limit", set_passes_at_limit, METH_O, "Whether clamps pass the gradient at the limit itself."},
    {"instruction_set", instruction_set, METH_NOARGS, "The instruction set in use."},
    {"supported_instruction_sets", supported_instruction_sets, METH_NOARGS, "All that this processor runs."},
    {"use_instruction_set", use_instruction_set, METH_O, "Use another one; for tests."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_cpu_kernels", .m_size = -1, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__cpu_kernels(void)
{
#ifdef HAVE_X86_INSTRUCTION_SETS
    __builtin_cpu_init();
#endif
    int best = 0;
    while (!can_run(instruction_sets[best]))
        best++;
    chosen = instruction_sets[best];
    return PyModule_Create(&definition);
}

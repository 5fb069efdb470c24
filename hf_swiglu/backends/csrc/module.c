/* hf_swiglu.backends._cpu_kernels: the kernels as Python calls them, with addresses and strides for tensors.
   Nothing is checked here that cpu.py has checked. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <math.h>
#include <string.h>

#include "kernels.h"

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

/* Arguments: dtype, threads, power, limits, rows, columns, strides, then one address for each operand. */
static PyObject *run(int direction, PyObject *const *args, Py_ssize_t count)
{
    enum { DTYPE, THREADS, POWER, LIMITS, ROWS, COLUMNS, STRIDES, ADDRESSES };
    const int up = direction == FORWARD ? 1 : 2;
    Job job = {.inputs = up + 1, .operands = direction == FORWARD ? 3 : 5};
    if (count != ADDRESSES + job.operands)
        return PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", ADDRESSES + job.operands, count);

    long dtype = PyLong_AsLong(args[DTYPE]);
    job.gating = (Gating){(int)PyLong_AsLong(args[POWER]), 1.0f, INFINITY, INFINITY, INFINITY, 0.0f};
    job.threads = (int)PyLong_AsLong(args[THREADS]);
    job.rows = PyLong_AsLongLong(args[ROWS]);
    job.columns = PyLong_AsLongLong(args[COLUMNS]);
    for (int i = 0; i < job.operands; i++)
        job.operand[i].data = PyLong_AsVoidPtr(args[ADDRESSES + i]);
    if (PyErr_Occurred() || read_strides(args[STRIDES], &job) < 0)
        return NULL;
    if (args[LIMITS] != Py_None && read_limits(args[LIMITS], &job.gating) < 0)
        return NULL;
    if (dtype < 0 || dtype >= DTYPES || job.gating.power < 1 || job.gating.power > 2)
        return PyErr_Format(PyExc_ValueError, "dtype must be 0 to 2 and power 1 or 2; got %ld and %d", dtype,
                            job.gating.power);

    const int has_up = job.operand[up].data != NULL;
    if (!has_up) {
        /* The loops take 1 for it, which nothing may change. */
        job.gating.up_limit = INFINITY;
        job.gating.up_offset = 0.0f;
    }
    job.element_size = dtype == FLOAT32 ? 4 : 2;
    int variant = choose_variant(&job.gating, args[LIMITS] != Py_None, has_up);
    job.run = chosen->run[direction][dtype][variant];
    Py_BEGIN_ALLOW_THREADS
    run_job(&job);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *product(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    return run(FORWARD, args, count);
}

static PyObject *product_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    return run(BACKWARD, args, count);
}

static PyMethodDef methods[] = {
    {"product", (PyCFunction)(void (*)(void))product, METH_FASTCALL, "gate, up, out"},
    {"product_backward", (PyCFunction)(void (*)(void))product_backward, METH_FASTCALL,
     "grad, gate, up, grad_gate, grad_up"},
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

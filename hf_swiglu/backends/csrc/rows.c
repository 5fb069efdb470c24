/* From tensors to runs of adjacent elements: rows, strides and threads. */
#include <stddef.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

/* The fewest elements that a thread gets. Two threads begin with 32768, where PyTorch's own kernels take them too:
   8192 elements take 5 us serially, and waiting for a thread of a busy machine can take a thousand times that. */
enum { GRAIN = 16384 };

/* Columns that do not lie side by side pass through buffers of this many elements. */
enum { GATHERED = 256 };

/* Threads part at multiples of this, so that no two of them write to one cache line. */
enum { CACHE_LINE_ELEMENTS = 64 };

static char *address(const Job *job, const Operand *operand, int64_t row, int64_t column)
{
    return operand->data + (row * operand->row_stride + column * operand->column_stride) * job->element_size;
}

static void copy_columns(char *to, int64_t to_stride, const char *from, int64_t from_stride, int64_t count, int size)
{
    if (size == 4) {
        for (int64_t i = 0; i < count; i++)
            ((uint32_t *)to)[i * to_stride] = ((const uint32_t *)from)[i * from_stride];
    } else {
        for (int64_t i = 0; i < count; i++)
            ((uint16_t *)to)[i * to_stride] = ((const uint16_t *)from)[i * from_stride];
    }
}

/* One piece of one row, with those operands gathered whose columns do not lie side by side. */
static void run_gathered(const Job *job, int64_t row, int64_t column, int64_t count)
{
    uint32_t buffers[MAX_OPERANDS][GATHERED];
    char *at[MAX_OPERANDS];
    for (int i = 0; i < job->operands; i++) {
        const Operand *operand = &job->operand[i];
        at[i] = operand->data == NULL ? NULL : address(job, operand, row, column);
        if (at[i] == NULL || operand->column_stride == 1)
            continue;
        if (i < job->inputs)
            copy_columns((char *)buffers[i], 1, at[i], operand->column_stride, count, job->element_size);
        at[i] = (char *)buffers[i];
    }
    job->run(at, count, &job->gating);
    for (int i = job->inputs; i < job->operands; i++) {
        const Operand *operand = &job->operand[i];
        if (at[i] == (char *)buffers[i])
            copy_columns(address(job, operand, row, column), operand->column_stride, at[i], 1, count,
                         job->element_size);
    }
}

static void run_adjacent(const Job *job, int64_t row, int64_t column, int64_t count)
{
    char *at[MAX_OPERANDS];
    for (int i = 0; i < job->operands; i++)
        at[i] = job->operand[i].data == NULL ? NULL : address(job, &job->operand[i], row, column);
    job->run(at, count, &job->gating);
}

/* The elements from `begin` to `end`, counted through all rows. */
static void run_range(const Job *job, int64_t begin, int64_t end)
{
    int gathered = 0;
    for (int i = 0; i < job->operands; i++)
        gathered |= job->operand[i].data != NULL && job->operand[i].column_stride != 1;
    int64_t row = begin / job->columns, column = begin % job->columns;
    while (begin < end) {
        int64_t count = job->columns - column;
        if (count > end - begin)
            count = end - begin;
        if (gathered && count > GATHERED)
            count = GATHERED;
        (gathered ? run_gathered : run_adjacent)(job, row, column, count);
        begin += count;
        column += count;
        if (column == job->columns) {
            column = 0;
            row++;
        }
    }
}

void run_job(const Job *job)
{
    int64_t total = job->rows * job->columns;
    if (total == 0)
        return;
#ifdef _OPENMP
    int64_t threads = total / GRAIN < job->threads ? total / GRAIN : job->threads;
    if (threads > 1) {
#pragma omp parallel num_threads((int)threads)
        {
            int64_t team = omp_get_num_threads(), lines = (total + CACHE_LINE_ELEMENTS - 1) / CACHE_LINE_ELEMENTS;
            int64_t share = (lines + team - 1) / team * CACHE_LINE_ELEMENTS;
            int64_t begin = share * omp_get_thread_num(), end = begin + share;
            run_range(job, begin, end < total ? end : total);
        }
        return;
    }
#endif
    run_range(job, 0, total);
}

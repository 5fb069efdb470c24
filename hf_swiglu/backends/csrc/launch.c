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

static char *address(const Launch *launch, const Operand *operand, int64_t row, int64_t column)
{
    return operand->data + (row * operand->row_stride + column * operand->column_stride) * launch->element_size;
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
static void run_gathered(const Launch *launch, int64_t row, int64_t column, int64_t count)
{
    uint32_t buffers[MAX_OPERANDS][GATHERED];
    char *at[MAX_OPERANDS];
    for (int i = 0; i < launch->operands; i++) {
        const Operand *operand = &launch->operand[i];
        at[i] = operand->data == NULL ? NULL : address(launch, operand, row, column);
        if (at[i] == NULL || operand->column_stride == 1)
            continue;
        if (i < launch->inputs)
            copy_columns((char *)buffers[i], 1, at[i], operand->column_stride, count, launch->element_size);
        at[i] = (char *)buffers[i];
    }
    launch->kernel(at, count, &launch->params);
    for (int i = launch->inputs; i < launch->operands; i++) {
        const Operand *operand = &launch->operand[i];
        if (at[i] == (char *)buffers[i])
            copy_columns(address(launch, operand, row, column), operand->column_stride, at[i], 1, count,
                         launch->element_size);
    }
}

static void run_adjacent(const Launch *launch, int64_t row, int64_t column, int64_t count)
{
    char *at[MAX_OPERANDS];
    for (int i = 0; i < launch->operands; i++)
        at[i] = launch->operand[i].data == NULL ? NULL : address(launch, &launch->operand[i], row, column);
    launch->kernel(at, count, &launch->params);
}

/* The elements from `begin` to `end`, counted through all rows. */
static void run_range(const Launch *launch, int64_t begin, int64_t end)
{
    int gathered = 0;
    for (int i = 0; i < launch->operands; i++)
        gathered |= launch->operand[i].data != NULL && launch->operand[i].column_stride != 1;
    int64_t row = begin / launch->columns, column = begin % launch->columns;
    while (begin < end) {
        int64_t count = launch->columns - column;
        if (count > end - begin)
            count = end - begin;
        if (gathered && count > GATHERED)
            count = GATHERED;
        (gathered ? run_gathered : run_adjacent)(launch, row, column, count);
        begin += count;
        column += count;
        if (column == launch->columns) {
            column = 0;
            row++;
        }
    }
}

void launch_kernel(const Launch *launch)
{
    int64_t total = launch->rows * launch->columns;
    if (total == 0)
        return;
#ifdef _OPENMP
    int64_t threads = total / GRAIN < launch->threads ? total / GRAIN : launch->threads;
    if (threads > 1) {
#pragma omp parallel num_threads((int)threads)
        {
            int64_t team = omp_get_num_threads(), lines = (total + CACHE_LINE_ELEMENTS - 1) / CACHE_LINE_ELEMENTS;
            int64_t share = (lines + team - 1) / team * CACHE_LINE_ELEMENTS;
            int64_t begin = share * omp_get_thread_num(), end = begin + share;
            run_range(launch, begin, end < total ? end : total);
        }
        return;
    }
#endif
    run_range(launch, 0, total);
}

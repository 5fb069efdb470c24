/* Runs the loops in every CPU capability of this processor, for a sanitizer to watch: `make test-sanitizers`.

   Each operand is an allocation of its own that ends with its last element, so that AddressSanitizer notices an access
   beyond it. The threads are POSIX threads, which ThreadSanitizer can watch, in place of libgomp's, which it cannot:
   the functions that GCC calls for a parallel region are defined here. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "capabilities.h"

enum { MOST_THREADS = 8 };

typedef struct {
    void (*function)(void *);
    void *data;
    int index, team;
} Worker;

static _Thread_local int thread_index = 0, team_size = 1;

int omp_get_thread_num(void) { return thread_index; }
int omp_get_num_threads(void) { return team_size; }

static void *work(void *argument)
{
    const Worker *worker = argument;
    thread_index = worker->index;
    team_size = worker->team;
    worker->function(worker->data);
    thread_index = 0;
    team_size = 1;
    return NULL;
}

void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags)
{
    pthread_t thread[MOST_THREADS];
    Worker worker[MOST_THREADS];
    (void)flags;
    for (unsigned i = 0; i < threads; i++) {
        worker[i] = (Worker){function, data, (int)i, (int)threads};
        if (i > 0 && pthread_create(&thread[i], NULL, work, &worker[i]) != 0)
            abort();
    }
    work(&worker[0]);
    for (unsigned i = 1; i < threads; i++)
        pthread_join(thread[i], NULL);
}

/* What a launch is about: the strides of operands in elements, the same for all, with `offset` elements before them. */
typedef struct {
    int64_t rows, columns, row_stride, column_stride, offset;
    int threads, in_place, expanded;
} Shape;

static const Params members[] = {
    {1, 1.0f, INFINITY, INFINITY, INFINITY, 0.0f, INFINITY, INFINITY, INFINITY},
    {2, 1.0f, INFINITY, INFINITY, INFINITY, 0.0f, INFINITY, INFINITY, INFINITY},
    {1, 1.702f, 7.0f, INFINITY, 7.0f, 1.0f, 7.0f, INFINITY, 7.0f},
    {2, 0.5f, 6.5f, 3.0f, 2.0f, 0.0f, 6.5f, 3.0f, 2.0f},
};

/* For each variant and the product without up in GENERAL: the variant, the member, whether there is an up. */
static const int forms[][3] = {
    {SILU_TIMES_UP, 0, 1}, {SWIGLU_TIMES_UP, 1, 1}, {SWIGLU_ALONE, 1, 0},
    {GENERAL, 2, 1},       {GENERAL, 3, 1},         {GENERAL, 2, 0},
};
enum { FORMS = sizeof forms / sizeof forms[0] };

static long launches = 0;

static Launch with_form(const CpuCapability *cpu, int direction, int dtype, const int *form, const Shape *shape)
{
    return (Launch){
        .kernel = cpu->kernels[direction][dtype][form[0]],
        .params = members[form[1]],
        .inputs = direction == FORWARD ? 2 : 3,
        .operands = direction == FORWARD ? 3 : 5,
        .element_size = element_size(dtype),
        .threads = shape->threads,
        .rows = shape->rows,
        .columns = shape->columns,
    };
}

enum { LARGEST_ALLOCATION = 1 << 20 };
static char random_bytes[LARGEST_ALLOCATION];

/* Any bits are a number, an infinity or NaN. */
static char *allocated(int64_t bytes)
{
    char *data = malloc((size_t)bytes);
    if ((data == NULL && bytes > 0) || bytes > LARGEST_ALLOCATION)
        abort();
    if (bytes > 0)
        memcpy(data, random_bytes, (size_t)bytes);
    return data;
}

static void run(const CpuCapability *cpu, int direction, int dtype, const int *form, const Shape *shape)
{
    Launch launch = with_form(cpu, direction, dtype, form, shape);
    const int gate = direction == FORWARD ? 0 : 1, up = gate + 1, size = launch.element_size;
    char *memory[MAX_OPERANDS] = {NULL};
    for (int i = 0; i < launch.operands; i++) {
        const int is_expanded = shape->expanded && direction == BACKWARD && i == 0;
        const int64_t row_stride = is_expanded ? 0 : shape->row_stride, column_stride = is_expanded ? 0 : shape->column_stride;
        int64_t extent = shape->rows * shape->columns == 0
                             ? 0
                             : 1 + (shape->rows - 1) * row_stride + (shape->columns - 1) * column_stride;
        if (!form[2] && (i == up || i == launch.inputs + 1))
            continue;
        const int over = i - launch.inputs + gate;
        if (shape->in_place && i >= launch.inputs) {
            launch.operand[i] = launch.operand[over];
            continue;
        }
        memory[i] = allocated((shape->offset + extent) * size);
        launch.operand[i] = (Operand){memory[i] + shape->offset * size, row_stride, column_stride};
    }
    launch_kernel(&launch);
    launches++;
    for (int i = 0; i < launch.operands; i++)
        free(memory[i]);
}

/* One launch that another thread makes at the same time, of inputs that all of them read. */
static void *launch_shared(void *launch)
{
    launch_kernel(launch);
    return NULL;
}

static void run_at_once(const CpuCapability *cpu, int direction, int dtype, const int *form)
{
    const Shape shape = {.rows = 3, .columns = 1001, .threads = 1};
    pthread_t thread[MOST_THREADS];
    Launch launch[MOST_THREADS];
    char *inputs[3], *outputs[MOST_THREADS][2];
    const int64_t bytes = shape.rows * shape.columns * element_size(dtype);
    for (int i = 0; i < 3; i++)
        inputs[i] = allocated(bytes);
    for (int at = 0; at < MOST_THREADS; at++) {
        launch[at] = with_form(cpu, direction, dtype, form, &shape);
        const int absent = form[2] ? -1 : launch[at].inputs - 1;
        for (int i = 0; i < launch[at].inputs; i++)
            launch[at].operand[i] = (Operand){i == absent ? NULL : inputs[i], shape.columns, 1};
        for (int i = launch[at].inputs; i < launch[at].operands; i++) {
            char *output = outputs[at][i - launch[at].inputs] = allocated(bytes);
            launch[at].operand[i] = (Operand){!form[2] && i == launch[at].inputs + 1 ? NULL : output, shape.columns, 1};
        }
        launches++;
        if (pthread_create(&thread[at], NULL, launch_shared, &launch[at]) != 0)
            abort();
    }
    for (int at = 0; at < MOST_THREADS; at++) {
        pthread_join(thread[at], NULL);
        for (int i = launch[at].inputs; i < launch[at].operands; i++)
            free(outputs[at][i - launch[at].inputs]);
    }
    for (int i = 0; i < 3; i++)
        free(inputs[i]);
}

static void run_shapes(const CpuCapability *cpu, int direction, int dtype, const int *form)
{
    /* The largest block is 64 elements. */
    for (int64_t count = 0; count <= 131; count++)
        for (int in_place = 0; in_place <= 1; in_place++)
            run(cpu, direction, dtype, form,
                &(Shape){1, count, count, 1, count % 5, .threads = 2, .in_place = in_place});
    static const int64_t columns[] = {1, 5, 63, 64, 65, 255, 256, 257, 701};
    for (size_t c = 0; c < sizeof columns / sizeof columns[0]; c++)
        for (int64_t stride = 1; stride <= 3; stride++)
            for (int way = 0; way < 4; way++) {
                const int64_t width = columns[c] * stride * (1 + (way & 1));
                run(cpu, direction, dtype, form,
                    &(Shape){3, columns[c], width, stride, way, .threads = 2, .in_place = way & 2, .expanded = way == 1});
            }
    /* A thread gets 16384 elements at least: around 2, 3 and more threads, in one row and in several. */
    static const int64_t sizes[][2] = {{1, 32767}, {1, 32768}, {1, 32769}, {1, 49152}, {7, 7023}, {130, 509}, {65601, 1}};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++)
        for (int threads = 1; threads <= MOST_THREADS; threads += threads)
            for (int64_t stride = 1; stride <= 2; stride++)
                run(cpu, direction, dtype, form,
                    &(Shape){sizes[s][0], sizes[s][1], sizes[s][1] * stride, stride, 1, threads, threads == 2, 0});
    run_at_once(cpu, direction, dtype, form);
}

int main(void)
{
    const CpuCapability *cpu;
    uint32_t bits = 1;
    for (int i = 0; i < LARGEST_ALLOCATION; i++) {
        bits = bits * 1664525u + 1013904223u;
        random_bytes[i] = (char)(bits >> 24);
    }
    choose_best_capability();
    for (int i = 0; (cpu = supported_capability(i)) != NULL; i++) {
        launches = 0;
        for (int direction = 0; direction < DIRECTIONS; direction++)
            for (int dtype = 0; dtype < DTYPES; dtype++)
                for (int form = 0; form < FORMS; form++)
                    run_shapes(cpu, direction, dtype, forms[form]);
        printf("%s: %ld launches\n", cpu->name, launches);
    }
    return 0;
}

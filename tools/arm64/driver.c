/* Runs one launch of the loops for any processor, without Python or PyTorch: `make test-arm64` compiles it for arm64.

   Arguments: direction, dtype, variant, power, rows, columns, column stride, threads, whether there is an up, then the
   eight floats of the family's parameters in the order of kernels.h. Inputs come on stdin, one after the other, and
   outputs go to stdout: rows x columns elements each. */
#include <stdio.h>
#include <stdlib.h>

#include "kernels.h"

enum { NUMBERS = 9, FLOATS = 8 };

static char *room(size_t bytes)
{
    char *data = malloc(bytes);
    if (data == NULL)
        abort();
    /* NaN in every dtype: what is not written cannot pass. */
    for (size_t i = 0; i < bytes; i++)
        data[i] = (char)0xff;
    return data;
}

int main(int count, char **arguments)
{
    if (count != 1 + NUMBERS + FLOATS)
        return 2;
    int64_t number[NUMBERS];
    float parameter[FLOATS];
    for (int i = 0; i < NUMBERS; i++)
        number[i] = strtoll(arguments[1 + i], NULL, 10);
    for (int i = 0; i < FLOATS; i++)
        parameter[i] = strtof(arguments[1 + NUMBERS + i], NULL);
    const int direction = (int)number[0], dtype = (int)number[1], has_up = (int)number[8];
    const int64_t stride = number[6];

    Launch launch = {
        .kernel = cpu_capability_baseline.kernels[direction][dtype][number[2]],
        .params = {(int)number[3], parameter[0], parameter[1], parameter[2], parameter[3], parameter[4], parameter[5],
                   parameter[6], parameter[7]},
        .inputs = direction == FORWARD ? 2 : 3,
        .operands = direction == FORWARD ? 3 : 5,
        .element_size = element_size(dtype),
        .threads = (int)number[7],
        .rows = number[4],
        .columns = number[5],
    };
    const int up = launch.inputs - 1, grad_up = direction == FORWARD ? -1 : 4, size = launch.element_size;
    const int64_t elements = launch.rows * launch.columns;
    for (int i = 0; i < launch.operands; i++) {
        if (!has_up && (i == up || i == grad_up))
            continue;
        launch.operand[i] = (Operand){room((size_t)(elements * stride * size)), launch.columns * stride, stride};
        for (int64_t at = 0; i < launch.inputs && at < elements; at++)
            if (fread(launch.operand[i].data + at * stride * size, (size_t)size, 1, stdin) != 1)
                return 3;
    }
    launch_kernel(&launch);
    for (int i = launch.inputs; i < launch.operands; i++)
        for (int64_t at = 0; launch.operand[i].data != NULL && at < elements; at++)
            if (fwrite(launch.operand[i].data + at * stride * size, (size_t)size, 1, stdout) != 1)
                return 4;
    return 0;
}

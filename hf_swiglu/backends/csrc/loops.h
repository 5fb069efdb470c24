/* The kernels: loops over formulas.h, compiled once for each CPU capability.

   An including file defines INLINE and includes its vector_*.h. Functions take `direction`, `dtype` and `variant` as
   constants, so that no branch on them remains when they are compiled. */
#include <string.h>

#include "formulas.h"

enum { BLOCK = PAIRS * 2 * LANES, MAX_ELEMENT_SIZE = 4 };

INLINE vpair load(int dtype, const char *p)
{
    if (dtype == FLOAT32)
        return load_float32((const float *)p);
    return dtype == BFLOAT16 ? load_bfloat16((const uint16_t *)p) : load_float16((const uint16_t *)p);
}

INLINE void store(int dtype, char *p, vpair x)
{
    if (dtype == FLOAT32)
        store_float32((float *)p, x);
    else if (dtype == BFLOAT16)
        store_bfloat16((uint16_t *)p, x);
    else
        store_float16((uint16_t *)p, x);
}

/* Where there is no up it counts as 1. */
INLINE vpair load_up(int dtype, int variant, const char *p, int64_t offset)
{
    if (variant == SWIGLU_ALONE || (variant == GENERAL && p == NULL))
        return (vpair){v_set(1.0f), v_set(1.0f)};
    return load(dtype, p + offset);
}

/* All loads come before the first store, which the compiler would not move them over. */
INLINE void forward_block(int dtype, int variant, char *const *operands, int64_t offset, const Params *params)
{
    const int step = 2 * LANES * element_size(dtype);
    vpair gate[PAIRS], up[PAIRS];
    for (int i = 0; i < PAIRS; i++) {
        gate[i] = load(dtype, operands[0] + offset + i * step);
        up[i] = load_up(dtype, variant, operands[1], offset + i * step);
    }
    for (int i = 0; i < PAIRS; i++) {
        gate[i].a = product(dtype, variant, gate[i].a, up[i].a, params);
        gate[i].b = product(dtype, variant, gate[i].b, up[i].b, params);
    }
    for (int i = 0; i < PAIRS; i++)
        store(dtype, operands[2] + offset + i * step, gate[i]);
}

INLINE void backward_block(int dtype, int variant, char *const *operands, int64_t offset, const Params *params)
{
    const int step = 2 * LANES * element_size(dtype);
    vpair grad[PAIRS], gate[PAIRS], up[PAIRS];
    for (int i = 0; i < PAIRS; i++) {
        grad[i] = load(dtype, operands[0] + offset + i * step);
        gate[i] = load(dtype, operands[1] + offset + i * step);
        up[i] = load_up(dtype, variant, operands[2], offset + i * step);
    }
    for (int i = 0; i < PAIRS; i++) {
        Gradients a = gradients(dtype, variant, grad[i].a, gate[i].a, up[i].a, params);
        Gradients b = gradients(dtype, variant, grad[i].b, gate[i].b, up[i].b, params);
        gate[i] = (vpair){a.gate, b.gate};
        up[i] = (vpair){a.up, b.up};
    }
    for (int i = 0; i < PAIRS; i++) {
        store(dtype, operands[3] + offset + i * step, gate[i]);
        if (variant == SILU_TIMES_UP || variant == SWIGLU_TIMES_UP || (variant == GENERAL && operands[4] != NULL))
            store(dtype, operands[4] + offset + i * step, up[i]);
    }
}

#ifdef HAVE_FLOAT16_ARITHMETIC
#include "float16_avx512.h"
#endif

INLINE void block(int direction, int dtype, int variant, char *const *operands, int64_t offset, const Params *params)
{
#ifdef HAVE_FLOAT16_ARITHMETIC
    if (dtype == FLOAT16 && variant != GENERAL) {
        float16_block(direction, variant, operands, offset);
        return;
    }
#endif
    if (direction == FORWARD)
        forward_block(dtype, variant, operands, offset, params);
    else
        backward_block(dtype, variant, operands, offset, params);
}

/* Whole blocks in place; the rest as one block in a buffer, so that nothing outside is read or written. */
INLINE void run(int direction, int dtype, int variant, char *const *operands, int64_t count, const Params *params)
{
    const int size = element_size(dtype);
    const int inputs = direction == FORWARD ? 2 : 3, all = direction == FORWARD ? 3 : 5;
    /* Copied, because the compiler must expect a store to change what `operands` points to. */
    char *const at[MAX_OPERANDS] = {operands[0], operands[1], operands[2], all == 5 ? operands[3] : NULL,
                                    all == 5 ? operands[4] : NULL};
    int64_t whole = count - count % BLOCK;
    for (int64_t i = 0; i < whole; i += BLOCK)
        block(direction, dtype, variant, at, i * size, params);
    if (whole == count)
        return;

    char buffers[MAX_OPERANDS][BLOCK * MAX_ELEMENT_SIZE] = {{0}};
    char *tail[MAX_OPERANDS];
    size_t bytes = (size_t)((count - whole) * size);
    for (int i = 0; i < all; i++) {
        tail[i] = operands[i] == NULL ? NULL : buffers[i];
        if (i < inputs && tail[i] != NULL)
            memcpy(tail[i], operands[i] + whole * size, bytes);
    }
    block(direction, dtype, variant, tail, 0, params);
    for (int i = inputs; i < all; i++)
        if (tail[i] != NULL)
            memcpy(operands[i] + whole * size, tail[i], bytes);
}

#define DEFINE_RUN(direction, dtype, variant)                                                       \
    static void run_##direction##_##dtype##_##variant(char *const *o, int64_t n, const Params *g) \
    {                                                                                               \
        run(direction, dtype, variant, o, n, g);                                                    \
    }
#define DEFINE_VARIANTS(direction, dtype)           \
    DEFINE_RUN(direction, dtype, SILU_TIMES_UP)     \
    DEFINE_RUN(direction, dtype, SWIGLU_TIMES_UP)   \
    DEFINE_RUN(direction, dtype, SWIGLU_ALONE)      \
    DEFINE_RUN(direction, dtype, GENERAL)
#define NAME_VARIANTS(direction, dtype)                                                    \
    {run_##direction##_##dtype##_SILU_TIMES_UP, run_##direction##_##dtype##_SWIGLU_TIMES_UP, \
     run_##direction##_##dtype##_SWIGLU_ALONE, run_##direction##_##dtype##_GENERAL}
#define NAME_DTYPES(direction)                                                 \
    {NAME_VARIANTS(direction, FLOAT32), NAME_VARIANTS(direction, BFLOAT16), \
     NAME_VARIANTS(direction, FLOAT16)}

DEFINE_VARIANTS(FORWARD, FLOAT32)
DEFINE_VARIANTS(FORWARD, BFLOAT16)
DEFINE_VARIANTS(FORWARD, FLOAT16)
DEFINE_VARIANTS(BACKWARD, FLOAT32)
DEFINE_VARIANTS(BACKWARD, BFLOAT16)
DEFINE_VARIANTS(BACKWARD, FLOAT16)

#define CPU_CAPABILITY(label) {label, {NAME_DTYPES(FORWARD), NAME_DTYPES(BACKWARD)}}

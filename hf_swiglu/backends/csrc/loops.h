/* The loops, written once in the vocabulary of a vector_*.h and compiled once for each instruction set.

   An including file defines NAME(x), which adds the instruction set's name, and includes its vector_*.h.
   Functions take `dtype` and `variant` as constants, so the branches on them are gone when they are compiled. */
#include <math.h>
#include <string.h>

#include "kernels.h"

enum { BLOCK = PAIRS * 2 * LANES, MAX_ELEMENT_SIZE = 4 };

/* e^-x: 2^n times what the polynomial makes of the rest, with n the integer nearest to -x / ln(2). */
INLINE vfloat exp_minus(int dtype, vfloat x)
{
    /* At -88.8 it is an infinity; at 110 it is 0, and so it is at 88 where 2^-127 counts as 0. */
    if (dtype == FLOAT32 || SCALE_IS_LIMITED)
        x = v_at_least(v_at_most(x, v_set(SCALE_IS_LIMITED ? 88.0f : 110.0f)), v_set(-88.8f));
    vfloat exponent = v_mul(x, v_set(-1.44269504f)), n = v_round(exponent), y;

    /* Polynomials of least relative error (Remez). For float32 it is e^-rest, |rest| <= ln(2) / 2, to 7.5e-8, where
       half an ulp is 6.0e-8. The others are 2^rest, |rest| <= 1/2: 2.6e-6 is 1 % of half an ulp of a float16, and 7.5e-5
       is 4 % of a bfloat16's. */
    if (dtype == FLOAT32) {
        /* ln(2) in two parts, the first of 15 bits, so that its product with n is exact on every processor. */
        vfloat rest = v_mul_add(n, v_set(0.693145751953125f), x);
        rest = v_mul_add(n, v_set(1.42860682e-6f), rest);
        y = v_mul_add(rest, v_set(-8.297655198e-3f), v_set(4.191538198e-2f));
        y = v_mul_add(rest, y, v_set(-1.666757473e-1f));
        y = v_mul_add(rest, y, v_set(4.999889485e-1f));
        y = v_mul_add(rest, y, v_set(-0.999999692f));
        return v_scale(v_mul_add(rest, y, v_set(1.000000072f)), n);
    }
    vfloat rest = v_sub(exponent, n);
    if (dtype == FLOAT16) {
        y = v_mul_add(rest, v_set(9.570101863e-3f), v_set(5.591786034e-2f));
        y = v_mul_add(rest, y, v_set(0.2402474483f));
        y = v_mul_add(rest, y, v_set(0.6931218147f));
        return v_scale(v_mul_add(rest, y, v_set(0.9999992614f)), n);
    }
    y = v_mul_add(rest, v_set(5.517167233e-2f), v_set(0.2426111224f));
    y = v_mul_add(rest, y, v_set(0.6932609847f));
    return v_scale(v_mul_add(rest, y, v_set(0.9999280736f)), n);
}

/* 1 / (1 + e). Exactly 0 where e is infinite: that makes swish(-inf) the NaN it is in PyTorch. */
INLINE vfloat sigmoid_of_exp(int dtype, vfloat e)
{
    vfloat one_plus_exp = v_add(e, v_set(1.0f));
    if (dtype == FLOAT32)
        return v_reciprocal(one_plus_exp);
    return dtype == FLOAT16 ? v_reciprocal_14_bits(one_plus_exp) : v_reciprocal_12_bits(one_plus_exp);
}

INLINE vfloat sigmoid(int dtype, vfloat x) { return sigmoid_of_exp(dtype, exp_minus(dtype, x)); }

INLINE vfloat product(int dtype, int variant, vfloat gate, vfloat up, const Gating *gating)
{
    if (variant != GENERAL) {
        vfloat swish = v_mul(gate, sigmoid(dtype, gate));
        if (variant == SILU_TIMES_UP)
            return v_mul(swish, up);
        vfloat activated = v_mul(gate, swish);
        return variant == SWIGLU_ALONE ? activated : v_mul(activated, up);
    }
    gate = v_at_most(gate, v_set(gating->gate_limit));
    vfloat activated = v_mul(gate, sigmoid(dtype, v_mul(gate, v_set(gating->alpha))));
    if (gating->power == 2)
        activated = v_mul(gate, activated);
    activated = v_at_most(activated, v_set(gating->act_limit));
    up = v_at_least(v_at_most(up, v_set(gating->up_limit)), v_set(-gating->up_limit));
    return v_mul(activated, v_add(up, v_set(gating->up_offset)));
}

typedef struct { vfloat gate, up; } Gradients;

/* With s = sigmoid(alpha * g):  d(g^p s)/dg = g^(p-1) (p s + alpha g s (1 - s)). */
typedef struct { vfloat swish, slope; } Activation;

INLINE Activation activation(int dtype, int power, vfloat alpha, vfloat gate)
{
    vfloat e = exp_minus(dtype, v_mul(gate, alpha)), s = sigmoid_of_exp(dtype, e), swish = v_mul(gate, s);
    vfloat complement = v_sub(v_set(1.0f), s);
    /* There a large gate would show that s is not quite 1. The product is NaN where e is infinite, and s is 0. */
    if (dtype != FLOAT32 && !RECIPROCAL_OF_1_IS_1)
        complement = v_min_not_nan(v_mul(e, s), v_set(1.0f));
    vfloat rest = v_mul(swish, v_mul(alpha, complement));
    return (Activation){swish, power == 1 ? v_add(s, rest) : v_mul(gate, v_add(v_add(s, s), rest))};
}

/* Clamps as in PyTorch: the gradient passes inside and on the limit, and is 0 outside and where x is NaN. */
INLINE Gradients gradients_general(int dtype, vfloat grad, vfloat gate_in, vfloat up_in, const Gating *gating)
{
    vfloat gate = v_at_most(gate_in, v_set(gating->gate_limit));
    vfloat up = v_at_least(v_at_most(up_in, v_set(gating->up_limit)), v_set(-gating->up_limit));
    vfloat alpha = v_set(gating->alpha);
    Activation act = activation(dtype, gating->power, alpha, gate);
    vfloat activated = gating->power == 2 ? v_mul(gate, act.swish) : act.swish;
    vfloat act_limit = v_set(gating->act_limit);

    vfloat grad_activated = v_mul(grad, v_add(up, v_set(gating->up_offset)));
    if (gating->act_limit < INFINITY)
        grad_activated = v_keep_if_at_most(grad_activated, activated, act_limit);
    vfloat grad_gate = v_mul(grad_activated, act.slope);
    if (gating->gate_limit < INFINITY)
        grad_gate = v_keep_if_at_most(grad_gate, gate_in, v_set(gating->gate_limit));
    vfloat grad_up = v_mul(grad, v_at_most(activated, act_limit));
    if (gating->up_limit < INFINITY) {
        grad_up = v_keep_if_at_most(grad_up, up_in, v_set(gating->up_limit));
        grad_up = v_keep_if_at_most(grad_up, v_set(-gating->up_limit), up_in);
    }
    return (Gradients){grad_gate, grad_up};
}

INLINE Gradients gradients(int dtype, int variant, vfloat grad, vfloat gate, vfloat up, const Gating *gating)
{
    if (variant == GENERAL)
        return gradients_general(dtype, grad, gate, up, gating);
    Activation act = activation(dtype, variant == SILU_TIMES_UP ? 1 : 2, v_set(1.0f), gate);
    vfloat activated = variant == SILU_TIMES_UP ? act.swish : v_mul(gate, act.swish);
    vfloat grad_activated = variant == SWIGLU_ALONE ? grad : v_mul(grad, up);
    return (Gradients){v_mul(grad_activated, act.slope), v_mul(grad, activated)};
}

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
INLINE void forward_block(int dtype, int variant, char *const *operands, int64_t offset, const Gating *gating)
{
    const int step = 2 * LANES * element_size(dtype);
    vpair gate[PAIRS], up[PAIRS];
    for (int i = 0; i < PAIRS; i++) {
        gate[i] = load(dtype, operands[0] + offset + i * step);
        up[i] = load_up(dtype, variant, operands[1], offset + i * step);
    }
    for (int i = 0; i < PAIRS; i++) {
        gate[i].a = product(dtype, variant, gate[i].a, up[i].a, gating);
        gate[i].b = product(dtype, variant, gate[i].b, up[i].b, gating);
    }
    for (int i = 0; i < PAIRS; i++)
        store(dtype, operands[2] + offset + i * step, gate[i]);
}

INLINE void backward_block(int dtype, int variant, char *const *operands, int64_t offset, const Gating *gating)
{
    const int step = 2 * LANES * element_size(dtype);
    vpair grad[PAIRS], gate[PAIRS], up[PAIRS];
    for (int i = 0; i < PAIRS; i++) {
        grad[i] = load(dtype, operands[0] + offset + i * step);
        gate[i] = load(dtype, operands[1] + offset + i * step);
        up[i] = load_up(dtype, variant, operands[2], offset + i * step);
    }
    for (int i = 0; i < PAIRS; i++) {
        Gradients a = gradients(dtype, variant, grad[i].a, gate[i].a, up[i].a, gating);
        Gradients b = gradients(dtype, variant, grad[i].b, gate[i].b, up[i].b, gating);
        gate[i] = (vpair){a.gate, b.gate};
        up[i] = (vpair){a.up, b.up};
    }
    for (int i = 0; i < PAIRS; i++) {
        store(dtype, operands[3] + offset + i * step, gate[i]);
        if (variant == SILU_TIMES_UP || variant == SWIGLU_TIMES_UP || (variant == GENERAL && operands[4] != NULL))
            store(dtype, operands[4] + offset + i * step, up[i]);
    }
}

INLINE void block(int direction, int dtype, int variant, char *const *operands, int64_t offset, const Gating *gating)
{
    if (direction == FORWARD)
        forward_block(dtype, variant, operands, offset, gating);
    else
        backward_block(dtype, variant, operands, offset, gating);
}

/* Whole blocks in place; the rest as one block in a buffer, so that nothing outside is read or written. */
INLINE void run(int direction, int dtype, int variant, char *const *operands, int64_t count, const Gating *gating)
{
    const int size = element_size(dtype);
    const int inputs = direction == FORWARD ? 2 : 3, all = direction == FORWARD ? 3 : 5;
    /* Copied, because the compiler must expect a store to change what `operands` points to. */
    char *const at[MAX_OPERANDS] = {operands[0], operands[1], operands[2], all == 5 ? operands[3] : NULL,
                                    all == 5 ? operands[4] : NULL};
    int64_t whole = count - count % BLOCK;
    for (int64_t i = 0; i < whole; i += BLOCK)
        block(direction, dtype, variant, at, i * size, gating);
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
    block(direction, dtype, variant, tail, 0, gating);
    for (int i = inputs; i < all; i++)
        if (tail[i] != NULL)
            memcpy(operands[i] + whole * size, tail[i], bytes);
}

#define DEFINE_RUN(direction, dtype, variant)                                                       \
    static void run_##direction##_##dtype##_##variant(char *const *o, int64_t n, const Gating *g) \
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

#define INSTRUCTION_SET(label) {label, {NAME_DTYPES(FORWARD), NAME_DTYPES(BACKWARD)}}

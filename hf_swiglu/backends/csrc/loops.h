/* The loops, written once in the vocabulary of a vector_*.h and compiled once for each instruction set.

   An including file defines NAME(x), which adds the instruction set's name, and includes its vector_*.h.
   Functions take `dtype` and `variant` as constants, so the branches on them are gone when they are compiled. */
#include <math.h>
#include <string.h>

#include "kernels.h"

enum { BLOCK = 2 * LANES, MAX_ELEMENT_SIZE = 4 };

/* e^-x for |x| <= ln(2) / 2, of least relative error (Remez): 7.5e-8 with six coefficients, where half an ulp of a
   float32 is 6.0e-8; 2.6e-6 with five, 1 % of half an ulp of a float16; 7.5e-5 with four, 4 % of a bfloat16's. */
INLINE vfloat exp_minus_fraction(int dtype, vfloat x)
{
    vfloat y;
    if (dtype == BFLOAT16) {
        y = v_mul_add(x, v_set(-0.1656684235f), v_set(0.5049632642f));
        y = v_mul_add(x, y, v_set(-1.000164186f));
        return v_mul_add(x, y, v_set(0.9999280735f));
    }
    if (dtype == FLOAT16) {
        y = v_mul_add(x, v_set(4.145860865e-2f), v_set(-1.679090721e-1f));
        y = v_mul_add(x, y, v_set(5.000435866e-1f));
        y = v_mul_add(x, y, v_set(-0.9999634049f));
        return v_mul_add(x, y, v_set(0.9999992614f));
    }
    y = v_mul_add(x, v_set(-8.297655198e-3f), v_set(4.191538198e-2f));
    y = v_mul_add(x, y, v_set(-1.666757473e-1f));
    y = v_mul_add(x, y, v_set(4.999889485e-1f));
    y = v_mul_add(x, y, v_set(-0.999999692f));
    return v_mul_add(x, y, v_set(1.000000072f));
}

/* 1 / (1 + e^-x), for any x but NaN, which a product with x brings back. */
INLINE vfloat sigmoid(int dtype, vfloat x)
{
    /* A sum with `shift` leaves the nearest integer plus 127, which is a float's exponent, in its lowest bits. */
    const vfloat shift = v_set(12582912.0f + 127.0f), largest_exponent = v_set(12582912.0f + 254.0f);

    /* e^-x = 2^n e^-fraction, with fraction = x + n ln(2). Above 40 the sigmoid is 1 to the last bit. */
    vfloat inside = v_at_most(x, v_set(40.0f));
    /* Below -88.4, e^-x overflows and the sigmoid is exactly 0: that makes swish(-inf) the NaN it is in PyTorch.
       -88.8 has n = 128, which is the exponent of infinity. */
    if (dtype == BFLOAT16)
        inside = v_at_least(inside, v_set(-88.8f));
    vfloat shifted = v_mul_add(inside, v_set(-1.44269504f), shift);
    vfloat n = v_sub(shifted, shift), fraction;
    if (dtype == FLOAT32) {
        /* ln(2) in two parts, the first of 15 bits, so that its product with n is exact on every processor. */
        fraction = v_mul_add(n, v_set(0.693145751953125f), inside);
        fraction = v_mul_add(n, v_set(1.42860682e-6f), fraction);
    } else {
        fraction = v_mul_add(n, v_set(0.693147181f), inside);
    }
    vfloat one_plus_exp = v_mul_add(exp_minus_fraction(dtype, fraction), v_power_of_two(shifted), v_set(1.0f));
    if (dtype == BFLOAT16)
        return v_reciprocal_12_bits(one_plus_exp);
    vfloat result = dtype == FLOAT32 ? v_reciprocal(one_plus_exp) : v_reciprocal_22_bits(one_plus_exp);
    /* Newton's step has no use for an infinity. */
    return v_keep_if_at_most(result, shifted, largest_exponent);
}

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
INLINE vfloat slope(int power, vfloat alpha, vfloat gate, vfloat s, vfloat swish)
{
    vfloat rest = v_mul(swish, v_mul(alpha, v_sub(v_set(1.0f), s)));
    return power == 1 ? v_add(s, rest) : v_mul(gate, v_add(v_add(s, s), rest));
}

/* Clamps as in PyTorch: the gradient passes inside and on the limit, and is 0 outside and where x is NaN. */
INLINE Gradients gradients_general(int dtype, vfloat grad, vfloat gate_in, vfloat up_in, const Gating *gating)
{
    vfloat gate = v_at_most(gate_in, v_set(gating->gate_limit));
    vfloat up = v_at_least(v_at_most(up_in, v_set(gating->up_limit)), v_set(-gating->up_limit));
    vfloat alpha = v_set(gating->alpha);
    vfloat s = sigmoid(dtype, v_mul(gate, alpha));
    vfloat swish = v_mul(gate, s);
    vfloat activated = gating->power == 2 ? v_mul(gate, swish) : swish;
    vfloat act_limit = v_set(gating->act_limit);

    vfloat grad_activated = v_mul(grad, v_add(up, v_set(gating->up_offset)));
    if (gating->act_limit < INFINITY)
        grad_activated = v_keep_if_at_most(grad_activated, activated, act_limit);
    vfloat grad_gate = v_mul(grad_activated, slope(gating->power, alpha, gate, s, swish));
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
    vfloat s = sigmoid(dtype, gate);
    vfloat swish = v_mul(gate, s);
    vfloat activated = variant == SILU_TIMES_UP ? swish : v_mul(gate, swish);
    vfloat derivative = slope(variant == SILU_TIMES_UP ? 1 : 2, v_set(1.0f), gate, s, swish);
    vfloat grad_activated = variant == SWIGLU_ALONE ? grad : v_mul(grad, up);
    return (Gradients){v_mul(grad_activated, derivative), v_mul(grad, activated)};
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

INLINE void forward_block(int dtype, int variant, char *const *operands, int64_t offset, const Gating *gating)
{
    vpair gate = load(dtype, operands[0] + offset);
    vpair up = load_up(dtype, variant, operands[1], offset);
    vpair out = {product(dtype, variant, gate.a, up.a, gating), product(dtype, variant, gate.b, up.b, gating)};
    store(dtype, operands[2] + offset, out);
}

INLINE void backward_block(int dtype, int variant, char *const *operands, int64_t offset, const Gating *gating)
{
    vpair grad = load(dtype, operands[0] + offset);
    vpair gate = load(dtype, operands[1] + offset);
    vpair up = load_up(dtype, variant, operands[2], offset);
    Gradients a = gradients(dtype, variant, grad.a, gate.a, up.a, gating);
    Gradients b = gradients(dtype, variant, grad.b, gate.b, up.b, gating);
    store(dtype, operands[3] + offset, (vpair){a.gate, b.gate});
    if (variant == SWIGLU_ALONE || (variant == GENERAL && operands[4] == NULL))
        return;
    store(dtype, operands[4] + offset, (vpair){a.up, b.up});
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
    const int size = dtype == FLOAT32 ? 4 : 2;
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

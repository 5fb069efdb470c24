/* The loops, written once in the vocabulary of a vector_*.h and compiled once for each instruction set.

   An including file defines NAME(x), which adds the instruction set's name, and includes its vector_*.h.
   Functions take `dtype` and `variant` as constants, so the branches on them are gone when they are compiled. */
#include <math.h>
#include <string.h>

#include "kernels.h"

enum { BLOCK = PAIRS * 2 * LANES, MAX_ELEMENT_SIZE = 4 };

/* To the dtype, to nearest and ties to even, and back: PyTorch rounds after each operation. */
INLINE vfloat rounded(int dtype, vfloat x)
{
    if (dtype == FLOAT32)
        return x;
    return dtype == BFLOAT16 ? cut_bfloat16(round_bfloat16(x)) : round_to_float16(x);
}

/* The last rounding of a result. What is stored loses its lower half anyway, and a float16 is rounded on the way. */
INLINE vfloat rounded_to_store(int dtype, vfloat x) { return dtype == BFLOAT16 ? round_bfloat16(x) : x; }

/* e^-x: 2^n times what the polynomial makes of the rest, with n the integer nearest to -x / ln(2). */
INLINE vfloat exp_minus(int dtype, vfloat x)
{
    /* At -88.8 it is an infinity; at 110 it is 0, and so it is at 87 where 2^-127 counts as 0. */
    if (dtype != BFLOAT16 || SCALE_IS_LIMITED)
        x = v_at_least(v_at_most(x, v_set(SCALE_IS_LIMITED ? 87.0f : 110.0f)), v_set(-88.8f));
    vfloat exponent = v_mul(x, v_set(-1.44269504f)), n = v_round(exponent), y;

    /* Polynomials of least relative error (Remez). */
    if (dtype == BFLOAT16) {
        /* 2^rest, |rest| <= 1/2, to 2e-7. With fewer terms the bits of some bfloat16 gates differ from PyTorch's. */
        vfloat rest = v_sub(exponent, n);
        y = v_mul_add(rest, v_set(0.001326471355f), v_set(0.009671523272f));
        y = v_mul_add(rest, y, v_set(0.05550733872f));
        y = v_mul_add(rest, y, v_set(0.2402224192f));
        y = v_mul_add(rest, y, v_set(0.6931469775f));
        return v_scale(v_mul_add(rest, y, v_set(1.0f)), n);
    }
    /* e^-rest, |rest| <= ln(2) / 2. ln(2) in two parts, the first of 15 bits, so that its product with n is exact on
       every processor. */
    vfloat rest = v_mul_add(n, v_set(0.693145751953125f), x);
    rest = v_mul_add(n, v_set(1.42860682e-6f), rest);
    if (dtype == FLOAT32) {
        /* To 7.5e-8, where half an ulp is 6.0e-8. */
        y = v_mul_add(rest, v_set(-8.297655198e-3f), v_set(4.191538198e-2f));
        y = v_mul_add(rest, y, v_set(-1.666757473e-1f));
        y = v_mul_add(rest, y, v_set(4.999889485e-1f));
        y = v_mul_add(rest, y, v_set(-0.999999692f));
        return v_scale(v_mul_add(rest, y, v_set(1.000000072f)), n);
    }
    /* To 3e-9, and exact to first order at 0: float16 gates near 0 need that. */
    y = v_mul_add(rest, v_set(1.381454003e-3f), v_set(-8.368745113e-3f));
    y = v_mul_add(rest, y, v_set(4.166839079e-2f));
    y = v_mul_add(rest, y, v_set(-1.66665204e-1f));
    y = v_mul_add(rest, y, v_set(4.999999343e-1f));
    y = v_mul_add(rest, y, v_set(-1.0f));
    return v_scale(v_mul_add(rest, y, v_set(1.0f)), n);
}

/* x * sigmoid(x) where e is e^-x. Exactly 0 times x where e is infinite: that makes swish(-inf) the NaN it is in PyTorch.
   16-bit results need the quotient itself: a product with the reciprocal is one unit off for 2 gates in float16. */
INLINE vfloat swish_of_exp(int dtype, vfloat x, vfloat e)
{
    vfloat denominator = v_add(e, v_set(1.0f));
    if (dtype == FLOAT32)
        return v_mul(x, v_reciprocal(denominator));
    return rounded(dtype, dtype == BFLOAT16 ? v_mul(x, v_reciprocal(denominator)) : v_div(x, denominator));
}

INLINE vfloat sigmoid_of_exp(int dtype, vfloat e)
{
    vfloat denominator = v_add(e, v_set(1.0f));
    return dtype == FLOAT16 ? v_div(v_set(1.0f), denominator) : v_reciprocal(denominator);
}

INLINE vfloat sigmoid(int dtype, vfloat x) { return sigmoid_of_exp(dtype, exp_minus(dtype, x)); }

/* The gate's activation in a member with limits, before act_limit: PyTorch has one operator for swish, and three for
   g * sigmoid(alpha * g). */
INLINE vfloat general_swish(int dtype, vfloat gate, const Gating *gating)
{
    if (gating->alpha == 1.0f)
        return swish_of_exp(dtype, gate, exp_minus(dtype, gate));
    vfloat scaled = rounded(dtype, v_mul(gate, v_set(gating->alpha)));
    return rounded(dtype, v_mul(gate, rounded(dtype, sigmoid(dtype, scaled))));
}

INLINE vfloat clamped_up(int dtype, vfloat up, const Gating *gating)
{
    up = v_at_least(v_at_most(up, v_set(gating->up_limit)), v_set(-gating->up_limit));
    /* A sum with 0 would make +0 of -0. */
    return gating->up_offset == 0.0f ? up : rounded(dtype, v_add(up, v_set(gating->up_offset)));
}

INLINE vfloat product(int dtype, int variant, vfloat gate, vfloat up, const Gating *gating)
{
    if (variant != GENERAL) {
        vfloat activated = swish_of_exp(dtype, gate, exp_minus(dtype, gate));
        if (variant != SILU_TIMES_UP)
            activated = rounded(dtype, v_mul(gate, activated));
        return variant == SWIGLU_ALONE ? activated : rounded_to_store(dtype, v_mul(activated, up));
    }
    gate = v_at_most(gate, v_set(gating->gate_limit));
    vfloat activated = general_swish(dtype, gate, gating);
    if (gating->power == 2)
        activated = rounded(dtype, v_mul(gate, activated));
    activated = v_at_most(activated, v_set(gating->act_limit));
    return rounded_to_store(dtype, v_mul(activated, clamped_up(dtype, up, gating)));
}

typedef struct { vfloat gate, up; } Gradients;

/* swish, and the gradient of swish given that of its result. With s = sigmoid(alpha * g) that is
   grad * (s + alpha * g * s * (1 - s)). */
typedef struct { vfloat swish, sigmoid, complement; } Activation;

INLINE Activation activation(int dtype, vfloat alpha, vfloat gate)
{
    vfloat e = exp_minus(dtype, v_mul(gate, alpha)), s = v_reciprocal(v_add(e, v_set(1.0f)));
    vfloat swish = dtype == FLOAT32 ? v_mul(gate, s) : swish_of_exp(dtype, gate, e);
    return (Activation){swish, s, v_sub(v_set(1.0f), s)};
}

INLINE vfloat swish_gradient(int dtype, vfloat grad, vfloat alpha, vfloat gate, Activation act)
{
    if (dtype == FLOAT32)
        return v_mul(grad, v_add(act.sigmoid, v_mul(act.swish, v_mul(alpha, act.complement))));
    /* In the order of PyTorch's silu_backward. */
    vfloat slope = v_add(v_set(1.0f), v_mul(gate, act.complement));
    return rounded(dtype, v_mul(v_mul(grad, act.sigmoid), slope));
}

/* The gradient of g * swish(g) in the order of PyTorch's operators. */
INLINE vfloat swiglu_gradient(int dtype, vfloat grad, vfloat alpha, vfloat gate, Activation act)
{
    if (dtype == FLOAT32) {
        vfloat rest = v_mul(act.swish, v_mul(alpha, act.complement));
        return v_mul(grad, v_mul(gate, v_add(v_add(act.sigmoid, act.sigmoid), rest)));
    }
    vfloat through_swish = swish_gradient(dtype, rounded(dtype, v_mul(grad, gate)), alpha, gate, act);
    return rounded(dtype, v_add(rounded(dtype, v_mul(grad, act.swish)), through_swish));
}

/* The gradient of g * sigmoid(alpha * g) in 16 bits, added to what else gate gets, in the order of PyTorch's operators.
   Its sigmoid_backward computes in float32 for bfloat16, and in float16 for float16. */
INLINE vfloat written_gradient(int dtype, vfloat sum, vfloat grad, vfloat gate, vfloat s, const Gating *gating)
{
    const int steps = dtype == FLOAT16 ? FLOAT16 : FLOAT32;
    vfloat inner = rounded(steps, v_mul(rounded(dtype, v_mul(grad, gate)), rounded(steps, v_sub(v_set(1.0f), s))));
    inner = rounded(dtype, v_mul(inner, s));
    inner = rounded(dtype, v_mul(inner, v_set(gating->alpha)));
    sum = rounded(dtype, v_add(sum, rounded(dtype, v_mul(grad, s))));
    return rounded(dtype, v_add(sum, inner));
}

/* Clamps as in PyTorch: outside the limit, and where x is NaN, the gradient is 0. */
INLINE Gradients gradients_general(int dtype, vfloat grad, vfloat gate_in, vfloat up_in, const Gating *gating)
{
    vfloat gate = v_at_most(gate_in, v_set(gating->gate_limit)), up = clamped_up(dtype, up_in, gating);
    vfloat alpha = v_set(gating->alpha), act_limit = v_set(gating->act_limit), s = alpha;
    Activation act;
    const int is_written = dtype != FLOAT32 && gating->alpha != 1.0f;
    if (is_written) {
        s = rounded(dtype, sigmoid(dtype, rounded(dtype, v_mul(gate, alpha))));
        act.swish = rounded(dtype, v_mul(gate, s));
    } else {
        act = activation(dtype, alpha, gate);
    }
    vfloat activated = gating->power == 2 ? rounded(dtype, v_mul(gate, act.swish)) : act.swish;

    vfloat grad_activated = rounded(dtype, v_mul(grad, up));
    if (gating->act_limit < INFINITY)
        grad_activated = v_keep_if_at_most(grad_activated, activated, v_set(gating->act_passes));
    vfloat grad_gate;
    if (is_written && gating->power == 2) {
        grad_gate = rounded(dtype, v_mul(grad_activated, act.swish));
        grad_gate = written_gradient(dtype, grad_gate, rounded(dtype, v_mul(grad_activated, gate)), gate, s, gating);
    } else if (is_written) {
        grad_gate = written_gradient(dtype, v_set(-0.0f), grad_activated, gate, s, gating);
    } else if (gating->power == 2) {
        grad_gate = swiglu_gradient(dtype, grad_activated, alpha, gate, act);
    } else {
        grad_gate = swish_gradient(dtype, grad_activated, alpha, gate, act);
    }
    if (gating->gate_limit < INFINITY)
        grad_gate = v_keep_if_at_most(grad_gate, gate_in, v_set(gating->gate_passes));
    vfloat grad_up = rounded(dtype, v_mul(grad, v_at_most(activated, act_limit)));
    if (gating->up_limit < INFINITY) {
        grad_up = v_keep_if_at_most(grad_up, up_in, v_set(gating->up_passes));
        grad_up = v_keep_if_at_most(grad_up, v_set(-gating->up_passes), up_in);
    }
    return (Gradients){grad_gate, grad_up};
}

INLINE Gradients gradients(int dtype, int variant, vfloat grad, vfloat gate, vfloat up, const Gating *gating)
{
    if (variant == GENERAL)
        return gradients_general(dtype, grad, gate, up, gating);
    const vfloat alpha = v_set(1.0f);
    Activation act = activation(dtype, alpha, gate);
    vfloat grad_activated = variant == SWIGLU_ALONE ? grad : rounded(dtype, v_mul(grad, up));
    if (variant == SILU_TIMES_UP) {
        vfloat grad_up = rounded_to_store(dtype, v_mul(grad, act.swish));
        return (Gradients){swish_gradient(dtype, grad_activated, alpha, gate, act), grad_up};
    }
    vfloat activated = rounded(dtype, v_mul(gate, act.swish));
    vfloat grad_gate = swiglu_gradient(dtype, grad_activated, alpha, gate, act);
    return (Gradients){grad_gate, rounded_to_store(dtype, v_mul(grad, activated))};
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

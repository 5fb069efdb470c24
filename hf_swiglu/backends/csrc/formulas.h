/* The formulas of the kernels on vectors of float32, rounded to the dtype after each step, in the operations of a
   vector_*.h. */
#include "exp.h"

/* x rounded to the dtype, to nearest and ties to even, as a float32: PyTorch rounds after each operator. */
INLINE vfloat rounded(int dtype, vfloat x)
{
    if (dtype == FLOAT32)
        return x;
    return dtype == BFLOAT16 ? cut_bfloat16(round_bfloat16(x)) : round_to_float16(x);
}

/* The last rounding of a result: storing drops the lower half of a bfloat16, and rounds a float16. */
INLINE vfloat rounded_to_store(int dtype, vfloat x) { return dtype == BFLOAT16 ? round_bfloat16(x) : x; }

/* x * sigmoid(x), rounded, where e is e^-x. An infinite e gives exactly 0 times x, so that swish(-inf) is NaN as in
   PyTorch. In 16 bits the division is no slower than reciprocal and product: it leaves the ports of other instructions
   free. In float16 it is needed: the product with a reciprocal is one step off for 2 gates. */
INLINE vfloat swish_of_exp(int dtype, vfloat x, vfloat e)
{
    vfloat denominator = v_add(e, v_set(1.0f));
    return dtype == FLOAT32 ? v_mul(x, v_reciprocal(denominator)) : rounded(dtype, v_div(x, denominator));
}

INLINE vfloat sigmoid_of_exp(int dtype, vfloat e)
{
    vfloat denominator = v_add(e, v_set(1.0f));
    return dtype == FLOAT32 ? v_reciprocal(denominator) : v_div(v_set(1.0f), denominator);
}

INLINE vfloat sigmoid(int dtype, vfloat x) { return sigmoid_of_exp(dtype, exp_minus(dtype, x)); }

/* The activation of a member with limits, before act_limit: one operator of PyTorch for swish, three for
   g * sigmoid(alpha * g). */
INLINE vfloat general_swish(int dtype, vfloat gate, const Params *params)
{
    if (params->alpha == 1.0f)
        return swish_of_exp(dtype, gate, exp_minus(dtype, gate));
    vfloat scaled = rounded(dtype, v_mul(gate, v_set(params->alpha)));
    return rounded(dtype, v_mul(gate, rounded(dtype, sigmoid(dtype, scaled))));
}

INLINE vfloat clamped_up(int dtype, vfloat up, const Params *params)
{
    up = v_at_least(v_at_most(up, v_set(params->up_limit)), v_set(-params->up_limit));
    /* A sum with 0 would make +0 of -0. */
    return params->up_offset == 0.0f ? up : rounded(dtype, v_add(up, v_set(params->up_offset)));
}

INLINE vfloat product(int dtype, int variant, vfloat gate, vfloat up, const Params *params)
{
    if (variant != GENERAL) {
        vfloat activated = swish_of_exp(dtype, gate, exp_minus(dtype, gate));
        if (variant != SILU_TIMES_UP)
            activated = rounded(dtype, v_mul(gate, activated));
        return variant == SWIGLU_ALONE ? activated : rounded_to_store(dtype, v_mul(activated, up));
    }
    gate = v_at_most(gate, v_set(params->gate_limit));
    vfloat activated = general_swish(dtype, gate, params);
    if (params->power == 2)
        activated = rounded(dtype, v_mul(gate, activated));
    activated = v_at_most(activated, v_set(params->act_limit));
    return rounded_to_store(dtype, v_mul(activated, clamped_up(dtype, up, params)));
}

typedef struct { vfloat gate, up; } Gradients;

/* With s = sigmoid(alpha * g): swish is g * s, rounded, and complement is 1 - s. */
typedef struct { vfloat swish, sigmoid, complement; } Activation;

INLINE Activation activation(int dtype, vfloat alpha, vfloat gate)
{
    vfloat e = exp_minus(dtype, v_mul(gate, alpha)), s = v_reciprocal(v_add(e, v_set(1.0f)));
    vfloat swish = dtype == FLOAT16 ? swish_of_exp(dtype, gate, e) : rounded(dtype, v_mul(gate, s));
    return (Activation){swish, s, v_sub(v_set(1.0f), s)};
}

/* The gradient of swish given that of its result, grad * (s + alpha * g * s * (1 - s)), not rounded. */
INLINE vfloat swish_gradient(int dtype, vfloat grad, vfloat alpha, vfloat gate, Activation act)
{
    if (dtype == FLOAT32)
        return v_mul(grad, v_add(act.sigmoid, v_mul(act.swish, v_mul(alpha, act.complement))));
    /* In the order of PyTorch's silu_backward. */
    vfloat slope = v_add(v_set(1.0f), v_mul(gate, act.complement));
    return v_mul(v_mul(grad, act.sigmoid), slope);
}

/* The gradient of g * swish(g), not rounded, in the order of PyTorch's operators. */
INLINE vfloat swiglu_gradient(int dtype, vfloat grad, vfloat alpha, vfloat gate, Activation act)
{
    if (dtype == FLOAT32) {
        vfloat rest = v_mul(act.swish, v_mul(alpha, act.complement));
        /* In this order a gradient of 0 stays 0 where 2 * gate is infinite. */
        return v_mul(v_mul(grad, gate), v_add(v_add(act.sigmoid, act.sigmoid), rest));
    }
    vfloat through_swish = swish_gradient(dtype, rounded(dtype, v_mul(grad, gate)), alpha, gate, act);
    return v_add(rounded(dtype, v_mul(grad, act.swish)), rounded(dtype, through_swish));
}

/* The gradient of g * sigmoid(alpha * g) in 16 bits, added to `sum`, in the order of PyTorch's operators. Its
   sigmoid_backward computes in float32 for bfloat16, and in float16 for float16. */
INLINE vfloat written_gradient(int dtype, vfloat sum, vfloat grad, vfloat gate, vfloat s, const Params *params)
{
    const int inner_dtype = dtype == FLOAT16 ? FLOAT16 : FLOAT32;
    vfloat complement = rounded(inner_dtype, v_sub(v_set(1.0f), s));
    vfloat inner = rounded(inner_dtype, v_mul(rounded(dtype, v_mul(grad, gate)), complement));
    inner = rounded(dtype, v_mul(inner, s));
    inner = rounded(dtype, v_mul(inner, v_set(params->alpha)));
    sum = rounded(dtype, v_add(sum, rounded(dtype, v_mul(grad, s))));
    return rounded(dtype, v_add(sum, inner));
}

/* Clamps as in PyTorch: outside the limit, and where x is NaN, the gradient is 0. */
INLINE Gradients gradients_general(int dtype, vfloat grad, vfloat gate_in, vfloat up_in, const Params *params)
{
    vfloat gate = v_at_most(gate_in, v_set(params->gate_limit)), up = clamped_up(dtype, up_in, params);
    vfloat alpha = v_set(params->alpha), act_limit = v_set(params->act_limit), s = alpha;
    Activation act;
    const int is_written = dtype != FLOAT32 && params->alpha != 1.0f;
    if (is_written) {
        s = rounded(dtype, sigmoid(dtype, rounded(dtype, v_mul(gate, alpha))));
        act.swish = rounded(dtype, v_mul(gate, s));
    } else {
        act = activation(dtype, alpha, gate);
    }
    vfloat activated = params->power == 2 ? rounded(dtype, v_mul(gate, act.swish)) : act.swish;

    vfloat grad_activated = rounded(dtype, v_mul(grad, up));
    if (params->act_limit < INFINITY)
        grad_activated = v_keep_if_at_most(grad_activated, activated, v_set(params->act_passes));
    vfloat grad_gate;
    if (is_written && params->power == 2) {
        grad_gate = rounded(dtype, v_mul(grad_activated, act.swish));
        grad_gate = written_gradient(dtype, grad_gate, rounded(dtype, v_mul(grad_activated, gate)), gate, s, params);
    } else if (is_written) {
        grad_gate = written_gradient(dtype, v_set(-0.0f), grad_activated, gate, s, params);
    } else if (params->power == 2) {
        grad_gate = rounded_to_store(dtype, swiglu_gradient(dtype, grad_activated, alpha, gate, act));
    } else {
        grad_gate = rounded_to_store(dtype, swish_gradient(dtype, grad_activated, alpha, gate, act));
    }
    if (params->gate_limit < INFINITY)
        grad_gate = v_keep_if_at_most(grad_gate, gate_in, v_set(params->gate_passes));
    vfloat grad_up = rounded_to_store(dtype, v_mul(grad, v_at_most(activated, act_limit)));
    if (params->up_limit < INFINITY) {
        grad_up = v_keep_if_at_most(grad_up, up_in, v_set(params->up_passes));
        grad_up = v_keep_if_at_most(grad_up, v_set(-params->up_passes), up_in);
    }
    return (Gradients){grad_gate, grad_up};
}

INLINE Gradients gradients(int dtype, int variant, vfloat grad, vfloat gate, vfloat up, const Params *params)
{
    if (variant == GENERAL)
        return gradients_general(dtype, grad, gate, up, params);
    const vfloat alpha = v_set(1.0f);
    Activation act = activation(dtype, alpha, gate);
    vfloat grad_activated = variant == SWIGLU_ALONE ? grad : rounded(dtype, v_mul(grad, up));
    vfloat grad_gate, activated = act.swish;
    if (variant == SILU_TIMES_UP) {
        grad_gate = swish_gradient(dtype, grad_activated, alpha, gate, act);
    } else {
        grad_gate = swiglu_gradient(dtype, grad_activated, alpha, gate, act);
        activated = rounded(dtype, v_mul(gate, act.swish));
    }
    return (Gradients){rounded_to_store(dtype, grad_gate), rounded_to_store(dtype, v_mul(grad, activated))};
}

/* float16 kernels with AVX512-FP16: swish and its gradient in float32, converted, and products in float16 itself. Such a
   product rounds as one in float32 and a conversion do. */

/* 32 float16 numbers, and what belongs to them as two vectors of float32. */
typedef __m512h vhalf;

INLINE vhalf load_half(const char *p) { return _mm512_loadu_ph(p); }

INLINE vpair widened(vhalf x)
{
    __m512i bits = _mm512_castph_si512(x);
    return (vpair){_mm512_cvtph_ps(_mm512_castsi512_si256(bits)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1))};
}

INLINE vhalf narrowed(vfloat a, vfloat b)
{
    __m256i low = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256i high = _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_castsi512_ph(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}

/* The rounding mode is named so that the compiler does not fuse a product with a sum. */
INLINE vhalf h_mul(vhalf x, vhalf y) { return _mm512_mul_round_ph(x, y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

INLINE vfloat swish_to_round(vfloat x) { return v_div(x, v_add(exp_minus_float16(x), v_set(1.0f))); }

INLINE void float16_forward(int variant, const char *gate_at, const char *up_at, char *out_at)
{
    vhalf gate = load_half(gate_at);
    vpair x = widened(gate);
    vhalf product = narrowed(swish_to_round(x.a), swish_to_round(x.b));
    if (variant != SILU_TIMES_UP)
        product = h_mul(gate, product);
    if (variant != SWIGLU_ALONE)
        product = h_mul(product, load_half(up_at));
    _mm512_storeu_ph(out_at, product);
}

/* What the gradient of swish needs, in the terms of `swish_gradient`. */
typedef struct { vfloat swish_to_round, sigmoid, slope; } HalfActivation;

INLINE HalfActivation half_activation(vfloat x)
{
    const vfloat one = v_set(1.0f);
    vfloat denominator = v_add(exp_minus_float16(x), one), s = v_reciprocal(denominator);
    return (HalfActivation){v_div(x, denominator), s, v_add(one, v_mul(x, v_sub(one, s)))};
}

INLINE void float16_backward(int variant, const char *grad_at, const char *gate_at, const char *up_at,
                             char *grad_gate_at, char *grad_up_at)
{
    vhalf grad = load_half(grad_at), gate = load_half(gate_at), grad_activated = grad;
    vpair x = widened(gate);
    HalfActivation a = half_activation(x.a), b = half_activation(x.b);
    vhalf swish = narrowed(a.swish_to_round, b.swish_to_round), activated = swish, grad_swish;
    if (variant != SWIGLU_ALONE)
        grad_activated = h_mul(grad, load_half(up_at));
    grad_swish = variant == SILU_TIMES_UP ? grad_activated : h_mul(grad_activated, gate);
    vpair y = widened(grad_swish);
    vhalf grad_gate = narrowed(v_mul(v_mul(y.a, a.sigmoid), a.slope), v_mul(v_mul(y.b, b.sigmoid), b.slope));
    if (variant != SILU_TIMES_UP) {
        grad_gate = _mm512_add_ph(h_mul(grad_activated, swish), grad_gate);
        activated = h_mul(gate, swish);
    }
    _mm512_storeu_ph(grad_gate_at, grad_gate);
    if (variant != SWIGLU_ALONE)
        _mm512_storeu_ph(grad_up_at, h_mul(grad, activated));
}

/* As forward_block and backward_block, for the variants without limits. A vector is loaded before any of it is stored. */
INLINE void float16_block(int direction, int variant, char *const *operands, int64_t offset)
{
    for (int64_t at = offset; at < offset + BLOCK * 2; at += 64) {
        const char *up = variant == SWIGLU_ALONE ? NULL : operands[direction == FORWARD ? 1 : 2] + at;
        if (direction == FORWARD)
            float16_forward(variant, operands[0] + at, up, operands[2] + at);
        else
            float16_backward(variant, operands[0] + at, operands[1] + at, up, operands[3] + at,
                             variant == SWIGLU_ALONE ? NULL : operands[4] + at);
    }
}

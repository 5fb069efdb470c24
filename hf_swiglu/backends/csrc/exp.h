/* e^-x on vectors of float32: 2^n times a polynomial of least relative error (Remez) in the rest. */
#include <math.h>

#include "kernels.h"

/* Limits x where v_scale needs that: e^-x is infinite at -88.8, and 0 at 87, where v_scale takes 2^-127 for 0. */
INLINE vfloat limited(vfloat x) { return v_at_least(v_at_most(x, v_set(87.0f)), v_set(-88.8f)); }

/* To 7.5e-8, where half a unit in the last place is 6.0e-8. */
INLINE vfloat exp_minus_float32(vfloat x)
{
    x = v_at_least(v_at_most(x, v_set(SCALE_IS_LIMITED ? 87.0f : 110.0f)), v_set(-88.8f));
    /* ln(2) in two parts, the first of 15 bits, so that its product with n is exact on every processor. */
    vfloat n = v_round(v_mul(x, v_set(-1.44269504f))), y;
    vfloat rest = v_mul_add(n, v_set(0.693145751953125f), x);
    rest = v_mul_add(n, v_set(1.42860682e-6f), rest);
    y = v_mul_add(rest, v_set(-8.297655198e-3f), v_set(4.191538198e-2f));
    y = v_mul_add(rest, y, v_set(-1.666757473e-1f));
    y = v_mul_add(rest, y, v_set(4.999889485e-1f));
    y = v_mul_add(rest, y, v_set(-0.999999692f));
    return v_scale(v_mul_add(rest, y, v_set(1.000000072f)), n);
}

/* To 3e-9, and exact to first order at 0, which float16 gates near 0 need. */
INLINE vfloat exp_minus_float16(vfloat x)
{
    if (SCALE_IS_LIMITED)
        x = limited(x);
    vfloat n = v_round(v_mul(x, v_set(-1.44269504f))), rest, y;
    if (SCALE_IS_LIMITED) {
        rest = v_mul_add(n, v_set(0.693145751953125f), x);
        rest = v_mul_add(n, v_set(1.42860682e-6f), rest);
    } else {
        /* A fused product needs one part: n is at most 25 where the result is not 0 in float16, and the error 5e-8. For an
           infinite x the rest is NaN, and v_scale returns 0 or infinity all the same. */
        rest = v_mul_add(n, v_set(0.693147182f), x);
    }
    y = v_mul_add(rest, v_set(1.381454003e-3f), v_set(-8.368745113e-3f));
    y = v_mul_add(rest, y, v_set(4.166839079e-2f));
    y = v_mul_add(rest, y, v_set(-1.66665204e-1f));
    y = v_mul_add(rest, y, v_set(4.999999343e-1f));
    y = v_mul_add(rest, y, v_set(-1.0f));
    return v_scale(v_mul_add(rest, y, v_set(1.0f)), n);
}

/* With fewer terms the bits of some bfloat16 gates differ from PyTorch's. */
INLINE vfloat exp_minus_bfloat16(vfloat x)
{
    vfloat rest, y;
#ifdef HAVE_FRACTION
    /* 2^rest, 0 <= rest < 1, to 1.4e-7, and exactly 2 at 1, where the smallest positive gates are: halves of subnormals
       are ties. A linear term of 0.6931513, which is the best in error, makes sigmoid(-0.01172) another bfloat16. */
    vfloat exponent = v_mul(x, v_set(-1.44269504f));
    rest = v_fraction(exponent);
    y = v_mul_add(rest, v_set(0.001842526719f), v_set(0.009079444222f));
    y = v_mul_add(rest, y, v_set(0.0557445772f));
    y = v_mul_add(rest, y, v_set(0.2401843518f));
    y = v_mul_add(rest, y, v_set(0.6931489706f));
    return v_scale(v_mul_add(rest, y, v_set(1.0f)), exponent);
#else
    /* 2^rest, |rest| <= 1/2, to 2e-7. */
    vfloat exponent = v_mul(limited(x), v_set(-1.44269504f)), n = v_round(exponent);
    rest = v_sub(exponent, n);
    y = v_mul_add(rest, v_set(0.001326471355f), v_set(0.009671523272f));
    y = v_mul_add(rest, y, v_set(0.05550733872f));
    y = v_mul_add(rest, y, v_set(0.2402224192f));
    y = v_mul_add(rest, y, v_set(0.6931469775f));
    return v_scale(v_mul_add(rest, y, v_set(1.0f)), n);
#endif
}

INLINE vfloat exp_minus(int dtype, vfloat x)
{
    if (dtype == FLOAT32)
        return exp_minus_float32(x);
    return dtype == BFLOAT16 ? exp_minus_bfloat16(x) : exp_minus_float16(x);
}

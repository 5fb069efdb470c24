/* e^-x on vectors of float32: 2^n times a polynomial of least relative error (Remez) in the rest. */
#include <math.h>

#include "kernels.h"

/* Where v_scale is limited: e^-x is infinite at -88.8, and 0 at 87, as 2^-127 counts as 0 there. */
INLINE vfloat limited(vfloat x) { return v_at_least(v_at_most(x, v_set(87.0f)), v_set(-88.8f)); }

/* x + n * ln(2), in two parts, the first of 15 bits, so that its product with n is exact on every processor. */
INLINE vfloat rest_of(vfloat x, vfloat n)
{
    vfloat rest = v_mul_add(n, v_set(0.693145751953125f), x);
    return v_mul_add(n, v_set(1.42860682e-6f), rest);
}

/* To 7.5e-8, where half a unit in the last place is 6.0e-8. */
INLINE vfloat exp_minus_float32(vfloat x)
{
    x = SCALE_IS_LIMITED ? limited(x) : v_at_least(v_at_most(x, v_set(110.0f)), v_set(-88.8f));
    vfloat n = v_round(v_mul(x, v_set(-1.44269504f))), rest = rest_of(x, n), y;
    y = v_mul_add(rest, v_set(-8.297655198e-3f), v_set(4.191538198e-2f));
    y = v_mul_add(rest, y, v_set(-1.666757473e-1f));
    y = v_mul_add(rest, y, v_set(4.999889485e-1f));
    y = v_mul_add(rest, y, v_set(-0.999999692f));
    return v_scale(v_mul_add(rest, y, v_set(1.000000072f)), n);
}

/* To 3e-9, and exact to first order at 0, which float16 gates near 0 need. The rest of an infinite x is NaN, of which an
   unlimited v_scale makes 0 or infinity. */
INLINE vfloat exp_minus_float16(vfloat x)
{
    if (SCALE_IS_LIMITED)
        x = limited(x);
    vfloat n = v_round(v_mul(x, v_set(-1.44269504f))), rest = rest_of(x, n), y;
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
    /* 2^rest, 0 <= rest < 1, to 1.6e-7, and exactly 2 at 1, where the smallest positive gates are: halves of subnormals
       are ties. A linear term of 0.6931513, which is the best in error, makes sigmoid(-0.01172) another bfloat16. */
    vfloat exponent = v_mul(x, v_set(-1.44269504f));
    rest = v_fraction(exponent);
    y = v_mul_add(rest, v_set(0.001842511352f), v_set(0.009079276584f));
    y = v_mul_add(rest, y, v_set(0.05574499071f));
    y = v_mul_add(rest, y, v_set(0.2401838601f));
    y = v_mul_add(rest, y, v_set(0.6931492686f));
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

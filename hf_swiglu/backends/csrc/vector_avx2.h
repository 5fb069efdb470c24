/* The vector operations of formulas.h in AVX2, FMA and F16C. */
#include <immintrin.h>
#include <stdint.h>

typedef __m256 vfloat;
typedef struct { vfloat a, b; } vpair;
enum { LANES = 8, PAIRS = 1 };

INLINE vfloat v_set(float x) { return _mm256_set1_ps(x); }
INLINE vfloat v_add(vfloat x, vfloat y) { return _mm256_add_ps(x, y); }
INLINE vfloat v_sub(vfloat x, vfloat y) { return _mm256_sub_ps(x, y); }
INLINE vfloat v_mul(vfloat x, vfloat y) { return _mm256_mul_ps(x, y); }
INLINE vfloat v_mul_add(vfloat x, vfloat y, vfloat z) { return _mm256_fmadd_ps(x, y, z); }

/* The instructions return their second operand where one is NaN, so a NaN in x stays. */
INLINE vfloat v_at_most(vfloat x, vfloat limit) { return _mm256_min_ps(limit, x); }
INLINE vfloat v_at_least(vfloat x, vfloat limit) { return _mm256_max_ps(limit, x); }

/* min(x, limit), and limit for NaN. */
INLINE vfloat v_min_not_nan(vfloat x, vfloat limit) { return _mm256_min_ps(x, limit); }

INLINE vfloat v_keep_if_at_most(vfloat value, vfloat x, vfloat limit)
{
    return _mm256_and_ps(value, _mm256_cmp_ps(x, limit, _CMP_LE_OQ));
}

INLINE vfloat v_round(vfloat x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/* x * 2^n as 2 x * 2^(n - 1), for n from -126, where 2^-127 counts as 0, to 128. The sum leaves n + 126, a float's
   exponent, in the lowest bits. */
enum { SCALE_IS_LIMITED = 1 };
INLINE vfloat v_scale(vfloat x, vfloat n)
{
    __m256i exponent = _mm256_castps_si256(_mm256_add_ps(n, v_set(12582912.0f + 126.0f)));
    x = _mm256_add_ps(x, x);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

INLINE vfloat v_reciprocal(vfloat x) { return _mm256_div_ps(v_set(1.0f), x); }

INLINE vfloat v_div(vfloat x, vfloat y) { return _mm256_div_ps(x, y); }

/* To nearest even, in the upper half: half a unit is added, less one where the last bit that stays is 0. No NaN here has
   low bits that could carry it away: it comes from a bfloat16, or from the processor. */
INLINE vfloat round_bfloat16(vfloat x)
{
    __m256i bits = _mm256_castps_si256(x), one = _mm256_set1_epi32(1);
    __m256i half = _mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff));
    half = _mm256_add_epi32(half, _mm256_and_si256(_mm256_srli_epi32(bits, 16), one));
    return _mm256_castsi256_ps(half);
}

INLINE vfloat cut_bfloat16(vfloat x) { return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32((int)0xffff0000u))); }

INLINE vfloat round_to_float16(vfloat x)
{
    return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

INLINE vpair load_float32(const float *p)
{
    return (vpair){_mm256_loadu_ps(p), _mm256_loadu_ps(p + LANES)};
}

INLINE void store_float32(float *p, vpair x)
{
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + LANES, x.b);
}

/* A bfloat16 is the upper half of a float32: `a` takes the even elements and `b` the odd ones, so that
   nothing has to cross lanes. */
INLINE vpair load_bfloat16(const uint16_t *p)
{
    __m256i both = _mm256_loadu_si256((const __m256i *)p);
    __m256i odd = _mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000u));
    return (vpair){_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)), _mm256_castsi256_ps(odd)};
}

/* The upper halves of values that are rounded already. */
INLINE void store_bfloat16(uint16_t *p, vpair x)
{
    __m256i even = _mm256_srli_epi32(_mm256_castps_si256(x.a), 16);
    _mm256_storeu_si256((__m256i *)p, _mm256_blend_epi16(even, _mm256_castps_si256(x.b), 0xaa));
}

INLINE vpair load_float16(const uint16_t *p)
{
    const __m128i *halves = (const __m128i *)p;
    return (vpair){_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}

INLINE void store_float16(uint16_t *p, vpair x)
{
    __m128i *halves = (__m128i *)p;
    _mm_storeu_si128(halves, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}

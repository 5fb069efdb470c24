/* The vector operations of formulas.h in AVX-512 (F, BW, DQ, VL), with VNNI where an including file defines HAVE_VNNI. */
#include <immintrin.h>
#include <stdint.h>

typedef __m512 vfloat;
typedef struct { vfloat a, b; } vpair;

/* Four vectors at a time: 32 registers hold them, and their chains of dependent instructions fill each other's gaps. */
enum { LANES = 16, PAIRS = 2 };

INLINE vfloat v_set(float x) { return _mm512_set1_ps(x); }
INLINE vfloat v_add(vfloat x, vfloat y) { return _mm512_add_ps(x, y); }
INLINE vfloat v_sub(vfloat x, vfloat y) { return _mm512_sub_ps(x, y); }
INLINE vfloat v_mul(vfloat x, vfloat y) { return _mm512_mul_ps(x, y); }
INLINE vfloat v_mul_add(vfloat x, vfloat y, vfloat z) { return _mm512_fmadd_ps(x, y, z); }

/* The instructions return their second operand where one is NaN, so a NaN in x stays. */
INLINE vfloat v_at_most(vfloat x, vfloat limit) { return _mm512_min_ps(limit, x); }
INLINE vfloat v_at_least(vfloat x, vfloat limit) { return _mm512_max_ps(limit, x); }

/* min(x, limit), and limit for NaN. */
INLINE vfloat v_min_not_nan(vfloat x, vfloat limit) { return _mm512_min_ps(x, limit); }

INLINE vfloat v_keep_if_at_most(vfloat value, vfloat x, vfloat limit)
{
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_LE_OQ), value);
}

/* To the nearest integer, for |x| < 2^22 and infinities: the sum has no bits left for a fraction. With a product before
   it, this is two instructions, where rounding as such takes the time of two more. */
INLINE vfloat v_round(vfloat x) { return v_sub(v_add(x, v_set(12582912.0f)), v_set(12582912.0f)); }

/* x less the largest integer up to x; 0 for infinities. */
#define HAVE_FRACTION
INLINE vfloat v_fraction(vfloat x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }

/* x * 2^n with n rounded down. For an infinite n it is 0 or infinity, even where x is NaN. */
enum { SCALE_IS_LIMITED = 0 };
INLINE vfloat v_scale(vfloat x, vfloat n) { return _mm512_scalef_ps(x, n); }

/* 14 bits and one Newton step make all 24, in less time than a division takes. For an infinity the step's correction
   is NaN, which the minimum replaces by what changes nothing. */
INLINE vfloat v_reciprocal(vfloat x)
{
    vfloat guess = _mm512_rcp14_ps(x), one = v_set(1.0f);
    vfloat correction = v_min_not_nan(_mm512_fnmadd_ps(x, guess, one), one);
    return _mm512_fmadd_ps(guess, correction, guess);
}

INLINE vfloat v_div(vfloat x, vfloat y) { return _mm512_div_ps(x, y); }

/* To nearest even, in the upper half: half a unit is added, less one where the last bit that stays is 0. No NaN here has
   low bits that could carry it away: it comes from a bfloat16, or from the processor. */
INLINE vfloat round_bfloat16(vfloat x)
{
    __m512i bits = _mm512_castps_si512(x), last = _mm512_set1_epi32(0x10000), below_half = _mm512_set1_epi32(0x7fff);
#ifdef HAVE_VNNI
    /* The dot product adds both halves of (last bit, 0x7fff) in one instruction. */
    __m512i halves = _mm512_ternarylogic_epi32(bits, last, below_half, 0xea);
    return _mm512_castsi512_ps(_mm512_dpwssd_epi32(bits, halves, _mm512_set1_epi32(0x00010001)));
#else
    __mmask16 is_odd = _mm512_test_epi32_mask(bits, last);
    return _mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_mask_mov_epi32(below_half, is_odd, _mm512_set1_epi32(0x8000))));
#endif
}

INLINE vfloat cut_bfloat16(vfloat x) { return _mm512_and_ps(x, _mm512_castsi512_ps(_mm512_set1_epi32((int)0xffff0000u))); }

INLINE vfloat round_to_float16(vfloat x)
{
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

INLINE vpair load_float32(const float *p)
{
    return (vpair){_mm512_loadu_ps(p), _mm512_loadu_ps(p + LANES)};
}

INLINE void store_float32(float *p, vpair x)
{
    _mm512_storeu_ps(p, x.a);
    _mm512_storeu_ps(p + LANES, x.b);
}

/* As in vector_avx2.h: `a` takes the even elements and `b` the odd ones. */
INLINE vpair load_bfloat16(const uint16_t *p)
{
    __m512i both = _mm512_loadu_si512(p);
    __m512i odd = _mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000u));
    return (vpair){_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), _mm512_castsi512_ps(odd)};
}

/* The upper halves of values that are rounded already. */
INLINE void store_bfloat16(uint16_t *p, vpair x)
{
    __m512i even = _mm512_srli_epi32(_mm512_castps_si512(x.a), 16);
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, even, _mm512_castps_si512(x.b)));
}

INLINE vpair load_float16(const uint16_t *p)
{
    const __m256i *halves = (const __m256i *)p;
    return (vpair){_mm512_cvtph_ps(_mm256_loadu_si256(halves)), _mm512_cvtph_ps(_mm256_loadu_si256(halves + 1))};
}

INLINE void store_float16(uint16_t *p, vpair x)
{
    __m256i *halves = (__m256i *)p;
    _mm256_storeu_si256(halves, _mm512_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm256_storeu_si256(halves + 1, _mm512_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}

/* The vocabulary of loops.h in AVX-512 (F, BW, DQ, VL). */
#include <immintrin.h>
#include <stdint.h>

typedef __m512 vfloat;
typedef struct { vfloat a, b; } vpair;
enum { LANES = 16 };

INLINE vfloat v_set(float x) { return _mm512_set1_ps(x); }
INLINE vfloat v_add(vfloat x, vfloat y) { return _mm512_add_ps(x, y); }
INLINE vfloat v_sub(vfloat x, vfloat y) { return _mm512_sub_ps(x, y); }
INLINE vfloat v_mul(vfloat x, vfloat y) { return _mm512_mul_ps(x, y); }
INLINE vfloat v_mul_add(vfloat x, vfloat y, vfloat z) { return _mm512_fmadd_ps(x, y, z); }

/* The instructions return their second operand where one is NaN, so a NaN in x stays. */
INLINE vfloat v_at_most(vfloat x, vfloat limit) { return _mm512_min_ps(limit, x); }
INLINE vfloat v_at_least(vfloat x, vfloat limit) { return _mm512_max_ps(limit, x); }

INLINE vfloat v_keep_if_at_most(vfloat value, vfloat x, vfloat limit)
{
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_LE_OQ), value);
}

/* 2^n, where the lowest bits of `shifted` hold n + 127. */
INLINE vfloat v_power_of_two(vfloat shifted)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(shifted), 23));
}

/* 14 bits and one Newton step make all 24: nothing is left for a division, nor for something in between. */
INLINE vfloat v_reciprocal(vfloat x)
{
    vfloat guess = _mm512_rcp14_ps(x);
    return _mm512_fmadd_ps(guess, _mm512_fnmadd_ps(x, guess, _mm512_set1_ps(1.0f)), guess);
}

INLINE vfloat v_reciprocal_22_bits(vfloat x) { return v_reciprocal(x); }
INLINE vfloat v_reciprocal_12_bits(vfloat x) { return _mm512_rcp14_ps(x); }

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

INLINE __m512i round_bfloat16(vfloat x)
{
    return _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
}

INLINE void store_bfloat16(uint16_t *p, vpair x)
{
    __m512i even = _mm512_srli_epi32(round_bfloat16(x.a), 16);
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, even, round_bfloat16(x.b)));
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

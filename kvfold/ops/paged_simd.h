/* Vectors of one instruction set: the only file that knows AVX-512, AVX2 or NEON from plain C.
 *
 * A vec holds LANES floats; +, * and & work on it by the compiler's vector extension. Pages are read in units of
 * 2 * LANES channels: pair_X(p, part) turns one unit of storage X into two vectors. Which channel lands in which lane is
 * the storage's own affair (bf16: even and odd; int4: low and high nibbles); paged_cpu.c has the map and permutes the
 * query and the output instead of every key. pair_fp8 gives the value / 256, so that fp16's exponent fits it.
 */
#ifndef KVFOLD_PAGED_SIMD_H
#define KVFOLD_PAGED_SIMD_H

#include "paged_numbers.h"

#if defined(KVFOLD_GENERIC)
/* below */
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define ISA "avx512"
#define LANES 16
#define REGISTERS 32
typedef __m512 vec;

INLINE vec splat(float x) { return _mm512_set1_ps(x); }
INLINE vec load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, vec x) { _mm512_storeu_ps(p, x); }
/* b where a is NaN. */
INLINE vec larger(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE float sum_of(vec x) { return _mm512_reduce_add_ps(x); }
INLINE float largest_of(vec x) { return _mm512_reduce_max_ps(x); }

INLINE void sum_four(vec a, vec b, vec c, vec d, float sums[4]) {
  const vec ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const vec cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const vec all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

/* Every other number of a and b, side by side. */
INLINE void split(vec a, vec b, vec *even, vec *odd) {
  const __m512i first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  *even = _mm512_permutex2var_ps(a, first, b);
  *odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(first, _mm512_set1_epi32(1)), b);
}

INLINE void pair_bf16(const uint8_t *p, vec part[2]) {
  const __m512i both = _mm512_loadu_si512(p);
  part[0] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  part[1] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
}

INLINE vec floats_of_halves(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

INLINE void pair_fp8(const uint8_t *p, vec part[2]) {
  const __m512i wide = _mm512_slli_epi16(_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p)), 7);
  const __m512i plain = _mm512_and_si512(wide, _mm512_set1_epi16((short)0xbf80));
  const __m512i next = _mm512_add_epi16(_mm512_and_si512(wide, _mm512_set1_epi16(0x3f80)), _mm512_set1_epi16(0x80));
  const __m512i half = _mm512_or_si512(plain, _mm512_and_si512(next, _mm512_set1_epi16(0x4000)));
  part[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
  part[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
}

INLINE void pair_int8(const uint8_t *p, vec part[2]) {
  for (int i = 0; i < 2; i++)
    part[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p + 16 * i))));
}

INLINE void pair_int4(const uint8_t *p, vec part[2]) {
  const vec values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
  part[0] = _mm512_permutexvar_ps(both, values); /* looks at the lowest four bits alone */
  part[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), values);
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define ISA "avx2"
#define LANES 8
#define REGISTERS 16
typedef __m256 vec;

INLINE vec splat(float x) { return _mm256_set1_ps(x); }
INLINE vec load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void store(float *p, vec x) { _mm256_storeu_ps(p, x); }
/* b where a is NaN. */
INLINE vec larger(vec a, vec b) { return _mm256_max_ps(a, b); }

INLINE void sum_four(vec a, vec b, vec c, vec d, float sums[4]) {
  const vec ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const vec cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const vec all = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

INLINE float sum_of(vec x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

INLINE float largest_of(vec x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

INLINE vec in_order(vec halves) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(halves), 0xd8)); }

/* Every other number of a and b, side by side. */
INLINE void split(vec a, vec b, vec *even, vec *odd) {
  *even = in_order(_mm256_shuffle_ps(a, b, 0x88));
  *odd = in_order(_mm256_shuffle_ps(a, b, 0xdd));
}

INLINE void pair_bf16(const uint8_t *p, vec part[2]) {
  const __m256i both = _mm256_loadu_si256((const __m256i *)p);
  part[0] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  part[1] = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000)));
}

INLINE vec floats_of_halves(const uint8_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }

INLINE void pair_fp8(const uint8_t *p, vec part[2]) {
  const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)), 7);
  const __m256i plain = _mm256_and_si256(wide, _mm256_set1_epi16((short)0xbf80));
  const __m256i next = _mm256_add_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x3f80)), _mm256_set1_epi16(0x80));
  const __m256i half = _mm256_or_si256(plain, _mm256_and_si256(next, _mm256_set1_epi16(0x4000)));
  part[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
  part[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
}

INLINE void pair_int8(const uint8_t *p, vec part[2]) {
  for (int i = 0; i < 2; i++)
    part[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8 * i))));
}

INLINE void pair_int4(const uint8_t *p, vec part[2]) {
  const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)), eight = _mm256_set1_epi32(8);
  part[0] = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(both, _mm256_set1_epi32(15)), eight));
  part[1] = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(both, 4), eight));
}

#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#define ISA "neon"
#define LANES 4
#define REGISTERS 32
typedef float32x4_t vec;

INLINE vec splat(float x) { return vdupq_n_f32(x); }
INLINE vec load(const float *p) { return vld1q_f32(p); }
INLINE void store(float *p, vec x) { vst1q_f32(p, x); }
/* b where a is NaN. */
INLINE vec larger(vec a, vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE float sum_of(vec x) { return vaddvq_f32(x); }
INLINE float largest_of(vec x) { return vmaxvq_f32(x); }
INLINE void sum_four(vec a, vec b, vec c, vec d, float sums[4]) {
  vst1q_f32(sums, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}

/* Every other number of a and b, side by side. */
INLINE void split(vec a, vec b, vec *even, vec *odd) { *even = vuzp1q_f32(a, b), *odd = vuzp2q_f32(a, b); }

INLINE void pair_bf16(const uint8_t *p, vec part[2]) {
  const uint32x4_t both = vreinterpretq_u32_u8(vld1q_u8(p));
  part[0] = vreinterpretq_f32_u32(vshlq_n_u32(both, 16));
  part[1] = vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff0000)));
}

INLINE vec floats_of_halves(const uint8_t *p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }

INLINE void pair_fp8(const uint8_t *p, vec part[2]) {
  const uint16x8_t wide = vreinterpretq_u16_s16(vshlq_n_s16(vmovl_s8(vreinterpret_s8_u8(vld1_u8(p))), 7));
  const uint16x8_t next = vaddq_u16(vandq_u16(wide, vdupq_n_u16(0x3f80)), vdupq_n_u16(0x80));
  const uint16x8_t half = vorrq_u16(vandq_u16(wide, vdupq_n_u16(0xbf80)), vandq_u16(next, vdupq_n_u16(0x4000)));
  part[0] = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(half)));
  part[1] = vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(half)));
}

INLINE void pair_int8(const uint8_t *p, vec part[2]) {
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p)));
  part[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
  part[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)));
}

INLINE void pair_int4(const uint8_t *p, vec part[2]) {
  uint32_t four;
  memcpy(&four, p, 4);
  const uint8x8_t bytes = vcreate_u8(four);
  const int8x8_t low = vsub_s8(vreinterpret_s8_u8(vand_u8(bytes, vdup_n_u8(15))), vdup_n_s8(8));
  const int8x8_t high = vsub_s8(vreinterpret_s8_u8(vshr_n_u8(bytes, 4)), vdup_n_s8(8));
  part[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(low))));
  part[1] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(high))));
}

#endif

#ifndef ISA
#define ISA "generic"
#define LANES 4
#define REGISTERS 16
typedef float vec __attribute__((vector_size(16)));

INLINE vec splat(float x) { return (vec){x, x, x, x}; }
INLINE vec load(const float *p) {
  vec x;
  memcpy(&x, p, sizeof x);
  return x;
}
INLINE void store(float *p, vec x) { memcpy(p, &x, sizeof x); }
/* b where a is NaN. */
INLINE vec larger(vec a, vec b) {
  for (int i = 0; i < 4; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
  return a;
}
INLINE float sum_of(vec x) { return (x[0] + x[1]) + (x[2] + x[3]); }
INLINE float largest_of(vec x) {
  const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
INLINE void sum_four(vec a, vec b, vec c, vec d, float sums[4]) {
  sums[0] = sum_of(a), sums[1] = sum_of(b), sums[2] = sum_of(c), sums[3] = sum_of(d);
}

/* Every other number of a and b, side by side. */
INLINE void split(vec a, vec b, vec *even, vec *odd) {
  *even = (vec){a[0], a[2], b[0], b[2]}, *odd = (vec){a[1], a[3], b[1], b[3]};
}

INLINE void pair_bf16(const uint8_t *p, vec part[2]) {
  uint16_t x[8];
  memcpy(x, p, sizeof x);
  for (int i = 0; i < 8; i++) part[i & 1][i >> 1] = bf16_to_float(x[i]);
}

INLINE vec floats_of_halves(const uint8_t *p) {
  uint16_t x[4];
  memcpy(x, p, sizeof x);
  return (vec){half_to_float(x[0]), half_to_float(x[1]), half_to_float(x[2]), half_to_float(x[3])};
}

INLINE void pair_fp8(const uint8_t *p, vec part[2]) {
  for (int i = 0; i < 8; i++) part[i >> 2][i & 3] = half_to_float(fp8_to_half(p[i]));
}

INLINE void pair_int8(const uint8_t *p, vec part[2]) {
  for (int i = 0; i < 8; i++) part[i >> 2][i & 3] = (float)(int8_t)p[i];
}

INLINE void pair_int4(const uint8_t *p, vec part[2]) {
  for (int i = 0; i < 4; i++) part[0][i] = (float)((p[i] & 15) - 8), part[1][i] = (float)((p[i] >> 4) - 8);
}
#endif

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* GOMP_parallel of the OpenMP that torch uses. */
typedef void (*parallel_fn)(void (*work)(void *), void *argument, unsigned threads, unsigned flags);

typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

INLINE void pair_fp32(const uint8_t *p, vec part[2]) {
  part[0] = load((const float *)p);
  part[1] = load((const float *)p + LANES);
}

INLINE void pair_fp16(const uint8_t *p, vec part[2]) {
  part[0] = floats_of_halves(p);
  part[1] = floats_of_halves(p + 2 * LANES);
}

INLINE vec masked(vec x, ivec mask) { return (vec)((ivec)x & mask); }

/* exp of arguments up to 0 (and NaN), to about 2 ulp; below -87 it is 0. */
INLINE vec exp_negative(vec x) {
  const vec magic = splat(12582912.0f); /* adding it rounds to a whole number, which stands in the lowest bits */
  const vec shifted = x * splat(1.44269504f) + magic, n = shifted - magic;
  const vec r = (x - n * splat(0.693145752f)) - n * splat(1.42860677e-6f);
  vec p = splat(1.9875691e-4f);
  p = p * r + splat(1.3981999e-3f);
  p = p * r + splat(8.3334519e-3f);
  p = p * r + splat(4.1665796e-2f);
  p = p * r + splat(1.6666665e-1f);
  p = p * r + splat(5.0e-1f);
  p = p * (r * r) + r + splat(1.0f);
  const ivec power = ((ivec)shifted + (127 - 0x4b400000)) << 23;
  return masked(p * (vec)power, ~(ivec)(x < splat(-87.0f)));
}

/* (1 - e) / (1 + e) with e = exp(-2 |x|), and the sign of x. */
INLINE vec tanh_of(vec x) {
  const ivec sign = (ivec)x & INT32_MIN;
  const vec e = exp_negative((vec)((ivec)x & INT32_MAX) * splat(-2.0f));
  return (vec)((ivec)((splat(1.0f) - e) / (splat(1.0f) + e)) | sign);
}

static inline float exp_one(float x) { return exp_negative(splat(x))[0]; }
static inline float tanh_one(float x) { return tanh_of(splat(x))[0]; }
#endif

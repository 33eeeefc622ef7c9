/* Numbers one at a time: fp16, bf16 and fp8 to and from fp32, and the codes of int8 and int4 as ops/quantised.py has them. */
#ifndef KVFOLD_PAGED_NUMBERS_H
#define KVFOLD_PAGED_NUMBERS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define GROUP 32 /* channels that share a scale */

enum { FP32, BF16, FP16, FP8, INT8, INT4 };

INLINE float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest < 0x400) return (sign ? -0x1p-24f : 0x1p-24f) * (float)rest;
  return bits_to_float(sign | ((rest << 13) + 0x38000000));
}

/* To nearest, ties to even. */
INLINE uint16_t float_to_half(float x) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;
  if (rest < 0x38800000) return sign | (uint16_t)rintf(fabsf(x) * 0x1p24f);
  return sign | ((rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13);
}

INLINE uint16_t float_to_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE float bf16_to_float(uint16_t x) { return bits_to_float((uint32_t)x << 16); }

/* e4m3: the bits of an fp16 number 256 times too small; the code of NaN becomes NaN. */
INLINE uint16_t fp8_to_half(uint8_t x) {
  const uint16_t rest = (x & 0x7f) << 7;
  return (x & 0x80) << 8 | rest | ((rest + 0x80) & 0x4000);
}

INLINE float read_number(const void *p, int64_t i, int64_t kind) {
  if (kind == FP32) return ((const float *)p)[i];
  const uint16_t bits = ((const uint16_t *)p)[i];
  return kind == BF16 ? bf16_to_float(bits) : half_to_float(bits);
}

INLINE void write_number(void *p, int64_t i, int64_t kind, float x) {
  if (kind == FP32) ((float *)p)[i] = x;
  else ((uint16_t *)p)[i] = kind == BF16 ? float_to_bf16(x) : float_to_half(x);
}

static inline uint8_t fp8_of(float x) {
  const uint32_t sign = float_to_bits(x) >> 24 & 0x80;
  if (x != x) return sign | 0x7f;
  const float size = fabsf(x) < 448.0f ? fabsf(x) : 448.0f;
  if (size < 0x1p-6f) return sign | (uint8_t)rintf(size * 0x1p9f);
  const uint32_t bits = float_to_bits(size);
  return sign | ((bits + 0x7ffff + (bits >> 20 & 1) - (120u << 23)) >> 20);
}

/* int8 or int4 codes of up to 32 channels and their scale, as quantised.py has them. */
static inline void codes_of(const float *x, int64_t n, int is_int8, int32_t *codes, uint16_t *scale_out) {
  const float least = is_int8 ? -127.0f : -8.0f, largest = is_int8 ? 127.0f : 7.0f;
  float high = x[0], low = x[0];
  for (int64_t i = 1; i < n; i++) {
    if (x[i] > high || x[i] != x[i]) high = x[i];
    if (x[i] < low || x[i] != x[i]) low = x[i];
  }
  float peak = (high >= -low ? high : low) / least;
  if (is_int8) peak = fabsf(peak);
  peak = peak > 65504.0f ? 65504.0f : peak < -65504.0f ? -65504.0f : peak;
  *scale_out = float_to_half(peak);
  const float scale = half_to_float(*scale_out);
  for (int64_t i = 0; i < n; i++) {
    float code = scale == 0.0f ? 0.0f : rintf(x[i] / scale);
    code = code > largest ? largest : code < least ? least : code;
    codes[i] = code == code ? (int32_t)code : 0;
  }
}
#endif

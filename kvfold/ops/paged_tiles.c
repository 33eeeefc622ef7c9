/* The two inner loops of decode attention for pages of one storage: q.k of a run of keys, and weighted sums of its values.
 *
 * Compiled once for each storage, with STORAGE its name and KIND its number. Keys and values are read in units of 2 * LANES
 * channels. A tile of up to 8 query heads shares each of them; sums stay in registers. HEADS, KEYS and UNITS are constants
 * where a function is inlined.
 */
#include "paged_tiles.h"

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define TWICE _Pragma("clang loop unroll_count(2)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#define TWICE _Pragma("GCC unroll 2")
#endif

#define JOINED_(a, b) a##_##b
#define JOINED(a, b) JOINED_(a, b)
#define READ_PAIR JOINED(pair, STORAGE)
#define SCALED (KIND >= INT8)
#define UNIT_BYTES (2 * LANES * (KIND == FP32 ? 32 : KIND <= FP16 ? 16 : KIND <= INT8 ? 8 : 4) / 8)
#define UNITS_PER_SCALE (GROUP / (2 * LANES))

/* Adds the products of unit u of KEYS keys, from j on, with HEADS queries. */
INLINE void key_unit(const shape *s, const run *r, const uint8_t *rows, const float *q, int64_t j, int64_t u,
                     vec sums[4][8], const int HEADS, const int KEYS, const int MASKED) {
  const float *query = q + u * 2 * LANES;
  const int64_t step = s->units * 2 * LANES;
  UNROLL
  for (int k = 0; k < KEYS; k++) {
    vec part[2];
    READ_PAIR(rows + k * s->row_bytes + u * UNIT_BYTES, part);
    if (SCALED) {
      const vec scale = splat(r->scales[u / UNITS_PER_SCALE * RUN + j + k]);
      part[0] *= scale, part[1] *= scale;
    } else if (MASKED) { /* what lies behind the vector may be NaN */
      part[0] = masked(part[0], s->mask[0]), part[1] = masked(part[1], s->mask[1]);
    }
    UNROLL
    for (int g = 0; g < HEADS; g++) {
      sums[k][g] += part[0] * load(query + g * step);
      sums[k][g] += part[1] * load(query + g * step + LANES);
    }
  }
}

/* Logits of KEYS keys from j on: logits[g * stride + j]. */
INLINE void keys(const shape *s, const run *r, const float *q, float *logits, int64_t stride, int64_t j,
                 const int HEADS, const int KEYS) {
  const uint8_t *rows = r->rows + j * s->row_bytes;
  const int64_t whole = SCALED ? s->units : s->whole;
  vec sums[4][8];
  UNROLL
  for (int k = 0; k < KEYS; k++) {
    UNROLL
    for (int g = 0; g < HEADS; g++) sums[k][g] = splat(0.0f);
  }
  prefetch(r->ahead + j * s->row_bytes, KEYS * s->row_bytes);
  TWICE
  for (int64_t u = 0; u < whole; u++) key_unit(s, r, rows, q, j, u, sums, HEADS, KEYS, 0);
  if (whole < s->units) key_unit(s, r, rows, q, j, whole, sums, HEADS, KEYS, 1);
  UNROLL
  for (int g = 0; g < HEADS; g += KEYS == 2 ? 2 : 1) {
    float *out = logits + g * stride + j, four[4];
    if (KEYS == 4) sum_four(sums[0][g], sums[1][g], sums[2][g], sums[3][g], out);
    if (KEYS == 2) {
      sum_four(sums[0][g], sums[1][g], sums[0][g + 1], sums[1][g + 1], four);
      memcpy(out, four, 8), memcpy(out + stride, four + 2, 8);
    }
    if (KEYS == 1) out[0] = sum_of(sums[0][g]);
  }
}

INLINE void keys_of(const shape *s, const run *r, const float *q, float *logits, int64_t stride, const int HEADS) {
  const int KEYS = HEADS * 4 <= REGISTERS - 4 ? 4 : 2;
  int64_t j = 0;
  for (; j + KEYS <= r->n; j += KEYS) keys(s, r, q, logits, stride, j, HEADS, KEYS);
  for (; j < r->n; j++) keys(s, r, q, logits, stride, j, HEADS, 1);
}

/* Adds the weighted values of the run to UNITS units of the sums of HEADS heads. */
INLINE void values(const shape *s, const run *r, const float *weights, int64_t stride, float *out, int64_t u,
                         const int HEADS, const int UNITS) {
  const int64_t step = s->units * 2 * LANES;
  vec sums[8][8];
  UNROLL
  for (int g = 0; g < HEADS; g++) {
    UNROLL
    for (int d = 0; d < 2 * UNITS; d++) sums[g][d] = load(out + g * step + (2 * u + d) * LANES);
  }
  const uint8_t *row = r->rows + u * UNIT_BYTES, *ahead = r->ahead + u * UNIT_BYTES;
  TWICE
  for (int64_t j = 0; j < r->n; j++, row += s->row_bytes, ahead += s->row_bytes) {
    prefetch(ahead, UNITS * UNIT_BYTES);
    UNROLL
    for (int t = 0; t < UNITS; t++) {
      vec part[2];
      READ_PAIR(row + t * UNIT_BYTES, part);
      UNROLL
      for (int g = 0; g < HEADS; g++) {
        /* With scales, `weights` are those of one head and scale group, one after the other. */
        const int64_t line = SCALED ? g * s->scale_groups + (u + t) / UNITS_PER_SCALE : g;
        const vec weight = splat(weights[line * stride + j]);
        sums[g][2 * t] += weight * part[0];
        sums[g][2 * t + 1] += weight * part[1];
      }
    }
  }
  UNROLL
  for (int g = 0; g < HEADS; g++) {
    UNROLL
    for (int d = 0; d < 2 * UNITS; d++) store(out + g * step + (2 * u + d) * LANES, sums[g][d]);
  }
}

INLINE void values_of(const shape *s, const run *r, const float *weights, int64_t stride, float *out,
                            const int HEADS) {
  const int UNITS = HEADS * 8 <= REGISTERS - 4 ? 4 : HEADS * 4 <= REGISTERS - 4 ? 2 : 1;
  int64_t u = 0;
  for (; u + UNITS <= s->units; u += UNITS) values(s, r, weights, stride, out, u, HEADS, UNITS);
  if (UNITS > 2 && u + 2 <= s->units) values(s, r, weights, stride, out, u, HEADS, 2), u += 2;
  if (u < s->units) values(s, r, weights, stride, out, u, HEADS, 1);
}

#if REGISTERS > 16
#define FOR_MOST_HEADS(CALL) case 6: CALL(6); default: CALL(8);
#else
#define FOR_MOST_HEADS(CALL) default: CALL(6);
#endif
#define FOR_HEADS(CALL) \
  switch (heads) {      \
    case 1: CALL(1);    \
    case 2: CALL(2);    \
    case 3: CALL(3);    \
    case 4: CALL(4);    \
    FOR_MOST_HEADS(CALL) \
  }

void kvfold_products(const shape *s, const run *r, const float *q, float *logits, int64_t stride, int heads) {
#define CALL(HEADS) keys_of(s, r, q, logits, stride, HEADS); break
  FOR_HEADS(CALL)
#undef CALL
}

void kvfold_sums(const shape *s, const run *r, const float *weights, int64_t stride, float *out, int heads) {
#define CALL(HEADS) values_of(s, r, weights, stride, out, HEADS); break
  FOR_HEADS(CALL)
#undef CALL
}

/* What paged_cpu.c (streams, items, softmax) and paged_tiles.c (the inner loops) tell each other. */
#ifndef KVFOLD_PAGED_TILES_H
#define KVFOLD_PAGED_TILES_H

#include "paged_simd.h"

#define RUN 32 /* slots of a run at most */
#define MOST_HEADS (REGISTERS > 16 ? 8 : 6)

/* One side (keys or values) of a call: how a vector lies in a page, and how it is read in units of 2 * LANES channels. */
typedef struct {
  uint8_t *pool;
  uint16_t *scale;
  int64_t kind, row_bytes, unit_bytes, units, whole, scale_groups;
  int64_t ahead;  /* so many runs ahead memory is asked for */
  int64_t safe;   /* slots from here on are copied before they are read: a whole unit would reach beyond the pool */
  float gain;     /* what is read is so many times too small */
  ivec mask[2];   /* lanes of the last unit that hold a channel */
  int32_t *place; /* [D]: where channel d stands in a row of units */
} shape;

/* Entries that lie side by side. */
typedef struct {
  const uint8_t *rows, *ahead; /* `ahead`: what will be read next after this run, or the run itself */
  const float *scales;         /* [S, RUN] */
  int64_t n;
} run;

/* Logits of a run: for each of `heads` rows of q, `stride` apart in `logits`. */
typedef void (*products_fn)(const shape *s, const run *r, const float *q, float *logits, int64_t stride, int heads);
/* Adds the run's values under the weights of `heads` heads to `out`; with scales, one row of weights a head and group. */
typedef void (*sums_fn)(const shape *s, const run *r, const float *weights, int64_t stride, float *out, int heads);

/* Into the second cache: to the first one it took longer, by 10 % on an Intel core. */
INLINE void prefetch(const uint8_t *p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}
#endif

/* What a model does besides attention, for the few rows of a decoding step and the many of a prompt: y = x W^T, the RMS norm before it, the rotation behind it. Weights
 * lie in panels of PANEL output channels, read once from memory, in order.
 *
 * A tile of up to ROWS rows shares each vector of weights; its sums stay in registers. More rows go over a panel again while
 * it lies in the second cache, and the panel that the thread will have next is asked for meanwhile. ROWS and COLUMNS
 * are constants where a function is inlined.
 * Letters: R rows, C input channels, N output channels.
 */
#include <math.h>
#include <stdlib.h>

#include "paged_simd.h"

#define COLUMNS 3
#define PANEL (COLUMNS * LANES)
#define ROWS (REGISTERS > 16 ? 8 : 4)
#define FEW 192  /* rows */
#define BLOCK 96 /* rows of a prompt that one thread takes at a time */
#define NEAR 16 /* input channels: so far ahead weights are asked into the first cache */

typedef struct {
  const float *x; /* [R, C] */
  const float *w; /* [panels, C, PANEL] */
  float *y;       /* [R, N] */
  int64_t rows, inputs, outputs, panels, next;
} product;

/* One block of HEIGHT rows through one panel; `ahead` is asked for on the way, `step` bytes for each input channel. */
INLINE void tile(const product *p, const float *x, const float *w, const char *ahead, int64_t step, float *y,
                 int64_t width, const int HEIGHT) {
  vec sums[ROWS][COLUMNS];
  UNROLL
  for (int r = 0; r < HEIGHT; r++) {
    UNROLL
    for (int c = 0; c < COLUMNS; c++) sums[r][c] = splat(0.0f);
  }
  const int64_t stride = p->inputs;
  for (int64_t k = 0; k < stride; k++, x++, w += PANEL, ahead += step) {
    vec part[COLUMNS];
    UNROLL
    for (int c = 0; c < COLUMNS; c++) {
      part[c] = load(w + c * LANES);
      __builtin_prefetch(w + NEAR * PANEL + c * LANES, 0, 3);
    }
    __builtin_prefetch(ahead, 0, 2);
    if (step > 128) __builtin_prefetch(ahead + 128, 0, 2);
    UNROLL
    for (int r = 0; r < HEIGHT; r++) {
      const vec one = splat(x[r * stride]);
      UNROLL
      for (int c = 0; c < COLUMNS; c++) sums[r][c] += one * part[c];
    }
  }
  UNROLL
  for (int r = 0; r < HEIGHT; r++) {
    float line[PANEL], *out = y + r * p->outputs;
    UNROLL
    for (int c = 0; c < COLUMNS; c++) store((width == PANEL ? out : line) + c * LANES, sums[r][c]);
    if (width < PANEL) memcpy(out, line, width * sizeof(float));
  }
}

static void panel(const product *p, int64_t number, int64_t following) {
  const int64_t size = p->inputs * PANEL, first = number * PANEL;
  const int64_t width = p->outputs - first < PANEL ? p->outputs - first : PANEL;
  const float *w = p->w + number * size, *next = following < p->panels ? p->w + following * size : w;
  const int64_t blocks = (p->rows + ROWS - 1) / ROWS, step = PANEL * sizeof(float) / blocks;
  for (int64_t b = 0; b < blocks; b++) {
    const float *x = p->x + b * ROWS * p->inputs;
    const char *ahead = (const char *)next + b * step * p->inputs;
    float *y = p->y + b * ROWS * p->outputs + first;
    switch (p->rows - b * ROWS) {
      case 1: tile(p, x, w, ahead, step, y, width, 1); break;
      case 2: tile(p, x, w, ahead, step, y, width, 2); break;
      case 3: tile(p, x, w, ahead, step, y, width, 3); break;
#if REGISTERS > 16
      case 4: tile(p, x, w, ahead, step, y, width, 4); break;
      case 5: tile(p, x, w, ahead, step, y, width, 5); break;
      case 6: tile(p, x, w, ahead, step, y, width, 6); break;
      case 7: tile(p, x, w, ahead, step, y, width, 7); break;
#endif
      default: tile(p, x, w, ahead, step, y, width, ROWS);
    }
  }
}

static void work(void *argument) {
  product *p = argument;
  int64_t number = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED);
  while (number < p->panels) {
    const int64_t following = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED);
    panel(p, number, following);
    number = following;
  }
}

/* y = x / sqrt(mean(x^2) + eps) * gain, row by row; x and y [R, C] contiguous. */
void kvfold_rms_norm(const float *x, const float *gain, float *y, int64_t rows, int64_t width, float eps) {
  const int64_t whole = width / LANES * LANES;
  for (; rows > 0; rows--, x += width, y += width) {
    vec sums = splat(0.0f);
    for (int64_t k = 0; k < whole; k += LANES) sums += load(x + k) * load(x + k);
    float sum = sum_of(sums);
    for (int64_t k = whole; k < width; k++) sum += x[k] * x[k];
    const float factor = 1.0f / sqrtf(sum / width + eps);
    for (int64_t k = 0; k < whole; k += LANES) store(y + k, load(x + k) * splat(factor) * load(gain + k));
    for (int64_t k = whole; k < width; k++) y[k] = x[k] * factor * gain[k];
  }
}

/* Where the cosines and sines of a row are: of sequence row / tokens, token row % tokens. */
typedef struct {
  const float *cosines, *sines;
  int64_t tokens, by_sequence, by_token;
} angles;

/* Rotary positions: the first `width` of `dims` channels of each head turn, the first half with the second; cosines and sines of
 * both halves. `stride` is that of rows of x; heads lie side by side, y is contiguous. */
static void turn(const float *x, const angles *a, float *restrict y, int64_t first, int64_t rows, int64_t heads, int64_t dims,
                 int64_t width, int64_t stride) {
  const int64_t half = width / 2, whole = half / LANES * LANES;
  for (int64_t row = first; row < first + rows; row++, x += stride) {
    const int64_t at = width ? row / a->tokens * a->by_sequence + row % a->tokens * a->by_token : 0;
    const float *cosines = a->cosines + at, *sines = a->sines + at;
    for (int64_t h = 0; h < heads; h++, y += dims) {
      const float *left = x + h * dims, *right = left + half;
      for (int64_t i = 0; i < whole; i += LANES) {
        const vec l = load(left + i), r = load(right + i);
        store(y + i, l * load(cosines + i) - r * load(sines + i));
        store(y + half + i, r * load(cosines + half + i) + l * load(sines + half + i));
      }
      for (int64_t i = whole; i < half; i++) {
        y[i] = left[i] * cosines[i] - right[i] * sines[i];
        y[half + i] = right[i] * cosines[half + i] + left[i] * sines[half + i];
      }
      for (int64_t i = width; i < dims; i++) y[i] = left[i];
    }
  }
}

/* One token a row. */
void kvfold_rotate(const float *x, const float *cosines, const float *sines, float *y, int64_t rows, int64_t heads,
                   int64_t dims, int64_t width, int64_t stride, int64_t angle_stride) {
  const angles a = {cosines, sines, 1, angle_stride, 0};
  turn(x, &a, y, 0, rows, heads, dims, width, stride);
}

/* Columns of a panel. */
int64_t kvfold_panel(void) { return PANEL; }

/* x [R, C] contiguous, w [panels, C, PANEL], y [R, N]. */
void kvfold_linear(const float *x, const float *w, float *y, int64_t rows, int64_t inputs, int64_t outputs, int64_t threads,
                   parallel_fn parallel) {
  product p = {x, w, y, rows, inputs, outputs, (outputs + PANEL - 1) / PANEL, 0};
  if (parallel && threads > 1) parallel(work, &p, (unsigned)threads, 0);
  else work(&p);
}

/* y = x w^T + bias for a few outputs; x [R, C], w [N, C], bias [N] or NULL, y [R, N]. */
static void few_outputs(const float *x, const float *w, const float *bias, float *y, int64_t rows, int64_t width, int64_t n) {
  const int64_t whole = width / LANES * LANES;
  for (; rows > 0; rows--, x += width)
    for (int64_t o = 0; o < n; o++, y++) {
      const float *one = w + o * width;
      vec sums = splat(0.0f);
      for (int64_t k = 0; k < whole; k += LANES) sums += load(x + k) * load(one + k);
      *y = sum_of(sums) + (bias ? bias[o] : 0.0f);
      for (int64_t k = whole; k < width; k++) *y += x[k] * one[k];
    }
}

/* What precedes attention in a layer: q, k and v of the RMS norm of h, q and k turned (a `turned` of 0: not at all); with `told`
 * what an adapter tells of the norm of h with a gain of its own. */
typedef struct {
  const float *h, *gain, *qkv;            /* [R, C], [C], panels of Wq, Wk and Wv together */
  const float *cosines, *sines;           /* as in `angles` */
  float *q, *k, *v;                       /* [R, heads * dims], [R, kv_heads * dims] twice */
  const float *own_gain, *adapter, *bias; /* [C], [tellings, C], [tellings] or NULL */
  float *told;                            /* [R, tellings] */
  parallel_fn parallel;
  int64_t tellings, rows, width, heads, kv_heads, dims, turned, tokens, by_sequence, by_token, threads;
  double eps;
} front_job;

/* What follows attention in a layer: out = h + f a Wo^T, then out += f down(silu(gate) * up) of out's RMS norm; f is `factor`. */
typedef struct {
  const float *a, *h, *wo, *gain, *gate_up, *down; /* [R, A], [R, C], panels, [C], panels of both together, panels */
  float *out;                                      /* [R, C] */
  parallel_fn parallel;
  int64_t rows, attended, width, inner, threads;
  double eps, factor;
} tail_job;

static int front_rows(const void *job, int64_t first, int64_t rows, int64_t threads) {
  const front_job *j = job;
  const int64_t width = j->width, own = j->heads * j->dims, kv = j->kv_heads * j->dims, all = own + 2 * kv;
  const angles a = {j->cosines, j->sines, j->tokens, j->by_sequence, j->by_token};
  const float *h = j->h + first * width;
  float *normed = malloc(rows * (width + all) * sizeof(float)), *wide = normed + rows * width;
  if (!normed) return 1;
  kvfold_rms_norm(h, j->gain, normed, rows, width, (float)j->eps);
  kvfold_linear(normed, j->qkv, wide, rows, width, all, threads, j->parallel);
  turn(wide, &a, j->q + first * own, first, rows, j->heads, j->dims, j->turned, all);
  if (kv) turn(wide + own, &a, j->k + first * kv, first, rows, j->kv_heads, j->dims, j->turned, all);
  for (int64_t r = 0; r < rows && kv; r++) memcpy(j->v + (first + r) * kv, wide + (r + 1) * all - kv, kv * sizeof(float));
  if (j->told) {
    kvfold_rms_norm(h, j->own_gain, normed, rows, width, (float)j->eps);
    few_outputs(normed, j->adapter, j->bias, j->told + first * j->tellings, rows, width, j->tellings);
  }
  free(normed);
  return 0;
}

/* y = a + factor b */
static void add(float *y, const float *a, const float *b, float factor, int64_t n) {
  const int64_t whole = n / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) store(y + i, load(a + i) + load(b + i) * splat(factor));
  for (int64_t i = whole; i < n; i++) y[i] = a[i] + b[i] * factor;
}

INLINE vec silu(vec x) {
  const vec e = exp_negative((vec)((ivec)x | INT32_MIN)), one = splat(1.0f);
  const ivec below = x < splat(0.0f);
  return x * (vec)((below & (ivec)e) | (~below & (ivec)one)) / (one + e);
}

/* Rows of [gate, up], each `inner` wide, become silu(gate) * up, closed up. No row is written over one that is still to come. */
static void gate_rows(float *x, int64_t rows, int64_t inner) {
  const int64_t whole = inner / LANES * LANES;
  for (int64_t r = 0; r < rows; r++) {
    const float *gate = x + r * 2 * inner, *up = gate + inner;
    float *to = x + r * inner;
    for (int64_t i = 0; i < whole; i += LANES) store(to + i, silu(load(gate + i)) * load(up + i));
    for (int64_t i = whole; i < inner; i++) to[i] = silu(splat(gate[i]))[0] * up[i];
  }
}

static int tail_rows(const void *job, int64_t first, int64_t rows, int64_t threads) {
  const tail_job *j = job;
  const int64_t width = j->width, inner = j->inner;
  const float factor = (float)j->factor, *h = j->h + first * width;
  float *out = j->out + first * width;
  float *normed = malloc(rows * (width + 2 * inner) * sizeof(float)), *wide = normed + rows * width;
  if (!normed) return 1;
  kvfold_linear(j->a + first * j->attended, j->wo, out, rows, j->attended, width, threads, j->parallel);
  add(out, h, out, factor, rows * width);
  kvfold_rms_norm(out, j->gain, normed, rows, width, (float)j->eps);
  kvfold_linear(normed, j->gate_up, wide, rows, width, 2 * inner, threads, j->parallel);
  gate_rows(wide, rows, inner);
  kvfold_linear(wide, j->down, normed, rows, inner, width, threads, j->parallel);
  add(out, out, normed, factor, rows * width);
  free(normed);
  return 0;
}

typedef int (*rows_fn)(const void *job, int64_t first, int64_t rows, int64_t threads);

typedef struct {
  rows_fn what;
  const void *job;
  int64_t rows, block, next, failed;
} blocks;

static void some_rows(void *argument) {
  blocks *b = argument;
  for (;;) {
    const int64_t first = b->block * __atomic_fetch_add(&b->next, 1, __ATOMIC_RELAXED);
    if (first >= b->rows) return;
    const int64_t rows = b->rows - first < b->block ? b->rows - first : b->block;
    if (b->what(b->job, first, rows, 1)) __atomic_store_n(&b->failed, 1, __ATOMIC_RELAXED);
  }
}

/* Threads share each product of a few rows; of many rows, each has some to itself from beginning to end, in its own caches. */
static int by_rows(rows_fn what, const void *job, int64_t rows, int64_t threads, parallel_fn parallel) {
  if (rows <= FEW || rows < threads * BLOCK) {
    for (int64_t first = 0; first < rows; first += FEW)
      if (what(job, first, rows - first < FEW ? rows - first : FEW, threads)) return 1;
    return 0;
  }
  blocks b = {what, job, rows, BLOCK, 0, 0};
  if (parallel && threads > 1) parallel(some_rows, &b, (unsigned)threads, 0);
  else some_rows(&b);
  return (int)b.failed;
}

/* 0, or 1 where there was no memory. */
int kvfold_front(const front_job *j) { return by_rows(front_rows, j, j->rows, j->threads, j->parallel); }
int kvfold_tail(const tail_job *j) { return by_rows(tail_rows, j, j->rows, j->threads, j->parallel); }

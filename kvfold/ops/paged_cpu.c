/* Decoding attention over a paged, ragged KV cache, fp32, read in place: the CPU twin of paged.py's reference.
 *
 * One query token a row. A lane is one (row, kv head): a length and a list of pages. The G query heads of a lane share
 * each key that is loaded. Work is cut into (lane, span of slots) items, so that one long row fills all cores; the
 * partial softmaxes of a lane are joined at the end. Letters as in docs/notation.md.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define SPAN 256 /* slots of one work item */

typedef struct {
  float *k, *v;             /* pool [P, N, D] */
  float *score;             /* pool [P, N] or NULL: the weight each key receives is added here */
  const int32_t *position;  /* pool [P, N] */
  const int32_t *table;     /* page ids of all streams */
  const int64_t *start;     /* [B, K]: where the pages of a lane begin in the table */
  const int32_t *length;    /* [B, K] */
  const int64_t *slots;     /* [B, K] or NULL: where the new k, v are written before attending; -1 = nowhere */
  const uint8_t *live;      /* [B] or NULL: a row that is not live gets zeros */
  const int32_t *oldest;    /* [B] or NULL: keys at earlier positions are not seen */
  const float *q;           /* [B, K, G, D] */
  const float *k_new;       /* [B, K, D] or NULL */
  const float *v_new;
  float *out;               /* [B, K, G, D] */
  float *received;          /* [B, K, E] or NULL: weights are added here, the new token's in column E - 1 */
  float *scratch;           /* B * K * (G * (max_length + 1) + spans * G * (D + 2)) */
  int64_t B, K, G, D, N, E, max_length;
  float scale, softcap;     /* softcap 0 = none */
  int32_t received_old;     /* 0: only column E - 1 of received is written */
} decode_job;

/* exp for arguments <= 0, accurate to about 2 ulp, in a form that compilers vectorise; NaN stays NaN. */
static inline float exp_negative(float x) {
  float n = rintf(x * 1.44269504f);
  float r = x - n * 0.693145752f;
  r -= n * 1.42860677e-6f;
  float p = 1.9875691e-4f;
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 5.0e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t exponent = x < -87.0f ? 0 : (int32_t)n + 127;
  union { int32_t i; float f; } power = { .i = exponent << 23 };
  return x < -87.0f ? 0.0f : p * power.f;
}

static inline float dot(const float *restrict a, const float *restrict b, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

static inline void add_scaled(float *restrict out, const float *restrict x, float weight, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] += weight * x[i];
}

/* Entries of a lane: its stored slots, then (when the new token is not stored yet) the new token. */
static inline int64_t lane_entries(const decode_job *job, int64_t lane) {
  if (job->live && !job->live[lane / job->K]) return 0;
  return job->length[lane] + (job->k_new && !job->slots ? 1 : 0);
}

/* One span of one lane. Runs of entries that lie side by side are taken together: those of a page, then the new token. */
typedef struct {
  const decode_job *job;
  const int32_t *pages;
  int64_t lane, row, stored, first, last;
} span_view;

static span_view view_span(const decode_job *job, int64_t lane, int64_t span) {
  const int64_t entries = lane_entries(job, lane), first = span * SPAN;
  return (span_view){job, job->table + job->start[lane], lane, lane / job->K, job->length[lane], first,
                     first + SPAN < entries ? first + SPAN : entries};
}

/* Where entry i lies in a pool, and how many entries lie there side by side. */
static inline const float *run_of(const span_view *view, const float *pool, const float *fresh, int64_t i, int64_t *run) {
  const int64_t N = view->job->N, D = view->job->D;
  if (i >= view->stored) {
    *run = 1;
    return fresh + view->lane * D;
  }
  const int64_t within = i % N, end = view->last < view->stored ? view->last : view->stored;
  *run = N - within < end - i ? N - within : end - i;
  return pool + ((int64_t)view->pages[i / N] * N + within) * D;
}

typedef float vec __attribute__((vector_size(64), aligned(4)));
#define LANES 16

static inline float sum_of(vec x) {
  float sum = 0.0f;
  for (int i = 0; i < LANES; i++) sum += x[i];
  return sum;
}

/* Products of HEADS queries with every key of the span, WIDTH vectors a head: both constants where this is inlined. */
static inline __attribute__((always_inline)) void products(const span_view *view, const float *q, float *logits,
                                                           int64_t stride, const int HEADS, const int WIDTH) {
  vec query[4][16];
  for (int g = 0; g < HEADS; g++)
    for (int d = 0; d < WIDTH; d++) query[g][d] = *(const vec *)(q + (g * WIDTH + d) * LANES);
  for (int64_t i = view->first, run; i < view->last; i += run) {
    const float *key = run_of(view, view->job->k, view->job->k_new, i, &run);
    for (int64_t j = 0; j < run; j++, key += WIDTH * LANES) {
      vec sums[4];
#pragma GCC unroll 4
      for (int g = 0; g < HEADS; g++) sums[g] = query[g][0] * *(const vec *)key;
#pragma GCC unroll 16
      for (int d = 1; d < WIDTH; d++) {
        const vec part = *(const vec *)(key + d * LANES);
#pragma GCC unroll 4
        for (int g = 0; g < HEADS; g++) sums[g] += query[g][d] * part;
      }
#pragma GCC unroll 4
      for (int g = 0; g < HEADS; g++) logits[g * stride + i + j] = sum_of(sums[g]);
    }
  }
}

/* Sums of the values of the span under the weights of HEADS heads; a weight of zero never meets its value. */
static inline __attribute__((always_inline)) void weighted(const span_view *view, const float *weights, int64_t stride,
                                                           float *out, int64_t out_stride, const int HEADS, const int WIDTH) {
  vec sums[4][16];
  for (int g = 0; g < HEADS; g++)
    for (int d = 0; d < WIDTH; d++) sums[g][d] = (vec){0};
  for (int64_t i = view->first, run; i < view->last; i += run) {
    const float *value = run_of(view, view->job->v, view->job->v_new, i, &run);
    for (int64_t j = 0; j < run; j++, value += WIDTH * LANES) {
      float any = 0.0f;
#pragma GCC unroll 4
      for (int g = 0; g < HEADS; g++) any += weights[g * stride + i + j];
      if (any == 0.0f) continue;
#pragma GCC unroll 16
      for (int d = 0; d < WIDTH; d++) {
        const vec part = *(const vec *)(value + d * LANES);
#pragma GCC unroll 4
        for (int g = 0; g < HEADS; g++) sums[g][d] += weights[g * stride + i + j] * part;
      }
    }
  }
  for (int g = 0; g < HEADS; g++)
    for (int d = 0; d < WIDTH; d++) *(vec *)(out + g * out_stride + d * LANES) = sums[g][d];
}

/* The same for any head dim. */
static void products_any(const span_view *view, const float *q, float *logits) {
  const int64_t D = view->job->D;
  for (int64_t i = view->first, run; i < view->last; i += run) {
    const float *key = run_of(view, view->job->k, view->job->k_new, i, &run);
    for (int64_t j = 0; j < run; j++) logits[i + j] = dot(q, key + j * D, D);
  }
}

static void weighted_any(const span_view *view, const float *weights, float *out) {
  const int64_t D = view->job->D;
  memset(out, 0, sizeof(float) * D);
  for (int64_t i = view->first, run; i < view->last; i += run) {
    const float *value = run_of(view, view->job->v, view->job->v_new, i, &run);
    for (int64_t j = 0; j < run; j++)
      if (weights[i + j] != 0.0f) add_scaled(out, value + j * D, weights[i + j], D);
  }
}

#define WIDTHS(HEADS, CALL)                        \
  case HEADS * 100 + 32: CALL(HEADS, 2); break;    \
  case HEADS * 100 + 64: CALL(HEADS, 4); break;    \
  case HEADS * 100 + 80: CALL(HEADS, 5); break;    \
  case HEADS * 100 + 96: CALL(HEADS, 6); break;    \
  case HEADS * 1000 + 128: CALL(HEADS, 8); break;  \
  case HEADS * 1000 + 256: CALL(HEADS, 16); break;
#define KEY(HEADS, D) ((D) < 100 ? (HEADS) * 100 + (D) : (HEADS) * 1000 + (D))

static void heads_products(const span_view *view, const float *q, float *logits, int64_t stride, int64_t heads) {
#define CALL(HEADS, WIDTH) products(view, q, logits, stride, HEADS, WIDTH)
  switch (KEY(heads, view->job->D)) {
    WIDTHS(1, CALL) WIDTHS(2, CALL) WIDTHS(3, CALL) WIDTHS(4, CALL)
    default:
      for (int64_t g = 0; g < heads; g++) products_any(view, q + g * view->job->D, logits + g * stride);
  }
#undef CALL
}

static void heads_weighted(const span_view *view, const float *weights, int64_t stride, float *out, int64_t heads) {
  const int64_t out_stride = view->job->D + 2;
#define CALL(HEADS, WIDTH) weighted(view, weights, stride, out, out_stride, HEADS, WIDTH)
  switch (KEY(heads, view->job->D)) {
    WIDTHS(1, CALL) WIDTHS(2, CALL) WIDTHS(3, CALL) WIDTHS(4, CALL)
    default:
      for (int64_t g = 0; g < heads; g++) weighted_any(view, weights + g * stride, out + g * out_stride);
  }
#undef CALL
}

/* Scale, cap and hide the logits of one head, then exp(logit - highest) in place; gives the sum. */
static float soften(const span_view *view, float *logits, float *highest) {
  const decode_job *job = view->job;
  for (int64_t i = view->first; i < view->last; i++) logits[i] *= job->scale;
  if (job->softcap > 0.0f)
    for (int64_t i = view->first; i < view->last; i++) logits[i] = job->softcap * tanhf(logits[i] / job->softcap);
  if (job->oldest)
    for (int64_t i = view->first; i < view->last && i < view->stored; i++)
      if (job->position[view->pages[i / job->N] * job->N + i % job->N] < job->oldest[view->row]) logits[i] = -INFINITY;
  float top = -INFINITY, total = 0.0f;
  for (int64_t i = view->first; i < view->last; i++)
    if (logits[i] > top || logits[i] != logits[i]) top = logits[i];
  *highest = top;
  if (top == -INFINITY) {
    for (int64_t i = view->first; i < view->last; i++) logits[i] = 0.0f;
    return 0.0f;
  }
#pragma omp simd reduction(+ : total)
  for (int64_t i = view->first; i < view->last; i++) {
    logits[i] = exp_negative(logits[i] - top);
    total += logits[i];
  }
  return total;
}

static void attend_span(const decode_job *job, int64_t lane, int64_t span, float *logits, float *part) {
  const int64_t G = job->G, D = job->D, stride = job->max_length + 1;
  const span_view view = view_span(job, lane, span);
  for (int64_t g = 0; g < G; g += 4) {
    const int64_t heads = G - g < 4 ? G - g : 4;
    heads_products(&view, job->q + (lane * G + g) * D, logits + g * stride, stride, heads);
    for (int64_t h = g; h < g + heads; h++) {
      float *out = part + h * (D + 2);
      out[D + 1] = soften(&view, logits + h * stride, out + D);
    }
    heads_weighted(&view, logits + g * stride, stride, part + g * (D + 2), heads);
  }
}

static void join_spans(const decode_job *job, int64_t lane, float *logits, float *parts) {
  const int64_t G = job->G, D = job->D, N = job->N, stride = job->max_length + 1;
  const int64_t stored = job->length[lane], entries = lane_entries(job, lane);
  const int64_t used = (entries + SPAN - 1) / SPAN;
  const int32_t *pages = job->table + job->start[lane];
  float *received = job->received ? job->received + lane * job->E : NULL;
  for (int64_t g = 0; g < G; g++) {
    float *out = job->out + (lane * G + g) * D;
    float highest = -INFINITY, total = 0.0f;
    memset(out, 0, sizeof(float) * D);
    for (int64_t s = 0; s < used; s++) {
      const float top = parts[(s * G + g) * (D + 2) + D];
      if (top > highest || top != top) highest = top;
    }
    for (int64_t s = 0; s < used; s++) {
      const float *part = parts + (s * G + g) * (D + 2);
      if (part[D] != -INFINITY) total += part[D + 1] * exp_negative(part[D] - highest);
    }
    for (int64_t s = 0; s < used; s++) {
      const float *part = parts + (s * G + g) * (D + 2);
      if (part[D] == -INFINITY) continue;
      const float share = exp_negative(part[D] - highest) / total;
      add_scaled(out, part, share, D);
      if (!job->score && !received) continue;
      const int64_t first = s * SPAN, last = first + SPAN < entries ? first + SPAN : entries;
      for (int64_t i = first, page = first / N, within = first % N; i < last; i++, within++) {
        if (within == N) page++, within = 0;
        const float weight = logits[g * stride + i] * share;
        if (i >= stored) { if (received) received[job->E - 1] += weight; }
        else {
          if (job->score) job->score[(int64_t)pages[page] * N + within] += weight;
          if (received && job->received_old) received[i] += weight;
        }
      }
    }
  }
}

static void write_new(const decode_job *job) {
  for (int64_t lane = 0; lane < job->B * job->K; lane++) {
    if (job->slots[lane] < 0 || (job->live && !job->live[lane / job->K])) continue;
    memcpy(job->k + job->slots[lane] * job->D, job->k_new + lane * job->D, sizeof(float) * job->D);
    memcpy(job->v + job->slots[lane] * job->D, job->v_new + lane * job->D, sizeof(float) * job->D);
  }
}

void kvfold_decode(const decode_job *job) {
  const int64_t lanes = job->B * job->K, G = job->G;
  const int64_t spans = (job->max_length + 1 + SPAN - 1) / SPAN;
  const int64_t lane_logits = G * (job->max_length + 1), lane_parts = spans * G * (job->D + 2);
  float *logits = job->scratch, *parts = job->scratch + lanes * lane_logits;
  if (job->slots && job->k_new) write_new(job);
  const int64_t items = lanes * spans;
#pragma omp parallel if (items * SPAN * G > 4096)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; item++) {
      const int64_t lane = item / spans, span = item % spans;
      if (span * SPAN < lane_entries(job, lane))
        attend_span(job, lane, span, logits + lane * lane_logits, parts + lane * lane_parts + span * G * (job->D + 2));
    }
#pragma omp for schedule(static)
    for (int64_t lane = 0; lane < lanes; lane++)
      join_spans(job, lane, logits + lane * lane_logits, parts + lane * lane_parts);
  }
}

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
  const int32_t *table;     /* of one owner [R, K, M] */
  const int32_t *length;    /* of one owner [R, K] */
  const int64_t *rows;      /* [B] */
  const int64_t *slots;     /* [B, K] or NULL: where the new k, v are written before attending; -1 = nowhere */
  const uint8_t *live;      /* [B] or NULL: a row that is not live gets zeros */
  const int32_t *oldest;    /* [B] or NULL: keys at earlier positions are not seen */
  const float *q;           /* [B, K, G, D] */
  const float *k_new;       /* [B, K, D] or NULL */
  const float *v_new;
  float *out;               /* [B, K, G, D] */
  float *received;          /* [B, K, E] or NULL: weights are added here, the new token's in column E - 1 */
  float *scratch;           /* B * K * (G * (max_length + 1) + spans * G * (D + 2)) */
  int64_t B, K, G, D, N, M, E, max_length;
  float scale, softcap;     /* softcap 0 = none */
  int32_t received_old;     /* 0: only column E - 1 of received is written */
} decode_job;

/* exp for arguments <= 0, accurate to about 2 ulp, in a form that compilers vectorise; NaN stays NaN. */
static inline float exp_negative(float x) {
  if (x < -87.0f) return 0.0f;
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
  if (x != x) return x;
  union { int32_t i; float f; } power = { .i = ((int32_t)n + 127) << 23 };
  return p * power.f;
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
  int64_t b = lane / job->K, h = lane % job->K;
  if (job->live && !job->live[b]) return 0;
  return job->length[job->rows[b] * job->K + h] + (job->k_new && !job->slots ? 1 : 0);
}

static void attend_span(const decode_job *job, int64_t lane, int64_t span, float *logits, float *part) {
  const int64_t K = job->K, G = job->G, D = job->D, N = job->N;
  const int64_t b = lane / K, h = lane % K, row = job->rows[b];
  const int64_t stored = job->length[row * K + h], entries = lane_entries(job, lane);
  const int64_t first = span * SPAN, last = first + SPAN < entries ? first + SPAN : entries;
  const int32_t *pages = job->table + (row * K + h) * job->M;
  const float *q = job->q + lane * G * D;
  const int64_t stride = job->max_length + 1;
  for (int64_t i = first; i < last; i++) {
    const int64_t slot = i < stored ? (int64_t)pages[i / N] * N + i % N : -1;
    const float *key = slot >= 0 ? job->k + slot * D : job->k_new + lane * D;
    const int hidden = job->oldest && slot >= 0 && job->position[slot] < job->oldest[b];
    for (int64_t g = 0; g < G; g++) {
      float x = dot(q + g * D, key, D) * job->scale;
      if (job->softcap > 0.0f) x = job->softcap * tanhf(x / job->softcap);
      logits[g * stride + i] = hidden ? -INFINITY : x;
    }
  }
  for (int64_t g = 0; g < G; g++) {
    float *row_logits = logits + g * stride, *sum_out = part + g * (D + 2);
    float highest = -INFINITY, total = 0.0f;
    for (int64_t i = first; i < last; i++) {
      if (row_logits[i] > highest || row_logits[i] != row_logits[i]) highest = row_logits[i];
    }
    memset(sum_out, 0, sizeof(float) * (D + 2));
    sum_out[D] = highest;
    if (highest == -INFINITY) continue;
#pragma omp simd reduction(+ : total)
    for (int64_t i = first; i < last; i++) {
      row_logits[i] = exp_negative(row_logits[i] - highest);
      total += row_logits[i];
    }
    sum_out[D + 1] = total;
  }
  for (int64_t i = first; i < last; i++) {
    const int64_t slot = i < stored ? (int64_t)pages[i / N] * N + i % N : -1;
    const float *value = slot >= 0 ? job->v + slot * D : job->v_new + lane * D;
    for (int64_t g = 0; g < G; g++) {
      if (part[g * (D + 2) + D] != -INFINITY && logits[g * stride + i] != 0.0f)
        add_scaled(part + g * (D + 2), value, logits[g * stride + i], D);
    }
  }
}

static void join_spans(const decode_job *job, int64_t lane, int64_t spans, float *logits, float *parts) {
  const int64_t K = job->K, G = job->G, D = job->D, N = job->N, stride = job->max_length + 1;
  const int64_t b = lane / K, h = lane % K, row = job->rows[b];
  const int64_t stored = job->length[row * K + h], entries = lane_entries(job, lane);
  const int64_t used = (entries + SPAN - 1) / SPAN;
  const int32_t *pages = job->table + (row * K + h) * job->M;
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
      for (int64_t i = first; i < last; i++) {
        const float weight = logits[g * stride + i] * share;
        if (i >= stored) { if (received) received[job->E - 1] += weight; }
        else {
          if (job->score) job->score[(int64_t)pages[i / N] * N + i % N] += weight;
          if (received && job->received_old) received[i] += weight;
        }
      }
    }
  }
  (void)spans;
}

static void write_new(const decode_job *job) {
  for (int64_t lane = 0; lane < job->B * job->K; lane++) {
    if (job->slots[lane] < 0) continue;
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
      join_spans(job, lane, spans, logits + lane * lane_logits, parts + lane * lane_parts);
  }
}

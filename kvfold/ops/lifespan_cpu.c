/* Attention of a prompt: many queries over entries that lie side by side, each entry seen from its own position to that of its
 * last query. The fp32 twin of attention.py's loop on a CPU.
 *
 * Threads take items of QUERIES queries of one KV head from a queue. Of the entries that an item sees, keys are laid out in
 * panels of PANEL keys, values in panels of PANEL channels, both read in order by one register tile; without ends that is done
 * once for all items. Inside, about ROW_BLOCK rows (a row is one query of one head) go over BUNDLE entries at a time, and
 * their softmax runs online.
 */
#include <math.h>
#include <stdlib.h>

#include "paged_simd.h"

#define ROWS 6
#define COLUMNS (LANES == 16 || REGISTERS > 16 ? 4 : 2)
#define PANEL (COLUMNS * LANES)
#define BUNDLE 128
#define QUERIES 128
#define ROW_BLOCK 96
#define LEAST -1e30f /* where a softmax begins */
#define NEVER INT32_MAX

typedef struct {
  const float *q, *k, *v;        /* [B, T, H, D], [B, E, K, D] twice: strides below, in floats, channels side by side */
  const int32_t *query;          /* [B, T]: positions, -1 at padding; NULL: the call's tokens are the last of the entries */
  const int32_t *position;       /* [B, K, E]: -1 where there is no entry; with `last` NULL: an entry's place, and never read */
  const int32_t *last;           /* [B, K, E], or NULL: entries stay */
  const float *bias;             /* [B, K, E], or NULL */
  float *out;                    /* [B, T, H, D] contiguous */
  parallel_fn parallel;          /* GOMP_parallel of the OpenMP that torch uses, or NULL: one thread */
  int64_t B, T, E, H, K, D, threads;
  int64_t q_row, q_token, q_head, k_row, k_entry, k_head, v_row, v_entry, v_head;
  double scale, softcap;         /* softcap 0 = none */
} lifespan_job;

/* Entries laid out for the tile, filled up to whole groups with some that nobody sees. */
typedef struct {
  float *keys, *values;    /* [groups, BUNDLE / PANEL, D, PANEL], [groups, D / PANEL, BUNDLE, PANEL] */
  int32_t *position, *last; /* [groups * BUNDLE] */
  float *bias;             /* the same */
  int64_t count;
} entries;

typedef struct {
  const lifespan_job *job;
  float *keys, *values;    /* without ends: of all KV heads */
  int32_t *places, *forever;
  int64_t groups, items, next, next_group, failed;
} plan;

/* What one thread works with. */
typedef struct {
  entries own;
  float *query, *logits, *sums, *tops, *totals;
  int32_t *chosen;
} room;

/* c (+)= a b for HEIGHT rows of a; b lies in rows of PANEL. */
INLINE void tile(const float *a, int64_t a_stride, const float *b, int64_t depth, float *c, int64_t c_stride, const int ADD) {
  vec sums[ROWS][COLUMNS];
  UNROLL
  for (int r = 0; r < ROWS; r++) {
    UNROLL
    for (int i = 0; i < COLUMNS; i++) sums[r][i] = ADD ? load(c + r * c_stride + i * LANES) : splat(0.0f);
  }
  for (int64_t k = 0; k < depth; k++, a++, b += PANEL) {
    vec part[COLUMNS];
    UNROLL
    for (int i = 0; i < COLUMNS; i++) part[i] = load(b + i * LANES);
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      const vec one = splat(a[r * a_stride]);
      UNROLL
      for (int i = 0; i < COLUMNS; i++) sums[r][i] += one * part[i];
    }
  }
  UNROLL
  for (int r = 0; r < ROWS; r++) {
    UNROLL
    for (int i = 0; i < COLUMNS; i++) store(c + r * c_stride + i * LANES, sums[r][i]);
  }
}

/* Up to BUNDLE entries of a KV head, whose numbers are `from`, or `first` and on. */
static void lay_out(const lifespan_job *j, int64_t b, int64_t h, const int32_t *from, int64_t first, int64_t n, float *keys,
                    float *values) {
  const int64_t D = j->D;
  for (int64_t i = 0; i < BUNDLE; i++) {
    float *key = keys + i / PANEL * D * PANEL + i % PANEL, *value = values + i * PANEL;
    if (i >= n) {
      for (int64_t d = 0; d < D; d++) key[d * PANEL] = 0.0f, value[d / PANEL * BUNDLE * PANEL + d % PANEL] = 0.0f;
      continue;
    }
    const int64_t e = from ? from[i] : first + i;
    const float *k = j->k + b * j->k_row + e * j->k_entry + h * j->k_head;
    const float *v = j->v + b * j->v_row + e * j->v_entry + h * j->v_head;
    for (int64_t d = 0; d < D; d++) key[d * PANEL] = k[d];
    for (int64_t d = 0; d < D; d += PANEL) memcpy(value + d / PANEL * BUNDLE * PANEL, v + d, PANEL * sizeof(float));
  }
}

/* Those that some query from `first` to `newest` sees. */
static void choose(const lifespan_job *j, int64_t b, int64_t h, int32_t first, int32_t newest, room *r) {
  const int64_t at = (b * j->K + h) * j->E;
  const int32_t *position = j->position + at, *last = j->last + at;
  entries *own = &r->own;
  int64_t n = 0;
  for (int64_t e = 0; e < j->E; e++) {
    if (position[e] < 0 || position[e] > newest || last[e] < first) continue;
    r->chosen[n] = (int32_t)e, own->position[n] = position[e], own->last[n] = last[e];
    if (j->bias) own->bias[n] = j->bias[at + e];
    n++;
  }
  own->count = n;
  for (; n % BUNDLE; n++) own->position[n] = NEVER, own->last[n] = -1, own->bias[n] = 0.0f;
  for (int64_t g = 0; g < n; g += BUNDLE) {
    const int64_t have = own->count - g < BUNDLE ? own->count - g : BUNDLE;
    lay_out(j, b, h, r->chosen + g, 0, have, own->keys + g * j->D, own->values + g * j->D);
  }
}

/* One row's logits of a group become its weights; gives what its former sums are worth now. `n` is a multiple of PANEL. */
INLINE float soften(float *s, int64_t n, const float *bias, float softcap, const int32_t *position, const int32_t *last,
                    int32_t at, int hidden, float *top, float *total) {
  vec most = splat(*top), sums = splat(0.0f);
  for (int64_t i = 0; i < n; i += LANES) {
    vec x = load(s + i);
    if (softcap > 0.0f) x = tanh_of(x / splat(softcap)) * splat(softcap);
    if (bias) x += load(bias + i);
    if (hidden) {
      ivec p, l;
      memcpy(&p, position + i, sizeof p), memcpy(&l, last + i, sizeof l);
      const ivec now = (ivec){0} + at, seen = (p <= now) & (l >= now);
      x = (vec)((seen & (ivec)x) | (~seen & (ivec)splat(-INFINITY)));
    }
    if (hidden || bias || softcap > 0.0f) store(s + i, x);
    most = larger(x, most);
  }
  const float newest = largest_of(most), factor = exp_one(*top - newest);
  for (int64_t i = 0; i < n; i += LANES) {
    const vec weight = exp_negative(load(s + i) - splat(newest));
    store(s + i, weight);
    sums += weight;
  }
  *total = *total * factor + sum_of(sums), *top = newest;
  return factor;
}

/* Some queries of one KV head over the entries laid out: query `first` of the row on, `n` of them. */
static void attend(const lifespan_job *j, int64_t b, int64_t h, int64_t first, int64_t n, const int32_t *at,
                   const entries *e, room *r) {
  const int64_t D = j->D, G = j->H / j->K, rows = n * G, whole = (rows + ROWS - 1) / ROWS * ROWS;
  int32_t oldest = NEVER, newest = -1;
  for (int64_t t = 0; t < n; t++) {
    if (at[t] < 0) continue;
    oldest = at[t] < oldest ? at[t] : oldest, newest = at[t] > newest ? at[t] : newest;
  }
  for (int64_t i = 0; i < whole; i++) {
    const float *q = j->q + b * j->q_row + (first + i / G) * j->q_token + (h * G + i % G) * j->q_head;
    for (int64_t d = 0; d < D; d++) r->query[i * D + d] = i < rows ? q[d] * (float)j->scale : 0.0f;
    r->tops[i] = LEAST, r->totals[i] = 0.0f;
  }
  memset(r->sums, 0, whole * D * sizeof(float));
  for (int64_t g = 0; g < e->count; g += BUNDLE) {
    const int32_t *position = e->position + g, *last = e->last + g;
    int64_t seen = 0;
    int hidden = 0;
    for (int64_t i = 0; i < BUNDLE; i++) {
      if (position[i] <= newest && last[i] >= oldest) seen = i + 1;
      hidden |= position[i] > oldest || last[i] < newest;
    }
    if (!seen) continue;
    seen = (seen + PANEL - 1) / PANEL * PANEL;
    for (int64_t p = 0; p < seen; p += PANEL)
      for (int64_t i = 0; i < whole; i += ROWS)
        tile(r->query + i * D, D, e->keys + (g + p) * D, D, r->logits + i * BUNDLE + p, BUNDLE, 0);
    for (int64_t i = 0; i < rows; i++) {
      const float factor = soften(r->logits + i * BUNDLE, seen, j->bias ? e->bias + g : NULL, (float)j->softcap, position, last,
                                  at[i / G], hidden, r->tops + i, r->totals + i);
      if (factor == 1.0f) continue;
      for (int64_t d = 0; d < D; d += LANES) store(r->sums + i * D + d, load(r->sums + i * D + d) * splat(factor));
    }
    for (int64_t d = 0; d < D; d += PANEL)
      for (int64_t i = 0; i < whole; i += ROWS)
        tile(r->logits + i * BUNDLE, BUNDLE, e->values + g * D + d * BUNDLE, seen, r->sums + i * D + d, D, 1);
  }
  for (int64_t i = 0; i < rows; i++) {
    float *out = j->out + ((b * j->T + first + i / G) * j->H + h * G + i % G) * D;
    const int nothing = at[i / G] < 0 || r->totals[i] == 0.0f;
    for (int64_t d = 0; d < D; d++) out[d] = nothing ? 0.0f : r->sums[i * D + d] / r->totals[i];
  }
}

/* Item `number`: the last queries first, which have the most to look at. */
static void one(plan *p, int64_t number, room *r) {
  const lifespan_job *j = p->job;
  const int64_t streams = j->B * j->K, blocks = p->items / streams, stream = number % streams;
  const int64_t b = stream / j->K, h = stream % j->K, begin = (blocks - 1 - number / streams) * QUERIES;
  const int64_t n = j->T - begin < QUERIES ? j->T - begin : QUERIES, G = j->H / j->K;
  int32_t at[QUERIES], first = NEVER, newest = -1;
  for (int64_t t = 0; t < n; t++) {
    at[t] = j->query ? j->query[b * j->T + begin + t] : (int32_t)(j->E - j->T + begin + t);
    if (at[t] >= 0) first = at[t] < first ? at[t] : first, newest = at[t] > newest ? at[t] : newest;
  }
  entries all = r->own;
  if (p->keys) {
    const int64_t size = p->groups * BUNDLE * j->D;
    all = (entries){p->keys + stream * size, p->values + stream * size, p->places, p->forever, NULL, newest + 1};
  } else {
    choose(j, b, h, first, newest, r);
    all.count = r->own.count;
  }
  const int64_t step = G >= ROW_BLOCK ? 1 : ROW_BLOCK / G;
  for (int64_t t = 0; t < n; t += step)
    attend(j, b, h, begin + t, n - t < step ? n - t : step, at + t, &all, r);
}

static int make_room(const plan *p, room *r) {
  const lifespan_job *j = p->job;
  const int64_t G = j->H / j->K, all = p->groups * BUNDLE;
  const int64_t rows = ((G > ROW_BLOCK ? G : ROW_BLOCK) + ROWS - 1) / ROWS * ROWS;
  const int64_t own = p->keys ? 0 : all * (2 * j->D + 4);
  float *memory = malloc((rows * (2 * j->D + BUNDLE + 2) + own) * sizeof(float));
  if (!memory) return 1;
  r->query = memory, r->sums = r->query + rows * j->D, r->logits = r->sums + rows * j->D;
  r->tops = r->logits + rows * BUNDLE, r->totals = r->tops + rows;
  if (p->keys) return 0;
  entries *e = &r->own;
  e->keys = r->totals + rows, e->values = e->keys + all * j->D, e->bias = e->values + all * j->D;
  e->position = (int32_t *)(e->bias + all), e->last = e->position + all, r->chosen = e->last + all;
  return 0;
}

static void lay_out_all(void *argument) {
  plan *p = argument;
  const lifespan_job *j = p->job;
  for (;;) {
    const int64_t number = __atomic_fetch_add(&p->next_group, 1, __ATOMIC_RELAXED);
    if (number >= p->groups * j->B * j->K) return;
    const int64_t stream = number / p->groups, first = number % p->groups * BUNDLE, at = number * BUNDLE * j->D;
    const int64_t n = j->E - first < BUNDLE ? j->E - first : BUNDLE;
    lay_out(j, stream / j->K, stream % j->K, NULL, first, n, p->keys + at, p->values + at);
  }
}

static void work(void *argument) {
  plan *p = argument;
  room r = {0};
  if (make_room(p, &r)) {
    __atomic_store_n(&p->failed, 1, __ATOMIC_RELAXED);
    return;
  }
  for (;;) {
    const int64_t number = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED);
    if (number >= p->items) break;
    one(p, number, &r);
  }
  free(r.query);
}

static void run(const lifespan_job *j, void (*what)(void *), plan *p) {
  if (j->parallel && j->threads > 1) j->parallel(what, p, (unsigned)j->threads, 0);
  else what(p);
}

/* Channels of a head must be a multiple of this. */
int64_t kvfold_lifespan_panel(void) { return PANEL; }

/* 0, or 1 where there was no memory. */
int kvfold_lifespan(const lifespan_job *j) {
  plan p = {.job = j, .groups = (j->E + BUNDLE - 1) / BUNDLE, .items = (j->T + QUERIES - 1) / QUERIES * j->B * j->K};
  float *memory = NULL;
  if (!j->last) {
    const int64_t all = p.groups * BUNDLE, size = j->B * j->K * all * j->D;
    memory = malloc((2 * size + 2 * all) * sizeof(float));
    if (!memory) return 1;
    p.keys = memory, p.values = memory + size, p.places = (int32_t *)(p.values + size), p.forever = p.places + all;
    for (int64_t e = 0; e < all; e++) p.places[e] = e < j->E ? (int32_t)e : NEVER, p.forever[e] = NEVER;
    run(j, lay_out_all, &p);
  }
  run(j, work, &p);
  free(memory);
  return (int)p.failed;
}

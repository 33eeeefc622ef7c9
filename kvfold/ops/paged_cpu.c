/* Decode attention over a paged, ragged KV cache, read in place: the CPU twin of paged.py's reference.
 *
 * One query token a sequence. A stream is one (sequence, KV head): a length and a list of pages. Its G query heads share
 * every key and value that is read. Streams are cut into items of about equal length that threads take from one queue; an
 * item's softmax runs online over blocks of slots, and who finishes a stream's last item joins its items by the log of
 * their sums. Vectors are in paged_simd.h, the inner loops in paged_tiles.c. Letters as in docs/notation.md.
 */
#include <stdlib.h>

#include "paged_tiles.h"

#define BLOCK 256            /* slots whose logits are held at once */
#define LINE (BLOCK + LANES) /* floats between the logits of two heads */
#define ITEMS_A_THREAD 16    /* so many that threads end together */
#define AHEAD_BYTES 8192     /* how far ahead memory is asked for */
#define THREAD_BYTES 65536   /* what a further thread is worth waking up for */

static const int64_t BITS[] = {32, 16, 16, 8, 8, 4};

typedef struct {
  uint8_t *k, *v;              /* pools [P, N, width] */
  uint16_t *k_scale, *v_scale; /* fp16 [P, N, S] of int8 and int4 pools, else NULL */
  float *score;                /* [P, N] or NULL: the weight each key receives is added here */
  const void *bias;            /* [P, N] fp16 or fp32, or NULL */
  const int32_t *position;     /* [P, N] */
  const int32_t *table;        /* page ids of all streams */
  const int64_t *start;        /* [B, K]: where a stream's pages begin in the table */
  const int32_t *length;       /* [B, K] */
  const int64_t *slots;        /* [B, K] or NULL: where the new k, v are written before attending; -1 = nowhere */
  const uint8_t *live;         /* [B] or NULL: a sequence that is not live gets zeros */
  const int32_t *oldest;       /* [B] or NULL: keys at earlier positions are not seen */
  const uint8_t *q;            /* [B, K, G, D] */
  const uint8_t *k_new;        /* [B, K, D] of q's kind, or NULL */
  const uint8_t *v_new;
  uint8_t *out;                /* [B, K, G, D] of q's kind */
  float *received;             /* [B, K, E] or NULL: weights are added here, the new token's in column E - 1 */
  products_fn products;        /* paged_tiles.c for the keys' storage, and for that of the values */
  sums_fn sums;
  parallel_fn parallel;        /* GOMP_parallel of the OpenMP that torch uses, or NULL: one thread */
  int64_t B, K, G, D, P, N, E, threads;
  int64_t k_kind, v_kind, q_kind, bias_kind, received_old;
  double scale, softcap;       /* softcap 0 = none */
} decode_job;

/* A stretch of one stream. Its part holds what its softmax has come to: sums [heads, row], tops [heads], totals [heads]. */
typedef struct {
  int32_t stream, first, last;
} item;

typedef struct {
  const decode_job *job;
  shape k, v;
  int64_t streams, num_items, threads;
  int64_t heads, tile;                   /* heads that are worked out: G rounded up to whole tiles */
  int64_t row, part_floats, room_floats; /* row: floats of a head's sums */
  int64_t stride;                        /* logits that are kept for a head, where weights are handed out; else 0 */
  int64_t next, next_thread, next_write; /* counters that threads share */
  item *items;
  int32_t *first_item, *left; /* [streams]: a stream's first item, and how many are not done */
  float *parts, *rooms, *kept;
} plan;

/* Up to RUN entries that lie side by side; `first` counts from the block's first entry. */
typedef struct {
  int64_t slot;
  int32_t first, n;
} stretch;

/* Where a block's entries lie. */
typedef struct {
  int64_t count;
  stretch at[BLOCK];
} map;

/* What one thread works with. */
typedef struct {
  float *query, *logits, *scales, *weights, *bias, *joined, *tops, *shares;
  uint8_t *hidden, *padded;
  map *here, *next; /* of the block at hand and of the one after it, be it another item's */
} room;

static void write_vector(const shape *s, int64_t slot, const uint8_t *vector, int64_t D, int64_t kind) {
  uint8_t *to = s->pool + slot * s->row_bytes;
  if (s->kind == kind) {
    memcpy(to, vector, s->row_bytes);
    return;
  }
  for (int64_t first = 0, group = 0; first < D; first += GROUP, group++) {
    const int64_t n = D - first < GROUP ? D - first : GROUP, half = (n + 1) / 2;
    float x[GROUP];
    int32_t codes[GROUP + 1] = {0};
    for (int64_t i = 0; i < n; i++) x[i] = read_number(vector, first + i, kind);
    if (s->kind <= FP16)
      for (int64_t i = 0; i < n; i++) write_number(to, first + i, s->kind, x[i]);
    if (s->kind == FP8)
      for (int64_t i = 0; i < n; i++) to[first + i] = fp8_of(x[i]);
    if (s->kind < INT8) continue;
    codes_of(x, n, s->kind == INT8, codes, s->scale + slot * s->scale_groups + group);
    if (s->kind == INT8)
      for (int64_t i = 0; i < n; i++) to[first + i] = (uint8_t)codes[i];
    else /* an odd group has no channel for its last high nibble: 0 */
      for (int64_t i = 0; i < half; i++)
        to[first / 2 + i] = (codes[i] + 8) | (half + i < n ? codes[half + i] + 8 : 0) << 4;
  }
}

static void write_new(void *argument) {
  plan *p = argument;
  const decode_job *job = p->job;
  const int64_t bytes = job->D * BITS[job->q_kind] / 8, CHUNK = 16;
  for (int64_t first; (first = __atomic_fetch_add(&p->next_write, CHUNK, __ATOMIC_RELAXED)) < p->streams;)
    for (int64_t i = first; i < first + CHUNK && i < p->streams; i++) {
      if (job->slots[i] < 0 || (job->live && !job->live[i / job->K])) continue;
      write_vector(&p->k, job->slots[i], job->k_new + i * bytes, job->D, job->q_kind);
      write_vector(&p->v, job->slots[i], job->v_new + i * bytes, job->D, job->q_kind);
    }
}

/* Where the entries [first, last) of a stream lie, a block at most. */
static void map_block(const decode_job *job, int64_t stream, int64_t first, int64_t last, map *m) {
  const int64_t N = job->N;
  const int32_t *page = job->table + job->start[stream] + first / N;
  int64_t within = first % N;
  m->count = 0;
  for (int64_t i = first, n; i < last; i += n) {
    const int64_t most = last - i < RUN ? last - i : RUN;
    stretch *at = &m->at[m->count++];
    at->slot = *page * N + within;
    n = N - within;
    while (n < most && page[1] == page[0] + 1) page++, n += N;
    within = n <= most ? 0 : N - (n - most);
    page += n <= most;
    if (n > most) n = most;
    at->first = (int32_t)(i - first), at->n = (int32_t)n;
  }
}

static const uint8_t *rows_at(const shape *s, room *t, int64_t slot) {
  const uint8_t *rows = s->pool + slot * s->row_bytes;
  return slot < s->safe ? rows : memcpy(t->padded, rows, s->row_bytes);
}

/* How many of n vectors from `slot` on may be read in whole units; what lies beyond is read one by one. */
INLINE int64_t readable(const shape *s, int64_t slot, int64_t n) {
  return slot + n <= s->safe ? n : slot < s->safe ? s->safe - slot : 1;
}

/* What is read `ahead` stretches after stretch i of a pass that ends with `here` and goes on with `next`; NULL: not known. */
static const uint8_t *ahead_of(const shape *s, const map *here, int64_t i, const shape *next_s, const map *next) {
  i += s->ahead;
  if (i >= here->count) {
    i -= here->count, here = next, s = next_s;
    if (i >= here->count) return NULL;
  }
  const int64_t slot = here->at[i].slot;
  if (s->scale) prefetch((const uint8_t *)(s->scale + slot * s->scale_groups), 2 * s->scale_groups * here->at[i].n);
  return s->pool + slot * s->row_bytes;
}

/* Scales of n slots as [S, RUN]. */
static const float *read_scales(const shape *s, room *t, int64_t slot, int64_t n) {
  const int64_t S = s->scale_groups, count = n * S;
  const uint16_t *halves = s->scale + slot * S;
  float *from = t->scales, *to = t->scales + (S * RUN + 2 * LANES);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(from + i, floats_of_halves((const uint8_t *)(halves + i)));
  for (; i < count; i++) from[i] = half_to_float(halves[i]);
  if (S & (S - 1)) {
    for (int64_t g = 0; g < S; g++)
      for (int64_t j = 0; j < n; j++) to[g * RUN + j] = from[j * S + g];
    return to;
  }
  /* Row r has the groups r, r + S / width, ...: every pass parts it into two rows. */
  for (int64_t width = S; width > 1; width /= 2) {
    for (int64_t r = 0; r < S / width; r++)
      for (int64_t j = 0; j < n * width; j += 2 * LANES) {
        vec even, odd;
        split(load(from + r * width * RUN + j), load(from + r * width * RUN + j + LANES), &even, &odd);
        store(to + r * width / 2 * RUN + j / 2, even);
        store(to + (r + S / width) * width / 2 * RUN + j / 2, odd);
      }
    float *other = from;
    from = to, to = other;
  }
  return from;
}

/* Logits of a tile of heads with the keys of a block. */
static void block_products(const plan *p, room *t, int64_t g) {
  const shape *s = &p->k;
  const float *query = t->query + g * s->units * 2 * LANES;
  for (int64_t i = 0; i < t->here->count; i++) {
    const stretch *at = &t->here->at[i];
    const uint8_t *ahead = ahead_of(s, t->here, i, &p->v, t->here);
    for (int64_t j = 0, n; j < at->n; j += n) {
      n = readable(s, at->slot + j, at->n - j);
      const uint8_t *rows = rows_at(s, t, at->slot + j);
      const run r = {rows, ahead ? ahead + j * s->row_bytes : rows, s->scale ? read_scales(s, t, at->slot + j, n) : NULL, n};
      p->job->products(s, &r, query, t->logits + at->first + j, LINE, (int)p->tile);
    }
  }
}

/* Adds the block's values under their weights (in t->logits) to a tile of heads; hidden entries are never read. */
static void block_sums(const plan *p, room *t, float *out, int any_hidden) {
  const shape *s = &p->v;
  for (int64_t i = 0; i < t->here->count; i++) {
    const stretch *at = &t->here->at[i];
    const uint8_t *ahead = ahead_of(s, t->here, i, &p->k, t->next);
    for (int64_t j = 0, n; j < at->n; j += n) {
      n = readable(s, at->slot + j, at->n - j);
      const uint8_t *hidden = t->hidden + at->first + j;
      if (any_hidden) {
        int64_t same = 1;
        while (same < n && hidden[same] == hidden[0]) same++;
        n = same;
        if (hidden[0]) continue;
      }
      const uint8_t *rows = rows_at(s, t, at->slot + j);
      const float *weights = t->logits + at->first + j, *scales = NULL;
      int64_t line = LINE;
      if (s->scale) {
        scales = read_scales(s, t, at->slot + j, n);
        for (int64_t h = 0; h < p->tile; h++)
          for (int64_t group = 0; group < s->scale_groups; group++)
            for (int64_t k = 0; k < n; k += LANES)
              store(t->weights + (h * s->scale_groups + group) * RUN + k,
                    load(weights + h * LINE + k) * load(scales + group * RUN + k));
        weights = t->weights, line = RUN;
      }
      const run r = {rows, ahead ? ahead + j * s->row_bytes : rows, scales, n};
      p->job->sums(s, &r, weights, line, out, (int)p->tile);
    }
  }
}

/* Reads the biases of a block and which of its entries are too old; whether any is. */
static int look_up(const plan *p, room *t, int64_t stream) {
  const decode_job *job = p->job;
  int any_hidden = 0;
  if (!job->bias && !job->oldest) return 0;
  const int32_t oldest = job->oldest ? job->oldest[stream / job->K] : 0;
  for (const stretch *at = t->here->at; at < t->here->at + t->here->count; at++) {
    if (job->bias)
      for (int64_t j = 0; j < at->n; j++) t->bias[at->first + j] = read_number(job->bias, at->slot + j, job->bias_kind);
    if (job->oldest)
      for (int64_t j = 0; j < at->n; j++)
        any_hidden |= t->hidden[at->first + j] = job->position[at->slot + j] < oldest;
  }
  return any_hidden;
}

/* Caps, biases and hides one head's n logits, and gives the largest: -inf where none is seen, NaN where one is NaN. */
static float finish_logits(const plan *p, const room *t, float *logits, int64_t n, int any_hidden) {
  const decode_job *job = p->job;
  const vec cap = splat((float)job->softcap);
  vec top = splat(-INFINITY);
  ivec wrong = {0};
  if (job->softcap > 0)
    for (int64_t i = 0; i < n; i += LANES) store(logits + i, cap * tanh_of(load(logits + i) / cap));
  if (job->bias)
    for (int64_t i = 0; i < n; i += LANES) store(logits + i, load(logits + i) + load(t->bias + i));
  if (any_hidden)
    for (int64_t i = 0; i < n; i++)
      if (t->hidden[i]) logits[i] = -INFINITY;
  for (int64_t i = n; i % LANES; i++) logits[i] = -INFINITY;
  for (int64_t i = 0; i < n; i += LANES) {
    const vec x = load(logits + i);
    top = larger(x, top);
    wrong |= (ivec)(x != x);
  }
  return sum_of(masked(splat(1.0f), wrong)) > 0.0f ? NAN : largest_of(top);
}

/* exp(logit - top) in place for n logits; gives the sum. */
static float soften(float *logits, int64_t n, float top) {
  vec total = splat(0.0f);
  for (int64_t i = 0; i < n; i += LANES) {
    const vec x = exp_negative(load(logits + i) - splat(top));
    store(logits + i, x);
    total += x;
  }
  return sum_of(total);
}

static void stage_query(const plan *p, room *t, int64_t stream) {
  const decode_job *job = p->job;
  const int64_t width = p->k.units * 2 * LANES;
  const float factor = (float)job->scale * p->k.gain;
  memset(t->query, 0, sizeof(float) * p->heads * width);
  for (int64_t g = 0; g < job->G; g++)
    for (int64_t d = 0; d < job->D; d++)
      t->query[g * width + p->k.place[d]] = read_number(job->q, (stream * job->G + g) * job->D + d, job->q_kind) * factor;
}

/* Takes an item from the queue and looks up its first block: t->next. */
static int64_t claim(plan *p, room *t) {
  const int64_t index = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED);
  t->next->count = 0;
  if (index < p->num_items) {
    const item *it = &p->items[index];
    map_block(p->job, it->stream, it->first, it->last - it->first > BLOCK ? it->first + BLOCK : it->last, t->next);
  }
  return index;
}

/* Attends over the item, whose first block is t->next; claims the next one before its own last block, and gives its index. */
static int64_t attend_item(plan *p, int64_t index, room *t) {
  const int64_t stream = p->items[index].stream, end = p->items[index].last, G = p->job->G;
  float *part = p->parts + index * p->part_floats, *tops = part + p->heads * p->row, *totals = tops + p->heads;
  int64_t first = p->items[index].first, next = -1;
  memset(part, 0, sizeof(float) * p->part_floats);
  for (int64_t g = 0; g < p->heads; g++) tops[g] = -INFINITY;
  stage_query(p, t, stream);
  for (int64_t last; first < end; first = last) {
    last = end - first > BLOCK ? first + BLOCK : end;
    map *other = t->here;
    t->here = t->next, t->next = other;
    if (last == end) next = claim(p, t);
    else map_block(p->job, stream, last, end - last > BLOCK ? last + BLOCK : end, t->next);
    const int any_hidden = look_up(p, t, stream);
    for (int64_t g = 0; g < p->heads; g += p->tile) {
      block_products(p, t, g);
      for (int64_t h = g; h < g + p->tile && h < G; h++) {
        float *logits = t->logits + (h - g) * LINE, top = finish_logits(p, t, logits, last - first, any_hidden);
        if (p->stride) memcpy(p->kept + (stream * G + h) * p->stride + first, logits, sizeof(float) * (last - first));
        if (tops[h] >= top || tops[h] != tops[h]) top = tops[h];
        if (top == -INFINITY) {
          memset(logits, 0, sizeof(float) * (last - first));
          continue;
        }
        const float factor = exp_one(tops[h] - top);
        totals[h] = totals[h] * factor + soften(logits, last - first, top);
        if (tops[h] != top)
          for (int64_t d = 0; d < p->row; d += LANES)
            store(part + h * p->row + d, load(part + h * p->row + d) * splat(factor));
        tops[h] = top;
      }
      block_sums(p, t, part + g * p->row, any_hidden);
    }
  }
  return next >= 0 ? next : claim(p, t);
}

/* Adds the weights of the stream's entries to their scores and to `received`. */
static void hand_out(const plan *p, room *t, int64_t stream) {
  const decode_job *job = p->job;
  const int64_t entries = job->live && !job->live[stream / job->K] ? 0 : job->length[stream];
  float *received = job->received && job->received_old ? job->received + stream * job->E : NULL;
  for (int64_t first = 0, last; first < entries; first = last) {
    last = first + BLOCK < entries ? first + BLOCK : entries;
    float *sums = t->logits;
    memset(sums, 0, sizeof(float) * BLOCK);
    for (int64_t g = 0; g < job->G; g++) {
      const float *kept = p->kept + (stream * job->G + g) * p->stride + first;
      if (t->tops[g] == -INFINITY) continue;
      for (int64_t i = 0; i < last - first; i += LANES) {
        const vec weight = exp_negative(load(kept + i) - splat(t->tops[g])) * splat(t->shares[g]);
        store(sums + i, load(sums + i) + weight);
      }
    }
    for (int64_t i = 0; received && i < last - first; i++) received[first + i] += sums[i];
    if (!job->score) continue;
    map_block(job, stream, first, last, t->here);
    for (const stretch *at = t->here->at; at < t->here->at + t->here->count; at++)
      for (int64_t j = 0; j < at->n; j++) job->score[at->slot + j] += sums[at->first + j];
  }
}

/* Joins the items of a stream, and the new token where it is not stored, into the output. */
static void finish_stream(const plan *p, room *t, int64_t stream) {
  const decode_job *job = p->job;
  const int64_t D = job->D, number = p->heads * p->row;
  const int apart = job->k_new && !job->slots && !(job->live && !job->live[stream / job->K]);
  for (int64_t g = 0; g < job->G; g++) {
    const int64_t line = (stream * job->G + g) * D;
    float top = -INFINITY, total = 0.0f, share = 0.0f, logit = 0.0f;
    if (apart) {
      for (int64_t d = 0; d < D; d++)
        logit += read_number(job->q, line + d, job->q_kind) * read_number(job->k_new, stream * D + d, job->q_kind);
      logit *= (float)job->scale;
      if (job->softcap > 0) logit = (float)job->softcap * tanh_one(logit / (float)job->softcap);
      top = logit;
    }
    for (int64_t i = p->first_item[stream]; i < p->num_items && p->items[i].stream == stream; i++) {
      const float other = p->parts[i * p->part_floats + number + g];
      if (other > top || other != other) top = other;
    }
    memset(t->joined, 0, sizeof(float) * p->row);
    for (int64_t i = p->first_item[stream]; i < p->num_items && p->items[i].stream == stream; i++) {
      const float *part = p->parts + i * p->part_floats, other = part[number + g];
      if (other == -INFINITY) continue;
      const float factor = exp_one(other - top);
      total += factor * part[number + p->heads + g];
      for (int64_t d = 0; d < p->row; d += LANES)
        store(t->joined + d, load(t->joined + d) + splat(factor) * load(part + g * p->row + d));
    }
    if (apart) share = exp_one(logit - top), total += share;
    t->tops[g] = top, t->shares[g] = 1.0f / total;
    for (int64_t d = 0; d < D; d++) {
      float x = t->joined[p->v.place[d]] * p->v.gain;
      if (apart && share != 0.0f) x += share * read_number(job->v_new, stream * D + d, job->q_kind);
      write_number(job->out, line + d, job->q_kind, top == -INFINITY ? 0.0f : x / total);
    }
    if (apart && job->received) job->received[stream * job->E + job->E - 1] += share / total;
  }
  if (p->stride) hand_out(p, t, stream);
}

/* Lays a thread's arrays out from `from` on (NULL: nowhere) and gives the floats that they take. */
static int64_t room_layout(const plan *p, float *from, room *t) {
  int64_t used = 0;
  const int64_t groups = p->k.scale_groups > p->v.scale_groups ? p->k.scale_groups : p->v.scale_groups;
  const int64_t widest = (p->k.units > p->v.units ? p->k.units : p->v.units) * 2 * LANES;
#define TAKE(floats) (used += ((floats) + 15) / 16 * 16, from ? from + used - ((floats) + 15) / 16 * 16 : NULL)
  t->query = TAKE(p->heads * p->k.units * 2 * LANES);
  t->logits = TAKE(p->tile * LINE);
  t->scales = TAKE(2 * (groups * RUN + 2 * LANES));
  t->weights = TAKE(p->tile * p->v.scale_groups * RUN);
  t->bias = TAKE(LINE);
  t->joined = TAKE(p->row);
  t->tops = TAKE(p->heads);
  t->shares = TAKE(p->heads);
  t->hidden = (uint8_t *)TAKE(BLOCK / 4);
  t->padded = (uint8_t *)TAKE(widest);
  t->here = (map *)TAKE(sizeof(map) / sizeof(float));
  t->next = (map *)TAKE(sizeof(map) / sizeof(float));
#undef TAKE
  return used;
}

static void work(void *argument) {
  plan *p = argument;
  room t;
  room_layout(p, p->rooms + __atomic_fetch_add(&p->next_thread, 1, __ATOMIC_RELAXED) * p->room_floats, &t);
  int64_t index = claim(p, &t);
  while (index < p->num_items) {
    const int64_t next = attend_item(p, index, &t), stream = p->items[index].stream;
    if (__atomic_sub_fetch(&p->left[stream], 1, __ATOMIC_ACQ_REL) == 0) finish_stream(p, &t, stream);
    index = next;
  }
}

/* Where channel d stands in a row of units, and what of a vector's last unit is channels. */
static void map_channels(shape *s, int64_t D) {
  for (int64_t d = 0; d < D; d++) {
    int64_t place = d;
    if (s->kind == BF16) place = d / (2 * LANES) * 2 * LANES + d % 2 * LANES + d / 2 % LANES;
    if (s->kind == INT4) {
      const int64_t first = d / GROUP * GROUP, n = D - first < GROUP ? D - first : GROUP, half = (n + 1) / 2;
      const int64_t high = d - first >= half, byte = first / 2 + d - first - high * half;
      place = byte / LANES * 2 * LANES + high * LANES + byte % LANES;
    }
    s->place[d] = (int32_t)place;
    if (place >= (s->units - 1) * 2 * LANES) s->mask[place / LANES % 2][place % LANES] = -1;
  }
}

static shape shape_of(const decode_job *job, uint8_t *pool, uint16_t *scale, int64_t kind, int32_t *place) {
  shape s = {.pool = pool, .scale = scale, .kind = kind, .place = place, .gain = kind == FP8 ? 256.0f : 1.0f};
  s.row_bytes = (job->D * BITS[kind] + 7) / 8;
  s.unit_bytes = 2 * LANES * BITS[kind] / 8;
  s.units = (s.row_bytes + s.unit_bytes - 1) / s.unit_bytes;
  s.whole = s.row_bytes / s.unit_bytes;
  s.scale_groups = scale ? (job->D + GROUP - 1) / GROUP : 0;
  s.ahead = 1 + AHEAD_BYTES / (s.row_bytes * (job->N < RUN ? job->N : RUN));
  s.safe = (job->P * job->N * s.row_bytes - s.units * s.unit_bytes) / s.row_bytes + 1;
  if (s.units * s.unit_bytes > job->P * job->N * s.row_bytes) s.safe = 0;
  map_channels(&s, job->D);
  return s;
}

/* Query heads that share a key as it is read: as few tiles as registers allow, of about equal size. */
static int64_t tile_of(int64_t G) {
  const int64_t tiles = (G + MOST_HEADS - 1) / MOST_HEADS, even = (G + tiles - 1) / tiles;
  return even == 5 ? 6 : even == 7 ? 8 : even;
}

static void cut_items(plan *p, int64_t span) {
  const decode_job *job = p->job;
  p->num_items = 0;
  for (int64_t i = 0; i < p->streams; i++) {
    const int64_t entries = job->live && !job->live[i / job->K] ? 0 : job->length[i];
    p->first_item[i] = (int32_t)p->num_items;
    for (int64_t first = 0; first == 0 || first < entries; first += span)
      p->items[p->num_items++] = (item){(int32_t)i, (int32_t)first, (int32_t)(first + span < entries ? first + span : entries)};
    p->left[i] = (int32_t)p->num_items - p->first_item[i];
  }
}

static void in_parallel(const plan *p, void (*function)(void *), int64_t threads) {
  if (threads > 1) p->job->parallel(function, (void *)p, (unsigned)threads, 0);
  else function((void *)p);
}

/* 0, or 1 where there is no memory. */
int kvfold_decode(const decode_job *job) {
  plan p = {.job = job, .streams = job->B * job->K};
  int64_t total = 0, longest = 0;
  for (int64_t i = 0; i < p.streams; i++) {
    if (job->live && !job->live[i / job->K]) continue;
    total += job->length[i];
    if (job->length[i] > longest) longest = job->length[i];
  }
  int32_t *places = malloc(sizeof(int32_t) * 2 * job->D);
  if (!places) return 1;
  p.k = shape_of(job, job->k, job->k_scale, job->k_kind, places);
  p.v = shape_of(job, job->v, job->v_scale, job->v_kind, places + job->D);
  p.threads = 1 + total * (p.k.row_bytes + p.v.row_bytes) / THREAD_BYTES;
  if (p.threads > job->threads) p.threads = job->threads;
  if (!job->parallel || p.threads < 1) p.threads = 1;
  int64_t span = INT32_MAX, most_items = p.streams;
  if (p.threads > 1) {
    span = (total / (p.threads * ITEMS_A_THREAD) + BLOCK) / BLOCK * BLOCK;
    most_items += total / span;
  }
  p.tile = tile_of(job->G);
  p.heads = (job->G + p.tile - 1) / p.tile * p.tile;
  p.row = p.v.units * 2 * LANES;
  p.part_floats = (p.heads * (p.row + 2) + 15) / 16 * 16;
  room t;
  p.room_floats = room_layout(&p, NULL, &t);
  if (job->score || (job->received && job->received_old)) p.stride = longest + LANES;
  const int64_t floats = most_items * p.part_floats + p.threads * p.room_floats + p.streams * job->G * p.stride;
  const int64_t words = most_items * 3 + 2 * p.streams;
  float *memory = malloc(64 + 4 * (floats + words));
  if (memory) {
    p.parts = (float *)(((uintptr_t)memory + 63) / 64 * 64);
    p.rooms = p.parts + most_items * p.part_floats;
    p.kept = p.rooms + p.threads * p.room_floats;
    p.items = (item *)(p.kept + p.streams * job->G * p.stride);
    p.first_item = (int32_t *)(p.items + most_items);
    p.left = p.first_item + p.streams;
    cut_items(&p, span);
    const int64_t written = job->slots && job->k_new ? p.streams * (p.k.row_bytes + p.v.row_bytes) : 0;
    if (written) in_parallel(&p, write_new, written > THREAD_BYTES ? p.threads : 1);
    in_parallel(&p, work, p.threads);
  }
  free(memory);
  free(places);
  return memory == NULL;
}

const char *kvfold_isa(void) { return ISA; }

/* Sum of n floats, for `kvfold bench kernel`: what reading alone takes. */
typedef struct {
  const float *from;
  int64_t n, threads, next;
  float sum;
} read_job;

static void read_some(void *argument) {
  read_job *job = argument;
  const int64_t CHUNK = 1 << 16;
  vec sums[4] = {splat(0), splat(0), splat(0), splat(0)};
  for (int64_t first; (first = __atomic_fetch_add(&job->next, CHUNK, __ATOMIC_RELAXED)) < job->n;)
    for (int64_t i = first; i + 4 * LANES <= first + CHUNK && i + 4 * LANES <= job->n; i += 4 * LANES)
      for (int j = 0; j < 4; j++) sums[j] += load(job->from + i + j * LANES);
  job->sum = sum_of(sums[0] + sums[1] + sums[2] + sums[3]);
}

float kvfold_read(const float *from, int64_t n, int64_t threads, parallel_fn parallel) {
  read_job job = {from, n, threads, 0, 0.0f};
  if (parallel && threads > 1) parallel(read_some, &job, (unsigned)threads, 0);
  else read_some(&job);
  return job.sum;
}

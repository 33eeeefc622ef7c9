/* Decode attention in C alone, against loops in double: for instruction sets that Python doesn't run on here, and for
 * tools that find reads out of bounds (every array has exactly its size). Linked with paged_cpu.c and, for each storage X,
 * paged_tiles.c compiled with -Dkvfold_products=products_X -Dkvfold_sums=sums_X. Prints the largest error, or fails.
 */
#include <stdio.h>
#include <stdlib.h>

#include "../../kvfold/ops/paged_cpu.c"

#define DECLARE(X)                                                                             \
  void products_##X(const shape *, const run *, const float *, float *, int64_t, int); \
  void sums_##X(const shape *, const run *, const float *, int64_t, float *, int);
DECLARE(fp32) DECLARE(bf16) DECLARE(fp16) DECLARE(fp8) DECLARE(int8) DECLARE(int4)
static const products_fn PRODUCTS[] = {products_fp32, products_bf16, products_fp16, products_fp8, products_int8, products_int4};
static const sums_fn SUMS[] = {sums_fp32, sums_bf16, sums_fp16, sums_fp8, sums_int8, sums_int4};

static uint32_t state = 1;
static uint32_t draw(void) { return state = state * 1664525u + 1013904223u, state >> 8; }
static float draw_float(void) { return (float)(draw() % 2001) / 1000.0f - 1.0f; }

/* Channel d of a slot, by the format alone. */
static double stored(const uint8_t *pool, const uint16_t *scale, int64_t kind, int64_t slot, int64_t d, int64_t D) {
  const int64_t width = (D * BITS[kind] + 7) / 8, groups = (D + GROUP - 1) / GROUP;
  const uint8_t *row = pool + slot * width;
  if (kind <= FP16) return read_number(row, d, kind);
  if (kind == FP8) return half_to_float(fp8_to_half(row[d])) * 256.0;
  const double factor = half_to_float(scale[slot * groups + d / GROUP]);
  if (kind == INT8) return factor * (int8_t)row[d];
  const int64_t first = d / GROUP * GROUP, n = D - first < GROUP ? D - first : GROUP, half = (n + 1) / 2, j = d - first;
  const int code = j < half ? row[first / 2 + j] & 15 : row[first / 2 + j - half] >> 4;
  return factor * (code - 8);
}

static double check(int64_t kind, int64_t D, int64_t G, int64_t N, int64_t length) {
  const int64_t K = 2, pages = (length + N - 1) / N, P = K * pages, S = (D + GROUP - 1) / GROUP;
  const int64_t width = (D * BITS[kind] + 7) / 8;
  uint8_t *pool[2];
  uint16_t *scale[2] = {NULL, NULL};
  int32_t *position = calloc(P * N, 4), *table = malloc(P * 4), lengths[2] = {(int32_t)length, (int32_t)(length / 2)};
  int64_t start[2] = {0, pages}, slots[2];
  float *q = malloc(K * G * D * 4), *fresh[2], *out = malloc(K * G * D * 4);
  for (int64_t i = 0; i < P; i++) table[i] = (int32_t)(P - 1 - i);
  for (int64_t i = 0; i < K * G * D; i++) q[i] = draw_float();
  decode_job job = {.q = (uint8_t *)q, .out = (uint8_t *)out, .table = table, .start = start, .length = lengths, .slots = slots,
                    .position = position, .products = PRODUCTS[kind], .sums = SUMS[kind], .B = 1, .K = K, .G = G, .D = D,
                    .P = P, .N = N, .threads = 1, .k_kind = kind, .v_kind = kind, .scale = 0.3, .softcap = 5.0};
  shape sides[2];
  int32_t *place = malloc(D * 4);
  for (int side = 0; side < 2; side++) {
    pool[side] = malloc(P * N * width);
    if (kind >= INT8) scale[side] = malloc(P * N * S * 2);
    fresh[side] = malloc(K * D * 4);
    sides[side] = shape_of(&job, pool[side], scale[side], kind, place);
    for (int64_t slot = 0; slot < P * N; slot++) {
      for (int64_t d = 0; d < D; d++) fresh[side][d] = draw_float();
      write_vector(&sides[side], slot, (uint8_t *)fresh[side], D, FP32);
    }
    for (int64_t d = 0; d < K * D; d++) fresh[side][d] = draw_float();
  }
  for (int64_t h = 0; h < K; h++)
    slots[h] = lengths[h] ? table[start[h] + (lengths[h] - 1) / N] * N + (lengths[h] - 1) % N : -1;
  job.k = pool[0], job.v = pool[1], job.k_scale = scale[0], job.v_scale = scale[1];
  job.k_new = (uint8_t *)fresh[0], job.v_new = (uint8_t *)fresh[1];
  if (kvfold_decode(&job)) exit(2);
  double worst = 0;
  double *logits = malloc(sizeof(double) * (length + 1));
  for (int64_t h = 0; h < K; h++)
    for (int64_t g = h * G; g < (h + 1) * G; g++) {
      double total = 0;
      for (int64_t i = 0; i < lengths[h]; i++) {
        const int64_t slot = table[start[h] + i / N] * N + i % N;
        double sum = 0;
        for (int64_t d = 0; d < D; d++) sum += q[g * D + d] * stored(pool[0], scale[0], kind, slot, d, D);
        total += logits[i] = exp(5.0 * tanh(sum * 0.3 / 5.0));
      }
      for (int64_t d = 0; d < D; d++) {
        double sum = 0;
        for (int64_t i = 0; i < lengths[h]; i++)
          sum += logits[i] * stored(pool[1], scale[1], kind, table[start[h] + i / N] * N + i % N, d, D);
        const double error = fabs((lengths[h] ? sum / total : 0.0) - out[g * D + d]);
        if (!(error <= worst)) worst = error;
      }
    }
  void *all[] = {pool[0], pool[1], scale[0], scale[1], fresh[0], fresh[1], position, table, q, out, place, logits};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
  return worst;
}

int main(void) {
  static const int64_t DIMS[] = {1, 16, 46, 64, 80, 96, 128}, GROUPS[] = {1, 2, 3, 4, 5, 8, 9}, SLOTS[] = {1, 7, 16, 64};
  double worst = 0;
  for (int64_t kind = FP32; kind <= INT4; kind++)
    for (int64_t d = 0; d < 7; d++)
      for (int64_t turn = 0; turn < 7; turn++) {
        const int64_t length = turn ? draw() % 300 : 1;
        const double error = check(kind, DIMS[d], GROUPS[(d + turn) % 7], SLOTS[(d + turn) % 4], length);
        if (!(error <= worst)) worst = error;
        if (!(error < 1e-4)) {
          printf("kind %d, head dim %d, group %d: error %g\n", (int)kind, (int)DIMS[d], (int)GROUPS[(d + turn) % 7], error);
          return 1;
        }
      }
  printf("%s: largest error %g\n", kvfold_isa(), worst);
  return 0;
}

/* lifespan_cpu.c without Python, in buffers that end where they must, beside loops in double precision: see test_decode_check.py. */
#include <stdio.h>

#include "lifespan_cpu.c"

static uint32_t state = 1;

static int64_t drawn(int64_t below) {
  state = state * 1664525u + 1013904223u;
  return (int64_t)(state >> 8) % below;
}

static float *floats(int64_t n) {
  float *x = malloc(n * sizeof(float));
  for (int64_t i = 0; i < n; i++) x[i] = (float)drawn(2001) / 1000.0f - 1.0f;
  return x;
}

static double of_channel(const lifespan_job *j, int64_t b, int64_t t, int64_t h, int64_t d) {
  const int64_t kv = h / (j->H / j->K), at = (b * j->K + kv) * j->E;
  const int64_t query = j->query ? j->query[b * j->T + t] : j->E - j->T + t;
  double total = 0.0, sum = 0.0;
  for (int64_t e = 0; e < j->E; e++) {
    const int64_t first = j->last ? j->position[at + e] : e, last = j->last ? j->last[at + e] : INT64_MAX;
    if (query < 0 || first < 0 || first > query || last < query) continue;
    double logit = 0.0;
    for (int64_t c = 0; c < j->D; c++)
      logit += (double)j->q[((b * j->T + t) * j->H + h) * j->D + c] * j->k[((b * j->E + e) * j->K + kv) * j->D + c];
    logit *= j->scale;
    if (j->softcap > 0.0) logit = tanh(logit / j->softcap) * j->softcap;
    if (j->bias) logit += j->bias[at + e];
    const double weight = exp(logit);
    total += weight, sum += weight * j->v[((b * j->E + e) * j->K + kv) * j->D + d];
  }
  return total > 0.0 ? sum / total : 0.0;
}

static double largest_error(int64_t B, int64_t T, int64_t E, int64_t H, int64_t K, int64_t panels, int kind) {
  const int64_t D = panels * PANEL, streams = B * K;
  lifespan_job j = {.q = floats(B * T * H * D), .k = floats(B * E * K * D), .v = floats(B * E * K * D), .B = B, .T = T, .E = E,
                    .H = H, .K = K, .D = D, .threads = 1, .q_row = T * H * D, .q_token = H * D, .q_head = D,
                    .k_row = E * K * D, .k_entry = K * D, .k_head = D, .v_row = E * K * D, .v_entry = K * D, .v_head = D,
                    .scale = 0.2, .softcap = kind == 2 ? 3.0 : 0.0};
  int32_t *query = malloc(B * T * 4), *position = malloc(streams * E * 4), *last = malloc(streams * E * 4);
  for (int64_t i = 0; i < B * T; i++) query[i] = i % T < i / T ? -1 : (int32_t)(E - T + i % T);
  for (int64_t i = 0; i < streams * E; i++) {
    position[i] = drawn(7) ? (int32_t)(i % E) : -1;
    last[i] = drawn(2) ? INT32_MAX : position[i] + (int32_t)drawn(9);
  }
  if (kind) j.query = query, j.position = position, j.last = last, j.bias = floats(streams * E);
  j.out = malloc(B * T * H * D * sizeof(float));
  if (kvfold_lifespan(&j)) return INFINITY;
  double worst = 0.0;
  for (int64_t i = 0; i < B * T * H * D; i++) {
    const double error = fabs(j.out[i] - of_channel(&j, i / D / H / T, i / D / H % T, i / D % H, i % D));
    if (!(error <= worst)) worst = error;
  }
  free((void *)j.q), free((void *)j.k), free((void *)j.v), free((void *)j.bias), free(j.out);
  free(query), free(position), free(last);
  return worst;
}

int main(void) {
  double worst = 0.0;
  for (int kind = 0; kind < 3; kind++) {
    const double found[] = {largest_error(1, 1, 1, 1, 1, 1, kind), largest_error(2, 9, 13, 3, 1, 1, kind),
                            largest_error(1, 131, 140, 4, 2, 1, kind), largest_error(2, 20, 150, 2, 2, 2, kind),
                            largest_error(1, 3, 130, 97, 1, 1, kind)};
    for (int i = 0; i < 5; i++)
      if (!(found[i] <= worst)) worst = found[i];
  }
  printf("%s: largest error %.1e\n", ISA, worst);
  return worst <= 2e-5 ? 0 : 1;
}

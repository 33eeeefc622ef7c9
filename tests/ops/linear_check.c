/* linear_cpu.c without Python, in buffers that end where they must, beside loops in double precision: see test_decode_check.py. */
#include <stdio.h>

#include "linear_cpu.c"

static uint32_t state = 1;

static float *floats(int64_t n) {
  float *x = malloc(n * sizeof(float));
  for (int64_t i = 0; i < n; i++) state = state * 1664525u + 1013904223u, x[i] = (float)(state >> 8) / 8388608.0f - 1.0f;
  return x;
}

/* Panels of weights [outputs, inputs]. */
static float *panelled(const float *w, int64_t outputs, int64_t inputs) {
  const int64_t panels = (outputs + PANEL - 1) / PANEL;
  float *p = calloc(panels * inputs * PANEL, sizeof(float));
  for (int64_t o = 0; o < outputs; o++)
    for (int64_t k = 0; k < inputs; k++) p[(o / PANEL * inputs + k) * PANEL + o % PANEL] = w[o * inputs + k];
  return p;
}

static double dot(const double *x, const float *w, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; i++) sum += x[i] * w[i];
  return sum;
}

static void norm(const double *x, const float *gain, double *y, int64_t n, double eps) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
  for (int64_t i = 0; i < n; i++) y[i] = x[i] / sqrt(sum / n + eps) * gain[i];
}

static void widen(const float *x, double *y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = x[i];
}

static double worst = 0.0;

static void compare(double wanted, float found) {
  const double error = fabs(wanted - found) / (1.0 + fabs(wanted));
  if (!(error <= worst)) worst = error;
}

static void check_front(int64_t rows, int64_t width, int64_t heads, int64_t kv_heads, int64_t dims, int64_t turned) {
  const int64_t all = (heads + 2 * kv_heads) * dims, tellings = 3;
  float *w = floats(all * width), *h = floats(rows * width), *gain = floats(width), *own = floats(width), *adapter = floats(3 * width);
  float *cosines = floats(rows * turned + 1), *sines = floats(rows * turned + 1), *bias = floats(tellings);
  float *out = malloc(rows * (all + tellings) * sizeof(float)), *k = out + rows * heads * dims, *v = k + rows * kv_heads * dims;
  front_job j = {.h = h, .gain = gain, .qkv = panelled(w, all, width), .cosines = cosines, .sines = sines, .q = out, .k = k, .v = v,
                 .own_gain = own, .adapter = adapter, .bias = bias, .told = out + rows * all, .tellings = tellings, .rows = rows,
                 .width = width, .heads = heads, .kv_heads = kv_heads, .dims = dims, .turned = turned, .tokens = rows,
                 .by_token = turned, .threads = 1, .eps = 1e-5};
  if (kvfold_front(&j)) worst = INFINITY;
  double *x = malloc(width * sizeof(double)), *y = malloc(width * sizeof(double)), *wide = malloc(all * sizeof(double));
  for (int64_t r = 0; r < rows; r++) {
    widen(h + r * width, x, width);
    norm(x, gain, y, width, 1e-5);
    for (int64_t o = 0; o < all; o++) wide[o] = dot(y, w + o * width, width);
    for (int64_t o = 0; o < (heads + kv_heads) * dims; o++) {
      const int64_t head = o / dims, i = o % dims, half = turned / 2, at = r * turned + i;
      double wanted = wide[o];
      if (i < half) wanted = wide[o] * cosines[at] - wide[o + half] * sines[at];
      else if (i < turned) wanted = wide[o] * cosines[at] + wide[o - half] * sines[at];
      compare(wanted, head < heads ? out[(r * heads + head) * dims + i] : k[(r * kv_heads + head - heads) * dims + i]);
    }
    for (int64_t o = 0; o < kv_heads * dims; o++) compare(wide[(heads + kv_heads) * dims + o], v[r * kv_heads * dims + o]);
    norm(x, own, y, width, 1e-5);
    for (int64_t o = 0; o < tellings; o++) compare(dot(y, adapter + o * width, width) + bias[o], j.told[r * tellings + o]);
  }
  free((void *)j.qkv), free(w), free(h), free(gain), free(own), free(adapter), free(cosines), free(sines), free(bias), free(out);
  free(x), free(y), free(wide);
}

static void check_tail(int64_t rows, int64_t attended, int64_t width, int64_t inner) {
  float *a = floats(rows * attended), *h = floats(rows * width), *wo = floats(width * attended), *gain = floats(width);
  float *gate_up = floats(2 * inner * width), *down = floats(width * inner), *out = malloc(rows * width * sizeof(float));
  tail_job j = {.a = a, .h = h, .wo = panelled(wo, width, attended), .gain = gain, .gate_up = panelled(gate_up, 2 * inner, width),
                .down = panelled(down, width, inner), .out = out, .rows = rows, .attended = attended, .width = width,
                .inner = inner, .threads = 1, .eps = 1e-5, .factor = 0.5};
  if (kvfold_tail(&j)) worst = INFINITY;
  double *x = malloc((attended + 2 * width + inner) * sizeof(double)), *mid = x + attended, *y = mid + width, *z = y + width;
  for (int64_t r = 0; r < rows; r++) {
    widen(a + r * attended, x, attended);
    for (int64_t o = 0; o < width; o++) mid[o] = h[r * width + o] + 0.5 * dot(x, wo + o * attended, attended);
    norm(mid, gain, y, width, 1e-5);
    for (int64_t o = 0; o < inner; o++) {
      const double gate = dot(y, gate_up + o * width, width);
      z[o] = gate / (1.0 + exp(-gate)) * dot(y, gate_up + (inner + o) * width, width);
    }
    for (int64_t o = 0; o < width; o++) compare(mid[o] + 0.5 * dot(z, down + o * inner, inner), out[r * width + o]);
  }
  free((void *)j.wo), free((void *)j.gate_up), free((void *)j.down), free(x);
  free(a), free(h), free(wo), free(gain), free(gate_up), free(down), free(out);
}

int main(void) {
  check_front(1, 33, 2, 1, 6, 4), check_front(9, 64, 3, 3, 16, 16), check_front(200, 40, 2, 2, 8, 0);
  check_front(3, 64, 2, 0, 16, 16);
  check_tail(1, 33, 17, 50), check_tail(9, 64, 48, 96), check_tail(200, 24, 40, 33);
  printf("%s: largest error %.1e\n", ISA, worst);
  return worst <= 1e-4 ? 0 : 1;
}

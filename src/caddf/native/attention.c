// Attention, and rotary positions.

#include "vectors.c"

#define EPSILON 1e-6  // as `models/layers.py` has it

static void rotate(float *to, const float *x, const float *cos, const float *sin, int64_t size) {
  int64_t half = size / 2;
  if (!cos) {
    memmove(to, x, size * sizeof(float));
    return;
  }
  for (int64_t k = 0; k < half; k++) {  // the sines of the first half are negative
    float a = x[k], b = x[k + half];
    to[k] = a * cos[k] + b * sin[k];
    to[k + half] = b * cos[k + half] + a * sin[k + half];
  }
}

// Gives a vector the length `of sqrt(size)`.
static void lengthen(float *x, int64_t size, double of) {
  double squares = 0;
  for (int64_t k = 0; k < size; k++) squares += (double)x[k] * x[k];
  float factor = (float)(of / sqrt(squares / size + EPSILON));
  for (int64_t k = 0; k < size; k++) x[k] *= factor;
}

// Attention of several queries to the keys and values of one head, in tiles, so that what one query has fetched the others
// find near; each query's sums run over its keys from first to last, whatever the tiles.

enum { KEYS = 64 };  // of a tile: 16 KiB where heads have 64 channels

typedef struct {
  const float *query;               // turned
  int64_t from, to, distance;       // the slots that it sees, and its own from slot 0
  float *scores, *out, sum;
} Query;

#define SIZED static inline __attribute__((always_inline))

// Asks for the next lines.
SIZED void fetch(Ahead *ahead) {
  for (int64_t i = 0; i < ahead->lines; i++, ahead->at += 64) __builtin_prefetch(ahead->at, 0, 2);
}

// Scores of the keys `j` to `end - 1` of those that a query sees.
SIZED void score_sized(const Query *q, const float *keys, int64_t j, int64_t end, int64_t size, Ahead *ahead) {
  const float *query = q->query;
  float *scores = q->scores;
  int64_t whole = size / 8 * 8;
  keys += q->from * size;
  for (; j < end; j += 4) {
    fetch(ahead);
    v8 sums[4] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
    for (int64_t k = 0; k < whole; k += 8)
      for (int i = 0; i < 4; i++)
        if (j + i < end) sums[i] = fused(load(query + k), load(keys + (j + i) * size + k), sums[i]);
    totals(sums, scores + j);
    for (int64_t k = whole; k < size; k++)
      for (int i = 0; i < 4; i++)
        if (j + i < end) scores[j + i] += query[k] * keys[(j + i) * size + k];
  }
}

// The same of a query and the next at once, where they see the same slots: a key is fetched once. Returns where it ended.
SIZED int64_t score_both(const Query *q, const float *keys, int64_t j, int64_t end, int64_t size, Ahead *ahead) {
  const float *one = q[0].query, *two = q[1].query;
  if (q[0].from != q[1].from || size % 8) return j;
  end = least_of(end, least_of(q[0].to, q[1].to) - q->from);
  keys += q->from * size;
  for (; j + 4 <= end; j += 4) {
    fetch(ahead);
    v8 ones[4] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)}, twos[4] = {ones[0], ones[0], ones[0], ones[0]};
    for (int64_t k = 0; k < size; k += 8) {
      v8 one_k = load(one + k), two_k = load(two + k);
      for (int i = 0; i < 4; i++) {
        v8 key = load(keys + (j + i) * size + k);
        ones[i] = fused(one_k, key, ones[i]), twos[i] = fused(two_k, key, twos[i]);
      }
    }
    totals(ones, q[0].scores + j), totals(twos, q[1].scores + j);
  }
  return j;
}

// Weights in the place of scores, and their sum.
static void soften(Query *q, int64_t size, const float *slope, const float *side, int64_t head) {
  float scale = 1.0f / sqrtf((float)size), *scores = q->scores;
  int64_t count = q->to - q->from, padded = (count + 7) / 8 * 8;
  for (int64_t j = count; j < padded; j++) scores[j] = -INFINITY;
  v8 tops = all(-INFINITY), away = all((float)(q->from - q->distance) - (slope ? side[head] : 0));
  for (int i = 0; i < 8; i++) away[i] += i;
  for (int64_t j = 0; j < padded; j += 8, away += 8) {
    v8 x = load(scores + j) * all(scale);
    if (slope) x = fused(choose(away > 0, -away, away), all(slope[head]), x);
    store(scores + j, x);
    tops = choose(x > tops, x, tops);
  }
  float largest = tops[0];
  for (int i = 1; i < 8; i++) largest = tops[i] > largest ? tops[i] : largest;
  v8 sum = all(0.0f);
  for (int64_t j = 0; j < padded; j += 8) {
    v8 p = exponential(load(scores + j) - all(largest));
    store(scores + j, p);
    if (j + 8 <= count)
      sum += p;
    else
      for (int64_t i = 0; i < count - j; i++) sum[i] += p[i];
  }
  q->sum = total(sum);
}

// Adds the values `j` to `end - 1` of those that a query sees, by their weights.
SIZED void gather_sized(const Query *q, const float *values, int64_t j, int64_t end, int64_t size,
                        Ahead *ahead) {
  const float *scores = q->scores;
  float *out = q->out, rest[8] = {0};
  v8 acc[32];
  int64_t lanes = size / 8, whole = 8 * lanes;
  values += q->from * size;
  for (int64_t k = 0; k < lanes; k++) acc[k] = load(out + 8 * k);
  for (int64_t k = whole; k < size; k++) rest[k - whole] = out[k];
  for (; j < end; j++) {
    const float *value = values + j * size;
    fetch(ahead);
    v8 p = all(scores[j]);
    for (int64_t k = 0; k < lanes; k++) acc[k] = fused(p, load(value + 8 * k), acc[k]);
    for (int64_t k = whole; k < size; k++) rest[k - whole] += scores[j] * value[k];
  }
  for (int64_t k = 0; k < lanes; k++) store(out + 8 * k, acc[k]);
  for (int64_t k = whole; k < size; k++) out[k] = rest[k - whole];
}

// The same of several queries at once, where they see the same slots: a value is fetched once. Returns where it ended.
SIZED int64_t gather_some(const Query *q, int64_t n, const float *values, int64_t j, int64_t end, int64_t size, Ahead *ahead) {
  enum { LANES = 4 };  // at a time: with three queries twelve sums, which registers hold
  for (int64_t i = 0; i < n; i++) {
    if (q[i].from != q->from || size % (8 * LANES)) return j;
    end = least_of(end, q[i].to - q->from);
  }
  values += q->from * size;
  for (int64_t low = 0; low < size; low += 8 * LANES) {
    v8 acc[3][LANES];
    for (int64_t i = 0; i < n; i++)
      for (int64_t k = 0; k < LANES; k++) acc[i][k] = load(q[i].out + low + 8 * k);
    for (int64_t at = j; at < end; at++) {
      const float *value = values + at * size + low;
      v8 value_k[LANES];
      fetch(ahead);
      for (int64_t k = 0; k < LANES; k++) value_k[k] = load(value + 8 * k);
      for (int64_t i = 0; i < n; i++) {
        v8 p = all(q[i].scores[at]);
        for (int64_t k = 0; k < LANES; k++) acc[i][k] = fused(p, value_k[k], acc[i][k]);
      }
    }
    for (int64_t i = 0; i < n; i++)
      for (int64_t k = 0; k < LANES; k++) store(q[i].out + low + 8 * k, acc[i][k]);
  }
  return most(j, end);
}

SIZED void attend_sized(Query *q, int64_t n, const float *keys, const float *values, int64_t size, const float *slope,
                        const float *side, int64_t head) {
  int64_t longest = 0, tile = KEYS;
  for (int64_t i = 0; i < n; i++) longest = most(longest, q[i].to - q[i].from);
  if (n == 1) tile = most(longest, 1);
  // While the queries pass over a tile the next is fetched, a part by each.
  int64_t lines = n == 1 ? 0 : (tile * size * (int64_t)sizeof(float) + 63) / 64, steps = (n + 1) / 2 * (tile / 4);
  for (int64_t j = 0; j < longest; j += tile) {
    const float *soon = j + tile < longest ? keys + (q->from + j + tile) * size : values + q->from * size;
    Ahead ahead = {(const char *)soon, (lines + steps - 1) / most(steps, 1)};
    for (int64_t i = 0, at = j; i < n; i++) {
      if (i % 2 == 0) at = i + 1 < n ? score_both(q + i, keys, j, j + tile, size, &ahead) : j;
      score_sized(q + i, keys, at, least_of(j + tile, q[i].to - q[i].from), size, &ahead);
    }
  }
  for (int64_t i = 0; i < n; i++) {
    soften(q + i, size, slope, side, head);
    memset(q[i].out, 0, size * sizeof(float));
  }
  steps = (size % 32 ? n : (n + 2) / 3 * (size / 32)) * tile;
  for (int64_t j = 0; j < longest; j += tile) {
    Ahead ahead = {(const char *)(values + (q->from + j + tile) * size),
                   j + tile < longest ? (lines + steps - 1) / most(steps, 1) : 0};
    for (int64_t i = 0, m; i < n; i += m) {
      m = n - i == 4 ? 2 : least_of(n - i, 3);  // four are two pairs
      int64_t at = j;
      if (m == 3) at = gather_some(q + i, 3, values, j, j + tile, size, &ahead);
      if (m == 2) at = gather_some(q + i, 2, values, j, j + tile, size, &ahead);
      for (int64_t o = i; o < i + m; o++)
        gather_sized(q + o, values, at, least_of(j + tile, q[o].to - q[o].from), size, &ahead);
    }
  }
  for (int64_t i = 0; i < n; i++) {
    float inverse = 1.0f / q[i].sum;
    for (int64_t k = 0; k < size; k++) q[i].out[k] *= inverse;
  }
}

// Usual sizes are known to the compiler.
static void attend(Query *q, int64_t n, const float *keys, const float *values, int64_t size, const float *slope,
                   const float *side, int64_t head) {
  if (size == 32)
    attend_sized(q, n, keys, values, 32, slope, side, head);
  else if (size == 64)
    attend_sized(q, n, keys, values, 64, slope, side, head);
  else
    attend_sized(q, n, keys, values, size, slope, side, head);
}

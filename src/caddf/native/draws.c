// Draws from logits (`caddf.categorical`): weights, filters, and the inverse of the distribution function.

typedef struct {  // `categorical.Warp`; temperature 0: the top
  double temperature, top_p, min_p;  // filters, off at 1, 0
  int64_t top_k;                     // and 0
  const int64_t *banned;             // which logits are never drawn
  int64_t bans;
} Warp;

enum { BLOCK = 64 };
typedef double d8 __attribute__((vector_size(64)));
typedef int64_t l8 __attribute__((vector_size(64)));

// The sum of at most BLOCK numbers.
static double mass(const float *p, int64_t count) {
  d8 sums = {0};
  int64_t i = 0;
  if (count > BLOCK) count = BLOCK;
  for (; i + 8 <= count; i += 8) sums += __builtin_convertvector(load(p + i), d8);
  double sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  for (; i < count; i++) sum += p[i];
  return sum;
}

static float largest(const float *x, int64_t n, int64_t *at) {
  int64_t whole = n / 8 * 8;
  v8 tops = all(-INFINITY);
  for (int64_t i = 0; i < whole; i += 8) tops = choose(load(x + i) > tops, load(x + i), tops);
  float top = tops[0];
  for (int i = 1; i < 8; i++) top = tops[i] > top ? tops[i] : top;
  for (int64_t i = whole; i < n; i++) top = x[i] > top ? x[i] : top;
  if (at)
    for (*at = 0; *at < n - 1 && x[*at] != top;) ++*at;  // no number is the top of those that are none
  return top;
}

static int are_numbers(const float *x, int64_t n) {
  int64_t whole = n / 8 * 8;
  v8 found = all(0.0f);
  for (int64_t i = 0; i < whole; i += 8) found = choose(load(x + i) == load(x + i), found, all(1.0f));
  int numbers = total(found) == 0;
  for (int64_t i = whole; i < n; i++) numbers &= x[i] == x[i];
  return numbers;
}

// What is never drawn has such logits, or weights.
static void ban(const Warp *w, float *x, float as) {
  for (int64_t i = 0; i < w->bans; i++) x[w->banned[i]] = as;
}

// exp((x - top) / temperature) in the place of logits. Returns whether they are numbers.
static int exponentials(float *x, int64_t n, double temperature) {
  float top = largest(x, n, NULL);
  int64_t whole = n / 8 * 8;
  v8 scale = all((float)(1 / temperature));
  for (int64_t i = 0; i < whole; i += 8) store(x + i, exponential((load(x + i) - all(top)) * scale));
  for (int64_t i = whole; i < n; i++) x[i] = expf((x[i] - top) * scale[0]);
  return isfinite(top);
}

static double weight_of(const float *p, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; i += BLOCK) total += mass(p + i, n - i);
  return total;
}

static uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// The largest weights stay, `count` at most, each of them while those before it sum to less than `most`; the rest become
// 0. Among equals the first come first. The bits of numbers that are not negative are in their order: the last that
// stays is found by its first bits, the next and the last, among those that share the bits before.
static void keep_largest(float *p, int64_t n, int64_t count, double most) {
  static const int shifts[] = {21, 10, 0};
  uint32_t last = 0, known = 0;
  int64_t number = 0;
  double sum = 0;
  for (int level = 0; level < 3; level++) {
    uint32_t mask = level < 2 ? 2047 : 1023;
    int64_t numbers[2048] = {0}, at = mask;
    double sums[2048] = {0};
    for (int64_t i = 0; i < n; i++) {
      uint32_t bits = bits_of(p[i]);
      if ((bits ^ last) & known) continue;
      numbers[bits >> shifts[level] & mask]++, sums[bits >> shifts[level] & mask] += p[i];
    }
    for (; at > 0 && number + numbers[at] < count && sum + sums[at] < most; at--) number += numbers[at], sum += sums[at];
    last |= (uint32_t)at << shifts[level], known |= mask << shifts[level];
  }
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = bits_of(p[i]);
    if (bits < last || (bits == last && (number >= count || sum >= most)))
      p[i] = 0;
    else if (bits == last)
      number++, sum += p[i];
  }
}

// The weights that tokens are drawn by in the place of logits, filtered in the order of `categorical.Warp`, the largest 1.
// Returns whether the logits are numbers.
static int weigh(const Warp *w, float *x, int64_t n) {
  int sound = exponentials(x, n, w->temperature);
  ban(w, x, 0);
  if (w->top_k && w->top_k < n) keep_largest(x, n, w->top_k, INFINITY);
  if (w->top_p < 1) keep_largest(x, n, n, w->top_p * weight_of(x, n));
  if (w->min_p > 0)
    for (int64_t i = 0; i < n; i++)
      if (x[i] < w->min_p) x[i] = 0;
  return sound;
}

// The index at which the sum of weights first exceeds u times that of all.
static int64_t pick(const float *p, int64_t n, double u, double *total) {
  int64_t chosen = 0;
  double sum = 0, next = 0, below = u * (*total = weight_of(p, n));
  for (; chosen < n - BLOCK; chosen += BLOCK, sum = next)
    if ((next = sum + mass(p + chosen, BLOCK)) > below) break;
  for (int64_t end = chosen + BLOCK < n ? chosen + BLOCK - 1 : n - 1; chosen < end; chosen++)
    if ((sum += p[chosen]) > below) break;
  while (chosen > 0 && p[chosen] == 0) chosen--;  // u times the total may round up
  return chosen;
}

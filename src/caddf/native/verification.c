// Verification (`decoding/verification.py`) of a row's drafts: how many stand, and what follows them.

typedef struct {
  float *weights;        // of the target at each place, [places, V], unnormalised
  const double *totals;  // [places]: their sums
  const double *q;       // of the drafts, [places, V]; NULL: each is sure of itself
  const int64_t *tokens, *before;  // at each place, and what stood there before drafts: the mask, or a given token
  int64_t end;           // so many places are verified
  int64_t vocabulary, mask;
  double *may;           // [end + 1]: with what probability those before a place may stand, all together
  double *rest;          // [end]: the sum of (may p - q)+ at a place
} Drafted;

// The sum of (scale p - q)+, and where `to` is given those numbers.
static double spared(const float *p, double scale, const double *q, int64_t n, float *to) {
  d8 sums = {0}, none = {0};
  int64_t whole = n / 8 * 8;
  double sum = 0;
  for (int64_t i = 0; i < whole; i += 8) {
    d8 q_i = none;
    if (q) memcpy(&q_i, q + i, sizeof q_i);
    d8 rest = __builtin_convertvector(load(p + i), d8) * scale - q_i;
    rest = (d8)((l8)rest & (rest > none));
    sums += rest;
    if (to) store(to + i, __builtin_convertvector(rest, v8));
  }
  for (int i = 0; i < 8; i++) sum += sums[i];
  for (int64_t i = whole; i < n; i++) {
    double q_i = q ? q[i] : 0, rest = p[i] * scale - q_i > 0 ? p[i] * scale - q_i : 0;
    sum += rest;
    if (to) to[i] = rest;
  }
  return sum;
}

// That of what a row spares at a place; what is sure of itself has q = 1 where p is at most that.
static double spared_of(const Drafted *d, int64_t i, double scale, int into) {
  float *p = d->weights + i * d->vocabulary, *own = p + d->tokens[i], kept = *own;
  if (!d->q) *own = 0;
  double sum = spared(p, scale, d->q ? d->q + i * d->vocabulary : NULL, d->vocabulary, into ? p : NULL);
  if (!d->q && !into) *own = kept;
  return sum;
}

static int drafted_at(const Drafted *d, int64_t i) { return d->before[i] == d->mask; }

static void may_stand(const Drafted *d) {
  d->may[0] = 1;
  for (int64_t i = 0; i < d->end; i++) {
    int64_t drawn = i * d->vocabulary + d->tokens[i];
    double share = drafted_at(d, i) ? d->weights[drawn] / d->totals[i] / (d->q ? d->q[drawn] : 1) : 1;
    d->may[i + 1] = d->may[i] * share > 1 ? 1 : d->may[i] * share;
  }
}

static void spare(const Drafted *d, int64_t i) {
  if (!drafted_at(d, i))
    d->rest[i] = 0;
  else if (d->may[i] > 0)
    d->rest[i] = spared_of(d, i, d->may[i] / d->totals[i], 0);
}

// `u` has a uniform for each place; behind given tokens that of the draft before them decides. `share` becomes that at
// which drafts end.
static int64_t verify(const Drafted *d, const double *u, double *share) {
  int64_t stop = 0, decides = 0;
  *share = 1;
  for (int64_t i = 1; i <= d->end && d->may[i] > 0; i++) {
    if (drafted_at(d, i - 1)) decides = i - 1;
    double rest = i < d->end ? d->rest[i] : d->may[i], of = i < d->end ? rest + 1 - d->may[i] : 1;
    if (of == 0 || u[decides] * of < rest) stop = i, *share = d->may[i];
  }
  return stop;
}

// The token behind the `stop` drafts that stand; weights there are overwritten.
static int64_t following(const Drafted *d, int64_t stop, double share, double u) {
  double total = d->totals[stop], scale = share / total;
  if (stop < d->end && (stop ? d->rest[stop] : spared_of(d, stop, scale, 0)) > 0)
    spared_of(d, stop, scale, 1);  // nothing is left where p is q up to rounding
  return pick(d->weights + stop * d->vocabulary, d->vocabulary, u, &total);
}

// Drafts: a chain's steps, each with its head, its draw by inverse CDF, and the embedding of what was drawn.

#include "kernels.c"
#include "draws.c"

typedef struct {
  int64_t rows, width, count;  // places of a window, and most drafts of a row
  const int64_t *counts;       // [rows]: of each, 0: it drafts nothing; NULL: `count`
  float *states;               // [rows, width, D]: what the chain reads besides tokens
  int64_t *before;             // [rows, width]: the token before each place, known up to a row's first draft
  int64_t *earlier;            // and the one before that, read where there is `shifted`
  int64_t *first;              // [rows]: the place of that draft
  int64_t *heard;              // [rows]: how many places `cache` holds, at most `first`; NULL: none
  double *u;                   // [rows, count]: uniforms
  const float *embedding, *shifted;  // [tokens, D]: of the token before; of the one before that, or NULL
  Map head;                    // its logits are those of `ids`, or of all tokens where that is NULL
  const int64_t *ids;
  int64_t *given;              // [rows, count]: what stands at a place already, or -1; NULL: nothing does
  Warp warp;                   // of the head's logits
  int64_t vocabulary;
  double least;                // drafting ends when the product of the largest probabilities falls below `least`
  Cache cache;
  const float *cos, *sin;
  int64_t *tokens;             // [rows, count], drawn
  double *q;                   // [rows, count, vocabulary], zero before (greedy, or outside `ids`): what they were drawn from
  int64_t *drafts;             // [rows]: how many are to be verified, at least one
  int64_t threads;
} Draft;

static void add(float *to, const float *x, int64_t n) {
  for (int64_t k = 0; k < n; k++) to[k] += x[k];
}

// One draw; returns the largest probability at temperature 1.
static double draw(const Draft *d, float *logits, double u, double *q, int64_t *token) {
  int64_t n = d->head.out, chosen = 0;
  double sure = 1;
  if (d->least > 0) {
    float top = largest(logits, n, NULL);
    double total = 0;
    for (int64_t i = 0; i < n; i++) total += expf(logits[i] - top);
    sure = 1 / total;
  }
  ban(&d->warp, logits, -INFINITY);
  if (d->warp.temperature == 0) {
    largest(logits, n, &chosen);
    q[d->ids ? d->ids[chosen] : chosen] = 1;
  } else {
    weigh(&d->warp, logits, n);
    double total;
    chosen = pick(logits, n, u, &total);
    double share = 1 / total;
    if (d->ids)
      for (int64_t i = 0; i < n; i++) q[d->ids[i]] = logits[i] * share;
    else
      for (int64_t i = 0; i < n; i++) q[i] = logits[i] * share;
  }
  *token = d->ids ? d->ids[chosen] : chosen;
  return sure;
}

typedef struct {
  const Stack *stack;
  const Draft *draft;
  Pass pass;
  float *x, *before, *logits, *room, *scores;
  int64_t *positions, *read;  // [rows]: which of the states that the head reads is a row's
  double *chance;
  int64_t going, made, seen;
} Drafting;

static int64_t heard_of(const Draft *d, int64_t row) { return d->heard ? d->heard[row] : 0; }

// The rows that draft once more, each at the place behind; the first step reads what stands before the first draft, too.
static void go_on(Drafting *w, int64_t j) {
  const Draft *d = w->draft;
  int64_t *first = w->pass.first;
  w->going = 0;
  for (int64_t row = 0; row < d->rows; row++) {
    int goes = j < (d->counts ? d->counts[row] : d->count) && d->drafts[row] == j;
    first[row + 1] = first[row] + (!goes ? 0 : j ? 1 : d->first[row] - heard_of(d, row) + 1);
    w->read[row] = goes ? w->going++ : -1;
  }
}

static void draft(const void *of, int64_t thread, int64_t threads) {
  Drafting *w = (Drafting *)of;
  const Stack *s = w->stack;
  const Draft *d = w->draft;
  const Pass *p = &w->pass;
  int64_t D = s->width;
  for (int64_t j = 0; j < d->count; j++) {
    if (thread == 0) go_on(w, j);
    TOGETHER
    if (!w->going) break;
    for (int64_t row = thread; row < d->rows; row += threads)
      for (int64_t i = 0; i < COUNT(p, row); i++) {
        int64_t place = j ? d->first[row] + j : heard_of(d, row) + i, at = BEGIN(p, row) + i;
        if (place > d->width - 1) place = d->width - 1;  // what is drafted beyond the window is nobody's
        int64_t token = j ? d->tokens[row * d->count + j - 1] : d->before[row * d->width + place];
        w->positions[at] = place;
        memcpy(w->x + at * D, d->states + (row * d->width + place) * D, D * sizeof(float));
        memcpy(w->before + at * D, d->embedding + token * D, D * sizeof(float));
        if (!d->shifted) continue;
        int64_t of = row * d->width;
        int64_t earlier = j > 1 ? d->tokens[row * d->count + j - 2] : j ? d->before[of + d->first[row]] : d->earlier[of + place];
        add(w->before + at * D, d->shifted + earlier * D, D);
      }
    TOGETHER
    run(s, p, w->room, w->made, w->scores + thread * d->width * w->seen, w->seen, thread, threads);
    TOGETHER
    if (BEGIN(p, d->rows) > w->going) {  // the head reads the last place of each row alone
      for (int64_t row = 0; row < d->rows && thread == 0; row++)
        if (w->read[row] >= 0) memmove(w->x + w->read[row] * D, w->x + (BEGIN(p, row + 1) - 1) * D, D * sizeof(float));
      TOGETHER
    }
    map(&d->head, w->x, w->going, w->logits, PLAIN, thread, threads, NULL);
    TOGETHER
    for (int64_t row = thread; row < d->rows; row += threads) {
      int64_t at = row * d->count + j;
      if (w->read[row] < 0) {
        d->tokens[at] = 0;
        continue;
      }
      double *q = d->q + at * d->vocabulary;
      if (d->given && d->given[at] >= 0)
        d->tokens[at] = d->given[at];
      else
        w->chance[row] *= draw(d, w->logits + w->read[row] * d->head.out, d->u[at], q, d->tokens + at);
      if (j && w->chance[row] < d->least)
        memset(q, 0, d->vocabulary * sizeof(double));
      else
        d->drafts[row] = j + 1;
    }
    TOGETHER
  }
}

// What drafting needs by so many threads; `x` and `positions` are to be freed. 0, or -1 where memory is short.
static int drafting(const Stack *s, const Draft *d, int64_t threads, Drafting *w) {
  *w = (Drafting){.stack = s, .draft = d};
  Pass *p = &w->pass;
  int64_t states = d->rows * d->width * s->width;
  *p = (Pass){.rows = d->rows, .n = d->width, .cos = d->cos, .sin = d->sin, .own = d->cache, .threads = threads};
  int64_t room = floats_of(s, p, &w->made, &w->seen);
  w->x = memory_of(2 * states + d->rows * d->head.out + room + threads * d->width * w->seen);
  w->positions = malloc((d->rows * (d->width + 2) + 1) * sizeof(int64_t) + d->rows * sizeof(double));
  if (!w->x || !w->positions) {
    free(w->x), free(w->positions);
    return -1;
  }
  w->read = w->positions + d->rows * d->width, p->first = w->read + d->rows, p->first[0] = 0;
  w->chance = (double *)(p->first + d->rows + 1);
  w->before = w->x + states, w->room = w->before + states, w->scores = w->room + room;
  w->logits = w->scores + threads * d->width * w->seen;
  p->x = w->x, p->before = w->before, p->positions = w->positions;
  for (int64_t row = 0; row < d->rows; row++) w->chance[row] = 1, d->drafts[row] = 0;
  return 0;
}

// 0, or -1 where memory is short.
int caddf_draft(const Stack *s, const Draft *d) {
  Drafting w;
  if (drafting(s, d, d->threads, &w)) return -1;
  share_out(draft, &w, d->threads);
  free(w.x), free(w.positions);
  return 0;
}

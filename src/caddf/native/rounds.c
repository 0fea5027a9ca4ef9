// Whole rounds: what left-to-right decoding does between two tokens that stand (`decoding/speculative.py`).

#include "drafts.c"
#include "verification.c"

// The canvases of a fused target: one for the whole text, made beforehand, or each block's all-masked start, read when a
// position of it is first asked for. A row's blocks of even number go to the first `block` slots, the others behind.
typedef struct {
  const Fusion *fusion;
  Fusing *fusing;              // with room for the widest round
  int64_t block;               // 0: one canvas, of which a row sees the first `seen` slots
  const int64_t *seen;         // [rows]
  const Stack *stack;          // of a block's pass
  Pass *pass;
  const float *mask;           // what is read at each of its places
  int64_t *start;              // [2, rows]: of the blocks that are held; -1: none
  int64_t *into;               // [rows]
} Canvas;

// Rows that do not go on are not read, and what a row holds beyond its end is not looked at.
typedef struct {  // a round: a window of drafts that starts at the last token that stands, and the target's reading of them
  int64_t rows, length, size, mask, bos;  // size 0: one token of each row, and no drafts
  int64_t lookup, copies;                 // drafts are copied where so many last tokens have stood before (0: never), at
                                          // most so many, or a window's
  int64_t most, renew;                    // drafts of a round; places left of a window that is drafted from once more
  int64_t *since;                         // [rows]: where the windows that are held start; -1: there is none
  const int64_t *before;                  // [rows, length]: what stands, and is given; the mask elsewhere
  const int64_t *lengths, *n, *held;      // [rows]: where rows end, their first open positions, how many slots hold
  const uint8_t *active;                  // [rows]: whether a row goes on
  const Stack *causal, *window, *chain;   // window NULL: drafts are copied, or there are none
  Pass *pass, *look;                      // with room for the widest round
  Draft *draft;                           // as `window`
  const Canvas *canvas;                   // NULL: the target is causal
  Map head;
  Warp warp;                              // of the target
  int64_t head_threads;
  const float *embedding, *shifted, *table;  // what the causal branch reads; shifted NULL: not the token before; table
                                          // NULL: rotary positions
  float *logits;                          // [rows, places + 1, V]
  const double *u;                        // [rows, size + places + 1]: for drafts, for verification, and for what follows
  int64_t places;                         // of a row's drafts, its own or copied ones

  // What comes of it:
  int64_t *x, *drafts;                    // [rows, length]: what stands then, and what was drafted (the mask elsewhere)
  uint8_t *fresh, *corrected;             // [rows, length]: what was filled in, and what replaced a draft
  int64_t *next, *read;                   // [rows]: `n` and `held` then; `length` where nothing is open
  int64_t *work;                          // [6, rows]: passes of both branches, positions read, and without caches; rounds,
                                          // and those whose drafts were copied
} Round;

static int64_t before(const Round *r, int64_t row, int64_t at) { return at > 0 ? r->x[row * r->length + at - 1] : r->bos; }

static int is_open(const Round *r, int64_t row, int64_t at) { return r->before[row * r->length + at] == r->mask; }

// Where a row's drafts come from (`decoding/windows.py`): a new window, or the one it has while enough of it is left.
static int64_t new_start(const Round *r, int64_t row) { return r->n[row] ? least_of(r->n[row], r->length) - 1 : 0; }
static int64_t start_of(const Round *r, int64_t row) {
  int64_t since = r->since[row];
  return since >= 0 && since + r->size - r->n[row] >= r->renew ? since : new_start(r, row);
}
// Where a window ends.
static int64_t whole_of(const Round *r, int64_t row, int64_t start) { return least_of(start + r->size, r->lengths[row]); }

// Behind the last place where a row's last tokens stood before (`decoding/lookup.py`), or -1; and how many of them did.
static int64_t source_of(const Round *r, int64_t row, int64_t *matched) {
  int64_t n = r->n[row], width = r->lookup, bytes = width * sizeof(int64_t), at;
  const int64_t *x = r->before + row * r->length;
  if (!width || !r->active[row]) return -1;
  for (at = n - 1; at >= width; at--)
    if (x[at - 1] == x[n - 1] && !memcmp(x + at - width, x + n - width, bytes)) break;
  if (at < width) return -1;
  for (*matched = width; *matched < least_of(at, r->copies) && x[at - 1 - *matched] == x[n - 1 - *matched];) ++*matched;
  return at;
}

// How many drafts a row copies (`copies_end`): a window's, or as many as have matched already where the target is known
// beyond that.
static int64_t copies_of(const Round *r, int64_t row, int64_t matched) {
  int64_t n = r->n[row], end = whole_of(r, row, new_start(r, row));
  if (!r->canvas) end = most(end, least_of(n + least_of(matched, r->copies), r->lengths[row]));
  return most(end - n, 0);
}

// And how many it makes.
static int64_t drafts_in(const Round *r, int64_t row) {
  return r->window ? most(least_of(whole_of(r, row, start_of(r, row)) - r->n[row], r->most), 0) : 0;
}

// Drafts that are copied from `source` on; a copy that comes to n copies itself.
static void copy_drafts(const Round *r, int64_t row, int64_t source, int64_t count) {
  int64_t n = r->n[row], *x = r->x + row * r->length;
  for (int64_t i = 0; i < count; i++)
    if (is_open(r, row, n + i)) x[n + i] = x[source + i % (n - source)];
}

typedef struct {
  const Round *round;
  const int64_t *renewed;  // [rows]: whether a row's window is new
  Running window;          // without room where none is
  Drafting drafting;
} Looking;

static void look_part(const void *of, int64_t thread, int64_t threads) {
  const Looking *w = of;
  const Round *r = w->round;
  if (w->window.room) {
    int64_t states = r->size * r->window->width;
    run_part(&w->window, thread, threads);
    TOGETHER
    for (int64_t row = thread; row < r->rows; row += threads)
      if (w->renewed[row])
        memcpy(r->draft->states + row * states, r->look->x + r->look->first[row] * r->window->width,
               states * sizeof(float));
    TOGETHER
  }
  draft(&w->drafting, thread, threads);
}

// Drafts of so many places of each row, 0 where it makes none; says of each whether its window was read for that.
static int drafts_of(const Round *r, const int64_t *counts, int64_t *renewed) {
  Pass *look = r->look;
  Draft *draft = r->draft;
  int64_t width = r->window->width, threads = most(look->threads, draft->threads), count = 0;
  for (int64_t row = 0; row < r->rows; row++) count = most(count, counts[row]);
  for (int64_t row = 0; row < r->rows; row++) {
    int64_t start = start_of(r, row), n = r->n[row];
    renewed[row] = counts[row] && start != r->since[row];
    look->first[row + 1] = look->first[row] + renewed[row] * r->size, look->until[row] = start;
    if (!counts[row]) continue;
    for (int64_t i = 0; i < r->size; i++) {
      int64_t place = row * r->size + i, at = look->first[row] + i;
      draft->before[place] = start + i <= n ? before(r, row, start + i) : r->bos;
      draft->earlier[place] = start + i <= n ? before(r, row, start + i - 1) : r->bos;
      if (!renewed[row]) continue;
      int64_t token = start + i < r->lengths[row] ? r->x[row * r->length + start + i] : r->mask;
      memcpy(look->x + at * width, draft->embedding + token * width, width * sizeof(float));
      look->positions[at] = start + i;
    }
    for (int64_t i = 0; i < counts[row]; i++)
      draft->given[row * count + i] = is_open(r, row, n + i) ? -1 : r->x[row * r->length + n + i];
    draft->first[row] = n - start;
    if (renewed[row]) draft->heard[row] = 0;
    memcpy(draft->u + row * count, r->u + row * (r->size + r->places + 1), count * sizeof(double));
  }
  draft->count = count, draft->counts = counts;
  Looking w = {.round = r, .renewed = renewed};
  if (look->first[r->rows]) {
    w.window = running(r->window, look, threads);
    if (!w.window.room) return -1;
  }
  int bad = drafting(r->chain, draft, threads, &w.drafting);
  if (!bad) {
    share_out(look_part, &w, threads);
    free(w.drafting.x), free(w.drafting.positions);
  }
  free(w.window.room);
  return bad;
}

typedef struct {
  const Round *round;
  const int64_t *shown;
  const Drafted *drafted;  // [rows]
  double *totals;          // [places]
  int64_t wide;
} Weighing;

// The weights of what a round reads, in the place of logits, and their sums; greedily logits stay.
static void weigh_part(const void *of, int64_t thread, int64_t threads) {
  const Weighing *w = of;
  const Round *r = w->round;
  int64_t V = r->head.out;
  Pieces left = pieces(r->rows * w->wide, thread, threads);
  for (int64_t each; (each = take(&left)) >= 0;) {
    int64_t row = each / w->wide, i = each % w->wide, at = BEGIN(r->pass, row) + i;
    float *logits = r->logits + at * V;
    if (i >= COUNT(r->pass, row)) continue;
    int numbers = are_numbers(logits, V);
    ban(&r->warp, logits, -INFINITY);
    if (!numbers) logits[0] = INFINITY;  // which is no top, whatever the others are
    if (r->warp.temperature == 0) continue;
    int sound = weigh(&r->warp, logits, V);
    w->totals[at] = sound ? weight_of(logits, V) : NAN;
  }
}

static void spare_part(const void *of, int64_t thread, int64_t threads) {
  const Weighing *w = of;
  Pieces left = pieces(w->round->rows * w->wide, thread, threads);
  for (int64_t each; (each = take(&left)) >= 0;)
    if (each % w->wide && each % w->wide < w->drafted[each / w->wide].end) spare(&w->drafted[each / w->wide], each % w->wide);
}

// Which slots of its canvas each place of a round sees, and where it stands there.
static void place_on_canvas(const Round *r) {
  const Canvas *c = r->canvas;
  Fusing *p = c->fusing;
  for (int64_t row = 0; row < r->rows; row++)
    for (int64_t i = 0, index = BEGIN(r->pass, row); i < COUNT(r->pass, row); i++, index++) {
      int64_t at = r->n[row] + i, from = c->block ? at / c->block % 2 * c->block : 0;
      p->slot[index] = c->block ? from + at % c->block : at;
      p->from[index] = from;
      p->to[index] = c->block ? from + c->block : c->seen[row];
    }
}

// Readies the pass over the first blocks that rows read (`next` 0), or those behind, where they are not held, and counts
// it in `encoded`. Whether there are any. They are held from then on, as long as their first slots are (`ready_canvas`).
static int64_t missing_blocks(const Round *r, const int64_t *shown, int64_t next, int64_t *encoded) {
  const Canvas *c = r->canvas;
  int64_t any = 0, k = c->block;
  for (int64_t row = 0; row < r->rows; row++) {
    int64_t start = r->n[row] / k * k, odd = (start / k + next) % 2, missing = 0;
    if (next && r->active[row] && start + k < shown[row])
      start += k, missing = 1;
    else if (!next)
      missing = r->active[row];
    int64_t *held = c->start + odd * r->rows + row;
    missing = missing && *held != start;
    if (missing) *held = start;
    c->into[row] = missing ? odd * k : -1;
    encoded[row] += missing, any += missing;
    c->pass->until[row] = start, c->pass->first[row + 1] = c->pass->first[row] + missing * k;
    for (int64_t i = 0; i < missing * k; i++) c->pass->positions[c->pass->first[row] + i] = start + i;
  }
  return any;
}

typedef struct {
  Running causal, canvas;
  Preparing preparing;
  Fused fused;
  Mapping head;
  Weighing weighing;
  int64_t *encoded;  // [rows]
  int64_t any;
} Reading;

static void fused_part(Reading *w, int64_t thread, int64_t threads) {
  const Round *r = w->weighing.round;
  const Canvas *c = r->canvas;
  int64_t k = c->block, width = k ? c->stack->width : 0, slots = c->fusing->canvas.slots;
  for (int64_t next = 0; next < 2 && k; next++) {
    TOGETHER
    if (thread == 0) w->any = missing_blocks(r, w->weighing.shown, next, w->encoded);
    TOGETHER
    if (!w->any) continue;
    for (int64_t m = thread; m < BEGIN(c->pass, r->rows); m += threads) memcpy(c->pass->x + m * width, c->mask, width * sizeof(float));
    TOGETHER
    run_part(&w->canvas, thread, threads);
    TOGETHER
    prepare_part(&w->preparing, thread, threads);
    for (int64_t row = thread; row < r->rows && c->fusion->own.panels; row += threads)
      if (c->into[row] >= 0)
        memcpy(c->fusing->own + (row * slots + c->into[row]) * width, c->pass->x + BEGIN(c->pass, row) * width,
               k * width * sizeof(float));
  }
  TOGETHER
  fuse_part(&w->fused, thread, threads);
}

static void read_part(const void *of, int64_t thread, int64_t threads) {
  Reading *w = (Reading *)of;
  const Weighing *v = &w->weighing;
  run_part(&w->causal, thread, threads);
  if (v->round->canvas) fused_part(w, thread, threads);
  TOGETHER
  map_share(&w->head, thread, threads);
  TOGETHER
  weigh_part(v, thread, threads);
  if (v->round->warp.temperature == 0) return;
  TOGETHER
  for (int64_t row = thread; row < v->round->rows; row += threads) may_stand(&v->drafted[row]);
  TOGETHER
  spare_part(v, thread, threads);
}

// Readies the fused target's part of a reading; `made` is to be freed. 0, or -1 where memory is short.
static int ready_canvas(const Round *r, int64_t wide, int64_t threads, Reading *w) {
  const Canvas *c = r->canvas;
  if (c->block)
    for (int64_t i = 0; i < 2 * r->rows; i++)  // what was read over drafts that did not stand
      if (c->start[i] >= r->held[i % r->rows]) c->start[i] = -1;
  c->fusing->n = wide, c->fusing->first = r->pass->first;
  place_on_canvas(r);
  w->fused = fusing(c->fusion, c->fusing, threads);
  if (!w->fused.both) return -1;
  if (!c->block) return 0;
  w->canvas = running(c->stack, c->pass, threads);
  if (!w->canvas.room) return -1;
  w->preparing = (Preparing){c->fusion, r->rows, c->block, c->pass->x, c->pass->positions, c->into, c->fusing->cos,
                             c->fusing->sin, c->fusing->canvas, memory_of(r->rows * c->block * 2 * c->fusion->width),
                             c->pass->first};
  return w->preparing.made ? 0 : -1;
}

// What a round has proposed, of each row.
typedef struct {
  int64_t *copied, *counts;    // drafts that are copied, or that it makes itself at most
  int64_t *renewed, *encoded;  // whether its window was read, and how many blocks of its canvas
  int64_t *ends, *shown;       // where its drafts end, and how far the target reads
} Proposed;

// Drafts in `x` and `drafts`. 0, or -1 where memory is short.
static int propose(const Round *r, const Proposed *p) {
  int64_t matched = 0, looks = 0, all = r->rows * r->length;
  memcpy(r->x, r->before, all * sizeof(int64_t));
  for (int64_t i = 0; i < all; i++) r->drafts[i] = r->mask;
  for (int64_t row = 0; row < r->rows; row++) {
    int64_t source = r->size ? source_of(r, row, &matched) : -1;
    p->copied[row] = source >= 0 ? copies_of(r, row, matched) : 0, p->renewed[row] = p->encoded[row] = 0;
    p->counts[row] = source < 0 && r->active[row] ? drafts_in(r, row) : 0, looks += p->counts[row];
    if (p->copied[row]) copy_drafts(r, row, source, p->copied[row]);
  }
  if (looks && drafts_of(r, p->counts, p->renewed)) return -1;
  int64_t count = looks ? r->draft->count : 0;
  for (int64_t row = 0; row < r->rows; row++) {
    int64_t n = r->n[row], *x = r->x + row * r->length;
    p->ends[row] = n + (p->counts[row] ? r->draft->drafts[row] : p->copied[row]);
    for (int64_t i = n; i < p->ends[row]; i++) {
      if (!is_open(r, row, i)) continue;
      if (p->counts[row]) x[i] = r->draft->tokens[row * count + i - n];
      r->drafts[row * r->length + i] = x[i];
    }
    p->shown[row] = r->active[row] ? least_of(p->ends[row] + 1, r->lengths[row]) : n;
  }
  return 0;
}

// Readies the pass over all places from n on that the target reads: what the causal branch is given there.
static void embed_places(const Round *r, const int64_t *shown) {
  Pass *pass = r->pass;
  int64_t width = r->causal->width;
  pass->n = 0;
  for (int64_t row = 0; row < r->rows; row++) {
    pass->n = most(pass->n, shown[row] - r->n[row]);
    pass->first[row + 1] = pass->first[row] + shown[row] - r->n[row];
    for (int64_t at = r->n[row], index = BEGIN(pass, row); at < shown[row]; at++, index++) {
      float *to = pass->x + index * width;
      pass->positions[index] = at;
      memcpy(to, r->embedding + before(r, row, at) * width, width * sizeof(float));
      if (r->shifted) add(to, r->shifted + before(r, row, at - 1) * width, width);
      if (r->table) add(to, r->table + at * width, width);
    }
  }
}

// How many of a row's drafts stand, and the token behind them, -1 where there is none.
static int64_t settled(const Round *r, int64_t row, const Drafted *d, int64_t end, int64_t shown, int64_t *token) {
  int64_t n = r->n[row], V = r->head.out, stop = 0, top = 0;
  const int64_t *x = r->x + row * r->length;
  const float *logits = d->weights;
  *token = -1;
  if (r->warp.temperature == 0) {
    for (; stop < end; stop++) {
      if (!is_open(r, row, n + stop)) continue;
      if (!isfinite(largest(logits + stop * V, V, &top)) || top != x[n + stop]) break;
    }
    int more = n + stop < shown && is_open(r, row, n + stop);
    if (more && isfinite(largest(logits + stop * V, V, &top))) *token = top;
    return stop;
  }
  const double *u = r->u + row * (r->size + r->places + 1) + r->size;
  double share = 1;
  stop = verify(d, u, &share);
  int more = n + stop < shown && is_open(r, row, n + stop);
  if (more && isfinite(d->totals[stop])) *token = following(d, stop, share, u[r->places]);  // else nothing can be drawn
  return stop;
}

// What a row is after its round, of which `stop` of `end` drafts stand.
static void settle(const Round *r, int64_t row, int64_t stop, int64_t end, int64_t token) {
  int64_t n = r->n[row], at = row * r->length + n;
  for (int64_t i = 0; i < end; i++) {
    if (!is_open(r, row, n + i)) continue;
    r->fresh[at + i] = i < stop;
    if (i >= stop) r->x[at + i] = r->mask;
  }
  if (token >= 0) {
    r->x[at + stop] = token;
    r->fresh[at + stop] = 1;
    r->corrected[at + stop] = stop < end;
  }
  int64_t next = n + stop + (token >= 0);
  while (next < r->lengths[row] && !is_open(r, row, next)) next++;
  r->next[row] = next < r->lengths[row] ? next : r->length;
}

// What a row's round took. Without caches each branch would read all up to the window's end, and up to the target's; a
// template whole.
static void count_work(const Round *r, const Proposed *p, int64_t row) {
  const Canvas *c = r->canvas;
  int64_t n = r->n[row], shown = p->shown[row], looked = p->renewed[row], block = c ? c->block : 0;
  int64_t until = c && !c->block ? r->lengths[row] : 0, whole = whole_of(r, row, start_of(r, row));
  int64_t needed = shown + (c ? most(shown, until) : 0) + (looked ? whole + most(whole, until) : 0);
  int64_t computed = shown - n + (looked ? r->size : 0) + p->encoded[row] * block;
  int64_t work[] = {1, looked + p->encoded[row], computed, needed, 1, p->copied[row] > 0};
  for (int i = 0; i < 6; i++) r->work[i * r->rows + row] = work[i];
}

// 0, or -1 where memory is short.
int caddf_round(const Round *r) {
  Pass *pass = r->pass;
  int64_t V = r->head.out, rows = r->rows, all = rows * r->length, of_rows[6][rows];
  Proposed p = {of_rows[0], of_rows[1], of_rows[2], of_rows[3], of_rows[4], of_rows[5]};
  memset(r->fresh, 0, all), memset(r->corrected, 0, all);
  memset(r->work, 0, 6 * rows * sizeof(int64_t));
  if (propose(r, &p)) return -1;
  embed_places(r, p.shown);

  int64_t places = BEGIN(pass, rows);
  double temperature = r->warp.temperature, totals[places + 1], may[places + rows], rest[places + 1];
  Drafted drafted[rows];
  for (int64_t row = 0; row < rows; row++) {
    int64_t first = BEGIN(pass, row), end = temperature > 0 && r->active[row] ? p.ends[row] - r->n[row] : 0;
    int64_t of = row * r->length + r->n[row];
    drafted[row] = (Drafted){
        .weights = r->logits + first * V, .totals = totals + first, .tokens = r->x + of, .before = r->before + of,
        .q = p.counts[row] ? r->draft->q + row * r->draft->count * V : NULL, .end = end, .vocabulary = V, .mask = r->mask,
        .may = may + first + row, .rest = rest + first};
  }
  int64_t threads = most(pass->threads, r->head_threads);
  Reading w = {.causal = running(r->causal, pass, threads), .head = {&r->head, places, pass->x, r->logits},
               .weighing = {r, p.shown, drafted, totals, pass->n}, .encoded = p.encoded};
  int bad = !w.causal.room || (r->canvas && ready_canvas(r, pass->n, threads, &w));
  if (!bad) share_out(read_part, &w, threads);
  free(w.causal.room), free(w.canvas.room), free(w.preparing.made), free(w.fused.both);
  if (bad) return -1;

  for (int64_t row = 0; row < rows; row++) {
    r->next[row] = r->n[row], r->read[row] = r->held[row];
    if (!r->active[row]) continue;
    int64_t n = r->n[row], end = p.ends[row] - n, token, stop = settled(r, row, &drafted[row], end, p.shown[row], &token);
    settle(r, row, stop, end, token);
    r->read[row] = least_of(most(r->held[row], p.shown[row]), n + stop + 1);
    count_work(r, &p, row);
    if (!p.counts[row]) continue;
    int64_t start = start_of(r, row);
    r->since[row] = start, r->draft->heard[row] = n - start + least_of(end, stop + 1);
  }
  return 0;
}

#include "layout.c"

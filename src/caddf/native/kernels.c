// Passes of a few positions through a stack of Transformer layers over key-value caches, for CPUs.
//
// What a decoder pays per token is the reading of weights. One call runs a whole stack: each weight is read once for all
// positions of the pass, and nothing is allocated, dispatched or copied between layers.
//
// Every sum is taken in one order that depends on neither how many positions a pass has, nor on the threads: a position
// has the same bits alone, in a batch, and verified together with others.

#include "attention.c"
#include "maps.c"

typedef struct {  // keys and values of all layers, [layers, B, heads, slots, size]
  float *keys, *values;
  int64_t slots;
} Cache;

typedef struct {
  Norm norm;
  Map query, key_value, out;
  int64_t heads;
  const float *slope, *side;  // linear biases per head, NULL: none
  double sharpness;           // queries have it as their length, keys 1, over the root of their size; 0: each its own
} Attention;

typedef struct {
  Attention self, cross;  // cross.heads 0: none
  Norm mlp_norm;
  Map up, down;
  int64_t activation;     // between them: GELU or RELU2
} Layer;

typedef struct {
  const Layer *layers;
  int64_t count, width, hidden;
  Norm before_norm;  // with join: x + join([x ; norm(before)]) is what the first layer reads
  Map join;
  Norm norm;
  const Attention *exchange;  // key_value maps of the states, for another branch's cross-attention
  int64_t exchanges, exchange_width;
  int64_t context;  // how far attention reaches; 0: every position sees every other of the pass
} Stack;

typedef struct {
  int64_t rows, n;            // the pass: `n` positions in each row, or at most so many (`first`)
  float *x;                   // [rows, n, width], read and overwritten with the normed states
  const float *before;        // the same shape, for join
  int64_t *positions;         // [rows, n], or [n] where `alike`
  int64_t alike;
  const float *cos, *sin;     // rotary angles [positions, size], NULL: none
  Cache own;                  // of the layers; slot = position, or with context 0 the place in the pass
  Cache source;               // what cross-attention reads
  int64_t *until;             // [rows]: the last slot of `source` that a row sees
  int64_t source_context;     // and how many before it
  Cache exchange;             // where keys and values for another branch go
  const float *exchange_cos, *exchange_sin;
  int64_t threads;
  const int64_t *lengths;     // [rows]: with context 0, the first so many places of a row see each other; NULL: all
  int64_t *first;             // [rows + 1]: rows lie behind each other, and begin here; NULL: each has `n` positions
} Pass;

// Where a row begins in a pass, and how many positions it has there.
#define BEGIN(p, row) ((p)->first ? (p)->first[row] : (row) * (p)->n)
#define COUNT(p, row) (BEGIN(p, (row) + 1) - BEGIN(p, row))

static int64_t position(const Pass *p, int64_t row, int64_t i) { return p->positions[p->alike ? i : BEGIN(p, row) + i]; }

static const float *angle(const float *table, int64_t position, int64_t size) {
  return table ? table + position * size : NULL;
}

// Turns and stores what `key_value` made, `[rows, n, 2 width]`, for the heads of one thread.
static void keep(const Pass *p, const Cache *cache, const float *made, int64_t layer, const Attention *f, int64_t size,
                 const float *cos, const float *sin, int64_t slot_is_place, int64_t row, int64_t head) {
  int64_t heads = f->heads;
  int64_t width = heads * size;
  int64_t base = ((layer * p->rows + row) * heads + head) * cache->slots;
  for (int64_t i = 0, n = COUNT(p, row); i < n; i++) {
    int64_t at = position(p, row, i), slot = base + (slot_is_place ? i : at);
    const float *both = made + (BEGIN(p, row) + i) * 2 * width + head * size;
    rotate(cache->keys + slot * size, both, angle(cos, at, size), angle(sin, at, size), size);
    if (f->sharpness > 0) lengthen(cache->keys + slot * size, size, 1);
    memcpy(cache->values + slot * size, both + width, size * sizeof(float));
  }
}

// A query of a pass, turned; its scores lie in the room of its thread.
static Query query_of(const Stack *s, const Pass *p, const Attention *f, const float *queries, float *out, float *turned, float *scores,
                      int64_t seen, int64_t row, int64_t i, int64_t head, int64_t size) {
  int64_t at = position(p, row, i), index = (BEGIN(p, row) + i) * s->width + head * size;
  float *query = turned + i * size;
  rotate(query, queries + index, angle(p->cos, at, size), angle(p->sin, at, size), size);
  if (f->sharpness > 0) lengthen(query, size, f->sharpness);
  return (Query){.query = query, .scores = scores + i * seen, .out = out + index, .distance = at};
}

static void self_attention(const Stack *s, const Pass *p, int64_t layer, const float *queries, const float *made,
                           float *out, float *scores, int64_t seen, int64_t thread, int64_t threads) {
  const Attention *f = &s->layers[layer].self;
  int64_t heads = f->heads, size = s->width / heads;
  float turned[p->n * size];
  Query q[p->n];
  Pieces left = pieces(p->rows * heads, thread, threads);
  for (int64_t each; (each = take(&left)) >= 0;) {
    int64_t row = each / heads, head = each % heads, n = COUNT(p, row);
    keep(p, &p->own, made, layer, f, size, p->cos, p->sin, s->context == 0, row, head);
    int64_t base = ((layer * p->rows + row) * heads + head) * p->own.slots * size;
    for (int64_t i = 0; i < n; i++) {
      q[i] = query_of(s, p, f, queries, out, turned, scores, seen, row, i, head, size);
      if (s->context)
        q[i].to = q[i].distance + 1, q[i].from = most(q[i].to - s->context, 0);
      else
        q[i].to = p->lengths ? p->lengths[row] : n, q[i].from = 0, q[i].distance = i;
    }
    attend(q, n, p->own.keys + base, p->own.values + base, size, f->slope, f->side, head);
  }
}

static void cross_attention(const Stack *s, const Pass *p, int64_t layer, const float *queries, float *out, float *scores,
                            int64_t seen, int64_t thread, int64_t threads) {
  const Attention *f = &s->layers[layer].cross;
  int64_t heads = f->heads, size = s->width / heads;
  float turned[p->n * size];
  Query q[p->n];
  Pieces left = pieces(p->rows * heads, thread, threads);
  for (int64_t each; (each = take(&left)) >= 0;) {
    int64_t row = each / heads, head = each % heads, n = COUNT(p, row);
    int64_t base = ((layer * p->rows + row) * heads + head) * p->source.slots * size;
    for (int64_t i = 0; i < n; i++) {
      q[i] = query_of(s, p, f, queries, out, turned, scores, seen, row, i, head, size);
      q[i].to = p->until[row] + 1, q[i].from = most(q[i].to - p->source_context, 0);
    }
    attend(q, n, p->source.keys + base, p->source.values + base, size, f->slope, f->side, head);
  }
}

// The whole stack, by one thread of several.

#define TOGETHER together(threads);

static void run(const Stack *s, const Pass *p, float *room, int64_t room_width, float *scores, int64_t seen, int64_t thread,
                int64_t threads) {
  int64_t rows = BEGIN(p, p->rows), d = s->width;
  float *h = room, *queries = h + rows * 2 * d, *made = queries + rows * d, *mixed = made + rows * room_width;
  if (s->join.panels) {
    for (int64_t m = thread; m < rows; m += threads) {
      memcpy(h + m * 2 * d, p->x + m * d, d * sizeof(float));
      norm_row(&s->before_norm, p->before + m * d, d, h + m * 2 * d + d);
    }
    TOGETHER
    map(&s->join, h, rows, p->x, ADD, thread, threads, &s->layers->self.query);
    TOGETHER
  }
  for (int64_t i = 0; i < s->count; i++) {
    const Layer *layer = &s->layers[i];
    int crossed = layer->cross.heads > 0;
    const Map *after = i + 1 < s->count ? &layer[1].self.query : s->exchanges ? &s->exchange->key_value : NULL;
    norms(&layer->self.norm, p->x, rows, d, h, d, thread, threads);
    TOGETHER
    map(&layer->self.query, h, rows, queries, PLAIN, thread, threads, &layer->self.key_value);
    map(&layer->self.key_value, h, rows, made, PLAIN, thread, threads, &layer->self.out);
    TOGETHER
    self_attention(s, p, i, queries, made, mixed, scores, seen, thread, threads);
    TOGETHER
    map(&layer->self.out, mixed, rows, p->x, ADD, thread, threads, crossed ? &layer->cross.query : &layer->up);
    TOGETHER
    if (crossed) {
      norms(&layer->cross.norm, p->x, rows, d, h, d, thread, threads);
      TOGETHER
      map(&layer->cross.query, h, rows, queries, PLAIN, thread, threads, &layer->cross.out);
      TOGETHER
      cross_attention(s, p, i, queries, mixed, scores, seen, thread, threads);
      TOGETHER
      map(&layer->cross.out, mixed, rows, p->x, ADD, thread, threads, &layer->up);
      TOGETHER
    }
    norms(&layer->mlp_norm, p->x, rows, d, h, d, thread, threads);
    TOGETHER
    map(&layer->up, h, rows, made, (int)layer->activation, thread, threads, &layer->down);
    TOGETHER
    map(&layer->down, made, rows, p->x, ADD, thread, threads, after);
    TOGETHER
  }
  norms(&s->norm, p->x, rows, d, p->x, d, thread, threads);
  for (int64_t i = 0; i < s->exchanges; i++) {
    const Attention *f = &s->exchange[i];
    int64_t heads = f->heads, size = s->exchange_width / heads;
    TOGETHER
    map(&f->key_value, p->x, rows, made, PLAIN, thread, threads, i + 1 < s->exchanges ? &f[1].key_value : NULL);
    TOGETHER
    Pieces left = pieces(p->rows * heads, thread, threads);
    for (int64_t each; (each = take(&left)) >= 0;)
      keep(p, &p->exchange, made, i, f, size, p->exchange_cos, p->exchange_sin, 0, each / heads, each % heads);
  }
}

// Besides what it returns, a pass needs room for the scores of each thread: `p->n * seen`.
static int64_t floats_of(const Stack *s, const Pass *p, int64_t *made, int64_t *seen) {
  *made = most(s->hidden, 2 * most(s->width, s->exchange_width));
  *seen = (most(p->own.slots, p->source.slots) + 23) / 16 * 16;
  return p->rows * p->n * (4 * s->width + *made);
}

static float *memory_of(int64_t floats) { return aligned_alloc(64, ((size_t)floats * sizeof(float) + 63) / 64 * 64); }

typedef struct {
  const Stack *stack;
  const Pass *pass;
  float *room, *scores;
  int64_t made, seen;
} Running;

static void run_part(const void *of, int64_t thread, int64_t threads) {
  const Running *r = of;
  run(r->stack, r->pass, r->room, r->made, r->scores + thread * r->pass->n * r->seen, r->seen, thread, threads);
}

// What a pass needs by so many threads; `room` is NULL where memory is short, and to be freed.
static Running running(const Stack *s, const Pass *p, int64_t threads) {
  Running r = {.stack = s, .pass = p};
  int64_t room = floats_of(s, p, &r.made, &r.seen);
  r.room = memory_of(room + threads * p->n * r.seen);
  r.scores = r.room + room;
  return r;
}

// 0, or -1 where memory is short.
int caddf_stack(const Stack *s, const Pass *p) {
  Running r = running(s, p, p->threads);
  if (!r.room) return -1;
  share_out(run_part, &r, p->threads);
  free(r.room);
  return 0;
}

// The fusion (eq. 10): x + MLP([x ; what its cross-attention finds on the canvas], its own place's state), normed.

typedef struct {
  Attention cross;
  Map up, own, down;  // `own` without panels: none
  Norm norm;
  int64_t width, own_width;
} Fusion;

typedef struct {
  int64_t rows, n;
  float *x;                   // [rows, n, width], overwritten
  const int64_t *positions;   // [rows, n]
  int64_t *slot, *from, *to;  // [rows, n]: the slot of the canvas that each stands at, and those that it sees
  const float *cos, *sin;     // rotary angles [positions, size]
  Cache canvas;               // keys and values of one layer
  float *own;                 // [rows, slots, own_width]: the canvas's states
  int64_t threads;
  int64_t *first;             // [rows + 1], as a pass's
} Fusing;

typedef struct {
  const Fusion *fusion;
  const Fusing *pass;
  float *both, *queries, *found, *hidden, *own, *scores;
  int64_t most;  // scores of a query
} Fused;

static void fuse_part(const void *of, int64_t thread, int64_t threads) {
  const Fused *w = of;
  const Fusion *f = w->fusion;
  const Fusing *p = w->pass;
  int64_t rows = BEGIN(p, p->rows), d = f->width, heads = f->cross.heads, size = d / heads;
  if (f->own.panels) {
    for (int64_t row = 0; row < p->rows; row++)
      for (int64_t m = BEGIN(p, row) + thread; m < BEGIN(p, row + 1); m += threads) {
        int64_t slot = row * p->canvas.slots + most(0, least_of(p->slot[m], p->canvas.slots - 1));
        memcpy(w->own + m * f->own_width, p->own + slot * f->own_width, f->own_width * sizeof(float));
      }
    TOGETHER
    map(&f->own, w->own, rows, w->hidden, PLAIN, thread, threads, &f->cross.query);
  }
  map(&f->cross.query, p->x, rows, w->queries, PLAIN, thread, threads, &f->cross.out);
  TOGETHER
  float turned[p->n * size];
  Query q[p->n];
  Pieces left = pieces(p->rows * heads, thread, threads);
  for (int64_t each; (each = take(&left)) >= 0;) {
    int64_t row = each / heads, head = each % heads, base = each * p->canvas.slots * size, n = COUNT(p, row);
    for (int64_t i = 0; i < n; i++) {
      int64_t index = BEGIN(p, row) + i, at = p->positions[index], place = index * d + head * size;
      rotate(turned + i * size, w->queries + place, angle(p->cos, at, size), angle(p->sin, at, size), size);
      q[i] = (Query){.query = turned + i * size, .scores = w->scores + (thread * p->n + i) * w->most,
                     .out = w->found + place, .from = p->from[index], .to = p->to[index], .distance = p->slot[index]};
    }
    attend(q, n, p->canvas.keys + base, p->canvas.values + base, size, f->cross.slope, f->cross.side, head);
  }
  TOGETHER
  map(&f->cross.out, w->found, rows, w->queries, PLAIN, thread, threads, &f->up);
  TOGETHER
  for (int64_t m = thread; m < rows; m += threads) {
    memcpy(w->both + m * 2 * d, p->x + m * d, d * sizeof(float));
    memcpy(w->both + m * 2 * d + d, w->queries + m * d, d * sizeof(float));
  }
  TOGETHER
  map(&f->up, w->both, rows, w->hidden, f->own.panels ? ADD_GELU : GELU, thread, threads, &f->down);
  TOGETHER
  map(&f->down, w->hidden, rows, p->x, ADD, thread, threads, NULL);
  TOGETHER
  norms(&f->norm, p->x, rows, d, p->x, d, thread, threads);
}

// What fusing needs by so many threads; `both` is NULL where memory is short, and to be freed.
static Fused fusing(const Fusion *f, const Fusing *p, int64_t threads) {
  Fused w = {.fusion = f, .pass = p, .most = (p->canvas.slots + 23) / 16 * 16};
  int64_t rows = p->rows * p->n, d = f->width;
  w.both = memory_of(rows * (4 * d + f->up.out + f->own_width) + threads * p->n * w.most);
  w.queries = w.both + rows * 2 * d, w.found = w.queries + rows * d, w.hidden = w.found + rows * d;
  w.own = w.hidden + rows * f->up.out, w.scores = w.own + rows * f->own_width;
  return w;
}

// 0, or -1 where memory is short.
int caddf_fuse(const Fusion *f, const Fusing *p) {
  Fused w = fusing(f, p, p->threads);
  if (!w.both) return -1;
  share_out(fuse_part, &w, p->threads);
  free(w.both);
  return 0;
}

// What the fusion reads of a canvas: keys and values of its states, made once.
typedef struct {
  const Fusion *fusion;
  int64_t rows, n;
  const float *states;       // [rows, n, own_width]
  const int64_t *positions;  // [rows, n]
  const int64_t *into;       // [rows]: the first slot that a row's go to; -1: they go nowhere
  const float *cos, *sin;
  Cache canvas;
  float *made;               // [rows, n, 2 width]
  int64_t *first;            // [rows + 1], as a pass's
} Preparing;

static void prepare_part(const void *of, int64_t thread, int64_t threads) {
  const Preparing *p = of;
  int64_t heads = p->fusion->cross.heads, width = p->fusion->width, size = width / heads;
  map(&p->fusion->cross.key_value, p->states, BEGIN(p, p->rows), p->made, PLAIN, thread, threads, NULL);
  TOGETHER
  Pieces left = pieces(p->rows * heads, thread, threads);
  for (int64_t each; (each = take(&left)) >= 0;) {
    int64_t row = each / heads, slot = each * p->canvas.slots + p->into[row];
    if (p->into[row] < 0) continue;
    for (int64_t i = BEGIN(p, row); i < BEGIN(p, row + 1); i++, slot++) {
      const float *both = p->made + i * 2 * width + each % heads * size;
      int64_t at = p->positions[i];
      rotate(p->canvas.keys + slot * size, both, angle(p->cos, at, size), angle(p->sin, at, size), size);
      memcpy(p->canvas.values + slot * size, both + width, size * sizeof(float));
    }
  }
}

void caddf_prepare(const Preparing *p, int64_t threads) { share_out(prepare_part, p, threads); }

typedef struct {
  const Map *map;
  int64_t rows;
  const float *x;
  float *y;
} Mapping;

static void map_share(const void *of, int64_t thread, int64_t threads) {
  const Mapping *m = of;
  map(m->map, m->x, m->rows, m->y, PLAIN, thread, threads, NULL);
}

// y = x W^T + b for `rows` positions.
void caddf_map(const Map *f, int64_t rows, const float *x, float *y, int64_t threads) {
  share_out(map_share, &(Mapping){f, rows, x, y}, threads);
}

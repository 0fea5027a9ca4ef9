// Where `structures.py` has to have the fields of the structures that Python fills: compared when the library is loaded.

#include <stddef.h>

typedef struct {
  const char *structure, *field;  // without a field: the whole
  int64_t offset, size;
} Place;

#define WHOLE(S) {#S, "", 0, sizeof(S)},
#define AT(S, field) {#S, #field, offsetof(S, field), sizeof(((S *)0)->field)},

const Place caddf_layout[] = {
  WHOLE(Map) AT(Map, panels) AT(Map, scales) AT(Map, bias) AT(Map, out) AT(Map, in) AT(Map, type) AT(Map, far)
  WHOLE(Norm) AT(Norm, weight) AT(Norm, bias) AT(Norm, epsilon)
  WHOLE(Cache) AT(Cache, keys) AT(Cache, values) AT(Cache, slots)
  WHOLE(Attention) AT(Attention, norm) AT(Attention, query) AT(Attention, key_value) AT(Attention, out)
  AT(Attention, heads) AT(Attention, slope) AT(Attention, side) AT(Attention, sharpness)
  WHOLE(Layer) AT(Layer, self) AT(Layer, cross) AT(Layer, mlp_norm) AT(Layer, up) AT(Layer, down) AT(Layer, activation)
  WHOLE(Stack) AT(Stack, layers) AT(Stack, count) AT(Stack, width) AT(Stack, hidden) AT(Stack, before_norm)
  AT(Stack, join) AT(Stack, norm) AT(Stack, exchange) AT(Stack, exchanges) AT(Stack, exchange_width)
  AT(Stack, context)
  WHOLE(Pass) AT(Pass, rows) AT(Pass, n) AT(Pass, x) AT(Pass, before) AT(Pass, positions) AT(Pass, alike)
  AT(Pass, cos) AT(Pass, sin) AT(Pass, own) AT(Pass, source) AT(Pass, until) AT(Pass, source_context)
  AT(Pass, exchange) AT(Pass, exchange_cos) AT(Pass, exchange_sin) AT(Pass, threads) AT(Pass, lengths)
  AT(Pass, first)
  WHOLE(Fusion) AT(Fusion, cross) AT(Fusion, up) AT(Fusion, own) AT(Fusion, down) AT(Fusion, norm) AT(Fusion, width)
  AT(Fusion, own_width)
  WHOLE(Fusing) AT(Fusing, rows) AT(Fusing, n) AT(Fusing, x) AT(Fusing, positions) AT(Fusing, slot) AT(Fusing, from)
  AT(Fusing, to) AT(Fusing, cos) AT(Fusing, sin) AT(Fusing, canvas) AT(Fusing, own) AT(Fusing, threads)
  AT(Fusing, first)
  WHOLE(Preparing) AT(Preparing, fusion) AT(Preparing, rows) AT(Preparing, n) AT(Preparing, states)
  AT(Preparing, positions) AT(Preparing, into) AT(Preparing, cos) AT(Preparing, sin) AT(Preparing, canvas)
  AT(Preparing, made) AT(Preparing, first)
  WHOLE(Warp) AT(Warp, temperature) AT(Warp, top_p) AT(Warp, min_p) AT(Warp, top_k) AT(Warp, banned) AT(Warp, bans)
  WHOLE(Draft) AT(Draft, rows) AT(Draft, width) AT(Draft, count) AT(Draft, counts) AT(Draft, states)
  AT(Draft, before) AT(Draft, earlier) AT(Draft, first) AT(Draft, heard) AT(Draft, u) AT(Draft, embedding)
  AT(Draft, shifted) AT(Draft, head) AT(Draft, ids) AT(Draft, given) AT(Draft, warp) AT(Draft, vocabulary)
  AT(Draft, least) AT(Draft, cache) AT(Draft, cos) AT(Draft, sin) AT(Draft, tokens) AT(Draft, q) AT(Draft, drafts) AT(Draft, threads)
  WHOLE(Canvas) AT(Canvas, fusion) AT(Canvas, fusing) AT(Canvas, block) AT(Canvas, seen) AT(Canvas, stack)
  AT(Canvas, pass) AT(Canvas, mask) AT(Canvas, start) AT(Canvas, into)
  WHOLE(Round) AT(Round, rows) AT(Round, length) AT(Round, size) AT(Round, mask) AT(Round, bos) AT(Round, lookup)
  AT(Round, copies) AT(Round, most) AT(Round, renew) AT(Round, since) AT(Round, before) AT(Round, lengths)
  AT(Round, n) AT(Round, held) AT(Round, active) AT(Round, causal) AT(Round, window) AT(Round, chain) AT(Round, pass)
  AT(Round, look) AT(Round, draft) AT(Round, canvas) AT(Round, head) AT(Round, warp)
  AT(Round, head_threads) AT(Round, embedding) AT(Round, shifted) AT(Round, table) AT(Round, logits) AT(Round, u)
  AT(Round, places) AT(Round, x) AT(Round, drafts) AT(Round, fresh) AT(Round, corrected) AT(Round, next)
  AT(Round, read) AT(Round, work)
};
const int64_t caddf_places = sizeof caddf_layout / sizeof *caddf_layout;

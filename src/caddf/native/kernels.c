// Passes of a few positions through a stack of Transformer layers over key-value caches, for CPUs.
//
// What a decoder pays per token is the reading of weights. One call runs a whole stack: each weight is read once for all
// positions of the pass, and nothing is allocated, dispatched or copied between layers.
//
// Every sum is taken in one order that depends on neither how many positions a pass has, nor on the threads: a position
// has the same bits alone, in a batch, and verified together with others.
//
// Weights are float32 or bfloat16, widened on the way, or int8; sums and caches are float32. Matrices lie in panels of 16
// outputs, `[out / 16, in, 16]`, so that weights are read from front to back and no sum crosses lanes. To weights in int8
// inputs are rounded, to 16 bits and a scale for each position: their products are summed as integers, of two inputs at a
// time, `[out / 16, in / 2, 16, 2]`.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "threads.c"

typedef float v8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef uint32_t u8 __attribute__((vector_size(32)));
typedef uint16_t h8 __attribute__((vector_size(16)));
typedef int16_t s8 __attribute__((vector_size(16)));

enum { FLOAT32, BFLOAT16, INT8 };

typedef struct {  // y = x W^T + b; W is in panels, filled up with zeros to whole blocks of 64; bias NULL where there is none
  const void *panels;
  const float *scales;  // of each output, filled up as W is; with INT8 alone
  const float *bias;
  int64_t out, in, type, far;  // far: the model is larger than caches are, and its weights come from memory
} Map;

typedef struct {  // layer norm; weight NULL: none at all
  const float *weight, *bias;
  double epsilon;
} Norm;

typedef struct {  // keys and values of all layers, [layers, B, heads, slots, size]
  float *keys, *values;
  int64_t slots;
} Cache;

typedef struct {
  Norm norm;
  Map query, key_value, out;
  int64_t heads;
  const float *slope, *side;  // linear biases per head, NULL: none
} Attention;

typedef struct {
  Attention self, cross;  // cross.heads 0: none
  Norm mlp_norm;
  Map up, down;
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
  int64_t rows, n;            // the pass: `n` positions in each row
  float *x;                   // [rows, n, width], read and overwritten with the normed states
  const float *before;        // the same shape, for join
  const int64_t *positions;   // [rows, n], or [n] where `alike`
  int64_t alike;
  const float *cos, *sin;     // rotary angles [positions, size], NULL: none
  Cache own;                  // of the layers; slot = position, or with context 0 the place in the pass
  Cache source;               // what cross-attention reads
  const int64_t *until;       // [rows]: the last slot of `source` that a row sees
  int64_t source_context;     // and how many before it
  Cache exchange;             // where keys and values for another branch go
  const float *exchange_cos, *exchange_sin;
  int64_t threads;
} Pass;

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Sums.

static inline float total(v8 a) { return ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7])); }

#ifdef __AVX__
static inline __m256 pairs(__m256 a, __m256 b) {  // as _mm256_hadd_ps, in less time
  return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xDD));
}
#endif

// The totals of four, each as by `total`.
static inline void totals(const v8 *a, float *to) {
#ifdef __AVX__
  __m256 b = pairs(pairs((__m256)a[0], (__m256)a[1]), pairs((__m256)a[2], (__m256)a[3]));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1)));
#else
  for (int i = 0; i < 4; i++) to[i] = total(a[i]);
#endif
}

static inline v8 load(const float *p) {
  v8 a;
  memcpy(&a, p, sizeof a);
  return a;
}

static inline void store(float *p, v8 a) { memcpy(p, &a, sizeof a); }

static inline v8 wide(const uint16_t *p) {
  h8 a;
  memcpy(&a, p, sizeof a);
#ifdef __AVX2__  // one instruction, which not every compiler finds by itself
  return (v8)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)a), 16);
#else
  return (v8)(__builtin_convertvector(a, u8) << 16);
#endif
}

// a b + c, always in one rounding: a compiler may choose otherwise from one loop to the next.
static inline v8 fused(v8 a, v8 b, v8 c) {
#ifdef __FMA__
  return (v8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

static inline v8 all(float a) { return (v8){a, a, a, a, a, a, a, a}; }

static inline v8 choose(i8 which, v8 a, v8 b) { return (v8)((which & (i8)a) | (~which & (i8)b)); }

// e^x to float32's precision: 2^n e^r with |r| <= ln 2 / 2, and e^r by its series.
static inline v8 exponential(v8 x) {
  x = choose(x < all(88.0f), x, all(88.0f));
  x = choose(x > all(-87.0f), x, all(-87.0f));
  v8 n = x * all(1.44269504f);
  n = (n + all(12582912.0f)) - all(12582912.0f);  // rounded
  v8 r = x - n * all(0.693359375f);
  r = r - n * all(-2.12194440e-4f);
  v8 p = all(1.0f / 5040);
  p = p * r + all(1.0f / 720);
  p = p * r + all(1.0f / 120);
  p = p * r + all(1.0f / 24);
  p = p * r + all(1.0f / 6);
  p = p * r + all(0.5f);
  p = p * r + all(1.0f);
  p = p * r + all(1.0f);
  i8 power = (__builtin_convertvector(n, i8) + 127) << 23;
  return p * (v8)power;
}

static inline v8 gelu(v8 x) {  // x sigmoid(2 u), which is the form with tanh(u)
  v8 u = all(1.5957691216f) * (x + all(0.044715f) * x * x * x);
  return x / (all(1.0f) + exponential(-u));
}

typedef struct {  // weights that are read next: from `at` on, so many lines of 64 bytes are asked for every STRIDE steps
  const char *at;
  int64_t lines;
} Ahead;
enum { STRIDE = 16 };

// Linear maps over panels of 16 outputs: MR positions and NP panels, one running sum for each of their outputs. A step
// holds either its inputs or its weights in registers, whichever are fewer.

#define HOLD_INPUTS(MR, NP, get)                                           \
  v8 a[MR];                                                                \
  for (int m = 0; m < MR; m++) a[m] = all(x[m * stride + k]);              \
  for (int o = 0; o < 2 * NP; o++) {                                       \
    v8 b = get(w + (o / 2 * in + k) * 16 + o % 2 * 8);                     \
    for (int m = 0; m < MR; m++) acc[m][o] = fused(a[m], b, acc[m][o]);    \
  }
#define HOLD_WEIGHTS(MR, NP, get)                                          \
  v8 b[2 * NP];                                                            \
  for (int o = 0; o < 2 * NP; o++) b[o] = get(w + (o / 2 * in + k) * 16 + o % 2 * 8); \
  for (int m = 0; m < MR; m++) {                                           \
    v8 a = all(x[m * stride + k]);                                         \
    for (int o = 0; o < 2 * NP; o++) acc[m][o] = fused(a, b[o], acc[m][o]); \
  }
#define TILE(MR, NP, HOLD, type, get)                                                                     \
  static void tile_##type##_##MR##_##NP(const void *panels, int64_t in, const void *inputs, int64_t stride, float *sums, Ahead *ahead) { \
    const type *w = panels;                                                                            \
    const float *x = inputs;                                                                           \
    v8 acc[MR][2 * NP];                                                                                \
    for (int m = 0; m < MR; m++)                                                                       \
      for (int o = 0; o < 2 * NP; o++) acc[m][o] = all(0.0f);                                          \
    for (int64_t k = 0; k < in;) {                                                                     \
      const char *soon = ahead->at;                                                                    \
      ahead->at += ahead->lines * 64;                                                                  \
      for (; soon < ahead->at; soon += 64) __builtin_prefetch(soon, 0, 2);                             \
      for (int64_t end = k + STRIDE < in ? k + STRIDE : in; k < end; k++) {                            \
        HOLD(MR, NP, get)                                                                              \
      }                                                                                                \
    }                                                                                                  \
    for (int m = 0; m < MR; m++)                                                                       \
      for (int o = 0; o < 2 * NP; o++) store(sums + (m * 2 * NP + o) * 8, acc[m][o]);                  \
  }

typedef uint16_t half;
#define TILES(MR, NP, HOLD)         \
  TILE(MR, NP, HOLD, float, load) \
  TILE(MR, NP, HOLD, half, wide)
TILES(1, 4, HOLD_INPUTS)
TILES(2, 2, HOLD_INPUTS)
TILES(3, 2, HOLD_INPUTS)
TILES(1, 1, HOLD_WEIGHTS)
TILES(2, 1, HOLD_WEIGHTS)
TILES(3, 1, HOLD_WEIGHTS)
TILES(4, 1, HOLD_WEIGHTS)
TILES(5, 1, HOLD_WEIGHTS)
TILES(6, 1, HOLD_WEIGHTS)

// Weights in int8 and inputs of 16 bits, each row of them behind its scale. No sum of 512 products leaves 32 bits.

enum { LEVELS = 32767, PRODUCTS = 512, SCALE = sizeof(float) / sizeof(int16_t) };

static void round_row(const float *x, int64_t in, int16_t *to) {
  int64_t whole = in / 8 * 8;
  i8 tops = {0};  // of numbers without their signs, whose bits are in their order
  for (int64_t k = 0; k < whole; k += 8) {
    i8 size = (i8)load(x + k) & INT32_MAX;
    i8 larger = size > tops;
    tops = (larger & size) | (~larger & tops);
  }
  int32_t bits = 0;
  for (int i = 0; i < 8; i++) bits = tops[i] > bits ? tops[i] : bits;
  for (int64_t k = whole; k < in; k++) {
    int32_t size;
    memcpy(&size, x + k, sizeof size);
    bits = (size & INT32_MAX) > bits ? size & INT32_MAX : bits;
  }
  float top;  // what is no number is larger than all that are, and makes the scale none
  memcpy(&top, &bits, sizeof top);
  float scale = top / LEVELS, inverse = top > 0 ? LEVELS / top : 0;
  memcpy(to, &scale, sizeof scale);
  to += SCALE;
  for (int64_t k = 0; k < whole; k += 8) {
    v8 nearest = load(x + k) * all(inverse) + all(12582912.0f);  // whose last bits are the rounded number
    s8 numbers = __builtin_convertvector((i8)nearest << 16 >> 16, s8);
    memcpy(to + k, &numbers, sizeof numbers);
  }
  for (int64_t k = whole; k < in; k++) to[k] = (int16_t)lrintf(x[k] * inverse);
  if (in % 2) to[in] = 0;
}

// sum + a[0] w[0] + a[1] w[1] for eight outputs, of which `w` has the pairs; `pair` has two inputs.
static inline i8 summed(i8 sum, i8 pair, i8 weights) {
#ifdef __AVX2__
  sum = (i8)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16((__m256i)pair, (__m256i)weights));
  __asm__ volatile("" : "+x"(sum));  // here, and not behind those that follow, for which there are no registers
  return sum;
#else
  return sum + (pair << 16 >> 16) * (weights << 16 >> 16) + (pair >> 16) * (weights >> 16);
#endif
}

static inline i8 pairs_of(const int8_t *w) {
#ifdef __AVX2__
  return (i8)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w));
#else
  i8 a;
  for (int i = 0; i < 8; i++) a[i] = (int32_t)((uint32_t)w[2 * i + 1] << 16 | (uint16_t)w[2 * i]);
  return a;
#endif
}

#define UNROLLED _Pragma("GCC unroll 8")
#define WHOLE_TILE(MR, NP)                                                                                          \
  static void tile_byte_##MR##_##NP(const void *panels, int64_t in, const void *inputs, int64_t stride, float *sums, Ahead *ahead) { \
    const int8_t *w = panels;                                                                                       \
    const int16_t *x = (const int16_t *)inputs + SCALE;                                                             \
    int64_t deep = (in + 1) / 2 * 2;                                                                                \
    for (int i = 0; i < MR * 2 * NP; i++) store(sums + i * 8, all(0.0f));                                           \
    for (int64_t k = 0; k < deep;) {                                                                                \
      i8 acc[MR][2 * NP];                                                                                           \
      UNROLLED for (int m = 0; m < MR; m++)                                                                         \
        UNROLLED for (int o = 0; o < 2 * NP; o++) acc[m][o] = (i8){0};                                              \
      for (int64_t whole = k + PRODUCTS < deep ? k + PRODUCTS : deep; k < whole;) {                                 \
        const char *soon = ahead->at;                                                                               \
        ahead->at += ahead->lines * 64;                                                                             \
        for (; soon < ahead->at; soon += 64) __builtin_prefetch(soon, 0, 2);                                        \
        for (int64_t end = k + STRIDE < whole ? k + STRIDE : whole; k < end; k += 2) {                              \
          i8 b[2 * NP];                                                                                             \
          UNROLLED for (int o = 0; o < 2 * NP; o++) b[o] = pairs_of(w + (o / 2 * deep + k) * 16 + o % 2 * 16);       \
          UNROLLED for (int m = 0; m < MR; m++) {                                                                   \
            int32_t pair;                                                                                           \
            memcpy(&pair, x + m * stride + k, sizeof pair);                                                         \
            i8 a = {pair, pair, pair, pair, pair, pair, pair, pair};                                                \
            UNROLLED for (int o = 0; o < 2 * NP; o++) acc[m][o] = summed(acc[m][o], a, b[o]);                       \
          }                                                                                                         \
        }                                                                                                           \
      }                                                                                                             \
      UNROLLED for (int m = 0; m < MR; m++)                                                                         \
        UNROLLED for (int o = 0; o < 2 * NP; o++) {                                                                 \
          float *to = sums + (m * 2 * NP + o) * 8;                                                                  \
          store(to, load(to) + __builtin_convertvector(acc[m][o], v8));                                             \
        }                                                                                                           \
    }                                                                                                               \
    for (int m = 0; m < MR; m++) {                                                                                  \
      float scale;                                                                                                  \
      memcpy(&scale, x + m * stride - SCALE, sizeof scale);                                                         \
      for (int o = 0; o < 2 * NP; o++) store(sums + (m * 2 * NP + o) * 8, load(sums + (m * 2 * NP + o) * 8) * all(scale)); \
    }                                                                                                               \
  }
WHOLE_TILE(1, 4)
WHOLE_TILE(2, 2)
WHOLE_TILE(1, 1)
WHOLE_TILE(2, 1)
WHOLE_TILE(3, 1)
WHOLE_TILE(4, 1)
WHOLE_TILE(5, 1)
WHOLE_TILE(6, 1)

enum { TALLEST = 6, NEAR = 64 << 10, ROUNDED = 128 << 10 };  // so many rounded inputs at a time
typedef void (*Tile)(const void *, int64_t, const void *, int64_t, float *, Ahead *);
#define THESE(type, three)                                                                                       \
  {{tile_##type##_1_4, tile_##type##_2_2, tile_##type##_##three, tile_##type##_4_1, tile_##type##_5_1, tile_##type##_6_1}, \
   {tile_##type##_1_1, tile_##type##_2_1, tile_##type##_3_1, tile_##type##_4_1, tile_##type##_5_1, tile_##type##_6_1}}
static const Tile tiles[3][2][TALLEST] = {THESE(float, 3_2), THESE(half, 3_2), THESE(byte, 3_1)};  // by type, whether narrow, positions
static const int64_t panels_of[3][2][TALLEST] = {{{4, 2, 2, 1, 1, 1}, {1, 1, 1, 1, 1, 1}},
                                                 {{4, 2, 2, 1, 1, 1}, {1, 1, 1, 1, 1, 1}},
                                                 {{4, 2, 1, 1, 1, 1}, {1, 1, 1, 1, 1, 1}}};
static const int64_t bytes_of[] = {4, 2, 1};

enum { PLAIN, GELU, ADD };

static inline v8 finished(v8 sum, const float *scales, const float *bias, const float *y, int then) {
  if (scales) sum *= load(scales);
  if (bias) sum += load(bias);
  return then == GELU ? gelu(sum) : then == ADD ? load(y) + sum : sum;
}

static int64_t deep_of(const Map *f) { return f->type == INT8 ? (f->in + 1) / 2 * 2 : f->in; }

// Positions are shared out evenly among tiles, since a low one has too few sums to keep a processor busy.
static int64_t tiles_for(int64_t rows) { return (rows + TALLEST - 1) / TALLEST; }
static int64_t height(int64_t rows) { return (rows + tiles_for(rows) - 1) / tiles_for(rows); }  // of the next

// Outputs `from` to `to`, of which `from` begins a panel, of `rows` positions; ADD adds to what is there.
static void map_part(const Map *f, const float *x, int64_t rows, float *y, int then, int64_t from, int64_t to,
                     const char *soon) {
  // A few panels stay in a near cache while all positions pass over them, and those behind are fetched meanwhile.
  int64_t wide = deep_of(f) * bytes_of[f->type], last = rows / tiles_for(rows) - 1, steps = 0;
  int narrow = rows > TALLEST && panels_of[f->type][0][last] * 16 * wide > 2 * NEAR;
  const int64_t *panels = panels_of[f->type][narrow];
  int64_t stride = f->type == INT8 ? SCALE + deep_of(f) : f->in;
  int16_t rounded[f->type == INT8 ? rows * stride : 1];
  for (int64_t m = 0; f->type == INT8 && m < rows; m++) round_row(x + m * f->in, f->in, rounded + m * stride);
  int64_t block = 64;
  while (block > 16 * panels[last] && block * wide > NEAR) block /= 2;
  for (int64_t m = 0; m < rows; m += height(rows - m)) steps += block / 16 / panels[height(rows - m) - 1];
  int64_t lines = rows < 4 || !f->far ? 0 : (block * wide / 64 * STRIDE + steps * f->in - 1) / (steps * f->in);
  for (int64_t low = from; low < to; low += block) {
    int64_t high = low + block < to ? low + block : to;
    Ahead ahead = {high < to ? (const char *)f->panels + high * wide : soon, high < to || soon ? lines : 0};
    for (int64_t m = 0, mr; m < rows; m += mr) {
      mr = height(rows - m);
      for (int64_t o = low, each = 16 * panels[mr - 1]; o < high; o += each) {
        float sums[TALLEST * 16];
        const void *read = f->type == INT8 ? (const void *)(rounded + m * stride) : x + m * stride;
        tiles[f->type][narrow][mr - 1]((const char *)f->panels + o * wide, f->in, read, stride, sums, &ahead);
        for (int64_t i = 0; i < mr; i++) {
          float *row = y + (m + i) * f->out, *sum = sums + i * each;
          int64_t count = high - o < each ? high - o : each, j = 0;
          for (; j + 8 <= count; j += 8)
            store(row + o + j, finished(load(sum + j), f->scales ? f->scales + o + j : NULL,
                                        f->bias ? f->bias + o + j : NULL, row + o + j, then));
          for (; j < count; j++) {
            float one = sum[j] * (f->scales ? f->scales[o + j] : 1) + (f->bias ? f->bias[o + j] : 0);
            row[o + j] = then == ADD ? row[o + j] + one : then == GELU ? gelu(all(one))[0] : one;
          }
        }
      }
    }
  }
}

static void share(int64_t count, int64_t thread, int64_t threads, int64_t grain, int64_t *from, int64_t *to) {
  int64_t blocks = (count + grain - 1) / grain;
  *from = thread * blocks / threads * grain;
  *to = (thread + 1) * blocks / threads * grain;
  if (*to > count) *to = count;
}

// `soon` is the map that will be read next, NULL where it is not known.
static void map(const Map *f, const float *x, int64_t rows, float *y, int then, int64_t thread, int64_t threads,
                const Map *soon) {
  if (!rows) return;
  int64_t from, to, next = 0, end, grain = 16 * (rows > 1 ? 2 : 4);  // whole tiles
  if (soon) share(soon->out, thread, threads, grain, &next, &end);
  share(f->out, thread, threads, grain, &from, &to);
  const char *then_read = soon ? (const char *)soon->panels + next * deep_of(soon) * bytes_of[soon->type] : NULL;
  int64_t some = f->type == INT8 ? most(ROUNDED / (SCALE + deep_of(f)) / TALLEST, 1) * TALLEST : rows;
  for (int64_t m = 0; m < rows; m += some)
    map_part(f, x + m * f->in, rows - m < some ? rows - m : some, y + m * f->out, then, from, to, then_read);
}

static void norm_row(const Norm *f, const float *x, int64_t width, float *y) {
  if (!f->weight) {
    memmove(y, x, width * sizeof(float));
    return;
  }
  v8 sums = all(0.0f), squares = all(0.0f);
  int64_t whole = width / 8 * 8;
  for (int64_t k = 0; k < whole; k += 8) sums += load(x + k);
  float sum = total(sums);
  for (int64_t k = whole; k < width; k++) sum += x[k];
  float mean = sum / width;
  for (int64_t k = 0; k < whole; k += 8) {
    v8 d = load(x + k) - all(mean);
    squares = fused(d, d, squares);
  }
  float square = total(squares);
  for (int64_t k = whole; k < width; k++) square += (x[k] - mean) * (x[k] - mean);
  float scale = 1.0f / sqrtf(square / width + (float)f->epsilon);
  for (int64_t k = 0; k < whole; k += 8) {
    v8 y_k = (load(x + k) - all(mean)) * all(scale) * load(f->weight + k);
    store(y + k, f->bias ? y_k + load(f->bias + k) : y_k);
  }
  for (int64_t k = whole; k < width; k++) y[k] = (x[k] - mean) * scale * f->weight[k] + (f->bias ? f->bias[k] : 0);
}

static void norms(const Norm *f, const float *x, int64_t rows, int64_t width, float *y, int64_t y_stride, int64_t thread,
                  int64_t threads) {
  for (int64_t m = thread; m < rows; m += threads) norm_row(f, x + m * width, width, y + m * y_stride);
}

// Attention.

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

static int64_t position(const Pass *p, int64_t row, int64_t i) { return p->positions[p->alike ? i : row * p->n + i]; }

static const float *angle(const float *table, int64_t position, int64_t size) {
  return table ? table + position * size : NULL;
}

// Turns and stores what `key_value` made, `[rows, n, 2 width]`, for the heads of one thread.
static void keep(const Pass *p, const Cache *cache, const float *made, int64_t layer, int64_t heads, int64_t size,
                 const float *cos, const float *sin, int64_t slot_is_place, int64_t row, int64_t head) {
  int64_t width = heads * size;
  int64_t base = ((layer * p->rows + row) * heads + head) * cache->slots;
  for (int64_t i = 0; i < p->n; i++) {
    int64_t at = position(p, row, i), slot = base + (slot_is_place ? i : at);
    const float *both = made + (row * p->n + i) * 2 * width + head * size;
    rotate(cache->keys + slot * size, both, angle(cos, at, size), angle(sin, at, size), size);
    memcpy(cache->values + slot * size, both + width, size * sizeof(float));
  }
}

// A query of a pass, turned; its scores lie in the room of its thread.
static Query query_of(const Stack *s, const Pass *p, const float *queries, float *out, float *turned, float *scores,
                      int64_t seen, int64_t row, int64_t i, int64_t head, int64_t size) {
  int64_t at = position(p, row, i), index = (row * p->n + i) * s->width + head * size;
  float *query = turned + i * size;
  rotate(query, queries + index, angle(p->cos, at, size), angle(p->sin, at, size), size);
  return (Query){.query = query, .scores = scores + i * seen, .out = out + index, .distance = at};
}

static void self_attention(const Stack *s, const Pass *p, int64_t layer, const float *queries, const float *made,
                           float *out, float *scores, int64_t seen, int64_t thread, int64_t threads) {
  const Attention *f = &s->layers[layer].self;
  int64_t heads = f->heads, size = s->width / heads, from, to;
  float turned[p->n * size];
  Query q[p->n];
  share(p->rows * heads, thread, threads, 1, &from, &to);
  for (int64_t each = from; each < to; each++) {
    int64_t row = each / heads, head = each % heads;
    keep(p, &p->own, made, layer, heads, size, p->cos, p->sin, s->context == 0, row, head);
    int64_t base = ((layer * p->rows + row) * heads + head) * p->own.slots * size;
    for (int64_t i = 0; i < p->n; i++) {
      q[i] = query_of(s, p, queries, out, turned, scores, seen, row, i, head, size);
      if (s->context)
        q[i].to = q[i].distance + 1, q[i].from = most(q[i].to - s->context, 0);
      else
        q[i].to = p->n, q[i].from = 0, q[i].distance = i;
    }
    attend(q, p->n, p->own.keys + base, p->own.values + base, size, f->slope, f->side, head);
  }
}

static void cross_attention(const Stack *s, const Pass *p, int64_t layer, const float *queries, float *out, float *scores,
                            int64_t seen, int64_t thread, int64_t threads) {
  const Attention *f = &s->layers[layer].cross;
  int64_t heads = f->heads, size = s->width / heads, from, to;
  float turned[p->n * size];
  Query q[p->n];
  share(p->rows * heads, thread, threads, 1, &from, &to);
  for (int64_t each = from; each < to; each++) {
    int64_t row = each / heads, head = each % heads;
    int64_t base = ((layer * p->rows + row) * heads + head) * p->source.slots * size;
    for (int64_t i = 0; i < p->n; i++) {
      q[i] = query_of(s, p, queries, out, turned, scores, seen, row, i, head, size);
      q[i].to = p->until[row] + 1, q[i].from = most(q[i].to - p->source_context, 0);
    }
    attend(q, p->n, p->source.keys + base, p->source.values + base, size, f->slope, f->side, head);
  }
}

// The whole stack, by one thread of several.

#define TOGETHER together(threads);

static void run(const Stack *s, const Pass *p, float *room, int64_t room_width, float *scores, int64_t seen, int64_t thread,
                int64_t threads) {
  int64_t rows = p->rows * p->n, d = s->width;
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
    map(&layer->up, h, rows, made, GELU, thread, threads, &layer->down);
    TOGETHER
    map(&layer->down, made, rows, p->x, ADD, thread, threads, after);
    TOGETHER
  }
  norms(&s->norm, p->x, rows, d, p->x, d, thread, threads);
  for (int64_t i = 0; i < s->exchanges; i++) {
    const Attention *f = &s->exchange[i];
    int64_t heads = f->heads, size = s->exchange_width / heads, from, to;
    TOGETHER
    map(&f->key_value, p->x, rows, made, PLAIN, thread, threads, i + 1 < s->exchanges ? &f[1].key_value : NULL);
    TOGETHER
    share(p->rows * heads, thread, threads, 1, &from, &to);
    for (int64_t each = from; each < to; each++)
      keep(p, &p->exchange, made, i, heads, size, p->exchange_cos, p->exchange_sin, 0, each / heads, each % heads);
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

// 0, or -1 where memory is short.
int caddf_stack(const Stack *s, const Pass *p) {
  Running r = {.stack = s, .pass = p};
  int64_t room = floats_of(s, p, &r.made, &r.seen);
  r.room = memory_of(room + p->threads * p->n * r.seen);
  if (!r.room) return -1;
  r.scores = r.room + room;
  share_out(run_part, &r, p->threads);
  free(r.room);
  return 0;
}

// The fusion (eq. 10): x + MLP([x ; what its cross-attention finds on the canvas], its own place's state), normed.

typedef struct {
  Attention cross;  // whose keys and values are made beforehand
  Map up, own, down;  // `own` without panels: none
  Norm norm;
  int64_t width, own_width;
} Fusion;

typedef struct {
  int64_t rows, n;
  float *x;                  // [rows, n, width], overwritten
  const float *own;          // [rows, n, own_width]
  const int64_t *positions;  // [rows, n]
  const float *cos, *sin;    // rotary angles [positions, size]
  Cache canvas;              // of one layer
  const int64_t *start;      // [rows]: the position of the canvas's first slot
  const int64_t *seen;       // [rows]: how many slots of it a row sees
  int64_t threads;
} Fusing;

typedef struct {
  const Fusion *fusion;
  const Fusing *pass;
  float *both, *queries, *found, *hidden, *scores;
  int64_t most;  // scores of a query
} Fused;

static void fuse_part(const void *of, int64_t thread, int64_t threads) {
  const Fused *w = of;
  const Fusion *f = w->fusion;
  const Fusing *p = w->pass;
  int64_t rows = p->rows * p->n, d = f->width, heads = f->cross.heads, size = d / heads, hidden = f->up.out, from, to;
  map(&f->cross.query, p->x, rows, w->queries, PLAIN, thread, threads, &f->cross.out);
  if (f->own.panels) map(&f->own, p->own, rows, w->hidden, PLAIN, thread, threads, &f->up);
  TOGETHER
  share(p->rows * heads, thread, threads, 1, &from, &to);
  float turned[p->n * size];
  Query q[p->n];
  for (int64_t each = from; each < to; each++) {
    int64_t row = each / heads, head = each % heads, base = each * p->canvas.slots * size;
    for (int64_t i = 0; i < p->n; i++) {
      int64_t index = row * p->n + i, at = p->positions[index], place = index * d + head * size;
      rotate(turned + i * size, w->queries + place, angle(p->cos, at, size), angle(p->sin, at, size), size);
      q[i] = (Query){.query = turned + i * size, .scores = w->scores + (thread * p->n + i) * w->most,
                     .out = w->found + place, .to = p->seen[row], .distance = at - p->start[row]};
    }
    attend(q, p->n, p->canvas.keys + base, p->canvas.values + base, size, f->cross.slope, f->cross.side, head);
  }
  TOGETHER
  map(&f->cross.out, w->found, rows, w->queries, PLAIN, thread, threads, &f->up);
  TOGETHER
  for (int64_t m = thread; m < rows; m += threads) {
    memcpy(w->both + m * 2 * d, p->x + m * d, d * sizeof(float));
    memcpy(w->both + m * 2 * d + d, w->queries + m * d, d * sizeof(float));
  }
  TOGETHER
  map(&f->up, w->both, rows, w->hidden, f->own.panels ? ADD : PLAIN, thread, threads, &f->down);
  TOGETHER
  for (int64_t m = thread; m < rows; m += threads)
    for (int64_t k = 0; k < hidden; k += 8) store(w->hidden + m * hidden + k, gelu(load(w->hidden + m * hidden + k)));
  TOGETHER
  map(&f->down, w->hidden, rows, p->x, ADD, thread, threads, NULL);
  TOGETHER
  norms(&f->norm, p->x, rows, d, p->x, d, thread, threads);
}

// 0, or -1 where memory is short.
int caddf_fuse(const Fusion *f, const Fusing *p) {
  Fused w = {.fusion = f, .pass = p, .most = (p->canvas.slots + 23) / 16 * 16};
  int64_t rows = p->rows * p->n, d = f->width;
  float *memory = memory_of(rows * (4 * d + f->up.out) + p->threads * p->n * w.most);
  if (!memory) return -1;
  w.both = memory, w.queries = w.both + rows * 2 * d, w.found = w.queries + rows * d, w.hidden = w.found + rows * d;
  w.scores = w.hidden + rows * f->up.out;
  share_out(fuse_part, &w, p->threads);
  free(memory);
  return 0;
}

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

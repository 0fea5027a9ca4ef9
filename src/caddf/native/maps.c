// Linear maps of a few positions, and layer norms.
//
// Weights are float32 or bfloat16, widened on the way, or int8; sums are float32. Matrices lie in panels of 16 outputs,
// `[out / 16, in, 16]`, so that weights are read from front to back and no sum crosses lanes. To weights in int8 inputs are
// rounded, to 16 bits and a scale for each position: their products are summed as integers, of two inputs at a time,
// `[out / 16, in / 2, 16, 2]`.

#include "threads.c"
#include "vectors.c"

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

enum { PLAIN, GELU, RELU2, ADD, ADD_GELU };

static inline v8 activated(v8 x, int then) {
  if (then == RELU2) return choose(x < all(0.0f), all(0.0f), x * x);
  return then == GELU || then == ADD_GELU ? gelu(x) : x;
}

static inline v8 finished(v8 sum, const float *scales, const float *bias, const float *y, int then) {
  if (scales) sum *= load(scales);
  if (bias) sum += load(bias);
  if (then >= ADD) sum += load(y);
  return activated(sum, then);
}

static int64_t deep_of(const Map *f) { return f->type == INT8 ? (f->in + 1) / 2 * 2 : f->in; }

// Positions are shared out evenly among tiles, since a low one has too few sums to keep a processor busy.
static int64_t tiles_for(int64_t rows) { return (rows + TALLEST - 1) / TALLEST; }
static int64_t height(int64_t rows) { return (rows + tiles_for(rows) - 1) / tiles_for(rows); }  // of the next

// All outputs of `rows` positions, by several threads; ADD and ADD_GELU add to what is there. `soon` is the map that will
// be read next, NULL where it is not known.
static void map_some(const Map *f, const float *x, int64_t rows, float *y, int then, int64_t thread, int64_t threads,
                     const Map *soon) {
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
  int64_t blocks = (f->out + block - 1) / block, mine = first_of(blocks, thread + 1, threads);
  const char *then_read = NULL;  // this thread's share of `soon`
  if (soon)
    then_read = (const char *)soon->panels +
                first_of(soon->out / 16, thread, threads) * 16 * deep_of(soon) * bytes_of[soon->type];
  Pieces left = pieces(blocks, thread, threads);
  for (int64_t piece; (piece = take(&left)) >= 0;) {
    int64_t low = piece * block, high = least_of(low + block, f->out);
    const char *next = piece + 1 < mine ? (const char *)f->panels + high * wide : then_read;
    Ahead ahead = {next, next ? lines : 0};
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
            if (then >= ADD) one += row[o + j];
            row[o + j] = activated(all(one), then)[0];
          }
        }
      }
    }
  }
}

static void map(const Map *f, const float *x, int64_t rows, float *y, int then, int64_t thread, int64_t threads,
                const Map *soon) {
  int64_t some = f->type == INT8 ? most(ROUNDED / (SCALE + deep_of(f)) / TALLEST, 1) * TALLEST : rows;
  for (int64_t m = 0; m < rows; m += some)
    map_some(f, x + m * f->in, least_of(rows - m, some), y + m * f->out, then, thread, threads, soon);
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

// Eight numbers at a time, with the instructions that a compiler does not find by itself.

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef float v8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef uint32_t u8 __attribute__((vector_size(32)));
typedef uint16_t h8 __attribute__((vector_size(16)));
typedef int16_t s8 __attribute__((vector_size(16)));

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

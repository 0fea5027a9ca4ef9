// Threads that do a piece of work together, and wait for each other within it.
//
// They are OpenMP's, whose runtime torch has loaded already: threads of our own would contend with those for the cores.
// They wait for each other in a way of ours. A thread looks again and again for a moment, since most waits are shorter
// than falling asleep, and then sleeps: where another program has taken a core, looking on would only keep the one from
// running that is waited for. Where that goes on, fewer threads are faster (`welcome`).

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

typedef _Atomic uint32_t Word;
typedef struct {
  _Alignas(64) _Atomic uint64_t left;  // of whose pieces, the first, and the end of those that are left
} Share;
typedef struct {  // of the threads at work
  _Alignas(64) Word phase;  // how often they have waited for each other
  Word sleepers;
  _Alignas(64) Word arrived;
  _Atomic int64_t slept;  // nanoseconds, of all together
  Share *shares;
} Meeting;

static _Thread_local Meeting *meeting;
static _Thread_local uint64_t turn;  // how often a thread has come to pieces
static _Thread_local struct {  // how often a thread looks before it sleeps: less where that was in vain, all of it now and then
  int64_t looks, waits;
} patience;
enum { MOST_LOOKS = 2000, LEAST_LOOKS = 16, ANEW = 32 };

static inline void pause_a_moment(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

// Returns once the phase is not `old`.
static void await(Meeting *m, uint32_t old) {
  int64_t looks = patience.waits++ % ANEW ? patience.looks : MOST_LOOKS;
  for (int64_t i = 0; i < looks; i++) {
    if (atomic_load_explicit(&m->phase, memory_order_acquire) != old) {
      patience.looks = 4 * looks < MOST_LOOKS ? 4 * looks : MOST_LOOKS;
      return;
    }
    pause_a_moment();
  }
  patience.looks = looks / 2 > LEAST_LOOKS ? looks / 2 : LEAST_LOOKS;
  int64_t asleep = now();
#ifdef __linux__
  atomic_fetch_add(&m->sleepers, 1);
  while (atomic_load(&m->phase) == old) syscall(SYS_futex, &m->phase, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
  atomic_fetch_sub(&m->sleepers, 1);
#else
  while (atomic_load(&m->phase) == old) sched_yield();
#endif
  atomic_fetch_add(&m->slept, now() - asleep);
}

// Returns once all threads of the work are here.
static void together(int64_t threads) {
  if (threads == 1) return;
  Meeting *m = meeting;
  uint32_t phase = atomic_load_explicit(&m->phase, memory_order_acquire);
  if (atomic_fetch_add(&m->arrived, 1) < threads - 1) {
    await(m, phase);
    return;
  }
  atomic_store_explicit(&m->arrived, 0, memory_order_relaxed);
  atomic_store(&m->phase, phase + 1);
#ifdef __linux__
  if (atomic_load(&m->sleepers)) syscall(SYS_futex, &m->phase, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
#endif
}

// Work in pieces, to which all threads come in one order. Each has a share of them, and what it has left when others are
// done they do, from the end: a core may be slower than another, or taken by another program for a while.
typedef struct {
  int64_t count, thread, threads, next;
  uint64_t turn;
} Pieces;
enum { PIECE_BITS = 20, PIECE = (1 << PIECE_BITS) - 1, TURN = (1 << 24) - 1 };  // 64 bits: a turn, and two of its pieces

static int64_t first_of(int64_t count, int64_t thread, int64_t threads) { return thread * count / threads; }

static Pieces pieces(int64_t count, int64_t thread, int64_t threads) {
  turn = (turn + 1) & TURN;
  return (Pieces){count, thread, threads, 0, turn};
}

// The next piece for a thread, or -1.
static int64_t take(Pieces *p) {
  if (p->threads == 1) return p->next < p->count ? p->next++ : -1;
  for (int64_t i = 0; i < p->threads; i++) {
    int64_t whose = (p->thread + i) % p->threads, from = first_of(p->count, whose, p->threads);
    _Atomic uint64_t *left = &meeting->shares[whose].left;
    for (uint64_t seen = atomic_load(left);;) {
      uint64_t ahead = ((seen >> 2 * PIECE_BITS) - p->turn) & TURN;  // of this thread: others have gone on, and nothing is left
      if (ahead && ahead < TURN / 2) break;
      uint64_t first = ahead ? 0 : seen >> PIECE_BITS & PIECE;
      uint64_t end = ahead ? (uint64_t)(first_of(p->count, whose + 1, p->threads) - from) : seen & PIECE;
      if (first >= end) break;
      int64_t taken = from + (int64_t)(i ? --end : first++);
      if (atomic_compare_exchange_weak(left, &seen, p->turn << 2 * PIECE_BITS | first << PIECE_BITS | end)) return taken;
    }
  }
  return -1;
}

typedef void Work(const void *of, int64_t thread, int64_t threads);
// How many of `threads` are worth waiting for. Where they waited for more than half of a while, for one whose core another
// program has, and of the next, too, one fewer works for some time, twice as long each time; then it is tried again.
enum { WHILE = 20 * 1000000, HOLD = 50 * 1000000, LONGEST = 1600 * 1000000 };  // nanoseconds
static struct {
  _Atomic int64_t absent, until, hold, worked, waited, crowded;
} crowd = {.hold = HOLD};

static int64_t welcome(int64_t threads) {
  int64_t absent = atomic_load(&crowd.absent);
  if (absent && now() >= atomic_load(&crowd.until) && atomic_compare_exchange_strong(&crowd.absent, &absent, absent - 1))
    absent--, atomic_store(&crowd.until, now() + HOLD), atomic_store(&crowd.worked, 0), atomic_store(&crowd.waited, 0);
  return threads - absent > 1 ? threads - absent : 1;
}

// Several threads worked for so long, and waited so long of that.
static void worked(int64_t nanoseconds, int64_t waiting) {
  int64_t all = atomic_fetch_add(&crowd.worked, nanoseconds) + nanoseconds;
  int64_t waited = atomic_fetch_add(&crowd.waited, waiting) + waiting;
  if (all < WHILE) return;
  atomic_store(&crowd.worked, 0), atomic_store(&crowd.waited, 0);
  int64_t hold = atomic_load(&crowd.hold);
  if (2 * waited > all && atomic_fetch_add(&crowd.crowded, 1)) {
    atomic_fetch_add(&crowd.absent, 1), atomic_store(&crowd.until, now() + hold);
    atomic_store(&crowd.hold, 2 * hold < LONGEST ? 2 * hold : LONGEST);
  } else if (2 * waited <= all && !atomic_load(&crowd.absent)) {
    atomic_store(&crowd.crowded, 0), atomic_store(&crowd.hold, hold / 2 > HOLD ? hold / 2 : HOLD);
  }
}

#ifdef _OPENMP
static int forked;  // a forked process has none of its parent's threads, for which OpenMP would wait
static void alone_again(void) { forked = 1; }
static void watch_forks(void) { pthread_atfork(NULL, NULL, alone_again); }
#endif

// `work` by `threads` threads, the caller's among them.
static void share_out(Work *work, const void *of, int64_t threads) {
#ifdef _OPENMP
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, watch_forks);
  if (threads > 1 && !forked) threads = welcome(threads);
  if (threads > 1 && !forked) {
    int64_t begun = now(), entered = begun, left = begun;  // OpenMP waits before, and behind
    Share shares[threads];
    memset(shares, 0, sizeof shares);
    Meeting m = {.shares = shares};
#pragma omp parallel num_threads((int)threads)
    {
      if (omp_get_thread_num() == 0) entered = now();
      meeting = &m, turn = 0;
      work(of, omp_get_thread_num(), omp_get_num_threads());
      together(omp_get_num_threads());  // sooner than OpenMP's own waiting, which looks on for long
      if (omp_get_thread_num() == 0) left = now();
    }
    int64_t ended = now();
    worked(ended - begun, entered - begun + ended - left + atomic_load(&m.slept) / (threads - 1));
    return;
  }
#endif
  work(of, 0, 1);
}

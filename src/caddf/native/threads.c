// Threads that do a piece of work together, and wait for each other within it.
//
// A thread that waits looks again and again for a moment, since most waits are shorter than falling asleep, and then
// sleeps: where another program has taken a core, looking on would only keep the one from running that is waited for.

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#ifdef __linux__
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

typedef _Atomic uint32_t Word;
typedef struct {  // a number that others wait to see change
  _Alignas(64) Word number;
  Word sleepers;
} Sign;

typedef struct {  // how often a thread looks before it sleeps: less where that was in vain, all of it now and then
  int64_t most, looks, waits;
} Patience;
enum { LEAST_LOOKS = 16, ANEW = 32 };

static inline void pause_a_moment(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Returns once the number is not `old`.
static void await(Sign *sign, uint32_t old, Patience *patience) {
  int64_t looks = patience->waits++ % ANEW ? patience->looks : patience->most;
  for (int64_t i = 0; i < looks; i++) {
    if (atomic_load_explicit(&sign->number, memory_order_acquire) != old) {
      patience->looks = 4 * looks < patience->most ? 4 * looks : patience->most;
      return;
    }
    pause_a_moment();
  }
  patience->looks = looks / 2 > LEAST_LOOKS ? looks / 2 : LEAST_LOOKS;
#ifdef __linux__
  atomic_fetch_add(&sign->sleepers, 1);
  while (atomic_load(&sign->number) == old) syscall(SYS_futex, &sign->number, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
  atomic_fetch_sub(&sign->sleepers, 1);
#else
  while (atomic_load(&sign->number) == old) sched_yield();
#endif
}

static void change(Sign *sign, uint32_t number) {
  atomic_store(&sign->number, number);
#ifdef __linux__
  if (atomic_load(&sign->sleepers)) syscall(SYS_futex, &sign->number, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
#endif
}

enum { MOST_THREADS = 255, BETWEEN = 20000, WITHIN = 2000 };  // looks: between two works, and within one
typedef void Work(const void *of, int64_t thread, int64_t threads);
static struct {
  pthread_mutex_t busy;
  int64_t workers;
  Work *work;
  const void *of;
  Sign turn;   // of works: their number, and in the last eight bits how many threads do the present one
  Sign phase;  // of the threads at work: how often they have waited for each other
  _Alignas(64) Word arrived;
} team = {.busy = PTHREAD_MUTEX_INITIALIZER};
static _Thread_local Patience within = {WITHIN, WITHIN, 0};

// Returns once all threads of the present work are here.
static void together(int64_t threads) {
  if (threads == 1) return;
  uint32_t phase = atomic_load_explicit(&team.phase.number, memory_order_acquire);
  if (atomic_fetch_add(&team.arrived, 1) < threads - 1) {
    await(&team.phase, phase, &within);
  } else {
    atomic_store_explicit(&team.arrived, 0, memory_order_relaxed);
    change(&team.phase, phase + 1);
  }
}

static void *worker(void *place) {
  int64_t thread = (intptr_t)place & MOST_THREADS;
  uint32_t turn = (uint32_t)((intptr_t)place >> 8);
  Patience between = {BETWEEN, BETWEEN, 0};
  for (;;) {
    await(&team.turn, turn, &between);
    turn = atomic_load(&team.turn.number);  // no other begins before this one is done, if it is this thread's, too
    int64_t threads = turn & MOST_THREADS;
    if (thread >= threads) {
      between.looks = LEAST_LOOKS;
      continue;
    }
    team.work(team.of, thread, threads);
    together(threads);
  }
  return NULL;
}

static void alone_again(void) {  // a forked process has none of its parent's threads
  team.workers = 0;
  pthread_mutex_init(&team.busy, NULL);
  atomic_store(&team.arrived, 0);
  atomic_store(&team.turn.sleepers, 0), atomic_store(&team.phase.sleepers, 0);
}

// Sees to it that there are so many workers, or as many as can be had. Signals are for others.
static void hire(int64_t workers) {
  static int told;
  sigset_t every, before;
  pthread_attr_t attributes;
  if (!told) pthread_atfork(NULL, NULL, alone_again), told = 1;
  if (team.workers >= workers || pthread_attr_init(&attributes)) return;
  pthread_attr_setstacksize(&attributes, 8 << 20);
  sigfillset(&every);
  sigdelset(&every, SIGSEGV), sigdelset(&every, SIGBUS), sigdelset(&every, SIGFPE), sigdelset(&every, SIGILL);
  pthread_sigmask(SIG_BLOCK, &every, &before);
  for (; team.workers < workers; team.workers++) {
    pthread_t made;
    intptr_t place = (intptr_t)atomic_load(&team.turn.number) << 8 | (intptr_t)(team.workers + 1);
    if (pthread_create(&made, &attributes, worker, (void *)place)) break;
    pthread_detach(made);
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attributes);
}

// `work` by `threads` threads, the caller's among them; by that one alone while the others work for somebody else.
static void share_out(Work *work, const void *of, int64_t threads) {
  if (threads <= 1 || pthread_mutex_trylock(&team.busy)) {
    work(of, 0, 1);
    return;
  }
  hire(threads < MOST_THREADS ? threads - 1 : MOST_THREADS - 1);
  if (threads > team.workers + 1) threads = team.workers + 1;
  team.work = work, team.of = of;
  change(&team.turn, ((atomic_load(&team.turn.number) >> 8) + 1) << 8 | (uint32_t)threads);
  work(of, 0, threads);
  together(threads);
  pthread_mutex_unlock(&team.busy);
}

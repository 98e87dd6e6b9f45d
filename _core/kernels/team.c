#define _GNU_SOURCE /* pthread_setname_np */
#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

/* A thread's share of a step's work, of which it takes from the front; the others do, too, when theirs is done. */
typedef struct {
    _Alignas(64) atomic_int_fast64_t taken;
} share;

struct kv_team {
    int size;
    share *shares;
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_uint generation;
    _Alignas(64) atomic_int working; /* threads other than the caller that have not come to the end of the call */
};

/* A thread that waits for calls. The pool's list has those that are in no team. */
typedef struct worker {
    struct worker *next;
    pthread_mutex_t mutex;
    pthread_cond_t called;
    atomic_uint calls; /* so far: a new one is there when this changes */
    kv_team *team;
    kv_team_fn fn;
    void *arg;
    int thread; /* number in the team */
} worker;

static pthread_mutex_t pool_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t pool_once = PTHREAD_ONCE_INIT;
static worker *idle;


enum {
    SPINS = 4000,      /* of a thread at a barrier (some tens of microseconds), before it gives the core away */
    AWAKE = 50 * 1000, /* nanoseconds that a thread looks out for the next call before it sleeps */
    LOOKS = 64,        /* at the next call between two at the clock */
    STACK = 1 << 20    /* bytes of a thread's stack: kernels use some tens of thousands */
};

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

int kv_team_size(const kv_team *team) { return team->size; }

int64_t kv_team_grab(const kv_team *team, int64_t items)
{
    int64_t part = items / (4 * team->size);
    return part > 1 ? part : 1;
}

void kv_team_barrier(kv_team *team)
{
    unsigned now = atomic_load_explicit(&team->generation, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) + 1 == team->size) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        for (int i = 0; i < team->size; i++)
            atomic_store_explicit(&team->shares[i].taken, 0, memory_order_relaxed);
        atomic_store_explicit(&team->generation, now + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&team->generation, memory_order_acquire) == now; spins++) {
        if (spins < SPINS)
            relax();
        else
            sched_yield();
    }
}

int64_t kv_team_share(const kv_team *team, int thread, int64_t total) { return total * thread / team->size; }

int64_t kv_team_take(kv_team *team, int thread, int64_t total, int64_t grab, int64_t *end)
{
    for (int i = 0; i < team->size; i++) {
        const int of = thread + i < team->size ? thread + i : thread + i - team->size;
        const int64_t first = kv_team_share(team, of, total), last = kv_team_share(team, of + 1, total);
        atomic_int_fast64_t *taken = &team->shares[of].taken;
        if (first + atomic_load_explicit(taken, memory_order_relaxed) >= last)
            continue;
        const int64_t start = first + atomic_fetch_add_explicit(taken, grab, memory_order_relaxed);
        if (start >= last)
            continue;
        *end = start + grab < last ? start + grab : last;
        return start;
    }
    return -1;
}

/* The child of a fork has the calling thread only: its pool begins anew. */
static void before_fork(void) { pthread_mutex_lock(&pool_mutex); }
static void in_parent(void) { pthread_mutex_unlock(&pool_mutex); }
static void in_child(void)
{
    pthread_mutex_init(&pool_mutex, NULL);
    idle = NULL;
}
static void follow_forks(void) { pthread_atfork(before_fork, in_parent, in_child); }

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * (int64_t)1000000000 + t.tv_nsec;
}

/* Whether the call after so many comes within AWAKE. */
static int called_soon(worker *w, unsigned done)
{
    for (const int64_t end = now() + AWAKE; now() < end;)
        for (int looks = 0; looks < LOOKS; looks++) {
            if (atomic_load_explicit(&w->calls, memory_order_acquire) != done)
                return 1;
            relax();
        }
    return 0;
}

static void *work(void *arg)
{
    worker *w = arg;
    unsigned done = 0;
    for (;;) {
        if (!called_soon(w, done)) {
            pthread_mutex_lock(&w->mutex);
            while (atomic_load_explicit(&w->calls, memory_order_relaxed) == done)
                pthread_cond_wait(&w->called, &w->mutex);
            pthread_mutex_unlock(&w->mutex);
        }
        done++;
        w->fn(w->arg, w->team, w->thread);
        atomic_fetch_sub_explicit(&w->team->working, 1, memory_order_release);
    }
    return NULL;
}

static void call(worker *w, kv_team *team, int thread, kv_team_fn fn, void *arg)
{
    w->team = team, w->thread = thread, w->fn = fn, w->arg = arg;
    pthread_mutex_lock(&w->mutex);
    atomic_fetch_add_explicit(&w->calls, 1, memory_order_release);
    pthread_cond_signal(&w->called);
    pthread_mutex_unlock(&w->mutex);
}

/* A new thread, or NULL when the system has none to give. Signals go to the program's own threads, but for those that
 * an instruction raises. */
static worker *new_worker(void)
{
    static const int raised[] = {SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGTRAP};
    worker *w = calloc(1, sizeof *w);
    pthread_attr_t attributes;
    if (w == NULL || pthread_attr_init(&attributes)) {
        free(w);
        return NULL;
    }
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK);
    pthread_mutex_init(&w->mutex, NULL);
    pthread_cond_init(&w->called, NULL);
    sigset_t blocked, before;
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof raised / sizeof *raised; i++)
        sigdelset(&blocked, raised[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    pthread_t thread;
    const int failed = pthread_create(&thread, &attributes, work, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (failed) {
        pthread_cond_destroy(&w->called);
        pthread_mutex_destroy(&w->mutex);
        free(w);
        return NULL;
    }
#ifdef __linux__
    pthread_setname_np(thread, "kvrun");
#endif
    return w;
}

/* Up to n threads that do nothing else, in a list; *count says how many there were to have. */
static worker *hire(int n, int *count)
{
    worker *first = NULL, **last = &first;
    pthread_once(&pool_once, follow_forks);
    pthread_mutex_lock(&pool_mutex);
    for (*count = 0; *count < n && idle != NULL; ++*count) {
        *last = idle;
        last = &idle->next;
        idle = *last;
    }
    pthread_mutex_unlock(&pool_mutex);
    for (worker *w; *count < n && (w = new_worker()) != NULL; ++*count) {
        *last = w;
        last = &w->next;
    }
    *last = NULL;
    return first;
}

/* In front of the others and in the same order, so that a thread has the same number, and the same data in its caches,
 * in the next call. */
static void release(worker *first)
{
    worker **last = &first->next;
    while (*last != NULL)
        last = &(*last)->next;
    pthread_mutex_lock(&pool_mutex);
    *last = idle;
    idle = first;
    pthread_mutex_unlock(&pool_mutex);
}

void kv_team_run(int threads, kv_team_fn fn, void *arg)
{
    share shares[KV_MAX_THREADS];
    kv_team team = {.size = 1, .shares = shares};
    threads = threads < 1 ? 1 : threads > KV_MAX_THREADS ? KV_MAX_THREADS : threads;
    int hired = 0, thread = 1;
    worker *others = threads > 1 ? hire(threads - 1, &hired) : NULL;
    team.size = 1 + hired;
    for (int i = 0; i < team.size; i++)
        atomic_init(&shares[i].taken, 0);
    atomic_init(&team.working, hired);
    for (worker *w = others; w != NULL; w = w->next)
        call(w, &team, thread++, fn, arg);
    fn(arg, &team, 0);
    for (int spins = 0; atomic_load_explicit(&team.working, memory_order_acquire) != 0; spins++) {
        if (spins < SPINS)
            relax();
        else
            sched_yield();
    }
    if (others != NULL)
        release(others);
}

#include "team.h"

#include <stdatomic.h>
#include <sched.h>

#ifdef _OPENMP
#include <omp.h>
#endif

/* A thread's share of a step's work, of which it takes from the front; the others do, too, when theirs is done. */
typedef struct {
    _Alignas(64) atomic_int_fast64_t taken;
} share;

struct kv_team {
    int size;
    share *shares;
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_uint generation;
};

/* Waiting threads spin this often (some tens of microseconds) before they give the core away. */
enum { SPINS = 4000 };

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

int kv_team_has_openmp(void)
{
#ifdef _OPENMP
    return 1;
#else
    return 0;
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

static int this_thread(void)
{
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

int64_t kv_team_share(const kv_team *team, int thread, int64_t total) { return total * thread / team->size; }

int64_t kv_team_take(kv_team *team, int64_t total, int64_t grab, int64_t *end)
{
    const int own = this_thread();
    for (int i = 0; i < team->size; i++) {
        const int thread = own + i < team->size ? own + i : own + i - team->size;
        const int64_t first = kv_team_share(team, thread, total), last = kv_team_share(team, thread + 1, total);
        atomic_int_fast64_t *taken = &team->shares[thread].taken;
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

void kv_team_run(int threads, kv_team_fn fn, void *arg)
{
    share shares[KV_MAX_THREADS];
    kv_team team = {.size = 1, .shares = shares};
    threads = threads < 1 ? 1 : threads > KV_MAX_THREADS ? KV_MAX_THREADS : threads;
    for (int i = 0; i < threads; i++)
        atomic_init(&shares[i].taken, 0);
#ifdef _OPENMP
    if (threads > 1) {
        /* The runtime may give fewer threads than asked for; the single construct's barrier publishes the size. */
#pragma omp parallel num_threads(threads)
        {
#pragma omp single
            team.size = omp_get_num_threads();
            fn(arg, &team, omp_get_thread_num());
        }
        return;
    }
#endif
    fn(arg, &team, 0);
}

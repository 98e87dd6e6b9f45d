#include "team.h"

#include <stdatomic.h>
#include <sched.h>

#ifdef _OPENMP
#include <omp.h>
#endif

struct kv_team {
    int size;
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_uint generation;
    _Alignas(64) atomic_int_fast64_t taken;
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

void kv_team_barrier(kv_team *team)
{
    unsigned now = atomic_load_explicit(&team->generation, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) + 1 == team->size) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&team->taken, 0, memory_order_relaxed);
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

int64_t kv_team_take(kv_team *team, int64_t total, int64_t grab, int64_t *end)
{
    int64_t start = atomic_fetch_add_explicit(&team->taken, grab, memory_order_relaxed);
    if (start >= total)
        return -1;
    *end = start + grab < total ? start + grab : total;
    return start;
}

void kv_team_run(int threads, kv_team_fn fn, void *arg)
{
    kv_team team = {.size = 1};
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
#else
    (void)threads;
#endif
    fn(arg, &team, 0);
}

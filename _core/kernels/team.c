#define _GNU_SOURCE /* pthread_setname_np */
#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Counters of a step, with the step's number above COUNT bits: a thread that is late finds another number there, and
 * nobody has to reset them. */
enum { COUNT = 24 };

/* A thread's share of a step: of its chunks so many are taken, from the front, and so many done. */
typedef struct {
    _Alignas(64) atomic_uint_fast64_t taken;
    atomic_uint_fast64_t done;
} share;

enum {
    MARKS = 1 << 15,   /* chunks of a step that can be repeated, of all shares together; others are done once */
    LINE = 8,          /* marks of a share are in whole lines of the cache: only one thread should write to each */
    PATIENCE = 3000,   /* nanoseconds, and twice the time of a chunk, before one is repeated that another thread has */
    SPIN = 60 * 1000,  /* nanoseconds at the end of a step before a thread sleeps */
    AWAKE = 50 * 1000, /* nanoseconds that a thread looks out for the next call before it sleeps */
    LEAVE = 3 * 1000,  /* nanoseconds that a caller waits for the others to leave */
    LOOKS = 32,        /* between two at the clock */
    STACK = 1 << 20    /* bytes of a thread's stack: kernels use some tens of thousands */
};

struct kv_team {
    int room; /* of shares */
    unsigned forks; /* of the process when the call began */
    share *shares;
    atomic_uint_fast64_t *marks; /* [size][marks_each] the last step in which a result of a chunk was written */
    int64_t marks_each;
    void *memory; /* where the marks are in whole lines of the cache */
    _Alignas(64) atomic_uint_fast64_t step;
    _Alignas(64) atomic_int shares_done;
    _Alignas(64) atomic_int inside; /* threads other than the caller that have not left the call */
    atomic_int sleepers;
    pthread_mutex_t mutex;
    pthread_cond_t next_step;
};

/* What a thread of the pool is at: it waits, was called and has not come yet, is in a call, or is in one, late perhaps,
 * and has another to go to then. */
enum { IDLE, CALLED, BUSY, ORDERED, DISMISSED };

typedef struct worker {
    pthread_t id;
    pthread_mutex_t mutex; /* of what follows; the thread looks at its state without */
    pthread_cond_t called;
    atomic_int state;
    kv_member member; /* in the call to go to */
    kv_team_fn fn;
    void *arg;
} worker;

/* The process's threads, and who uses them. */
static struct {
    pthread_mutex_t mutex;
    pthread_once_t once;
    int count, callers;
    unsigned forks;
    long keepers;
    worker *workers[KV_MAX_THREADS];
} pool = {.mutex = PTHREAD_MUTEX_INITIALIZER, .once = PTHREAD_ONCE_INIT};

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Time -------------------------------------------------------------------------------------------------------------- */

static int64_t nanoseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * (int64_t)1000000000 + t.tv_nsec;
}

/* The CPU's own clock, which costs next to nothing; and about how many of its ticks are in some nanoseconds. */
#if defined(__x86_64__)
static uint64_t ticks(void) { return __builtin_ia32_rdtsc(); }
static uint64_t ticks_in(uint64_t ns) { return 3 * ns; }
#elif defined(__aarch64__)
static uint64_t ticks(void)
{
    uint64_t t;
    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(t));
    return t;
}
static uint64_t ticks_in(uint64_t ns)
{
    uint64_t hertz;
    __asm__ volatile("mrs %0, cntfrq_el0" : "=r"(hertz));
    return ns * (hertz / 1000) / 1000000;
}
#else
static uint64_t ticks(void) { return (uint64_t)nanoseconds(); }
static uint64_t ticks_in(uint64_t ns) { return ns; }
#endif

/* Steps ------------------------------------------------------------------------------------------------------------- */

int64_t kv_team_share(const kv_member *me, int thread, int64_t total) { return total * thread / me->size; }

int kv_team_late(const kv_member *me)
{
    return me->size > 1 && atomic_load_explicit(&me->team->step, memory_order_acquire) != me->step;
}

static uint64_t count_of(uint64_t counter, uint64_t step)
{
    return counter >> COUNT == step ? counter & ((1 << COUNT) - 1) : 0;
}

/* The next step begins, with all that was written in this one. */
static void advance(kv_team *team, uint64_t step)
{
    atomic_store_explicit(&team->shares_done, 0, memory_order_relaxed);
    atomic_store(&team->step, step + 1);
    if (atomic_load(&team->sleepers)) {
        pthread_mutex_lock(&team->mutex);
        pthread_cond_broadcast(&team->next_step);
        pthread_mutex_unlock(&team->mutex);
    }
}

/* A share begins with chunks of `grab` items. When no more than two of those are left each chunk is half of the rest. */
static void look_at_share(kv_member *me, int of)
{
    me->of = of < me->size ? of : of - me->size;
    me->first = kv_team_share(me, me->of, me->total);
    me->items = kv_team_share(me, me->of + 1, me->total) - me->first;
    me->whole = me->items > 2 * me->grab ? (me->items - me->grab - 1) / me->grab : 0;
    const int64_t rest = me->items - me->whole * me->grab;
    me->chunks = me->whole + (rest ? 64 - __builtin_clzll((unsigned long long)rest) : 0);
}

static void range(const kv_member *me, int64_t *start, int64_t *end)
{
    const int64_t i = me->chunk - me->whole, rest = me->items - me->whole * me->grab;
    *start = me->first + (i < 0 ? me->chunk * me->grab : me->items - (rest >> i));
    *end = i < 0 ? *start + me->grab : me->first + me->items - (rest >> (i + 1));
}

/* The mark of a chunk of the share at hand, or NULL: it is done once. */
static atomic_uint_fast64_t *mark_of(const kv_member *me, int64_t chunk)
{
    return chunk < me->team->marks_each ? &me->team->marks[me->of * me->team->marks_each + chunk] : NULL;
}

static void pick_up(kv_member *me, int64_t chunk)
{
    me->chunk = chunk, me->committed = 0;
    if (me->since == 0)
        me->since = ticks();
}

/* Counts the chunk in hand as done, if it is this thread that did it: the step cannot end before. */
static void put_down(kv_member *me)
{
    kv_team *team = me->team;
    const uint64_t now = ticks();
    if (now - me->since > me->longest)
        me->longest = now - me->since;
    me->since = now, me->chunk = -1;
    if (me->repeatable && !me->committed)
        return;
    atomic_uint_fast64_t *counter = &team->shares[me->of].done;
    uint_fast64_t before = atomic_load_explicit(counter, memory_order_relaxed);
    uint64_t done;
    do
        done = count_of(before, me->step) + 1;
    while (!atomic_compare_exchange_weak_explicit(counter, &before, me->step << COUNT | done, memory_order_acq_rel,
                                                  memory_order_relaxed));
    const int shares = me->total < me->size ? (int)me->total : me->size; /* that have any */
    if (done == (uint64_t)me->chunks
        && atomic_fetch_add_explicit(&team->shares_done, 1, memory_order_acq_rel) + 1 == shares)
        advance(team, me->step);
}

/* Takes a chunk that nobody has from the share at hand; 0 if there is none. */
static int take_from_share(kv_member *me)
{
    atomic_uint_fast64_t *counter = &me->team->shares[me->of].taken;
    uint_fast64_t before = me->items ? atomic_load_explicit(counter, memory_order_relaxed) : 0;
    while (me->items && before >> COUNT <= me->step) {
        const uint64_t chunk = count_of(before, me->step);
        if (chunk >= (uint64_t)me->chunks)
            break;
        if (atomic_compare_exchange_weak_explicit(counter, &before, me->step << COUNT | (chunk + 1),
                                                  memory_order_relaxed, memory_order_relaxed)) {
            pick_up(me, (int64_t)chunk);
            return 1;
        }
    }
    return 0;
}

static int take_fresh(kv_member *me)
{
    if (take_from_share(me))
        return 1;
    for (int i = 0; i < me->size; i++) {
        look_at_share(me, me->thread + i);
        if (take_from_share(me))
            return 1;
    }
    return 0;
}

/* Takes a chunk that another thread has and has not committed; 0 if there is none. */
static int take_again(kv_member *me)
{
    for (int i = 0; i < me->size && me->repeatable; i++) {
        look_at_share(me, me->thread + i);
        for (int64_t chunk = 0; chunk < me->chunks; chunk++) {
            const atomic_uint_fast64_t *mark = mark_of(me, chunk);
            if (mark != NULL && atomic_load_explicit(mark, memory_order_relaxed) < me->step) {
                pick_up(me, chunk);
                return 1;
            }
        }
    }
    return 0;
}

static void sleep_until_over(kv_member *me)
{
    kv_team *team = me->team;
    pthread_mutex_lock(&team->mutex);
    atomic_fetch_add(&team->sleepers, 1);
    while (atomic_load(&team->step) == me->step)
        pthread_cond_wait(&team->next_step, &team->mutex);
    atomic_fetch_sub(&team->sleepers, 1);
    pthread_mutex_unlock(&team->mutex);
}

/* Of a thread that finds nothing fresh: waits until the step is over, or takes a chunk again. */
static void wait_or_repeat(kv_member *me)
{
    const uint64_t begin = ticks(), patience = 2 * me->longest + ticks_in(PATIENCE), most = patience + ticks_in(SPIN);
    for (;;) {
        for (int looks = 0; looks < LOOKS; looks++) {
            if (kv_team_late(me))
                break;
            relax();
        }
        const uint64_t waited = ticks() - begin;
        if (kv_team_late(me) || (waited > patience && take_again(me))) {
            me->waited += waited;
            return;
        }
        if (waited > most) {
            sleep_until_over(me);
            me->waited += ticks() - begin;
            return;
        }
    }
}

static void use_spare_time(kv_member *me)
{
    if (me->spare != NULL)
        me->spare(me->spare_arg);
    me->spare = NULL;
}

/* The chunk in hand afterwards is the next one, -1 when the step is over. */
static void next_chunk(kv_member *me)
{
    if (me->chunk >= 0)
        put_down(me);
    else
        look_at_share(me, me->thread);
    if (kv_team_late(me) || take_fresh(me))
        return;
    use_spare_time(me);
    wait_or_repeat(me);
}

static void next_range_alone(kv_member *me, int64_t *start, int64_t *end)
{
    *start = me->chunk < 0 ? 0 : *end;
    *end = *start + me->grab < me->total ? *start + me->grab : me->total;
    me->chunk = *start < *end ? 0 : -1;
    if (me->chunk < 0)
        use_spare_time(me);
}

/* A step without work: the first who comes goes on. */
static void skip(kv_member *me)
{
    uint_fast64_t step = me->step;
    atomic_compare_exchange_strong(&me->team->step, &step, step + 1);
}

static int take(kv_member *me, int64_t total, int64_t grab, int repeatable, int64_t *start, int64_t *end)
{
    if (me->total < 0)
        me->total = total > 0 ? total : 0, me->grab = grab, me->repeatable = repeatable;
    if (me->size == 1)
        next_range_alone(me, start, end);
    else if (me->total == 0)
        skip(me);
    else
        next_chunk(me);
    if (me->chunk < 0) {
        me->step++;
        me->total = -1, me->since = 0, me->longest = 0, me->spare = NULL;
        return 0;
    }
    if (me->size > 1)
        range(me, start, end);
    return 1;
}

int kv_team_take(kv_member *me, int64_t total, int64_t grab, int64_t *start, int64_t *end)
{
    return take(me, total, grab, 0, start, end);
}

int kv_team_repeat(kv_member *me, int64_t total, int64_t grab, int64_t *start, int64_t *end)
{
    return take(me, total, grab, 1, start, end);
}

int kv_team_commit(kv_member *me)
{
    atomic_uint_fast64_t *mark = me->size > 1 ? mark_of(me, me->chunk) : NULL;
    if (mark != NULL) {
        uint_fast64_t before = atomic_load_explicit(mark, memory_order_relaxed);
        if (before >= me->step || !atomic_compare_exchange_strong_explicit(mark, &before, me->step,
                                                                           memory_order_acquire, memory_order_relaxed))
            return 0;
    }
    me->committed = 1;
    return 1;
}

/* Threads ----------------------------------------------------------------------------------------------------------- */

/* The child of a fork has the calling thread only: its pool begins anew, and nobody is in a call. */
static void before_fork(void) { pthread_mutex_lock(&pool.mutex); }
static void in_parent(void) { pthread_mutex_unlock(&pool.mutex); }
static void in_child(void)
{
    pthread_mutex_init(&pool.mutex, NULL);
    pool.count = pool.callers = 0;
    pool.forks++;
}
static void follow_forks(void) { pthread_atfork(before_fork, in_parent, in_child); }

/* Waits for a call, at first without sleeping. */
static void await_call(worker *w)
{
    int looks = 0;
    for (int64_t end = nanoseconds() + AWAKE; atomic_load_explicit(&w->state, memory_order_relaxed) == IDLE; looks++) {
        if (looks % LOOKS == 0 && nanoseconds() > end)
            break;
        relax();
    }
    pthread_mutex_lock(&w->mutex);
    while (atomic_load_explicit(&w->state, memory_order_relaxed) == IDLE)
        pthread_cond_wait(&w->called, &w->mutex);
    pthread_mutex_unlock(&w->mutex);
}

/* Whether there is a call to go to; then the thread has its place there. A caller may have taken it back meanwhile. */
static int take_place(worker *w, worker *place)
{
    pthread_mutex_lock(&w->mutex);
    const int state = atomic_load_explicit(&w->state, memory_order_relaxed), any = state == CALLED || state == ORDERED;
    if (any)
        place->member = w->member, place->fn = w->fn, place->arg = w->arg;
    if (state != DISMISSED)
        atomic_store_explicit(&w->state, any ? BUSY : IDLE, memory_order_relaxed);
    pthread_mutex_unlock(&w->mutex);
    return any;
}

static void *work(void *arg)
{
    worker *w = arg, place;
    while (atomic_load_explicit(&w->state, memory_order_relaxed) != DISMISSED) {
        await_call(w);
        for (int any = take_place(w, &place); any;) {
            kv_team *team = place.member.team;
            place.fn(place.arg, &place.member);
            any = take_place(w, &place);
            atomic_fetch_sub_explicit(&team->inside, 1, memory_order_release); /* it may be freed from here on */
        }
    }
    return NULL;
}

static void call(worker *w, int state)
{
    atomic_store_explicit(&w->state, state, memory_order_relaxed);
    if (state != ORDERED)
        pthread_cond_signal(&w->called);
}

static void discard(worker *w)
{
    pthread_cond_destroy(&w->called);
    pthread_mutex_destroy(&w->mutex);
    free(w);
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
    pthread_attr_setstacksize(&attributes, STACK);
    pthread_mutex_init(&w->mutex, NULL);
    pthread_cond_init(&w->called, NULL);
    sigset_t blocked, before;
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof raised / sizeof *raised; i++)
        sigdelset(&blocked, raised[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    const int failed = pthread_create(&w->id, &attributes, work, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (failed) {
        discard(w);
        return NULL;
    }
#ifdef __linux__
    pthread_setname_np(w->id, "kvrun");
#endif
    return w;
}

/* Gives a thread a place in a call, now or when it has left the one that it is in. */
static void engage(worker *w, const kv_member *member, kv_team_fn fn, void *arg)
{
    pthread_mutex_lock(&w->mutex);
    w->member = *member, w->fn = fn, w->arg = arg;
    call(w, atomic_load_explicit(&w->state, memory_order_relaxed) == IDLE ? CALLED : ORDERED);
    pthread_mutex_unlock(&w->mutex);
}

/* Takes the place back if the thread has not come for it. */
static void withdraw(worker *w, kv_team *team)
{
    pthread_mutex_lock(&w->mutex);
    const int state = atomic_load_explicit(&w->state, memory_order_relaxed);
    if (w->member.team == team && (state == CALLED || state == ORDERED)) {
        atomic_store_explicit(&w->state, state == CALLED ? IDLE : BUSY, memory_order_relaxed);
        atomic_fetch_sub_explicit(&team->inside, 1, memory_order_relaxed);
    }
    pthread_mutex_unlock(&w->mutex);
}

/* Finds up to so many threads, with the caller, to share a call; how many there are. In the same order every time, so
 * that a thread has the same number and the same data in its caches. Those that are late in another call may come yet;
 * idle ones are not woken beyond the number that one call may have, whatever the number of calls. */
static int choose(int threads, worker **chosen)
{
    const int share = (threads + pool.callers - 1) / pool.callers;
    int computing = pool.callers, size = 1;
    for (int i = 0; i < pool.count; i++)
        computing += atomic_load_explicit(&pool.workers[i]->state, memory_order_relaxed) != IDLE;
    for (int i = 0; size < share && i < threads - 1; i++) {
        if (i == pool.count) {
            if (computing >= threads || (pool.workers[i] = new_worker()) == NULL)
                break;
            pool.count++;
        }
        const int state = atomic_load_explicit(&pool.workers[i]->state, memory_order_relaxed);
        if (state == BUSY || (state == IDLE && computing < threads))
            chosen[size++] = pool.workers[i];
        computing += state == IDLE;
    }
    return size;
}

/* Ends all threads. Nobody may be in a call. */
static void dismiss(void)
{
    for (int i = 0; i < pool.count; i++) {
        worker *w = pool.workers[i];
        pthread_mutex_lock(&w->mutex);
        call(w, DISMISSED);
        pthread_mutex_unlock(&w->mutex);
        pthread_join(w->id, NULL);
        discard(w);
    }
    pool.count = 0;
}

void kv_team_keep(void)
{
    pthread_once(&pool.once, follow_forks);
    pthread_mutex_lock(&pool.mutex);
    pool.keepers++;
    pthread_mutex_unlock(&pool.mutex);
}

void kv_team_release(void)
{
    pthread_mutex_lock(&pool.mutex);
    if (--pool.keepers == 0)
        dismiss();
    pthread_mutex_unlock(&pool.mutex);
}

/* Calls ------------------------------------------------------------------------------------------------------------- */

kv_team *kv_team_new(void)
{
    kv_team *team = aligned_alloc(64, sizeof *team);
    if (team == NULL)
        return NULL;
    memset(team, 0, sizeof *team);
    team->memory = calloc(MARKS + LINE, sizeof *team->marks); /* zero, and not touched where it is not used */
    if (team->memory == NULL) {
        free(team);
        return NULL;
    }
    team->marks = (atomic_uint_fast64_t *)(((uintptr_t)team->memory + 63) / 64 * 64);
    atomic_init(&team->step, 1); /* after the 0 of all counters */
    pthread_mutex_init(&team->mutex, NULL);
    pthread_cond_init(&team->next_step, NULL);
    kv_team_keep();
    return team;
}

void kv_team_free(kv_team *team)
{
    if (team == NULL)
        return;
    kv_team_settle(team);
    if (team->forks == pool.forks) { /* or the parent's threads may be waiting there, for ever */
        pthread_cond_destroy(&team->next_step);
        pthread_mutex_destroy(&team->mutex);
    }
    free(team->shares);
    free(team->memory);
    free(team);
    kv_team_release();
}

int kv_team_busy(const kv_team *team)
{
    return atomic_load_explicit(&team->inside, memory_order_acquire) != 0 && team->forks == pool.forks;
}

void kv_team_settle(kv_team *team)
{
    const struct timespec moment = {0, 100 * 1000};
    while (kv_team_busy(team))
        nanosleep(&moment, NULL);
}

/* How many of so many threads there is memory for. */
static int make_room(kv_team *team, int threads)
{
    threads = threads < 1 ? 1 : threads > KV_MAX_THREADS ? KV_MAX_THREADS : threads;
    if (threads > team->room) {
        share *shares = aligned_alloc(64, sizeof *shares * (size_t)threads);
        if (shares == NULL)
            return team->room > 1 ? team->room : 1;
        memset(shares, 0, sizeof *shares * (size_t)threads);
        free(team->shares);
        team->shares = shares, team->room = threads;
    }
    return threads;
}

kv_team_use kv_team_run(kv_team *team, int threads, kv_team_fn fn, void *arg)
{
    worker *chosen[KV_MAX_THREADS];
    kv_team_settle(team);
    threads = make_room(team, threads);
    pthread_mutex_lock(&pool.mutex);
    pool.callers++;
    const int size = choose(threads, chosen);
    const kv_member me = {.team = team, .size = size, .total = -1, .chunk = -1, .step = team->step};
    team->forks = pool.forks, team->marks_each = MARKS / size / LINE * LINE;
    atomic_store_explicit(&team->inside, size - 1, memory_order_relaxed);
    for (int i = 1; i < size; i++) {
        kv_member other = me;
        other.thread = i;
        engage(chosen[i], &other, fn, arg);
    }
    pthread_mutex_unlock(&pool.mutex);
    kv_member caller = me;
    const int64_t started = nanoseconds();
    const uint64_t begin = ticks();
    fn(arg, &caller);
    const uint64_t end = ticks();
    const double seconds = (double)(nanoseconds() - started) * 1e-9;
    pthread_mutex_lock(&pool.mutex);
    for (int i = 1; i < size; i++)
        withdraw(chosen[i], team);
    pool.callers--;
    pthread_mutex_unlock(&pool.mutex);
    if (size == 1)
        atomic_store_explicit(&team->step, caller.step, memory_order_relaxed);
    while (kv_team_busy(team) && ticks() - end < ticks_in(LEAVE))
        relax();
    return (kv_team_use){size, seconds, end > begin ? (double)caller.waited / (double)(end - begin) : 0};
}

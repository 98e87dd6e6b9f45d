/* Threads that share the work of a call, step by step. A step ends when its work is done, not when every thread has
 * come: one that the system has taken off its CPU holds up nobody, and skips what the others did meanwhile.
 *
 * Work comes in chunks of items. A thread that has none left does again what another one holds for too long. So a
 * repeatable step computes into memory of the thread's own, and a chunk's result counts once, for the first who
 * commits it:
 *
 *     while (kv_team_repeat(me, total, grab, &start, &end)) {
 *         compute [start, end) into memory of this thread's own
 *         if (kv_team_commit(me))
 *             copy it to where all see it
 *     }
 *
 * In other steps a chunk is done by one thread alone, in place, and waited for:
 *
 *     while (kv_team_take(me, total, grab, &start, &end))
 *         work on [start, end)
 *
 * Each loop is a step, the same for every thread, and ends when all of it is done. Until a thread commits, what it reads
 * may have been overwritten by later steps: it must stay in bounds whatever it reads, and what it computed is dropped.
 * Control flow and totals of a call must not depend on what steps write, but for totals of which zero is none. */
#ifndef KVRUN_TEAM_H
#define KVRUN_TEAM_H

#include <stdint.h>

enum { KV_MAX_THREADS = 1024 };

typedef struct kv_team kv_team;

/* A thread in a call. */
typedef struct kv_member {
    kv_team *team;
    int thread; /* its number, 0 is the caller's */
    int size;   /* threads of the call */
    /* Called by a thread that has nothing left to take of a step, once, before it waits; or NULL. */
    void (*spare)(void *arg);
    void *spare_arg;
    /* The team's own. */
    uint64_t step;           /* that this thread is in */
    int64_t total, grab;     /* of the step, total is -1 before it begins */
    int of;                  /* whose share this thread takes from, */
    int64_t first, items;    /* where it begins, and how many it has, */
    int64_t whole, chunks;   /* chunks of `grab` items that it begins with, and all */
    int64_t chunk;           /* in hand, or -1 */
    int repeatable;          /* whether chunks are marked, and may be done again */
    int committed;           /* whether the chunk's result counts */
    uint64_t waited;         /* ticks, in all steps */
    uint64_t since, longest; /* ticks: when the chunk was taken, the longest of this step's */
} kv_member;

typedef void (*kv_team_fn)(void *arg, kv_member *me);

/* A team for one call at a time; NULL without memory. */
kv_team *kv_team_new(void);

/* Waits until no thread is left in the team's last call. NULL is allowed. */
void kv_team_free(kv_team *team);

/* What became of a call. */
typedef struct {
    int threads;    /* how many there were */
    double seconds, waiting; /* how long it took, and the part of this in which the caller waited for others */
} kv_team_use;

/* Runs fn on up to `threads` threads, and returns when all steps are done. They are fewer when the system gives no more,
 * or other calls use them. Late threads may still be in fn then, and read what it reads: see kv_team_settle. */
kv_team_use kv_team_run(kv_team *team, int threads, kv_team_fn fn, void *arg);

/* Whether late threads are still in the team's last call. */
int kv_team_busy(const kv_team *team);

/* Waits for them. */
void kv_team_settle(kv_team *team);

/* Keeps the process's threads for later calls until as many releases; without a team or a keeper they end. */
void kv_team_keep(void);
void kv_team_release(void);

/* Where a thread's share of a step's work begins: thread + 1 is where it ends. */
int64_t kv_team_share(const kv_member *me, int thread, int64_t total);

/* Whether the step that this thread is at is over already: then there is nothing to prepare for it. */
int kv_team_late(const kv_member *me);

/* The next chunk, [start, end), of up to `grab` of a step's `total` items; 0 when the step is over. A thread goes
 * through its own share, so that it reads memory in one go, and then helps with the others'. The last chunks of a share
 * are small, so that all threads come to the end together. */
int kv_team_take(kv_member *me, int64_t total, int64_t grab, int64_t *start, int64_t *end);
int kv_team_repeat(kv_member *me, int64_t total, int64_t grab, int64_t *start, int64_t *end);

/* Whether this thread is the first with the chunk in hand, and is to write its result. */
int kv_team_commit(kv_member *me);

#endif

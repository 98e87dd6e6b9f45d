/* A team of threads for one call: it comes together, meets at barriers between steps, takes work by number, and parts.
 * Threads come from a pool of the process, where they sleep between calls; a child after fork() makes its own. */
#ifndef KVRUN_TEAM_H
#define KVRUN_TEAM_H

#include <stdint.h>

enum { KV_MAX_THREADS = 1024 };

typedef struct kv_team kv_team;
typedef void (*kv_team_fn)(void *arg, kv_team *team, int thread);

/* Runs fn once on each of up to `threads` threads, at most KV_MAX_THREADS, and returns when all are done. They are fewer
 * when the system gives no more. */
void kv_team_run(int threads, kv_team_fn fn, void *arg);

int kv_team_size(const kv_team *team);

/* Items of a step to take at a time: enough to stream memory, few enough that a slow thread stalls nobody. */
int64_t kv_team_grab(const kv_team *team, int64_t items);

/* Waits for every thread of the team, and makes the next step's work available. */
void kv_team_barrier(kv_team *team);

/* Where a thread's share of a step's work begins: thread + 1 is where it ends. */
int64_t kv_team_share(const kv_team *team, int thread, int64_t total);

/* The first of up to `grab` consecutive work items of this step that nobody has taken, or -1 when none of `total` is
 * left; *end is one past the last. `thread` is the caller's number: it goes through its own share, so that it reads memory in one go, and then
 * helps with the others': threads that are held up take less and do not stall the rest. */
int64_t kv_team_take(kv_team *team, int thread, int64_t total, int64_t grab, int64_t *end);

#endif

/* The team alone: one caller and several at a time, teams of one to five, threads that fall asleep with work in hand, and
 * calls that end while some are asleep. What is shared is atomic here, since late threads look at what others write. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <time.h>
#include "team.h"

enum { CALLERS = 3, CALLS = 300, STEPS = 20, ITEMS = 100, NAP = 150, PAUSE = 300 * 1000 };

typedef struct {
    atomic_long value[ITEMS]; /* of a step that is repeated: each from two of the step before */
    atomic_long sum[ITEMS];   /* of one that is not */
    atomic_long spare;
    atomic_int size;
} job;

static void nap(kv_member *me, int64_t i)
{
    static atomic_uint count;
    if ((atomic_fetch_add(&count, 1) + (unsigned)i * 7 + (unsigned)me->thread) % NAP == 0)
        nanosleep(&(struct timespec){0, PAUSE}, NULL);
}

static void in_spare_time(void *arg) { atomic_fetch_add((atomic_long *)arg, 1); }

static void work(void *arg, kv_member *me)
{
    job *j = arg;
    int64_t start = 0, end = 0;
    long own[ITEMS];
    if (me->thread == 0)
        atomic_store(&j->size, me->size);
    for (int step = 0; step < STEPS; step++) {
        me->spare = in_spare_time, me->spare_arg = &j->spare;
        while (kv_team_repeat(me, ITEMS, 1 + step % 40, &start, &end)) {
            for (int64_t i = start; i < end; i++)
                own[i - start] = atomic_load(&j->sum[i]) + atomic_load(&j->sum[(i + 1) % ITEMS]);
            nap(me, start);
            if (kv_team_commit(me)) {
                nap(me, end);
                for (int64_t i = start; i < end; i++)
                    atomic_store(&j->value[i], own[i - start]);
            }
        }
        while (kv_team_take(me, step % 7 ? 0 : 3, 1, &start, &end)) /* none, or fewer than threads */
            nap(me, start);
        while (kv_team_take(me, ITEMS, 3, &start, &end)) {
            nap(me, start);
            for (int64_t i = start; i < end; i++)
                atomic_store(&j->sum[i], atomic_load(&j->sum[i]) + (atomic_load(&j->value[i]) + step) % 1000);
        }
    }
}

static void alone(long *sum)
{
    long value[ITEMS];
    for (int i = 0; i < ITEMS; i++)
        sum[i] = 0;
    for (int step = 0; step < STEPS; step++) {
        for (int i = 0; i < ITEMS; i++)
            value[i] = sum[i] + sum[(i + 1) % ITEMS];
        for (int i = 0; i < ITEMS; i++)
            sum[i] += (value[i] + step) % 1000;
    }
}

static void *call(void *failed)
{
    long expected[ITEMS];
    kv_team *teams[3] = {kv_team_new(), kv_team_new(), kv_team_new()};
    static job jobs[1 + CALLERS][3];
    static atomic_int callers;
    job *own = jobs[atomic_fetch_add(&callers, 1)];
    alone(expected);
    for (int round = 0; round < CALLS; round++) {
        int k = 0;
        while (k < 2 && kv_team_busy(teams[k]))
            k++;
        kv_team_settle(teams[k]);
        for (int i = 0; i < ITEMS; i++)
            atomic_store(&own[k].sum[i], 0);
        kv_team_run(teams[k], 1 + round % 5, work, &own[k]);
        for (int i = 0; i < ITEMS; i++)
            *(int *)failed |= atomic_load(&own[k].sum[i]) != expected[i];
        *(int *)failed |= atomic_load(&own[k].size) < 1 || atomic_load(&own[k].size) > 1 + round % 5;
    }
    *(int *)failed |= atomic_load(&own[0].spare) == 0;
    for (int k = 0; k < 3; k++)
        kv_team_free(teams[k]);
    return NULL;
}

int main(void)
{
    pthread_t callers[CALLERS];
    int failed[CALLERS] = {0}, any = 0;
    call(&any);
    for (int i = 0; i < CALLERS; i++)
        pthread_create(&callers[i], NULL, call, &failed[i]);
    for (int i = 0; i < CALLERS; i++) {
        pthread_join(callers[i], NULL);
        any |= failed[i];
    }
    puts(any ? "wrong" : "right");
    return any;
}

/* The team alone: several callers at a time, teams of one to five, and what each thread takes first. */
#include <pthread.h>
#include <stdio.h>
#include "team.h"

enum { CALLERS = 3, CALLS = 300, STEPS = 20, ITEMS = 100 };

typedef struct {
    long sum[ITEMS];
    long first[8]; /* items that the threads took first, when each took one */
    int size;
} job;

static void work(void *arg, kv_team *team, int thread)
{
    job *j = arg;
    int64_t end = 0;
    if (thread == 0)
        j->size = kv_team_size(team);
    j->first[thread] = (long)kv_team_take(team, thread, ITEMS, 1, &end);
    kv_team_barrier(team);
    for (int step = 0; step < STEPS; step++) {
        for (int64_t i; (i = kv_team_take(team, thread, ITEMS, 3, &end)) >= 0;)
            for (; i < end; i++)
                j->sum[i] += step;
        kv_team_barrier(team);
    }
}

static void *call(void *failed)
{
    for (int round = 0; round < CALLS; round++) {
        job j = {{0}, {0}, 0};
        kv_team_run(1 + round % 5, work, &j);
        for (int i = 0; i < ITEMS; i++)
            *(int *)failed |= j.sum[i] != STEPS * (STEPS - 1) / 2;
        for (int t = 0; t < j.size; t++)
            *(int *)failed |= j.first[t] != ITEMS * t / j.size;
    }
    return NULL;
}

int main(void)
{
    pthread_t callers[CALLERS];
    int failed[CALLERS] = {0}, any = 0;
    for (int i = 0; i < CALLERS; i++)
        pthread_create(&callers[i], NULL, call, &failed[i]);
    for (int i = 0; i < CALLERS; i++) {
        pthread_join(callers[i], NULL);
        any |= failed[i];
    }
    puts(any ? "wrong" : "right");
    return any;
}

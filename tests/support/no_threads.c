/* Loaded before a program: it can make `threads_left` threads more, at first $THREADS_LEFT if that is set. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
int threads_left = 1 << 30;
__attribute__((constructor)) static void begin(void)
{
    const char *left = getenv("THREADS_LEFT");
    threads_left = left ? atoi(left) : threads_left;
}
int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*start)(void *), void *arg)
{
    int (*create)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) = dlsym(RTLD_NEXT, "pthread_create");
    return threads_left-- > 0 ? create(thread, attr, start, arg) : EAGAIN;
}

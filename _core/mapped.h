/* Files mapped into memory, and what becomes of a process when one of them loses its pages.
 *
 * A page of a map that the file no longer has (it was truncated, or its disk or server failed) is answered by the system
 * with SIGBUS. The handler here says so in one line and ends the process with status 1; there is no way back into the
 * arithmetic that needed the page. What comes from other addresses is left to the handler that was there before.
 *
 * The handler may run at any moment, on any thread, after a fork: it reads a list that is only ever added to, of atomic
 * fields, with the line to write prepared beforehand, and calls nothing that is not async-signal-safe. */
#ifndef KVRUN_MAPPED_H
#define KVRUN_MAPPED_H

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct mapped_file {
    _Atomic(uintptr_t) start, end;   /* addresses; no file while start is 0 */
    atomic_int taken, fd;
    char *line;                      /* what to say, valid while start is not 0 */
    struct mapped_file *next;
};

static _Atomic(struct mapped_file *) mapped_files;
static struct sigaction mapped_former;

/* Of threads that miss a page at the same time one says so; the others wait for the end that it brings. */
static void mapped_end(const struct mapped_file *file)
{
    static atomic_int ending;
    while (atomic_exchange(&ending, 1))
        pause();
    if (write(STDERR_FILENO, file->line, strlen(file->line)) < 0) { /* nobody to tell */ }
    _exit(1);
}

static int mapped_has_shrunk(const struct mapped_file *file, uintptr_t start)
{
    struct stat now;
    return fstat(file->fd, &now) == 0 && now.st_size < (off_t)(file->end - start);
}

static void mapped_bus_error(int number, siginfo_t *info, void *context)
{
    uintptr_t at = (uintptr_t)info->si_addr;
    int fault = info->si_code > 0, again = !fault && info->si_pid == getpid();
    for (struct mapped_file *file = mapped_files; file; file = file->next) {
        uintptr_t start = file->start;
        if (start && fault && at >= start && at < file->end)
            mapped_end(file);
        /* A handler that was installed after this one, as Python's faulthandler, raises the signal again. */
        if (start && again && mapped_has_shrunk(file, start))
            mapped_end(file);
    }
    if (mapped_former.sa_flags & SA_SIGINFO)
        mapped_former.sa_sigaction(number, info, context);
    else if (mapped_former.sa_handler != SIG_DFL && mapped_former.sa_handler != SIG_IGN)
        mapped_former.sa_handler(number);
    else {
        signal(number, SIG_DFL);
        raise(number);   /* it is blocked until this returns */
    }
}

/* Installs the handler, once, and again if there is none any more. A handler that has come after it is left there: that
 * calls this one, or its program has decided otherwise. */
static void mapped_watch(void)
{
    static atomic_int installed;
    struct sigaction now, ours = {.sa_sigaction = mapped_bus_error, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    if (sigaction(SIGBUS, NULL, &now))
        return;
    int none = !(now.sa_flags & SA_SIGINFO) && (now.sa_handler == SIG_DFL || now.sa_handler == SIG_IGN);
    if (!atomic_exchange(&installed, 1) || none) {
        sigemptyset(&ours.sa_mask);
        mapped_former = now;
        sigaction(SIGBUS, &ours, NULL);
    }
}

/* Maps `size` bytes of a file to be read, which `line` is said about if they are lost. NULL with errno if it cannot. */
static struct mapped_file *mapped_open(int fd, size_t size, const char *line)
{
    struct mapped_file *file = mapped_files;
    while (file && atomic_exchange(&file->taken, 1))
        file = file->next;
    if (!file) {
        if (!(file = calloc(1, sizeof *file)))
            return NULL;
        file->taken = 1;
        file->next = mapped_files;
        while (!atomic_compare_exchange_weak(&mapped_files, &file->next, file)) { }
    }
    mapped_watch();
    int own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    file->line = strdup(line);
    void *data = own < 0 || !file->line ? MAP_FAILED : mmap(NULL, size, PROT_READ, MAP_SHARED, own, 0);
    if (data == MAP_FAILED) {
        int why = errno;
        free(file->line);
        if (own >= 0)
            close(own);
        file->taken = 0;
        errno = why;
        return NULL;
    }
    file->fd = own;
    file->end = (uintptr_t)data + size;
    file->start = (uintptr_t)data;
    return file;
}

/* When nobody uses the memory any more. */
static void mapped_close(struct mapped_file *file)
{
    uintptr_t start = file->start;
    file->start = 0;
    munmap((void *)start, file->end - start);
    close(file->fd);
    free(file->line);
    file->taken = 0;
}

#endif

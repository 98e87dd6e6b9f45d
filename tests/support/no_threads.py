"""A library that lets a program make only so many threads more, as a limit of processes does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import needs

SOURCE = r"""
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
"""


def environment(folder: Path, left: int | None = None) -> dict[str, str]:
    """Variables for a program that can make `left` threads from its start; None: as many as it says itself, in the int
    `threads_left` of the library LD_PRELOAD. Skips where this cannot be had."""
    if sys.platform != "linux":
        pytest.skip("needs LD_PRELOAD")
    needs.program("cc", "gcc")
    source, library = folder / "threads.c", folder / "threads.so"
    source.write_text(SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"], check=True)
    limit = {} if left is None else {"THREADS_LEFT": str(left)}
    return {**os.environ, "LD_PRELOAD": str(library), **limit}

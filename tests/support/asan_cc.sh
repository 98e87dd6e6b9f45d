#!/bin/sh
# A compiler that puts AddressSanitizer into all but the kernels, which take it half an hour to compile.
sanitize=-fsanitize=address
for argument in "$@"; do
    case "$argument" in *_core/kernels/*/*|*_core/kernels/vector*) sanitize= ;; esac
done
exec ${ASAN_CC:-gcc} $sanitize -fno-omit-frame-pointer "$@"

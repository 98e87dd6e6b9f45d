from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t

cdef extern from "kernels.h":
    enum:
        KV_PANEL
        KV_BLOCK
        KV_SUPER
        KV_TILE
        KV_MAX_HEAD_DIM
        KV_FORMATS
        KV_N_WEIGHT_TYPES
        KV_FORMAT_F32
        KV_FORMAT_F16
        KV_SILU
        KV_GELU
        KV_GELU_TANH

    void kv_prefetch(const void* data, int64_t bytes) noexcept nogil
    void kv_copy_rows(const float* rows, int64_t ld, int64_t n, int64_t width, float* to, int64_t ld_to) noexcept nogil

    ctypedef struct kv_input:
        const float* f
        const int8_t* q
        const float* scale
        const int32_t* sum
        int64_t ld
        int64_t blocks
        int64_t planes
        const int32_t* offset

    ctypedef void (*kv_matmul_fn)(const uint8_t*, int64_t, int64_t, const kv_input*, int64_t, float*, int64_t,
                                  int) noexcept nogil

    ctypedef void (*kv_activation_fn)(const float*, const float*, int64_t, float*) noexcept nogil

    ctypedef struct kv_format:
        const char* name
        double bits
        int hadamard
        int64_t (*k_bytes)(int64_t) noexcept nogil
        int64_t (*v_bytes)(int64_t) noexcept nogil
        void (*pack_k)(const float*, int64_t, void*) noexcept nogil
        void (*pack_v)(const float*, int64_t, void*) noexcept nogil
        void (*unpack_k)(const void*, int64_t, float*) noexcept nogil
        void (*unpack_v)(const void*, int64_t, float*) noexcept nogil
        void (*put_k)(void*, int64_t, int64_t, const float*) noexcept nogil
        void (*put_v)(void*, int64_t, int64_t, const float*) noexcept nogil
        void (*k_dot)(const void*, int64_t, int64_t, const float*, int64_t, int64_t, int64_t, float*) noexcept nogil
        void (*v_accumulate)(const void*, int64_t, const float*, int64_t, int64_t, float*) noexcept nogil

    ctypedef struct kv_kernels:
        const char* name
        kv_matmul_fn* matmul
        kv_format* format
        void (*rms_norm)(const float*, const float*, int64_t, float, float*) noexcept nogil
        void (*quantize)(const float*, int64_t, int64_t, int8_t*, float*, int32_t*, int32_t*) noexcept nogil
        void (*rope)(const float*, const float*, const float*, int64_t, float, float*) noexcept nogil
        void (*hadamard)(float*, int64_t) noexcept nogil
        void (*layer_norm)(const float*, const float*, const float*, int64_t, float, float*) noexcept nogil
        kv_activation_fn* activate
        void (*soft_cap)(float*, int64_t, float) noexcept nogil
        void (*softmax_step)(float*, const int32_t*, int64_t, int64_t, float*, float*, float*) noexcept nogil

    ctypedef struct kv_weight:
        const char* name
        int ggml_number
        int64_t block
        int64_t block_bytes
        int64_t column_multiple
        int takes_int8
        int wants_offset

    int kv_kernels_find(const char* level, kv_kernels* table) noexcept nogil
    int64_t kv_head_pad(int64_t) noexcept nogil
    const kv_weight* kv_weight_of(int) noexcept nogil
    int64_t kv_raw_row_bytes(int, int64_t) noexcept nogil
    int64_t kv_packed_bytes(int, int64_t, int64_t) noexcept nogil
    void kv_quantize_row(int, const float*, int64_t, uint8_t*) noexcept nogil
    void kv_pack_panel(int, const uint8_t*, int64_t, int64_t, uint8_t*) noexcept nogil
    void kv_unpack_row(int, const uint8_t*, int64_t, int64_t, float*) noexcept nogil

cdef const kv_kernels* kernels() noexcept nogil
cdef const kv_kernels* kernels_of(str level) except NULL

// What whoever launches kernels has to know: the numbers that the kernels of the CPU have too (abi.h of the core), and
// the structures that kernels take, by value or in memory. runtime/cuda/abi.py reads them here, so a structure has
// nothing but integers, floats, pointers, other structures, and arrays of them.
//
// The structures of the core's own steps (_core/*.pxd) say the same in other words: those hold addresses of the host
// and its tables of functions, with 64-bit numbers throughout, where the arguments of a kernel are to be small.
#pragma once
#include "abi.h"

enum { WARP = 32, PANEL = KV_PANEL, BLOCK = KV_BLOCK, SUPER = KV_SUPER, TILE = KV_TILE };
enum { MAX_SEGMENTS = 3, MAX_HEAD_DIM = 256 };

struct Segment {
    const uint8_t *data; // [panels][panel_bytes]
    const float *bias;   // [rows], or 0
    int64_t panel_bytes;
    int type, rows, panels, offset; // offset: of its first row in the output
};

// Matrices that share an input. Outputs [width]: each segment's rows, padded to panels.
struct Matrix {
    Segment segments[MAX_SEGMENTS];
    int n_segments, cols, panels, width;
};

struct Norm {
    const float *weight; // [cols]; 0: no norm
    const float *bias;   // of a layer norm
    float eps;
    int layer_norm;
};

// Where a layer's cache is, as _core/cache.pxd has it; lengths in bytes.
struct CacheLayout {
    uint8_t *base;
    int64_t start, head_bytes, sight, n_slots, sink_v, windows, ring, k_bytes, v_bytes, window_k_bytes, window_v_bytes;
    int head_dim, head_pad, n_kv_heads, n_sinks, sink_lanes, window, n_window_tiles;
    int k_format, v_format, wk_format, wv_format;
};

// What a call is about. In the device's memory, so that a captured graph serves every call.
struct Step {
    int64_t first; // position of the first new token
    int64_t packed_ever;
    int n, first_logit;
};

struct Ropes {
    int64_t n;
    const double *inv_freq;  // [n][half]
    const double *amplitude; // [n][half], or 0
    const int64_t *of_layer;
};

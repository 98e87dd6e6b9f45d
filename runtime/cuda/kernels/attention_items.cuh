// What a warp of `attend` does at a time: a tile, or 16 or 32 tokens of one in float16; and how it gets there.
#pragma once
#include "attention.cuh"

enum { WARPS = 4, THREADS = 32 * WARPS, ROWS = 8, SINK_ITEM = 8 };

// Sizes -------------------------------------------------------------------------------------------------------------

DEVICE bool both_coded(const CacheLayout &c) { return is_quantised(k_format_of(c)) && is_quantised(v_format_of(c)); }
DEVICE int ring_tokens(const CacheLayout &c) { return both_coded(c) ? TILE : 32; }   // of an item
DEVICE int window_tokens(const CacheLayout &c) { return both_coded(c) ? 16 : 32; }
DEVICE int k_pitch(const CacheLayout &c) { return 2 * window_tokens(c) + 16; }       // of float16 in shared memory
DEVICE int v_pitch(const CacheLayout &c) { return 2 * head_pad_of(c) + 16; }

DEVICE int coded_bytes(int format, int pad, int params) { return TILE * pad * bits_of(format) / 8 + params; }

// Shared memory of a warp for keys, and for values.
DEVICE int k_room(const CacheLayout &c)
{
    int format = k_format_of(c), sinks = 4 * SINK_ITEM * head_dim_of(c);
    int half = format == KV_FORMAT_F32 ? 0 : head_dim_of(c) * k_pitch(c);
    int coded = is_quantised(format) ? coded_bytes(format, head_pad_of(c), 4 * head_pad_of(c)) : 0;
    half = half > coded ? half : coded;
    return half > sinks ? half : sinks;
}

DEVICE int v_room(const CacheLayout &c)
{
    int format = v_format_of(c), weights = 32 * ROWS * 4;
    int half = format == KV_FORMAT_F32 ? 0 : window_tokens(c) * v_pitch(c);
    int coded = is_quantised(format) ? coded_bytes(format, head_pad_of(c), 4 * TILE * n_groups(head_dim_of(c))) : 0;
    half = half > coded ? half : coded;
    return half > weights ? half : weights;
}

DEVICE int warp_room(const CacheLayout &c)
{
    int items = k_room(c) + v_room(c), merged = 4 * ROWS * head_pad_of(c);
    return items > merged ? items : merged;
}

DEVICE int fragment_bytes(const CacheLayout &c) { return head_pad_of(c) / 16 * 32 * 8; }

// Items -------------------------------------------------------------------------------------------------------------

// What a warp does at a time: up to 64 tokens of one tile.
struct Item {
    const uint8_t *k, *v; // of the tile
    int first, tokens;    // of these tokens of the tile
    Seen seen;            // counted from the first
    bool packed;
};

struct Items {
    int64_t position, window_start, ring_start; // position of the first token of the first item in each
    int n_sinks, first_sink, n_windows, n_ring;
};

DEVICE Items find_items(const Step *step, const CacheLayout &c)
{
    Items s = {step->first, 0, 0, 0, 0, 0, 0};
    int64_t packed = tiles_packed(c, s.position + 1), first = first_tile(step, c, s.position, packed);
    int64_t from = c.sight && s.position + 1 > c.sight ? s.position + 1 - c.sight : 0, last = tile_of(c, s.position);
    int64_t sinks = s.position + 1 < c.n_sinks ? s.position + 1 : c.n_sinks;
    if (from < sinks) {
        s.first_sink = (int)(from / SINK_ITEM);
        s.n_sinks = (int)((sinks + SINK_ITEM - 1) / SINK_ITEM) - s.first_sink;
    }
    int64_t tile = first > packed ? first : packed;
    if (last >= tile) {
        const int tokens = window_tokens(c);
        int64_t start = c.n_sinks + tile * TILE, skip = from > start ? (from - start) / tokens : 0;
        s.window_start = start + skip * tokens;
        s.n_windows = (int)((s.position - s.window_start) / tokens) + 1;
    }
    if (first < packed) {
        const int tokens = ring_tokens(c);
        int64_t start = c.n_sinks + first * TILE, skip = from > start ? (from - start) / tokens : 0;
        s.ring_start = start + skip * tokens;
        s.n_ring = (int)((packed - first) * (TILE / tokens) - skip);
    }
    return s;
}

DEVICE Item item_at(const CacheLayout &c, const Items &s, int head, int number)
{
    Item item;
    int i = number - s.n_sinks;
    item.packed = i >= s.n_windows;
    item.tokens = item.packed ? ring_tokens(c) : window_tokens(c);
    int64_t start = item.packed ? s.ring_start + (int64_t)(i - s.n_windows) * item.tokens
                                : s.window_start + i * item.tokens;
    int64_t tile = (start - c.n_sinks) / TILE;
    item.first = (int)((start - c.n_sinks) % TILE);
    item.k = item.packed ? ring_tile(c, head, tile) : window_tile(c, head, tile);
    item.v = item.k + (item.packed ? c.k_bytes : c.window_k_bytes);
    item.seen = seen_by(c, s.position, start, item.tokens);
    return item;
}

DEVICE int k_format(const CacheLayout &c, const Item &item)
{
    return k_format_of(c) == KV_FORMAT_F32 ? KV_FORMAT_F32 : item.packed ? k_format_of(c) : KV_FORMAT_F16;
}

DEVICE int v_format(const CacheLayout &c, const Item &item)
{
    return v_format_of(c) == KV_FORMAT_F32 ? KV_FORMAT_F32 : item.packed ? v_format_of(c) : KV_FORMAT_F16;
}

// Where a piece of codes lies in shared memory, so that no two lanes meet in a bank: halves of lines 2, 3, 6, 7 ...
// change places. Two bits need nothing of the kind.
DEVICE int place_of(int bits, int at) { return bits > 2 ? at ^ (at >> 2 & 32) : at; }

DEVICE void fetch_codes(int bits, uint8_t *to, const uint8_t *from, int codes, int params, int lane)
{
    KV_UNROLL
    for (int at = 16 * lane; at < codes; at += 512)
        copy_16(to + place_of(bits, at), from + at, true);
    for (int at = codes + 16 * lane; at < codes + params; at += 512)
        copy_16(to + at, from + at, true);
}

// Has the keys of an item, or its values, copied to this warp's shared memory. float32 is read from where it is.
DEVICE void fetch_keys(const CacheLayout &c, const Item &item, uint8_t *to, int lane)
{
    const int format = k_format(c, item), pieces = window_tokens(c) / 8; // of float16 an item has as many anywhere
    if (format == KV_FORMAT_F16) {
        for (int at = lane; at < head_dim_of(c) * pieces; at += 32) {
            int channel = at / pieces, piece = at % pieces;
            copy_16(to + channel * k_pitch(c) + 16 * piece, item.k + 2 * (channel * TILE + item.first + 8 * piece),
                    true);
        }
    } else if (format != KV_FORMAT_F32) {
        const int pad = head_pad_of(c), bits = bits_of(k_format_of(c));
        fetch_codes(bits, to, item.k, TILE * pad * bits / 8, 4 * pad, lane);
    }
}

DEVICE void fetch_values(const CacheLayout &c, const Item &item, uint8_t *to, int lane)
{
    const int format = v_format(c, item), pad = head_pad_of(c), pieces = pad / 8;
    if (format == KV_FORMAT_F16) {
        for (int at = lane; at < window_tokens(c) * pieces; at += 32) {
            int token = at / pieces, piece = at % pieces;
            copy_16(to + token * v_pitch(c) + 16 * piece, item.v + 2 * ((item.first + token) * pad + 8 * piece),
                    token < item.seen.to);
        }
    } else if (format != KV_FORMAT_F32) {
        const int bits = bits_of(v_format_of(c));
        fetch_codes(bits, to, item.v, TILE * pad * bits / 8, 4 * TILE * n_groups(head_dim_of(c)), lane);
    }
}

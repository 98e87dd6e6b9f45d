// Attention of one token: its tiles split among blocks and warps, all heads of a KV head at once, the parts put
// together by the block that ends last.
//
// attend(step, layout, q, group, scale, softcap, cos, sin, sink_cos, sink_sin, partial, counters, out)
//   grid (spans, n_kv_heads, ceil(group / 8)), block 128; shared memory and buffers: attention.py
#include "common.cuh"
#include "cache.cuh"
#include "attention.cuh"
#include "attention_items.cuh"
#include "attention_products.cuh"

// A warp's work -----------------------------------------------------------------------------------------------------

struct Warp {
    const CacheLayout &c;
    const Queries &q;
    uint8_t *keys, *values; // shared memory
    float softcap;
    int head, lane;
};

DEVICE void attend_sinks(const Warp &w, const Items &items, int number, const float *cosines, const float *sines,
                         int place, Running &r)
{
    const CacheLayout &c = w.c;
    int start = (items.first_sink + number) * SINK_ITEM, half = head_dim_of(c) / 2, tokens = c.n_sinks - start;
    tokens = tokens < SINK_ITEM ? tokens : SINK_ITEM;
    float *keys = (float *)w.keys;
    Square s[4];
    Seen seen = seen_by(c, items.position, start, tokens);
    for (int at = w.lane; at < half * SINK_ITEM; at += 32) {
        int i = at / SINK_ITEM, token = at % SINK_ITEM;
        float2 turned = {0, 0};
        if (token < tokens)
            turned = rotated_sink(c, sink_keys(c, w.head), cosines, sines, place, i, start + token);
        keys[i * SINK_ITEM + token] = turned.x;
        keys[(i + half) * SINK_ITEM + token] = turned.y;
    }
    __syncwarp();
    KV_UNROLL
    for (int m = 0; m < 4; m++)
        s[m][0] = s[m][1] = s[m][2] = s[m][3] = 0;
    const int g = w.lane / 4, t = w.lane % 4;
    if (2 * g < SINK_ITEM)
        for (int i = 0; i < head_dim_of(c); i++) {
            const float2 x = *(const float2 *)(w.q.q + i * ROWS + 2 * t);
            const float2 k = *(const float2 *)(keys + i * SINK_ITEM + 2 * g);
            s[0][0] += x.x * k.x, s[0][1] += x.y * k.x, s[0][2] += x.x * k.y, s[0][3] += x.y * k.y;
        }
    weigh(r, head_pad_of(c) / 16, s, seen, w.softcap, 0, w.lane);
    add_floats(c, sink_values(c, w.head) + (int64_t)start * head_pad_of(c), seen.to, s, (float *)w.values, r, w.lane);
}

// An item's first token in its tile, where codes are concerned: known when the kernel is compiled if both K and V
// have codes.
DEVICE int first_of(const CacheLayout &c, const Item &item) { return both_coded(c) ? 0 : item.first; }

DEVICE void score(const Warp &w, const Item &item, Square *s)
{
    const int format = k_format(w.c, item);
    if (format == KV_FORMAT_F32)
        score_floats(w.c, (const float *)item.k + item.first, TILE, item.tokens / 16, w.q, s, w.lane);
    else if (format == KV_FORMAT_F16)
        score_halves(w.c, w.keys, window_tokens(w.c) / 16, w.q, s, w.lane);
    else
        score_codes(bits_of(k_format_of(w.c)), w.c, w.keys, first_of(w.c, item), ring_tokens(w.c) / 16, w.q, s, w.lane);
}

DEVICE void weigh_and_add(const Warp &w, const Item &item, Square *s, Running &r)
{
    const int format = v_format(w.c, item), steps = head_pad_of(w.c) / 16, first = first_of(w.c, item);
    const int bits = bits_of(v_format_of(w.c));
    const bool coded = is_quantised(format);
    float room = 0;
    if (coded)
        room = room_for(w.c, w.values + TILE * head_pad_of(w.c) * bits / 8, first, ring_tokens(w.c) / 16, w.lane);
    weigh(r, steps, s, item.seen, w.softcap, room, w.lane);
    count_in_codes(r, steps, coded);
    if (coded)
        add_codes(bits, w.c, w.values, first, ring_tokens(w.c) / 16, s, r, w.lane);
    else if (format == KV_FORMAT_F16)
        add_halves(w.c, w.values, window_tokens(w.c) / 16, s, r, w.lane);
    else
        add_floats(w.c, (const float *)item.v + (int64_t)item.first * head_pad_of(w.c), item.seen.to, s,
                   (float *)w.values, r, w.lane);
}

// Items number, number + stride ... of `end`; the next one is on its way while one is worked on.
DEVICE void attend_items(const Warp &w, const Items &items, int number, int end, int stride, Running &r)
{
    if (number >= end)
        return;
    Item item = item_at(w.c, items, w.head, number);
    fetch_keys(w.c, item, w.keys, w.lane);
    end_copies();
    fetch_values(w.c, item, w.values, w.lane);
    end_copies();
    while (true) {
        number += stride;
        const bool more = number < end;
        Item next = item;
        Square s[4];
        if (more)
            next = item_at(w.c, items, w.head, number);
        wait_but_one();
        __syncwarp();
        score(w, item, s);
        __syncwarp();
        if (more)
            fetch_keys(w.c, next, w.keys, w.lane);
        end_copies();
        wait_but_one();
        __syncwarp();
        weigh_and_add(w, item, s, r);
        __syncwarp();
        if (!more)
            break;
        fetch_values(w.c, next, w.values, w.lane);
        end_copies();
        item = next;
    }
    wait_all();
}

// Putting parts together --------------------------------------------------------------------------------------------

// Part of a KV head's output, in shared memory for each warp or in global memory for each block: [8][pad] outputs,
// and top and total of each row.
DEVICE void store_running(const Running &r, int pad, float *acc, float *tops, float *totals, int lane)
{
    const int g = lane / 4, t = lane % 4;
    const float up = r.coded ? 16777216.f : 1.f;
    KV_UNROLL
    for (int i = 0; i < MAX_STEPS; i++)
        if (i < pad / 16) {
            float2 a = {r.acc[i][0] * up + r.constant[i / 4][0], r.acc[i][2] * up + r.constant[i / 4][0]};
            float2 b = {r.acc[i][1] * up + r.constant[i / 4][1], r.acc[i][3] * up + r.constant[i / 4][1]};
            *(float2 *)(acc + 2 * t * pad + 16 * i + 2 * g) = a;
            *(float2 *)(acc + (2 * t + 1) * pad + 16 * i + 2 * g) = b;
        }
    for (int i = 0; i < 2; i++) {
        float total = r.total[i];
        for (int other = 4; other < 32; other *= 2)
            total += __shfl_xor_sync(0xffffffffu, total, other);
        if (g == 0)
            tops[2 * t + i] = r.top[i], totals[2 * t + i] = total;
    }
}

// The output [rows][head_dim] from `spans` parts, each [8][pad + 2]. One warp takes a row at a time.
DEVICE void combine(const CacheLayout &c, const float *parts, int spans, int rows, float *scratch, float *out)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int pad = head_pad_of(c), dim = head_dim_of(c), ld = pad + 2;
    float *to = scratch + warp * MAX_PAD;
    for (int row = warp; row < rows; row += WARPS) {
        const float *part = parts + row * ld;
        float top = -INFINITY, total = 0, sum[(MAX_PAD + 31) / 32];
        for (int span = lane; span < spans; span += 32)
            top = higher(load_fresh(part + (int64_t)span * ROWS * ld + pad), top);
        for (int other = 16; other; other /= 2)
            top = higher(__shfl_xor_sync(0xffffffffu, top, other), top);
        KV_UNROLL
        for (int i = 0; i < (MAX_PAD + 31) / 32; i++)
            sum[i] = 0;
#ifndef KVRUN_HOST
#pragma unroll 4
#endif
        for (int span = 0; span < spans; span++) {
            const float *from = part + (int64_t)span * ROWS * ld;
            float weight = power_of_2(load_fresh(from + pad) - top);
            total += weight * load_fresh(from + pad + 1);
            KV_UNROLL
            for (int i = 0; i < (MAX_PAD + 31) / 32; i++)
                if (lane + 32 * i < dim)
                    sum[i] += weight * load_fresh(from + lane + 32 * i);
        }
        KV_UNROLL
        for (int i = 0; i < (MAX_PAD + 31) / 32; i++)
            if (lane + 32 * i < dim)
                to[lane + 32 * i] = sum[i] / total;
        __syncwarp();
        if (is_quantised(v_format_of(c)))
            hadamard(to, dim, lane);
        for (int i = lane; i < dim; i += 32)
            out[row * dim + i] = to[i];
        __syncwarp();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MAX_PAD <= 128 ? 4 : 2) attend(
    const Step *step, CacheLayout c, const float *q, int group, float scale, float softcap, const float *cosines,
    const float *sines, const float *sink_cosines, const float *sink_sines, float *partial, int *counters, float *out)
{
    SHARED(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, pad = head_pad_of(c);
    const int first_row = ROWS * blockIdx.z, rows = group - first_row < ROWS ? group - first_row : (int)ROWS;
    const Items items = find_items(step, c);
    const int n_items = items.n_sinks + items.n_windows + items.n_ring;
    const int active = n_items < (int)gridDim.x ? n_items : (int)gridDim.x;
    let_next_start();
    if ((int)blockIdx.x >= active)
        return;
    wait_for_previous();
    uint8_t *at = (uint8_t *)shared;
    Queries queries;
    queries.q = (float *)at, at += 4 * ROWS * head_dim_of(c);
    queries.high = (uint2 *)at, at += fragment_bytes(c);
    queries.low = (uint2 *)at, at += fragment_bytes(c);
    queries.coded = (uint2 *)at, at += fragment_bytes(c);
    queries.down = (float *)at;
    queries.factor = coded_factor(k_format_of(c));
    float *tops = queries.down + ROWS, *totals = tops + WARPS * ROWS;
    int *last = (int *)(totals + WARPS * ROWS);
    at += 512;
    const int64_t first_head = (int64_t)head * group + first_row;
    prepare_queries(c, queries, q + first_head * head_dim_of(c), rows, scale, cosines, sines);

    Running r;
    for (int i = 0; i < 2; i++)
        r.top[i] = -INFINITY, r.total[i] = 0;
    KV_UNROLL
    for (int i = 0; i < MAX_STEPS; i++)
        r.acc[i][0] = r.acc[i][1] = r.acc[i][2] = r.acc[i][3] = 0;
    KV_UNROLL
    for (int i = 0; i < MAX_GROUPS; i++)
        r.constant[i][0] = r.constant[i][1] = 0;
    r.coded = false;
    const Warp w = {c, queries, at + warp * warp_room(c), at + warp * warp_room(c) + k_room(c), softcap, head, lane};
    const int stride = gridDim.x * WARPS;
    int number = blockIdx.x + gridDim.x * warp;
    for (; number < items.n_sinks; number += stride)
        attend_sinks(w, items, number, sink_cosines, sink_sines, c.sight ? 0 : 1, r);
    attend_items(w, items, number, n_items, stride, r);

    __syncthreads(); // nobody needs the tiles any more: the warps' parts take their room
    store_running(r, pad, (float *)(at + warp * warp_room(c)), tops + warp * ROWS, totals + warp * ROWS, lane);
    __syncthreads();
    const int64_t number_of_head = head * gridDim.z + blockIdx.z, ld = pad + 2;
    float *parts = partial + number_of_head * gridDim.x * ROWS * ld, *part = parts + blockIdx.x * ROWS * ld;
    for (int i = threadIdx.x; i < rows * (pad + 1); i += THREADS) {
        const int row = i / (pad + 1), channel = i % (pad + 1);
        float top = -INFINITY, sum = 0;
        for (int j = 0; j < WARPS; j++)
            top = higher(tops[j * ROWS + row], top);
        for (int j = 0; j < WARPS; j++) {
            const float *acc = (const float *)(at + j * warp_room(c)) + row * pad;
            sum += power_of_2(tops[j * ROWS + row] - top) * (channel < pad ? acc[channel] : totals[j * ROWS + row]);
        }
        part[row * ld + (channel < pad ? channel : pad + 1)] = sum;
        if (channel == pad)
            part[row * ld + pad] = top;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *last = atomicAdd(&counters[number_of_head], 1) == active - 1;
        if (*last)
            counters[number_of_head] = 0;
    }
    __syncthreads();
    if (*last) {
        __threadfence();
        combine(c, parts, active, rows, (float *)at, out + first_head * head_dim_of(c));
    }
}

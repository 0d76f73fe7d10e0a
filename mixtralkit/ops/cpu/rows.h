// Rows of tensors in float32 and back, and what a step does to rows between its products.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>

#include "vectors.h"

// Rows of a tensor; `ld` numbers from row to row. `data` is null where there is none.
struct mk_rows { int type; void* data; long ld; };

// Of a norm in front of a product: as many numbers as a row has, of the rows' type; null without one.
struct mk_norm { const void* weight; float eps; };

enum Type { F32, BF16, F16, INT8, INT4 };

struct Free { void operator()(void* p) const { free(p); } };
using Floats = std::unique_ptr<float[], Free>;
static inline Floats floats(long count) { return Floats((float*)aligned_alloc(64, (std::max(count, 1L) * 4 + 63) / 64 * 64)); }

template <class T> static void read_row(const T* from, long n, float* to) { for (long i = 0; i < n; i++) to[i] = to_float(from[i]); }
static void read_row(int type, const char* p, long at, long n, float* to) {
    if (type == F32) read_row((const float*)p + at, n, to);
    else if (type == BF16) read_row((const bf16*)p + at, n, to);
    else read_row((const f16*)p + at, n, to);
}
template <class T> static void write_row(const float* from, long n, T* to) { for (long i = 0; i < n; i++) from_float(from[i], to + i); }
static void write_row(int type, const float* from, long n, char* p, long at) {
    if (type == F32) write_row(from, n, (float*)p + at);
    else if (type == BF16) write_row(from, n, (bf16*)p + at);
    else write_row(from, n, (f16*)p + at);
}

// x to the nearest number of its type.
static void round_row(int type, float* x, long n) {
    if (type == F32) return;
    for (long i = 0; i < n; i += 256) {
        uint16_t part[256];
        long count = std::min(256L, n - i);
        if (type == BF16) write_row(x + i, count, (bf16*)part), read_row((const bf16*)part, count, x + i);
        else write_row(x + i, count, (f16*)part), read_row((const f16*)part, count, x + i);
    }
}

// Row m of x, K numbers in float32; behind its norm, rounded as `rms_norm` rounds, if there is one.
static void read_normed(const mk_rows& x, const mk_norm& norm, long m, long K, float* to) {
    read_row(x.type, (const char*)x.data, m * x.ld, K, to);
    if (!norm.weight) return;
    vfloat squares[4] = {};
    long k = 0;
    for (; k + 4 * VW <= K; k += 4 * VW)
        for (int i = 0; i < 4; i++) squares[i] = fma(load(to + k + i * VW), load(to + k + i * VW), squares[i]);
    vfloat all = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    float sum;
    sums_of<1>(&all, &sum);
    for (; k < K; k++) sum += to[k] * to[k];
    float by = 1.f / std::sqrt(sum / K + norm.eps), weight[256];
    for (k = 0; k < K; k++) to[k] *= by;
    round_row(x.type, to, K);
    for (k = 0; k < K; k += 256) {
        long n = std::min(256L, K - k);
        read_row(x.type, (const char*)norm.weight, k, n, weight);
        for (long i = 0; i < n; i++) to[k + i] *= weight[i];
    }
    round_row(x.type, to, K);
}

// The `count` largest of n numbers, the first of equal ones, NaN above all, and their softmax.
static void choose(const float* logits, long n, long count, int64_t* chosen, float* weights) {
    auto before = [=](long a, long b) { return logits[a] > logits[b] || (logits[a] != logits[a] && logits[b] == logits[b]); };
    float total = 0;
    for (long i = 0; i < count; i++) {
        long best = -1;
        for (long e = 0; e < n; e++)
            if (std::find(chosen, chosen + i, e) == chosen + i && (best < 0 || before(e, best))) best = e;
        chosen[i] = best;
        total += weights[i] = std::exp(logits[best] - logits[chosen[0]]);
    }
    for (long i = 0; i < count; i++) weights[i] /= total;
}

// Features (2i, 2i + 1) of a head of C turned by angle i, in float32; cos and sin of the angles are neighbours.
static void turn(float* x, const float* rope, long C) {
    for (long i = 0; i < C; i += 2) {
        float even = x[i], odd = x[i + 1], cos = rope[i], sin = rope[i + 1];
        x[i] = even * cos - odd * sin, x[i + 1] = even * sin + odd * cos;
    }
}

// The largest of n numbers, the place of the first such, log Σ e^x; that is NaN where one is.
static void best_of(const float* x, long n, int64_t* place, float* value, float* logsumexp) {
    vfloat high = splat(-INFINITY), sums = {};
    float most = -INFINITY, sum, lanes[VW];
    long k = 0;
    for (; k + VW <= n; k += VW) { vfloat v = load(x + k); high = v > high ? v : high; }
    store(lanes, high);
    for (float lane : lanes) most = std::max(most, lane);
    for (long i = k; i < n; i++) most = std::max(most, x[i]);
    *place = std::find(x, x + n, most) - x;
    if (*place == n) *place = 0;
    *value = most;
    float shift = std::isinf(most) ? 0.f : most;
    for (k = 0; k + VW <= n; k += VW) sums += exponential(load(x + k) - shift);
    sums_of<1>(&sums, &sum);
    for (; k < n; k++) sum += std::exp(x[k] - shift);
    *logsumexp = sum != sum ? sum : std::isinf(most) ? most : most + std::log(sum);
}

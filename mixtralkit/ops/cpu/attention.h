// One query's attention to a key-value head, in float32.
#pragma once
#include <algorithm>
#include <cmath>

#include "vectors.h"

constexpr long KEYS = 64;  // at most, of a block, which stay in the first cache

// Where a sequence's keys are: position p is row p % positions of page of[p / positions]. Distances in numbers.
struct Pages {
    const int32_t* of;
    long positions, page, row;
    long at(long p) const { return of[p / positions] * page + p % positions * row; }
};

template <int G, class T>
static void attend_heads(const T* keys, const T* values, const Pages& pages, long first, long last, long C,
                         const float* query, float* sums) {
    long wide = (C + VW - 1) / VW * VW;
    float scale = 1.f / std::sqrt((float)C), most[G], total[G], score[G][KEYS];
    std::fill_n(most, G, -INFINITY);
    std::fill_n(total, G, 0.f);
    auto part = [=](const T* p, long c) {  // VW numbers from c, with zeros behind C
        if (c + VW <= C) return load(p + c);
        float rest[VW] = {};
        for (long i = c; i < C; i++) rest[i - c] = to_float(p[i]);
        return load(rest);
    };
    for (long s0 = first, count; s0 <= last; s0 += count) {
        count = std::min({KEYS, last + 1 - s0, pages.positions - s0 % pages.positions});
        long from = pages.at(s0), whole = (count + VW - 1) / VW * VW;
        for (long s = 0; s < count; s++) {
            vfloat acc[G] = {};
            for (long c = 0; c < C; c += VW) {
                vfloat key = part(keys + from + s * pages.row, c);
                for (int g = 0; g < G; g++) acc[g] = fma(key, load(query + g * wide + c), acc[g]);
            }
            float dots[G];
            sums_of<G>(acc, dots);
            for (int g = 0; g < G; g++) score[g][s] = dots[g] * scale;
        }
        for (int g = 0; g < G; g++) {
            for (long s = count; s < whole; s++) score[g][s] = -INFINITY;
            float now = most[g];
            for (long s = 0; s < count; s++) now = std::max(now, score[g][s]);
            float shrink = std::exp(most[g] - now);
            most[g] = now;
            vfloat all = {};
            for (long s = 0; s < whole; s += VW) {
                vfloat p = exponential(load(score[g] + s) - now);
                store(score[g] + s, p);
                all += p;
            }
            float one;
            sums_of<1>(&all, &one);
            total[g] = total[g] * shrink + one;
            if (shrink != 1.f)
                for (long c = 0; c < wide; c += VW) store(sums + g * wide + c, load(sums + g * wide + c) * shrink);
        }
        for (long c = 0; c < C; c += VW) {
            vfloat acc[G];
            for (int g = 0; g < G; g++) acc[g] = load(sums + g * wide + c);
            for (long s = 0; s < count; s++) {
                vfloat value = part(values + from + s * pages.row, c);
                for (int g = 0; g < G; g++) acc[g] = fma(splat(score[g][s]), value, acc[g]);
            }
            for (int g = 0; g < G; g++) store(sums + g * wide + c, acc[g]);
        }
    }
    for (int g = 0; g < G; g++)
        for (long c = 0; c < wide; c += VW) store(sums + g * wide + c, load(sums + g * wide + c) / total[g]);
}

// sums [G, C] = Σ softmax(query · keys / √C) · values over keys first … last; query and sums have rows of whole vectors.
template <class T>
static void attend(const T* keys, const T* values, const Pages& pages, long first, long last, long G, long C,
                   const float* query, float* sums) {
    long wide = (C + VW - 1) / VW * VW;
    for (; G >= 4; G -= 4, query += 4 * wide, sums += 4 * wide)
        attend_heads<4>(keys, values, pages, first, last, C, query, sums);
    for (; G >= 1; G--, query += wide, sums += wide)
        attend_heads<1>(keys, values, pages, first, last, C, query, sums);
}

// Products with weights of 8 and 4 bits. For few rows, integers: weights of 8 bits by x in 16 bits, which is as exact as
// the float32 product of rounded weights to one part in 10^4 of a group's largest x. For many, float32 (kernels.cpp).
//
// INT8: a signed byte a weight, one float32 scale an output.
// INT4: weights 64c … 64c + 63 of an output are 16 words of 16 bits; bits 4j … 4j + 3 of word i are weight 64c + 16j + i.
//       A float16 scale and, if there are any, a byte of zero point for every group; value = (bits - zero) · scale,
//       zero 8 without zero points.
#pragma once
#include <algorithm>
#include <cmath>

#include "vectors.h"

constexpr long X_GROUP = 64;  // x of one scale beside INT8

struct Packed {
    const char* data;
    long ld;  // bytes from one output to the next
    const char* scales;
    const uint8_t* zeros;  // null without zero points
    long group;            // 0 for INT8
};

// A row of x in 16 bits: K numbers, and for each group the scale and scale · Σ numbers.
struct Narrow {
    const int16_t* x;
    const float *scale, *sum;
};

// `x` may have fewer than K numbers, padded with zeros up to K by the caller's `count`.
static inline void narrow(const float* x, long count, long K, long group, int16_t* to, float* scale, float* sum) {
    for (long k = 0; k < K; k += group, scale++, sum++) {
        float most = 0;
        long end = std::min(k + group, std::max(count, k));
        for (long i = k; i < end; i++) most = std::max(most, std::fabs(x[i]));
        float by = most > 0 ? 32767.f / most : 0.f;
        long total = 0;
        for (long i = k; i < end; i++) total += to[i] = (int16_t)std::lrintf(x[i] * by);
        std::fill(to + end, to + k + group, (int16_t)0);
        *scale = most / 32767.f;
        *sum = *scale * total;
    }
}

// Sixteen products of 16 bits added in pairs.
typedef int16_t vshort __attribute__((vector_size(32)));
typedef int32_t vint8w __attribute__((vector_size(32)));
static inline vint8w pairs(vshort a, vshort b) {
#if defined(__AVX2__)
    return (vint8w)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__aarch64__)
    struct halves { int16x8_t low, high; } x, y;
    struct sums { int32x4_t low, high; } z;
    memcpy(&x, &a, 32), memcpy(&y, &b, 32);
    z.low = vpaddq_s32(vmull_s16(vget_low_s16(x.low), vget_low_s16(y.low)), vmull_high_s16(x.low, y.low));
    z.high = vpaddq_s32(vmull_s16(vget_low_s16(x.high), vget_low_s16(y.high)), vmull_high_s16(x.high, y.high));
    vint8w out;
    memcpy(&out, &z, 32);
    return out;
#else
    vint8w out;
    for (int i = 0; i < 8; i++) out[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return out;
#endif
}
typedef float vfloat8 __attribute__((vector_size(32)));
static inline vfloat8 fma8(vint8w a, float b, vfloat8 c) {
#if defined(__FMA__)
    return (vfloat8)_mm256_fmadd_ps(_mm256_cvtepi32_ps((__m256i)a), _mm256_set1_ps(b), (__m256)c);
#else
    return c + __builtin_convertvector(a, vfloat8) * b;
#endif
}
static inline float sum8(vfloat8 v) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); }

static inline vshort bytes16(const char* p) {
    typedef int8_t b16 __attribute__((vector_size(16)));
    return __builtin_convertvector(load_as<b16>(p), vshort);
}

constexpr int MOST_GROUPS = 1024;  // scales at a time

// MR rows times one output after the other.
template <int MR>
static void few_int8(const Packed& w, long first, long outputs, long K, const Narrow* x, float* const* out) {
    for (long o = first; o < first + outputs; o++) {
        const char* p = w.data + o * w.ld;
        vfloat8 acc[MR] = {};
        for (long k = 0, g = 0; k < K; k += X_GROUP, g++) {
            __builtin_prefetch(p + k + 1024);
            vshort part[4];
            for (int j = 0; j < 4; j++) part[j] = bytes16(p + k + 16 * j);
            for (int m = 0; m < MR; m++) {
                vint8w dots = {};
                for (int j = 0; j < 4; j++) dots += pairs(part[j], load_as<vshort>(x[m].x + k + 16 * j));
                acc[m] = fma8(dots, x[m].scale[g], acc[m]);
            }
        }
        float scale;
        memcpy(&scale, w.scales + 4 * o, 4);
        for (int m = 0; m < MR; m++) out[m][o - first] = sum8(acc[m]) * scale;
    }
}

template <int MR, int GROUP>
static void few_int4(const Packed& w, long first, long outputs, long K, const Narrow* x, float* const* out) {
    long groups = K / GROUP;
    float scale[MR][MOST_GROUPS];
    for (long o = first; o < first + outputs; o++) {
        const char* p = w.data + o * w.ld;
        const f16* scales = (const f16*)w.scales + o * groups;
        const uint8_t* zeros = w.zeros ? w.zeros + o * groups : nullptr;
        vfloat8 acc[MR] = {};
        float less[MR] = {};
        for (long g0 = 0; g0 < groups; g0 += MOST_GROUPS) {
            long count = std::min<long>(MOST_GROUPS, groups - g0), g = 0;
            vfloat off[MR] = {};
            for (; g + VW <= count; g += VW) {
                vfloat s = load(scales + g0 + g), z = splat(8.f);
                if (zeros) z = __builtin_convertvector(load_as<vubyte>(zeros + g0 + g), vfloat);
                for (int m = 0; m < MR; m++) {
                    store(scale[m] + g, s * load(x[m].scale + g0 + g));
                    off[m] = fma(s * z, load(x[m].sum + g0 + g), off[m]);
                }
            }
            for (int m = 0; m < MR; m++) { float one; sums_of<1>(off + m, &one); less[m] += one; }
            for (; g < count; g++) {
                float s = to_float(scales[g0 + g]), z = zeros ? zeros[g0 + g] : 8.f;
                for (int m = 0; m < MR; m++) scale[m][g] = s * x[m].scale[g0 + g], less[m] += s * z * x[m].sum[g0 + g];
            }
            constexpr int STEP = GROUP < 64 ? 64 : GROUP;  // weights of a step: whole groups and whole words
            for (long k = g0 * GROUP, i = 0; i < count; k += STEP, i += STEP / GROUP) {
                __builtin_prefetch(p + k / 2 + 1024);
                vshort part[STEP / 16];
                for (int c = 0; c < STEP / 64; c++) {
                    typedef uint16_t words __attribute__((vector_size(32)));
                    words bits = load_as<words>(p + k / 2 + 32 * c);
                    for (int j = 0; j < 4; j++) part[4 * c + j] = (vshort)((bits >> (4 * j)) & 15);
                }
                for (int m = 0; m < MR; m++)
                    for (int s = 0; s < STEP / GROUP; s++) {
                        vint8w dots = {};
                        for (int j = s * GROUP / 16; j < (s + 1) * GROUP / 16; j++)
                            dots += pairs(part[j], load_as<vshort>(x[m].x + k + 16 * j));
                        acc[m] = fma8(dots, scale[m][i + s], acc[m]);
                    }
            }
        }
        for (int m = 0; m < MR; m++) out[m][o - first] = sum8(acc[m]) - less[m];
    }
}

template <int MR>
static void few_packed(const Packed& w, long first, long outputs, long K, const Narrow* x, float* const* out) {
    if (w.group == 0) few_int8<MR>(w, first, outputs, K, x, out);
    else if (w.group == 32) few_int4<MR, 32>(w, first, outputs, K, x, out);
    else if (w.group == 64) few_int4<MR, 64>(w, first, outputs, K, x, out);
    else few_int4<MR, 128>(w, first, outputs, K, x, out);
}

static void few_packed(const Packed& w, long first, long outputs, long K, const Narrow* x, long rows, float* const* out) {
    for (; rows > 0;) {  // each step unpacks the weights again, which by then are in the second cache
        int step = rows >= 4 ? 4 : (int)rows;
        switch (step) {
            case 1: few_packed<1>(w, first, outputs, K, x, out); break;
            case 2: few_packed<2>(w, first, outputs, K, x, out); break;
            case 3: few_packed<3>(w, first, outputs, K, x, out); break;
            default: few_packed<4>(w, first, outputs, K, x, out);
        }
        rows -= step, x += step, out += step;
    }
}

// Weights k … k + n of an output as float32; k and n are multiples of 64 and of the group.
static inline void unpack(const Packed& w, long o, long K, long k, long n, float* to) {
    const char* p = w.data + o * w.ld;
    if (w.group == 0) {
        float scale;
        memcpy(&scale, w.scales + 4 * o, 4);
        for (long i = 0; i < n; i += VW)
            store(to + i, __builtin_convertvector(load_as<vbyte>(p + k + i), vfloat) * scale);
        return;
    }
    long groups = K / w.group;
    const f16* scales = (const f16*)w.scales + o * groups;
    for (long i = 0; i < n; i += 64) {
        uint16_t words[16];
        memcpy(words, p + (k + i) / 2, sizeof words);
        for (int j = 0; j < 4; j++) {
            long g = (k + i + 16 * j) / w.group;
            float s = to_float(scales[g]), z = (w.zeros ? w.zeros[o * groups + g] : 8.f);
            for (int l = 0; l < 16; l++) to[i + 16 * j + l] = (float)((words[l] >> (4 * j)) & 15) * s - s * z;
        }
    }
}

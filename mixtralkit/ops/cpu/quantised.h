// Products with weights of 8 and 4 bits: of integers, weights by x in 16 bits with a scale for each group of x, which is
// as exact as the float32 product of the rounded weights to one part in 10^4 of a group's largest x. Products and sums of
// a group are exact.
//
// INT8: a signed byte a weight, one float32 scale an output.
// INT4: weights 64c … 64c + 63 of an output are 16 words of 16 bits; bits 4j … 4j + 3 of word i are weight 64c + 16j + i.
//       A float16 scale and, if there are any, a byte of zero point for every group; value = (bits - zero) · scale,
//       zero 8 without zero points.
#pragma once
#include <algorithm>
#include <cmath>

#include "vectors.h"

constexpr long X_GROUP = 64;          // x of one scale beside INT8
constexpr long NARROW_CHUNK = 2048;   // columns: weights and 4 rows of x in 16 bits fit the first cache
constexpr long NARROW_ROWS = 64;      // of which a chunk fits the second

struct Packed {
    const char* data;
    long ld;  // bytes from one output to the next
    const char* scales;
    const uint8_t* zeros;  // null without zero points
    long group;            // 0 for INT8
    long columns;          // of an output, of which a product may take the first ones
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

// MR rows times columns k … k + n of one output, added to out[m]. Every path sums chunks of NARROW_CHUNK columns like this,
// so a row's result does not depend on how many there are.
template <int MR>
static inline void chunk_int8(const Packed& w, long o, long k0, long n, const Narrow* x, float* const* out, long at) {
    const char* p = w.data + o * w.ld + k0;
    vfloat8 acc[MR] = {};
    for (long k = 0; k < n; k += X_GROUP) {
        __builtin_prefetch(p + k + 1024);
        vshort part[4];
        for (int j = 0; j < 4; j++) part[j] = bytes16(p + k + 16 * j);
        for (int m = 0; m < MR; m++) {
            vint8w dots = {};
            for (int j = 0; j < 4; j++) dots += pairs(part[j], load_as<vshort>(x[m].x + k0 + k + 16 * j));
            acc[m] = fma8(dots, x[m].scale[(k0 + k) / X_GROUP], acc[m]);
        }
    }
    float scale;
    memcpy(&scale, w.scales + 4 * o, 4);
    for (int m = 0; m < MR; m++) out[m][at] += sum8(acc[m]) * scale;
}

template <int MR, int GROUP>
static inline void chunk_int4(const Packed& w, long o, long k0, long n, const Narrow* x, float* const* out, long at) {
    constexpr int MOST_GROUPS = NARROW_CHUNK / GROUP;
    long count = n / GROUP, g0 = k0 / GROUP, g = 0;
    const char* p = w.data + o * w.ld + k0 / 2;
    const f16* scales = (const f16*)w.scales + o * (w.columns / GROUP) + g0;
    const uint8_t* zeros = w.zeros ? w.zeros + o * (w.columns / GROUP) + g0 : nullptr;
    float scale[MR][MOST_GROUPS], less[MR] = {};
    vfloat off[MR] = {};
    for (; g + VW <= count; g += VW) {
        vfloat s = load(scales + g), z = splat(8.f);
        if (zeros) z = __builtin_convertvector(load_as<vubyte>(zeros + g), vfloat);
        for (int m = 0; m < MR; m++) {
            store(scale[m] + g, s * load(x[m].scale + g0 + g));
            off[m] = fma(s * z, load(x[m].sum + g0 + g), off[m]);
        }
    }
    for (int m = 0; m < MR; m++) sums_of<1>(off + m, less + m);
    for (; g < count; g++) {
        float s = to_float(scales[g]), z = zeros ? zeros[g] : 8.f;
        for (int m = 0; m < MR; m++) scale[m][g] = s * x[m].scale[g0 + g], less[m] += s * z * x[m].sum[g0 + g];
    }
    constexpr int STEP = GROUP < 64 ? 64 : GROUP, SUMS = STEP / GROUP;  // whole groups and whole words; a sum for each
    vfloat8 acc[MR][SUMS] = {};
    for (long k = 0, i = 0; k < n; k += STEP, i += SUMS) {
        __builtin_prefetch(p + k / 2 + 1024);
        vshort part[STEP / 16];
        for (int c = 0; c < STEP / 64; c++) {
            typedef uint16_t words __attribute__((vector_size(32)));
            words bits = load_as<words>(p + k / 2 + 32 * c);
            for (int j = 0; j < 4; j++) part[4 * c + j] = (vshort)((bits >> (4 * j)) & 15);
        }
        for (int m = 0; m < MR; m++)
            for (int s = 0; s < SUMS; s++) {
                vint8w dots = {};
                for (int j = s * GROUP / 16; j < (s + 1) * GROUP / 16; j++)
                    dots += pairs(part[j], load_as<vshort>(x[m].x + k0 + k + 16 * j));
                acc[m][s] = fma8(dots, scale[m][i + s], acc[m][s]);
            }
    }
    for (int m = 0; m < MR; m++) {
        for (int s = 1; s < SUMS; s++) acc[m][0] += acc[m][s];
        out[m][at] += sum8(acc[m][0]) - less[m];
    }
}

using Chunk = void (*)(const Packed&, long, long, long, const Narrow*, float* const*, long);
template <int MR> static Chunk chunk_of(long group) {
    switch (group) {
        case 0: return chunk_int8<MR>;
        case 32: return chunk_int4<MR, 32>;
        case 64: return chunk_int4<MR, 64>;
        default: return chunk_int4<MR, 128>;
    }
}

// out[m][0 … outputs) = x_m · w_o for outputs `first` …. Blocks of rows, whose chunk of x stays in the second cache; weights
// are unpacked anew for every four rows, from the first.
static void product_packed(const Packed& w, long first, long outputs, long K, const Narrow* x, long rows, float* const* out) {
    const Chunk chunk[] = {chunk_of<1>(w.group), chunk_of<2>(w.group), chunk_of<3>(w.group), chunk_of<4>(w.group)};
    for (long m = 0; m < rows; m++) std::fill_n(out[m], outputs, 0.f);
    if (rows <= 4) {  // each output's weights in one go
        for (long o = 0; o < outputs; o++)
            for (long k = 0; k < K; k += NARROW_CHUNK)
                chunk[rows - 1](w, first + o, k, std::min(NARROW_CHUNK, K - k), x, out, o);
        return;
    }
    for (long m0 = 0; m0 < rows; m0 += NARROW_ROWS) {
        long m1 = std::min(rows, m0 + NARROW_ROWS);
        for (long k = 0; k < K; k += NARROW_CHUNK) {
            long n = std::min(NARROW_CHUNK, K - k);
            for (long o = 0; o < outputs; o++)
                for (long m = m0; m < m1;) {
                    long step = std::min(4L, m1 - m);
                    chunk[step - 1](w, first + o, k, n, x + m, out + m, o);
                    m += step;
                }
        }
    }
}

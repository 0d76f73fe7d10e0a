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
constexpr long NARROW_OUTPUTS = 4;    // whose chunk of weights stays in the first cache while rows take turns

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
// Sums of eight numbers each, in the order ((0+1)+(2+3))+((4+5)+(6+7)), added to out[0 … N).
template <int N> static inline void add_sums(const vfloat8* v, float* out) {
#if defined(__AVX__)
    if constexpr (N == 4) {
        __m256 low = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]), high = _mm256_hadd_ps((__m256)v[2], (__m256)v[3]);
        __m256 fours = _mm256_hadd_ps(low, high);
        __m128 sums = _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1));
        return _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
    }
#endif
    for (int i = 0; i < N; i++) out[i] += ((v[i][0] + v[i][1]) + (v[i][2] + v[i][3])) + ((v[i][4] + v[i][5]) + (v[i][6] + v[i][7]));
}

constexpr int unit_bytes(int group) { return group ? 32 : 64; }  // of 64 columns

// 64 weights as four vectors of sixteen neighbours.
template <int GROUP> static inline void unpack(const char* p, vshort (&part)[4]) {
    if constexpr (GROUP == 0) {
        for (int j = 0; j < 4; j++) {
#if defined(__AVX2__)
            part[j] = (vshort)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(p + 16 * j)));
#else
            typedef int8_t bytes __attribute__((vector_size(16)));
            part[j] = __builtin_convertvector(load_as<bytes>(p + 16 * j), vshort);
#endif
        }
    } else {
        typedef uint16_t words __attribute__((vector_size(32)));
        words bits = load_as<words>(p);
        part[0] = (vshort)(bits & 15), part[1] = (vshort)(bits >> 4 & 15), part[2] = (vshort)(bits >> 8 & 15), part[3] = (vshort)(bits >> 12);
    }
}

// For INT4: scale[m * NR + r][g] = scale of x's and the weights' group g, off[m * NR + r] = Σ_g scale · zero · Σ x.
template <int GROUP, int MR, int NR>
static inline void scales_of(const Packed& w, long o, long g0, long count, const Narrow* x, float (*scale)[NARROW_CHUNK / GROUP], float* off) {
    for (int r = 0; r < NR; r++) {
        const f16* scales = (const f16*)w.scales + (o + r) * (w.columns / GROUP) + g0;
        const uint8_t* zeros = w.zeros ? w.zeros + (o + r) * (w.columns / GROUP) + g0 : nullptr;
        vfloat less[MR] = {};
        long g = 0;
        for (; g + VW <= count; g += VW) {
            vfloat s = load(scales + g), z = splat(8.f);
            if (zeros) z = __builtin_convertvector(__builtin_convertvector(load_as<vubyte>(zeros + g), vint), vfloat);
            for (int m = 0; m < MR; m++) {
                store(scale[m * NR + r] + g, s * load(x[m].scale + g0 + g));
                less[m] = fma(s * z, load(x[m].sum + g0 + g), less[m]);
            }
        }
        for (int m = 0; m < MR; m++) sums_of<1>(less + m, off + m * NR + r);
        for (; g < count; g++) {
            float s = to_float(scales[g]), z = zeros ? zeros[g] : 8.f;
            for (int m = 0; m < MR; m++)
                scale[m * NR + r][g] = s * x[m].scale[g0 + g], off[m * NR + r] += s * z * x[m].sum[g0 + g];
        }
    }
}

// MR rows times columns k0 … k0 + n of NR outputs from o, added to out[m][at …]. Every path sums chunks of NARROW_CHUNK
// columns like this, so a row's result does not depend on how many there are.
template <int GROUP, int MR, int NR>
static inline void chunk(const Packed& w, long o, long k0, long n, const Narrow* x, float* const* out, long at) {
    constexpr int WIDE = GROUP ? GROUP : (int)X_GROUP, STEP = std::max(WIDE, 64), BYTES = unit_bytes(GROUP);
    const char* p = w.data + o * w.ld + k0 / 64 * BYTES;
    float scale[GROUP ? MR * NR : 1][NARROW_CHUNK / WIDE], off[MR * NR];
    if constexpr (GROUP) scales_of<GROUP, MR, NR>(w, o, k0 / GROUP, n / GROUP, x, scale, off);
    vfloat8 acc[MR][NR] = {};
    for (long k = 0, g = 0; k < n; k += STEP, g += STEP / WIDE) {
        for (int r = 0; r < NR; r++) {
            vshort part[STEP / 64][4];
            for (int c = 0; c < STEP / 64; c++) {
                const char* from = p + r * w.ld + (k / 64 + c) * BYTES;
                __builtin_prefetch(from + NR * w.ld);
                unpack<GROUP>(from, part[c]);
            }
            for (int m = 0; m < MR; m++)
                for (int s = 0; s < STEP / WIDE; s++) {
                    vint8w dots = {};
                    for (int j = s * WIDE / 16; j < (s + 1) * WIDE / 16; j++)
                        dots += pairs(part[j / 4][j % 4], load_as<vshort>(x[m].x + k0 + k + 16 * j));
                    acc[m][r] = fma8(dots, GROUP ? scale[m * NR + r][g + s] : x[m].scale[k0 / WIDE + g + s], acc[m][r]);
                }
        }
    }
    for (int m = 0; m < MR; m++) {
        float sums[NR] = {};
        add_sums<NR>(acc[m], sums);
        for (int r = 0; r < NR; r++) {
            if constexpr (GROUP) out[m][at + r] += sums[r] - off[m * NR + r];
            else {
                float by;
                memcpy(&by, w.scales + 4 * (o + r), 4);
                out[m][at + r] += sums[r] * by;
            }
        }
    }
}

// The same for any number of outputs and up to four rows.
template <int GROUP, int MR>
static void chunk_of(const Packed& w, long o, long outputs, long k0, long n, const Narrow* x, float* const* out) {
    constexpr int NR = MR > 2 ? 2 : 4;  // so many sums stay in registers
    long at = 0;
    for (; at + NR <= outputs; at += NR) chunk<GROUP, MR, NR>(w, o + at, k0, n, x, out, at);
    for (; at < outputs; at++) chunk<GROUP, MR, 1>(w, o + at, k0, n, x, out, at);
}

// out[m][0 … outputs) = x_m · w_o for outputs `first` …. Blocks of rows, whose chunk of x stays in the second cache; weights
// are unpacked anew for every four rows, from the first cache but for the first ones.
template <int GROUP>
static void product_packed(const Packed& w, long first, long outputs, long K, const Narrow* x, long rows, float* const* out) {
    for (long m = 0; m < rows; m++) std::fill_n(out[m], outputs, 0.f);
    for (long m0 = 0; m0 < rows; m0 += NARROW_ROWS) {
        long m1 = std::min(rows, m0 + NARROW_ROWS);
        for (long o = 0; o < outputs; o += NARROW_OUTPUTS) {
            long count = std::min(NARROW_OUTPUTS, outputs - o);
            for (long k = 0; k < K; k += NARROW_CHUNK) {
                long n = std::min(NARROW_CHUNK, K - k);
                for (long m = m0, step; m < m1; m += step) {
                    float* at[4];
                    step = std::min(4L, m1 - m);
                    for (int i = 0; i < step; i++) at[i] = out[m + i] + o;
                    if (step == 1) chunk_of<GROUP, 1>(w, first + o, count, k, n, x + m, at);
                    else if (step == 2) chunk_of<GROUP, 2>(w, first + o, count, k, n, x + m, at);
                    else if (step == 3) chunk_of<GROUP, 3>(w, first + o, count, k, n, x + m, at);
                    else chunk_of<GROUP, 4>(w, first + o, count, k, n, x + m, at);
                }
            }
        }
    }
}

static void product_packed(const Packed& w, long first, long outputs, long K, const Narrow* x, long rows, float* const* out) {
    switch (w.group) {
        case 0: return product_packed<0>(w, first, outputs, K, x, rows, out);
        case 32: return product_packed<32>(w, first, outputs, K, x, rows, out);
        case 64: return product_packed<64>(w, first, outputs, K, x, rows, out);
        default: return product_packed<128>(w, first, outputs, K, x, rows, out);
    }
}

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
#if defined(__AVX2__) && defined(__F16C__)
#define MK_HAS_EIGHT
constexpr bool HAS_EIGHT = true;
#else
constexpr bool HAS_EIGHT = false;
#endif
constexpr long NARROW_CHUNK = 2048;   // columns: weights and 4 rows of x in 16 bits fit the first cache
constexpr long NARROW_ROWS = 64;      // of which a chunk fits the second
constexpr long NARROW_OUTPUTS = 4;    // whose chunk of weights stays in the first cache while rows take turns

// Rows of the tile that starts at m: as even as tiles of up to `most` can be.
static inline int tile_rows(long rows, long m, int most) { long left = rows - m, tiles = (left + most - 1) / most; return (int)((left + tiles - 1) / tiles); }

struct Packed {
    const char* data;
    long ld;  // bytes from one output to the next
    const char* scales;
    const uint8_t* zeros;  // null without zero points
    long group;            // 0 for INT8
    long columns;          // of an output, of which a product may take the first ones
};

// A row of x in 16 bits: K numbers, and for each group the scale and scale · Σ numbers. Or in 8: what `narrow8` writes.
struct Narrow {
    const int16_t* x;
    const int8_t* x8;  // null in 16 bits
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

// The same in 8 bits: of 64 columns a scale and 96 bytes. `chunk8` makes sixteen sums of them, in turns of the first and of the
// second 32 columns; of each, two neighbours are in the first 32 bytes, two in the next, and in the last ones is the sum
// of these four, `times` over.
static inline void narrow8(const float* x, long count, long K, int times, int8_t* to, float* scale) {
    for (long k = 0; k < K; k += 64, to += 96) {
        float part[64] = {}, most = 0;
        int8_t numbers[64];
        if (k < count) memcpy(part, x + k, std::min(64L, count - k) * 4);
        vfloat high{};
        for (int i = 0; i < 64; i += VW) { vfloat v = load(part + i); v = v < 0.f ? -v : v; high = v > high ? v : high; }
        for (int i = 0; i < VW; i++) most = std::max(most, high[i]);
        float by = most > 0 ? 127.f / most : 0.f;
        *scale++ = most / 127.f;
        for (int i = 0; i < 64; i++) numbers[i] = (int8_t)(int)(part[i] * by + (part[i] < 0 ? -.5f : .5f));
        for (int i = 0; i < 16; i++) {
            const int8_t* from = numbers + i % 2 * 32 + i / 8 * 8 + i % 8 / 2 * 2;
            int16_t sum = (int16_t)((from[0] + from[1] + from[16] + from[17]) * times);
            memcpy(to + 2 * i, from, 2), memcpy(to + 32 + 2 * i, from + 16, 2), memcpy(to + 64 + 2 * i, &sum, 2);
        }
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
        for (long ahead = 0; ahead < count; ahead += 32) __builtin_prefetch(scales + NR * (w.columns / GROUP) + ahead);
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

#if defined(MK_HAS_EIGHT)
// Scales of a chunk of up to NARROW_OUTPUTS outputs as whole numbers, of which the largest of an output is 32767, and zero points.
template <int GROUP> struct Scales {
    static constexpr int MOST = GROUP ? NARROW_CHUNK / GROUP : 16;
    alignas(32) int16_t by[NARROW_OUTPUTS][MOST], zero[NARROW_OUTPUTS][MOST];
    float step[NARROW_OUTPUTS];

    void read(const Packed& w, long o, long outputs, long k0, long n) {
        long row = w.columns / GROUP, count = n / GROUP, at = o * row + k0 / GROUP;
        for (long r = 0; r < outputs; r++, at += row) {
            const char* from = w.scales + 2 * at;
            char copy[2 * MOST];
            for (int i = 0; i < 2 * MOST; i += 64) __builtin_prefetch(from + NARROW_OUTPUTS * row * 2 + i);
            if (count < MOST) from = (char*)memcpy(memset(copy, 0, sizeof copy), from, 2 * count);
            __m256i high{}, size = _mm256_set1_epi16(0x7fff);
            for (int g = 0; g < MOST; g += 16) high = _mm256_max_epu16(high, _mm256_and_si256(load_as<__m256i>(from + 2 * g), size));
            __m128i most = _mm_max_epu16(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
            most = ~_mm_minpos_epu16(~most);
            float largest = _mm_cvtss_f32(_mm_cvtph_ps(most)), times = largest > 0 ? 32767.f / largest : 0.f;
            step[r] = largest / 32767.f;
            auto whole = [=](int g) { return _mm256_cvtps_epi32(_mm256_cvtph_ps(load_as<__m128i>(from + 2 * g)) * times); };
            for (int g = 0; g < MOST; g += 16) {
                __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole(g), whole(g + 8)), 0xd8);
                memcpy(by[r] + g, &both, sizeof both);
            }
            for (long g = 0; w.zeros && g < count; g++) zero[r][g] = w.zeros[at + g];
        }
    }
    // Those of the two halves of 64 columns in turns.
    static __m256i of(const int16_t* numbers, long u) {
        if constexpr (GROUP == 32) return _mm256_set1_epi32(load_as<int32_t>(numbers + 2 * u));
        else return _mm256_set1_epi16(numbers[u * 64 / GROUP]);
    }
};

// `chunk` for x in 8 bits beside INT4: sixteen sums of four products in 16 bits, then scaled and added in pairs.
template <int GROUP, bool ZEROS, int MR, int NR>
static inline void chunk8(const Packed& w, const Scales<GROUP>& s, long o, long k0, long n, const Narrow* x, float* const* out, long at) {
    const char* p = w.data + o * w.ld + k0 / 2;
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i turns = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
    vfloat8 acc[MR][NR] = {};
    for (long u = 0; u < n / 64; u++)
        for (int r = 0; r < NR; r++) {
            const char* from = p + r * w.ld + 32 * u;
            __builtin_prefetch(from + NR * w.ld);
            __m256i bits = _mm256_shuffle_epi8(load_as<__m256i>(from), turns), by = s.of(s.by[at + r], u);
            __m256i first = _mm256_and_si256(bits, low), second = _mm256_and_si256(_mm256_srli_epi16(bits, 4), low);
            for (int m = 0; m < MR; m++) {
                const int8_t* xs = x[m].x8 + (k0 / 64 + u) * 96;
                __m256i words = _mm256_maddubs_epi16(first, load_as<__m256i>(xs)), off = load_as<__m256i>(xs + 64);
                words = _mm256_add_epi16(words, _mm256_maddubs_epi16(second, load_as<__m256i>(xs + 32)));
                if constexpr (ZEROS) off = _mm256_mullo_epi16(off, s.of(s.zero[at + r], u));
                words = _mm256_sub_epi16(words, off);
                acc[m][r] = fma8((vint8w)_mm256_madd_epi16(words, by), x[m].scale[k0 / 64 + u], acc[m][r]);
            }
        }
    for (int m = 0; m < MR; m++) {
        float sums[NR] = {};
        add_sums<NR>(acc[m], sums);
        for (int r = 0; r < NR; r++) out[m][at + r] += sums[r] * s.step[at + r];
    }
}
#else
template <int GROUP> struct Scales { void read(const Packed&, long, long, long, long) {} };
#endif

template <int GROUP, int MR, int NR>
static inline void either(const Packed& w, const Scales<GROUP>& scales, long o, long k0, long n, const Narrow* x, float* const* out, long at) {
#if defined(MK_HAS_EIGHT)
    if constexpr (GROUP > 0) {
        if (x->x8 && w.zeros) return chunk8<GROUP, true, MR, NR>(w, scales, o, k0, n, x, out, at);
        if (x->x8) return chunk8<GROUP, false, MR, NR>(w, scales, o, k0, n, x, out, at);
    }
#endif
    chunk<GROUP, MR, NR>(w, o, k0, n, x, out, at);
}

// The same for any number of outputs and up to four rows.
template <int GROUP, int MR>
static void chunk_of(const Packed& w, const Scales<GROUP>& scales, long o, long outputs, long k0, long n, const Narrow* x, float* const* out) {
    constexpr int NR = 4;
    long at = 0;
    for (; at + NR <= outputs; at += NR) either<GROUP, MR, NR>(w, scales, o + at, k0, n, x, out, at);
    for (; at < outputs; at++) either<GROUP, MR, 1>(w, scales, o + at, k0, n, x, out, at);
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
                Scales<GROUP> scales;
                if constexpr (GROUP > 0) if (x->x8) scales.read(w, first + o, count, k, n);
                for (long m = m0, step; m < m1; m += step) {
                    float* at[3];
                    step = tile_rows(m1, m, 3);
                    for (int i = 0; i < step; i++) at[i] = out[m + i] + o;
                    if (step == 1) chunk_of<GROUP, 1>(w, scales, first + o, count, k, n, x + m, at);
                    else if (step == 2) chunk_of<GROUP, 2>(w, scales, first + o, count, k, n, x + m, at);
                    else chunk_of<GROUP, 3>(w, scales, first + o, count, k, n, x + m, at);
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

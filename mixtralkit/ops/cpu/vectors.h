// Vectors of float32 that every compiler with GNU extensions turns into what the machine has: AVX-512, AVX2, NEON, SSE.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int VW = 16;  // numbers of a vector
#else
constexpr int VW = 8;
#endif
typedef float vfloat __attribute__((vector_size(4 * VW)));
typedef uint32_t vuint __attribute__((vector_size(4 * VW)));
typedef int32_t vint __attribute__((vector_size(4 * VW)));
typedef uint16_t vhalf __attribute__((vector_size(2 * VW)));
typedef int8_t vbyte __attribute__((vector_size(VW)));
typedef uint8_t vubyte __attribute__((vector_size(VW)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class V> static inline V load_as(const void* p) { V v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }
static inline vfloat splat(float x) { return vfloat{} + x; }

static inline vfloat fma(vfloat a, vfloat b, vfloat c) {  // said outright: compilers contract a * b + c here and not there
#if defined(__AVX512F__)
    return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    struct halves { float32x4_t low, high; } x, y, z;
    memcpy(&x, &a, sizeof a), memcpy(&y, &b, sizeof b), memcpy(&z, &c, sizeof c);
    z = {vfmaq_f32(z.low, x.low, y.low), vfmaq_f32(z.high, x.high, y.high)};
    memcpy(&c, &z, sizeof c);
    return c;
#else
    return a * b + c;
#endif
}

#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
// acc[i] = fma(x[i], w, acc[i]) for three rows. Said in the machine's words, since sixteen registers hold just what a tile
// of 3 rows and 4 outputs needs, and compilers keep some of its sums in memory.
#define MK_THREE(LOAD, TYPE)                                                                                   \
    static inline void three(const TYPE* w, const vfloat* x, vfloat& a, vfloat& b, vfloat& c) {                \
        vfloat t;                                                                                              \
        struct part { TYPE numbers[VW]; };                                                                     \
        asm(LOAD "vfmadd231ps %[t], %[x0], %[a]\n\tvfmadd231ps %[t], %[x1], %[b]\n\tvfmadd231ps %[t], %[x2], %[c]"  \
            : [a] "+x"(a), [b] "+x"(b), [c] "+x"(c), [t] "=&x"(t)                                              \
            : [x0] "x"(x[0]), [x1] "x"(x[1]), [x2] "x"(x[2]), [w] "m"(*(const part*)w));                       \
    }
MK_THREE("vmovups %[w], %[t]\n\t", float)
MK_THREE("vpmovzxwd %[w], %[t]\n\tvpslld $16, %[t], %[t]\n\t", bf16)
MK_THREE("vcvtph2ps %[w], %[t]\n\t", f16)
#undef MK_THREE
#define MK_HAS_THREE
#endif

// e^x to 2 units of the last place; 0 below -87.
static inline vfloat exponential(vfloat x) {
    const float round = 12582912.f;  // 1.5 · 2^23: what is added to it is rounded to whole numbers
    vint small = x < -87.f;
    x = x > 88.f ? splat(88.f) : small ? splat(-87.f) : x;
    vfloat n = fma(x, splat(1.44269504f), splat(round)) - round;
    vfloat f = fma(n, splat(-0.693359375f), x);
    f = fma(n, splat(2.12194440e-4f), f);
    vfloat p = splat(1.9875691500e-4f);
    const float terms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    for (float term : terms) p = fma(p, f, splat(term));
    p = fma(p * f, f, f) + 1.f;
    vint power = (__builtin_convertvector(n, vint) + 127) << 23;
    return small ? vfloat{} : p * (vfloat)power;
}

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) { uint32_t b = (uint32_t)x.bits << 16; float f; memcpy(&f, &b, 4); return f; }
static inline float to_float(f16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
    __fp16 h; memcpy(&h, &x, 2); return (float)h;
#else
    uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff, b;
    float f;
    if (rest >= 0x7c00) { b = sign | 0x7f800000 | (rest & 0x3ff) << 13; memcpy(&f, &b, 4); return f; }
    if (rest < 0x400) { f = rest * 0x1p-24f; return sign ? -f : f; }
    b = sign | ((rest << 13) + 0x38000000); memcpy(&f, &b, 4); return f;
#endif
}

static inline vfloat load(const float* p) { return load_as<vfloat>(p); }
static inline vfloat load(const bf16* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (vfloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#endif
    return (vfloat)(__builtin_convertvector(load_as<vhalf>(p), vuint) << 16);
}
static inline vfloat load(const f16* p) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    vfloat v;
    for (int i = 0; i < VW; i++) v[i] = to_float(p[i]);
    return v;
#endif
}

// Sums of N vectors. Whatever N, each is ((0+1)+(2+3))+((4+5)+(6+7)), of the halves' sum where vectors have 16 numbers.
template <int N> static inline void sums_of(const vfloat* v, float* to) {
#if defined(__AVX512F__)
    auto eight = [](vfloat a) {
        __m512d d = (__m512d)a;
        return _mm256_add_ps((__m256)_mm512_castpd512_pd256(d), (__m256)_mm512_extractf64x4_pd(d, 1));
    };
#elif defined(__AVX__)
    auto eight = [](vfloat a) { return (__m256)a; };
#endif
    int i = 0;
#if defined(__AVX__)
    for (; i + 4 <= N; i += 4) {
        __m256 pairs = _mm256_hadd_ps(eight(v[i]), eight(v[i + 1])), more = _mm256_hadd_ps(eight(v[i + 2]), eight(v[i + 3]));
        __m256 fours = _mm256_hadd_ps(pairs, more);
        _mm_storeu_ps(to + i, _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1)));
    }
#endif
    for (; i < N; i++) {
        float p[VW];
        memcpy(p, &v[i], sizeof p);
        for (int k = 0; VW == 16 && k < 8; k++) p[k] += p[k + 8 < VW ? k + 8 : 0];
        to[i] = ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]));
    }
}

static inline void from_float(float x, float* p) { *p = x; }
static inline void from_float(float x, bf16* p) {  // to the nearest, ties to even; a NaN stays one
    uint32_t b; memcpy(&b, &x, 4);
    p->bits = x != x ? 0x7fc0 : (uint16_t)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
static inline void from_float(float x, f16* p) {
#if defined(__F16C__)
    p->bits = _cvtss_sh(x, 0);
#elif defined(__aarch64__)
    __fp16 h = (__fp16)x; memcpy(p, &h, 2);
#else
    uint32_t b; memcpy(&b, &x, 4);
    uint32_t sign = b >> 16 & 0x8000, rest = b & 0x7fffffff;
    float y;
    memcpy(&y, &rest, 4);
    if (rest > 0x7f800000) p->bits = sign | 0x7e00;
    else if (rest >= 0x477ff000) p->bits = sign | 0x7c00;
    else if (rest < 0x38800000) {  // below the normal numbers: in units of 2^-24, rounded by the adder
        y += 0.5f; uint32_t c; memcpy(&c, &y, 4); p->bits = sign | (uint16_t)(c - 0x3f000000);
    } else p->bits = sign | (uint16_t)((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
#endif
}

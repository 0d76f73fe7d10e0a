// Products with a weight matrix [outputs, K] as checkpoints store it, summed in float32. See docs/cpu.md.
//
// A result depends on its row and its weights alone, never on how many rows or threads there are: every path sums chunks
// of CHUNK columns in the same order.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "vectors.h"

namespace {

constexpr long CHUNK = 1024;        // columns: 4 rows of weights and 3 of x in float32 fit the first cache
constexpr long PART = CHUNK + 16;   // floats from row to row there, not in the same set of the cache
constexpr long FEW = 24;            // rows up to which converting in registers beats converting into the first cache
constexpr long BLOCK = 48;          // rows of x whose chunk stays in the second cache
constexpr long AHEAD = 1024;        // bytes from what is read to what is asked for
constexpr long OUTPUTS = 32;  // of one piece of work

enum Type { F32, BF16, F16, INT8, INT4 };

struct Weight {
    int type;
    const char* data;
    long ld;  // bytes from one output to the next
};

struct Free { void operator()(void* p) const { free(p); } };
using Floats = std::unique_ptr<float[], Free>;
Floats floats(long count) { return Floats((float*)aligned_alloc(64, (std::max(count, 1L) * 4 + 63) / 64 * 64)); }
long padded(long k) { return (k + 15) / 16 * 16 + (k >= CHUNK ? 16 : 0); }

// Holds a vector in its register: compilers would rather read it from memory again for every use.
inline void hold(vfloat& v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__AVX__)
    asm("" : "+x"(v));
#endif
}

// NR outputs times MR rows, over n columns from k0 of one chunk: out[m][r] += x_m · w_r. FIRST of those that read these
// weights, which are still in memory.
template <int NR, int MR, bool FIRST, class T>
inline void tile(const T* w, long ldw, const float* const* x, long k0, long n, float* const* out) {
    constexpr int LINE = FIRST ? 64 / (VW * (int)sizeof(T)) : 1;  // vectors of a step
    vfloat acc[MR][NR] = {};
    long k = 0;
    auto step = [&](long k) __attribute__((always_inline)) {
        vfloat xv[MR];
        for (int m = 0; m < MR; m++) hold(xv[m] = load(x[m] + k0 + k));
        for (int r = 0; r < NR; r++) {
            vfloat wv = load(w + r * ldw + k);
            for (int m = 0; m < MR; m++) acc[m][r] = fma(xv[m], wv, acc[m][r]);
        }
    };
    for (; LINE > 1 && k + LINE * VW <= n; k += LINE * VW) {
        for (int r = 0; r < NR; r++) __builtin_prefetch((const char*)(w + r * ldw + k) + AHEAD);
#pragma GCC unroll 8
        for (int i = 0; i < LINE; i++) step(k + i * VW);
    }
    for (; k + VW <= n; k += VW) step(k);
    if (k < n) {
        float rest[VW] = {};
        for (int r = 0; r < NR; r++) {
            for (long i = k; i < n; i++) rest[i - k] = to_float(w[r * ldw + i]);
            vfloat wv = load(rest);
            for (int m = 0; m < MR; m++) acc[m][r] = fma(load(x[m] + k0 + k), wv, acc[m][r]);  // x is padded with zeros
        }
    }
    for (int m = 0; m < MR; m++) {
        float part[NR];
        sums<NR>(acc[m], part);
        for (int r = 0; r < NR; r++) out[m][r] += part[r];
    }
}

#if defined(__AVX512F__)
constexpr int MOST = 6;  // rows of a tile of 4 outputs, as many as there are registers for
#else
constexpr int MOST = 3;
#endif

template <int MR, bool FIRST, class T>
inline void tile_of(int count, const T* w, long ldw, const float* const* x, long k0, long n, float* const* out) {
    if (count == 4) return tile<4, MR, FIRST>(w, ldw, x, k0, n, out);
    for (int r = 0; r < count; r++) {
        float* at[MR];
        for (int m = 0; m < MR; m++) at[m] = out[m] + r;
        tile<1, MR, FIRST>(w + r * ldw, ldw, x, k0, n, at);
    }
}

template <bool FIRST, class T>
void tile_of(int rows, int count, const T* w, long ldw, const float* const* x, long k0, long n, float* const* out) {
    switch (rows) {
        case 1: return tile_of<1, FIRST>(count, w, ldw, x, k0, n, out);
        case 2: return tile_of<2, FIRST>(count, w, ldw, x, k0, n, out);
        case 3: return tile_of<3, FIRST>(count, w, ldw, x, k0, n, out);
        case 4: return tile_of<std::min(4, MOST), FIRST>(count, w, ldw, x, k0, n, out);
        case 5: return tile_of<std::min(5, MOST), FIRST>(count, w, ldw, x, k0, n, out);
        default: return tile_of<MOST, FIRST>(count, w, ldw, x, k0, n, out);
    }
}

// Rows of the tile that starts at m: as even as tiles of up to MOST can be.
inline int tile_rows(long rows, long m) { long left = rows - m, tiles = (left + MOST - 1) / MOST; return (int)((left + tiles - 1) / tiles); }

template <class T>
void few(const T* w, long ldw, long outputs, long K, const float* const* x, long rows, float* const* out) {
    float* at[FEW];
    for (long o = 0; o < outputs; o += 4) {
        int count = (int)std::min(4L, outputs - o);
        for (long m = 0; m < rows; m++) std::fill_n(at[m] = out[m] + o, count, 0.f);
        for (long k = 0; k < K; k += CHUNK) {
            const T* from = w + o * ldw + k;
            long n = std::min(CHUNK, K - k);
            int step = tile_rows(rows, 0);
            tile_of<true>(step, count, from, ldw, x, k, n, at);
            for (long m = step; m < rows; m += step) tile_of<false>(step = tile_rows(rows, m), count, from, ldw, x + m, k, n, at + m);
        }
    }
}

template <class T>
void to_floats(const T* w, long ldw, int rows, long n, float* to) {
    for (int r = 0; r < rows; r++, w += ldw, to += PART) {
        long k = 0;
        for (; k + VW <= n; k += VW) store(to + k, load(w + k));
        if (k < n) {
            store(to + k, vfloat{});
            for (; k < n; k++) to[k] = to_float(w[k]);
        }
    }
}

template <class T>
void many(const T* w, long ldw, long outputs, long K, const float* const* x, long rows, float* const* out) {
    alignas(64) float part[4 * PART];
    float* at[BLOCK];
    for (long m = 0; m < rows; m++) std::fill_n(out[m], outputs, 0.f);
    for (long m0 = 0; m0 < rows; m0 += BLOCK) {
        long m1 = std::min(rows, m0 + BLOCK), lines = (CHUNK * sizeof(T) / 64 * MOST + m1 - m0 - 1) / (m1 - m0);
        for (long k = 0; k < K; k += CHUNK) {
            long n = std::min(CHUNK, K - k), whole = (n + VW - 1) / VW * VW;
            for (long o = 0; o < outputs; o += 4) {
                int count = (int)std::min(4L, outputs - o), step;
                const T* from = w + o * ldw + k;
                to_floats(from, ldw, count, n, part);
                const char* ahead = (const char*)(o + 8 <= outputs ? from + 4 * ldw : w + k + CHUNK);
                for (long m = m0; m < m1; m += step, ahead += 64 * lines) {
                    step = tile_rows(m1, m);
                    for (int i = 0; i < step; i++) at[i] = out[m + i] + o;
                    for (int i = 0; i < 4 * lines; i++) __builtin_prefetch(ahead + i % 4 * ldw * sizeof(T) + i / 4 * 64);
                    tile_of<false>(step, count, part, PART, x + m, k, whole, at);
                }
            }
        }
    }
}

template <class T>
void product(const T* w, long ldw, long outputs, long K, const float* const* x, long rows, float* const* out) {
    if (rows <= FEW) few(w, ldw, outputs, K, x, rows, out);
    else many(w, ldw, outputs, K, x, rows, out);
}

// out[m][0 … outputs) = x_m · w_o for outputs `first` and the next ones of the matrix.
void product(const Weight& w, long first, long outputs, long K, const float* const* x, long rows, float* const* out) {
    const char* from = w.data + first * w.ld;
    if (w.type == F32) product((const float*)from, w.ld / 4, outputs, K, x, rows, out);
    else if (w.type == BF16) product((const bf16*)from, w.ld / 2, outputs, K, x, rows, out);
    else product((const f16*)from, w.ld / 2, outputs, K, x, rows, out);
}

template <class T> void read_row(const T* from, long n, float* to) { for (long i = 0; i < n; i++) to[i] = to_float(from[i]); }
void read_row(int type, const char* p, long at, long n, float* to) {
    if (type == F32) read_row((const float*)p + at, n, to);
    else if (type == BF16) read_row((const bf16*)p + at, n, to);
    else read_row((const f16*)p + at, n, to);
}
template <class T> void write_row(const float* from, long n, T* to) { for (long i = 0; i < n; i++) from_float(from[i], to + i); }
void write_row(int type, const float* from, long n, char* p, long at) {
    if (type == F32) write_row(from, n, (float*)p + at);
    else if (type == BF16) write_row(from, n, (bf16*)p + at);
    else write_row(from, n, (f16*)p + at);
}

// Rows in float32, padded with zeros.
struct Rows {
    Floats data;
    std::vector<const float*> at;
    Rows(int threads, int type, const void* x, long rows, long K, long ld) : data(floats(rows * padded(K))), at(rows) {
#pragma omp parallel for num_threads(threads) if (rows > 8)
        for (long m = 0; m < rows; m++) {
            float* to = data.get() + m * padded(K);
            at[m] = to;
            read_row(type, (const char*)x, m * ld, K, to);
            std::fill(to + K, to + padded(K), 0.f);
        }
    }
};

}  // namespace

extern "C" {

// out [M, O] = x [M, K] · wᵀ [+ residual [M, O]]; strides in elements of the tensor's type, w's in bytes.
void mk_linear(int threads, long M, long K, long O, int x_type, const void* x, long x_ld, int w_type, const void* w,
               long w_ld, int residual_type, const void* residual, long residual_ld, int out_type, void* out, long out_ld) {
    Rows rows(threads, x_type, x, M, K, x_ld);
    Weight weight{w_type, (const char*)w, w_ld};
    long pieces = (O + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel num_threads(threads)
    {
        Floats sums = floats(M * OUTPUTS);
        std::vector<float*> at(M);
        for (long m = 0; m < M; m++) at[m] = sums.get() + m * OUTPUTS;
        float other[OUTPUTS];
#pragma omp for schedule(dynamic)
        for (long piece = 0; piece < pieces; piece++) {
            long first = piece * OUTPUTS, n = std::min(OUTPUTS, O - first);
            product(weight, first, n, K, rows.at.data(), M, at.data());
            for (long m = 0; m < M; m++) {
                if (residual) {
                    read_row(residual_type, (const char*)residual, m * residual_ld + first, n, other);
                    for (long i = 0; i < n; i++) at[m][i] += other[i];
                }
                write_row(out_type, at[m], n, (char*)out, m * out_ld + first);
            }
        }
    }
}

// out [R, D] = Σ_k weights · w2 · (silu(w1 · x) * (w3 · x)) [+ residual]; w13 has w1 above w3 of each slot; a slot
// below 0 adds nothing. Every expert that a row chose is read once; a row's choices add up in the order of their slots.
void mk_expert_sum(int threads, long R, long D, long F, long S, long K, int x_type, const void* x, long x_ld,
                   const int64_t* slots, const float* weights, int w13_type, const void* w13, long w13_ld, long w13_slot,
                   int w2_type, const void* w2, long w2_ld, long w2_slot, int residual_type, const void* residual,
                   long residual_ld, int out_type, void* out, long out_ld) {
    Rows rows(threads, x_type, x, R, D, x_ld);
    std::vector<long> start(S + 1);  // choices of slot s are start[s] … start[s + 1] of `row` and `weight`
    for (long i = 0; i < R * K; i++) if (slots[i] >= 0) start[slots[i] + 1]++;
    for (long s = 0; s < S; s++) start[s + 1] += start[s];
    long N = start[S], most = 1;
    std::vector<long> row(N), next(start.begin(), start.end() - 1), touched;
    std::vector<float> weight(N);
    for (long i = 0; i < R * K; i++)
        if (slots[i] >= 0) { long n = next[slots[i]]++; row[n] = i / K; weight[n] = weights[i]; }
    for (long s = 0; s < S; s++)
        if (start[s + 1] > start[s]) { touched.push_back(s); most = std::max(most, start[s + 1] - start[s]); }
    Floats hidden = floats(N * padded(F));  // silu(w1 · x) * (w3 · x) of every choice
    std::vector<const float*> x_at(N), h_at(N);
    for (long n = 0; n < N; n++) x_at[n] = rows.at[row[n]], h_at[n] = hidden.get() + n * padded(F);
    long pieces = (F + OUTPUTS - 1) / OUTPUTS, pieces2 = (D + OUTPUTS - 1) / OUTPUTS, experts = (long)touched.size();
#pragma omp parallel num_threads(threads)
    {
        Floats sums = floats(std::max(2 * most, most + R) * OUTPUTS);
        std::vector<float*> at(2 * most);
        for (long m = 0; m < 2 * most; m++) at[m] = sums.get() + m * OUTPUTS;
#pragma omp for schedule(dynamic)
        for (long work = 0; work < experts * pieces; work++) {
            long s = touched[work / pieces], first = work % pieces * OUTPUTS, n = std::min(OUTPUTS, F - first);
            long count = start[s + 1] - start[s];
            Weight w{w13_type, (const char*)w13 + s * w13_slot, w13_ld};
            product(w, first, n, D, &x_at[start[s]], count, &at[0]);
            product(w, F + first, n, D, &x_at[start[s]], count, &at[count]);
            for (long m = 0; m < count; m++) {
                float* to = (float*)h_at[start[s] + m] + first;
                for (long i = 0; i < n; i++) to[i] = at[m][i] / (1.f + std::exp(-at[m][i])) * at[count + m][i];
                if (first + n == F) std::fill(to + n, to + n + (padded(F) - F), 0.f);
            }
        }
        float* total = sums.get() + most * OUTPUTS;
        float other[OUTPUTS];
#pragma omp for schedule(dynamic)
        for (long piece = 0; piece < pieces2; piece++) {
            long first = piece * OUTPUTS, n = std::min(OUTPUTS, D - first);
            std::fill_n(total, R * OUTPUTS, 0.f);
            for (long s : touched) {
                long count = start[s + 1] - start[s];
                Weight w{w2_type, (const char*)w2 + s * w2_slot, w2_ld};
                product(w, first, n, F, &h_at[start[s]], count, &at[0]);
                for (long m = 0; m < count; m++) {
                    float* to = total + row[start[s] + m] * OUTPUTS;
                    for (long i = 0; i < n; i++) to[i] += weight[start[s] + m] * at[m][i];
                }
            }
            for (long m = 0; m < R; m++) {
                float* y = total + m * OUTPUTS;
                if (residual) {
                    read_row(residual_type, (const char*)residual, m * residual_ld + first, n, other);
                    for (long i = 0; i < n; i++) y[i] += other[i];
                }
                write_row(out_type, y, n, (char*)out, m * out_ld + first);
            }
        }
    }
}

// Sum of `count` float32 numbers by all threads: what the memory gives at most.
float mk_read(int threads, const float* x, long count) {
    double total = 0;
    long pieces = (count + 65535) / 65536;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(+ : total)
    for (long piece = 0; piece < pieces; piece++) {
        vfloat acc[8] = {};
        long k = piece * 65536, end = std::min(count, k + 65536);
        for (; k + 8 * VW <= end; k += 8 * VW)
            for (int i = 0; i < 8; i++) acc[i] += load(x + k + i * VW);
        for (int i = 0; i < 8; i++) { float one; sums<1>(acc + i, &one); total += one; }
    }
    return (float)total;
}
}

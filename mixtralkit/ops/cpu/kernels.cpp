// Products with a weight matrix [outputs, K] as checkpoints store it, summed in float32. See docs/cpu.md.
//
// A result depends on its row and its weights alone, never on how many rows or threads there are: every path sums chunks
// of CHUNK columns in the same order.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "attention.h"
#include "quantised.h"
#include "rows.h"
#include "vectors.h"

// Matrices [slots, outputs, K]; distances in bytes. Types above F16 are in quantised.h.
struct mk_weight {
    int type;
    long group;
    const char* data;
    long ld, slot;
    const char* scales;
    long scales_slot;
    const char* zeros;
    long zeros_slot;
};

namespace {

constexpr long CHUNK = 1024;        // columns: 4 rows of weights and 3 of x in float32 fit the first cache
constexpr long PART = CHUNK + 16;   // floats from row to row there, not in the same set of the cache
constexpr long FEW = 16;            // rows up to which converting in registers beats converting into the first cache
constexpr long BLOCK = 64;          // rows of x whose chunk stays in the second cache
constexpr long AHEAD = 512;           // bytes from what is read to what is asked for
constexpr long OUTPUTS = 128;       // of one piece of work at most: between pieces nothing has been asked for

long padded(long k) { return (k + 15) / 16 * 16 + (k >= CHUNK ? 16 : 0); }

// Holds a vector in its register: compilers would rather read it from memory again for every use.
inline void hold(vfloat& v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__AVX__)
    asm("" : "+x"(v));
#endif
}

#if defined(MK_HAS_THREE)
// The whole vectors of `tile<4, 3, FIRST>`, with its sums in variables of their own, which stay in registers.
template <bool FIRST, class T>
inline long tile_3x4(const T* w, long ldw, const float* const* x, long k0, long n, vfloat (&acc)[3][4], long turn, long jump) {
    vfloat a0{}, a1{}, a2{}, a3{}, b0{}, b1{}, b2{}, b3{}, c0{}, c1{}, c2{}, c3{};
    const float *x0 = x[0] + k0, *x1 = x[1] + k0, *x2 = x[2] + k0;
    const T *w0 = w, *w1 = w + ldw, *w2 = w + 2 * ldw, *w3 = w + 3 * ldw;
    long k = 0;
    for (; k + VW <= n; k += VW) {
        if (FIRST && k * (long)sizeof(T) % 64 == 0) {
            long ahead = AHEAD + (k * (long)sizeof(T) >= turn ? jump : 0);
            for (const T* p : {w0, w1, w2, w3}) __builtin_prefetch((const char*)(p + k) + ahead);
        }
        vfloat xv[3] = {load(x0 + k), load(x1 + k), load(x2 + k)};
        three(w0 + k, xv, a0, b0, c0);
        three(w1 + k, xv, a1, b1, c1);
        three(w2 + k, xv, a2, b2, c2);
        three(w3 + k, xv, a3, b3, c3);
    }
    vfloat found[3][4] = {{a0, a1, a2, a3}, {b0, b1, b2, b3}, {c0, c1, c2, c3}};
    memcpy(acc, found, sizeof found);
    return k;
}
#endif

// NR outputs times MR rows, over n columns from k0 of one chunk: out[m][r] += x_m · w_r. FIRST of those that read these
// weights, which are still in memory: what is AHEAD of them is asked for, from byte `turn` on by `jump` further.
template <int NR, int MR, bool FIRST, class T>
inline void tile(const T* w, long ldw, const float* const* x, long k0, long n, float* const* out, long turn = 1L << 40,
                 long jump = 0) {
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
#if defined(MK_HAS_THREE)
    if constexpr (MR == 3 && NR == 4) k = tile_3x4<FIRST>(w, ldw, x, k0, n, acc, turn, jump);
#endif
    for (; LINE > 1 && k + LINE * VW <= n; k += LINE * VW) {
        long ahead = AHEAD + (k * (long)sizeof(T) >= turn ? jump : 0);
        for (int r = 0; r < NR; r++) __builtin_prefetch((const char*)(w + r * ldw + k) + ahead);
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
        sums_of<NR>(acc[m], part);
        for (int r = 0; r < NR; r++) out[m][r] += part[r];
    }
}

#if defined(__AVX512F__)
constexpr int MOST = 6;  // rows of a tile of 4 outputs, as many as there are registers for
#else
constexpr int MOST = 3;
#endif

template <int MR, bool FIRST, class T>
inline void tile_of(int count, const T* w, long ldw, const float* const* x, long k0, long n, float* const* out, long turn,
                    long jump) {
    if (count == 4 && MR <= MOST) return tile<4, MR, FIRST>(w, ldw, x, k0, n, out, turn, jump);
    if (count == 4) {
        float* at[MR];
        for (int m = 0; m < MR; m++) at[m] = out[m] + 2;
        tile<2, MR, FIRST>(w, ldw, x, k0, n, out, turn, jump);
        return tile<2, MR, FIRST>(w + 2 * ldw, ldw, x, k0, n, at, turn, jump);
    }
    for (int r = 0; r < count; r++) {
        float* at[MR];
        for (int m = 0; m < MR; m++) at[m] = out[m] + r;
        tile<1, MR, FIRST>(w + r * ldw, ldw, x, k0, n, at);
    }
}

template <bool FIRST, class T>
void tile_of(int rows, int count, const T* w, long ldw, const float* const* x, long k0, long n, float* const* out,
             long turn = 1L << 40, long jump = 0) {
    switch (rows) {
        case 1: return tile_of<1, FIRST>(count, w, ldw, x, k0, n, out, turn, jump);
        case 2: return tile_of<2, FIRST>(count, w, ldw, x, k0, n, out, turn, jump);
        case 3: return tile_of<3, FIRST>(count, w, ldw, x, k0, n, out, turn, jump);
        case 4: return tile_of<4, FIRST>(count, w, ldw, x, k0, n, out, turn, jump);
        case 5: return tile_of<std::min(5, MOST), FIRST>(count, w, ldw, x, k0, n, out, turn, jump);
        default: return tile_of<MOST, FIRST>(count, w, ldw, x, k0, n, out, turn, jump);
    }
}

template <class T>
void few(const T* w, long ldw, long outputs, long K, const float* const* x, long rows, float* const* out) {
    float* at[FEW];
    const int most = rows <= 4 ? std::max(MOST, 4) : MOST;  // four rows take tiles of 2 outputs, which read the weights once
    for (long o = 0; o < outputs; o += 4) {
        int count = (int)std::min(4L, outputs - o);
        for (long m = 0; m < rows; m++) std::fill_n(at[m] = out[m] + o, count, 0.f);
        for (long k = 0; k < K; k += CHUNK) {
            const T* from = w + o * ldw + k;
            long n = std::min(CHUNK, K - k);
            int step = tile_rows(rows, 0, most);
            long turn = (K - k) * (long)sizeof(T) - AHEAD, jump = (4 * ldw - K) * (long)sizeof(T);  // to the next outputs
            tile_of<true>(step, count, from, ldw, x, k, n, at, turn, jump);
            for (long m = step; m < rows; m += step) tile_of<false>(step = tile_rows(rows, m, most), count, from, ldw, x + m, k, n, at + m);
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

// `convert(o, count, k, n, part)` writes columns k … k + n of `count` outputs from o, `ahead(o, k)` is where they lie.
template <class Convert, class Ahead>
void many(Convert convert, Ahead ahead, long row_bytes, long bytes, long outputs, long K, const float* const* x, long rows,
          float* const* out) {
    alignas(64) float part[4 * PART];
    float* at[MOST];
    for (long m = 0; m < rows; m++) std::fill_n(out[m], outputs, 0.f);
    for (long m0 = 0; m0 < rows; m0 += BLOCK) {
        long m1 = std::min(rows, m0 + BLOCK), lines = (bytes / 64 * MOST + m1 - m0 - 1) / (m1 - m0);
        for (long k = 0; k < K; k += CHUNK) {
            long n = std::min(CHUNK, K - k), whole = (n + VW - 1) / VW * VW;
            for (long o = 0; o < outputs; o += 4) {
                int count = (int)std::min(4L, outputs - o), step;
                convert(o, count, k, n, part);
                const char* next = o + 8 <= outputs ? ahead(o + 4, k) : ahead(0, k + CHUNK);
                for (long m = m0; m < m1; m += step, next += 64 * lines) {
                    step = tile_rows(m1, m, MOST);
                    for (int i = 0; i < step; i++) at[i] = out[m + i] + o;
                    for (int i = 0; i < 4 * lines; i++) __builtin_prefetch(next + i % 4 * row_bytes + i / 4 * 64);
                    tile_of<false>(step, count, part, PART, x + m, k, whole, at);
                }
            }
        }
    }
}

template <class T>
void product(const T* w, long ld, long outputs, long K, const float* const* x, long rows, float* const* out) {
    if (rows <= FEW) return few(w, ld / (long)sizeof(T), outputs, K, x, rows, out);
    auto at = [=](long o, long k) { return (const char*)(w + k) + o * ld; };
    auto convert = [=](long o, int count, long k, long n, float* to) {
        to_floats((const T*)at(o, k), ld / (long)sizeof(T), count, n, to);
    };
    many(convert, at, ld, CHUNK * sizeof(T), outputs, K, x, rows, out);
}

bool is_packed(const mk_weight& w) { return w.type >= INT8; }
long unit(const mk_weight& w) { return w.type == INT8 ? X_GROUP : std::max(64L, w.group); }  // of columns
long columns(const mk_weight& w, long K) { return is_packed(w) ? (K + unit(w) - 1) / unit(w) * unit(w) : K; }

// out[m][0 … outputs) = x_m · w_o for outputs `first` and the next ones of a slot, over the first `last` of K columns.
// `narrow` is x in 16 bits, for packed weights.
void product(const mk_weight& w, long slot, long first, long outputs, long K, long last, const float* const* x,
             const Narrow* narrow, long rows, float* const* out) {
    const char* from = w.data + slot * w.slot + first * w.ld;
    if (w.type == F32) return product((const float*)from, w.ld, outputs, last, x, rows, out);
    if (w.type == BF16) return product((const bf16*)from, w.ld, outputs, last, x, rows, out);
    if (w.type == F16) return product((const f16*)from, w.ld, outputs, last, x, rows, out);
    const uint8_t* zeros = w.zeros ? (const uint8_t*)w.zeros + slot * w.zeros_slot : nullptr;
    Packed packed{w.data + slot * w.slot, w.ld, w.scales + slot * w.scales_slot, zeros, w.type == INT8 ? 0 : w.group, columns(w, K)};
    product_packed(packed, first, outputs, columns(w, last), narrow, rows, out);
}

// Rows in float32, padded with zeros to what weights of K columns may want, and in 16 bits where those want that, or in 8
// beside INT4 in runs of half precision.
struct Rows {
    long count, K, whole, group;
    bool eight;
    int times;
    Floats data, scales;
    std::unique_ptr<int16_t[]> numbers;
    std::vector<const float*> at;
    std::vector<Narrow> narrow_at;

    Rows(long count, long K, const mk_weight& w, int type)
        : count(count), K(K), whole(columns(w, K)), group(w.type == INT4 ? w.group : X_GROUP),
          eight(HAS_EIGHT && w.type == INT4 && type != F32), times(w.zeros ? 1 : 8),
          data(floats(count * padded(whole))), at(count), narrow_at(count) {
        for (long m = 0; m < count; m++) at[m] = data.get() + m * padded(whole);
        if (!is_packed(w)) return;
        numbers.reset(new int16_t[count * whole]);
        scales = floats(2 * count * (whole / std::min(group, X_GROUP)));
    }
    float* row(long m) { return (float*)at[m]; }
    void finish(long m) {
        std::fill(row(m) + K, row(m) + padded(whole), 0.f);
        if (!numbers) return;
        long groups = whole / std::min(group, X_GROUP);
        int16_t* to = numbers.get() + m * whole;
        float *scale = scales.get() + 2 * m * groups, *sum = scale + groups;
        narrow_at[m] = {to, eight ? (int8_t*)to : nullptr, scale, sum};
        if (eight) narrow8(row(m), K, whole, times, (int8_t*)to, scale);
        else narrow(row(m), K, whole, group, to, scale, sum);
    }
};

// Outputs of a piece of work, so that every thread gets several.
long piece_of(long outputs, int threads) { return outputs / OUTPUTS >= 8 * threads ? OUTPUTS : OUTPUTS / 4; }

// y += residual, rounded and written to outputs `first` … of row m.
void write(float* y, long m, long first, long n, const mk_rows& residual, const mk_rows& out) {
    float other[OUTPUTS];
    if (residual.data) {
        read_row(residual.type, (const char*)residual.data, m * residual.ld + first, n, other);
        for (long i = 0; i < n; i++) y[i] += other[i];
    }
    write_row(out.type, y, n, (char*)out.data, m * out.ld + first);
}

}  // namespace

extern "C" {

// out [M, O] = norm(x) [M, K] · wᵀ [+ residual [M, O]].
void mk_linear(int threads, long M, long K, long O, const mk_rows* x, const mk_norm* norm, const mk_weight* w,
               const mk_rows* residual, const mk_rows* out) {
    Rows rows(M, K, *w, x->type);
    long size = piece_of(O, threads), pieces = (O + size - 1) / size;
#pragma omp parallel num_threads(threads)
    {
        Floats sums = floats(M * OUTPUTS);
        std::vector<float*> at(M);
        for (long m = 0; m < M; m++) at[m] = sums.get() + m * OUTPUTS;
#pragma omp for
        for (long m = 0; m < M; m++) {
            read_normed(*x, *norm, m, K, rows.row(m));
            rows.finish(m);
        }
#pragma omp for schedule(dynamic)
        for (long piece = 0; piece < pieces; piece++) {
            long first = piece * size, n = std::min(size, O - first);
            product(*w, 0, first, n, K, K, rows.at.data(), rows.narrow_at.data(), M, at.data());
            for (long m = 0; m < M; m++) write(at[m], m, first, n, *residual, *out);
        }
    }
}

// normed [M, K] = norm(x), logits [M, E] = normed · wᵀ in float32, experts [M, top] the largest and weights their softmax.
void mk_gate(int threads, long M, long K, long E, long top, const mk_rows* x, const mk_norm* norm, const mk_weight* w,
             const mk_rows* normed, float* logits, int64_t* experts, float* weights) {
    Rows rows(M, K, *w, x->type);
#pragma omp parallel for num_threads(std::min<long>(threads, M)) if (M > 1)
    for (long m = 0; m < M; m++) {
        read_normed(*x, *norm, m, K, rows.row(m));
        rows.finish(m);
        write_row(normed->type, rows.row(m), K, (char*)normed->data, m * normed->ld);
        float* out = logits + m * E;
        product(*w, 0, 0, E, K, K, &rows.at[m], &rows.narrow_at[m], 1, &out);
        choose(out, E, top, experts + m * top, weights + m * top);
    }
}

// Largest logit of each row [M, V], its token and log Σ e^logit.
void mk_best(int threads, long M, long V, const float* logits, long ld, int64_t* tokens, float* values, float* logsumexp) {
#pragma omp parallel for num_threads(std::min<long>(threads, M)) if (M > 1)
    for (long m = 0; m < M; m++) best_of(logits + m * ld, V, tokens + m, values + m, logsumexp + m);
}

// out [R, D] = Σ_k weights · w2 · (silu(w1 · x) * (w3 · x)) [+ residual]; w13 has w1 above w3 of each slot; a slot
// below 0 adds nothing. Every expert that a row chose is read once; a row's choices add up in their order. Of the F
// columns of w2, and rows of w1 and w3, the first `last` count.
void mk_expert_sum(int threads, long R, long D, long F, long last, long S, long K, const mk_rows* x,
                   const int64_t* slots, const float* weights, const mk_weight* w13, const mk_weight* w2,
                   const mk_rows* residual, const mk_rows* out) {
    std::vector<long> start(S + 1);  // choices of slot s are start[s] … start[s + 1], choice i is number place[i]
    for (long i = 0; i < R * K; i++)
        if (slots[i] >= 0) start[slots[i] + 1]++;
    for (long s = 0; s < S; s++) start[s + 1] += start[s];
    long N = start[S], most = 1;
    std::vector<long> place(R * K, -1), next(start.begin(), start.end() - 1), touched;
    for (long i = 0; i < R * K; i++)
        if (slots[i] >= 0) place[i] = next[slots[i]]++;
    for (long s = 0; s < S; s++)
        if (start[s + 1] > start[s]) touched.push_back(s), most = std::max(most, start[s + 1] - start[s]);
    Rows rows(R, D, *w13, x->type), hidden(N, last, *w2, x->type);  // hidden is silu(w1 · x) * (w3 · x) of every choice
    std::vector<const float*> x_at(N);
    std::vector<Narrow> narrow_at(N);
    long experts = (long)touched.size(), size = piece_of(experts * last, threads), size2 = piece_of(D, threads);
    long pieces = (last + size - 1) / size, pieces2 = (D + size2 - 1) / size2;
#pragma omp parallel num_threads(threads)
    {
        Floats sums = floats(std::max(2 * most, N) * OUTPUTS);
        std::vector<float*> at(std::max(2 * most, N));
        for (long m = 0; m < (long)at.size(); m++) at[m] = sums.get() + m * OUTPUTS;
#pragma omp for
        for (long m = 0; m < R; m++) {
            read_row(x->type, (const char*)x->data, m * x->ld, D, rows.row(m));
            rows.finish(m);
        }
#pragma omp for
        for (long i = 0; i < R * K; i++)
            if (place[i] >= 0) x_at[place[i]] = rows.at[i / K], narrow_at[place[i]] = rows.narrow_at[i / K];
#pragma omp for schedule(dynamic)
        for (long work = 0; work < experts * pieces; work++) {
            long s = touched[work / pieces], first = work % pieces * size, n = std::min(size, last - first);
            long i0 = start[s], count = start[s + 1] - i0;
            product(*w13, s, first, n, D, D, &x_at[i0], &narrow_at[i0], count, &at[0]);
            product(*w13, s, F + first, n, D, D, &x_at[i0], &narrow_at[i0], count, &at[count]);
            for (long m = 0; m < count; m++) {
                float* to = hidden.row(i0 + m) + first;
                for (long i = 0; i < n; i += VW) {
                    vfloat gate = load(at[m] + i), y = gate / (exponential(-gate) + 1.f) * load(at[count + m] + i);
                    memcpy(to + i, &y, std::min<long>(VW, n - i) * 4);
                }
            }
        }
#pragma omp for
        for (long n = 0; n < N; n++) hidden.finish(n);
        float y[OUTPUTS];
#pragma omp for schedule(dynamic)
        for (long piece = 0; piece < pieces2; piece++) {
            long first = piece * size2, n = std::min(size2, D - first);
            for (long s : touched) {
                long i0 = start[s], count = start[s + 1] - i0;
                product(*w2, s, first, n, F, last, &hidden.at[i0], &hidden.narrow_at[i0], count, &at[i0]);
            }
            for (long m = 0; m < R; m++) {
                std::fill_n(y, OUTPUTS, 0.f);
                for (long k = m * K; k < (m + 1) * K; k++)
                    for (long i = 0; place[k] >= 0 && i < n; i++) y[i] += weights[k] * at[place[k]][i];
                write(y, m, first, n, *residual, *out);
            }
        }
    }
}

// Turns queries and keys of qkv [T, H + 2 J heads, C] by `rope` [positions, C / 2, 2]; queries go to out [T, H, C], keys and
// values to the cache of their slots unless those are below 0. The cache as in `mk_attention`, of qkv's type.
void mk_rotate_and_store(int threads, long T, long H, long J, long C, const mk_rows* qkv, const float* rope, void* keys,
                         void* values, long page, long head, long row, long P, const int32_t* tables, long M,
                         const int64_t* slots, const int64_t* positions, const mk_rows* out) {
#pragma omp parallel for num_threads(std::min<long>(threads, T)) if (T > 1)
    for (long t = 0; t < T; t++) {
        Floats x = floats(C);
        long there = 0;
        if (slots[t] >= 0) there = Pages{tables + slots[t] * M, P, page, row}.at(positions[t]);
        for (long h = 0; h < H + 2 * J; h++) {
            if (h >= H && slots[t] < 0) break;
            read_row(qkv->type, (const char*)qkv->data, t * qkv->ld + h * C, C, x.get());
            if (h < H + J) turn(x.get(), rope + positions[t] * C, C);
            if (h < H) write_row(out->type, x.get(), C, (char*)out->data, t * out->ld + h * C);
            else if (h < H + J) write_row(qkv->type, x.get(), C, (char*)keys, there + (h - H) * head);
            else write_row(qkv->type, x.get(), C, (char*)values, there + (h - H - J) * head);
        }
    }
}

// Softmax attention of T queries [H, C] to the keys of their slots up to their positions; slots below 0 give zeros.
// Keys and values are [pages, J, P, C], distances in numbers; `tables` [slots, M] has the pages of each slot.
// `window` keys, its own included; 0 for all.
void mk_attention(int threads, long T, long H, long J, long C, const mk_rows* q, int type, const void* keys,
                  const void* values, long page, long head, long row, long P, const int32_t* tables, long M,
                  const int64_t* slots, const int64_t* positions, long window, const mk_rows* out) {
    long G = H / J, wide = (C + VW - 1) / VW * VW;
#pragma omp parallel num_threads(threads)
    {
        Floats query = floats(G * wide), sums = floats(G * wide);
#pragma omp for schedule(dynamic)
        for (long item = 0; item < J * T; item++) {
            long j = item / T, t = item % T;
            std::fill_n(sums.get(), G * wide, 0.f);
            if (slots[t] >= 0) {
                std::fill_n(query.get(), G * wide, 0.f);
                for (long g = 0; g < G; g++)
                    read_row(q->type, (const char*)q->data, t * q->ld + (j * G + g) * C, C, query.get() + g * wide);
                long first = window ? std::max(0L, positions[t] + 1 - window) : 0;
                long from = j * head;
                Pages pages{tables + slots[t] * M, P, page, row};
                if (type == F32) attend((const float*)keys + from, (const float*)values + from, pages, first, positions[t], G, C, query.get(), sums.get());
                else if (type == BF16) attend((const bf16*)keys + from, (const bf16*)values + from, pages, first, positions[t], G, C, query.get(), sums.get());
                else attend((const f16*)keys + from, (const f16*)values + from, pages, first, positions[t], G, C, query.get(), sums.get());
            }
            for (long g = 0; g < G; g++)
                write_row(out->type, sums.get() + g * wide, C, (char*)out->data, t * out->ld + (j * G + g) * C);
        }
    }
}

// Sum of `count` float32 numbers, but for a last few, by all threads: what the memory gives at most.
float mk_read(int threads, const float* x, long count) {
    double total = 0;
    long pieces = (count + 65535) / 65536;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(+ : total)
    for (long piece = 0; piece < pieces; piece++) {
        vfloat acc[8] = {};  // of four streams, as a product reads four outputs
        long first = piece * 65536, stream = std::min(count - first, 65536L) / 4;
        for (long k = 0; k + 2 * VW <= stream; k += 2 * VW)
            for (int i = 0; i < 8; i++) {
                const float* from = x + first + i / 2 * stream + k + i % 2 * VW;
                __builtin_prefetch((const char*)from + AHEAD);
                acc[i] += load(from);
            }
        for (int i = 0; i < 8; i++) { float one; sums_of<1>(acc + i, &one); total += one; }
    }
    return (float)total;
}
}

/* Blocks of x^T and grad_y^T in bf16, two neighbouring tokens to a number of 32 bits, and their dot products by vdpbf16ps.
 *
 * Nothing is lost where x and grad_y are bf16: products are exact in fp32, in which they are summed. A block holds twice the tokens
 * in the same memory, there are half as many numbers to turn, and a quarter of the instructions multiply.
 */
#pragma once
#include "native_turn.h"

#if defined(__AVX512BF16__) && LANES == 16
#include <immintrin.h>

/* Whether both are bf16 (x after its last factor), so that pairs hold them as they are. */
static inline int in_pairs(const factor *x, int n, const factor *grad) { return x[n - 1].round == BF16 && grad->dtype == BF16; }

static inline vec pair_of(bits low, bits high) {
    vec pair;
    bits both = low | high << 16;
    memcpy(&pair, &both, sizeof pair);
    return pair;
}

static inline bits half_at(const void *data, int64_t at) {
    halves half;
    __builtin_prefetch((const uint16_t *)data + at + NEXT);
    memcpy(&half, (const uint16_t *)data + at, sizeof half);
    return __builtin_convertvector(half, bits);
}

/* LANES columns from `base` on: pair[i] holds tokens t + 2i and t + 2i + 1, or `last` where they come after it. */
static inline void pairs_at(const factor *factors, int n, int64_t t, int64_t last, int64_t base, vec *pair) {
    if (n == 1 && factors->dtype == BF16 && factors->col == 1) {
        for (int i = 0; i < LANES; i++) {
            int64_t at = t + 2 * i, low = at < last ? at : last, high = at + 1 < last ? at + 1 : last;
            pair[i] = pair_of(half_at(factors->data, low * factors->row + base), half_at(factors->data, high * factors->row + base));
        }
        return;
    }
    vec low[LANES], high[LANES];
    product_at(factors, n, t, 2, last, base, low);
    product_at(factors, n, t + 1, 2, last, base, high);
    for (int i = 0; i < LANES; i++) {
        bits a, b;
        memcpy(&a, low + i, sizeof a);
        memcpy(&b, high + i, sizeof b);
        pair[i] = pair_of(a >> 16, b >> 16);
    }
}

/* The same for one column, so that a layer may be narrower than LANES. */
static inline void pairs_of_one(const factor *factors, int n, int64_t t, int64_t last, int64_t column, vec *pair) {
    bits low, high;
    for (int i = 0; i < LANES; i++) {
        int64_t at = t + 2 * i;
        float a = one(factors, n, at < last ? at : last, column), b = one(factors, n, at + 1 < last ? at + 1 : last, column);
        uint32_t raw[2];
        memcpy(raw, &a, 4);
        memcpy(raw + 1, &b, 4);
        low[i] = raw[0] >> 16, high[i] = raw[1] >> 16;
    }
    *pair = pair_of(low, high);
}

/* out[c * STRIDE + u] = the products of the factors at the tokens start + 2u, start + 2u + 1 of columns[c]; zero from `count` on. */
static inline void transpose_pairs(const factor *factors, int n, int64_t start, int count, const int32_t *columns, int64_t wide,
                                   int64_t width, float *out) {
    int64_t last = start + count - 1;
    for (int t = 0; t < count; t += 2 * LANES)
        for (int64_t c = 0, next = 0; c < wide; c = next) {
            vec pair[LANES];
            int64_t base = columns[c] < width - LANES ? columns[c] : width - LANES;
            if (width < LANES) {
                pairs_of_one(factors, n, start + t, last, base = columns[c], pair);
                memcpy(out + c * STRIDE + t / 2, pair, sizeof(vec));
                next = c + 1;
                continue;
            }
            pairs_at(factors, n, start + t, last, base, pair);
            turn(pair);
            for (next = c; next < wide && columns[next] < base + LANES; next++)
                memcpy(out + next * STRIDE + t / 2, pair + (columns[next] - base), sizeof(vec));
        }
    for (int64_t c = 0; count < 2 * TOKENS && c < wide; c++) {
        char *row = (char *)(out + c * STRIDE);
        memset(row + 2 * count, 0, 4 * TOKENS - 2 * count);
    }
}

static inline __m512 dot(__m512 sum, const float *a, const float *b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_ps(a), (__m512bh)_mm512_loadu_ps(b));
}

/* out[k] += grad . x[place[k]] for the entries of one row, as row_entries. */
static inline void row_pairs(const float *grad, const float *x, const int32_t *place, int64_t count, float *out) {
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
        __m512 sums[4];
        for (int i = 0; i < 4; i++) sums[i] = _mm512_setzero_ps();
        for (int u = 0; u < TOKENS; u += LANES)
            for (int i = 0; i < 4; i++) sums[i] = dot(sums[i], grad + u, x + (int64_t)place[k + i] * STRIDE + u);
        add_sums(narrow((vec)sums[0]), narrow((vec)sums[1]), narrow((vec)sums[2]), narrow((vec)sums[3]), out + k);
    }
    for (; k < count; k++) {
        __m512 a = _mm512_setzero_ps(), b = a;
        for (int u = 0; u < TOKENS; u += 2 * LANES) {
            a = dot(a, grad + u, x + (int64_t)place[k] * STRIDE + u);
            b = dot(b, grad + u + LANES, x + (int64_t)place[k] * STRIDE + u + LANES);
        }
        out[k] += sum8(narrow((vec)a + (vec)b));
    }
}
#else /* never asked: in_pairs says no */
static inline int in_pairs(const factor *x, int n, const factor *grad) { return (void)x, (void)n, (void)grad, 0; }
#define transpose_pairs transpose
#define row_pairs row_entries
#endif

/* Blocks of x^T and grad_y^T in bf16, two neighbouring tokens to a number of 32 bits, and their dot products by vdpbf16ps.
 *
 * Nothing is lost where x and grad_y are bf16: products are exact in fp32, in which they are summed. A block holds twice the tokens
 * in the same memory. Tiles are GROUP tokens of WIDE columns: sixteen bytes of each token go to a quarter of a register while they
 * are read, so that only shuffles within quarters remain.
 */
#pragma once
#include "native_turn.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && LANES == 16
#include <immintrin.h>

#define GROUP 32  /* tokens of a tile, a register of bf16 for each column */
#define FACTORS 4 /* most factors of an input in pairs */

/* Whether both are bf16 (x after its last factor), so that pairs hold them as they are. */
static inline int in_pairs(const factor *x, int n, const factor *grad) {
    return x[n - 1].round == BF16 && grad->dtype == BF16 && n <= FACTORS;
}

/* Numbers of a column that a block of so many tokens fills. */
static inline int numbers_of(int count) { return (count + GROUP - 1) / GROUP * LANES; }

/* A factor at the tokens of a tile: where each begins, and the tokens' numbers if all columns have the same (see two_rows). */
typedef struct {
    const char *row[GROUP];
    __m512 same[LANES];
} tokens_of;

/* The token in the lower or upper half of the i-th of 16 registers, so that columns_of finds them in order. */
#define TOKEN(i, upper) ((i) / 2 + 16 * ((i) % 2) + 8 * (upper))

/* The cache line after the one that is read here: tiles follow each other, in more streams than processors follow themselves. */
static inline void fetch(const void *data) { __builtin_prefetch((const char *)data + 64); }

static inline __m512 halves_of(__m256 lower, __m256 upper) { return _mm512_insertf32x8(_mm512_castps256_ps512(lower), upper, 1); }

/* The tokens from t on; `last` stands for those after it. */
static inline void tokens_at(const factor *f, int64_t t, int64_t last, tokens_of *at) {
    int64_t size = f->dtype == F32 ? 4 : 2;
    for (int i = 0; i < GROUP; i++) at->row[i] = (const char *)f->data + (t + i < last ? t + i : last) * f->row * size;
    for (int i = 0; f->col == 0 && i < LANES; i++) {
        float lower = load(at->row[TOKEN(i, 0)], 0, f->dtype), upper = load(at->row[TOKEN(i, 1)], 0, f->dtype);
        at->same[i] = halves_of(_mm256_set1_ps(lower), _mm256_set1_ps(upper));
    }
}

/* Twice eight numbers of bf16 as fp32. */
static inline __m512 widened(const char *lower, const char *upper) {
    const __m512i places = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
    __m256i both = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)lower));
    both = _mm256_inserti128_si256(both, _mm_loadu_si128((const __m128i *)upper), 1);
    return (__m512)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places, _mm512_castsi256_si512(both));
}

/* WIDE columns of a factor from `base` on as fp32, two tokens to a register. */
static inline void two_rows(const factor *f, const tokens_of *at, int64_t base, __m512 *out) {
    if (f->col == 0) {
        memcpy(out, at->same, sizeof at->same);
    } else if (f->col == 1 && f->dtype == BF16) {
        for (int i = 0; i < LANES; i++) {
            const char *lower = at->row[TOKEN(i, 0)] + 2 * base, *upper = at->row[TOKEN(i, 1)] + 2 * base;
            fetch(lower), fetch(upper);
            out[i] = widened(lower, upper);
        }
    } else if (f->col == 1) {
        for (int i = 0; i < LANES; i++) {
            const float *lower = (const float *)at->row[TOKEN(i, 0)] + base, *upper = (const float *)at->row[TOKEN(i, 1)] + base;
            fetch(lower), fetch(upper);
            out[i] = halves_of(_mm256_loadu_ps(lower), _mm256_loadu_ps(upper));
        }
    } else {
        for (int i = 0; i < LANES; i++)
            for (int c = 0; c < LANES; c++) out[i][c] = load(at->row[TOKEN(i, c / WIDE)], (base + c % WIDE) * f->col, f->dtype);
    }
}

/* A quarter from each of the tokens i, 8 + i, 16 + i and 24 + i. */
static inline __m512i quarters(const tokens_of *at, int i, int64_t bytes) {
    for (int j = 0; j < 4; j++) fetch(at->row[8 * j + i] + bytes);
#define QUARTER(j) _mm_loadu_si128((const __m128i *)(at->row[8 * (j) + i] + bytes))
    __m512i four = _mm512_castsi128_si512(QUARTER(0));
    four = _mm512_inserti32x4(four, QUARTER(1), 1);
    four = _mm512_inserti32x4(four, QUARTER(2), 2);
    return _mm512_inserti32x4(four, QUARTER(3), 3);
#undef QUARTER
}

/* From WIDE columns of four tokens in each register to GROUP tokens of a column in each. */
static inline void columns_of(__m512i *eight) {
    __m512i a[WIDE], b[WIDE];
    for (int i = 0; i < WIDE; i += 2) {
        a[i] = _mm512_unpacklo_epi16(eight[i], eight[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi16(eight[i], eight[i + 1]);
    }
    for (int i = 0; i < WIDE; i += 4) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 2]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi32(a[i + 1], a[i + 3]), b[i + 3] = _mm512_unpackhi_epi32(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < WIDE / 2; i++) {
        eight[2 * i] = _mm512_unpacklo_epi64(b[i], b[i + 4]);
        eight[2 * i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 4]);
    }
}

/* The product of the factors in WIDE columns from `base` on: GROUP tokens of a column in each register. */
static inline void tile(const factor *factors, int n, const tokens_of *at, int64_t base, __m512i *eight) {
    if (n == 1 && factors->dtype == BF16 && factors->col == 1) {
        for (int i = 0; i < WIDE; i++) eight[i] = quarters(at, i, 2 * base);
    } else {
        __m512 product[LANES];
        two_rows(factors, at, base, product);
        for (int f = 1; f < n; f++) {
            __m512 more[LANES];
            int exact = f == 1 && factors->dtype == BF16, round = exact ? F32 : factors[f - 1].round;
            two_rows(factors + f, at + f, base, more);
            for (int i = 0; i < LANES; i++) product[i] = (__m512)rounded((vec)product[i], round) * more[i];
        }
        for (int i = 0; i < WIDE; i++) eight[i] = (__m512i)_mm512_cvtne2ps_pbh(product[2 * i + 1], product[2 * i]);
    }
    columns_of(eight);
}

/* A column of a layer narrower than a tile. */
static inline void narrow_column(const factor *factors, int n, int64_t t, int64_t last, int64_t column, uint16_t *out) {
    for (int i = 0; i < GROUP; i++) {
        float value = one(factors, n, t + i < last ? t + i : last, column);
        memcpy(out + i, (const char *)&value + 2, 2);
    }
}

/* out[c * STRIDE + u] = the products of the factors at the tokens start + 2u, start + 2u + 1 of column[c]; zero from `count` on, in
 * the numbers_of(count) that are written. The row after the last is written too. */
static inline void transpose_pairs(const factor *factors, int n, int64_t start, int count, const chosen *at, float *out) {
    int64_t last = start + count - 1;
    for (int t = 0; t < count; t += GROUP) {
        tokens_of tokens[FACTORS];
        for (int f = 0; f < n; f++) tokens_at(factors + f, start + t, last, tokens + f);
        for (int64_t c = 0; at->width < WIDE && c < at->wide; c++)
            narrow_column(factors, n, start + t, last, at->column[c], (uint16_t *)(out + c * STRIDE) + t);
        for (const group *g = at->groups; at->width >= WIDE && g < at->groups + at->many; g++) {
            __m512i eight[WIDE];
            tile(factors, n, tokens, g->base, eight);
            for (int i = 0; i < WIDE; i++) _mm512_storeu_si512(out + (int64_t)g->row[i] * STRIDE + t / 2, eight[i]);
        }
    }
    int filled = 2 * numbers_of(count);
    for (int64_t c = 0; count < filled && c < at->wide; c++) memset((uint16_t *)(out + c * STRIDE) + count, 0, 2 * (filled - count));
}

/* By memcpy: GCC 12 takes a cast of loaded floats through the stack, for every product. */
static inline __m512bh pairs_at(const float *a) {
    __m512bh value;
    memcpy(&value, a, sizeof value);
    return value;
}

static inline __m512 dot(__m512 sum, const float *a, const float *b) { return _mm512_dpbf16_ps(sum, pairs_at(a), pairs_at(b)); }

/* out[k] += grad . x[place[k]] over the numbers of a block, for the entries of one row, as row_entries. */
static inline void row_pairs(const float *grad, const float *x, const int32_t *place, int64_t count, int numbers, float *out) {
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
        const float *x0 = x + (int64_t)place[k] * STRIDE, *x1 = x + (int64_t)place[k + 1] * STRIDE;
        const float *x2 = x + (int64_t)place[k + 2] * STRIDE, *x3 = x + (int64_t)place[k + 3] * STRIDE;
        __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
        for (int64_t u = 0; u < numbers; u += LANES) {
            __m512bh g = pairs_at(grad + u);
            a = _mm512_dpbf16_ps(a, g, pairs_at(x0 + u));
            b = _mm512_dpbf16_ps(b, g, pairs_at(x1 + u));
            c = _mm512_dpbf16_ps(c, g, pairs_at(x2 + u));
            d = _mm512_dpbf16_ps(d, g, pairs_at(x3 + u));
        }
        add_sums(narrow((vec)a), narrow((vec)b), narrow((vec)c), narrow((vec)d), out + k);
    }
    for (; k < count; k++) {
        __m512 sum = _mm512_setzero_ps();
        for (int u = 0; u < numbers; u += LANES) sum = dot(sum, grad + u, x + (int64_t)place[k] * STRIDE + u);
        out[k] += sum8(narrow((vec)sum));
    }
}
#else /* never asked: in_pairs says no */
static inline int in_pairs(const factor *x, int n, const factor *grad) { return (void)x, (void)n, (void)grad, 0; }
static inline int numbers_of(int count) { return (void)count, TOKENS; }
#define transpose_pairs transpose
#define row_pairs(grad, x, place, count, numbers, out) ((void)(numbers), row_entries(grad, x, place, count, out))
#endif

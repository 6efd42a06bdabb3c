/* Factors of an input, their product, and blocks of its transpose. */
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define TOKENS 64            /* tokens of a block: blocks of x^T and grad_y^T stay in the second-level cache */
#define STRIDE (TOKENS + 16) /* an odd number of cache lines, so that rows of a block fall into different sets */
#define ROWS 512             /* rows of grad_y^T formed at a time */
#define LINE 16              /* numbers of a cache line */
#define NEXT 48              /* columns between a read and a prefetch: sixteen streams are more than processors follow themselves */
#ifdef __AVX512F__
#define LANES 16 /* numbers of a register */
#else
#define LANES 8
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef float v8 __attribute__((vector_size(32), aligned(4)));
typedef float v4 __attribute__((vector_size(16), aligned(4)));

enum { F32 = 0, BF16 = 1 };

/* A factor of the input: element (t, c) lies at data[t * row + c * col]; the product so far is rounded to `round` after it. */
typedef struct {
    const void *data;
    int64_t row, col, dtype, round;
} factor;

static inline float load(const void *data, int64_t at, int dtype) {
    if (dtype == F32) return ((const float *)data)[at];
    uint32_t wide = (uint32_t)((const uint16_t *)data)[at] << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline vec rounded(vec value, int dtype) {
    if (dtype == F32) return value;
    bits raw;
    memcpy(&raw, &value, sizeof raw);
    raw = (raw + 0x7fff + ((raw >> 16) & 1)) & 0xffff0000u;
    memcpy(&value, &raw, sizeof raw);
    return value;
}

static inline vec splat(float value) { return value - (vec){0}; }

#define MIX __builtin_shufflevector

/* LANES rows of LANES become as many columns. */
static inline void turn(vec *r) {
    vec s[LANES];
#if LANES == 16
#define LOW4(a, b) MIX(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HIGH4(a, b) MIX(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define LOW8(a, b) MIX(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HIGH8(a, b) MIX(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define EVEN16(a, b) MIX(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define ODD16(a, b) MIX(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#else
#define LOW4(a, b) MIX(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define HIGH4(a, b) MIX(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define LOW8(a, b) MIX(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define HIGH8(a, b) MIX(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#endif
    for (int i = 0; i < LANES; i += 4) { /* four by four within each sixteen bytes */
        vec a = LOW4(r[i], r[i + 1]), b = LOW4(r[i + 2], r[i + 3]);
        vec c = HIGH4(r[i], r[i + 1]), d = HIGH4(r[i + 2], r[i + 3]);
        s[i] = LOW8(a, b), s[i + 1] = HIGH8(a, b), s[i + 2] = LOW8(c, d), s[i + 3] = HIGH8(c, d);
    }
    for (int m = 0; m < 4; m++) { /* then the sixteen bytes among each other */
#if LANES == 16
        vec a = EVEN16(s[m], s[4 + m]), b = EVEN16(s[8 + m], s[12 + m]);
        vec c = ODD16(s[m], s[4 + m]), d = ODD16(s[8 + m], s[12 + m]);
        r[m] = EVEN16(a, b), r[8 + m] = ODD16(a, b), r[4 + m] = EVEN16(c, d), r[12 + m] = ODD16(c, d);
#else
        r[m] = MIX(s[m], s[4 + m], 0, 1, 2, 3, 8, 9, 10, 11), r[4 + m] = MIX(s[m], s[4 + m], 4, 5, 6, 7, 12, 13, 14, 15);
#endif
    }
}

/* Neighbouring numbers; those of a later tile are fetched. */
static inline vec neighbours(const void *data, int64_t at, int dtype) {
    vec value;
    __builtin_prefetch((const char *)data + (at + NEXT) * (dtype == F32 ? 4 : 2));
    if (dtype == F32) {
        memcpy(&value, (const float *)data + at, sizeof value);
        return value;
    }
    halves half;
    memcpy(&half, (const uint16_t *)data + at, sizeof half);
    bits raw = __builtin_convertvector(half, bits) << 16;
    memcpy(&value, &raw, sizeof value);
    return value;
}

/* A factor at LANES tokens from t on and as many columns from `base` on: lanes[i] holds the columns of token t + i. Each loop of its
 * own, so that nothing is decided within it. */
static inline void factor_at(const factor *f, int64_t t, int64_t base, vec *lanes) {
    if (f->col == 1 && f->dtype == F32) {
        for (int i = 0; i < LANES; i++) lanes[i] = neighbours(f->data, (t + i) * f->row + base, F32);
    } else if (f->col == 1) {
        for (int i = 0; i < LANES; i++) lanes[i] = neighbours(f->data, (t + i) * f->row + base, BF16);
    } else if (f->col == 0) {
        for (int i = 0; i < LANES; i++) lanes[i] = splat(load(f->data, (t + i) * f->row, f->dtype));
    } else if (f->row == 0) {
        vec all;
        for (int c = 0; c < LANES; c++) all[c] = load(f->data, (base + c) * f->col, f->dtype);
        for (int i = 0; i < LANES; i++) lanes[i] = all;
    } else {
        for (int i = 0; i < LANES; i++)
            for (int c = 0; c < LANES; c++) lanes[i][c] = load(f->data, (t + i) * f->row + (base + c) * f->col, f->dtype);
    }
}

static inline void round_all(vec *lanes, int dtype) {
    if (dtype == BF16)
        for (int i = 0; i < LANES; i++) lanes[i] = rounded(lanes[i], BF16);
}

/* The product of the factors at LANES tokens and columns, as factor_at takes them. */
static inline void product_at(const factor *factors, int n, int64_t t, int64_t base, vec *lanes) {
    factor_at(factors, t, base, lanes);
    round_all(lanes, factors[0].round);
    for (const factor *f = factors + 1; f < factors + n; f++) {
        vec more[LANES];
        factor_at(f, t, base, more);
        for (int i = 0; i < LANES; i++) lanes[i] *= more[i];
        round_all(lanes, f->round);
    }
}

/* The product of the factors at one token and column. */
static inline float one(const factor *factors, int n, int64_t t, int64_t column) {
    vec value = splat(0);
    for (int f = 0; f < n; f++) {
        vec next = splat(load(factors[f].data, t * factors[f].row + column * factors[f].col, factors[f].dtype));
        value = rounded(f ? value * next : next, factors[f].round);
    }
    return value[0];
}

/* out[c * STRIDE + t] = product of the factors at (start + t, columns[c]); zero for t >= count. `width`: columns there are.
 * Columns are sorted: those within LANES of each other are read as neighbours and turned in registers. */
static inline void transpose(const factor *factors, int n, int64_t start, int count, const int32_t *columns, int64_t wide,
                             int64_t width, float *out) {
    if (width < LANES || count < LANES) {
        for (int64_t c = 0; c < wide; c++)
            for (int t = 0; t < count; t++) out[c * STRIDE + t] = one(factors, n, start + t, columns[c]);
    } else {
        for (int t = 0; t < count; t += LINE) /* whole cache lines are written */
            for (int64_t c = 0, next = 0; c < wide; c = next) {
                int64_t base = columns[c] < width - LANES ? columns[c] : width - LANES;
                for (int u = t; u < t + LINE && u < count; u += LANES) {
                    int at = u < count - LANES ? u : count - LANES; /* the last ones overlap */
                    vec lanes[LANES];
                    product_at(factors, n, start + at, base, lanes);
                    turn(lanes);
                    for (next = c; next < wide && columns[next] < base + LANES; next++)
                        memcpy(out + next * STRIDE + at, lanes + (columns[next] - base), sizeof(vec));
                }
            }
    }
    if (count < TOKENS)
        for (int64_t c = 0; c < wide; c++) memset(out + c * STRIDE + count, 0, (TOKENS - count) * sizeof(float));
}

/* Sums of both halves, or the number itself. */
static inline v8 narrow(vec a) {
#if LANES == 16
    return MIX(a, a, 0, 1, 2, 3, 4, 5, 6, 7) + MIX(a, a, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    return a;
#endif
}

static inline float sum8(v8 a) {
    v4 four = MIX(a, a, 0, 1, 2, 3) + MIX(a, a, 4, 5, 6, 7);
    return (four[0] + four[1]) + (four[2] + four[3]);
}

/* out[i] += the sum of the i-th: four sums of eight at once. */
static inline void add_sums(v8 a, v8 b, v8 c, v8 d, float *out) {
    v8 low = MIX(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + MIX(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
    v8 high = MIX(c, d, 0, 8, 2, 10, 4, 12, 6, 14) + MIX(c, d, 1, 9, 3, 11, 5, 13, 7, 15);
    v8 sums = MIX(low, high, 0, 1, 8, 9, 4, 5, 12, 13) + MIX(low, high, 2, 3, 10, 11, 6, 7, 14, 15);
    v4 four;
    memcpy(&four, out, sizeof four);
    four += MIX(sums, sums, 0, 1, 2, 3) + MIX(sums, sums, 4, 5, 6, 7);
    memcpy(out, &four, sizeof four);
}

/* Factors of an input, their product, and blocks of its transpose. */
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define TOKENS 64            /* tokens of a block: blocks of x^T and grad_y^T stay in the second-level cache */
#define STRIDE (TOKENS + 16) /* an odd number of cache lines, so that rows of a block fall into different sets */
#define ROWS 512             /* rows of grad_y^T formed at a time */
#define WIDE 8               /* columns turned at a time */
#define NEXT 48              /* columns between a read and a prefetch: sixteen streams are more than processors follow themselves */
#ifdef __AVX512F__
#define LANES 16 /* numbers of a register */
#else
#define LANES 8
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t short_bits __attribute__((vector_size(4 * LANES)));
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

/* MIX takes numbers of two registers in the order named; `low` and `high` are the halves of one, `joined` is made of two. GCC before 12
 * mixes into registers of the same size alone, by its own builtin. */
#if defined(__clang__) || __GNUC__ >= 12
#define MIX __builtin_shufflevector
static inline v4 low4(v8 a) { return MIX(a, a, 0, 1, 2, 3); }
static inline v4 high4(v8 a) { return MIX(a, a, 4, 5, 6, 7); }
static inline v8 joined(v4 a, v4 b) { return MIX(a, b, 0, 1, 2, 3, 4, 5, 6, 7); }
#if LANES == 16
static inline v8 low8(vec a) { return MIX(a, a, 0, 1, 2, 3, 4, 5, 6, 7); }
static inline v8 high8(vec a) { return MIX(a, a, 8, 9, 10, 11, 12, 13, 14, 15); }
#endif
#else
#define MIX(a, b, ...)                                                                                          \
    ({                                                                                                          \
        typedef __typeof__(__builtin_choose_expr(sizeof((a)[0]) == 2, (uint16_t)0, (uint32_t)0)) place;         \
        typedef place places __attribute__((vector_size(sizeof(a))));                                           \
        __builtin_shuffle(a, b, (places){__VA_ARGS__});                                                         \
    })
#define PART(name, type, whole, at)                       \
    static inline type name(whole a) {                    \
        type part;                                        \
        memcpy(&part, (const char *)&a + at, sizeof part); \
        return part;                                      \
    }
PART(low4, v4, v8, 0)
PART(high4, v4, v8, 16)
static inline v8 joined(v4 a, v4 b) {
    v8 both;
    memcpy(&both, &a, sizeof a);
    memcpy((char *)&both + sizeof a, &b, sizeof b);
    return both;
}
#if LANES == 16
PART(low8, v8, vec, 0)
PART(high8, v8, vec, 32)
#endif
#undef PART
#endif

/* Registers hold four columns of a token in each sixteen bytes: the i-th of four has the tokens i, 4 + i, ... Turned, they hold a
 * column each, its tokens in order. No shuffle leaves its sixteen bytes, and nothing more than four registers is at work. */
static inline void turn(vec *r) {
#if LANES == 16
#define LOW4(a, b) MIX(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HIGH4(a, b) MIX(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define LOW8(a, b) MIX(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HIGH8(a, b) MIX(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#else
#define LOW4(a, b) MIX(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define HIGH4(a, b) MIX(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define LOW8(a, b) MIX(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define HIGH8(a, b) MIX(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#endif
    vec a = LOW4(r[0], r[1]), b = LOW4(r[2], r[3]), c = HIGH4(r[0], r[1]), d = HIGH4(r[2], r[3]);
    r[0] = LOW8(a, b), r[1] = HIGH8(a, b), r[2] = LOW8(c, d), r[3] = HIGH8(c, d);
}

/* Sixteen bytes from each of LANES / 4 places that lie `step` bytes apart. */
static inline vec fours(const char *from, int64_t step) {
#if LANES == 16
    __m512 all = _mm512_castps128_ps512(_mm_loadu_ps((const float *)from));
    all = _mm512_insertf32x4(all, _mm_loadu_ps((const float *)(from + step)), 1);
    all = _mm512_insertf32x4(all, _mm_loadu_ps((const float *)(from + 2 * step)), 2);
    return (vec)_mm512_insertf32x4(all, _mm_loadu_ps((const float *)(from + 3 * step)), 3);
#else
    v4 low, high;
    memcpy(&low, from, sizeof low);
    memcpy(&high, from + step, sizeof high);
    return joined(low, high);
#endif
}

/* Eight numbers of bf16 in each sixteen bytes, as fp32: the first four, and the last. */
static inline void widened_fours(vec raw, vec *first, vec *last) {
    short_bits both = (short_bits)raw, none = {0};
#if LANES == 16
    *first = (vec)MIX(none, both, 0, 32, 0, 33, 0, 34, 0, 35, 0, 40, 0, 41, 0, 42, 0, 43, 0, 48, 0, 49, 0, 50, 0, 51, 0, 56, 0, 57, 0,
                      58, 0, 59);
    *last = (vec)MIX(none, both, 4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52, 21, 53, 22, 54, 23, 55, 28, 60, 29,
                     61, 30, 62, 31, 63);
#else
    *first = (vec)MIX(none, both, 0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27);
    *last = (vec)MIX(none, both, 4, 20, 5, 21, 6, 22, 7, 23, 12, 28, 13, 29, 14, 30, 15, 31);
#endif
}

/* A number of each token, four times: the i-th register as turn() has its tokens. */
static inline void same_fours(vec each, vec *lanes) {
#if LANES == 16
#define SAME(i) MIX(each, each, i, i, i, i, 4 + i, 4 + i, 4 + i, 4 + i, 8 + i, 8 + i, 8 + i, 8 + i, 12 + i, 12 + i, 12 + i, 12 + i)
#else
#define SAME(i) MIX(each, each, i, i, i, i, 4 + i, 4 + i, 4 + i, 4 + i)
#endif
    lanes[0] = SAME(0), lanes[1] = SAME(1), lanes[2] = SAME(2), lanes[3] = SAME(3);
}

/* A factor at LANES tokens from t on and WIDE columns from `base` on: lanes[i] and lanes[4 + i] hold the first and the last four
 * columns of the tokens that turn() takes there. Neighbouring numbers of a later tile are fetched. */
static inline void factor_at(const factor *f, int64_t t, int64_t base, vec *lanes) {
    int64_t size = f->dtype == F32 ? 4 : 2, step = f->row * size;
    const char *from = (const char *)f->data + t * step + base * f->col * size;
    if (f->col == 0) {
        vec each;
        for (int i = 0; i < LANES; i++) each[i] = load(from, i * f->row, f->dtype);
        same_fours(each, lanes), same_fours(each, lanes + 4);
    } else if (f->col != 1) {
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < LANES; j++) {
                int64_t at = (i + j / 4 * 4) * f->row + j % 4 * f->col;
                lanes[i][j] = load(from, at, f->dtype), lanes[4 + i][j] = load(from, at + 4 * f->col, f->dtype);
            }
    } else if (f->row == 0) {
        if (f->dtype == F32) lanes[0] = fours(from, 0), lanes[4] = fours(from + 16, 0);
        else widened_fours(fours(from, 0), lanes, lanes + 4);
        for (int i = 1; i < 4; i++) lanes[i] = lanes[0], lanes[4 + i] = lanes[4];
    } else {
        for (int i = 0; i < LANES; i++) __builtin_prefetch(from + i * step + NEXT * size);
        if (f->dtype == F32)
            for (int i = 0; i < 4; i++) lanes[i] = fours(from + i * step, 4 * step), lanes[4 + i] = fours(from + i * step + 16, 4 * step);
        else
            for (int i = 0; i < 4; i++) widened_fours(fours(from + i * step, 4 * step), lanes + i, lanes + 4 + i);
    }
}

static inline void round_all(vec *lanes, int dtype) {
    if (dtype == BF16)
        for (int i = 0; i < WIDE; i++) lanes[i] = rounded(lanes[i], BF16);
}

/* The product of the factors at LANES tokens and WIDE columns, as factor_at takes them. */
static inline void product_at(const factor *factors, int n, int64_t t, int64_t base, vec *lanes) {
    factor_at(factors, t, base, lanes);
    round_all(lanes, factors[0].round);
    for (const factor *f = factors + 1; f < factors + n; f++) {
        vec more[WIDE];
        factor_at(f, t, base, more);
        for (int i = 0; i < WIDE; i++) lanes[i] *= more[i];
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

/* WIDE neighbouring columns that are turned at once: from `base` on; the row of a block that each goes to. Found once for all tokens,
 * so that nothing is decided about columns within the loops. */
typedef struct {
    int32_t base, row[WIDE];
} group;

/* The groups of sorted columns; returns how many there are, at most one a column. Columns that are not asked for go to the row after
 * the last one. */
static inline int64_t groups_of(const int32_t *columns, int64_t wide, int64_t width, group *out) {
    int64_t count = 0;
    for (int64_t c = 0; c < wide; count++) {
        group *g = out + count;
        g->base = columns[c] < width - WIDE ? columns[c] : (int32_t)(width - WIDE);
        for (int i = 0; i < WIDE; i++) g->row[i] = (int32_t)(c < wide && columns[c] == g->base + i ? c++ : wide);
    }
    return count;
}

/* Sorted columns of a tensor that has `width` of them, and their groups. */
typedef struct {
    const int32_t *column;
    const group *groups;
    int64_t wide, many, width;
} chosen;

/* out[c * STRIDE + t] = product of the factors at (start + t, column[c]); zero for t >= count. The row after the last is written too. */
static inline void transpose(const factor *factors, int n, int64_t start, int count, const chosen *at, float *out) {
    if (at->width < WIDE || count < LANES) {
        for (int64_t c = 0; c < at->wide; c++)
            for (int t = 0; t < count; t++) out[c * STRIDE + t] = one(factors, n, start + t, at->column[c]);
    } else {
        for (int t = 0; t < count; t += LANES) {
            int first = t < count - LANES ? t : count - LANES; /* the last ones overlap */
            for (const group *g = at->groups; g < at->groups + at->many; g++) {
                vec lanes[WIDE];
                product_at(factors, n, start + first, g->base, lanes);
                turn(lanes), turn(lanes + 4);
                for (int i = 0; i < WIDE; i++) memcpy(out + (int64_t)g->row[i] * STRIDE + first, lanes + i, sizeof(vec));
            }
        }
    }
    if (count < TOKENS)
        for (int64_t c = 0; c < at->wide; c++) memset(out + c * STRIDE + count, 0, (TOKENS - count) * sizeof(float));
}

/* Sums of both halves, or the number itself. */
static inline v8 narrow(vec a) {
#if LANES == 16
    return low8(a) + high8(a);
#else
    return a;
#endif
}

static inline float sum8(v8 a) {
    v4 four = low4(a) + high4(a);
    return (four[0] + four[1]) + (four[2] + four[3]);
}

/* out[i] += the sum of the i-th: four sums of eight at once. */
static inline void add_sums(v8 a, v8 b, v8 c, v8 d, float *out) {
    v8 low = MIX(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + MIX(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
    v8 high = MIX(c, d, 0, 8, 2, 10, 4, 12, 6, 14) + MIX(c, d, 1, 9, 3, 11, 5, 13, 7, 15);
    v8 sums = MIX(low, high, 0, 1, 8, 9, 4, 5, 12, 13) + MIX(low, high, 2, 3, 10, 11, 6, 7, 14, 15);
    v4 four;
    memcpy(&four, out, sizeof four);
    four += low4(sums) + high4(sums);
    memcpy(out, &four, sizeof four);
}

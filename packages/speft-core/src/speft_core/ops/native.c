/* The k entries of grad_y^T x on a CPU, and the k writes of base + values: loops that PyTorch has no operator for.
 *
 * Plain C with vector extensions (GCC, Clang); built by native.py at first use, never required.
 * Shape suffixes as in the Python files: T tokens, R rows with an entry, C columns with an entry, K kept entries.
 */
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

enum { F32 = 0, BF16 = 1 };

/* A factor of the input: element (t, c) lies at data[t * row + c * col]; the product so far is rounded to `round` after it. */
typedef struct {
    const void *data;
    int64_t row, col;
    int32_t dtype, round;
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

/* A factor at the LANES tokens from t on and as many columns from `base` on: lanes[i] holds the columns of token t + i.
 * Each loop of its own, so that nothing is decided within it. */
static inline void factor_at(const factor *f, int64_t t, int64_t base, vec *lanes) {
    if (f->col == 1 && f->dtype == F32) {
        for (int i = 0; i < LANES; i++) lanes[i] = neighbours(f->data, (t + i) * f->row + base, F32);
    } else if (f->col == 1) {
        for (int i = 0; i < LANES; i++) lanes[i] = neighbours(f->data, (t + i) * f->row + base, BF16);
    } else if (f->col == 0) {
        for (int i = 0; i < LANES; i++) lanes[i] = splat(load(f->data, (t + i) * f->row, f->dtype));
    } else {
        for (int i = 0; i < LANES; i++)
            for (int c = 0; c < LANES; c++) lanes[i][c] = load(f->data, (t + i) * f->row + (base + c) * f->col, f->dtype);
    }
}

static inline void round_all(vec *lanes, int dtype) {
    if (dtype == BF16)
        for (int i = 0; i < LANES; i++) lanes[i] = rounded(lanes[i], BF16);
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
                    vec lanes[LANES], more[LANES];
                    factor_at(factors, start + at, base, lanes);
                    round_all(lanes, factors[0].round);
                    for (const factor *f = factors + 1; f < factors + n; f++) {
                        factor_at(f, start + at, base, more);
                        for (int i = 0; i < LANES; i++) lanes[i] *= more[i];
                        round_all(lanes, f->round);
                    }
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

static inline float sum8(v8 a) { return ((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7])); }

/* out[k] += grad . x[place[k]] for the entries of one row, four at a time so that grad is loaded once for them. */
static inline void row_entries(const float *grad, const float *x, const int32_t *place, int64_t count, float *out) {
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
        const float *x0 = x + (int64_t)place[k] * STRIDE, *x1 = x + (int64_t)place[k + 1] * STRIDE;
        const float *x2 = x + (int64_t)place[k + 2] * STRIDE, *x3 = x + (int64_t)place[k + 3] * STRIDE;
        vec a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0}, b0 = {0}, b1 = {0}, b2 = {0}, b3 = {0};
        for (int t = 0; t < TOKENS; t += 2 * LANES) {
            vec g = *(const vec *)(grad + t), h = *(const vec *)(grad + t + LANES);
            a0 += g * *(const vec *)(x0 + t);
            a1 += g * *(const vec *)(x1 + t);
            a2 += g * *(const vec *)(x2 + t);
            a3 += g * *(const vec *)(x3 + t);
            b0 += h * *(const vec *)(x0 + t + LANES);
            b1 += h * *(const vec *)(x1 + t + LANES);
            b2 += h * *(const vec *)(x2 + t + LANES);
            b3 += h * *(const vec *)(x3 + t + LANES);
        }
        v8 c0 = narrow(a0 + b0), c1 = narrow(a1 + b1), c2 = narrow(a2 + b2), c3 = narrow(a3 + b3); /* four sums of eight at once */
        v8 low = MIX(c0, c1, 0, 8, 2, 10, 4, 12, 6, 14) + MIX(c0, c1, 1, 9, 3, 11, 5, 13, 7, 15);
        v8 high = MIX(c2, c3, 0, 8, 2, 10, 4, 12, 6, 14) + MIX(c2, c3, 1, 9, 3, 11, 5, 13, 7, 15);
        v8 sums = MIX(low, high, 0, 1, 8, 9, 4, 5, 12, 13) + MIX(low, high, 2, 3, 10, 11, 6, 7, 14, 15);
        for (int i = 0; i < 4; i++) out[k + i] += sums[i] + sums[i + 4];
    }
    for (; k < count; k++) {
        const float *x0 = x + (int64_t)place[k] * STRIDE;
        vec a = {0}, b = {0};
        for (int t = 0; t < TOKENS; t += 2 * LANES) {
            a += *(const vec *)(grad + t) * *(const vec *)(x0 + t);
            b += *(const vec *)(grad + t + LANES) * *(const vec *)(x0 + t + LANES);
        }
        out[k] += sum8(narrow(a + b));
    }
}

typedef struct {
    int64_t rows, columns, entries, outputs, inputs; /* the last two: columns of grad_y and of x as given */
    const int32_t *row, *first, *column, *place; /* [R], [R + 1], [C], [K] */
} layout;

static void entries_of(const layout *at, const factor *x, int n, const factor *grad, int64_t start, int64_t stop, float *block,
                       float *out) {
    float *x_CT = block, *grad_BT = block + at->columns * STRIDE;
    memset(out, 0, at->entries * sizeof(float));
    for (; start < stop; start += TOKENS) {
        int count = stop - start < TOKENS ? (int)(stop - start) : TOKENS;
        transpose(x, n, start, count, at->column, at->columns, at->inputs, x_CT);
        for (int64_t r = 0; r < at->rows; r += ROWS) {
            int64_t wide = at->rows - r < ROWS ? at->rows - r : ROWS;
            transpose(grad, 1, start, count, at->row + r, wide, at->outputs, grad_BT);
            for (int64_t b = 0; b < wide; b++) {
                int64_t k = at->first[r + b];
                row_entries(grad_BT + b * STRIDE, x_CT, at->place + k, at->first[r + b + 1] - k, out + k);
            }
        }
    }
}

/* Numbers of scratch of one part: a block of x^T, one of grad_y^T, and the sums; a multiple of a cache line. */
static int64_t share_of(const layout *at) {
    int64_t rows = at->rows < ROWS ? at->rows : ROWS;
    return (at->columns + rows) * STRIDE + (at->entries + 15) / 16 * 16;
}

/* Bytes of scratch that `speft_entries` needs for this many parts. */
int64_t speft_scratch(const layout *at, int parts) {
    return (parts * share_of(at) + 16) * (int64_t)sizeof(float);
}

/* out[K] = the entries of grad^T x; the tokens are split into `parts`, one thread each, whose sums are added in order. */
void speft_entries(const layout *at, const factor *x, int n, const factor *grad, int64_t tokens, int parts, float *scratch,
                   float *out) {
    int64_t size = share_of(at), sums = (at->entries + 15) / 16 * 16, share = (tokens + parts - 1) / parts;
    scratch = (float *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
#pragma omp parallel for schedule(static, 1) num_threads(parts)
    for (int p = 0; p < parts; p++) {
        int64_t start = p * share, stop = start + share < tokens ? start + share : tokens;
        float *own = scratch + p * size;
        entries_of(at, x, n, grad, start, stop, own + sums, own);
    }
    for (int64_t k = 0; k < at->entries; k++) {
        float sum = scratch[k];
        for (int p = 1; p < parts; p++) sum += scratch[p * size + k];
        out[k] = sum;
    }
}

/* What the callers in native.py expect of this file; they refuse another. */
int32_t speft_abi(void) { return 4; }

#define AHEAD 24        /* entries between a prefetch and its use: the indices are sorted but far apart, each a cache miss */
#define ALONE (1 << 14) /* fewer entries of a single tensor than this are not worth a second thread */

/* A weight of `numel` numbers, where K of them lie, what they are without the adapter, and what it adds. */
typedef struct {
    void *weight;
    const int32_t *index;
    void *base;
    const void *values;
    int64_t entries, numel, dtype, values_dtype;
} change;

/* Rounded once, to nearest even, as PyTorch does. */
static inline uint16_t half_of(float sum) {
    uint32_t bits;
    memcpy(&bits, &sum, 4);
    return sum != sum ? 0x7fc0u : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* For the entries k of a share: `at`, its place in the weight, and a prefetch of a later one. Places outside are counted and left. */
#define ENTRIES(c, type, body)                                                                     \
    for (int64_t k = start; k < stop; k++) {                                                       \
        int64_t at = (c)->index[k], next = (c)->index[k + AHEAD < stop ? k + AHEAD : stop - 1];    \
        __builtin_prefetch((type *)(c)->weight + next, 1);                                         \
        if ((uint64_t)at >= (uint64_t)(c)->numel) {                                                \
            outside++;                                                                             \
            continue;                                                                              \
        }                                                                                          \
        type *place = (type *)(c)->weight + at, *base = (type *)(c)->base + k;                     \
        body                                                                                       \
    }

typedef int64_t share(const change *c, int64_t start, int64_t stop);

/* base[k] = weight[index[k]], bits as they are. */
static int64_t take(const change *c, int64_t start, int64_t stop) {
    int64_t outside = 0;
    if (c->dtype == F32) ENTRIES(c, uint32_t, *base = *place;)
    else ENTRIES(c, uint16_t, *base = *place;)
    return outside;
}

/* weight[index[k]] = base[k], bits as they are. */
static int64_t put(const change *c, int64_t start, int64_t stop) {
    int64_t outside = 0;
    if (c->dtype == F32) ENTRIES(c, uint32_t, *place = *base;)
    else ENTRIES(c, uint16_t, *place = *base;)
    return outside;
}

/* weight[index[k]] = base[k] + values[k]. */
static int64_t add(const change *c, int64_t start, int64_t stop) {
    int64_t outside = 0;
    if (c->dtype == F32) ENTRIES(c, float, *place = *base + load(c->values, k, (int)c->values_dtype);)
    else ENTRIES(c, uint16_t, *place = half_of(load(base, 0, BF16) + load(c->values, k, (int)c->values_dtype));)
    return outside;
}

/* One tensor is cut into shares; of many, which are small, a thread takes one after another. Returns how many places lay outside. */
static int64_t each(share *work, const change *all, int64_t count, int threads) {
    int64_t outside = 0;
    if (count == 1) {
        int64_t entries = all->entries, parts = entries > ALONE ? threads : 1, size = (entries + parts - 1) / parts;
#pragma omp parallel for num_threads(parts) reduction(+ : outside) if (parts > 1)
        for (int64_t p = 0; p < parts; p++) {
            int64_t start = p * size, stop = start + size < entries ? start + size : entries;
            if (start < stop) outside += work(all, start, stop);
        }
        return outside;
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(+ : outside) if (threads > 1)
    for (int64_t i = 0; i < count; i++) outside += work(all + i, 0, all[i].entries);
    return outside;
}

int64_t speft_take(const change *all, int64_t count, int threads) { return each(take, all, count, threads); }
int64_t speft_put(const change *all, int64_t count, int threads) { return each(put, all, count, threads); }
int64_t speft_add(const change *all, int64_t count, int threads) { return each(add, all, count, threads); }

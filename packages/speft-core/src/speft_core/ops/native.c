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

typedef float v8 __attribute__((vector_size(32), aligned(4)));
typedef uint32_t u8 __attribute__((vector_size(32)));
typedef uint16_t h8 __attribute__((vector_size(16)));

enum { F32 = 0, BF16 = 1 };

/* A factor of the input: element (t, c) lies at data[t * row + c * col]; the product so far is rounded to `round` after it. */
typedef struct {
    const void *data;
    int64_t row, col;
    int32_t dtype, round;
} factor;

static inline float load(const void *data, int64_t at, int dtype) {
    if (dtype == F32) return ((const float *)data)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)data)[at] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline v8 load8(const void *data, int64_t at, int64_t step, int dtype) {
    if (dtype == F32) {
        const float *p = (const float *)data + at;
        return (v8){p[0], p[step], p[2 * step], p[3 * step], p[4 * step], p[5 * step], p[6 * step], p[7 * step]};
    }
    const uint16_t *p = (const uint16_t *)data + at;
    u8 bits = {p[0], p[step], p[2 * step], p[3 * step], p[4 * step], p[5 * step], p[6 * step], p[7 * step]};
    bits <<= 16;
    v8 value;
    memcpy(&value, &bits, 32);
    return value;
}

static inline v8 round8(v8 value, int dtype) {
    if (dtype == F32) return value;
    u8 bits;
    memcpy(&bits, &value, 32);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    memcpy(&value, &bits, 32);
    return value;
}

static inline v8 splat(float value) { return (v8){value, value, value, value, value, value, value, value}; }

/* Eight rows of eight become eight columns of eight. */
static inline void turn8(v8 *r) {
    v8 s[8], t[8];
    for (int i = 0; i < 8; i += 2) {
        s[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        s[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            t[i + 2 * j] = __builtin_shufflevector(s[i + j], s[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            t[i + 2 * j + 1] = __builtin_shufflevector(s[i + j], s[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        r[i] = __builtin_shufflevector(t[i], t[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        r[i + 4] = __builtin_shufflevector(t[i], t[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* Eight neighbouring numbers. */
static inline v8 row8(const void *data, int64_t at, int dtype) {
    v8 value;
    if (dtype == F32) {
        memcpy(&value, (const float *)data + at, 32);
        return value;
    }
    h8 half;
    memcpy(&half, (const uint16_t *)data + at, 16);
    u8 bits = __builtin_convertvector(half, u8) << 16;
    memcpy(&value, &bits, 32);
    return value;
}

/* A factor at tokens t .. t + 7 of the columns base .. base + 7: lanes[c] holds the tokens of column base + c. */
static inline void lanes8(const factor *f, int64_t t, int64_t base, v8 *lanes) {
    if (f->row == 0) {
        for (int c = 0; c < 8; c++) lanes[c] = splat(load(f->data, (base + c) * f->col, f->dtype));
    } else if (f->col == 0) {
        v8 value = load8(f->data, t * f->row, f->row, f->dtype);
        for (int c = 0; c < 8; c++) lanes[c] = value;
    } else if (f->col == 1) {
        const char *ahead = (const char *)f->data + ((t + 16) * f->row + base) * (f->dtype == F32 ? 4 : 2);
        for (int i = 0; i < 8; i++) {
            __builtin_prefetch(ahead + i * f->row * (f->dtype == F32 ? 4 : 2)); /* too many rows for the hardware's own */
            lanes[i] = row8(f->data, (t + i) * f->row + base, f->dtype);
        }
        turn8(lanes);
    } else {
        for (int c = 0; c < 8; c++) lanes[c] = load8(f->data, t * f->row + (base + c) * f->col, f->row, f->dtype);
    }
}

/* The product of the factors at one token and column. */
static inline float one(const factor *factors, int n, int64_t t, int64_t column) {
    v8 value = splat(0);
    for (int f = 0; f < n; f++) {
        v8 next = splat(load(factors[f].data, t * factors[f].row + column * factors[f].col, factors[f].dtype));
        value = round8(f ? value * next : next, factors[f].round);
    }
    return value[0];
}

/* out[c * STRIDE + t] = product of the factors at (start + t, columns[c]); zero for t >= count. `width`: columns there are.
 * Columns are sorted: those within eight of each other are read as neighbours and turned in registers. */
static inline void transpose(const factor *factors, int n, int64_t start, int count, const int32_t *columns, int64_t wide,
                             int64_t width, float *out) {
    int t = 0;
    for (; width >= 8 && t + 8 <= count; t += 16) {
        int last = t + 16 <= count ? t + 16 : t + 8; /* two eights: whole cache lines are written */
        for (int64_t c = 0, next = 0; c < wide; c = next) {
            int64_t base = columns[c] < width - 8 ? columns[c] : width - 8;
            for (int u = t; u < last; u += 8) {
                v8 lanes[8], more[8];
                lanes8(factors, start + u, base, lanes);
                for (int i = 0; i < 8; i++) lanes[i] = round8(lanes[i], factors[0].round);
                for (int f = 1; f < n; f++) {
                    lanes8(factors + f, start + u, base, more);
                    for (int i = 0; i < 8; i++) lanes[i] = round8(lanes[i] * more[i], factors[f].round);
                }
                for (next = c; next < wide && columns[next] < base + 8; next++)
                    memcpy(out + next * STRIDE + u, lanes + (columns[next] - base), 32);
            }
        }
    }
    if (width >= 8) t = count & ~7;
    for (; t < TOKENS; t++)
        for (int64_t c = 0; c < wide; c++) out[c * STRIDE + t] = t < count ? one(factors, n, start + t, columns[c]) : 0;
}

static inline float sum8(v8 a) { return ((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7])); }

/* out[k] += grad . x[place[k]] for the entries of one row, four at a time so that grad is loaded once for them. */
static inline void row_entries(const float *grad, const float *x, const int32_t *place, int64_t count, float *out) {
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
        const float *x0 = x + (int64_t)place[k] * STRIDE, *x1 = x + (int64_t)place[k + 1] * STRIDE;
        const float *x2 = x + (int64_t)place[k + 2] * STRIDE, *x3 = x + (int64_t)place[k + 3] * STRIDE;
        v8 a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0}, b0 = {0}, b1 = {0}, b2 = {0}, b3 = {0};
        for (int t = 0; t < TOKENS; t += 16) {
            v8 g = *(const v8 *)(grad + t), h = *(const v8 *)(grad + t + 8);
            a0 += g * *(const v8 *)(x0 + t);
            a1 += g * *(const v8 *)(x1 + t);
            a2 += g * *(const v8 *)(x2 + t);
            a3 += g * *(const v8 *)(x3 + t);
            b0 += h * *(const v8 *)(x0 + t + 8);
            b1 += h * *(const v8 *)(x1 + t + 8);
            b2 += h * *(const v8 *)(x2 + t + 8);
            b3 += h * *(const v8 *)(x3 + t + 8);
        }
        a0 += b0, a1 += b1, a2 += b2, a3 += b3; /* four sums of eight at once */
        v8 low = __builtin_shufflevector(a0, a1, 0, 8, 2, 10, 4, 12, 6, 14) + __builtin_shufflevector(a0, a1, 1, 9, 3, 11, 5, 13, 7, 15);
        v8 high = __builtin_shufflevector(a2, a3, 0, 8, 2, 10, 4, 12, 6, 14) + __builtin_shufflevector(a2, a3, 1, 9, 3, 11, 5, 13, 7, 15);
        v8 sums = __builtin_shufflevector(low, high, 0, 1, 8, 9, 4, 5, 12, 13) + __builtin_shufflevector(low, high, 2, 3, 10, 11, 6, 7, 14, 15);
        for (int i = 0; i < 4; i++) out[k + i] += sums[i] + sums[i + 4];
    }
    for (; k < count; k++) {
        const float *x0 = x + (int64_t)place[k] * STRIDE;
        v8 a = {0}, b = {0};
        for (int t = 0; t < TOKENS; t += 16) {
            a += *(const v8 *)(grad + t) * *(const v8 *)(x0 + t);
            b += *(const v8 *)(grad + t + 8) * *(const v8 *)(x0 + t + 8);
        }
        out[k] += sum8(a + b);
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

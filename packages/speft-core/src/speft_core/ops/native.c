/* The k entries of grad_y^T x on a CPU, and the k writes of base + values: loops that PyTorch has no operator for.
 *
 * Plain C with vector extensions (GCC, Clang); built by native.py at first use, never required.
 * Shape suffixes as in the Python files: T tokens, R rows with an entry, C columns with an entry, K kept entries.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define TOKENS 128          /* tokens of a block: a block of x^T stays in the second-level cache */
#define STRIDE (TOKENS + 8) /* padded, so that a column of the block does not hit one cache set */
#define ROWS 32             /* rows of grad_y^T formed at a time: they stay in the first-level cache */

typedef float v8 __attribute__((vector_size(32), aligned(4)));
typedef uint32_t u8 __attribute__((vector_size(32)));

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

static inline v8 factor8(const factor *f, int64_t t, int64_t column) {
    if (f->row == 0) return splat(load(f->data, column * f->col, f->dtype));
    return load8(f->data, t * f->row + column * f->col, f->row, f->dtype);
}

/* out[c * STRIDE + t] = product of the factors at (start + t, columns[c]); zero for t >= count. */
static inline void transpose(const factor *factors, int n, int64_t start, int count, const int32_t *columns, int64_t wide,
                             float *out) {
    int t = 0;
    for (; t + 8 <= count; t += 8)
        for (int64_t c = 0; c < wide; c++) {
            v8 value = round8(factor8(factors, start + t, columns[c]), factors[0].round);
            for (int f = 1; f < n; f++) value = round8(value * factor8(factors + f, start + t, columns[c]), factors[f].round);
            memcpy(out + c * STRIDE + t, &value, 32);
        }
    for (; t < TOKENS; t++)
        for (int64_t c = 0; c < wide; c++) {
            v8 value = splat(0);
            if (t < count) {
                value = round8(splat(load(factors[0].data, (start + t) * factors[0].row + columns[c] * factors[0].col, factors[0].dtype)),
                               factors[0].round);
                for (int f = 1; f < n; f++) {
                    const factor *g = factors + f;
                    value = round8(value * splat(load(g->data, (start + t) * g->row + columns[c] * g->col, g->dtype)), g->round);
                }
            }
            out[c * STRIDE + t] = value[0];
        }
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
        out[k] += sum8(a0 + b0);
        out[k + 1] += sum8(a1 + b1);
        out[k + 2] += sum8(a2 + b2);
        out[k + 3] += sum8(a3 + b3);
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
    int64_t rows, columns, entries;
    const int32_t *row, *first, *column, *place; /* [R], [R + 1], [C], [K] */
} layout;

static void entries_of(const layout *at, const factor *x, int n, const factor *grad, int64_t start, int64_t stop, float *block,
                       float *out) {
    float *x_CT = block, *grad_BT = block + at->columns * STRIDE;
    memset(out, 0, at->entries * sizeof(float));
    for (; start < stop; start += TOKENS) {
        int count = stop - start < TOKENS ? (int)(stop - start) : TOKENS;
        transpose(x, n, start, count, at->column, at->columns, x_CT);
        for (int64_t r = 0; r < at->rows; r += ROWS) {
            int64_t wide = at->rows - r < ROWS ? at->rows - r : ROWS;
            transpose(grad, 1, start, count, at->row + r, wide, grad_BT);
            for (int64_t b = 0; b < wide; b++) {
                int64_t k = at->first[r + b];
                row_entries(grad_BT + b * STRIDE, x_CT, at->place + k, at->first[r + b + 1] - k, out + k);
            }
        }
    }
}

/* Bytes of scratch that `speft_entries` needs for this many parts. */
int64_t speft_scratch(const layout *at, int parts) {
    return parts * ((at->columns + ROWS) * STRIDE + at->entries) * (int64_t)sizeof(float);
}

/* out[K] = the entries of grad^T x; the tokens are split into `parts`, one thread each, whose sums are added in order. */
void speft_entries(const layout *at, const factor *x, int n, const factor *grad, int64_t tokens, int parts, float *scratch,
                   float *out) {
    int64_t size = (at->columns + ROWS) * STRIDE + at->entries, share = (tokens + parts - 1) / parts;
#pragma omp parallel for schedule(static, 1) num_threads(parts)
    for (int p = 0; p < parts; p++) {
        int64_t start = p * share, stop = start + share < tokens ? start + share : tokens;
        float *own = scratch + p * size;
        entries_of(at, x, n, grad, start, stop, own + at->entries, own);
    }
    for (int64_t k = 0; k < at->entries; k++) {
        float sum = scratch[k];
        for (int p = 1; p < parts; p++) sum += scratch[p * size + k];
        out[k] = sum;
    }
}

/* weight[index[k]] = base[k] + values[k], rounded once, to nearest even, as PyTorch does. */
void speft_write(void *weight, const int32_t *index, const void *base, const float *values, int64_t entries, int dtype) {
    if (dtype == F32) {
        for (int64_t k = 0; k < entries; k++) ((float *)weight)[index[k]] = ((const float *)base)[k] + values[k];
        return;
    }
    for (int64_t k = 0; k < entries; k++) {
        float sum = load(base, k, BF16) + values[k];
        uint32_t bits;
        memcpy(&bits, &sum, 4);
        bits = sum != sum ? 0x7fc0u : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        ((uint16_t *)weight)[index[k]] = (uint16_t)bits;
    }
}

/* The k entries of grad_y^T x on a CPU, and the k writes of base + values: loops that PyTorch has no operator for.
 *
 * Plain C with vector extensions (GCC, Clang); built by native.py at first use, never required. native_turn.h forms blocks of x^T
 * and grad_y^T, native_pairs.h does in pairs of bf16 what this file does in fp32, native_changes.h reads and writes entries.
 * Shape suffixes as in the Python files: T tokens, R rows with an entry, C columns with an entry, K kept entries.
 */
#include "native_changes.h"
#include "native_pairs.h"
#include "native_turn.h"

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
        add_sums(narrow(a0 + b0), narrow(a1 + b1), narrow(a2 + b2), narrow(a3 + b3), out + k);
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

/* Scratch of one part, in numbers: the sums, a block of x^T and one of grad_y^T with a row more than they have, and the groups of
 * columns and rows with the number of groups of each ROWS rows. Each a multiple of a cache line. */
typedef struct {
    int64_t sums, columns, rows, groups, counts;
} shares;

static inline int64_t whole_lines(int64_t numbers) { return (numbers + 15) / 16 * 16; }

static shares shares_of(const layout *at) {
    int64_t rows = at->rows < ROWS ? at->rows : ROWS, group_numbers = sizeof(group) / sizeof(float);
    return (shares){whole_lines(at->entries), (at->columns + 1) * STRIDE, (rows + 1) * STRIDE,
                    whole_lines((at->columns + at->rows) * group_numbers), whole_lines(at->rows / ROWS + 1)};
}

static int64_t total_of(shares s) { return s.sums + s.columns + s.rows + s.groups + s.counts; }

/* Sums over the tokens from `start` to `stop`, at the beginning of `own`. blocks: where those of x^T are, one after the other, or
 * NULL; fill: whether they must be made. */
static void entries_of(const layout *at, const factor *x, int n, const factor *grad, int64_t start, int64_t stop, float *own,
                       float *blocks, int64_t fill) {
    shares s = shares_of(at);
    float *out = own, *x_CT = blocks ? blocks : own + s.sums, *grad_BT = own + s.sums + s.columns;
    group *of_columns = (group *)(grad_BT + s.rows), *of_rows = of_columns + at->columns;
    int32_t *counts = (int32_t *)(grad_BT + s.rows + s.groups);
    int pairs = in_pairs(x, n, grad), step = pairs ? 2 * TOKENS : TOKENS;
    chosen columns = {at->column, of_columns, at->columns, 0, at->inputs};
    if (fill) columns.many = groups_of(at->column, at->columns, at->inputs, of_columns);
    for (int64_t r = 0; r < at->rows; r += ROWS)
        counts[r / ROWS] = (int32_t)groups_of(at->row + r, at->rows - r < ROWS ? at->rows - r : ROWS, at->outputs, of_rows + r);
    memset(out, 0, at->entries * sizeof(float));
    for (; start < stop; start += step, x_CT += blocks ? s.columns : 0) {
        int count = stop - start < step ? (int)(stop - start) : step, numbers = numbers_of(count);
        if (fill && pairs) transpose_pairs(x, n, start, count, &columns, x_CT);
        else if (fill) transpose(x, n, start, count, &columns, x_CT);
        for (int64_t r = 0; r < at->rows; r += ROWS) {
            chosen rows = {at->row + r, of_rows + r, at->rows - r < ROWS ? at->rows - r : ROWS, counts[r / ROWS], at->outputs};
            if (pairs) transpose_pairs(grad, 1, start, count, &rows, grad_BT);
            else transpose(grad, 1, start, count, &rows, grad_BT);
            for (int64_t b = 0; b < rows.wide; b++) {
                int64_t k = at->first[r + b], entries = at->first[r + b + 1] - k;
                const float *grad_T = grad_BT + b * STRIDE;
                if (pairs) row_pairs(grad_T, x_CT, at->place + k, entries, numbers, out + k);
                else row_entries(grad_T, x_CT, at->place + k, entries, out + k);
            }
        }
    }
}

/* Bytes of scratch that `speft_entries` needs for this many parts. */
int64_t speft_scratch(const layout *at, int64_t parts) {
    return (parts * total_of(shares_of(at)) + 16) * (int64_t)sizeof(float);
}

/* Numbers of a part's blocks of x^T, for as many tokens. */
static int64_t blocks_of(const layout *at, const factor *x, int n, const factor *grad, int64_t share) {
    int64_t step = in_pairs(x, n, grad) ? 2 * TOKENS : TOKENS;
    return (share + step - 1) / step * shares_of(at).columns;
}

static inline float *line_of(void *memory) { return (float *)(((uintptr_t)memory + 63) & ~(uintptr_t)63); }

/* Bytes that hold the blocks of x^T for all tokens, so that other layers that read x find them. */
int64_t speft_blocks(const layout *at, const factor *x, int64_t n, const factor *grad, int64_t tokens, int64_t parts) {
    return (parts * blocks_of(at, x, n, grad, (tokens + parts - 1) / parts) + 16) * (int64_t)sizeof(float);
}

/* out[K] = the entries of grad^T x; the tokens are split into `parts`, one thread each, whose sums are added in order. `blocks`:
 * NULL, or memory for those of x^T, which holds them already unless `fill`. */
void speft_entries(const layout *at, const factor *x, int64_t n, const factor *grad, int64_t tokens, int64_t parts,
                   float *scratch, float *out, float *blocks, int64_t fill) {
    int64_t size = total_of(shares_of(at)), share = (tokens + parts - 1) / parts;
    int64_t shared = blocks ? blocks_of(at, x, n, grad, share) : 0;
    scratch = line_of(scratch);
    if (blocks) blocks = line_of(blocks);
#pragma omp parallel for schedule(static, 1) num_threads(parts)
    for (int p = 0; p < parts; p++) {
        int64_t start = p * share, stop = start + share < tokens ? start + share : tokens;
        entries_of(at, x, n, grad, start, stop, scratch + p * size, blocks ? blocks + p * shared : NULL, fill);
    }
    for (int64_t k = 0; k < at->entries; k++) {
        float sum = scratch[k];
        for (int p = 1; p < parts; p++) sum += scratch[p * size + k];
        out[k] = sum;
    }
}

/* What the callers in native.py expect of this file; they refuse another. */
int32_t speft_abi(void) { return 6; }

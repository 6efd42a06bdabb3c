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

/* blocks: where those of x^T are, one after the other, or NULL; fill: whether they must be made. */
static void entries_of(const layout *at, const factor *x, int n, const factor *grad, int64_t start, int64_t stop, float *block,
                       float *blocks, int64_t fill, float *out) {
    float *x_CT = blocks ? blocks : block, *grad_BT = block + at->columns * STRIDE;
    int pairs = in_pairs(x, n, grad), step = pairs ? 2 * TOKENS : TOKENS;
    memset(out, 0, at->entries * sizeof(float));
    for (; start < stop; start += step, x_CT += blocks ? at->columns * STRIDE : 0) {
        int count = stop - start < step ? (int)(stop - start) : step, numbers = numbers_of(count);
        if (fill && pairs) transpose_pairs(x, n, start, count, at->column, at->columns, at->inputs, x_CT);
        else if (fill) transpose(x, n, start, count, at->column, at->columns, at->inputs, x_CT);
        for (int64_t r = 0; r < at->rows; r += ROWS) {
            int64_t wide = at->rows - r < ROWS ? at->rows - r : ROWS;
            if (pairs) transpose_pairs(grad, 1, start, count, at->row + r, wide, at->outputs, grad_BT);
            else transpose(grad, 1, start, count, at->row + r, wide, at->outputs, grad_BT);
            for (int64_t b = 0; b < wide; b++) {
                int64_t k = at->first[r + b], entries = at->first[r + b + 1] - k;
                const float *grad_T = grad_BT + b * STRIDE;
                if (pairs) row_pairs(grad_T, x_CT, at->place + k, entries, numbers, out + k);
                else row_entries(grad_T, x_CT, at->place + k, entries, out + k);
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
int64_t speft_scratch(const layout *at, int64_t parts) {
    return (parts * share_of(at) + 16) * (int64_t)sizeof(float);
}

/* Numbers of a part's blocks of x^T, for as many tokens. */
static int64_t blocks_of(const layout *at, const factor *x, int n, const factor *grad, int64_t share) {
    int64_t step = in_pairs(x, n, grad) ? 2 * TOKENS : TOKENS;
    return (share + step - 1) / step * at->columns * STRIDE;
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
    int64_t size = share_of(at), sums = (at->entries + 15) / 16 * 16, share = (tokens + parts - 1) / parts;
    int64_t shared = blocks ? blocks_of(at, x, n, grad, share) : 0;
    scratch = line_of(scratch);
    if (blocks) blocks = line_of(blocks);
#pragma omp parallel for schedule(static, 1) num_threads(parts)
    for (int p = 0; p < parts; p++) {
        int64_t start = p * share, stop = start + share < tokens ? start + share : tokens;
        float *own = scratch + p * size;
        entries_of(at, x, n, grad, start, stop, own + sums, blocks ? blocks + p * shared : NULL, fill, own);
    }
    for (int64_t k = 0; k < at->entries; k++) {
        float sum = scratch[k];
        for (int p = 1; p < parts; p++) sum += scratch[p * size + k];
        out[k] = sum;
    }
}

/* What the callers in native.py expect of this file; they refuse another. */
int32_t speft_abi(void) { return 5; }

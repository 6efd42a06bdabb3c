/* Reading and writing entries of weights, of many at once. */
#pragma once
#include "native_turn.h"

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
static int64_t each(share *work, const change *all, int64_t count, int64_t threads) {
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

int64_t speft_take(const change *all, int64_t count, int64_t threads) { return each(take, all, count, threads); }
int64_t speft_put(const change *all, int64_t count, int64_t threads) { return each(put, all, count, threads); }
int64_t speft_add(const change *all, int64_t count, int64_t threads) { return each(add, all, count, threads); }

/* Linear maps with quantized blocks, GGUF's and one more, as weights, in float32, for CPUs with AVX2 or AVX-512.

Used by quantized.py, compiled by c_library.py for the machine it runs on. A weight [outputs, inputs] is packed into
units: LANES outputs x 32 inputs, their scales first (float16, one a lane), minima or zero points, then their values, so
that a vector is the same input of LANES outputs. Weights become float32 in registers, bit for bit those of GGUF's definition; for more than
FEW rows they go through a panel that stays in the first-level cache.
Invariant: an output is one chain of fused multiply-adds over the inputs in their order, whatever the number of rows:
a row's result does not depend on the batch that it is in, nor on the threads.
*/
#include "cpu_kernels.h"

#define GROUP 32  /* inputs that share a scale */
#define DEPTH 128 /* inputs of a panel */
#define PANEL 2   /* vectors of outputs of a panel */
#if LANES == 16
#define FEW 10    /* rows for which weights are used as they leave the registers */
#define TOKENS 14 /* rows that a panel is multiplied with at a time */
/* Vectors of outputs at a time for FEW rows: what the registers hold. */
#define WIDTH(rows) (rows < FEW / 2 - 1 ? 4 : 2)
#else
#define FEW 8
#define TOKENS 6
#define WIDTH(rows) (rows > FEW / 2 ? 1 : 2)
#endif

enum kind { Q4_0, Q4_1, Q8_0, Q4_Z }; /* as quantized.KINDS; kernels are compiled for 4 and 8 bits */

#if LANES == 16
INLINE vec halves(const uint8_t *p) { return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
INLINE ivec nibbles(const uint8_t *p) { return (ivec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p)); }
INLINE ivec bytes(const uint8_t *p) { return (ivec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)); }
#else
INLINE vec halves(const uint8_t *p) { return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
INLINE ivec nibbles(const uint8_t *p) { return (ivec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p)); }
INLINE ivec bytes(const uint8_t *p) { return (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)); }
#endif

INLINE long unit_bytes(enum kind kind) {
    return LANES * (kind == Q4_0 ? 18 : kind == Q4_1 ? 20 : kind == Q4_Z ? 19 : 34);
}

struct group {
    vec scale, offset;
    const uint8_t *values;
};

INLINE struct group open_group(int bits, enum kind kind, const uint8_t *unit) {
    struct group g = {halves(unit), {0}, unit + 2 * LANES};
    if (bits == 4 && kind == Q4_0) g.offset = g.scale * -8.0f;
    if (bits == 4 && kind == Q4_1) {
        g.offset = halves(unit + 2 * LANES);
        g.values += 2 * LANES;
    }
    if (bits == 4 && kind == Q4_Z) { /* exact: 11 bits times 8 */
        g.offset = g.scale * -floats(nibbles(unit + 2 * LANES));
        g.values += LANES;
    }
    return g;
}

/* The weights of inputs 2 * j and 2 * j + 1 of a group. */
INLINE void weights(int bits, struct group g, int j, vec *even, vec *odd) {
    if (bits == 8) {
        *even = g.scale * floats(bytes(g.values + 2 * j * LANES));
        *odd = g.scale * floats(bytes(g.values + (2 * j + 1) * LANES));
    } else {
        ivec both = nibbles(g.values + j * LANES);
        *even = g.scale * floats(both & 15) + g.offset;
        *odd = g.scale * floats(both >> 4) + g.offset;
    }
}

struct product {
    enum kind kind;
    const uint8_t *weight;
    const float *bias;
    long outputs, inputs;
    const float *x;
    long rows;
    float *y;
    long share; /* units of a task */
};

/* `width` units of outputs of `count` rows, which are FEW, from row `row` on. */
INLINE void few(int bits, int width, int count, const struct product *a, long unit, long row) {
    long inputs = a->inputs, groups = inputs / GROUP, size = unit_bytes(a->kind);
    const uint8_t *w = a->weight + unit * groups * size;
    const float *x = a->x + row * inputs;
    vec sums[FEW][4];
    for (int c = 0; c < count; c++)
        for (int r = 0; r < width; r++) sums[c][r] = (vec){0};
    for (long g = 0; g < groups; g++, x += GROUP) {
        struct group opened[4];
        for (int r = 0; r < width; r++) opened[r] = open_group(bits, a->kind, w + (r * groups + g) * size);
#pragma GCC unroll 2
        for (int j = 0; j < GROUP / 2; j++)
            for (int r = 0; r < width; r++) {
                vec even, odd;
                weights(bits, opened[r], j, &even, &odd);
                for (int c = 0; c < count; c++) sums[c][r] = sums[c][r] + even * x[c * inputs + 2 * j];
                for (int c = 0; c < count; c++) sums[c][r] = sums[c][r] + odd * x[c * inputs + 2 * j + 1];
            }
    }
    for (int c = 0; c < count; c++)
        for (int r = 0; r < width; r++) store(a->y + (row + c) * a->outputs + (unit + r) * LANES, sums[c][r]);
}

/* A unit that is left over: row by row. */
INLINE void odd_unit(int bits, const struct product *a, long unit) {
    for (long row = 0; row < a->rows; row++) few(bits, 1, 1, a, unit, row);
}

/* panel [depth, PANEL * LANES] = weights from `w` on, of units `stride` bytes apart. */
INLINE void dequantise(int bits, enum kind kind, const uint8_t *w, long stride, int depth, float *panel) {
    for (int r = 0; r < PANEL; r++)
        for (int g = 0; g < depth / GROUP; g++) {
            struct group opened = open_group(bits, kind, w + r * stride + g * unit_bytes(kind));
            for (int j = 0; j < GROUP / 2; j++) {
                float *to = panel + ((g * GROUP + 2 * j) * PANEL + r) * LANES;
                weights(bits, opened, j, (vec *)to, (vec *)(to + PANEL * LANES));
            }
        }
}

/* y [count rows, PANEL * LANES] = x [count, depth] times the panel, or that more; rows `inputs` and `outputs` apart. */
INLINE void tile(int count, const float *panel, int depth, int more, const float *x, long inputs, float *y,
                 long outputs) {
    vec sums[TOKENS][PANEL];
    for (int c = 0; c < count; c++)
        for (int r = 0; r < PANEL; r++) sums[c][r] = more ? load(y + c * outputs + r * LANES) : (vec){0};
    for (int i = 0; i < depth; i++) {
        vec w[PANEL];
        for (int r = 0; r < PANEL; r++) w[r] = load(panel + (i * PANEL + r) * LANES);
        for (int c = 0; c < count; c++)
            for (int r = 0; r < PANEL; r++) sums[c][r] = sums[c][r] + w[r] * x[c * inputs + i];
    }
    for (int c = 0; c < count; c++)
        for (int r = 0; r < PANEL; r++) store(y + c * outputs + r * LANES, sums[c][r]);
}

/* The same for more than FEW rows, in tiles of about one size, between TOKENS / 2 and TOKENS. */
__attribute__((noinline)) static void tiles(const float *panel, int depth, int more, const float *x, long inputs,
                                            long rows, float *y, long outputs) {
    for (long left = (rows + TOKENS - 1) / TOKENS; left > 0; left--) {
        int count = (rows + left - 1) / left;
#define COUNT(n) \
    case n: \
        if (n >= TOKENS / 2 && n <= TOKENS) tile(n, panel, depth, more, x, inputs, y, outputs); \
        break;
        switch (count) {
            COUNT(3) COUNT(4) COUNT(5) COUNT(6) COUNT(7) COUNT(8) COUNT(9) COUNT(10) COUNT(11) COUNT(12) COUNT(13)
            COUNT(14)
        }
#undef COUNT
        rows -= count, x += count * inputs, y += count * outputs;
    }
}

/* Units [from, to) of all rows, which are FEW. */
INLINE void few_share(int bits, int count, const struct product *a, long from, long to) {
    int width = WIDTH(count);
    for (; from + width <= to; from += width) few(bits, width, count, a, from, 0);
    for (; from < to; from++) odd_unit(bits, a, from);
}

/* The same for many. */
INLINE void many_share(int bits, const struct product *a, long from, long to) {
    float panel[DEPTH * PANEL * LANES] __attribute__((aligned(64)));
    long size = unit_bytes(a->kind), stride = a->inputs / GROUP * size;
    for (; from + PANEL <= to; from += PANEL)
        for (long at = 0; at < a->inputs; at += DEPTH) {
            int depth = a->inputs - at < DEPTH ? a->inputs - at : DEPTH;
            dequantise(bits, a->kind, a->weight + from * stride + at / GROUP * size, stride, depth, panel);
            float *y = a->y + from * LANES;
            tiles(panel, depth, at > 0, a->x + at, a->inputs, a->rows, y, a->outputs);
        }
    for (; from < to; from++) odd_unit(bits, a, from);
}

INLINE void shares(int bits, const struct product *a, long from, long to) {
#define ROWS(n) \
    case n: \
        if (n <= FEW) few_share(bits, n, a, from, to); \
        else many_share(bits, a, from, to); \
        break;
    switch (a->rows < FEW ? a->rows : FEW + (a->rows > FEW)) {
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11)
    }
#undef ROWS
}

static void product_task(void *data, long i) {
    const struct product *a = data;
    long units = a->outputs / LANES, from = i * a->share, to = from + a->share < units ? from + a->share : units;
    if (a->kind == Q8_0) shares(8, a, from, to);
    else shares(4, a, from, to);
    for (long row = 0; a->bias && row < a->rows; row++)
        for (long i = from * LANES; i < to * LANES; i += LANES)
            store(a->y + row * a->outputs + i, load(a->y + row * a->outputs + i) + load(a->bias + i));
}

/* How many outputs a unit holds: what the packing must know. */
int lanes(void) { return LANES; }

void linear(const struct map *map, const float *x, long rows, float *y, int threads) {
    long units = map->outputs / LANES, share = units / (threads * 6L) / 4 * 4;
    if (share < 4) share = 4;
    struct product a = {map->kind, map->weight, map->bias, map->outputs, map->inputs, x, rows, y, share};
    parallel(product_task, &a, (units + share - 1) / share, threads);
}

/* Linear maps in float32, for CPUs with AVX2 or AVX-512: their tasks. What a task computes is in dense_kernels.c, where
weights have 16 or 32 bits, in matrix_kernels.c, where they are bfloat16 on CPUs with AMX, in pair_kernels.c, where inputs
are rounded to bfloat16 as well, and in block_kernels.c, where they are quantized blocks.

Used by quantized.py and cpu_decoder.c. A weight [outputs, inputs] is packed into units: LANES outputs x 32 inputs.
Invariant: a row's result does not depend on the batch that it is in, nor on the threads.
*/
#include "linear.h"

#define MOST_WIDTH 4 /* units side by side */

/* sums [rows, width, LANES] of a block, its bias added. */
static void sums_of(const struct product *a, struct block b, float *sums) {
    for (long i = 0; i < b.rows * b.width; i++) store(sums + i * LANES, (vec){0});
    a->way->sums(a, b, sums);
    for (long i = 0; a->bias && i < b.rows * b.width; i++)
        store(sums + i * LANES, load(sums + i * LANES) + load(a->bias + (b.unit + i % b.width) * LANES));
}

static void block(const struct product *a, struct block b) {
    float sums[BLOCK * MOST_WIDTH * LANES] __attribute__((aligned(LINE)));
    sums_of(a, b, sums);
    for (long c = 0; c < b.rows; c++)
        for (int r = 0; r < b.width; r++)
            store(a->y + (b.row + c) * a->outputs + (b.unit + r) * LANES, load(sums + (c * b.width + r) * LANES));
}

/* Whether a block of a gated product is whole groups of its reader's inputs. */
INLINE int whole_groups(const struct product *a) {
    return a->width * LANES % GROUP == 0 && a->outputs / LANES % a->width == 0;
}

/* Gates and, half a product further, what they gate: a->outputs numbers of a row in all. */
static void gated_block(const struct product *a, struct block b) {
    float gates[BLOCK * MOST_WIDTH * LANES] __attribute__((aligned(LINE)));
    float sums[BLOCK * MOST_WIDTH * LANES] __attribute__((aligned(LINE)));
    long half = a->outputs / LANES, coming = b.coming;
    b.coming = half;
    sums_of(a, b, gates);
    b.unit += half, b.coming = coming - half;
    sums_of(a, b, sums);
    long from = (b.unit - half) * LANES, to = from + b.width * LANES;
    for (long c = 0; c < b.rows; c++) {
        float *y = a->y + (b.row + c) * a->outputs;
        for (int r = 0; r < b.width; r++) {
            long i = (c * b.width + r) * LANES;
            store(y + from + r * LANES, silu(load(gates + i)) * load(sums + i));
        }
        if (whole_groups(a)) pack(a->reader, y, b.row + c, a->rows, from, to, a->read);
    }
}

static void product_task(void *data, long i) {
    const struct product *a = data;
    long units = a->outputs / LANES, from = (a->tasks - 1 - i) * a->share; /* the last task is taken first */
    long to = from + a->share < units ? from + a->share : units;
    for (long row = 0; row < a->rows; row += BLOCK) {
        long rows = a->rows - row < BLOCK ? a->rows - row : BLOCK, unit = from;
        for (int width; unit < to; unit += width) {
            width = unit + a->width <= to ? a->width : 1;
            struct block b = {width, unit, unit + width < to ? width : width + a->away, row, rows};
            if (a->reader) gated_block(a, b);
            else block(a, b);
        }
    }
}

/* How many outputs a unit holds: what the packing must know. */
int lanes(void) { return LANES; }

static const struct way *way_of(enum kind kind) {
    static const struct way blocks = {pack_blocks, blocks_width, blocks_sums, 2048};
    static const struct way dense = {pack_dense, dense_width, dense_sums, 8192};
    static const struct way pairs = {pack_pairs, pairs_width, pairs_sums, 8192};
    static const struct way matrices = {pack_matrices, matrices_width, matrices_sums, 8192};
    if (kind < F32) return &blocks;
    if ((kind == BF16 || kind == ROUNDED) && has_matrices()) return &matrices;
    return kind == ROUNDED ? &pairs : &dense;
}

/* One row of weights that are not rounded is read as it is. */
INLINE int reads_itself(const struct map *map, long rows) { return rows < 2 && way_of(map->kind)->pack == pack_dense; }

void pack(const struct map *map, const float *x, long row, long rows, long from, long to, float *packed) {
    if (!reads_itself(map, rows)) way_of(map->kind)->pack(map->kind, x, row, rows, map->inputs, from, to, packed);
}

struct packing {
    const struct map *map;
    const float *x;
    long rows;
    float *packed;
};

static void pack_task(void *data, long row) {
    const struct packing *a = data;
    pack(a->map, a->x + row * a->map->inputs, row, a->rows, 0, a->map->inputs, a->packed);
}

int packers(const struct map *map, long rows, int threads) {
    return rows * map->inputs < way_of(map->kind)->alone ? 1 : threads;
}

void pack_rows(const struct map *map, const float *x, long rows, float *packed, int threads) {
    struct packing p = {map, x, rows, packed};
    if (!reads_itself(map, rows)) parallel(pack_task, &p, rows, packers(map, rows, threads));
}

/* `outputs` of a row in all, of which a task has so many units side by side. */
static struct product product_of(const struct map *map, const float *x, long rows, const float *packed, float *y,
                                 long outputs, const struct ahead *ahead, int threads) {
    struct product a = {map->kind, map->weight, map->bias, outputs, map->inputs, .rows = rows, .y = y, .ahead = ahead};
    long units = outputs / LANES;
    a.way = way_of(a.kind), a.width = a.way->width(a.kind, rows);
    a.share = units / (threads * 16L) / a.width * a.width;
    if (a.share < a.width) a.share = a.width;
    a.away = a.share * (threads - 1);
    a.tasks = (units + a.share - 1) / a.share;
    a.x = reads_itself(map, rows) ? x : packed;
    return a;
}

void multiply(const struct map *map, const float *x, long rows, const float *packed, float *y, const struct ahead *ahead,
              int threads) {
    struct product a = product_of(map, x, rows, packed, y, map->outputs, ahead, threads);
    parallel(product_task, &a, a.tasks, threads);
}

void linear(const struct map *map, const float *x, long rows, float *packed, float *y, const struct ahead *ahead,
            int threads) {
    pack_rows(map, x, rows, packed, threads);
    multiply(map, x, rows, packed, y, ahead, threads);
    rest();
}

void gated(const struct map *map, const float *x, long rows, const float *packed, float *y, const struct map *reader,
           float *read, const struct ahead *ahead, int threads) {
    struct product a = product_of(map, x, rows, packed, y, map->outputs / 2, ahead, threads);
    a.reader = reader, a.read = read;
    parallel(product_task, &a, a.tasks, threads);
    if (!whole_groups(&a)) pack_rows(reader, y, rows, read, threads);
}

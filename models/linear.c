/* Linear maps in float32, for CPUs with AVX2 or AVX-512: their tasks. What a task computes is in dense_kernels.c, where
weights have 16 or 32 bits, in matrix_kernels.c, where they are bfloat16 on CPUs with AMX, in pair_kernels.c, where inputs
are rounded to bfloat16 as well, and in block_kernels.c, where they are quantized blocks.

Used by quantized.py and cpu_decoder.c. A weight [outputs, inputs] is packed into units: LANES outputs x 32 inputs.
Invariant: a row's result does not depend on the batch that it is in, nor on the threads.
*/
#include "linear.h"

#define MOST_WIDTH 4 /* units side by side */

static void block(const struct product *a, struct block b) {
    float sums[BLOCK * MOST_WIDTH * LANES] __attribute__((aligned(LINE)));
    for (long i = 0; i < b.rows * b.width; i++) store(sums + i * LANES, (vec){0});
    a->sums(a, b, sums);
    for (long c = 0; c < b.rows; c++)
        for (int r = 0; r < b.width; r++) {
            vec s = load(sums + (c * b.width + r) * LANES);
            if (a->bias) s = s + load(a->bias + (b.unit + r) * LANES);
            store(a->y + (b.row + c) * a->outputs + (b.unit + r) * LANES, s);
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
            block(a, (struct block){width, unit, unit + width < to ? width : width + a->away, row, rows});
        }
    }
}

/* How many outputs a unit holds: what the packing must know. */
int lanes(void) { return LANES; }

/* How a kind is multiplied. */
struct way {
    pack_function *pack;
    width_function *width;
    sums_function *sums;
};

static struct way way_of(enum kind kind) {
    if (kind < F32) return (struct way){pack_blocks, blocks_width, blocks_sums};
    if ((kind == BF16 || kind == ROUNDED) && has_matrices())
        return (struct way){pack_matrices, matrices_width, matrices_sums};
    if (kind == ROUNDED) return (struct way){pack_pairs, pairs_width, pairs_sums};
    return (struct way){pack_dense, dense_width, dense_sums};
}

void linear(const struct map *map, const float *x, long rows, float *packed, float *y, const struct ahead *ahead,
            int threads) {
    struct product a = {map->kind, map->weight, map->bias, map->outputs, map->inputs, .rows = rows, .y = y};
    struct way way = way_of(a.kind);
    long units = map->outputs / LANES;
    a.ahead = ahead, a.sums = way.sums, a.width = way.width(a.kind, rows);
    a.share = units / (threads * 16L) / a.width * a.width;
    if (a.share < a.width) a.share = a.width;
    a.away = a.share * (threads - 1);
    a.tasks = (units + a.share - 1) / a.share;
    a.x = way.pack(a.kind, x, rows, map->inputs, packed, threads);
    parallel(product_task, &a, a.tasks, threads);
}

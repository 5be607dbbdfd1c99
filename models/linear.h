/* What linear.c and its kinds of kernels share. */
#include "cpu_kernels.h"

#define LINE 64   /* bytes of a cache */
#define GROUP 32  /* inputs that share a scale */
#define BLOCK 112 /* rows that are multiplied at a time */
#define CHUNK 16  /* inputs of a row that lie together where dense_kernels.c reads them */

enum kind { Q4_0, Q4_1, Q8_0, Q4_Z, Q4_K, K8, F32, F16, BF16, ROUNDED }; /* as quantized.KINDS, DENSE and ROUNDED */

/* `width` units from `unit` on of at most BLOCK rows from `row` on; the next units are `coming` from there. */
struct block {
    int width;
    long unit, coming, row, rows;
};

struct product {
    enum kind kind;
    const uint8_t *weight;
    const float *bias;
    long outputs, inputs;
    const float *x; /* packed */
    long rows;
    float *y;
    const struct ahead *ahead;
    const struct way *way;
    const struct map *reader; /* a gated product's: what reads y next, and where its inputs go */
    float *read;
    int width;               /* units side by side */
    long tasks, share, away; /* units of a task, and from its end to the one that its thread is likely to have next */
};

/* What is left of a part of `ahead`. */
struct pieces {
    const char *base;
    const int64_t *next, *end;
    long bytes;
};

/* Ask for an equal part of it, `times` of which are left. */
INLINE void fetch(struct pieces *a, long times) {
    for (long due = (a->end - a->next + times - 1) / times; due > 0; due--, a->next++)
        for (long at = 0; at < a->bytes; at += LINE) __builtin_prefetch(a->base + *a->next * a->bytes + at, 0, 2);
}

/* The part of `ahead` that goes with units [from, to). */
INLINE struct pieces pieces_of(const struct product *a, long from, long to) {
    const struct ahead *all = a->ahead;
    if (!all) return (struct pieces){NULL, NULL, NULL, 0};
    long units = (a->reader ? 2 : 1) * a->outputs / LANES;
    long first = all->count * from / units, last = all->count * to / units;
    return (struct pieces){all->base, all->pieces + first, all->pieces + last, all->bytes};
}

/* Memory that comes next, asked for `step` bytes at a time. */
struct coming {
    const char *next, *end;
    long step;
};

INLINE void ask(struct coming *a) {
    const char *to = a->end - a->next < a->step ? a->end : a->next + a->step;
    for (; a->next < to; a->next += LINE) __builtin_prefetch(a->next, 0, 2);
}

/* What comes while a block is multiplied, asked for so many `times`: the units after it, of `unit` bytes each. */
INLINE struct coming coming_after(const struct product *a, struct block b, long unit, long times) {
    const char *next = (const char *)a->weight + (b.unit + b.coming) * unit;
    return (struct coming){next, next + b.width * unit, (b.width * unit / LINE + times - 1) / times * LINE};
}

/* A row as its product reads it: its numbers [from, to) at x + from go into `packed`, one and a half times as large as
x [rows, inputs]. Whole groups. */
typedef void pack_function(enum kind kind, const float *x, long row, long rows, long inputs, long from, long to,
                           float *packed);
/* Units that are multiplied side by side. */
typedef int width_function(enum kind kind, long rows);
/* sums [rows, width, LANES] of a block, zeros before. */
typedef void sums_function(const struct product *a, struct block b, float *sums);

/* How a kind is multiplied: dense_kernels.c's, block_kernels.c's, pair_kernels.c's (ROUNDED) and, for BF16 and ROUNDED
where the CPU has_matrices, matrix_kernels.c's. */
struct way {
    pack_function *pack;
    width_function *width;
    sums_function *sums;
    long alone; /* numbers that one thread has packed before another one has come */
};
pack_function pack_dense, pack_blocks, pack_pairs, pack_matrices;
width_function dense_width, blocks_width, pairs_width, matrices_width;
sums_function dense_sums, blocks_sums, pairs_sums, matrices_sums;
int has_matrices(void);
int has_pairs(void); /* two inputs at once */

/* Where pack_dense puts a row's first CHUNK inputs, and how far from there the next ones are. */
float *dense_place(enum kind kind, long row, long rows, long inputs, float *packed, long *step);

/* Of the next tile of `rows` that are left: tiles of at most so many are about as large as one another. */
INLINE int even_tile(long rows, int most) {
    long tiles = (rows + most - 1) / most;
    return (rows + tiles - 1) / tiles;
}

/* Rows that are packed together. */
struct span {
    long first, count;
};

/* Those of BLOCK rows that a row is one of. */
INLINE struct span block_of(long row, long rows) {
    long first = row / BLOCK * BLOCK;
    return (struct span){first, rows - first < BLOCK ? rows - first : BLOCK};
}

/* Its tile among them, the first of which has `count` rows and the others have at most `most`. */
INLINE struct span tile_of(long row, struct span block, long count, int most) {
    struct span tile = {block.first, count};
    for (long left = block.count; row - tile.first >= tile.count; tile.count = even_tile(left, most))
        tile.first += tile.count, left -= tile.count;
    return tile;
}

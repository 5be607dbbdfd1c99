/* Linear maps with quantized blocks, GGUF's and one more, as weights, in float32, for CPUs with AVX2 or AVX-512.

Used by quantized.py, compiled by c_library.py for the machine it runs on. A weight [outputs, inputs] is packed into
units: LANES outputs x 32 inputs, their scales first (float16, one a lane), minima or zero points, then their values, so
that a vector is the same input of LANES outputs. Weights become float32 in registers, bit for bit those of GGUF's definition; for more than
FEW rows they go through a panel that stays in the first-level cache.
Invariant: an output is one chain of fused multiply-adds over the inputs in their order, whatever the number of rows:
a row's result does not depend on the batch that it is in, nor on the threads.
*/
#include "cpu_kernels.h"

#define LINE 64    /* bytes of a cache */
#define GROUP 32  /* inputs that share a scale */
#define CHUNK 16  /* inputs of a row that lie together once x is packed */
#define DEPTH 576 /* inputs of a panel, which stays in the second-level cache */
#define BLOCK 112 /* rows that a panel is made for */
/* What the registers hold: units side by side, rows beside those whose weights go into a panel on their way, rows beside
those from a panel, rows that need no panel, rows of any tile, and how many units these have side by side. */
#if LANES == 16
#define PANEL 3
#define FIRST 7
#define NEXT 9
#define FEW 8
#define MOST 9
#define WIDTH(rows) PANEL
#else
#define PANEL 3
#define FIRST 4
#define NEXT 6
#define FEW 6
#define MOST 6
/* One row waits for its sums, and three of them hide more of that. */
#define WIDTH(rows) (rows == 1 ? 3 : rows > 4 && rows <= FEW ? 1 : 2)
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

/* The weights of inputs 2 * j and 2 * j + 1 of a group, and what both are made of. */
INLINE ivec pair(int bits, struct group g, int j) {
    return bits == 8 ? bytes(g.values + 2 * j * LANES) : nibbles(g.values + j * LANES);
}
INLINE vec even(int bits, struct group g, ivec pair) {
    return bits == 8 ? g.scale * floats(pair) : g.scale * floats(pair & 15) + g.offset;
}
INLINE vec odd(int bits, struct group g, int j, ivec pair) {
    if (bits == 8) return g.scale * floats(bytes(g.values + (2 * j + 1) * LANES));
    return g.scale * floats(pair >> 4) + g.offset;
}

struct product {
    enum kind kind;
    const uint8_t *weight;
    const float *bias;
    long outputs, inputs;
    const float *x; /* packed */
    long rows;
    float *y;
    const struct ahead *ahead;
    int width;               /* units side by side */
    long tasks, share, away; /* units of a task, and from its end to the one that its thread is likely to have next */
};

/* Rows of the first tile of `rows`. */
INLINE int first_rows(long rows) {
    if (rows <= FEW) return rows;
    long tiles = 1 + (rows - FIRST + NEXT - 1) / NEXT;
#if LANES == 16
    return rows / tiles < FIRST ? rows / tiles : FIRST;
#else /* what the others cannot take, for a row costs more here; but fewer than three would wait for their sums */
    long rest = rows - (tiles - 1) * NEXT;
    return rest < 3 ? 3 : rest;
#endif
}

/* Rows of the next tile of `rows` that are left. */
INLINE int next_rows(long rows) {
    long tiles = (rows + NEXT - 1) / NEXT;
    return (rows + tiles - 1) / tiles;
}

struct packing {
    const float *x;
    long rows, inputs;
    float *packed;
};

/* packed [inputs / CHUNK, count, CHUNK] = x [count, inputs]: what a step of the product reads lies together. */
INLINE void pack_tile(const struct packing *a, long from, int count) {
    const float *x = a->x + from * a->inputs;
    float *to = a->packed + from * a->inputs;
    for (long i = 0; i < a->inputs; i += CHUNK)
        for (int c = 0; c < count; c++, to += CHUNK)
            for (int k = 0; k < CHUNK; k += LANES) store(to + k, load(x + c * a->inputs + i + k));
}

/* BLOCK rows, in their tiles. */
static void pack_task(void *data, long i) {
    const struct packing *a = data;
    long from = i * BLOCK, left = a->rows - from < BLOCK ? a->rows - from : BLOCK;
    int count = first_rows(left);
    pack_tile(a, from, count);
    while (left -= count) {
        from += count;
        pack_tile(a, from, count = next_rows(left));
    }
}

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

/* sums [count, width, LANES] += x * weight: `width` units, `stride` bytes apart, from `w` on, of `depth` inputs of a
packed tile of `count` rows. With `keeps` the weights are left in the panel [depth, width, LANES]. `coming` bytes after
these units are those that are wanted next. */
INLINE void first_tile(int bits, int width, int count, int keeps, enum kind kind, const uint8_t *w, long stride,
                       long coming, long depth, const float *x, float *sums, float *panel, struct pieces *ahead) {
    vec s[MOST][PANEL];
    for (int c = 0; c < count; c++)
        for (int r = 0; r < width; r++) s[c][r] = load(sums + (c * width + r) * LANES);
    for (; depth > 0; depth -= GROUP, w += unit_bytes(kind)) {
        struct group g[PANEL];
        fetch(ahead, depth / GROUP);
        for (int r = 0; r < width; r++) {
            g[r] = open_group(bits, kind, w + r * stride);
            for (int at = 0; at < unit_bytes(kind); at += LINE) /* into the second level */
                __builtin_prefetch(w + coming + r * stride + at, 0, 2);
        }
        for (int half = 0; half < GROUP / 2; half += CHUNK / 2, x += count * CHUNK)
            for (int j = 0; j < CHUNK / 2; j++) {
                vec e[PANEL], o[PANEL];
                for (int r = 0; r < width; r++) {
                    ivec both = pair(bits, g[r], half + j);
                    e[r] = even(bits, g[r], both), o[r] = odd(bits, g[r], half + j, both);
                }
                for (int c = 0; c < count; c++)
                    for (int r = 0; r < width; r++) s[c][r] = s[c][r] + e[r] * x[c * CHUNK + 2 * j];
                for (int c = 0; c < count; c++)
                    for (int r = 0; r < width; r++) s[c][r] = s[c][r] + o[r] * x[c * CHUNK + 2 * j + 1];
                for (int r = 0; keeps && r < width; r++) store(panel + r * LANES, e[r]), store(panel + (width + r) * LANES, o[r]);
                panel += 2 * width * LANES;
            }
    }
    for (int c = 0; c < count; c++)
        for (int r = 0; r < width; r++) store(sums + (c * width + r) * LANES, s[c][r]);
}

/* In a register: gcc would rather read it again for each row. */
INLINE vec kept(vec v) {
    asm("" : "+v"(v));
    return v;
}

/* The same with the weights of a panel. */
INLINE void next_tile(int width, int count, const float *panel, long depth, const float *x, float *sums) {
    vec s[MOST][PANEL];
    for (int c = 0; c < count; c++)
        for (int r = 0; r < width; r++) s[c][r] = load(sums + (c * width + r) * LANES);
    for (; depth > 0; depth -= CHUNK, x += count * CHUNK)
        for (int i = 0; i < CHUNK; i++, panel += width * LANES) {
            vec v[PANEL];
            for (int r = 0; r < width; r++) v[r] = kept(load(panel + r * LANES));
            for (int c = 0; c < count; c++)
                for (int r = 0; r < width; r++) s[c][r] = s[c][r] + v[r] * x[c * CHUNK + i];
        }
    for (int c = 0; c < count; c++)
        for (int r = 0; r < width; r++) store(sums + (c * width + r) * LANES, s[c][r]);
}

/* Both for each number of rows, as functions of their own: together gcc runs out of registers for them. */
typedef void first_function(enum kind, const uint8_t *, long, long, long, const float *, float *, float *, struct pieces *);
typedef void next_function(const float *, long, const float *, float *);
#define FIRST_TILE(count, bits, width, keeps) \
    static void first_##bits##_##width##_##keeps##_##count(enum kind kind, const uint8_t *w, long stride, \
                                                           long coming, long depth, const float *x, float *sums, \
                                                           float *panel, struct pieces *ahead) { \
        first_tile(bits, width, count, keeps, kind, w, stride, coming, depth, x, sums, panel, ahead); \
    }
#define NEXT_TILE(count, width) \
    static void next_##width##_##count(const float *panel, long depth, const float *x, float *sums) { \
        next_tile(width, count, panel, depth, x, sums); \
    }
#define FIRST_NAME(count, bits, width, keeps) \
    [bits == 8][width][keeps][count] = first_##bits##_##width##_##keeps##_##count,
#define NEXT_NAME(count, width) [width][count] = next_##width##_##count,
#define UP_TO_6(DO, ...) \
    DO(1, __VA_ARGS__) DO(2, __VA_ARGS__) DO(3, __VA_ARGS__) DO(4, __VA_ARGS__) DO(5, __VA_ARGS__) DO(6, __VA_ARGS__)
#if MOST == 9
#define COUNTS(DO, ...) \
    UP_TO_6(DO, __VA_ARGS__) DO(7, __VA_ARGS__) DO(8, __VA_ARGS__) DO(9, __VA_ARGS__)
#else
#define COUNTS UP_TO_6
#endif
#define FIRSTS(DO, width) \
    COUNTS(DO, 4, width, 0) COUNTS(DO, 4, width, 1) COUNTS(DO, 8, width, 0) COUNTS(DO, 8, width, 1)
#if LANES == 16
#define WIDTHS(ALL, DO) ALL(DO, 1) ALL(DO, 3)
#else
#define WIDTHS(ALL, DO) ALL(DO, 1) ALL(DO, 2) ALL(DO, 3)
#endif

WIDTHS(FIRSTS, FIRST_TILE)
WIDTHS(COUNTS, NEXT_TILE)
static first_function *const first_tiles[2][PANEL + 1][2][MOST + 1] = {WIDTHS(FIRSTS, FIRST_NAME)};
static next_function *const next_tiles[PANEL + 1][MOST + 1] = {WIDTHS(COUNTS, NEXT_NAME)};

/* The part of `ahead` that goes with units [from, to). */
static struct pieces pieces_of(const struct product *a, long from, long to) {
    const struct ahead *all = a->ahead;
    if (!all) return (struct pieces){NULL, NULL, NULL, 0};
    long units = a->outputs / LANES, first = all->count * from / units, last = all->count * to / units;
    return (struct pieces){all->base, all->pieces + first, all->pieces + last, all->bytes};
}

/* `width` units from `unit` on of at most BLOCK rows from `row` on; the next units are `coming` from there. */
static void block(const struct product *a, int width, long unit, long coming, long row, long rows) {
    float panel[DEPTH * PANEL * LANES] __attribute__((aligned(LINE)));
    float sums[BLOCK * PANEL * LANES] __attribute__((aligned(LINE)));
    long size = unit_bytes(a->kind), stride = a->inputs / GROUP * size, step = rows > FEW ? DEPTH : a->inputs;
    int first = first_rows(rows), wide = a->kind == Q8_0;
    struct pieces ahead = pieces_of(a, unit, unit + width);
    for (long i = 0; i < rows * width; i++) store(sums + i * LANES, (vec){0});
    for (long at = 0; at < a->inputs; at += step) {
        long depth = a->inputs - at < step ? a->inputs - at : step, done = first;
        const uint8_t *w = a->weight + unit * stride + at / GROUP * size;
        const float *x = a->x + row * a->inputs;
        first_tiles[wide][width][first < rows][first](a->kind, w, stride, coming * stride, depth, x + at * first, sums,
                                                      panel, &ahead);
        for (int count; done < rows; done += count) {
            count = next_rows(rows - done);
            next_tiles[width][count](panel, depth, x + done * a->inputs + at * count, sums + done * width * LANES);
        }
    }
    for (long c = 0; c < rows; c++)
        for (int r = 0; r < width; r++) {
            vec s = load(sums + (c * width + r) * LANES);
            if (a->bias) s = s + load(a->bias + (unit + r) * LANES);
            store(a->y + (row + c) * a->outputs + (unit + r) * LANES, s);
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
            block(a, width, unit, unit + width < to ? width : width + a->away, row, rows);
        }
    }
}

/* How many outputs a unit holds: what the packing must know. */
int lanes(void) { return LANES; }

/* x as the product reads it: itself for one row, else `packed`. */
static const float *pack(const float *x, long rows, long inputs, float *packed, int threads) {
    struct packing p = {x, rows, inputs, packed};
    if (rows < 2) return x;
    if (rows <= FEW) pack_tile(&p, 0, rows);
    else parallel(pack_task, &p, (rows + BLOCK - 1) / BLOCK, threads);
    return packed;
}

void linear(const struct map *map, const float *x, long rows, float *packed, float *y, const struct ahead *ahead,
            int threads) {
    struct product a = {map->kind, map->weight, map->bias, map->outputs, map->inputs, .rows = rows, .y = y};
    a.ahead = ahead;
    long units = map->outputs / LANES;
    a.width = WIDTH(rows);
    a.share = units / (threads * 16L) / a.width * a.width;
    if (a.share < a.width) a.share = a.width;
    a.away = a.share * (threads - 1);
    a.tasks = (units + a.share - 1) / a.share;
    a.x = pack(x, rows, map->inputs, packed, threads);
    parallel(product_task, &a, a.tasks, threads);
}

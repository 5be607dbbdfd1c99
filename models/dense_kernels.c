/* Sums of linear maps in float32 whose weights have 16 or 32 bits.

Used by linear.c. A unit is LANES outputs x 32 inputs, so that a vector is the same input of LANES outputs. Weights of
16 bits become float32 in registers, bit for bit; for more than FEW rows they go through a panel that stays in the
first-level cache. F32's are read in place of the panel.
Invariant: an output is one chain of fused multiply-adds over the inputs in their order, whatever the number of rows.
*/
#include "linear.h"

#define DEPTH 576 /* inputs of a panel, which stays in the second-level cache */
#define APART ((DEPTH + 2) * LANES) /* numbers from a panel's unit to the next: not whole pages, which share cache sets */
/* What the registers hold: units side by side, rows beside those whose weights go into a panel on their way, rows beside
those from a panel, rows that need no panel, rows of any tile, and how many units these have side by side. */
#if LANES == 16
#define PANEL 3
#define FIRST 7
#define NEXT 9
#define FEW 8
#define MOST 9
#define WIDTH(rows) PANEL
#define DENSE_WIDTH(count) PANEL
#else
#define PANEL 3
#define FIRST 4
#define NEXT 6
#define FEW 6
#define MOST 6
/* One row waits for its sums, and three of them hide more of that. */
#define WIDTH(rows) (rows == 1 ? 3 : rows > 4 && rows <= FEW ? 1 : 2)
#define DENSE_WIDTH(count) (count <= 4 ? 3 : 2) /* by rows of a tile: twelve sums either way */
#endif

enum form { HALVES, BFLOATS }; /* what weights are, for each of which kernels are compiled */

#define UNIT (LANES * 2 * GROUP) /* bytes of a unit of 16-bit weights */

/* The weights of inputs 2 * j and 2 * j + 1 of a unit, and what both are made of, or the first alone. */
INLINE ivec pair(enum form form, const uint8_t *unit, int j) {
    const uint8_t *p = unit + 4 * j * LANES;
    return form == HALVES ? (ivec)halves(p) : (ivec)load((const float *)p);
}
INLINE vec even(enum form form, ivec pair) { return form == HALVES ? (vec)pair : (vec)(pair << 16); }
INLINE vec odd(enum form form, const uint8_t *unit, int j, ivec pair) {
    return form == HALVES ? halves(unit + (4 * j + 2) * LANES) : (vec)(pair & -65536);
}

INLINE int next_rows(long rows) { return even_tile(rows, NEXT); }

/* Rows of the first tile of `rows`. */
INLINE int first_rows(enum kind kind, long rows) {
    if (kind == F32) return next_rows(rows);
    if (rows <= FEW) return rows;
    long tiles = 1 + (rows - FIRST + NEXT - 1) / NEXT;
#if LANES == 16
    return rows / tiles < FIRST ? rows / tiles : FIRST;
#else /* what the others cannot take, for a row costs more here; but fewer than three would wait for their sums */
    long rest = rows - (tiles - 1) * NEXT;
    return rest < 3 ? 3 : rest;
#endif
}

/* packed [inputs / CHUNK, count, CHUNK] of a tile of `count` rows: what a step of the product reads lies together. */
float *dense_place(enum kind kind, long row, long rows, long inputs, float *packed, long *step) {
    struct span block = block_of(row, rows), tile = tile_of(row, block, first_rows(kind, block.count), NEXT);
    *step = tile.count * CHUNK;
    return packed + tile.first * inputs + (row - tile.first) * CHUNK;
}

void pack_dense(enum kind kind, const float *x, long row, long rows, long inputs, long from, long to, float *packed) {
    long step;
    float *place = dense_place(kind, row, rows, inputs, packed, &step);
    for (long i = from; i < to; i += CHUNK)
        for (int k = 0; k < CHUNK; k += LANES) store(place + i / CHUNK * step + k, load(x + i + k));
}

/* s + v * x, rounded once. Of a chain that is alone gcc makes products and sums, for it is shorter so on some CPUs. */
INLINE vec plus(int alone, vec s, vec v, float x) {
    if (alone) return fused(v, x, s);
    return s + v * x;
}

/* sums [count, width, LANES] += x * weight: `width` units, `stride` bytes apart, from `w` on, of `depth` inputs of a
packed tile of `count` rows. With `keeps` the weights are left in the panel [width, APART]. Meanwhile `coming` comes. */
INLINE void first_tile(enum form form, int width, int count, int keeps, const uint8_t *w, long stride, long depth,
                       const float *x, float *sums, float *panel, struct pieces *ahead, struct coming *coming) {
    int alone = count * width == 1;
    vec s[MOST][PANEL];
    for (int c = 0; c < count; c++)
        for (int r = 0; r < width; r++) s[c][r] = load(sums + (c * width + r) * LANES);
    for (; depth > 0; depth -= GROUP, w += UNIT) {
        fetch(ahead, depth / GROUP);
        for (int half = 0; half < GROUP / 2; half += CHUNK / 2, x += count * CHUNK) {
            ask(coming);
            for (int j = 0; j < CHUNK / 2; j++) {
                vec e[PANEL], o[PANEL];
                for (int r = 0; r < width; r++) {
                    const uint8_t *unit = w + r * stride;
                    ivec both = pair(form, unit, half + j);
                    e[r] = even(form, both), o[r] = odd(form, unit, half + j, both);
                }
                for (int c = 0; c < count; c++)
                    for (int r = 0; r < width; r++) s[c][r] = plus(alone, s[c][r], e[r], x[c * CHUNK + 2 * j]);
                for (int c = 0; c < count; c++)
                    for (int r = 0; r < width; r++) s[c][r] = plus(alone, s[c][r], o[r], x[c * CHUNK + 2 * j + 1]);
                for (int r = 0; keeps && r < width; r++)
                    store(panel + r * APART, e[r]), store(panel + r * APART + LANES, o[r]);
                panel += 2 * LANES;
            }
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

/* The same with float32 weights: those of a panel, or F32's units, `stride` numbers apart. Meanwhile `coming` comes. */
INLINE void next_tile(int width, int count, const float *w, long stride, long depth, const float *x, float *sums,
                      struct coming *coming) {
    vec s[MOST][PANEL];
    for (int c = 0; c < count; c++)
        for (int r = 0; r < width; r++) s[c][r] = load(sums + (c * width + r) * LANES);
    for (; depth > 0; depth -= CHUNK, x += count * CHUNK) {
        ask(coming);
        for (int i = 0; i < CHUNK; i++, w += LANES) {
            vec v[PANEL];
            for (int r = 0; r < width; r++) v[r] = kept(load(w + r * stride));
            for (int c = 0; c < count; c++)
                for (int r = 0; r < width; r++) s[c][r] = plus(count * width == 1, s[c][r], v[r], x[c * CHUNK + i]);
        }
    }
    for (int c = 0; c < count; c++)
        for (int r = 0; r < width; r++) store(sums + (c * width + r) * LANES, s[c][r]);
}

/* Both for each number of rows, as functions of their own: together gcc runs out of registers for them. */
typedef void first_function(const uint8_t *, long, long, const float *, float *, float *, struct pieces *,
                            struct coming *);
typedef void next_function(const float *, long, long, const float *, float *, struct coming *);
#define FIRST_TILE(count, form, width, keeps) \
    static void first_##form##_##width##_##keeps##_##count(const uint8_t *w, long stride, long depth, const float *x, \
                                                           float *sums, float *panel, struct pieces *ahead, \
                                                           struct coming *coming) { \
        first_tile(form, width, count, keeps, w, stride, depth, x, sums, panel, ahead, coming); \
    }
#define NEXT_TILE(count, width) \
    static void next_##width##_##count(const float *w, long stride, long depth, const float *x, float *sums, \
                                       struct coming *coming) { \
        next_tile(width, count, w, stride, depth, x, sums, coming); \
    }
#define FIRST_NAME(count, form, width, keeps) \
    [form][width][keeps][count] = first_##form##_##width##_##keeps##_##count,
#define NEXT_NAME(count, width) [width][count] = next_##width##_##count,
#define UP_TO_6(DO, ...) \
    DO(1, __VA_ARGS__) DO(2, __VA_ARGS__) DO(3, __VA_ARGS__) DO(4, __VA_ARGS__) DO(5, __VA_ARGS__) DO(6, __VA_ARGS__)
#if MOST == 9
#define COUNTS(DO, ...) \
    UP_TO_6(DO, __VA_ARGS__) DO(7, __VA_ARGS__) DO(8, __VA_ARGS__) DO(9, __VA_ARGS__)
#else
#define COUNTS UP_TO_6
#endif
#define FORM(DO, form, width) COUNTS(DO, form, width, 0) COUNTS(DO, form, width, 1)
#define FIRSTS(DO, width) FORM(DO, HALVES, width) FORM(DO, BFLOATS, width)
#if LANES == 16
#define WIDTHS(ALL, DO) ALL(DO, 1) ALL(DO, 3)
#else
#define WIDTHS(ALL, DO) ALL(DO, 1) ALL(DO, 2) ALL(DO, 3)
#endif

WIDTHS(FIRSTS, FIRST_TILE)
WIDTHS(COUNTS, NEXT_TILE)
static first_function *const first_tiles[2][PANEL + 1][2][MOST + 1] = {WIDTHS(FIRSTS, FIRST_NAME)};
static next_function *const next_tiles[PANEL + 1][MOST + 1] = {WIDTHS(COUNTS, NEXT_NAME)};

/* Weights become float32 on their way. */
static void sums_of_16_bits(const struct product *a, struct block b, float *sums) {
    float panel[PANEL * APART] __attribute__((aligned(LINE)));
    enum form form = a->kind == F16 ? HALVES : BFLOATS;
    long stride = a->inputs / GROUP * UNIT, step = b.rows > FEW ? DEPTH : a->inputs;
    int first = first_rows(a->kind, b.rows);
    struct pieces ahead = pieces_of(a, b.unit, b.unit + b.width);
    struct coming coming = coming_after(a, b, stride, a->inputs / CHUNK * (1 + (b.rows - first + NEXT - 1) / NEXT));
    for (long at = 0; at < a->inputs; at += step) {
        long depth = a->inputs - at < step ? a->inputs - at : step, done = first;
        const uint8_t *w = a->weight + b.unit * stride + at / GROUP * UNIT;
        const float *x = a->x + b.row * a->inputs;
        first_tiles[form][b.width][first < b.rows][first](w, stride, depth, x + at * first, sums, panel, &ahead,
                                                          &coming);
        for (int count; done < b.rows; done += count) {
            count = next_rows(b.rows - done);
            next_tiles[b.width][count](panel, APART, depth, x + done * a->inputs + at * count,
                                        sums + done * b.width * LANES, &coming);
        }
    }
}

/* F32's. Weights are read once from memory, at an even pace: the next block's while this one multiplies. */
static void sums_of_32_bits(const struct product *a, struct block b, float *sums) {
    const float *weight = (const float *)a->weight + b.unit * a->inputs * LANES;
    long stride = a->inputs * LANES, tiles = (b.rows + NEXT - 1) / NEXT, times = a->inputs / CHUNK * tiles;
    struct pieces ahead = pieces_of(a, b.unit, b.unit + b.width);
    struct coming coming = coming_after(a, b, stride * sizeof(float), times);
    for (long at = 0; at < a->inputs; at += DEPTH) {
        long depth = a->inputs - at < DEPTH ? a->inputs - at : DEPTH;
        const float *x = a->x + b.row * a->inputs;
        fetch(&ahead, (a->inputs - at + DEPTH - 1) / DEPTH);
        for (int done = 0, count; done < b.rows; done += count) {
            count = next_rows(b.rows - done);
            next_tiles[b.width][count](weight + at * LANES, stride, depth, x + done * a->inputs + at * count,
                                        sums + done * b.width * LANES, &coming);
        }
    }
}

void dense_sums(const struct product *a, struct block b, float *sums) {
    if (a->kind == F32) sums_of_32_bits(a, b, sums);
    else sums_of_16_bits(a, b, sums);
}

int dense_width(enum kind kind, long rows) {
    (void)rows; /* of no account for 16 lanes */
    return kind == F32 ? DENSE_WIDTH(next_rows(rows)) : WIDTH(rows);
}

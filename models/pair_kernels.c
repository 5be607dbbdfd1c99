/* Sums of linear maps whose weights are bfloat16 and whose inputs are rounded to it: ROUNDED's, without AMX.

Used by linear.c. Weights lie as BF16's, two neighbouring inputs of an output in 32 bits: what AVX512-BF16 multiplies and
adds to a sum in float32 at once, twice as many as in float32. Other CPUs have float32 of both.
Invariant: an output is one chain of sums over the inputs in their order, whatever the number of rows.
*/
#include "linear.h"

#define WIDTH 3 /* units side by side */
#if LANES == 16
#define MOST 9 /* rows of a tile */
#else
#define MOST 4
#endif
#define DEPTH 576 /* inputs that are multiplied with all tiles one after another: WIDTH units stay in the second cache */
#define PAIRS (GROUP / 2)
#define UNIT (LANES * 2 * GROUP) /* bytes */

struct packing {
    const float *x;
    long rows, inputs;
    char *packed;
    long tiles; /* of BLOCK rows, at most */
};

#if defined(__AVX512BF16__)
int has_pairs(void) { return 1; }
typedef __m512bh pair; /* two inputs of LANES outputs */
typedef uint32_t packed_pair; /* of a row */
INLINE pair weights(const uint8_t *p) { return (pair)_mm512_loadu_si512(p); }
INLINE vec plus(vec s, pair w, const packed_pair *x) {
    return (vec)_mm512_dpbf16_ps((__m512)s, w, (pair)_mm512_set1_epi32(*x));
}
/* PAIRS pairs. */
INLINE void pack(packed_pair *to, const float *x) {
    __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + LANES);
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
#else
int has_pairs(void) { return 0; }
typedef struct {
    vec even, odd;
} pair;
typedef struct {
    float even, odd;
} packed_pair;
INLINE pair weights(const uint8_t *p) {
    ivec both = (ivec)load((const float *)p);
    return (pair){(vec)(both << 16), (vec)(both & -65536)};
}
INLINE vec plus(vec s, pair w, const packed_pair *x) { return fused(w.odd, x->odd, fused(w.even, x->even, s)); }
/* Of two floats that are as near the one whose last bit is even, as bfloat16 has it; NaN stays. */
INLINE void pack(packed_pair *to, const float *x) {
    for (int i = 0; i < GROUP; i += LANES) {
        vec v = load(x + i);
        uvec bits = (uvec)v, up = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u, is_nan = (uvec)(v != v);
        store((float *)to + i, (vec)((up & ~is_nan) | ((bits | 0x400000) & 0xffff0000u & is_nan)));
    }
}
#endif

/* Rows of the next tile of `rows` that are left: tiles are about as large as one another. */
INLINE long next_rows(long rows) {
    long tiles = (rows + MOST - 1) / MOST;
    return (rows + tiles - 1) / tiles;
}

/* packed [inputs / GROUP, count, PAIRS] of a tile of BLOCK rows: a->tiles tasks are those of BLOCK rows. */
static void pack_task(void *data, long i) {
    const struct packing *a = data;
    long from = i / a->tiles * BLOCK, left = a->rows - from < BLOCK ? a->rows - from : BLOCK, count = next_rows(left);
    for (i %= a->tiles; i && (left -= count); i--) from += count, count = next_rows(left);
    if (!left) return;
    const float *x = a->x + from * a->inputs;
    packed_pair *to = (packed_pair *)a->packed + from * a->inputs / 2;
    for (long at = 0; at < a->inputs; at += GROUP)
        for (long c = 0; c < count; c++, to += PAIRS) pack(to, x + c * a->inputs + at);
}

const float *pack_pairs(enum kind kind, const float *x, long rows, long inputs, float *packed, int threads) {
    (void)kind;
    struct packing p = {x, rows, inputs, (char *)packed, (rows < BLOCK ? rows : BLOCK) / MOST + 1};
    parallel(pack_task, &p, (rows + BLOCK - 1) / BLOCK * p.tiles, rows <= MOST ? 1 : threads);
    return packed;
}

int pairs_width(void) { return WIDTH; }

/* sums [count, width, LANES] += x * weight: `width` units, `stride` bytes apart, of `depth` inputs. */
INLINE void tile(int width, int count, const uint8_t *w, long stride, long depth, const packed_pair *x, float *sums,
                 struct pieces *ahead, struct coming *coming) {
    vec s[MOST][WIDTH];
    for (int c = 0; c < count; c++)
        for (int r = 0; r < width; r++) s[c][r] = load(sums + (c * width + r) * LANES);
    for (; depth > 0; depth -= GROUP, w += UNIT, x += count * PAIRS) {
        fetch(ahead, depth / GROUP);
        ask(coming);
#pragma GCC unroll 16 /* by itself gcc unrolls some of these functions, and the others take up to 1.4 times as long */
        for (int j = 0; j < PAIRS; j++) {
            pair v[WIDTH];
            for (int r = 0; r < width; r++) v[r] = weights(w + r * stride + 4 * j * LANES);
            for (int c = 0; c < count; c++)
                for (int r = 0; r < width; r++) s[c][r] = plus(s[c][r], v[r], x + c * PAIRS + j);
        }
    }
    for (int c = 0; c < count; c++)
        for (int r = 0; r < width; r++) store(sums + (c * width + r) * LANES, s[c][r]);
}

/* For each number of rows, as functions of their own: together gcc runs out of registers for them. */
typedef void tile_function(const uint8_t *, long, long, const packed_pair *, float *, struct pieces *, struct coming *);
#define TILE(count, width) \
    static void tile_##width##_##count(const uint8_t *w, long stride, long depth, const packed_pair *x, float *sums, \
                                       struct pieces *ahead, struct coming *coming) { \
        tile(width, count, w, stride, depth, x, sums, ahead, coming); \
    }
#define NAME(count, width) [width][count] = tile_##width##_##count,
#define FOUR(DO, width) DO(1, width) DO(2, width) DO(3, width) DO(4, width)
#if MOST == 9
#define COUNTS(DO, width) FOUR(DO, width) DO(5, width) DO(6, width) DO(7, width) DO(8, width) DO(9, width)
#else
#define COUNTS FOUR
#endif
COUNTS(TILE, 1)
COUNTS(TILE, 3)
static tile_function *const tiles[WIDTH + 1][MOST + 1] = {COUNTS(NAME, 1) COUNTS(NAME, 3)};

void pairs_sums(const struct product *a, struct block b, float *sums) {
    long stride = a->inputs / GROUP * UNIT, step = b.rows > MOST ? DEPTH : a->inputs;
    struct pieces ahead = pieces_of(a, b.unit, b.unit + b.width);
    struct coming coming = coming_after(a, b, stride, a->inputs / GROUP * ((b.rows + MOST - 1) / MOST));
    for (long at = 0; at < a->inputs; at += step) {
        long depth = a->inputs - at < step ? a->inputs - at : step, done = 0;
        const uint8_t *w = a->weight + b.unit * stride + at / GROUP * UNIT;
        const packed_pair *x = (const packed_pair *)a->x + b.row * a->inputs / 2;
        for (long count; done < b.rows; done += count) {
            count = next_rows(b.rows - done);
            tiles[b.width][count](w, stride, depth, x + (done * a->inputs + at * count) / 2,
                                  sums + done * b.width * LANES, &ahead, &coming);
        }
    }
}

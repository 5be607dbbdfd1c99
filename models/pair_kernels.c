/* Sums of linear maps whose weights are bfloat16 and whose inputs are rounded to it: ROUNDED's, without AMX.

Used by linear.c. Weights lie as BF16's, two neighbouring inputs of an output in 32 bits: what AVX512-BF16 multiplies and
adds to a sum in float32 at once, twice as many as in float32. Other CPUs do as for BF16, with rounded inputs.
Invariant: an output is one chain of sums over the inputs in their order, whatever the number of rows.
*/
#include "linear.h"

#if defined(__AVX512BF16__)
#define WIDTH 3 /* units side by side */
#define MOST 9 /* rows of a tile */
#define DEPTH 576 /* inputs that are multiplied with all tiles one after another: WIDTH units stay in the second cache */
#define PAIRS (GROUP / 2)
#define UNIT (LANES * 2 * GROUP) /* bytes */

int has_pairs(void) { return 1; }

INLINE int next_rows(long rows) { return even_tile(rows, MOST); }

/* packed [inputs / GROUP, count, PAIRS] of a tile of `count` rows. */
void pack_pairs(enum kind kind, const float *x, long row, long rows, long inputs, long from, long to, float *packed) {
    struct span block = block_of(row, rows), tile = tile_of(row, block, next_rows(block.count), MOST);
    uint32_t *place = (uint32_t *)packed + tile.first * inputs / 2 + (row - tile.first) * PAIRS;
    (void)kind;
    for (long i = from; i < to; i += GROUP) {
        __m512 low = _mm512_loadu_ps(x + i), high = _mm512_loadu_ps(x + i + LANES);
        _mm512_storeu_si512(place + i / GROUP * tile.count * PAIRS, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

int pairs_width(enum kind kind, long rows) {
    (void)kind, (void)rows;
    return WIDTH;
}

/* sums [count, width, LANES] += x * weight: `width` units, `stride` bytes apart, of `depth` inputs. */
INLINE void tile(int width, int count, const uint8_t *w, long stride, long depth, const uint32_t *x, float *sums,
                 struct pieces *ahead, struct coming *coming) {
    vec s[MOST][WIDTH];
    for (int c = 0; c < count; c++)
        for (int r = 0; r < width; r++) s[c][r] = load(sums + (c * width + r) * LANES);
    for (; depth > 0; depth -= GROUP, w += UNIT, x += count * PAIRS) {
        fetch(ahead, depth / GROUP);
        ask(coming);
#pragma GCC unroll 16 /* by itself gcc unrolls some of these functions, and the others take up to 1.4 times as long */
        for (int j = 0; j < PAIRS; j++) {
            __m512bh v[WIDTH];
            for (int r = 0; r < width; r++) v[r] = (__m512bh)_mm512_loadu_si512(w + r * stride + 4 * j * LANES);
            for (int c = 0; c < count; c++) {
                __m512bh pair = (__m512bh)_mm512_set1_epi32(x[c * PAIRS + j]);
                for (int r = 0; r < width; r++) s[c][r] = (vec)_mm512_dpbf16_ps((__m512)s[c][r], v[r], pair);
            }
        }
    }
    for (int c = 0; c < count; c++)
        for (int r = 0; r < width; r++) store(sums + (c * width + r) * LANES, s[c][r]);
}

/* For each number of rows, as functions of their own: together gcc runs out of registers for them. */
typedef void tile_function(const uint8_t *, long, long, const uint32_t *, float *, struct pieces *, struct coming *);
#define TILE(count, width) \
    static void tile_##width##_##count(const uint8_t *w, long stride, long depth, const uint32_t *x, float *sums, \
                                       struct pieces *ahead, struct coming *coming) { \
        tile(width, count, w, stride, depth, x, sums, ahead, coming); \
    }
#define NAME(count, width) [width][count] = tile_##width##_##count,
#define COUNTS(DO, width) \
    DO(1, width) DO(2, width) DO(3, width) DO(4, width) DO(5, width) DO(6, width) DO(7, width) DO(8, width) DO(9, width)
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
        const uint32_t *x = (const uint32_t *)a->x + b.row * a->inputs / 2;
        for (long count; done < b.rows; done += count) {
            count = next_rows(b.rows - done);
            tiles[b.width][count](w, stride, depth, x + (done * a->inputs + at * count) / 2,
                                  sums + done * b.width * LANES, &ahead, &coming);
        }
    }
}
#else
int has_pairs(void) { return 0; }
int pairs_width(enum kind kind, long rows) { return dense_width(kind, rows); }
void pairs_sums(const struct product *a, struct block b, float *sums) { dense_sums(a, b, sums); }

void pack_pairs(enum kind kind, const float *x, long row, long rows, long inputs, long from, long to, float *packed) {
    long step;
    float *place = dense_place(kind, row, rows, inputs, packed, &step);
    for (long i = from; i < to; i += CHUNK)
        for (int k = 0; k < CHUNK; k += LANES) store(place + i / CHUNK * step + k, rounded(load(x + i + k)));
}
#endif

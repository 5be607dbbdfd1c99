/* Sums of linear maps whose weights are bfloat16, by a CPU's matrix instructions (AMX).

Used by linear.c, where the CPU has them and the system lets us. A unit of such weights, LANES outputs x 32 inputs of which
two neighbours share 32 bits, is just what a tile register takes. Rows are sums of three bfloat16 numbers, which have
float32's 24 bits: products are exact, and added up in float32. ROUNDED's are one such number.
Invariant: an output is one chain of sums over the inputs in their order, whatever the number of rows.
*/
#include "linear.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include <sys/syscall.h>
#include <unistd.h>

#define TILE 16 /* rows of a register */
#define WIDTH 2 /* units side by side */
#define PARTS(kind) (kind == ROUNDED ? 1 : 3) /* numbers that a row's are the sum of */
#define STEP (2 * GROUP) /* bytes of one of them, for 32 inputs */
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XTILEDATA 18

static int allowed;

/* A process has to ask, once, before its threads may keep what is in these registers. */
__attribute__((constructor)) static void ask_permission(void) {
    allowed = !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA);
}

int has_matrices(void) { return allowed; }
int matrices_width(enum kind kind, long rows) {
    (void)kind, (void)rows;
    return WIDTH;
}

/* Rows that this thread's registers are laid out for; 0: not at all. */
static _Thread_local int laid_out;

/* Registers: 0 to 3 sums of (first rows, unit 0), (first, 1), (second, 0), (second, 1); 4 and 5 units; 6 and 7 rows. */
static void configure(int first, int second) {
    if (laid_out == first + second) return; /* no second ones without TILE first ones */
    laid_out = first + second;
    struct {
        uint8_t palette, start, none[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = LINE;
    config.rows[0] = config.rows[1] = config.rows[6] = first;
    config.rows[2] = config.rows[3] = config.rows[7] = second ? second : 1;
    config.rows[4] = config.rows[5] = GROUP / 2;
    _tile_loadconfig(&config);
}

/* bfloat16 of numbers, which then become what that leaves of them. */
INLINE __m512i taken(__m512 *low, __m512 *high) {
    __m512i large = (__m512i)_mm512_cvtne2ps_pbh(*high, *low);
    __m512i of_low = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(large)), 16);
    __m512i of_high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(large, 1)), 16);
    *low = _mm512_sub_ps(*low, (__m512)of_low), *high = _mm512_sub_ps(*high, (__m512)of_high);
    return large;
}

/* [inputs / 32, parts, count, 32]: of TILE rows' inputs what bfloat16 holds, then what it holds of the rest, and so on. */
INLINE void pack_parts(int parts, const float *x, long row, long rows, long inputs, long from, long to, char *packed) {
    long first = row / TILE * TILE, count = rows - first < TILE ? rows - first : TILE;
    char *place = packed + first * inputs * parts * (long)sizeof(uint16_t) + (row - first) * STEP;
    for (long i = from; i < to; i += GROUP) {
        __m512 low = _mm512_loadu_ps(x + i), high = _mm512_loadu_ps(x + i + LANES);
        for (int part = 0; part < parts; part++)
            _mm512_storeu_si512(place + (i / GROUP * parts + part) * count * STEP, taken(&low, &high));
    }
}

void pack_matrices(enum kind kind, const float *x, long row, long rows, long inputs, long from, long to, float *packed) {
    if (kind == ROUNDED) pack_parts(PARTS(ROUNDED), x, row, rows, inputs, from, to, (char *)packed);
    else pack_parts(PARTS(BF16), x, row, rows, inputs, from, to, (char *)packed);
}

/* sums [first + second, width, LANES]: `width` units, `stride` bytes apart, of `steps` times 32 inputs. */
INLINE void add_up(int parts, int width, long first, long second, const uint8_t *w, long stride, long steps, const char *x,
                   const char *y, float *sums, struct pieces *ahead, struct coming *coming) {
    _tile_zero(0);
    if (width == 2) _tile_zero(1);
    if (second) _tile_zero(2);
    if (second && width == 2) _tile_zero(3);
    for (; steps > 0; steps--, w += LANES * STEP) {
        fetch(ahead, steps);
        ask(coming);
        _tile_stream_loadd(4, w, LINE); /* past the first cache, where the rows are to stay */
        if (width == 2) _tile_stream_loadd(5, w + stride, LINE);
        for (int part = 0; part < parts; part++, x += first * STEP, y += second * STEP) {
            _tile_loadd(6, x, STEP);
            if (second) _tile_loadd(7, y, STEP);
            _tile_dpbf16ps(0, 6, 4);
            if (second) _tile_dpbf16ps(2, 7, 4);
            if (width == 2) _tile_dpbf16ps(1, 6, 5);
            if (second && width == 2) _tile_dpbf16ps(3, 7, 5);
        }
    }
    long line = width * LANES;
    _tile_stored(0, sums, line * sizeof(float));
    if (width == 2) _tile_stored(1, sums + LANES, line * sizeof(float));
    if (second) _tile_stored(2, sums + first * line, line * sizeof(float));
    if (second && width == 2) _tile_stored(3, sums + first * line + LANES, line * sizeof(float));
}

INLINE void sums_of(int parts, const struct product *a, struct block b, float *sums) {
    long steps = a->inputs / GROUP, stride = steps * LANES * STEP, pairs = (b.rows + 2 * TILE - 1) / (2 * TILE);
    const uint8_t *w = a->weight + b.unit * stride;
    struct pieces ahead = pieces_of(a, b.unit, b.unit + b.width);
    struct coming coming = coming_after(a, b, stride, steps * pairs);
    long size = a->inputs * parts * sizeof(uint16_t);
    for (long done = 0; done < b.rows; done += 2 * TILE) {
        long left = b.rows - done, first = left < TILE ? left : TILE;
        long second = left - first < TILE ? left - first : TILE;
        const char *x = (const char *)a->x + (b.row + done) * size;
        const char *y = x + TILE * size;
        float *to = sums + done * b.width * LANES;
        configure(first, second);
        if (b.width == 2 && second) add_up(parts, 2, first, second, w, stride, steps, x, y, to, &ahead, &coming);
        else if (b.width == 2) add_up(parts, 2, first, 0, w, stride, steps, x, x, to, &ahead, &coming);
        else if (second) add_up(parts, 1, first, second, w, stride, steps, x, y, to, &ahead, &coming);
        else add_up(parts, 1, first, 0, w, stride, steps, x, x, to, &ahead, &coming);
    }
}

void matrices_sums(const struct product *a, struct block b, float *sums) {
    if (a->kind == ROUNDED) sums_of(PARTS(ROUNDED), a, b, sums);
    else sums_of(PARTS(BF16), a, b, sums);
}

void rest(void) {
    if (laid_out) _tile_release();
    laid_out = 0;
}
#else
int has_matrices(void) { return 0; }
int matrices_width(enum kind kind, long rows) {
    (void)kind, (void)rows;
    return 1;
}
void pack_matrices(enum kind kind, const float *x, long row, long rows, long inputs, long from, long to, float *packed) {
    (void)kind, (void)x, (void)row, (void)rows, (void)inputs, (void)from, (void)to, (void)packed;
}
void matrices_sums(const struct product *a, struct block b, float *sums) { (void)a, (void)b, (void)sums; }
void rest(void) {}
#endif

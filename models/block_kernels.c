/* Linear maps with GGUF's quantized blocks as weights, in float32, for CPUs with AVX2 or AVX-512.

Used by quantized.py, compiled by c_library.py for the machine it runs on. A weight [outputs, inputs] is packed into
units: LANES outputs x 32 inputs, their scales first (float16, one a lane), then their values, so that a vector is the
same input of LANES outputs. Weights become float32 in registers, bit for bit those of GGUF's definition.
Invariant: an output is one chain of fused multiply-adds over the inputs in their order, whatever the number of rows:
a row's result does not depend on the batch that it is in. Runs on torch's own OpenMP threads.
*/
#include <immintrin.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#define TOKENS 8 /* rows of x multiplied at a time: with 2 vectors of outputs, what the registers hold */
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LANES 8
#define TOKENS 4
#else
#error "needs AVX2, FMA and F16C"
#endif

#define GROUP 32 /* inputs that share a scale */
#define SINGLE 4 /* vectors of outputs computed at a time for one row of x */
#define PANEL 2  /* the same for many rows */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

enum kind { Q4_0, Q4_1, Q8_0 }; /* as quantized.KINDS */

#if LANES == 16
INLINE vec halves(const uint8_t *p) { return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
INLINE ivec nibbles(const uint8_t *p) { return (ivec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p)); }
INLINE ivec bytes(const uint8_t *p) { return (ivec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)); }
INLINE vec floats(ivec q) { return (vec)_mm512_cvtepi32_ps((__m512i)q); }
#else
INLINE vec halves(const uint8_t *p) { return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
INLINE ivec nibbles(const uint8_t *p) { return (ivec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p)); }
INLINE ivec bytes(const uint8_t *p) { return (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)); }
INLINE vec floats(ivec q) { return (vec)_mm256_cvtepi32_ps((__m256i)q); }
#endif

INLINE long unit_bytes(enum kind kind) { return LANES * (kind == Q4_0 ? 18 : kind == Q4_1 ? 20 : 34); }

struct group {
    vec scale, offset;
    const uint8_t *values;
};

INLINE struct group open_group(enum kind kind, const uint8_t *unit) {
    struct group g = {halves(unit), {0}, unit + 2 * LANES};
    if (kind == Q4_0) g.offset = g.scale * -8.0f;
    if (kind == Q4_1) {
        g.offset = halves(unit + 2 * LANES);
        g.values += 2 * LANES;
    }
    return g;
}

/* The weights of inputs 2 * j and 2 * j + 1 of a group. */
INLINE void weights(enum kind kind, struct group g, int j, vec *even, vec *odd) {
    if (kind == Q8_0) {
        *even = g.scale * floats(bytes(g.values + 2 * j * LANES));
        *odd = g.scale * floats(bytes(g.values + (2 * j + 1) * LANES));
    } else {
        ivec both = nibbles(g.values + j * LANES);
        *even = g.scale * floats(both & 15) + g.offset;
        *odd = g.scale * floats(both >> 4) + g.offset;
    }
}

/* y [width * LANES] of one row x: the weights are used as they leave the registers. */
INLINE void single(enum kind kind, int width, const uint8_t *w, long groups, const float *x, float *y) {
    vec sums[SINGLE];
    for (int r = 0; r < width; r++) sums[r] = (vec){0};
    for (long g = 0; g < groups; g++, x += GROUP) {
        struct group opened[SINGLE];
        for (int r = 0; r < width; r++) opened[r] = open_group(kind, w + (r * groups + g) * unit_bytes(kind));
#pragma GCC unroll 4
        for (int j = 0; j < GROUP / 2; j++)
            for (int r = 0; r < width; r++) {
                vec even, odd;
                weights(kind, opened[r], j, &even, &odd);
                sums[r] = sums[r] + even * x[2 * j];
                sums[r] = sums[r] + odd * x[2 * j + 1];
            }
    }
    for (int r = 0; r < width; r++) *(vec *)(y + r * LANES) = sums[r];
}

/* panel [inputs, width * LANES] = the weights of width * LANES outputs. */
INLINE void dequantise(enum kind kind, int width, const uint8_t *w, long groups, float *panel) {
    for (int r = 0; r < width; r++)
        for (long g = 0; g < groups; g++) {
            struct group opened = open_group(kind, w + (r * groups + g) * unit_bytes(kind));
            for (int j = 0; j < GROUP / 2; j++) {
                float *to = panel + ((g * GROUP + 2 * j) * width + r) * LANES;
                weights(kind, opened, j, (vec *)to, (vec *)(to + width * LANES));
            }
        }
}

/* y [count rows, stride `outputs`] = x [count, inputs] times the panel. */
INLINE void tile(int width, int count, const float *panel, long inputs, const float *x, float *y, long outputs) {
    vec sums[TOKENS][PANEL];
    for (int c = 0; c < count; c++)
        for (int r = 0; r < width; r++) sums[c][r] = (vec){0};
    for (long i = 0; i < inputs; i++) {
        vec w[PANEL];
        for (int r = 0; r < width; r++) w[r] = *(const vec *)(panel + (i * width + r) * LANES);
        for (int c = 0; c < count; c++)
            for (int r = 0; r < width; r++) sums[c][r] = sums[c][r] + w[r] * x[c * inputs + i];
    }
    for (int c = 0; c < count; c++)
        for (int r = 0; r < width; r++) *(vec *)(y + c * outputs + r * LANES) = sums[c][r];
}

/* The same for all rows, as many at a time as the registers hold. */
INLINE void tiles(int width, const float *panel, long inputs, const float *x, long rows, float *y, long outputs) {
    for (; rows >= TOKENS; rows -= TOKENS, x += TOKENS * inputs, y += TOKENS * outputs)
        tile(width, TOKENS, panel, inputs, x, y, outputs);
    if (rows & 4) {
        tile(width, 4, panel, inputs, x, y, outputs);
        x += 4 * inputs, y += 4 * outputs;
    }
    if (rows & 2) {
        tile(width, 2, panel, inputs, x, y, outputs);
        x += 2 * inputs, y += 2 * outputs;
    }
    if (rows & 1) tile(width, 1, panel, inputs, x, y, outputs);
}

struct work {
    int kind;
    const uint8_t *weight;
    long outputs, inputs;
    const float *x;
    long rows;
    float *y, *scratch;
};

/* Outputs [from * LANES, to * LANES) of all rows. */
INLINE void share(enum kind kind, const struct work *a, long from, long to, float *panel) {
    long groups = a->inputs / GROUP, bytes = groups * unit_bytes(kind);
    const uint8_t *w = a->weight;
    float *y = a->y;
    if (a->rows == 1) {
        for (; from + SINGLE <= to; from += SINGLE)
            single(kind, SINGLE, w + from * bytes, groups, a->x, y + from * LANES);
        for (; from < to; from++) single(kind, 1, w + from * bytes, groups, a->x, y + from * LANES);
        return;
    }
    for (; from + PANEL <= to; from += PANEL) {
        dequantise(kind, PANEL, w + from * bytes, groups, panel);
        tiles(PANEL, panel, a->inputs, a->x, a->rows, y + from * LANES, a->outputs);
    }
    for (; from < to; from++) {
        dequantise(kind, 1, w + from * bytes, groups, panel);
        tiles(1, panel, a->inputs, a->x, a->rows, y + from * LANES, a->outputs);
    }
}

/* libgomp, which torch has loaded: the same threads, so that ours and torch's never compete for the cores. */
void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);

static void body(void *data) {
    const struct work *a = data;
    long thread = omp_get_thread_num(), threads = omp_get_num_threads(), units = a->outputs / LANES;
    long from = units * thread / threads, to = units * (thread + 1) / threads;
    float *panel = a->scratch + thread * a->inputs * PANEL * LANES;
    if (a->kind == Q4_0) share(Q4_0, a, from, to, panel);
    if (a->kind == Q4_1) share(Q4_1, a, from, to, panel);
    if (a->kind == Q8_0) share(Q8_0, a, from, to, panel);
}

/* How many outputs a unit holds: what the packing must know. */
int lanes(void) { return LANES; }

/* Floats of scratch memory that `linear` needs for each thread and input. */
int scratch_per_input(void) { return PANEL * LANES; }

/* y [rows, outputs] = x [rows, inputs] @ weight.T, all contiguous; outputs % LANES == 0, inputs % GROUP == 0. */
void linear(int kind, const void *weight, long outputs, long inputs, const float *x, long rows, float *y,
            float *scratch, int threads) {
    struct work a = {kind, weight, outputs, inputs, x, rows, y, scratch};
    GOMP_parallel(body, &a, threads, 0);
}

/* Sums of linear maps whose weights are quantized blocks, GGUF's and what others become, in integers.

Used by linear.c. A unit is LANES outputs x 32 inputs: their scales (float16, one a lane), minima or zero points, then
their values, so that 32 bits of a vector are four inputs of one of LANES outputs; of 4-bit values a vector holds two
such steps. The 32 numbers of a row that meet a unit share a scale, too, and become integers of 15 bits and a sign: a
high and a low byte, for what multiplies eight bits is four times as fast as float32. An integer is off by 2^-16 of the
largest of the 32, which is a hundred times nearer than bfloat16 is; products of integers, and their sums in a unit, are
exact.
Invariant: an output is one chain of fused multiply-adds over the units in their order, and so are its bits, whatever
the number of rows, the threads, and the width of vectors. Where x has a number that is none, outputs are NaN.
*/
#include "linear.h"

#define STEPS (GROUP / 4) /* vectors of four inputs in a unit */
#define DEPTH 18          /* groups whose rows stay in the second-level cache */
#define LARGEST 32512     /* 127 * 256: its high byte is one */
#define LEAST 1e-30f      /* what is smaller counts as zero */

#if LANES == 16 && defined(__AVX512VNNI__)
#define DOT 1
INLINE ivec dot(ivec s, ivec w, ivec x) { return (ivec)_mm512_dpbusd_epi32((__m512i)s, (__m512i)w, (__m512i)x); }
#elif LANES == 8 && defined(__AVXVNNI__)
#define DOT 1
INLINE ivec dot(ivec s, ivec w, ivec x) { return (ivec)_mm256_dpbusd_avx_epi32((__m256i)s, (__m256i)w, (__m256i)x); }
#else
#define DOT 0
#endif
#if LANES == 16
INLINE ivec bytes(const uint8_t *p) { return (ivec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p)); }
INLINE ivec signs(const uint8_t *p) { return (ivec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)); }
/* Neighbours' products and their sum: of u8 and i8 in 16 bits, of i16 in 32. */
INLINE svec pairs8(ivec w, ivec x) { return (svec)_mm512_maddubs_epi16((__m512i)w, (__m512i)x); }
INLINE ivec pairs16(svec a, svec b) { return (ivec)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#else
INLINE ivec bytes(const uint8_t *p) { return (ivec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p)); }
INLINE ivec signs(const uint8_t *p) { return (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)); }
INLINE svec pairs8(ivec w, ivec x) { return (svec)_mm256_maddubs_epi16((__m256i)w, (__m256i)x); }
INLINE ivec pairs16(svec a, svec b) { return (ivec)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#endif

/* 32 numbers of a row: x = scale * (256 * high + low), or scale * wide where 16 bits are multiplied. */
struct numbers {
    union {
        struct {
            int8_t high[GROUP], low[GROUP];
        };
        int16_t wide[GROUP]; /* of each four the even ones first */
    };
    float scale;
    union {
        float sum;      /* of the 32, or the first half */
        int32_t middle; /* or what a weight of zero's byte makes of them, times -1 */
    };
    float second; /* sum of the second half, where halves have their own scales */
};

typedef int8_t narrow __attribute__((vector_size(LANES), aligned(1), may_alias));

/* Whether weights have a byte each; whether 16 bits of a number are multiplied; the byte of a weight of zero, where it is
the same for all, else 0. */
INLINE int eight(enum kind kind) { return kind == Q8_0 || kind == K8; }
INLINE int wide(enum kind kind) { return eight(kind) && !DOT; }
INLINE int middle(enum kind kind) { return kind == Q4_0 ? 8 : kind == Q8_0 ? 128 : 0; }

INLINE int sum_of(ivec q) {
    int total = 0;
    for (int k = 0; k < LANES; k++) total += q[k];
    return total;
}

INLINE void pack_group(enum kind kind, const float *x, struct numbers *to) {
    vec most = {0}, poison = {0};
    for (int i = 0; i < GROUP; i += LANES) {
        vec v = load(x + i);
        most = larger(most, larger(v, -v));
        poison += v * 0.0f; /* NaN where there is no number */
    }
    float top = largest(most), inverse = top > LEAST ? LARGEST / top : 0.0f;
    ivec totals = {0};
    int later = 0;
    for (int i = 0; i < GROUP; i += LANES) {
        ivec q = integers(load(x + i) * inverse), high = (q + 128) >> 8;
        totals += q;
        if (kind == K8 && i >= GROUP / 2) later += sum_of(q);
        if (wide(kind))
            for (int k = 0; k < LANES; k++) to->wide[i + (k & ~3) + (k & 1) * 2 + (k >> 1 & 1)] = q[k];
        else {
            *(narrow *)(to->high + i) = __builtin_convertvector(high, narrow);
            *(narrow *)(to->low + i) = __builtin_convertvector(q - (high << 8), narrow);
        }
    }
    int total = sum_of(totals);
    to->scale = top / LARGEST + sum(poison);
    if (middle(kind)) to->middle = -middle(kind) * total;
    else to->sum = to->scale * (kind == K8 ? total - later : total);
    to->second = to->scale * later;
}

/* For each BLOCK rows [groups, rows]. */
void pack_blocks(enum kind kind, const float *x, long row, long rows, long inputs, long from, long to, float *packed) {
    struct span block = block_of(row, rows);
    struct numbers *place = (struct numbers *)packed + block.first * (inputs / GROUP) + row - block.first;
    for (long g = from / GROUP; g < to / GROUP; g++) pack_group(kind, x + g * GROUP, place + g * block.count);
}

INLINE long unit_bytes(enum kind kind) {
    const int bytes[] = {18, 20, 34, 19, 22, 40}; /* of a block of 32, by kind */
    return LANES * bytes[kind];
}

/* What a unit is made of: values are `scale` times a byte of `w`, and `offset` more, or without a middle; K8's halves
have their own. */
struct unit {
    vec scale[2], offset[2];
    ivec w[STEPS];
};

INLINE struct unit open_unit(enum kind kind, const uint8_t *p) {
    struct unit u = {.scale = {halves(p)}};
    p += 2 * LANES;
    if (kind == Q4_1) u.offset[0] = halves(p), p += 2 * LANES;
    if (kind == Q4_Z) u.offset[0] = u.scale[0] * -floats(bytes(p)), p += LANES; /* exact: 11 bits times 8 */
    if (kind == Q4_K || kind == K8) { /* exact, too */
        vec least = halves(p);
        int parts = kind == K8 ? 2 : 1;
        p += 2 * LANES;
        u.scale[1] = u.scale[0];
        for (int h = 0; h < parts; h++, p += LANES) u.scale[h] *= floats(signs(p));
        for (int h = 0; h < parts; h++, p += LANES) u.offset[h] = least * -floats(signs(p));
    }
    for (int i = 0; i < STEPS; i++)
        if (eight(kind)) u.w[i] = (ivec)load((const float *)p + i * LANES);
        else u.w[i] = (ivec)load((const float *)p + i / 2 * LANES) >> i % 2 * 4 & 0x0f0f0f0f;
    return u;
}

/* The same four bytes in all lanes. */
INLINE ivec spread(const void *p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return four - (ivec){0};
}

/* The sum of a unit's bytes times the integers of a row, of steps [from, to). */
INLINE ivec integer_sum(enum kind kind, const ivec *w, const struct numbers *x, int from, int to) {
    if (wide(kind)) {
        ivec sum = {0};
        for (int i = from; i < to; i++) {
            sum += pairs16((svec)(w[i] & 0x00ff00ff), (svec)spread(x->wide + 4 * i));
            sum += pairs16((svec)((uvec)w[i] >> 8 & 0x00ff00ff), (svec)spread(x->wide + 4 * i + 2));
        }
        return sum;
    }
#if DOT
    ivec high = {0}, low = {0};
    for (int i = from; i < to; i++) {
        high = dot(high, w[i], spread(x->high + 4 * i));
        low = dot(low, w[i], spread(x->low + 4 * i));
    }
    return (high << 8) + low;
#else
    svec high = {0}, low = {0}, one = (svec){0} + 1; /* 16 bits hold them: 16 times 15 times 128 */
    for (int i = from; i < to; i++) {
        high += pairs8(w[i], spread(x->high + 4 * i));
        low += pairs8(w[i], spread(x->low + 4 * i));
    }
    return (pairs16(high, one) << 8) + pairs16(low, one);
#endif
}

/* s + the unit times a row's numbers. */
INLINE vec added(enum kind kind, const struct unit *u, const struct numbers *x, vec s) {
    int steps = kind == K8 ? STEPS / 2 : STEPS;
    ivec q = integer_sum(kind, u->w, x, 0, steps);
    if (middle(kind)) q += x->middle;
    s = chained(u->scale[0] * x->scale, floats(q), s);
    if (!middle(kind)) s = fused(u->offset[0], x->sum, s);
    if (kind == K8) {
        q = integer_sum(kind, u->w, x, steps, STEPS);
        s = chained(u->scale[1] * x->scale, floats(q), s);
        s = fused(u->offset[1], x->second, s);
    }
    return s;
}

/* sums [rows, apart] += x [groups, of `rows`] times the unit of each group, from `w` on. */
INLINE void add_units(enum kind kind, const uint8_t *w, long away, long groups, const struct numbers *x, long rows,
                      float *sums, long apart, struct pieces *ahead) {
    for (long g = 0; g < groups; g++, w += unit_bytes(kind)) {
        struct unit u = open_unit(kind, w);
        fetch(ahead, groups - g);
        for (long at = 0; at < unit_bytes(kind); at += LINE) __builtin_prefetch(w + away + at, 0, 2);
        for (long r = 0; r < rows; r++, x++) store(sums + r * apart, added(kind, &u, x, load(sums + r * apart)));
    }
}

/* As functions of their own, for one row and for more: sums of one stay in registers. */
#define ADD_UNITS(kind) \
    static void add_##kind(const uint8_t *w, long away, long groups, const struct numbers *x, long rows, float *sums, \
                           long apart, struct pieces *ahead) { \
        if (rows == 1) add_units(kind, w, away, groups, x, 1, sums, apart, ahead); \
        else add_units(kind, w, away, groups, x, rows, sums, apart, ahead); \
    }
typedef void add_function(const uint8_t *, long, long, const struct numbers *, long, float *, long, struct pieces *);
ADD_UNITS(Q4_0)
ADD_UNITS(Q4_1)
ADD_UNITS(Q8_0)
ADD_UNITS(Q4_Z)
ADD_UNITS(Q4_K)
ADD_UNITS(K8)
static add_function *const add[] = {add_Q4_0, add_Q4_1, add_Q8_0, add_Q4_Z, add_Q4_K, add_K8}; /* by kind */

int blocks_width(enum kind kind, long rows) {
    (void)kind;
    return rows > 8 ? 4 : 1;
}

void blocks_sums(const struct product *a, struct block b, float *sums) {
    long size = unit_bytes(a->kind), groups = a->inputs / GROUP, step = b.rows > 1 ? DEPTH : groups;
    const struct numbers *x = (const struct numbers *)a->x + b.row * groups;
    const uint8_t *w = a->weight + b.unit * groups * size;
    struct pieces ahead = pieces_of(a, b.unit, b.unit + b.width);
    for (long g = 0; g < groups; g += step)
        for (int r = 0; r < b.width; r++)
            add[a->kind](w + (r * groups + g) * size, b.coming * groups * size, groups - g < step ? groups - g : step,
                         x + g * b.rows, b.rows, sums + r * LANES, b.width * LANES, &ahead);
}

/* What the CPU's kernels share: vectors of LANES floats, for AVX2 or AVX-512, and the threads that they run on. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LANES 8
#else
#error "needs AVX2, FMA and F16C"
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef int16_t svec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));

#if LANES == 16
#define COUNTED ((ivec){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
#else
#define COUNTED ((ivec){0, 1, 2, 3, 4, 5, 6, 7})
#endif

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec all(float x) { return x - (vec){0}; }

/* LANES numbers of float16, and of bfloat16, as float32; float32 to the nearest float16; the upper halves of numbers. */
#if LANES == 16
INLINE vec halves(const void *p) { return (vec)_mm512_cvtph_ps(_mm256_loadu_si256(p)); }
INLINE vec bfloats(const void *p) { return (vec)((ivec)_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)) << 16); }
INLINE void store_halves(void *p, vec v) { _mm256_storeu_si256(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT)); }
INLINE void store_upper(void *p, uvec v) { _mm256_storeu_si256(p, _mm512_cvtepi32_epi16((__m512i)(v >> 16))); }
#else
INLINE vec halves(const void *p) { return (vec)_mm256_cvtph_ps(_mm_loadu_si128(p)); }
INLINE vec bfloats(const void *p) { return (vec)((ivec)_mm256_cvtepu16_epi32(_mm_loadu_si128(p)) << 16); }
INLINE void store_halves(void *p, vec v) { _mm_storeu_si128(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }
INLINE void store_upper(void *p, uvec v) {
    __m256i pairs = _mm256_packus_epi32((__m256i)(v >> 16), (__m256i)(v >> 16));
    _mm_storeu_si128(p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
}
#endif
/* To the nearest of bfloat16, of two the one whose last bit is even; NaN stays. */
INLINE vec rounded(vec v) {
    uvec bits = (uvec)v, nearest = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u, is_nan = (uvec)(v != v);
    return (vec)((nearest & ~is_nan) | ((bits | 0x400000) & 0xffff0000u & is_nan));
}

/* fused, chained: a * b + c, rounded once, which of operators the compiler makes one or two, as it is faster
where they stand. */
#if LANES == 16
INLINE vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vec smaller(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vec fused(vec a, float b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, _mm512_set1_ps(b), (__m512)c); }
INLINE vec chained(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE vec floats(ivec q) { return (vec)_mm512_cvtepi32_ps((__m512i)q); }
INLINE ivec integers(vec x) { return (ivec)_mm512_cvtps_epi32((__m512)x); }
INLINE float sum(vec x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE float largest(vec x) { return _mm512_reduce_max_ps((__m512)x); }
#else
INLINE vec larger(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vec smaller(vec a, vec b) { return (vec)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE vec fused(vec a, float b, vec c) { return (vec)_mm256_fmadd_ps((__m256)a, _mm256_set1_ps(b), (__m256)c); }
INLINE vec chained(vec a, vec b, vec c) { return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE vec floats(ivec q) { return (vec)_mm256_cvtepi32_ps((__m256i)q); }
INLINE ivec integers(vec x) { return (ivec)_mm256_cvtps_epi32((__m256)x); }
INLINE float sum(vec x) {
    __m128 h = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
INLINE float largest(vec x) {
    __m128 h = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
#endif

/* e to the power of x within 2 units in the last place; arguments beyond float32's range count as its ends. Cephes. */
INLINE vec exponential(vec x) {
    x = smaller(all(88.0f), larger(all(-87.0f), x)); /* in this order NaN stays */
    ivec n = integers(x * 1.44269504f);
    vec r = fused(floats(n), -0.693359375f, x);
    r = fused(floats(n), 2.12194440e-4f, r);
    vec p = fused(r, 1.9875691500e-4f, all(1.3981999507e-3f));
    p = chained(p, r, all(8.3334519073e-3f));
    p = chained(p, r, all(4.1665795894e-2f));
    p = chained(p, r, all(1.6666665459e-1f));
    p = chained(p, r, all(5.0000001201e-1f));
    return (chained(p * r, r, r) + 1.0f) * (vec)((n + 127) << 23);
}

INLINE vec silu(vec x) { return x / (1.0f + exponential(-x)); }

/* Run task(data, 0), ..., task(data, tasks - 1) on up to `threads` threads and return when all are done. */
void parallel(void (*task)(void *, long), void *data, long tasks, int threads);

/* What a thread does that will not multiply for a while: the matrix registers are given back, which else are saved and
loaded wherever threads take turns. Whoever calls `multiply` or `gated` does it after the last one. */
void rest(void);

/* A linear map with weights as dense_kernels.c or block_kernels.c have them; outputs % LANES == 0, inputs % 32 == 0. */
struct map {
    int kind; /* as quantized.KINDS */
    const uint8_t *weight;
    const float *bias; /* [outputs], or NULL */
    long outputs, inputs;
};

/* Memory that is wanted soon: `count` pieces of `bytes` bytes, at these multiples of that from `base` on. */
struct ahead {
    const char *base;
    const int64_t *pieces;
    long count, bytes;
};

/* y [rows, outputs] = map(x [rows, inputs]); `packed` [rows, 1.5 * inputs] is scratch memory. Meanwhile the memory `ahead`,
if not NULL, comes nearer. */
void linear(const struct map *map, const float *x, long rows, float *packed, float *y, const struct ahead *ahead,
            int threads);

/* Its two parts: who makes x may pack it as well. pack: of row `row`, which begins at x, the numbers [from, to), both
multiples of 32. multiply: may look at x, too. */
void pack(const struct map *map, const float *x, long row, long rows, long from, long to, float *packed);
void pack_rows(const struct map *map, const float *x, long rows, float *packed, int threads);
int packers(const struct map *map, long rows, int threads); /* how many threads are worth while for that */
void multiply(const struct map *map, const float *x, long rows, const float *packed, float *y, const struct ahead *ahead,
              int threads);

/* y [rows, outputs / 2] = silu_mul(map(x)), which is packed for `reader` as well: `read` is its `packed`. */
void gated(const struct map *map, const float *x, long rows, const float *packed, float *y, const struct map *reader,
           float *read, const struct ahead *ahead, int threads);

/* residual += scale * x, then x = rms_norm(residual); without residual x = rms_norm(x). Both [rows, hidden]. */
void rms_norm(float *x, float *residual, const float *weight, long rows, long hidden, float scale, float eps,
              int threads);
/* The same; x is packed for `reader`, if not NULL, as well. */
void rms_norm_for(const struct map *reader, float *packed, float *x, float *residual, const float *weight, long rows,
                  long hidden, float scale, float eps, int threads);

/* What a cache holds. */
enum cached { CACHED_FLOATS, CACHED_HALVES, CACHED_BFLOATS };

INLINE long size_of(enum cached kind) { return kind == CACHED_FLOATS ? 4 : 2; }

/* Numbers i, ..., i + LANES - 1 from p on, and their place. */
INLINE vec cached(const char *p, long i, enum cached kind) {
    p += i * size_of(kind);
    return kind == CACHED_FLOATS ? load((const float *)p) : kind == CACHED_HALVES ? halves(p) : bfloats(p);
}
INLINE void to_cache(char *p, long i, vec v, enum cached kind) {
    p += i * size_of(kind);
    if (kind == CACHED_FLOATS) store((float *)p, v);
    if (kind == CACHED_HALVES) store_halves(p, v);
    if (kind == CACHED_BFLOATS) store_upper(p, (uvec)rounded(v));
}

/* Heads of tokens on their way to the cache. */
struct rotation {
    float *qkv; /* [tokens, heads + 2 * kv_heads, dim]: queries and keys are normalised and rotated in place */
    long tokens, heads, kv_heads, dim;
    const float *qk_norm; /* [heads + kv_heads, dim], or NULL */
    float eps;
    long rotated;
    const float *cos, *sin; /* [tokens, rotated] as rope.rotation_table's, or NULL: nothing rotates */
    const int64_t *slots;   /* [tokens] */
    char *cache;            /* [slots, 2, kv_heads, dim] of this kind: takes keys and values */
    enum cached kind;
};
void rotate_and_write(const struct rotation *a, int threads);

/* Token t sees its sequence's tokens first[t] to end[t] - 1; pages[t] is the address of its page numbers, int32. */
struct attention {
    const float *q; /* rows of [heads, dim], `stride` apart */
    long stride;
    const char *cache; /* [slots, 2, kv_heads, dim] of this kind */
    enum cached kind;
    float *out; /* [tokens, heads, dim] */
    const int64_t *pages, *first, *end;
    long tokens, heads, kv_heads, dim, page_size; /* dim is a multiple of 2 * LANES */
    float scale;
    long keys; /* sum of what all see: the amount of work */
    const struct map *reader; /* for which `out` is packed as well, or NULL; a KV head's queries are whole groups of 32 */
    float *packed;
};
void attend(const struct attention *a, int threads);

/* y [rows, inter] = silu(gate) * up of gate_up [rows, 2 * inter]. */
void silu_mul(const float *gate_up, float *y, long rows, long inter, int threads);

/* Rows of logits that become tokens: ids [rows], and finish [rows]: 3 where a logit is NaN or +inf, or none is left, 1
where the token is one of the slot's stop_ids, else 0. The tables are SamplerState's. */
struct draw {
    const float *logits; /* [rows, vocab] */
    long rows, vocab;
    const uint32_t *masks; /* [rows, words], bit i of word w for token 32 w + i, 1 = allowed; or NULL */
    long words;
    const int64_t *slots, *positions; /* [rows] */
    const int64_t *ints;              /* [slots, ints_width]: the seed, and in column `needs` whether it is greedy */
    long ints_width, needs;
    const float *floats; /* [slots, floats_width]: first 1 / temperature */
    long floats_width;
    const int64_t *stop_ids; /* [slots, stops] */
    long stops;
    int64_t *ids;
    uint8_t *finish;
};
void draw(const struct draw *a, int threads);

/* Some rows of slots.SlotArrays. */
struct slots {
    int32_t *numbers;      /* [5, count] */
    const int32_t *tables; /* [count, pages] */
    long count, pages, page_size, scratch;
    const int64_t *row; /* [rows] */
    long rows;
};
/* read [4, rows]: DecodeInputs' ids, positions, KV slots, draw positions. */
void prepare(const struct slots *a, int64_t *read, int32_t *lengths);
/* See SlotArrays.advance; a row may be there twice only if it is done. */
void advance(const struct slots *a, const int64_t *draw_positions, const int64_t *ids, const uint8_t *finish,
             int32_t *out);

/* cos and sin [tokens, 2 * pairs] as rope.rotation_table's: of positions [tokens] times frequencies [pairs]. */
void rotation_table(const int64_t *positions, long tokens, const float *frequencies, long pairs, float factor, float *cos,
                    float *sin);

/* Attention of single tokens over the pages of a cache, which may have 16 bits, for decode rows and chunks alike. Used by
cpu_attention.py.

A token's keys are read BLOCK by BLOCK from the first it sees on, with a running softmax (Milakov and Gimelshein 2018).
Tokens of a sequence side by side share the keys of a block, turned so that a vector is the same number of LANES keys.
Invariant: a token's result depends on its query and what it sees alone: not on the batch, nor on how a prompt is cut.
So a product of a query and a key is added up in one order, over lanes or without.
*/
#include "cpu_kernels.h"

#define BLOCK 64      /* keys; a multiple of LANES */
#define LINE 64       /* bytes of a line of the CPU's caches */
#define GROUP 8       /* query heads of a KV head computed at a time */
#define TILE 32       /* tokens */
#define TURNED 9      /* query heads for which keys are turned */
#define AT_ONCE (LANES / 4) /* of them at a time */
#define ALONE 32768   /* products that one thread has done before another one has come */

/* low and high change: of lanes `step` apart low takes the lower ones of both, high the higher ones. */
INLINE void exchange(vec *low, vec *high, int step) {
#if LANES == 16
    vec a = *low, b = *high;
    ivec from = (COUNTED & ~step) + (COUNTED & step) * (LANES / step);
    *low = (vec)_mm512_permutex2var_ps((__m512)a, (__m512i)from, (__m512)b);
    *high = (vec)_mm512_permutex2var_ps((__m512)a, (__m512i)(from + step), (__m512)b);
#else
    __m256 a = (__m256)*low, b = (__m256)*high;
    if (step == 4) *low = (vec)_mm256_permute2f128_ps(a, b, 0x20), *high = (vec)_mm256_permute2f128_ps(a, b, 0x31);
    if (step == 2) *low = (vec)_mm256_shuffle_ps(a, b, 0x44), *high = (vec)_mm256_shuffle_ps(a, b, 0xee);
    if (step == 1) {
        *low = (vec)_mm256_blend_ps(a, _mm256_moveldup_ps(b), 0xaa);
        *high = (vec)_mm256_blend_ps(_mm256_movehdup_ps(a), b, 0xaa);
    }
#endif
}

/* parts[i] and parts[i + step], added so that their sums over lanes `step` apart are neighbours: halves as many. */
INLINE void halve(vec *parts, int step) {
#pragma GCC unroll 8
    for (int i = 0; i < step; i++) {
        exchange(parts + i, parts + i + step, step);
        parts[i] += parts[i + step];
    }
}

/* The sum of each of LANES vectors, one a lane. */
INLINE vec sums(vec *parts) {
    if (LANES == 16) halve(parts, 8);
    halve(parts, 4);
    halve(parts, 2);
    halve(parts, 1);
    return parts[0];
}

/* The first `count` of them; -inf in the other lanes. */
INLINE vec shown(vec scores, int count) {
    ivec seen = COUNTED < (ivec){0} + count;
    return (vec)(((ivec)scores & seen) | ((ivec)all(-INFINITY) & ~seen));
}

/* scores [group, BLOCK] of `count` keys; what is beyond them is -inf. Meanwhile their values come, if `asks`. */
INLINE void score(const char *const *keys, long to_value, int asks, int count, const float *q, long dim, int group,
                  float scale, float (*scores)[BLOCK], enum cached kind) {
    for (int first = 0; first < count; first += LANES) {
        for (int j = first; asks && j < first + LANES; j++)
            for (long at = 0; at < dim * size_of(kind); at += LINE) __builtin_prefetch(keys[j] + to_value + at);
        for (int h = 0; h < group; h++) {
            vec parts[LANES];
#pragma GCC unroll 16
            for (int j = 0; j < LANES; j++) parts[j] = (vec){0};
            for (long d = 0; d < dim; d += LANES) {
                vec query = load(q + h * dim + d);
#pragma GCC unroll 16
                for (int j = 0; j < LANES; j++) parts[j] = chained(query, cached(keys[first + j], d, kind), parts[j]);
            }
            store(scores[h] + first, shown(sums(parts) * scale, count - first));
        }
    }
}

/* turned [dim, BLOCK] = the keys, of which there are a multiple of LANES. Meanwhile their values come. */
INLINE void turn(const char *const *keys, long to_value, int count, long dim, float *turned, enum cached kind) {
    for (int first = 0; first < count; first += LANES)
        for (long d = 0; d < dim; d += LANES) {
            vec parts[LANES];
#pragma GCC unroll 16
            for (int j = 0; j < LANES; j++) parts[j] = cached(keys[first + j], d, kind);
            for (int j = 0; j < LANES; j++) __builtin_prefetch(keys[first + j] + to_value + d * size_of(kind));
#pragma GCC unroll 4
            for (int step = LANES / 2; step; step /= 2)
#pragma GCC unroll 16
                for (int j = 0; j < LANES; j++)
                    if (!(j & step)) exchange(parts + j, parts + j + step, step);
#pragma GCC unroll 16
            for (int j = 0; j < LANES; j++) store(turned + (d + j) * BLOCK + first, parts[j]);
        }
}

/* s [rows]: of LANES keys what lane `l` of a sum over lanes has, for each query. */
INLINE void of_lane(const float *turned, const float *const *q, long dim, int l, int rows, vec *s) {
    vec key = load(turned + l * BLOCK);
    for (int r = 0; r < rows; r++) s[r] = fused(key, q[r][l], (vec){0});
    for (long d = l + LANES; d < dim; d += LANES) {
        key = load(turned + d * BLOCK);
        for (int r = 0; r < rows; r++) s[r] = fused(key, q[r][d], s[r]);
    }
}

/* The same of lanes l, l + step, l + 2 * step, ..., added up as `sums` does. */
#define OF_LANES(name, half, step) \
    INLINE void name(const float *turned, const float *const *q, long dim, int l, int rows, vec *s) { \
        vec other[AT_ONCE]; \
        half(turned, q, dim, l, rows, s); \
        half(turned, q, dim, l + step, rows, other); \
        for (int r = 0; r < rows; r++) s[r] += other[r]; \
    }
#if LANES == 16
OF_LANES(of_lanes_8, of_lane, 8)
OF_LANES(of_lanes_4, of_lanes_8, 4)
#else
OF_LANES(of_lanes_4, of_lane, 4)
#endif
OF_LANES(of_lanes_2, of_lanes_4, 2)
OF_LANES(of_lanes_1, of_lanes_2, 1)

/* scores [rows, BLOCK] of `count` keys, of which each query sees its first `seen`; -inf elsewhere. */
INLINE void score_turned(const float *turned, int count, const float *const *q, const int *seen, long dim, int rows,
                         float scale, float (*scores)[BLOCK]) {
    for (int first = 0; first < count; first += LANES)
        for (int r = 0; r < rows; r += AT_ONCE) {
            int most = rows - r < AT_ONCE ? rows - r : AT_ONCE;
            vec s[AT_ONCE];
            of_lanes_1(turned + first, q + r, dim, 0, most, s);
            for (int i = 0; i < most; i++) store(scores[r + i] + first, shown(s[i] * scale, seen[r + i] - first));
        }
}

/* out [group] of dim += weights [group, BLOCK] times the values of `count` keys. */
INLINE void add_values(const char *const *keys, long to_value, int count, long dim, int group,
                       const float (*weights)[BLOCK], float *const *out, enum cached kind) {
    for (long d = 0; d < dim; d += 2 * LANES) {
        vec sum[GROUP][2];
        for (int h = 0; h < group; h++)
            for (int r = 0; r < 2; r++) sum[h][r] = load(out[h] + d + r * LANES);
        for (int i = 0; i < count; i++) {
            const char *value = keys[i] + to_value;
            vec v[2] = {cached(value, d, kind), cached(value, d + LANES, kind)};
            for (int h = 0; h < group; h++)
                for (int r = 0; r < 2; r++) sum[h][r] = fused(v[r], weights[h][i], sum[h][r]);
        }
        for (int h = 0; h < group; h++)
            for (int r = 0; r < 2; r++) store(out[h] + d + r * LANES, sum[h][r]);
    }
}

/* Turn scores into weights; returns by what to multiply all that was summed before. */
INLINE float soften(float *scores, int count, float *best, float *total) {
    vec most = all(*best), added = {0};
    for (int i = 0; i < count; i += LANES) most = larger(most, load(scores + i));
    float top = largest(most), before = exponential(all(*best - top))[0];
    if (*best == top) before = 1.0f;
    for (int i = 0; i < count; i += LANES) {
        vec s = load(scores + i), e = exponential(s - top);
        e = (vec)((ivec)e & (s != all(-INFINITY)));
        store(scores + i, e);
        added += e;
    }
    *best = top, *total = fmaf(*total, before, sum(added));
    return before;
}

/* Where the keys of tokens [from, from + count) of a KV head are; their values lie `values_of` bytes behind. */
INLINE void find_keys(const struct attention *a, const int32_t *pages, long from, int count, long head,
                      const char **keys, enum cached kind) {
    long page = from / a->page_size, offset = from % a->page_size, of_head = a->dim * size_of(kind);
    long size = 2 * a->kv_heads * of_head;
    for (int i = 0; i < count; page++, offset = 0) {
        const char *key = a->cache + (pages[page] * a->page_size + offset) * size + head * of_head;
        for (; i < count && offset < a->page_size; i++, offset++, key += size) keys[i] = key;
    }
}

INLINE long values_of(const struct attention *a, enum cached kind) { return a->kv_heads * a->dim * size_of(kind); }

/* Query heads that share a KV head, on their way over its keys. */
struct heads {
    const float *q[GROUP];
    float *out[GROUP], best[GROUP], total[GROUP];
};

INLINE void begin(struct heads *h, int i, const float *q, float *out, long dim) {
    h->q[i] = q, h->out[i] = out, h->best[i] = -INFINITY, h->total[i] = 0;
    for (long d = 0; d < dim; d += LANES) store(out + d, (vec){0});
}

/* Scores of `seen` keys become weights, and what was summed before fits to them. */
INLINE void weigh(struct heads *h, int i, float *scores, int seen, long dim) {
    float before = soften(scores, seen, h->best + i, h->total + i), *to = h->out[i];
    for (long d = 0; d < dim && before != 1.0f; d += LANES) store(to + d, load(to + d) * before);
}

/* Sums of weighted values become means; returns whether all are numbers. */
INLINE int end(struct heads *h, int i, long dim) {
    vec poison = {0};
    for (long d = 0; d < dim; d += LANES) {
        vec mean = load(h->out[i] + d) / h->total[i];
        poison += mean * 0.0f; /* NaN where there is no number */
        store(h->out[i] + d, mean);
    }
    return sum(poison) == 0.0f;
}

/* `group` heads of a token that share the KV head `head`. */
INLINE void attend_group(const struct attention *a, long token, long head, const float *q, int group, float *out,
                         enum cached kind) {
    const int32_t *pages = (const int32_t *)a->pages[token];
    int asks = token + 1 == a->tokens || a->pages[token] != a->pages[token + 1]; /* else the one before has read them */
    const char *keys[BLOCK];
    float scores[GROUP][BLOCK];
    struct heads heads;
    for (int h = 0; h < group; h++) begin(&heads, h, q + h * a->dim, out + h * a->dim, a->dim);
    for (long at = a->first[token]; at < a->end[token]; at += BLOCK) {
        int count = a->end[token] - at < BLOCK ? a->end[token] - at : BLOCK;
        find_keys(a, pages, at, count, head, keys, kind);
        for (int i = count; i % LANES; i++) keys[i] = keys[count - 1];
        score(keys, values_of(a, kind), asks, count, q, a->dim, group, a->scale, scores, kind);
        for (int h = 0; h < group; h++) weigh(&heads, h, scores[h], count, a->dim);
        add_values(keys, values_of(a, kind), count, a->dim, group, scores, heads.out, kind);
    }
    for (int h = 0; h < group; h++) end(&heads, h, a->dim);
}

INLINE void attend_token(const struct attention *a, long token, long head, enum cached kind) {
    long group = a->heads / a->kv_heads;
    for (long done = 0; done < group;) {
        long left = group - done, at = (head * group + done) * a->dim;
        int count = left >= 8 ? 8 : left >= 4 ? 4 : left;
        const float *q = a->q + token * a->stride + at;
        float *out = a->out + token * a->heads * a->dim + at;
        if (count == 8) attend_group(a, token, head, q, 8, out, kind);
        if (count == 4) attend_group(a, token, head, q, 4, out, kind);
        if (count == 3) attend_group(a, token, head, q, 3, out, kind);
        if (count == 2) attend_group(a, token, head, q, 2, out, kind);
        if (count == 1) attend_group(a, token, head, q, 1, out, kind);
        done += count;
    }
}

/* `rows` heads of a tile over a block of `count` keys from `at` on, of tokens that see keys up to ends[row]. */
INLINE void attend_block(const struct attention *a, struct heads *heads, int rows, const long *ends, long at, int count,
                         const char *const *keys, const float *turned, enum cached kind) {
    float scores[GROUP][BLOCK];
    int seen[GROUP], widest = (count + LANES - 1) / LANES * LANES;
    for (int i = 0; i < rows; i++) {
        long left = ends[i] - at;
        seen[i] = left < 0 ? 0 : left < count ? left : count;
    }
    score_turned(turned, count, heads->q, seen, a->dim, rows, a->scale, scores);
    for (int i = 0; i < rows; i++) {
        if (seen[i]) weigh(heads, i, scores[i], seen[i], a->dim);
        for (int k = (seen[i] + LANES - 1) / LANES * LANES; k < widest; k += LANES) store(scores[i] + k, (vec){0});
    }
    add_values(keys, values_of(a, kind), count, a->dim, rows, scores, heads->out, kind);
}

/* Tokens [from, to) of a sequence that see its keys from the same one on: all heads of the KV head `head`. Returns
whether all are numbers. */
INLINE int attend_tile(const struct attention *a, long from, long to, long head, enum cached kind) {
    const int32_t *pages = (const int32_t *)a->pages[from];
    long group = a->heads / a->kv_heads, rows = (to - from) * group, last = 0;
    const char *keys[BLOCK];
    float turned[a->dim * BLOCK] __attribute__((aligned(64)));
    struct heads heads[(rows + GROUP - 1) / GROUP];
    long ends[rows];
    for (long i = 0; i < rows; i++) {
        long token = from + i / group, at = (head * group + i % group) * a->dim;
        begin(heads + i / GROUP, i % GROUP, a->q + token * a->stride + at, a->out + token * a->heads * a->dim + at, a->dim);
        ends[i] = a->end[token];
        last = ends[i] > last ? ends[i] : last;
    }
    for (long at = a->first[from]; at < last; at += BLOCK) {
        int count = last - at < BLOCK ? last - at : BLOCK;
        find_keys(a, pages, at, count, head, keys, kind);
        for (int i = count; i % LANES; i++) keys[i] = keys[count - 1];
        turn(keys, values_of(a, kind), count, a->dim, turned, kind);
        for (long i = 0; i < rows; i += GROUP) {
            if (rows - i >= GROUP) attend_block(a, heads + i / GROUP, GROUP, ends + i, at, count, keys, turned, kind);
            else attend_block(a, heads + i / GROUP, rows - i, ends + i, at, count, keys, turned, kind);
        }
    }
    int whole = 1;
    for (long i = 0; i < rows; i++) whole &= end(heads + i / GROUP, i % GROUP, a->dim);
    return whole;
}

/* For each kind of cache functions of its own, so that none is asked for within a loop. A value that is no number, which a
weight of zero does not hide, is for those tokens that see it alone: then each goes by itself. */
#define OF_KIND(token_of, tile_of, kind) \
    static __attribute__((noinline)) void token_of(const struct attention *a, long token, long head) { \
        attend_token(a, token, head, kind); \
    } \
    static void tile_of(const struct attention *a, long from, long to, long head) { \
        if (!attend_tile(a, from, to, head, kind)) \
            for (; from < to; from++) token_of(a, from, head); \
    }
OF_KIND(token_of_floats, tile_of_floats, CACHED_FLOATS)
OF_KIND(token_of_halves, tile_of_halves, CACHED_HALVES)
OF_KIND(token_of_bfloats, tile_of_bfloats, CACHED_BFLOATS)

static void (*const token_of[])(const struct attention *, long, long) = {
    token_of_floats, token_of_halves, token_of_bfloats,
};
static void (*const tile_of[])(const struct attention *, long, long, long) = {
    tile_of_floats, tile_of_halves, tile_of_bfloats,
};

/* What is computed: a token by itself, or a tile of some. */
struct tiles {
    const struct attention *a;
    const long *from; /* [tiles + 1] */
};

static void attend_task(void *data, long i) {
    const struct tiles *t = data;
    const struct attention *a = t->a;
    long head = i % a->kv_heads, from = t->from[i / a->kv_heads], to = t->from[i / a->kv_heads + 1];
    if ((to - from) * a->heads >= TURNED * a->kv_heads) tile_of[a->kind](a, from, to, head);
    else for (long token = from; token < to; token++) token_of[a->kind](a, token, head);
    long width = a->heads / a->kv_heads * a->dim, at = head * width;
    for (; a->reader && from < to; from++)
        pack(a->reader, a->out + from * a->heads * a->dim, from, a->tokens, at, at + width, a->packed);
}

void attend(const struct attention *a, int threads) {
    long from[a->tokens + 1], tiles = 0, work = a->keys * a->heads * a->dim;
    for (long t = 0; t < a->tokens; t++)
        if (!t || a->pages[t] != a->pages[t - 1] || a->first[t] != a->first[t - 1] || t - from[tiles - 1] == TILE)
            from[tiles++] = t;
    from[tiles] = a->tokens;
    struct tiles t = {a, from};
    parallel(attend_task, &t, tiles * a->kv_heads, work < ALONE ? 1 : threads);
}

/* Attention of single tokens over the pages of a float32 cache, for decode rows and chunks alike. Used by
cpu_attention.py.

A token's keys are read BLOCK by BLOCK from the first it sees on, with a running softmax (Milakov and Gimelshein 2018).
Invariant: a token's result depends on its query and what it sees alone: not on the batch, nor on how a prompt is cut.
*/
#include "cpu_kernels.h"

#define BLOCK 64      /* keys; a multiple of LANES */
#define LINE 16       /* numbers of a line of a cache */
#define GROUP 8       /* query heads of a KV head computed at a time */
#define ALONE 32768   /* products that one thread has done before another one has come */

/* parts[i] and parts[i + step], added so that their sums over lanes `step` apart are neighbours: halves as many. */
INLINE void halve(vec *parts, int step) {
#pragma GCC unroll 8
    for (int i = 0; i < step; i++) {
#if LANES == 16
        vec a = parts[i], b = parts[i + step];
        ivec low = (COUNTED & ~step) + (COUNTED & step) * (LANES / step), high = low + step;
        parts[i] = (vec)_mm512_permutex2var_ps((__m512)a, (__m512i)low, (__m512)b) +
                   (vec)_mm512_permutex2var_ps((__m512)a, (__m512i)high, (__m512)b);
#else
        __m256 a = (__m256)parts[i], b = (__m256)parts[i + step];
        if (step == 4) parts[i] = (vec)_mm256_permute2f128_ps(a, b, 0x20) + (vec)_mm256_permute2f128_ps(a, b, 0x31);
        if (step == 2) parts[i] = (vec)_mm256_shuffle_ps(a, b, 0x44) + (vec)_mm256_shuffle_ps(a, b, 0xee);
        if (step == 1)
            parts[i] = (vec)_mm256_blend_ps(a, _mm256_moveldup_ps(b), 0xaa) +
                       (vec)_mm256_blend_ps(_mm256_movehdup_ps(a), b, 0xaa);
#endif
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

/* scores [group, BLOCK] of `count` keys; what is beyond them is -inf. Meanwhile their values come, if `asks`. */
INLINE void score(const float *const *keys, long to_value, int asks, int count, const float *q, long dim, int group,
                  float scale, float (*scores)[BLOCK]) {
    for (int first = 0; first < count; first += LANES) {
        for (int j = first; asks && j < first + LANES; j++)
            for (long d = 0; d < dim; d += LINE) __builtin_prefetch(keys[j] + to_value + d);
        for (int h = 0; h < group; h++) {
            vec parts[LANES];
#pragma GCC unroll 16
            for (int j = 0; j < LANES; j++) parts[j] = (vec){0};
            for (long d = 0; d < dim; d += LANES) {
                vec query = load(q + h * dim + d);
#pragma GCC unroll 16
                for (int j = 0; j < LANES; j++) parts[j] += query * load(keys[first + j] + d);
            }
            vec s = sums(parts) * scale;
            ivec seen = COUNTED < (ivec){0} + (count - first);
            s = (vec)(((ivec)s & seen) | ((ivec)all(-INFINITY) & ~seen));
            store(scores[h] + first, s);
        }
    }
}

/* sums [group, dim] += weights [group, BLOCK] times the values of `count` keys. */
INLINE void add_values(const float *const *keys, long to_value, int count, long dim, int group,
                       const float (*weights)[BLOCK], float *out) {
    for (long d = 0; d < dim; d += 2 * LANES) {
        vec sum[GROUP][2];
        for (int h = 0; h < group; h++)
            for (int r = 0; r < 2; r++) sum[h][r] = load(out + h * dim + d + r * LANES);
        for (int i = 0; i < count; i++) {
            const float *value = keys[i] + to_value + d;
            vec v[2] = {load(value), load(value + LANES)};
            for (int h = 0; h < group; h++)
                for (int r = 0; r < 2; r++) sum[h][r] = sum[h][r] + weights[h][i] * v[r];
        }
        for (int h = 0; h < group; h++)
            for (int r = 0; r < 2; r++) store(out + h * dim + d + r * LANES, sum[h][r]);
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
    *best = top, *total = *total * before + sum(added);
    return before;
}

/* Where the keys of tokens [from, from + count) of a KV head are. */
INLINE void find_keys(const struct attention *a, const int32_t *pages, long from, int count, long head,
                      const float **keys) {
    long page = from / a->page_size, offset = from % a->page_size, size = 2 * a->kv_heads * a->dim;
    for (int i = 0; i < count; page++, offset = 0) {
        const float *key = a->cache + (pages[page] * a->page_size + offset) * size + head * a->dim;
        for (; i < count && offset < a->page_size; i++, offset++, key += size) keys[i] = key;
    }
}

/* `group` heads of a token that share the KV head `head`. */
INLINE void attend_group(const struct attention *a, long token, long head, const float *q, int group, float *out) {
    const int32_t *pages = (const int32_t *)a->pages[token];
    int asks = token + 1 == a->tokens || a->pages[token] != a->pages[token + 1]; /* else the one before has read them */
    const float *keys[BLOCK];
    float scores[GROUP][BLOCK], best[GROUP], total[GROUP];
    for (int h = 0; h < group; h++) best[h] = -INFINITY, total[h] = 0;
    for (long i = 0; i < group * a->dim; i += LANES) store(out + i, (vec){0});
    for (long at = a->first[token]; at < a->end[token]; at += BLOCK) {
        int count = a->end[token] - at < BLOCK ? a->end[token] - at : BLOCK;
        find_keys(a, pages, at, count, head, keys);
        for (int i = count; i % LANES; i++) keys[i] = keys[count - 1];
        score(keys, a->kv_heads * a->dim, asks, count, q, a->dim, group, a->scale, scores);
        for (int h = 0; h < group; h++) {
            float before = soften(scores[h], count, best + h, total + h), *to = out + h * a->dim;
            for (long d = 0; d < a->dim && before != 1.0f; d += LANES) store(to + d, load(to + d) * before);
        }
        add_values(keys, a->kv_heads * a->dim, count, a->dim, group, scores, out);
    }
    for (int h = 0; h < group; h++)
        for (long d = 0; d < a->dim; d += LANES) store(out + h * a->dim + d, load(out + h * a->dim + d) / total[h]);
}

static void attend_task(void *data, long i) {
    const struct attention *a = data;
    long token = i / a->kv_heads, head = i % a->kv_heads, group = a->heads / a->kv_heads;
    for (long done = 0; done < group;) {
        long left = group - done, at = (head * group + done) * a->dim;
        int count = left >= 8 ? 8 : left >= 4 ? 4 : left;
        const float *q = a->q + token * a->stride + at;
        float *out = a->out + token * a->heads * a->dim + at;
        if (count == 8) attend_group(a, token, head, q, 8, out);
        if (count == 4) attend_group(a, token, head, q, 4, out);
        if (count == 3) attend_group(a, token, head, q, 3, out);
        if (count == 2) attend_group(a, token, head, q, 2, out);
        if (count == 1) attend_group(a, token, head, q, 1, out);
        done += count;
    }
}

void attend(const struct attention *a, int threads) {
    long tokens = a->tokens, work = a->keys * a->heads * a->dim;
    parallel(attend_task, (void *)a, tokens * a->kv_heads, work < ALONE ? 1 : threads);
}

/* Drawing tokens: the sampler's argmax and race (sampler/reference.py, sampler/race.py), a row in one pass or two. Used
by cpu_draw.py.

Invariant: a row's id is a function of its logits, mask, temperature and key; it is that of the reference, but where the
best two scores differ by as much as float32's logarithms do.
*/
#include "cpu_kernels.h"

#define FACTOR 0x9E3779B1u /* as in race.py, as all that follows */
#define MARGIN 1e-3f
#define LOG_STEP 8.26295829e-08f /* log 2 / 2**23 */
#define LOG_ONE 110.210403f      /* 159 log 2 */
#define BELOW_ONE 0.99999994f    /* 1 - 2**-24 */

typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));

INLINE uvec fold(uvec h, int bits) { return h ^ (h >> bits); }

/* 32 bits for each token from `id` on; see race.hashes. */
INLINE uvec hashes(uint32_t id, uint64_t key) {
    uvec h = ((uvec)COUNTED + id) * FACTOR + (uint32_t)key;
    h = fold(fold(h, 16) * 0x21F0AAADu, 15) ^ (uint32_t)(key >> 32);
    return fold(h * 0x735A2D97u, 15);
}

/* Numbers without sign, rounded once. */
INLINE vec unsigned_floats(uvec h) { return floats((ivec)(h >> 16)) * 65536.0f + floats((ivec)(h & 0xffff)); }

/* What the race's clock says of a token: its score. */
static float score_of(float z, float h) {
    float v = (h + 0.5f) * 0x1p-32f;
    return z - logf(-log1pf(-(v < BELOW_ONE ? v : BELOW_ONE)));
}

struct row {
    const float *x;
    const uint32_t *mask; /* or NULL */
    long vocab;
};

/* Logits from token i on; what is forbidden, or beyond the vocabulary, is -inf. */
INLINE vec part(const struct row *a, long i) {
    float rest[LANES];
    vec x;
    if (i + LANES <= a->vocab) x = load(a->x + i);
    else {
        for (int k = 0; k < LANES; k++) rest[k] = i + k < a->vocab ? a->x[i + k] : -INFINITY;
        x = load(rest);
    }
    if (!a->mask) return x;
    ivec allowed = -((((ivec){0} + (int32_t)(a->mask[i / 32] >> i % 32)) >> COUNTED) & 1);
    return (vec)(((ivec)x & allowed) | ((ivec)all(-INFINITY) & ~allowed));
}

/* Whether none of the tokens from i on is allowed. */
INLINE int closed(const struct row *a, long i) { return a->mask && !(uint32_t)(a->mask[i / 32] >> i % 32 << (32 - LANES)); }

INLINE int any(ivec m) {
#if LANES == 16
    return _mm512_test_epi32_mask((__m512i)m, (__m512i)m) != 0;
#else
    return _mm256_movemask_ps((__m256)m) != 0;
#endif
}

/* The largest allowed logit, the first of its tokens, and whether one that is NaN or +inf is anywhere. */
static int best_of(const struct row *a, float *largest_logit, int64_t *id) {
    vec most = all(-INFINITY);
    ivec where = COUNTED, wrong = {0};
    struct row raw = {a->x, NULL, a->vocab};
    for (long i = 0; i < a->vocab; i += LANES) {
        vec x = part(&raw, i);
        wrong |= (ivec)~(x <= all(3.40282347e38f));
        if (closed(a, i)) continue;
        if (a->mask) x = part(a, i);
        ivec more = x > most;
        if (!any(more)) continue;
        most = (vec)(((ivec)x & more) | ((ivec)most & ~more));
        where = ((COUNTED + (int32_t)i) & more) | (where & ~more);
    }
    *largest_logit = largest(most), *id = INT32_MAX;
    for (int k = 0; k < LANES; k++)
        if (most[k] == *largest_logit && where[k] < *id) *id = where[k];
    return any(wrong);
}

/* The winner of the race; `top`: the largest allowed logit. */
static int64_t race(const struct row *a, float top, float inverse_temperature, uint64_t key) {
    float best = -INFINITY;
    int64_t winner = 0;
    for (long i = 0; i < a->vocab; i += LANES) {
        if (closed(a, i)) continue;
        vec z = (part(a, i) - top) * inverse_temperature, h = unsigned_floats(hashes(i, key));
        ivec close = z - floats((ivec)h) * LOG_STEP >= all(best - LOG_ONE - MARGIN);
        if (!any(close)) continue;
        for (int k = 0; k < LANES; k++) {
            if (!close[k] || z[k] == -INFINITY) continue;
            float score = score_of(z[k], h[k]);
            if (score > best) best = score, winner = i + k;
        }
    }
    return winner;
}

static void draw_task(void *data, long i) {
    const struct draw *a = data;
    struct row row = {a->logits + i * a->vocab, a->masks ? a->masks + i * a->words : NULL, a->vocab};
    float top;
    int wrong = best_of(&row, &top, a->ids + i);
    a->poison[i] = wrong || !(top > -INFINITY);
    if (a->poison[i]) a->ids[i] = 0;
    else if (!a->greedy[i]) a->ids[i] = race(&row, top, a->inverse_temperature[i], a->keys[i]);
}

void draw(const struct draw *a, int threads) { parallel(draw_task, (void *)a, a->rows, threads); }

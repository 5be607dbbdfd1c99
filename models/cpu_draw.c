/* Drawing tokens: the sampler's argmax and race (sampler/reference.py, race.py, philox.py), a row in one pass or two,
and what a slot's numbers become by it (slots.py). Used by cpu_draw.py and slots.py.

All of it is little work, but behind a forward that left nothing in the caches each small operation of torch or numpy
takes ten times what it takes alone.
Invariant: a row's id is a function of its logits, mask, position and slot's parameters; it is that of the reference, but
where the best two scores differ by as much as float32's logarithms do.
*/
#include "cpu_kernels.h"

#define FACTOR 0x9E3779B1u /* as in race.py, as all that follows */
#define MARGIN 1e-3f
#define LOG_STEP 8.26295829e-08f /* log 2 / 2**23 */
#define LOG_ONE 110.210403f      /* 159 log 2 */
#define BELOW_ONE 0.99999994f    /* 1 - 2**-24 */

enum { STOP = 1, AT_LIMIT = 2, POISON = 3 }; /* messages.Finish */
enum { GREEDY = 1 };                         /* state.GREEDY */
#define NO_TOKEN (-1)

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

/* Philox4x32-10 of a position: the key of its draw. */
static uint64_t key_of(uint64_t seed, uint64_t position) {
    uint32_t c[4] = {position, position >> 32, 0, 0}, k[2] = {seed, seed >> 32};
    for (int round = 0; round < 10; round++, k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u) {
        uint64_t first = (uint64_t)c[0] * 0xD2511F53u, second = (uint64_t)c[2] * 0xCD9E8D57u;
        c[0] = (second >> 32) ^ c[1] ^ k[0], c[2] = (first >> 32) ^ c[3] ^ k[1];
        c[1] = second, c[3] = first;
    }
    return c[0] | (uint64_t)c[1] << 32;
}

static void draw_task(void *data, long i) {
    const struct draw *a = data;
    long slot = a->slots[i];
    const int64_t *own = a->ints + slot * a->ints_width, *stops = a->stop_ids + slot * a->stops;
    struct row row = {a->logits + i * a->vocab, a->masks ? a->masks + i * a->words : NULL, a->vocab};
    float top;
    int wrong = best_of(&row, &top, a->ids + i);
    a->finish[i] = wrong || !(top > -INFINITY) ? POISON : 0;
    if (a->finish[i]) a->ids[i] = 0;
    else if (!(own[a->needs] & GREEDY)) {
        float inverse_temperature = a->floats[slot * a->floats_width];
        a->ids[i] = race(&row, top, inverse_temperature, key_of(own[0], a->positions[i]));
    }
    for (long k = 0; k < a->stops && !a->finish[i]; k++) a->finish[i] = a->ids[i] == stops[k] ? STOP : 0;
}

void draw(const struct draw *a, int threads) { parallel(draw_task, (void *)a, a->rows, threads); }

/* The numbers of a slot, each of all slots together; as slots.NUMBERS. */
enum number { LENGTH, LAST, LIMIT, SHIFT, DONE };

void prepare(const struct slots *a, int64_t *read, int32_t *lengths) {
    const int32_t *n = a->numbers;
    for (long i = 0; i < a->rows; i++) {
        long slot = a->row[i], length = n[LENGTH * a->count + slot], column = length / a->page_size;
        int done = n[DONE * a->count + slot] != 0;
        column = column < a->pages ? column : a->pages - 1;
        read[i] = n[LAST * a->count + slot];
        read[a->rows + i] = done ? 0 : length + n[SHIFT * a->count + slot];
        long page = a->tables[slot * a->pages + column];
        read[2 * a->rows + i] = done ? a->scratch : page * a->page_size + length % a->page_size;
        read[3 * a->rows + i] = length + 1;
        lengths[i] = done ? 1 : length + 1;
    }
}

void advance(const struct slots *a, const int64_t *draw_positions, const int64_t *ids, const uint8_t *finish,
             int32_t *out) {
    int32_t *n = a->numbers;
    for (long i = 0; i < a->rows; i++) {
        long slot = a->row[i];
        int done = n[DONE * a->count + slot] != 0, ends = finish[i];
        if (!ends && draw_positions[i] + 1 >= n[LIMIT * a->count + slot]) ends = AT_LIMIT;
        out[i] = done ? NO_TOKEN : ids[i], out[a->rows + i] = done ? 0 : ends;
        if (done) continue;
        n[LENGTH * a->count + slot] = draw_positions[i];
        n[LAST * a->count + slot] = ids[i];
        n[DONE * a->count + slot] = ends != 0;
    }
}

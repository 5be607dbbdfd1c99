/* Layers of a decoder in one call, made of the other files' parts. Used by cpu_decoder.py.

At batch 1 a layer is some hundred microseconds of work: what Python takes between its nine parts would be a quarter of
it. Invariant: the result is that of the same parts called one by one, bit for bit.
*/
#include <string.h>

#include "cpu_kernels.h"

#define MOST_PIECES 8192   /* of the cache, asked for before a layer reads them */
#define MOST_BYTES 6000000 /* the same: what the last-level cache holds for sure */

struct layer {
    struct map qkv, o, gate_up, down;
    const float *qk_norm, *mlp_norm;
    const float *next_norm; /* what the residual stream is normalised with after this layer */
    const int64_t *first;   /* as attention.first */
    long keys;              /* as attention.keys */
    char *cache;
    int rotates;
};

/* The slots of the cache that are read, of sequences with tokens side by side once; at most `most`. */
static long seen(const struct attention *a, const int64_t *first, int64_t *slots, long most) {
    long count = 0;
    most = most < MOST_PIECES ? most : MOST_PIECES;
    for (long t = 0; t < a->tokens; t++) {
        if (t + 1 < a->tokens && a->pages[t] == a->pages[t + 1]) continue; /* the next one sees more */
        const int32_t *pages = (const int32_t *)a->pages[t];
        for (long at = first[t]; at < a->end[t] && count < most; at++)
            slots[count++] = pages[at / a->page_size] * a->page_size + at % a->page_size;
    }
    return count;
}

/* x [count, width] = rows of x; `room` is as large. */
static void gather(float *x, const int64_t *rows, long count, long width, float *room) {
    for (long i = 0; i < count; i++) memcpy(room + i * width, x + rows[i] * width, width * sizeof(float));
    memcpy(x, room, count * width * sizeof(float));
}

/* Normed hidden states x and the residual stream, both [tokens, hidden], go through all layers; from the last one's
attention on only `rows` [wanted <= tokens] of them do, if not NULL, and are the first ones then. `rotation` and
`attention` say all but what `layers` do; their qkv, q and out are scratch memory, as are `inner` [tokens, inter] and
`packed` [2, tokens, 1.5 times `widest`, the most inputs of a map]. What makes a map's inputs packs them as well, so that
there are few parts, after each of which threads wait for one another. */
void run_layers(const struct layer *layers, long count, float *x, float *residual, const struct rotation *rotation,
                const struct attention *attention, float *inner, float *packed, long widest, const int64_t *rows,
                long wanted, float residual_scale, float eps, int threads) {
    struct rotation r = *rotation;
    struct attention a = *attention;
    int64_t pieces[MOST_PIECES];
    struct ahead next = {NULL, pieces, 0, 2 * a.kv_heads * a.dim * size_of(a.kind)};
    if (count > 1) next.count = seen(&a, layers->first, pieces, MOST_BYTES / next.bytes);
    float *read = packed + a.tokens * (widest + widest / 2); /* what `down` reads */
    a.packed = packed;
    pack_rows(&layers->qkv, x, a.tokens, packed, threads);
    for (const struct layer *l = layers; l < layers + count; l++) {
        int last = l + 1 == layers + count;
        const struct ahead *ahead = last ? NULL : &next;
        if (!last) next.base = l[1].cache;
        long tokens = a.tokens, hidden = l->o.outputs;
        multiply(&l->qkv, x, tokens, packed, r.qkv, NULL, threads);
        r.qk_norm = l->qk_norm, r.cache = l->cache;
        r.cos = l->rotates ? rotation->cos : NULL;
        rotate_and_write(&r, threads);
        a.cache = l->cache, a.first = l->first, a.keys = l->keys;
        if (last && rows && !wanted) break;
        a.reader = (last && rows) || a.heads / a.kv_heads * a.dim % 32 ? NULL : &l->o;
        attend(&a, threads);
        if (last && rows) {
            tokens = wanted;
            gather(a.out, rows, wanted, l->o.inputs, packed);
            gather(residual, rows, wanted, hidden, packed);
        }
        if (!a.reader) pack_rows(&l->o, a.out, tokens, packed, threads);
        multiply(&l->o, a.out, tokens, packed, x, NULL, threads);
        rms_norm_for(&l->gate_up, packed, x, residual, l->mlp_norm, tokens, hidden, residual_scale, eps, threads);
        gated(&l->gate_up, x, tokens, packed, inner, &l->down, read, ahead, threads);
        multiply(&l->down, inner, tokens, read, x, NULL, threads);
        rms_norm_for(last ? NULL : &l[1].qkv, packed, x, residual, l->next_norm, tokens, hidden, residual_scale, eps,
                     threads);
    }
    rest();
}

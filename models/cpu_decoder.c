/* Layers of a decoder in one call, made of the other files' parts. Used by cpu_decoder.py.

At batch 1 a layer is some hundred microseconds of work: what Python takes between its nine parts would be a quarter of
it. Invariant: the result is that of the same parts called one by one, bit for bit.
*/
#include "cpu_kernels.h"

struct layer {
    struct map qkv, o, gate_up, down;
    const float *qk_norm, *mlp_norm;
    const float *next_norm; /* what the residual stream is normalised with after this layer */
    const int64_t *first;   /* as attention.first */
    long keys;              /* as attention.keys */
    float *cache;
    int rotates;
};

/* Hidden states x and the residual stream, both [tokens, hidden], go through layers. `rotation` and `attention` say all
but what `layers` do; their qkv, q and out are scratch memory, as are `wide` [tokens, 3 * inter] and `packed` [tokens, the
most inputs of a map]. */
void run_layers(const struct layer *layers, long count, float *x, float *residual, const struct rotation *rotation,
                const struct attention *attention, float *wide, float *packed, float residual_scale, float eps,
                int threads) {
    struct rotation r = *rotation;
    struct attention a = *attention;
    for (const struct layer *l = layers; l < layers + count; l++) {
        long tokens = a.tokens, hidden = l->o.outputs, inter = l->down.inputs;
        float *inner = wide + 2 * tokens * inter;
        linear(&l->qkv, x, tokens, packed, r.qkv, threads);
        r.qk_norm = l->qk_norm, r.cache = l->cache;
        r.cos = l->rotates ? rotation->cos : NULL;
        rotate_and_write(&r, threads);
        a.cache = l->cache, a.first = l->first, a.keys = l->keys;
        attend(&a, threads);
        linear(&l->o, a.out, tokens, packed, x, threads);
        rms_norm(x, residual, l->mlp_norm, tokens, hidden, residual_scale, eps, threads);
        linear(&l->gate_up, x, tokens, packed, wide, threads);
        silu_mul(wide, inner, tokens, inter, threads);
        linear(&l->down, inner, tokens, packed, x, threads);
        rms_norm(x, residual, l->next_norm, tokens, hidden, residual_scale, eps, threads);
    }
}

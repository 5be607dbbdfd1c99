/* What lies between the linear maps of a layer, in float32: RMSNorm, rotation with the write of keys and values, and
the MLP's activation. Used by cpu_ops.py, whose tests compare with layers.py.

Invariant: a row's result does not depend on the batch that it is in. Widths are multiples of LANES.
*/
#include "cpu_kernels.h"

#define ALONE 16384 /* numbers that one thread has done before another one has come */

INLINE int threads_for(long numbers, int threads) { return numbers < ALONE ? 1 : threads; }

struct norm {
    float *x, *residual;
    const float *weight;
    long hidden;
    float scale, eps;
};

static void norm_task(void *data, long row) {
    const struct norm *a = data;
    float *x = a->x + row * a->hidden, *residual = a->residual ? a->residual + row * a->hidden : x;
    vec squares[2] = {{0}, {0}};
    for (long i = 0; i < a->hidden; i += LANES) {
        vec r = load(residual + i);
        if (a->residual) store(residual + i, r = r + a->scale * load(x + i));
        squares[i / LANES % 2] += r * r;
    }
    float factor = 1.0f / sqrtf(sum(squares[0] + squares[1]) / a->hidden + a->eps);
    for (long i = 0; i < a->hidden; i += LANES) store(x + i, load(residual + i) * factor * load(a->weight + i));
}

/* residual += scale * x, then x = rms_norm(residual); without residual x = rms_norm(x). Both [rows, hidden]. */
void rms_norm(float *x, float *residual, const float *weight, long rows, long hidden, float scale, float eps,
              int threads) {
    struct norm a = {x, residual, weight, hidden, scale, eps};
    parallel(norm_task, &a, rows, threads_for(rows * hidden, threads));
}

struct rotation {
    float *qkv;
    long heads, kv_heads, dim, rotated;
    const float *cos, *sin;
    const int64_t *slots;
    float *cache;
};

static void rotate_task(void *data, long token) {
    const struct rotation *a = data;
    long half = a->rotated / 2, width = a->kv_heads * a->dim;
    float *x = a->qkv + token * (a->heads + 2 * a->kv_heads) * a->dim;
    const float *cos = a->cos + token * a->rotated, *sin = a->sin + token * a->rotated;
    for (long h = 0; h < a->heads + a->kv_heads && a->cos; h++)
        for (long i = 0; i < half; i += LANES) {
            float *low = x + h * a->dim + i, *high = low + half;
            vec first = load(low), second = load(high);
            store(low, first * load(cos + i) + second * load(sin + i));
            store(high, second * load(cos + half + i) + first * load(sin + half + i));
        }
    float *to = a->cache + a->slots[token] * 2 * width;
    for (long i = 0; i < 2 * width; i += LANES) store(to + i, load(x + a->heads * a->dim + i));
}

/* Rotate queries and keys of qkv [tokens, heads + 2 * kv_heads, dim] in place, and write keys and values to
cache [slots, 2, kv_heads, dim]. cos and sin [tokens, rotated] as rope.rotation_table's, or NULL: nothing rotates. */
void rotate_and_write(float *qkv, long tokens, long heads, long kv_heads, long dim, long rotated, const float *cos,
                      const float *sin, const int64_t *slots, float *cache, int threads) {
    struct rotation a = {qkv, heads, kv_heads, dim, rotated, cos, sin, slots, cache};
    parallel(rotate_task, &a, tokens, threads_for(tokens * (heads + 2 * kv_heads) * dim, threads));
}

struct activation {
    const float *gate_up;
    float *y;
    long inter;
};

static void silu_task(void *data, long row) {
    const struct activation *a = data;
    const float *gate = a->gate_up + row * 2 * a->inter, *up = gate + a->inter;
    float *y = a->y + row * a->inter;
    for (long i = 0; i < a->inter; i += LANES) {
        vec g = load(gate + i);
        store(y + i, g / (1.0f + exponential(-g)) * load(up + i));
    }
}

/* y [rows, inter] = silu(gate) * up of gate_up [rows, 2 * inter]. */
void silu_mul(const float *gate_up, float *y, long rows, long inter, int threads) {
    struct activation a = {gate_up, y, inter};
    parallel(silu_task, &a, rows, threads_for(rows * inter, threads));
}

/* What lies between the linear maps of a layer, in float32: RMSNorm, rotation with the write of keys and values, and
the MLP's activation. Used by cpu_ops.py and cpu_decoder.c; tests compare with layers.py.

Invariant: a row's result does not depend on the batch that it is in. Widths are multiples of LANES.
*/
#include "cpu_kernels.h"

#define ALONE 8192 /* numbers that one thread has done before another one has come */

INLINE int threads_for(long numbers, int threads) { return numbers < ALONE ? 1 : threads; }

struct norm {
    float *x, *residual;
    const float *weight;
    long rows, hidden;
    float scale, eps;
    const struct map *reader;
    float *packed;
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
    if (a->reader) pack(a->reader, x, row, a->rows, 0, a->hidden, a->packed);
}

void rms_norm_for(const struct map *reader, float *packed, float *x, float *residual, const float *weight, long rows,
                  long hidden, float scale, float eps, int threads) {
    struct norm a = {x, residual, weight, rows, hidden, scale, eps, reader, packed};
    int packing = reader ? packers(reader, rows, threads) : 1, alone = threads_for(rows * hidden, threads);
    parallel(norm_task, &a, rows, packing > alone ? packing : alone);
}

void rms_norm(float *x, float *residual, const float *weight, long rows, long hidden, float scale, float eps,
              int threads) {
    rms_norm_for(NULL, NULL, x, residual, weight, rows, hidden, scale, eps, threads);
}

/* Normalise and rotate one head. */
INLINE void rotate_head(const struct rotation *a, float *x, const float *weight, const float *cos, const float *sin) {
    if (weight) {
        vec squares = {0};
        for (long i = 0; i < a->dim; i += LANES) squares += load(x + i) * load(x + i);
        float factor = 1.0f / sqrtf(sum(squares) / a->dim + a->eps);
        for (long i = 0; i < a->dim; i += LANES) store(x + i, load(x + i) * factor * load(weight + i));
    }
    long half = a->rotated / 2;
    for (long i = 0; cos && i < half; i += LANES) {
        vec low = load(x + i), high = load(x + half + i);
        store(x + i, low * load(cos + i) + high * load(sin + i));
        store(x + half + i, high * load(cos + half + i) + low * load(sin + half + i));
    }
}

static void rotate_task(void *data, long token) {
    const struct rotation *a = data;
    long width = 2 * a->kv_heads * a->dim;
    float *x = a->qkv + token * (a->heads * a->dim + width), *both = x + a->heads * a->dim;
    char *to = a->cache + a->slots[token] * width * size_of(a->kind);
    const float *cos = a->cos ? a->cos + token * a->rotated : NULL, *sin = a->sin + token * a->rotated;
    for (long h = 0; h < a->heads + a->kv_heads; h++)
        rotate_head(a, x + h * a->dim, a->qk_norm ? a->qk_norm + h * a->dim : NULL, cos, sin);
    for (long i = 0; i < width; i += LANES) to_cache(to, i, load(both + i), a->kind);
}

void rotate_and_write(const struct rotation *a, int threads) {
    long numbers = a->tokens * (a->heads + 2 * a->kv_heads) * a->dim;
    parallel(rotate_task, (void *)a, a->tokens, threads_for(numbers, threads));
}

void rotation_table(const int64_t *positions, long tokens, const float *frequencies, long pairs, float factor, float *cos,
                    float *sin) {
    for (long t = 0; t < tokens; t++)
        for (long i = 0; i < pairs; i++) {
            float angle = (float)positions[t] * frequencies[i], c = cosf(angle) * factor, s = sinf(angle) * factor;
            float *to = cos + 2 * t * pairs + i;
            to[0] = to[pairs] = c;
            to = sin + 2 * t * pairs + i;
            to[0] = -s, to[pairs] = s;
        }
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
    for (long i = 0; i < a->inter; i += LANES) store(y + i, silu(load(gate + i)) * load(up + i));
}

void silu_mul(const float *gate_up, float *y, long rows, long inter, int threads) {
    struct activation a = {gate_up, y, inter};
    parallel(silu_task, &a, rows, threads_for(rows * inter, threads));
}

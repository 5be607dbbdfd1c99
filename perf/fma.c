/* What a core can do at most: fused multiply-adds in registers, or loads of memory, and nothing else. Used by
cpu_parts.py. */
#include "../models/cpu_kernels.h"

#define CHAINS 12 /* more than one takes in cycles, times two units */

/* `count` times CHAINS vectors; returns the floating point operations. */
long fused_multiply_adds(long count, float *out) {
    vec sums[CHAINS], factor = all(out[0]), addend = all(out[1]);
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++) sums[i] = all(i);
    for (long k = 0; k < count; k++)
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) {
            sums[i] = sums[i] * factor + addend;
            asm("" : "+v"(sums[i]));
        }
#pragma GCC unroll 12
    for (int i = 1; i < CHAINS; i++) sums[0] += sums[i];
    out[0] = sum(sums[0]);
    return count * CHAINS * LANES * 2;
}

/* Load `count` numbers, a multiple of 64; returns something of all of them, so that no load is left out. */
float load_all(const float *p, long count) {
    vec sums[4] = {{0}, {0}, {0}, {0}};
    for (const float *end = p + count; p < end; p += 64) {
        for (int at = 0; at < 64; at += 16) __builtin_prefetch(p + 1024 + at);
        for (int at = 0; at < 64; at += LANES) sums[at / LANES % 4] += load(p + at);
    }
    return sum(sums[0] + sums[1] + sums[2] + sums[3]);
}

/* What a core can do at most: fused multiply-adds in registers and nothing else. Used by cpu_parts.py. */
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

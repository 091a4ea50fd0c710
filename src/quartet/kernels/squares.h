/* The sum of squares of one block after the other: float32 within a row of numbers, double from row to row. */

enum { SQUARES_BLOCK = 65536, SQUARES_ROW = 1024 };

CLONES static double squares_of_block(const float *x, long count) {
    double total = 0.0;
    for (long start = 0; start < count; start += SQUARES_ROW) {
        const long end = count - start < SQUARES_ROW ? count : start + SQUARES_ROW;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long i = start; i < end; i++) sum += x[i] * x[i];
        total += sum;
    }
    return total;
}

static void squares_of_blocks(const float *x, double *sums, long from, long to, long count) {
    for (long b = from; b < to; b++) {
        const long left = count - b * SQUARES_BLOCK;
        sums[b] = squares_of_block(x + b * SQUARES_BLOCK, left < SQUARES_BLOCK ? left : SQUARES_BLOCK);
    }
}

/* Of each block of SQUARES_BLOCK numbers, the last of which may be shorter: the same whatever the number of threads. */
void squares_f32(const float *x, double *sums, long count, long threads) {
    const long blocks = (count + SQUARES_BLOCK - 1) / SQUARES_BLOCK;
    if (blocks < threads) threads = 1;
    RANGE(blocks, threads, squares_of_blocks(x, sums, from, to, count));
}

/* Drawing tokens from logits: included for each dtype of logits. */

/* Parts of the largest logit's probability, and their sum; 0 where nothing would be left of one. */
INLINE float NAMED(parts)(const NUMBER *logits, long count, float top, float by, float *out) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (long j = 0; j < count; j++) {
        out[j] = exponential((LOAD(logits + j) - top) * by);
        sum += out[j];
    }
    return sum;
}

/* One row: the first token at which the running sum of probabilities exceeds `uniform` times their total; the most likely one where
 * that is below 0. `sums`: a number for each block. */
CLONES static void NAMED(draw_row)(const NUMBER *logits, long vocabulary, double uniform, float by, float *sums, long *token,
                                   float *logprob) {
    const long blocks = (vocabulary + BLOCK - 1) / BLOCK;
    float part[BLOCK], top = -INFINITY;
    int sound = 1;
#pragma omp simd reduction(max : top) reduction(& : sound)
    for (long j = 0; j < vocabulary; j++) {
        const float logit = LOAD(logits + j);
        top = logit > top ? logit : top;
        sound &= logit == logit;
    }
    double total = 0.0;
    for (long block = 0; block < blocks; block++) {
        const long start = block * BLOCK, some = vocabulary - start < BLOCK ? vocabulary - start : BLOCK;
        total += sums[block] = NAMED(parts)(logits + start, some, top, by, part);
    }
    long found = vocabulary - 1;
    if (!sound || !isfinite(top)) {
        *token = found;
        *logprob = NAN;
        return;
    }
    if (uniform < 0.0) {
        for (found = 0; LOAD(logits + found) != top; found++)
            ;
    } else {
        const double target = uniform * total;
        double before = 0.0;
        long block = 0, last = 0;
        for (; block < blocks && before + sums[block] <= target; before += sums[block++])
            if (sums[block] > 0.0f) last = block;
        if (block == blocks) before -= sums[block = last]; /* rounding: the last that has a probability */
        const long start = block * BLOCK, some = vocabulary - start < BLOCK ? vocabulary - start : BLOCK;
        NAMED(parts)(logits + start, some, top, by, part);
        for (long j = 0; j < some; j++) {
            if (part[j] > 0.0f) found = start + j;
            before += part[j];
            if (part[j] > 0.0f && before > target) break;
        }
    }
    *token = found;
    *logprob = (LOAD(logits + found) - top) * by - (float)log(total);
}

/* A token for each row of logits `[rows, vocabulary]`, and its log-probability under softmax(logits * by); `uniform` is null for
 * the most likely ones. `sums`: a number for each block of each row. A row that is not finite has none. */
void NAMED(draw)(const NUMBER *logits, const double *uniform, long *tokens, float *logprobs, float *sums, long rows, long vocabulary,
                 float by, long threads) {
    const long blocks = (vocabulary + BLOCK - 1) / BLOCK;
    if (rows * vocabulary < LEAST) threads = 1;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (long m = 0; m < rows; m++)
        NAMED(draw_row)(logits + m * vocabulary, vocabulary, uniform ? uniform[m] : -1.0, by, sums + m * blocks, tokens + m,
                        logprobs + m);
}

/* The softmax of logits, a part of the vocabulary at a time: included for each dtype of logits. */

/* One row: its largest logit so far, the sum of e = exp((logit - largest) by) and, unless null, that of e log e, carried on over some
 * columns (arXiv 1805.02867). `written`: e takes the place of the logits, below the largest of these columns and those before. */
CLONES static void NAMED(exponentials_row)(NUMBER *logits, float *largest, float *total, float *weighted, long columns, float by,
                                           long written) {
    float top = *largest, e[BLOCK];
#pragma omp simd reduction(max : top)
    for (long j = 0; j < columns; j++) {
        const float logit = LOAD(logits + j);
        top = logit > top ? logit : top;
    }
    double sum = 0.0, sum_weighted = 0.0;
    for (long start = 0; start < columns; start += BLOCK) {
        const long some = columns - start < BLOCK ? columns - start : BLOCK;
        NUMBER *x = logits + start;
        sum += NAMED(parts)(x, some, top, by, e);
        if (weighted) {
            float part = 0.0f;
#pragma omp simd reduction(+ : part)
            for (long j = 0; j < some; j++) {
                const float below = (LOAD(x + j) - top) * by;
                part += e[j] * (below < LOWEST ? LOWEST : below);
            }
            sum_weighted += part;
        }
        if (written) {
#pragma omp simd
            for (long j = 0; j < some; j++) STORE(x + j, e[j]);
        }
    }
    float lower = (*largest - top) * by;
    lower = lower < LOWEST ? LOWEST : lower;
    const float shrunk = exponential(lower);
    if (weighted) *weighted = (float)(shrunk * (*weighted + *total * lower) + sum_weighted);
    *total = (float)(shrunk * *total + sum);
    *largest = top;
}

/* Rows `[rows, columns]`, from one to the next `row` numbers; a number for each row in the other arrays. */
void NAMED(exponentials)(NUMBER *logits, float *largest, float *total, float *weighted, long rows, long columns, long row, float by,
                         long written, long threads) {
    if (rows * columns < LEAST) threads = 1;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (long i = 0; i < rows; i++)
        NAMED(exponentials_row)(logits + i * row, largest + i, total + i, weighted ? weighted + i : 0, columns, by, written);
}

/* One row of logits to the gradient of a weighted sum of its token's log-probability, log p = (logit - largest) by - log_total, and its
 * entropy: (1[token] - p) times the weight of the first, less p (log p + entropy) times that of the second; both weights times `by`.
 * `place`: the token's among these columns, if it is there. */
CLONES static void NAMED(slope_row)(NUMBER *logits, float largest, float log_total, float by_logprob, float by_entropy, float entropy,
                                    long place, long columns, float by) {
    float own = 0.0f;
    const int here = place >= 0 && place < columns;
    if (here) {
        const float log_p = (LOAD(logits + place) - largest) * by - log_total;
        own = by_logprob - (by_logprob + by_entropy * ((log_p < LOWEST ? LOWEST : log_p) + entropy)) * exponential(log_p);
    }
#pragma omp simd
    for (long j = 0; j < columns; j++) {
        const float log_p = (LOAD(logits + j) - largest) * by - log_total, p = exponential(log_p);
        STORE(logits + j, -(by_logprob + by_entropy * ((log_p < LOWEST ? LOWEST : log_p) + entropy)) * p);
    }
    if (here) STORE(logits + place, own);
}

/* Rows as above; `by_entropy` and `entropy` are null where the entropy's weight is 0. */
void NAMED(slopes)(NUMBER *logits, const float *largest, const float *log_total, const float *by_logprob, const float *by_entropy,
                   const float *entropy, const long *place, long rows, long columns, long row, float by, long threads) {
    if (rows * columns < LEAST) threads = 1;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (long i = 0; i < rows; i++)
        NAMED(slope_row)(logits + i * row, largest[i], log_total[i], by_logprob[i], by_entropy ? by_entropy[i] : 0.0f,
                         entropy ? entropy[i] : 0.0f, place[i], columns, by);
}

/* Vectors of one generation of processors: included once for each. */

typedef float SUITED(lanes) __attribute__((vector_size(LANES * 4)));
typedef float SUITED(given) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t SUITED(narrow) __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint32_t SUITED(wide) __attribute__((vector_size(LANES * 4)));

INLINE SUITED(lanes) SUITED(load_f32)(const float *p) { return *(const SUITED(given) *)p; }
INLINE SUITED(lanes) SUITED(load_bf16)(const bf16 *p) {
    return (SUITED(lanes))(__builtin_convertvector(*(const SUITED(narrow) *)p, SUITED(wide)) << 16);
}
INLINE void SUITED(store)(float *p, SUITED(lanes) numbers) { *(SUITED(given) *)p = numbers; }

/* Sums of neighbours: those of the first vector, then those of the second. */
INLINE SUITED(lanes) SUITED(neighbours)(SUITED(lanes) a, SUITED(lanes) b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, EVEN) + __builtin_shufflevector(a, b, ODD);
#else
    return __builtin_shuffle(a, b, (SUITED(wide)){EVEN}) + __builtin_shuffle(a, b, (SUITED(wide)){ODD});
#endif
}

/* The largest of SIDE numbers, and their sum. */
TARGET INLINE float SUITED(largest)(const float *numbers) {
#if LANES == 16 /* SIDE */
    return _mm512_reduce_max_ps(_mm512_loadu_ps(numbers));
#else
    float top = numbers[0];
    for (int i = 1; i < SIDE; i++) top = numbers[i] > top ? numbers[i] : top;
    return top;
#endif
}

TARGET INLINE float SUITED(summed)(const float *numbers) {
#if LANES == 16 /* SIDE */
    return _mm512_reduce_add_ps(_mm512_loadu_ps(numbers));
#else
    float total = 0.0f;
    for (int i = 0; i < SIDE; i++) total += numbers[i];
    return total;
#endif
}

/* Scores to exponentials of what each is below the largest, times a positive factor, and their sum. Those from `count` to the limit,
 * a multiple of SIDE, become 0: whole vectors all along. */
TARGET static float SUITED(exponentials)(float *scores, long count, long limit, float scaling) {
    float tops[SIDE], totals[SIDE] = {0};
    for (long j = count; j < limit; j++) scores[j] = -INFINITY;
    for (int i = 0; i < SIDE; i++) tops[i] = -INFINITY;
    for (long j = 0; j < limit; j += SIDE)
#pragma omp simd
        for (int i = 0; i < SIDE; i++) tops[i] = scores[j + i] > tops[i] ? scores[j + i] : tops[i];
    const float top = SUITED(largest)(tops);
    for (long j = 0; j < limit; j += SIDE)
#pragma omp simd
        for (int i = 0; i < SIDE; i++) {
            const float e = exponential((scores[j + i] - top) * scaling);
            scores[j + i] = e;
            totals[i] += e;
        }
    return SUITED(summed)(totals);
}

/* out[n][m] = sum_k w[n * w_row + k * w_step] x[k][m] for some features n and one or two vectors of columns m; numbers from one
 * row of x and of `out` to the next are given. Unless null, the weights that come `next`, so many rows of `size` bytes for each
 * number, are asked for meanwhile. */
TARGET INLINE void SUITED(tile)(const int features, const int vectors, const float *x, long x_row, const float *w, long w_row,
                                long w_step, long width, float *out, long out_row, int add, const char *next, long next_row,
                                const int next_rows, long size) {
    SUITED(lanes) sum[2 * TILE];
#pragma GCC unroll 24
    for (int i = 0; i < features * vectors; i++) sum[i] = (SUITED(lanes)){0};
    const float *second = w + (features > 4 ? 4 : 0) * w_row, *third = w + (features > 8 ? 8 : 0) * w_row;
    const long step = next ? STEP : width;
    for (long start = 0; start < width; start += step) {
        const long end = start + step < width ? start + step : width;
        for (long n = 0; next && n < next_rows; n++) __builtin_prefetch(next + n * next_row + start * size, 0, 3);
#pragma GCC unroll 4
        for (long k = start; k < end; k++) {
            SUITED(lanes) row[2];
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) row[v] = SUITED(load_f32)(x + k * x_row + v * LANES);
#pragma GCC unroll 12
            for (int n = 0; n < features; n++) {
                const float *one = n < 4 ? w + n * w_row : n < 8 ? second + (n - 4) * w_row : third + (n - 8) * w_row;
                const float weight = one[k * w_step];
#pragma GCC unroll 2
                for (int v = 0; v < vectors; v++) sum[n * vectors + v] += row[v] * weight;
            }
        }
    }
#pragma GCC unroll 12
    for (int n = 0; n < features; n++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            float *o = out + n * out_row + v * LANES;
            SUITED(store)(o, add ? sum[n * vectors + v] + SUITED(load_f32)(o) : sum[n * vectors + v]);
        }
}

/* Some columns, a multiple of LANES. From four vectors of them on the first two passes ask for half of what comes next each. */
TARGET INLINE void SUITED(tiles)(const int features, const float *x, long x_row, const float *w, long w_row, long w_step,
                                 long width, float *out, long out_row, long columns, int add, const char *next, long next_row,
                                 long size) {
    const int half = features / 2;
    long m = 0;
    if (next && columns >= 4 * LANES) {
        SUITED(tile)(features, 2, x, x_row, w, w_row, w_step, width, out, out_row, add, next, next_row, half, size);
        SUITED(tile)(features, 2, x + 2 * LANES, x_row, w, w_row, w_step, width, out + 2 * LANES, out_row, add, next + half * next_row,
                     next_row, features - half, size);
        next = 0, m = 4 * LANES;
    }
    for (; m + 2 * LANES <= columns; m += 2 * LANES)
        SUITED(tile)(features, 2, x + m, x_row, w, w_row, w_step, width, out + m, out_row, add, next, next_row, features, size);
    if (m < columns)
        SUITED(tile)(features, 1, x + m, x_row, w, w_row, w_step, width, out + m, out_row, add, next, next_row, features, size);
}

/* out[n][m] = sum_k w[n][k] x[k][m] of TILE, 4 or 1 features and some columns, a multiple of LANES. */
TARGET static void SUITED(by_rows)(long features, const float *x, long x_row, const float *w, long w_row, long width, float *out,
                                   long out_row, long columns, int add) {
    if (features == TILE)
        SUITED(tiles)(TILE, x, x_row, w, w_row, 1, width, out, out_row, columns, add, 0, 0, 0);
    else if (features == 4)
        SUITED(tiles)(4, x, x_row, w, w_row, 1, width, out, out_row, columns, add, 0, 0, 0);
    else
        SUITED(tiles)(1, x, x_row, w, w_row, 1, width, out, out_row, columns, add, 0, 0, 0);
}

/* out[n][m] = sum_k w[k][n] x[k][m], likewise. */
TARGET static void SUITED(by_columns)(long features, const float *x, long x_row, const float *w, long w_step, long width,
                                      float *out, long out_row, long columns, int add) {
    if (features == TILE)
        SUITED(tiles)(TILE, x, x_row, w, 1, w_step, width, out, out_row, columns, add, 0, 0, 0);
    else if (features == 4)
        SUITED(tiles)(4, x, x_row, w, 1, w_step, width, out, out_row, columns, add, 0, 0, 0);
    else
        SUITED(tiles)(1, x, x_row, w, 1, w_step, width, out, out_row, columns, add, 0, 0, 0);
}

/* Features that are computed together where so many are left. */
INLINE long SUITED(together)(long left) { return left >= TILE ? TILE : left >= 4 ? 4 : 1; }

/* Products with weights and with a cache, each number of which comes from memory once: included for each generation of processors
 * (generations.h) and each dtype of weights.
 *
 * Rows that are computed together lie side by side, `[numbers of a row][rows]`, so that a vector holds the same number of many
 * rows: no sum runs along a vector.
 */

/* Some features' weights as float32, for some of a row's numbers. */
TARGET INLINE void SUITED(NAMED(widened))(const int features, const NUMBER *w, long w_row, long width, float *out) {
    for (int n = 0; n < features; n++) {
        long k = 0;
        for (; k + LANES <= width; k += LANES) SUITED(store)(out + n * STRETCH + k, SUITED(NAMED(load))(w + n * w_row + k));
        for (; k < width; k++) out[n * STRETCH + k] = LOAD(w + n * w_row + k);
    }
}

TARGET INLINE void SUITED(NAMED(features))(const int features, const float *x, long rows, const NUMBER *w, long width, float *out,
                                          int add, int last) {
    const char *next = (const char *)(last ? w : w + features * width);
    const long next_row = width * (long)sizeof(NUMBER);
    if (sizeof(NUMBER) == sizeof(float)) {
        SUITED(tiles)(features, x, rows, (const float *)w, width, width, out, add, next, next_row, sizeof(NUMBER));
        return;
    }
    float room[TILE * STRETCH];
    for (long k = 0; k < width; k += STRETCH) {
        const long some = width - k < STRETCH ? width - k : STRETCH;
        SUITED(NAMED(widened))(features, w + k, width, some, room);
        SUITED(tiles)(features, x + k * rows, rows, room, STRETCH, some, out, add || k, next + k * (long)sizeof(NUMBER), next_row,
                      sizeof(NUMBER));
    }
}

/* out[n][m] = sum_k w[n][k] x[k][m], or that more, for the features n of `from` to `to`; `[features][rows]`, and the number of
 * rows is a multiple of 16. */
TARGET static void SUITED(NAMED(product))(const float *x, long rows, const NUMBER *w, long width, float *out, long from, long to,
                                         int add) {
    long n = from;
    for (; n + TILE <= to; n += TILE)
        SUITED(NAMED(features))(TILE, x, rows, w + n * width, width, out + n * rows, add, n + 2 * TILE > to);
    for (; n + 4 <= to; n += 4)
        SUITED(NAMED(features))(4, x, rows, w + n * width, width, out + n * rows, add, n + 8 > to);
    for (; n < to; n++) SUITED(NAMED(features))(1, x, rows, w + n * width, width, out + n * rows, add, n + 2 > to);
}

/* scores[j] = sum_k x[k] w[j][k]; asks for as much of `next` meanwhile. */
TARGET static void SUITED(NAMED(scores))(const float *x, const NUMBER *w, long count, long width, float *scores,
                                        const NUMBER *next) {
    for (long j = 0; j < count; j += LANES) {
        SUITED(lanes) sum[LANES];
        const int some = count - j < LANES ? (int)(count - j) : LANES;
        for (long byte = 0; byte < some * width * (long)sizeof(NUMBER); byte += LINE)
            __builtin_prefetch((const char *)(next + j * width) + byte, 0, 3);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            const NUMBER *one = w + (j + (i < some ? i : 0)) * width;
            sum[i] = (SUITED(lanes)){0};
            for (long k = 0; k + LANES <= width; k += LANES) sum[i] += SUITED(load_f32)(x + k) * SUITED(NAMED(load))(one + k);
        }
#pragma GCC unroll 8
        for (int left = LANES / 2; left > 0; left /= 2)
#pragma GCC unroll 16
            for (int i = 0; i < left; i++) sum[i] = SUITED(neighbours)(sum[2 * i], sum[2 * i + 1]);
        SUITED(store)(scores + j, sum[0]); /* there is room for so many */
        for (long k = width / LANES * LANES; k < width; k++)
            for (int i = 0; i < some; i++) scores[j + i] += x[k] * LOAD(w + (j + i) * width + k);
    }
}

/* mixed[d] = sum_j shares[j] w[j][d]; asks for as much of `next` meanwhile. */
TARGET static void SUITED(NAMED(mixed))(const float *shares, const NUMBER *w, long count, long width, float *out,
                                       const NUMBER *next) {
    long d = 0;
    for (; d + LANES <= width; d += LANES) {
        SUITED(lanes) sum[4] = {{0}, {0}, {0}, {0}};
        long j = 0;
        for (; j + 4 <= count; j += 4) {
            __builtin_prefetch(next + j * width + d, 0, 3);
            __builtin_prefetch(next + (j + 2) * width + d, 0, 3);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) sum[i] += shares[j + i] * SUITED(NAMED(load))(w + (j + i) * width + d);
        }
        for (; j < count; j++) sum[0] += shares[j] * SUITED(NAMED(load))(w + j * width + d);
        SUITED(store)(out + d, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    for (; d < width; d++) {
        float sum = 0.0f;
        for (long j = 0; j < count; j++) sum += shares[j] * LOAD(w + j * width + d);
        out[d] = sum;
    }
}

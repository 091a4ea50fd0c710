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
        SUITED(tiles)(features, x, rows, (const float *)w, width, 1, width, out, rows, rows, add, next, next_row, sizeof(NUMBER));
        return;
    }
    float room[TILE * STRETCH];
    for (long k = 0; k < width; k += STRETCH) {
        const long some = width - k < STRETCH ? width - k : STRETCH;
        SUITED(NAMED(widened))(features, w + k, width, some, room);
        SUITED(tiles)(features, x + k * rows, rows, room, STRETCH, 1, some, out, rows, rows, add || k,
                      next + k * (long)sizeof(NUMBER), next_row, sizeof(NUMBER));
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

/* scores[j] = sum_k x[k] w[j][k]; LANES of them at once, of which there are to be so many. */
TARGET INLINE void SUITED(NAMED(scores_at_once))(const float *x, const NUMBER *w, long width, float *scores, const NUMBER *next) {
    SUITED(lanes) sum[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) sum[i] = (SUITED(lanes)){0};
    for (long k = 0; k + LANES <= width; k += LANES) {
        const SUITED(lanes) row = SUITED(load_f32)(x + k);
        const NUMBER *one = w + k;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++, one += width) {
            __builtin_prefetch(one + (next - w), 0, 3);
            sum[i] += row * SUITED(NAMED(load))(one);
        }
    }
#pragma GCC unroll 8
    for (int left = LANES / 2; left > 0; left /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < left; i++) sum[i] = SUITED(neighbours)(sum[2 * i], sum[2 * i + 1]);
    SUITED(store)(scores, sum[0]);
    for (long k = width / LANES * LANES; k < width; k++)
        for (int i = 0; i < LANES; i++) scores[i] += x[k] * LOAD(w + i * width + k);
}

/* Scores of `count` keys of which `there` lie in memory; asks for as much of `next` meanwhile. Writes up to LANES more. */
TARGET static void SUITED(NAMED(scores))(const float *x, const NUMBER *w, long count, long there, long width, float *scores,
                                        const NUMBER *next) {
    for (long j = 0; j < count; j += LANES) {
        if (j + LANES <= there) {
            SUITED(NAMED(scores_at_once))(x, w + j * width, width, scores + j, next + j * width);
            continue;
        }
        for (long i = j; i < count; i++) {
            scores[i] = 0.0f;
            for (long k = 0; k < width; k++) scores[i] += x[k] * LOAD(w + i * width + k);
        }
    }
}

TARGET INLINE void SUITED(NAMED(mixed_at_once))(const int vectors, const float *shares, const NUMBER *w, long count, long width,
                                               float *out, const NUMBER *next) {
    SUITED(lanes) sum[8];
#pragma GCC unroll 8
    for (int i = 0; i < 2 * vectors; i++) sum[i] = (SUITED(lanes)){0};
    long j = 0;
    for (; j + 2 <= count; j += 2)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            __builtin_prefetch(next + j * width + v * LANES, 0, 3);
            __builtin_prefetch(next + (j + 1) * width + v * LANES, 0, 3);
            sum[v] += shares[j] * SUITED(NAMED(load))(w + j * width + v * LANES);
            sum[vectors + v] += shares[j + 1] * SUITED(NAMED(load))(w + (j + 1) * width + v * LANES);
        }
    for (int v = 0; v < vectors; v++) {
        if (j < count) sum[v] += shares[j] * SUITED(NAMED(load))(w + j * width + v * LANES);
        SUITED(store)(out + v * LANES, sum[v] + sum[vectors + v]);
    }
}

/* out[d] = sum_j shares[j] w[j][d]; asks for as much of `next` meanwhile. */
TARGET static void SUITED(NAMED(mixed))(const float *shares, const NUMBER *w, long count, long width, float *out,
                                       const NUMBER *next) {
    long d = 0;
    for (; d + 4 * LANES <= width; d += 4 * LANES) SUITED(NAMED(mixed_at_once))(4, shares, w + d, count, width, out + d, next + d);
    for (; d + 2 * LANES <= width; d += 2 * LANES) SUITED(NAMED(mixed_at_once))(2, shares, w + d, count, width, out + d, next + d);
    for (; d + LANES <= width; d += LANES) SUITED(NAMED(mixed_at_once))(1, shares, w + d, count, width, out + d, next + d);
    for (; d < width; d++) {
        float sum = 0.0f;
        for (long j = 0; j < count; j++) sum += shares[j] * LOAD(w + j * width + d);
        out[d] = sum;
    }
}

/* Products of a few rows of float32 numbers with the weights of a linear layer, each of which comes from memory once: included
 * for each generation of processors (generations.h) and each dtype of weights. A tile of some rows and some features has as many
 * sums as a vector has numbers: each is a vector that is added up at the end.
 */

/* sums[row * features + feature] of a tile; rows * features is LANES. */
TARGET static inline __attribute__((always_inline)) void SUITED(NAMED(tile))(const int rows, const int features,
                                                                            const float *const *x, const NUMBER *const *w,
                                                                            long width, float *sums) {
    SUITED(lanes) sum[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) sum[i] = (SUITED(lanes)){0};
    long k = 0;
    for (; k + LANES <= width; k += LANES) {
        SUITED(lanes) row[LANES];
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++) row[m] = SUITED(load_f32)(x[m] + k);
#pragma GCC unroll 16
        for (int n = 0; n < features; n++) {
            SUITED(lanes) weight = SUITED(NAMED(load))(w[n] + k);
#pragma GCC unroll 16
            for (int m = 0; m < rows; m++) sum[m * features + n] += row[m] * weight;
        }
    }
#pragma GCC unroll 8
    for (int count = LANES / 2; count > 0; count /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < count; i++) sum[i] = SUITED(neighbours)(sum[2 * i], sum[2 * i + 1]);
    *(SUITED(given) *)sums = sum[0];
    for (; k < width; k++)
        for (int m = 0; m < rows; m++)
            for (int n = 0; n < features; n++) sums[m * features + n] += x[m][k] * LOAD(w[n] + k);
}

/* One block of features over one stretch of the width; asks for the next block's weights meanwhile. */
TARGET static inline __attribute__((always_inline)) void SUITED(NAMED(block))(
    const int tile_rows, const float *x, long x_row, const NUMBER *w, long w_row, long width, float *out, long out_row,
    long rows, long from, long to, const char *next, long next_bytes, int add) {
    const int tile_features = LANES / tile_rows;
    const long tiles = ((rows + tile_rows - 1) / tile_rows) * ((to - from + tile_features - 1) / tile_features);
    const long ask = (next_bytes / LINE + tiles - 1) / tiles * LINE;
    long asked = 0;
    float sums[LANES];
    for (long m = 0; m < rows; m += tile_rows) {
        const float *xs[LANES];
        const int some_rows = rows - m < tile_rows ? (int)(rows - m) : tile_rows;
        for (int i = 0; i < tile_rows; i++) xs[i] = x + (m + (i < some_rows ? i : 0)) * x_row;
        for (long n = from; n < to; n += tile_features) {
            const NUMBER *ws[LANES];
            const int some_features = to - n < tile_features ? (int)(to - n) : tile_features;
            for (long end = asked + ask; asked < end && asked < next_bytes; asked += LINE)
                __builtin_prefetch(next + asked, 0, 2);
            for (int j = 0; j < tile_features; j++) ws[j] = w + (n + (j < some_features ? j : 0)) * w_row;
            SUITED(NAMED(tile))(tile_rows, tile_features, xs, ws, width, sums);
            for (int i = 0; i < some_rows; i++)
                for (int j = 0; j < some_features; j++) {
                    float *o = out + (m + i) * out_row + n + j;
                    *o = sums[i * tile_features + j] + (add ? *o : 0.0f);
                }
        }
    }
}

/* out[m][n] = sum_k x[m][k] w[n][k] for the features n of `from` to `to`. */
TARGET static void SUITED(NAMED(product))(const float *x, long x_row, const NUMBER *w, long w_row, long width, float *out,
                                         long out_row, long rows, long from, long to) {
    for (long first = from; first < to; first += FEATURES) {
        const long end = first + FEATURES < to ? first + FEATURES : to;
        const long more = to - end < FEATURES ? to - end : FEATURES;
        for (long k = 0; k < width || k == 0; k += STRETCH) {
            const long some = width - k < STRETCH ? width - k : STRETCH;
            const int last = k + some >= width;
            const char *next = (const char *)(w + end * w_row);
            const long bytes = last ? more * w_row * (long)sizeof(NUMBER) : 0;
            if (rows < TILE_ROWS)
                SUITED(NAMED(block))(1, x + k, x_row, w + k, w_row, some, out, out_row, rows, first, end, next, bytes, k > 0);
            else
                SUITED(NAMED(block))(TILE_ROWS, x + k, x_row, w + k, w_row, some, out, out_row, rows, first, end, next, bytes,
                                    k > 0);
        }
    }
}

/* mixed[d] = sum_j shares[j] w[j][d]. */
TARGET static void SUITED(NAMED(mixed))(const float *shares, const NUMBER *w, long count, long width, float *out) {
    long d = 0;
    for (; d + LANES <= width; d += LANES) {
        SUITED(lanes) even = {0}, odd = {0};
        long j = 0;
        for (; j + 2 <= count; j += 2) {
            even += shares[j] * SUITED(NAMED(load))(w + j * width + d);
            odd += shares[j + 1] * SUITED(NAMED(load))(w + (j + 1) * width + d);
        }
        if (j < count) even += shares[j] * SUITED(NAMED(load))(w + j * width + d);
        *(SUITED(given) *)(out + d) = even + odd;
    }
    for (; d < width; d++) {
        float sum = 0.0f;
        for (long j = 0; j < count; j++) sum += shares[j] * LOAD(w + j * width + d);
        out[d] = sum;
    }
}

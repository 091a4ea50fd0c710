/* Linear layers on few rows, shared by the threads of a team: included for each dtype of weights. */

typedef void (*NAMED(product_function))(const float *, long, const NUMBER *, long, long, float *, long, long, long, long);
typedef void (*NAMED(mixed_function))(const float *, const NUMBER *, long, long, float *);

/* The kernels for this processor. */
static NAMED(product_function) NAMED(best_product)(void) {
#ifdef GENERATIONS
    if (is_v4()) return JOIN(NAMED(product), _v4);
    if (is_v3()) return JOIN(NAMED(product), _v3);
#endif
    return JOIN(NAMED(product), _any);
}
static NAMED(mixed_function) NAMED(best_mixed)(void) {
#ifdef GENERATIONS
    if (is_v4()) return JOIN(NAMED(mixed), _v4);
    if (is_v3()) return JOIN(NAMED(mixed), _v3);
#endif
    return JOIN(NAMED(mixed), _any);
}

/* A layer's result in its own dtype. */
INLINE float NAMED(rounded)(float f) {
    NUMBER room;
    STORE(&room, f);
    return LOAD(&room);
}

/* out = x W^T for a thread's features. `packed`: the rows as tiles take them, or null. */
static void NAMED(multiply)(const float *x, long x_row, const uint32_t *packed, const NUMBER *w, long width, float *out,
                            long out_row, long rows, long from, long to) {
    long done = from;
#ifdef TILES
    if (packed && sizeof(NUMBER) == sizeof(bf16)) {
        done = from + (to - from) / 16 * 16;
        product_by_tiles(packed, (const bf16 *)w, width, out, out_row, rows, from, done);
    }
#else
    (void)packed;
#endif
    NAMED(best_product)()(x, x_row, w, width, width, out, out_row, rows, done, to);
}

/* The rows as tiles take them, in a thread's room; null where tiles do not multiply them. */
static const uint32_t *NAMED(packed_rows)(const float *x, long x_row, long rows, long width, uint32_t *room) {
#ifdef TILES
    if (sizeof(NUMBER) == sizeof(bf16) && width % 32 == 0 && has_tiles()) {
        pack_rows(x, x_row, rows, width, room);
        return room;
    }
#endif
    return 0;
}

/* Bias and adapter, each sum rounded as the library's operations round it: `low` is x A^T, `[rows, rank]`, and `up` is B^T. */
CLONES static void NAMED(finish)(const linear *layer, const float *low, long low_row, float *out, long out_row, long rows,
                                 long from, long to) {
    const float *bias = layer->bias;
    const NUMBER *up = layer->up;
    for (long m = 0; m < rows; m++) {
        float *o = out + m * out_row;
        if (bias) {
#pragma omp simd
            for (long n = from; n < to; n++) o[n] = NAMED(rounded)(o[n] + bias[n]);
        } else if (sizeof(NUMBER) < sizeof(float)) {
#pragma omp simd
            for (long n = from; n < to; n++) o[n] = NAMED(rounded)(o[n]);
        }
        for (long first = from; layer->rank && first < to; first += SHORT) {
            const long some = to - first < SHORT ? to - first : SHORT;
            float sum[SHORT] = {0};
            for (long q = 0; q < layer->rank; q++) {
                const float by = low[m * low_row + q];
                const NUMBER *u = up + q * layer->features + first;
                if (some == SHORT) {
#pragma omp simd
                    for (long n = 0; n < SHORT; n++) sum[n] += by * LOAD(u + n);
                } else
                    for (long n = 0; n < some; n++) sum[n] += by * LOAD(u + n);
            }
            for (long n = 0; n < some; n++) o[first + n] = NAMED(rounded)(o[first + n] + sum[n]);
        }
    }
}

/* `[rows, width]` float32 by one layer, `[rows, features]` float32: `x W^T + b`. `room`: `threads` times the rows packed. */
void NAMED(few_rows)(const float *x, const NUMBER *weight, const float *bias, float *out, uint32_t *room, long rows, long width,
                     long features, long threads) {
    const linear layer = {.weight = weight, .bias = bias, .features = features, .width = width};
    const long packed_row = (rows + 15) / 16 * 16 * width / 2;
    if (rows * width * features < LEAST) threads = 1;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (long thread = 0; thread < threads; thread++) {
        long from = share(features, thread, threads), to = share(features, thread + 1, threads);
        const uint32_t *packed = NAMED(packed_rows)(x, width, rows, width, room + thread * packed_row);
        NAMED(multiply)(x, width, packed, weight, width, out, features, rows, from, to);
        NAMED(finish)(&layer, 0, 0, out, features, rows, from, to);
    }
}

/* Linear layers on few rows that lie side by side, shared by the threads of a team: included for each dtype of weights. */

typedef void (*NAMED(product_function))(const float *, long, const NUMBER *, long, float *, long, long, int);
typedef void (*NAMED(scores_function))(const float *, const NUMBER *, long, long, long, float *, const NUMBER *);
typedef void (*NAMED(mixed_function))(const float *, const NUMBER *, long, long, float *, const NUMBER *);

/* The kernels for this processor. */
static NAMED(product_function) NAMED(best_product)(void) { return BEST(NAMED(product)); }
static NAMED(scores_function) NAMED(best_scores)(void) { return BEST(NAMED(scores)); }
static NAMED(mixed_function) NAMED(best_mixed)(void) { return BEST(NAMED(mixed)); }

/* A number as its dtype holds it. */
INLINE float NAMED(rounded)(float f) {
    NUMBER room;
    STORE(&room, f);
    return LOAD(&room);
}

CLONES static void NAMED(round_all)(float *numbers, long count) {
    if (sizeof(NUMBER) == sizeof(float)) return;
#pragma omp simd
    for (long i = 0; i < count; i++) numbers[i] = NAMED(rounded)(numbers[i]);
}

CLONES static void NAMED(add_bias)(const float *bias, float *out, long rows, long features) {
    for (long n = 0; n < features; n++) {
#pragma omp simd
        for (long m = 0; m < rows; m++) out[n * rows + m] += bias[n];
    }
}

/* Numbers of a thread's room for rows as tiles take them, where there are tiles. */
static long NAMED(room_of_rows)(long rows, long width) { return (sizeof(NUMBER) == sizeof(float) ? PIECES : 1) * rows * width / 2; }

/* Rows as tiles take them, in a thread's room; null where they are not multiplied by tiles. */
static const float *NAMED(packed_rows)(const float *x, long rows, long width, float *room) {
#ifdef TILES
    if (width % DEPTH == 0 && can_multiply_by_tiles()) {
        if (sizeof(NUMBER) == sizeof(float))
            split_rows(x, rows, width, room);
        else
            pack_rows(x, rows, width, (uint32_t *)room);
        return room;
    }
#endif
    (void)x, (void)rows, (void)width, (void)room;
    return 0;
}

/* x W^T + b for a thread's features, rounded. */
static void NAMED(multiply)(const linear *layer, const float *x, const float *packed, float *out, long rows, long from, long to) {
    long done = from;
#ifdef TILES
    if (packed) {
        done += (to - from) / SIDE * SIDE;
        if (sizeof(NUMBER) == sizeof(float))
            product_by_pieces(packed, rows, (const float *)layer->weight, layer->width, out, from, done);
        else
            product_by_tiles((const uint32_t *)packed, rows, (const bf16 *)layer->weight, layer->width, out, from, done);
    }
#endif
    (void)packed;
    NAMED(best_product)()(x, rows, layer->weight, layer->width, out, done, to, 0);
    if (layer->bias) NAMED(add_bias)((const float *)layer->bias + from, out + from * rows, rows, to - from);
    NAMED(round_all)(out + from * rows, rows * (to - from));
}

/* Rows side by side, filled up to `side`, by a layer without an adapter: `[rows, features]` in its dtype. `room`:
 * `room_of_rows` for each thread. */
static void NAMED(of_rows)(const float *x, long side, const NUMBER *weight, const float *bias, NUMBER *out, float *room, long rows, long width,
                           long features, long threads) {
    if (rows * width * features < LEAST) threads = 1;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (long thread = 0; thread < threads; thread++) {
        const long from = share(features, thread, threads), to = share(features, thread + 1, threads);
        const float *packed = NAMED(packed_rows)(x, side, width, room + thread * NAMED(room_of_rows)(side, width));
        float found[SOME * MOST];
        for (long first = from; first < to; first += SOME) {
            const long some = to - first < SOME ? to - first : SOME;
            const linear part = {.weight = weight + first * width, .bias = bias ? bias + first : 0, .width = width};
            NAMED(multiply)(&part, x, packed, found, side, 0, some);
            for (long m = 0; m < rows; m++)
                for (long n = 0; n < some; n++) STORE(out + m * features + first + n, found[n * side + m]);
        }
    }
}

/* The same of `[rows, width]` float32. `room`: for the rows, filled up, side by side, and `room_of_rows` for each thread. */
void NAMED(few_rows)(const float *x, const NUMBER *weight, const float *bias, NUMBER *out, float *room, long rows, long width,
                     long features, long threads) {
    const long side = (rows + SIDE - 1) / SIDE * SIDE;
    for (long m = 0; m < side; m++)
        for (long k = 0; k < width; k++) room[k * side + m] = m < rows ? x[m * width + k] : 0.0f;
    NAMED(of_rows)(room, side, weight, bias, out, room + side * width, rows, width, features, threads);
}

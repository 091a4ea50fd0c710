/* What a decoding step is given; kernels/decoding.py lays the same out. */

extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);

enum {
    LINE = 64,      /* bytes of a cache line */
    FEATURES = 32,  /* of a weight that are multiplied with all rows before the next come (of 8 to 128 the fastest, or nearly) */
    STRETCH = 1024, /* numbers of a row at once: a tile's rows stay in the first cache */
    SHORT = 64,     /* features of a low-rank product whose sums stay in registers */
};

/* A linear layer with an adapter of some rank, or of none: x W^T + b + (x A^T) B^T. W and A hold a feature in a row, `up` is
 * B^T with the adapter's scale in it; W, A and B are of the weights' dtype, b is float32 or null. */
typedef struct {
    const void *weight, *bias, *down, *up;
    long features, width, rank;
} linear;

/* Norms are float32. Keys and values: `[rows, key heads, columns, size]` in the weights' dtype. `window`: 0 for none. */
typedef struct {
    const void *first_norm, *second_norm, *query_norm, *key_norm;
    linear query, key, value, out, gate, up, down;
    void *keys, *values;
    long window;
} layer;

/* Tensors of a step are float32 and one row's numbers lie side by side; positions are int64. */
typedef struct {
    long layers, rows, hidden, heads, shared, size, columns, threads, narrow;
    long given_row, low_row, scores_row, packed_row; /* numbers from one row (or thread) to the next */
    float *states, *given, *queries, *keys, *values, *gates, *ups, *low, *scores, *packed;
    const float *cosines, *sines, *last_norm;
    const long *positions;
    float eps, scaling;
} step;

/* Where a thread's part of some features begins. */
static long share(long features, long thread, long threads) {
    return thread == threads ? features : features * thread / threads / 16 * 16;
}

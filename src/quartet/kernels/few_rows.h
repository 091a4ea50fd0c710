/* What a decoding step is given; kernels/decoding.py lays the same out. */

extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);

enum {
    LINE = 64,     /* bytes of a cache line */
    SIDE = 16,     /* rows are filled up to a multiple of so many */
    STEP = 16,     /* numbers of a row between two requests for weights that come next */
    STRETCH = 256, /* numbers of a row whose weights are widened at once */
    SOME = 64,     /* features whose results wait for their place in a row */
    LONGEST = 512, /* numbers of a head */
    MOST = 128,    /* rows */
    PIECES = 3,    /* of a float32 number that tiles multiply */
    BLOCK = 128,   /* probabilities that are summed before one is looked for among them */
};

/* A linear layer with an adapter of some rank, or of none: x W^T + b + (x A^T) B^T. All hold a feature in a row; B
 * has the adapter's scale in it. W, A and B are of the weights' dtype, b is float32 or null. */
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

/* What the layers hand on is float32, `[numbers of a row][side]`, with the rows side by side and filled up to `side`; cosines and
 * sines are float32, `[columns, size]`; positions are int64. */
typedef struct {
    long layers, rows, side, hidden, heads, shared, size, columns, threads, narrow;
    long scores_row, packed_row; /* numbers of each thread's room */
    float *states, *given, *queries, *keys, *values, *gates, *ups, *low, *scores, *packed;
    const float *cosines, *sines, *last_norm;
    const long *positions;
    float eps, scaling;
} step;

/* Steps in a row. Of each row: its last token, its tokens in the cache, its response's tokens so far, and the place of its response.
 * What is kept of a response stands in `[responses, length]`, and so do the uniform numbers that decide its tokens, null for the most
 * likely ones. `stop`: a token that ends a response, -1 for none. `by`: 1 / temperature. */
typedef struct {
    long most, done, vocabulary, length, stop, threads;
    const void *embeddings, *head;
    const float *bias;
    long *token, *position, *sampled;
    const long *response;
    const double *uniforms;
    long *tokens;
    float *logprobs;
    unsigned char *mask;
    void *logits; /* rooms: [rows, vocabulary], [rows, blocks], those of `of_rows`, [rows] thrice */
    float *sums, *packed;
    double *numbers;
    long *picked;
    float *picked_logprobs;
    float by;
} stretch;

/* Where a thread's part of some features begins. */
static long share(long features, long thread, long threads) {
    return thread == threads ? features : features * thread / threads / SIDE * SIDE;
}

/* Sums of matrix products in float32, shared among threads. */

#define WORTH 262144 /* multiplications for which a thread is called */
#define NARROW 64    /* rows, columns or widths up to which vectors multiply float32 faster than tiles */

/* Whether this build holds code for this processor's vectors: what every compiler makes of it for any processor is slow. */
long has_wide_vectors(void) {
#ifdef GENERATIONS
    return is_v3() != 0;
#else
    return 0;
#endif
}

/* The part of one of `high * across` threads: whole tiles of every generation. */
static void multiplied_part(const product_sum *p, long thread, long high, long across) {
    const long tall = (p->rows + 11) / 12, wide = (p->columns + 31) / 32, down = thread / across, along = thread % across;
    const long from = tall * down / high * 12, to = tall * (down + 1) / high * 12;
    const long left = wide * along / across * 32, right = wide * (along + 1) / across * 32;
    if (from < to && left < right)
        BEST(block_multiplied)(p, p->room + thread * WITHIN, from, to < p->rows ? to : p->rows, left, right < p->columns ? right : p->columns);
}

#ifdef TILES
/* A part of each thread's own, `worth` multiplications at least. */
static void by_tiles(const product_sum *p, void (*part)(const product_sum *, long, long, long), long width, long worth) {
    const long useful = p->rows * p->columns * width / worth + 1, threads = p->threads < useful ? p->threads : useful;
    /* Columns are shared out, because packing those takes longer, unless there are few. */
    long across = 1;
    for (long n = 1; n <= threads; n++)
        if (threads % n == 0 && p->rows * across + 2 * p->columns * threads / across > p->rows * n + 2 * p->columns * threads / n) across = n;
    RANGE(threads, threads, part(p, from, threads / across, across));
}

/* Whether tiles multiply in float32: not narrow matrices, for which splitting takes longer than it saves. A row that is a token's is
 * computed the same way however many there are, though all of B is split for a few. */
static int in_pieces(const product_sum *p, long width) {
    const long narrowest = p->terms->a_step == 1 || p->columns < p->rows ? p->columns : p->rows;
    return can_multiply_by_tiles() && narrowest >= NARROW && width >= NARROW;
}
#endif

static long total_width(const product_sum *p) {
    long width = 0;
    for (long n = 0; n < p->count; n++) width += p->terms[n].width;
    return width;
}

/* out = sum_t scale_t A_t B_t + bias, or that more; there are rows, columns and widths. */
void multiply(const product_sum *p) {
    long high = 1;
    const long width = total_width(p);
#ifdef TILES
    if (in_pieces(p, width)) {
        by_tiles(p, part_by_pieces, width, 2 * WORTH);
        return;
    }
#endif
    const long worth = p->rows * p->columns * width / WORTH + 1, threads = p->threads < worth ? p->threads : worth;
    /* Each thread packs all that its part is made of: the less, the squarer its part. */
    for (long n = 1; n <= threads; n++)
        if (threads % n == 0 && p->rows / n + p->columns * n / threads < p->rows / high + p->columns * high / threads) high = n;
    RANGE(threads, threads, multiplied_part(p, from, high, threads / high));
}

/* Whether products in bfloat16 are multiplied here. */
long has_tile_products(void) {
#ifdef TILES
    return can_multiply_by_tiles();
#else
    return 0;
#endif
}

/* The same in bfloat16, rounded once, or in float32 where `wide`; the bias is bfloat16 and comes with a result in bfloat16 only. */
void multiply_tiles(const product_sum *p) {
#ifdef TILES
    by_tiles(p, part_by_tiles, total_width(p), 4 * WORTH);
#else
    (void)p;
#endif
}

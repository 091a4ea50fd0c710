/* Sums of matrix products in float32, the longer side of which is shared among threads. */

static long shared_unit(const products *p) { return p->rows >= p->columns ? 12 : 32; } /* whole tiles of every generation */

static void multiplied_part(const products *p, long thread, long from, long to) {
    float *room = p->room + thread * WITHIN;
    const long unit = shared_unit(p);
    if (p->rows >= p->columns)
        BEST(multiplied)(p, room, from * unit, to * unit < p->rows ? to * unit : p->rows, 0, p->columns);
    else
        BEST(multiplied)(p, room, 0, p->rows, from * unit, to * unit < p->columns ? to * unit : p->columns);
}

/* out = sum_t scale_t A_t B_t + bias, or that more. */
void multiply(const products *p) {
    const long side = p->rows >= p->columns ? p->rows : p->columns, unit = shared_unit(p), threads = p->threads;
    const long shares = (side + unit - 1) / unit;
    RANGE(shares, threads, multiplied_part(p, thread, from, to));
}

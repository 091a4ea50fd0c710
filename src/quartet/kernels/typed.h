/* Kernels that are there for several dtypes: included with NUMBER, LOAD, STORE and NAMED for each.
 *
 * An output may lie where an input does, number for number; no loop looks at what another turn of it wrote.
 */

CLONES static void NAMED(silu_product_rows)(const NUMBER *gate, const NUMBER *up, NUMBER *out, long from, long to,
                                            long columns, long gate_row, long up_row, long out_row) {
    for (long i = from; i < to; i++) {
        const NUMBER *g = gate + i * gate_row, *u = up + i * up_row;
        NUMBER *o = out + i * out_row;
#pragma omp simd
        for (long j = 0; j < columns; j++) {
            float x = LOAD(g + j);
            STORE(o + j, x * sigmoid(x) * LOAD(u + j));
        }
    }
}

/* silu(gate) up, with silu(x) = x sigmoid(x). */
void NAMED(silu_product)(const NUMBER *gate, const NUMBER *up, NUMBER *out, long rows, long columns, long gate_row,
                         long up_row, long out_row, long threads) {
    if (rows * columns < LEAST) threads = 1;
    RANGE(rows, threads, NAMED(silu_product_rows)(gate, up, out, from, to, columns, gate_row, up_row, out_row));
}

CLONES static void NAMED(silu_gradient_row)(const NUMBER *d, const NUMBER *g, const NUMBER *u, NUMBER *dg, NUMBER *du,
                                            long columns) {
#pragma omp simd
    for (long j = 0; j < columns; j++) {
        float x = LOAD(g + j), y = LOAD(u + j), by = LOAD(d + j);
        float s = sigmoid(x), active = x * s;
        STORE(du + j, by * active);
        STORE(dg + j, by * y * (s + active * (1.0f - s)));
    }
}

CLONES static void NAMED(silu_gradient_product_row)(const NUMBER *d, const NUMBER *g, const NUMBER *u, NUMBER *dg,
                                                    NUMBER *du, NUMBER *p, long columns) {
#pragma omp simd
    for (long j = 0; j < columns; j++) {
        float x = LOAD(g + j), y = LOAD(u + j), by = LOAD(d + j);
        float s = sigmoid(x), active = x * s;
        STORE(p + j, active * y);
        STORE(du + j, by * active);
        STORE(dg + j, by * y * (s + active * (1.0f - s)));
    }
}

static void NAMED(silu_gradient_rows)(const NUMBER *by_product, const NUMBER *gate, const NUMBER *up, NUMBER *by_gate,
                                      NUMBER *by_up, NUMBER *product, long from, long to, long columns, long by_row,
                                      long gate_row, long up_row, long by_gate_row, long by_up_row, long product_row) {
    for (long i = from; i < to; i++) {
        const NUMBER *d = by_product + i * by_row, *g = gate + i * gate_row, *u = up + i * up_row;
        NUMBER *dg = by_gate + i * by_gate_row, *du = by_up + i * by_up_row;
        if (product)
            NAMED(silu_gradient_product_row)(d, g, u, dg, du, product + i * product_row, columns);
        else
            NAMED(silu_gradient_row)(d, g, u, dg, du, columns);
    }
}

/* Gradients of gate and up from that of silu(gate) up; the product itself where `product` is not null. */
void NAMED(silu_gradient)(const NUMBER *by_product, const NUMBER *gate, const NUMBER *up, NUMBER *by_gate, NUMBER *by_up,
                          NUMBER *product, long rows, long columns, long by_row, long gate_row, long up_row,
                          long by_gate_row, long by_up_row, long product_row, long threads) {
    if (rows * columns < LEAST) threads = 1;
    RANGE(rows, threads,
          NAMED(silu_gradient_rows)(by_product, gate, up, by_gate, by_up, product, from, to, columns, by_row, gate_row,
                                    up_row, by_gate_row, by_up_row, product_row));
}

CLONES static void NAMED(rotary_tokens)(const NUMBER *states, const float *cosines, const float *sines, NUMBER *out,
                                        long from, long to, long tokens, long heads, long width, long row, long token,
                                        long head, long out_row, long out_token, long out_head, long angle_row,
                                        long angle_token, long back) {
    const long half = width / 2;
    const float sign = back ? -1.0f : 1.0f;
    for (long i = from; i < to; i++) {
        const long n = i / tokens, t = i % tokens, angle = n * angle_row + t * angle_token;
        const float *c = cosines + angle, *s = sines + angle;
        const float *first = back ? s + half : s, *second = back ? s : s + half;
        for (long h = 0; h < heads; h++) {
            const NUMBER *x = states + n * row + t * token + h * head;
            NUMBER *y = out + n * out_row + t * out_token + h * out_head;
#pragma omp simd
            for (long j = 0; j < half; j++) {
                float a = LOAD(x + j), b = LOAD(x + half + j);
                STORE(y + j, a * c[j] - sign * b * first[j]);
                STORE(y + half + j, b * c[half + j] + sign * a * second[j]);
            }
        }
    }
}

/* Rotary embedding of `[rows, tokens, heads, width]` given by strides: each half turned into the other by the angles of its
 * token, or back where `back` is not 0. Angles: `[rows or 1, tokens, width]`, whose stride over rows may be 0. */
void NAMED(rotary)(const NUMBER *states, const float *cosines, const float *sines, NUMBER *out, long rows, long tokens,
                   long heads, long width, long row, long token, long head, long out_row, long out_token, long out_head,
                   long angle_row, long angle_token, long back, long threads) {
    if (rows * tokens * heads * width < LEAST) threads = 1;
    RANGE(rows *tokens, threads,
          NAMED(rotary_tokens)(states, cosines, sines, out, from, to, tokens, heads, width, row, token, head, out_row,
                               out_token, out_head, angle_row, angle_token, back));
}

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

CLONES static void NAMED(add_rows)(NUMBER *sums, const NUMBER *states, long from, long to, long columns) {
    NUMBER *y = sums + from * columns;
    const NUMBER *x = states + from * columns;
#pragma omp simd
    for (long j = 0; j < (to - from) * columns; j++) STORE(y + j, LOAD(y + j) + LOAD(x + j));
}

/* Adds the states to `sums`. */
void NAMED(add)(NUMBER *sums, const NUMBER *states, long rows, long columns, long threads) {
    if (rows * columns < LEAST) threads = 1;
    RANGE(rows, threads, NAMED(add_rows)(sums, states, from, to, columns));
}

CLONES static void NAMED(rms_norm_rows)(const NUMBER *states, const NUMBER *weight, NUMBER *sums, NUMBER *out, float *scales,
                                        long from, long to, long columns, float eps) {
    for (long i = from; i < to; i++) {
        const NUMBER *x = states + i * columns;
        NUMBER *y = out + i * columns;
        if (sums) {
            NAMED(add_rows)(sums, states, i, i + 1, columns);
            x = sums + i * columns;
        }
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long j = 0; j < columns; j++) sum += LOAD(x + j) * LOAD(x + j);
        float scale = 1.0f / sqrtf(sum / (float)columns + eps);
        scales[i] = scale;
#pragma omp simd
        for (long j = 0; j < columns; j++) STORE(y + j, LOAD(x + j) * scale * LOAD(weight + j));
    }
}

/* x r w, with r = 1 / sqrt(mean(x^2) + eps) of each row, which is kept. Unless `sums` is null, the states are added to it first, and x
 * is the sum. */
void NAMED(rms_norm)(const NUMBER *states, const NUMBER *weight, NUMBER *sums, NUMBER *out, float *scales, long rows, long columns,
                     float eps, long threads) {
    if (rows * columns < LEAST) threads = 1;
    RANGE(rows, threads, NAMED(rms_norm_rows)(states, weight, sums, out, scales, from, to, columns, eps));
}

CLONES static void NAMED(rms_norm_gradient_rows)(const NUMBER *gradient, const NUMBER *states, const NUMBER *weight,
                                                 const float *scales, const NUMBER *also, NUMBER *by_states,
                                                 float *by_weight, long from, long to, long columns) {
    for (long i = from; i < to; i++) {
        const NUMBER *g = gradient + i * columns, *x = states + i * columns;
        NUMBER *d = by_states + i * columns;
        float scale = scales[i], sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long j = 0; j < columns; j++) sum += LOAD(g + j) * LOAD(weight + j) * LOAD(x + j);
        float along = sum * scale * scale / (float)columns;
#pragma omp simd
        for (long j = 0; j < columns; j++)
            STORE(d + j, (LOAD(g + j) * LOAD(weight + j) - LOAD(x + j) * along) * scale);
        if (by_weight) {
#pragma omp simd
            for (long j = 0; j < columns; j++) by_weight[j] += LOAD(g + j) * LOAD(x + j) * scale;
        }
        if (also) NAMED(add_rows)(by_states, also, i, i + 1, columns);
    }
}

/* by_states = r (g w - n mean(g w n)) with n = x r, and `also` unless null; by_weight, `[threads, columns]` of zeros or null: in its
 * first row the sum of g n. */
void NAMED(rms_norm_gradient)(const NUMBER *gradient, const NUMBER *states, const NUMBER *weight, const float *scales,
                              const NUMBER *also, NUMBER *by_states, float *by_weight, long rows, long columns, long threads) {
    RANGE(rows, threads,
          NAMED(rms_norm_gradient_rows)(gradient, states, weight, scales, also, by_states,
                                        by_weight ? by_weight + thread * columns : by_weight, from, to, columns));
    for (long thread = 1; by_weight && thread < threads; thread++)
        add_rows_f32(by_weight, by_weight + thread * columns, 0, 1, columns);
}

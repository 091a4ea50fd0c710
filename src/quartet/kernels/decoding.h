/* One decoding step of a whole transformer: RMS norms, grouped attention with rotary positions over a cache, gated MLPs with
 * SiLU. Included for each dtype of weights and cache. Numbers are computed in float32 and rounded where the library's
 * operations on that dtype round them; the residual stream is rounded only where it is of that dtype itself (`step.narrow`).
 */

CLONES static void NAMED(normed_rows)(const step *s, const float *weight, float *out, long out_row, long from, long to) {
    for (long m = from; m < to; m++) {
        const float *x = s->states + m * s->hidden;
        float *y = out + m * out_row, sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long j = 0; j < s->hidden; j++) sum += x[j] * x[j];
        const float scale = 1.0f / sqrtf(sum / (float)s->hidden + s->eps);
#pragma omp simd
        for (long j = 0; j < s->hidden; j++) y[j] = NAMED(rounded)(x[j] * scale * weight[j]);
    }
}

CLONES static void NAMED(add_to_states)(const step *s, const float *more, long more_row, long from, long to) {
    for (long m = 0; m < s->rows; m++) {
        float *x = s->states + m * s->hidden;
        const float *y = more + m * more_row;
        if (s->narrow) {
#pragma omp simd
            for (long j = from; j < to; j++) x[j] = NAMED(rounded)(x[j] + y[j]);
        } else {
#pragma omp simd
            for (long j = from; j < to; j++) x[j] += y[j];
        }
    }
}

CLONES static void NAMED(gate_rows)(const float *gate, const float *up, float *out, long row, long rows, long from, long to) {
    for (long m = 0; m < rows; m++) {
        const float *g = gate + m * row, *u = up + m * row;
        float *o = out + m * row;
#pragma omp simd
        for (long j = from; j < to; j++) o[j] = NAMED(rounded)(g[j] * sigmoid(g[j]) * u[j]);
    }
}

/* A head in place: normalised where its layer does that, turned to its position, rounded. */
CLONES static void NAMED(place_head)(const step *s, float *head, const float *norm, const float *cosines, const float *sines) {
    const long half = s->size / 2;
    if (norm) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long j = 0; j < s->size; j++) sum += head[j] * head[j];
        const float scale = 1.0f / sqrtf(sum / (float)s->size + s->eps);
#pragma omp simd
        for (long j = 0; j < s->size; j++) head[j] = NAMED(rounded)(head[j] * scale * norm[j]);
    }
#pragma omp simd
    for (long j = 0; j < half; j++) {
        const float a = head[j], b = head[half + j];
        head[j] = NAMED(rounded)(a * cosines[j] - b * sines[j]);
        head[half + j] = NAMED(rounded)(b * cosines[half + j] + a * sines[half + j]);
    }
}

CLONES static float NAMED(softmax)(float *scores, long count, float scaling) {
    float top = scores[0], total = 0.0f;
#pragma omp simd reduction(max : top)
    for (long j = 0; j < count; j++) top = scores[j] > top ? scores[j] : top;
#pragma omp simd reduction(+ : total)
    for (long j = 0; j < count; j++) {
        const float e = exponential((scores[j] - top) * scaling);
        scores[j] = e;
        total += e;
    }
    return total;
}

CLONES static void NAMED(keep_head)(const float *head, NUMBER *place, long size) {
#pragma omp simd
    for (long j = 0; j < size; j++) STORE(place + j, head[j]);
}

CLONES static void NAMED(weighted)(float *head, float total, long size) {
    const float share = 1.0f / total;
#pragma omp simd
    for (long j = 0; j < size; j++) head[j] = NAMED(rounded)(head[j] * share);
}

/* Attention of the new token of a row under one key head: writes its key and value, and looks at what its layer lets it. */
static void NAMED(attend)(const step *s, const layer *l, long row, long shared, float *scores) {
    const long group = s->heads / s->shared, size = s->size, position = s->positions[row];
    const float *cosines = s->cosines + row * size, *sines = s->sines + row * size;
    const long place = ((row * s->shared + shared) * s->columns + position) * size;
    float *key = s->keys + (row * s->shared + shared) * size, *value = s->values + (row * s->shared + shared) * size;
    float *query = s->queries + (row * s->heads + shared * group) * size;
    NAMED(place_head)(s, key, l->key_norm, cosines, sines);
    NAMED(keep_head)(key, (NUMBER *)l->keys + place, size);
    NAMED(keep_head)(value, (NUMBER *)l->values + place, size);
    for (long h = 0; h < group; h++) NAMED(place_head)(s, query + h * size, l->query_norm, cosines, sines);
    const long first = l->window && position + 1 > l->window ? position + 1 - l->window : 0;
    const long count = position + 1 - first, start = place - (count - 1) * size;
    NAMED(best_product)()(query, size, (const NUMBER *)l->keys + start, size, size, scores, s->columns, group, 0, count);
    for (long h = 0; h < group; h++) {
        float *mine = scores + h * s->columns, *mixed = s->given + row * s->given_row + (shared * group + h) * size;
        const float total = NAMED(softmax)(mine, count, s->scaling);
        NAMED(best_mixed)()(mine, (const NUMBER *)l->values + start, count, size, mixed);
        NAMED(weighted)(mixed, total, size);
    }
}

/* Low-rank states of some layers with the same input, one after the other in a row of `s->low`. */
static void NAMED(lower)(const step *s, const linear *const *layers, int count, const float *x, long x_row, long thread) {
    long place = 0;
    for (int i = 0; i < count; place += layers[i++]->rank) {
        const long from = layers[i]->rank * thread / s->threads, to = layers[i]->rank * (thread + 1) / s->threads;
        if (from == to) continue;
        const linear *a = layers[i];
        NAMED(best_product)()(x, x_row, a->down, a->width, a->width, s->low + place, s->low_row, s->rows, from, to);
        for (long m = 0; m < s->rows; m++)
            for (long q = from; q < to; q++) {
                float *low = s->low + m * s->low_row + place + q;
                *low = NAMED(rounded)(*low);
            }
    }
}

/* Layers with the same input, each into its own output. The whole team comes here, after all of the input is there. */
static void NAMED(project)(const step *s, const linear *const *layers, int count, float *const *outs, const float *x, long x_row,
                           long thread) {
    long ranks = 0, place = 0;
    for (int i = 0; i < count; i++) ranks += layers[i]->rank;
    if (ranks) {
        NAMED(lower)(s, layers, count, x, x_row, thread);
#pragma omp barrier
    }
    const uint32_t *packed =
        NAMED(packed_rows)(x, x_row, s->rows, layers[0]->width, (uint32_t *)(s->packed + thread * s->packed_row));
    for (int i = 0; i < count; place += layers[i++]->rank) {
        const linear *w = layers[i];
        const long from = share(w->features, thread, s->threads), to = share(w->features, thread + 1, s->threads);
        NAMED(multiply)(x, x_row, packed, w->weight, w->width, outs[i], w->features, s->rows, from, to);
        NAMED(finish)(w, s->low + place, s->low_row, outs[i], w->features, s->rows, from, to);
    }
}

static void NAMED(decode_layer)(const step *s, const layer *l, long thread) {
    const long some = s->rows * thread / s->threads, more = s->rows * (thread + 1) / s->threads, pairs = s->rows * s->shared;
    const long from = share(s->hidden, thread, s->threads), to = share(s->hidden, thread + 1, s->threads);
    const long inner = l->gate.features;
    NAMED(normed_rows)(s, l->first_norm, s->given, s->given_row, some, more);
#pragma omp barrier
    NAMED(project)(s, (const linear *const[]){&l->query, &l->key, &l->value}, 3,
                   (float *const[]){s->queries, s->keys, s->values}, s->given, s->given_row, thread);
#pragma omp barrier
    for (long pair = pairs * thread / s->threads; pair < pairs * (thread + 1) / s->threads; pair++)
        NAMED(attend)(s, l, pair / s->shared, pair % s->shared, s->scores + thread * s->scores_row);
#pragma omp barrier
    NAMED(project)(s, (const linear *const[]){&l->out}, 1, (float *const[]){s->queries}, s->given, s->given_row, thread);
    NAMED(add_to_states)(s, s->queries, s->hidden, from, to);
#pragma omp barrier
    NAMED(normed_rows)(s, l->second_norm, s->given, s->given_row, some, more);
#pragma omp barrier
    NAMED(project)(s, (const linear *const[]){&l->gate, &l->up}, 2, (float *const[]){s->gates, s->ups}, s->given, s->given_row,
                   thread);
    NAMED(gate_rows)(s->gates, s->ups, s->gates, inner, s->rows, share(inner, thread, s->threads),
                     share(inner, thread + 1, s->threads));
#pragma omp barrier
    NAMED(project)(s, (const linear *const[]){&l->down}, 1, (float *const[]){s->queries}, s->gates, inner, thread);
    NAMED(add_to_states)(s, s->queries, s->hidden, from, to);
#pragma omp barrier
}

/* From embeddings to the last norm: `states` hold the first, `given` the other afterwards. */
void NAMED(decode)(const step *asked, const layer *layers) {
#pragma omp parallel num_threads((int)asked->threads)
    {
        step own = *asked;
        own.threads = omp_get_num_threads();
        const long thread = omp_get_thread_num(), rows = own.rows;
        for (long i = 0; i < own.layers; i++) NAMED(decode_layer)(&own, layers + i, thread);
        NAMED(normed_rows)(&own, own.last_norm, own.given, own.given_row, rows * thread / own.threads,
                           rows * (thread + 1) / own.threads);
    }
}

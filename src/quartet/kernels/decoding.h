/* One decoding step of a whole transformer: RMS norms, grouped attention with rotary positions over a cache, gated MLPs with
 * SiLU. Included for each dtype of weights and cache. Numbers are computed in float32 and rounded where the library's
 * operations on that dtype round them; the residual stream is rounded only where it is of that dtype itself (`step.narrow`).
 */

/* A thread's features of the states, normalised; each thread looks at all of them. */
CLONES static void NAMED(normed)(const step *s, const float *weight, float *out, long from, long to) {
    float scale[MOST] = {0};
    for (long j = 0; j < s->hidden; j++) {
#pragma omp simd
        for (long m = 0; m < s->side; m++) scale[m] += s->states[j * s->side + m] * s->states[j * s->side + m];
    }
#pragma omp simd
    for (long m = 0; m < s->side; m++) scale[m] = 1.0f / sqrtf(scale[m] / (float)s->hidden + s->eps);
    for (long j = from; j < to; j++) {
#pragma omp simd
        for (long m = 0; m < s->side; m++)
            out[j * s->side + m] = NAMED(rounded)(s->states[j * s->side + m] * scale[m] * weight[j]);
    }
}

CLONES static void NAMED(add_to_states)(const step *s, const float *more, long from, long to) {
    const long end = to * s->side;
    if (s->narrow) {
#pragma omp simd
        for (long i = from * s->side; i < end; i++) s->states[i] = NAMED(rounded)(s->states[i] + more[i]);
    } else {
#pragma omp simd
        for (long i = from * s->side; i < end; i++) s->states[i] += more[i];
    }
}

CLONES static void NAMED(gate_all)(float *gate, const float *up, long count) {
#pragma omp simd
    for (long i = 0; i < count; i++) gate[i] = NAMED(rounded)(gate[i] * sigmoid(gate[i]) * up[i]);
}

/* A head of a row, out of the rows side by side. */
static void NAMED(take_head)(const step *s, const float *all, long head, long row, float *out) {
    for (long j = 0; j < s->size; j++) out[j] = all[(head * s->size + j) * s->side + row];
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

CLONES static void NAMED(keep_head)(const float *head, NUMBER *place, long size) {
#pragma omp simd
    for (long j = 0; j < size; j++) STORE(place + j, head[j]);
}

static float NAMED(softmax)(float *scores, long count, float scaling) {
    return BEST(exponentials)(scores, count, (count + SIDE - 1) / SIDE * SIDE, scaling);
}

/* Attention of a row's new token under one key head: keeps its key and value, and looks at what its layer lets it. */
static void NAMED(attend)(const step *s, const layer *l, long row, long shared, float *scores) {
    const long group = s->heads / s->shared, size = s->size, position = s->positions[row];
    const float *cosines = s->cosines + position * size, *sines = s->sines + position * size;
    const long first = l->window && position + 1 > l->window ? position + 1 - l->window : 0, count = position + 1 - first;
    const long start = ((row * s->shared + shared) * s->columns + first) * size;
    NUMBER *keys = (NUMBER *)l->keys + start, *values = (NUMBER *)l->values + start;
    const NUMBER *next = row + 1 < s->rows ? keys + s->shared * s->columns * size : keys;
    float head[LONGEST];
    NAMED(take_head)(s, s->keys, shared, row, head);
    NAMED(place_head)(s, head, l->key_norm, cosines, sines);
    NAMED(keep_head)(head, keys + (count - 1) * size, size);
    NAMED(take_head)(s, s->values, shared, row, head);
    NAMED(keep_head)(head, values + (count - 1) * size, size);
    for (long h = shared * group; h < (shared + 1) * group; h++) {
        NAMED(take_head)(s, s->queries, h, row, head);
        NAMED(place_head)(s, head, l->query_norm, cosines, sines);
        NAMED(best_scores)()(head, keys, count, s->columns - first, size, scores, values);
        const float share = 1.0f / NAMED(softmax)(scores, count, s->scaling);
        NAMED(best_mixed)()(scores, values, count, size, head, next);
        for (long j = 0; j < size; j++) s->given[(h * size + j) * s->side + row] = NAMED(rounded)(head[j] * share);
    }
}

/* Layers with the same input, each into its own output. The whole team comes here once all of the input is there. */
static void NAMED(project)(const step *s, const linear *const *layers, int count, float *const *outs, const float *x, long thread) {
    long ranks = 0, place = 0;
    for (int i = 0; i < count; place += layers[i++]->rank) {
        const long rank = layers[i]->rank, from = rank * thread / s->threads, to = rank * (thread + 1) / s->threads;
        float *low = s->low + place * s->side;
        if (from < to) NAMED(best_product)()(x, s->side, layers[i]->down, layers[i]->width, low, from, to, 0);
        NAMED(round_all)(low + from * s->side, (to - from) * s->side);
        ranks += rank;
    }
    const float *packed = NAMED(packed_rows)(x, s->side, layers[0]->width, s->packed + thread * s->packed_row);
    if (ranks) {
#pragma omp barrier
    }
    place = 0;
    for (int i = 0; i < count; place += layers[i++]->rank) {
        const linear *w = layers[i];
        const long from = share(w->features, thread, s->threads), to = share(w->features, thread + 1, s->threads);
        NAMED(multiply)(w, x, packed, outs[i], s->side, from, to);
        if (!w->rank) continue;
        NAMED(best_product)()(s->low + place * s->side, s->side, w->up, w->rank, outs[i], from, to, 1);
        NAMED(round_all)(outs[i] + from * s->side, (to - from) * s->side);
    }
}

static void NAMED(decode_layer)(const step *s, const layer *l, long thread) {
    const long threads = s->threads, pairs = s->rows * s->shared, inner = l->gate.features;
    const long from = share(s->hidden, thread, threads), to = share(s->hidden, thread + 1, threads);
    const long begin = share(inner, thread, threads), end = share(inner, thread + 1, threads);
    NAMED(normed)(s, l->first_norm, s->given, from, to);
#pragma omp barrier
    NAMED(project)(s, (const linear *const[]){&l->query, &l->key, &l->value}, 3,
                   (float *const[]){s->queries, s->keys, s->values}, s->given, thread);
#pragma omp barrier
    for (long pair = pairs * thread / threads; pair < pairs * (thread + 1) / threads; pair++)
        NAMED(attend)(s, l, pair % s->rows, pair / s->rows, s->scores + thread * s->scores_row);
#pragma omp barrier
    NAMED(project)(s, (const linear *const[]){&l->out}, 1, (float *const[]){s->queries}, s->given, thread);
    NAMED(add_to_states)(s, s->queries, from, to);
#pragma omp barrier
    NAMED(normed)(s, l->second_norm, s->given, from, to);
#pragma omp barrier
    NAMED(project)(s, (const linear *const[]){&l->gate, &l->up}, 2, (float *const[]){s->gates, s->ups}, s->given, thread);
    NAMED(gate_all)(s->gates + begin * s->side, s->ups + begin * s->side, (end - begin) * s->side);
#pragma omp barrier
    NAMED(project)(s, (const linear *const[]){&l->down}, 1, (float *const[]){s->queries}, s->gates, thread);
    NAMED(add_to_states)(s, s->queries, from, to);
#pragma omp barrier
}

/* From embeddings to the last norm: `states` hold the first, `given` the other afterwards. */
void NAMED(decode)(const step *asked, const layer *layers) {
#pragma omp parallel num_threads((int)asked->threads)
    {
        step own = *asked;
        own.threads = omp_get_num_threads();
        const long thread = omp_get_thread_num();
        for (long i = 0; i < own.layers; i++) NAMED(decode_layer)(&own, layers + i, thread);
        NAMED(normed)(&own, own.last_norm, own.given, share(own.hidden, thread, own.threads),
                      share(own.hidden, thread + 1, own.threads));
    }
}

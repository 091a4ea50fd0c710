/* Causal attention of one sequence under one key head: included for each generation of processors and each dtype. All of its tokens'
 * numbers lie in a thread's room as float32. */

/* Tokens' heads to float32, `[tokens][size]`, and where asked for `[size][side]`, filled up with zeros. */
TARGET static void SUITED(NAMED(take_tokens))(const NUMBER *from, long token, long count, long size, float *out, float *columns,
                                             long side) {
    for (long i = 0; i < count; i++) {
        long c = 0;
        for (; c + LANES <= size; c += LANES) SUITED(store)(out + i * size + c, SUITED(NAMED(load))(from + i * token + c));
        for (; c < size; c++) out[i * size + c] = LOAD(from + i * token + c);
    }
    if (!columns) return;
    for (long c = count * size; c < side * size; c++) out[c] = 0.0f;
#if LANES == 16
    for (long i = 0; i < side; i += SIDE)
        for (long c = 0; c < size; c += SIDE) SUITED(turn_line)(SIDE, out + i * size + c, size, 1.0f, columns + c * side + i, side);
#else
    for (long i = 0; i < side; i += 4)
        for (long c = 0; c < size; c += 4) SUITED(turn)(out + i * size + c, size, 1.0f, columns + c * side + i, side);
#endif
}

TARGET static void SUITED(NAMED(keep_tokens))(const float *from, NUMBER *out, long token, long count, long size) {
    for (long i = 0; i < count; i++) {
#pragma omp simd
        for (long c = 0; c < size; c++) STORE(out + i * token + c, from[i * size + c]);
    }
}

/* Scores of a token to its shares of the tokens up to itself, and zeros up to the limit. */
TARGET INLINE void SUITED(NAMED(causal_shares))(float *scores, long token, long limit, float scaling) {
    const float share = 1.0f / SUITED(exponentials)(scores, token + 1, limit, scaling);
    for (long j = 0; j < limit; j += SIDE)
#pragma omp simd
        for (int i = 0; i < SIDE; i++) scores[j + i] *= share;
}

/* Shares of some tokens from `i` on: their rows up to the limit are written. */
TARGET static void SUITED(NAMED(shares_of))(const attention *a, const attention_room *r, long i, long some, long limit) {
    float *shares = r->shares + i * r->side;
    SUITED(by_rows)(some, r->key_columns, r->side, r->query + i * a->size, a->size, a->size, shares, r->side, limit, 0);
    for (long n = 0; n < some; n++) SUITED(NAMED(causal_shares))(shares + n * r->side, i + n, limit, a->scaling);
}

TARGET static void SUITED(NAMED(attend_forward))(const attention *a, const attention_room *r, const NUMBER *query,
                                                const NUMBER *key, const NUMBER *value, NUMBER *mixed, long length) {
    SUITED(NAMED(take_tokens))(key, a->key_token, length, a->size, r->key, r->key_columns, r->side);
    SUITED(NAMED(take_tokens))(value, a->value_token, length, a->size, r->value, 0, r->side);
    for (long h = 0; h < a->heads / a->shared; h++) {
        SUITED(NAMED(take_tokens))(query + h * a->query_head, a->query_token, length, a->size, r->query, 0, r->side);
        for (long i = 0, some; i < length; i += some) {
            some = SUITED(together)(length - i);
            const long limit = (i + some + SIDE - 1) / SIDE * SIDE;
            SUITED(NAMED(shares_of))(a, r, i, some, limit);
            SUITED(by_rows)(some, r->value, a->size, r->shares + i * r->side, r->side, i + some, r->by_query + i * a->size, a->size,
                            a->size, 0);
        }
        SUITED(NAMED(keep_tokens))(r->by_query, mixed + h * a->mixed_head, a->mixed_token, length, a->size);
    }
}

TARGET static void SUITED(NAMED(attend_backward))(const attention *a, const attention_room *r, const NUMBER *query,
                                                 const NUMBER *key, const NUMBER *value, const NUMBER *mixed,
                                                 const NUMBER *by_mixed, NUMBER *by_query, NUMBER *by_key, NUMBER *by_value,
                                                 long length) {
    const long size = a->size, side = r->side;
    SUITED(NAMED(take_tokens))(key, a->key_token, length, size, r->key, r->key_columns, side);
    SUITED(NAMED(take_tokens))(value, a->value_token, length, size, r->value, r->value_columns, side);
    for (long h = 0; h < a->heads / a->shared; h++) {
        SUITED(NAMED(take_tokens))(query + h * a->query_head, a->query_token, length, size, r->query, 0, side);
        SUITED(NAMED(take_tokens))(mixed + h * a->mixed_head, a->mixed_token, length, size, r->by_query, 0, side);
        SUITED(NAMED(take_tokens))(by_mixed + h * a->mixed_head, a->mixed_token, length, size, r->by_mixed, 0, side);
        for (long i = 0, some; i < length; i += some) {
            some = SUITED(together)(length - i);
            const long limit = (i + some + SIDE - 1) / SIDE * SIDE;
            float *slopes = r->slopes + i * side;
            SUITED(NAMED(shares_of))(a, r, i, some, limit);
            SUITED(by_rows)(some, r->value_columns, side, r->by_mixed + i * size, size, size, slopes, side, limit, 0);
            for (long n = 0; n < some; n++) {
                const float *shares = r->shares + (i + n) * side, *by = r->by_mixed + (i + n) * size;
                const float *own = r->by_query + (i + n) * size;
                float along = 0.0f;
#pragma omp simd reduction(+ : along)
                for (long c = 0; c < size; c++) along += by[c] * own[c];
#pragma omp simd
                for (long j = 0; j < limit; j++) slopes[n * side + j] = shares[j] * (slopes[n * side + j] - along) * a->scaling;
            }
            SUITED(by_rows)(some, r->key, size, slopes, side, i + some, r->by_query + i * size, size, size, 0);
        }
        SUITED(NAMED(keep_tokens))(r->by_query, by_query + h * a->by_query_head, a->by_query_token, length, size);
        for (long j = 0, some; j < length; j += some) {
            some = SUITED(together)(length - j);
            const long corner = j * side + j;
            SUITED(by_columns)(some, r->by_mixed + j * size, size, r->shares + corner, side, length - j, r->by_value + j * size, size,
                               size, h > 0);
            SUITED(by_columns)(some, r->query + j * size, size, r->slopes + corner, side, length - j, r->by_key + j * size, size, size,
                               h > 0);
        }
    }
    SUITED(NAMED(keep_tokens))(r->by_key, by_key, a->by_key_token, length, size);
    SUITED(NAMED(keep_tokens))(r->by_value, by_value, a->by_value_token, length, size);
}

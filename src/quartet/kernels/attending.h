/* Causal attention of sequences that lie side by side, shared among threads: included for each dtype. Heads are a multiple of 16
 * numbers. */

/* Zeros for tokens after the last sequence. */
static void NAMED(clear_rest)(const attention *a, NUMBER *out, long token, long head, long heads) {
    for (long t = a->first[a->sequences]; t < a->tokens; t++)
        for (long h = 0; h < heads; h++)
            for (long i = 0; i < a->size; i++) STORE(out + t * token + h * head + i, 0.0f);
}

/* softmax(q k^T scaling) v of each token over those of its sequence up to itself. */
void NAMED(attention)(const attention *a, const NUMBER *query, const NUMBER *key, const NUMBER *value, NUMBER *mixed) {
    const long pairs = a->sequences * a->shared, group = a->heads / a->shared;
    NAMED(clear_rest)(a, mixed, a->mixed_token, a->mixed_head, a->heads);
#pragma omp parallel for schedule(dynamic) num_threads((int)a->threads)
    for (long pair = 0; pair < pairs; pair++) {
        const long start = a->first[pair / a->shared], length = a->first[pair / a->shared + 1] - start, h = pair % a->shared;
        const attention_room room = attention_room_of(a, omp_get_thread_num(), length);
        BEST(NAMED(attend_forward))(a, &room, query + start * a->query_token + h * group * a->query_head,
                             key + start * a->key_token + h * a->key_head, value + start * a->value_token + h * a->value_head,
                             mixed + start * a->mixed_token + h * group * a->mixed_head, length);
    }
}

/* Its gradients, by what was given and came out. */
void NAMED(attention_gradient)(const attention *a, const NUMBER *query, const NUMBER *key, const NUMBER *value, const NUMBER *mixed,
                               const NUMBER *by_mixed, NUMBER *by_query, NUMBER *by_key, NUMBER *by_value) {
    const long pairs = a->sequences * a->shared, group = a->heads / a->shared;
    NAMED(clear_rest)(a, by_query, a->by_query_token, a->by_query_head, a->heads);
    NAMED(clear_rest)(a, by_key, a->by_key_token, a->by_key_head, a->shared);
    NAMED(clear_rest)(a, by_value, a->by_value_token, a->by_value_head, a->shared);
#pragma omp parallel for schedule(dynamic) num_threads((int)a->threads)
    for (long pair = 0; pair < pairs; pair++) {
        const long start = a->first[pair / a->shared], length = a->first[pair / a->shared + 1] - start, h = pair % a->shared;
        const long queries = start * a->query_token + h * group * a->query_head;
        const long keys = start * a->key_token + h * a->key_head, values = start * a->value_token + h * a->value_head;
        const long mixeds = start * a->mixed_token + h * group * a->mixed_head;
        const attention_room room = attention_room_of(a, omp_get_thread_num(), length);
        BEST(NAMED(attend_backward))(a, &room, query + queries, key + keys, value + values, mixed + mixeds, by_mixed + mixeds,
                              by_query + start * a->by_query_token + h * group * a->by_query_head,
                              by_key + start * a->by_key_token + h * a->by_key_head,
                              by_value + start * a->by_value_token + h * a->by_value_head, length);
    }
}

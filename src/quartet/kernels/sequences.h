/* What attention over whole sequences is given; kernels/attending.py lays the same out. */

/* Causal attention of sequences that lie side by side. Of query, key, value and their like: numbers from one token to the next, and
 * from one head to the next. `first`: the place of each sequence's first token, and after the last sequence's last. */
typedef struct {
    long sequences, tokens, heads, shared, size, longest, threads;
    long query_token, query_head, key_token, key_head, value_token, value_head, mixed_token, mixed_head;
    long by_query_token, by_query_head, by_key_token, by_key_head, by_value_token, by_value_head;
    const long *first;
    float *room;
    float scaling;
} attention;

/* A thread's room for one sequence under one head. */
typedef struct {
    float *query, *key, *value, *key_columns, *value_columns, *shares, *slopes, *by_mixed, *by_query, *by_key, *by_value;
    long side; /* tokens, filled up */
} attention_room;

/* Numbers of it. */
static long attention_numbers(const attention *a) {
    const long side = (a->longest + SIDE - 1) / SIDE * SIDE;
    return side * (9 * a->size + 2 * side);
}

static attention_room attention_room_of(const attention *a, long thread, long length) {
    const long side = (a->longest + SIDE - 1) / SIDE * SIDE, part = side * a->size;
    float *r = a->room + thread * attention_numbers(a);
    return (attention_room){r,
                            r + part,
                            r + 2 * part,
                            r + 3 * part,
                            r + 4 * part,
                            r + 9 * part,
                            r + 9 * part + side * side,
                            r + 5 * part,
                            r + 6 * part,
                            r + 7 * part,
                            r + 8 * part,
                            (length + SIDE - 1) / SIDE * SIDE};
}

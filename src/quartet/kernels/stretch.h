/* Decoding steps in a row, from the last tokens until a response ends: included for each dtype of weights. */

/* The embeddings of the last tokens, the rows side by side; 0 in those that fill up. */
static void NAMED(embed)(const step *s, const stretch *t) {
    for (long j = 0; j < s->hidden; j++)
        for (long m = 0; m < s->side; m++) {
            const long place = m < s->rows ? t->token[m] * s->hidden + j : 0;
            const float number = s->narrow ? LOAD((const NUMBER *)t->embeddings + place) : ((const float *)t->embeddings)[place];
            s->states[j * s->side + m] = m < s->rows ? number : 0.0f;
        }
}

/* Keeps what was drawn; whether a response ends with it. */
static int NAMED(keep_drawn)(const step *s, const stretch *t) {
    int ends = 0;
    for (long m = 0; m < s->rows; m++) {
        const long place = t->response[m] * t->length + t->sampled[m]++;
        t->tokens[place] = t->token[m] = t->picked[m];
        t->logprobs[place] = t->picked_logprobs[m];
        t->mask[place] = 1;
        t->position[m]++;
        ends |= t->picked[m] == t->stop;
    }
    return ends;
}

/* Up to `most` steps; `done` says how many. */
void NAMED(decode_stretch)(step *s, const layer *layers, stretch *t) {
    s->positions = t->position;
    for (t->done = 0; t->done < t->most;) {
        NAMED(embed)(s, t);
        NAMED(decode)(s, layers);
        NAMED(of_rows)(s->given, s->side, (const NUMBER *)t->head, t->bias, (NUMBER *)t->logits, t->packed, s->rows, s->hidden, t->vocabulary,
                       t->threads);
        for (long m = 0; t->uniforms && m < s->rows; m++) t->numbers[m] = t->uniforms[t->response[m] * t->length + t->sampled[m]];
        NAMED(draw)((const NUMBER *)t->logits, t->uniforms ? t->numbers : 0, t->picked, t->picked_logprobs, t->sums, s->rows, t->vocabulary,
                    t->by, t->threads);
        t->done++;
        if (NAMED(keep_drawn)(s, t)) break;
    }
}

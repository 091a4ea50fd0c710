/* The rotary embedding: included with TURNED for each pair of dtypes, of the states and of the angles (ANGLE, LOAD_ANGLE). */

CLONES static void TURNED(rotary_tokens)(const NUMBER *states, const ANGLE *cosines, const ANGLE *sines, NUMBER *out,
                                        long from, long to, long tokens, long heads, long width, long row, long token,
                                        long head, long out_row, long out_token, long out_head, long angle_row,
                                        long angle_token, long back) {
    const long half = width / 2;
    const float sign = back ? -1.0f : 1.0f;
    for (long i = from; i < to; i++) {
        const long n = i / tokens, t = i % tokens, angle = n * angle_row + t * angle_token;
        const ANGLE *c = cosines + angle, *s = sines + angle;
        const ANGLE *first = back ? s + half : s, *second = back ? s : s + half;
        for (long h = 0; h < heads; h++) {
            const NUMBER *x = states + n * row + t * token + h * head;
            NUMBER *y = out + n * out_row + t * out_token + h * out_head;
#pragma omp simd
            for (long j = 0; j < half; j++) {
                float a = LOAD(x + j), b = LOAD(x + half + j);
                STORE(y + j, a * LOAD_ANGLE(c + j) - sign * b * LOAD_ANGLE(first + j));
                STORE(y + half + j, b * LOAD_ANGLE(c + half + j) + sign * a * LOAD_ANGLE(second + j));
            }
        }
    }
}

/* Rotary embedding of `[rows, tokens, heads, width]` given by strides: each half turned into the other by the angles of its
 * token, or back where `back` is not 0. Angles: `[rows or 1, tokens, width]`, whose stride over rows may be 0. */
void TURNED(rotary)(const NUMBER *states, const ANGLE *cosines, const ANGLE *sines, NUMBER *out, long rows, long tokens,
                   long heads, long width, long row, long token, long head, long out_row, long out_token, long out_head,
                   long angle_row, long angle_token, long back, long threads) {
    if (rows * tokens * heads * width < LEAST) threads = 1;
    RANGE(rows *tokens, threads,
          TURNED(rotary_tokens)(states, cosines, sines, out, from, to, tokens, heads, width, row, token, head, out_row,
                               out_token, out_head, angle_row, angle_token, back));
}

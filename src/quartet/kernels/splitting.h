/* Numbers of float32 as tiles of AMX take them: each as the sum of three of bfloat16, x = x1 + x2 + x3, which is exact: its 24 digits,
 * eight at a time, rounded to the nearest. Of the nine products of two such sums six are computed; the other three are less than 2^-23
 * of the whole product, about what float32 rounds away (Henry, Tang and Heinecke, arXiv 1904.06376). Where a number is infinite, or
 * 2^128 - 2^119 and more, its sums are NaN, and pieces, products and sums below 2^-126 count as 0. */

/* The pieces of two vectors, `apart` from one to the next: words of a pair of numbers, the first in the lower half. */
TARGET_TILES INLINE void split_pairs(__m512 first, __m512 second, float *to, long apart) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000u), half = _mm512_set1_epi32(0x8000);
#pragma GCC unroll 2
    for (int n = 0; n < PIECES - 1; n++) {
        const __m512i one = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(first), half), upper);
        const __m512i two = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(second), half), upper);
        first -= _mm512_castsi512_ps(one);
        second -= _mm512_castsi512_ps(two);
        _mm512_storeu_si512(to + n * apart, _mm512_or_si512(_mm512_srli_epi32(one, 16), two));
    }
    const __m512i one = _mm512_srli_epi32(_mm512_castps_si512(first), 16), two = _mm512_and_si512(_mm512_castps_si512(second), upper);
    _mm512_storeu_si512(to + (PIECES - 1) * apart, _mm512_or_si512(one, two));
}

/* Up to 16 vectors of up to 16 numbers, `step` apart, as columns of a tile of float32; asks for what lies so far ahead. */
TARGET_TILES INLINE void turned_tile(const float *from, long step, long vectors, long numbers, long ahead, float *to) {
    const __mmask16 there = numbers < SIDE ? (__mmask16)((1u << (numbers > 0 ? numbers : 0)) - 1) : (__mmask16)~0;
    __m512 r[SIDE];
#pragma GCC unroll 16
    for (long n = 0; n < SIDE; n++) {
        r[n] = n < vectors ? _mm512_maskz_loadu_ps(there, from + n * step) : _mm512_setzero_ps();
        __builtin_prefetch(from + n * step + ahead, 0, 3);
    }
    turn_rows_v4(SIDE, r, to, SIDE);
}

/* A tile for each piece of up to 16 lines of up to 32 numbers: a line in each row, or for `pairs` a line in each column; a word holds two
 * numbers that are 16 apart. Zeros where there is nothing. Asks for what lies so many numbers `ahead`. */
TARGET_TILES INLINE void split_tile(const float *from, long line, long step, long lines, long width, float scale, const int pairs, long ahead,
                                    float *to) {
    /* 16 numbers of each line, and 16 more, as rows hold them, if they do not lie in memory like that. */
    float turned[2 * TILE_WORDS] __attribute__((aligned(LINE)));
    const int straight = pairs ? line == 1 : step == 1, across = !straight && (pairs ? step == 1 : line == 1);
    if (across && pairs) {
        turned_tile(from, line, lines, width, ahead, turned);
        turned_tile(from + SIDE, line, lines, width - SIDE, ahead, turned + TILE_WORDS);
    } else if (across) {
        turned_tile(from, step, width, lines, ahead, turned);
        turned_tile(from + SIDE * step, step, width - SIDE, lines, ahead, turned + TILE_WORDS);
    } else if (!straight) {
        for (long n = 0; n < SIDE; n++)
            for (long k = 0; k < DEPTH; k++)
                turned[k / SIDE * TILE_WORDS + (pairs ? k % SIDE * SIDE + n : n * SIDE + k % SIDE)] =
                    n < lines && k < width ? from[n * line + k * step] : 0.0f;
    }
    const long along = pairs ? lines : width, down = pairs ? width : lines, between = pairs ? step : line;
    const __mmask16 there = along < SIDE ? (__mmask16)((1u << along) - 1) : (__mmask16)~0;
    const __mmask16 more = pairs ? there : along < DEPTH ? (__mmask16)((1u << (along > SIDE ? along - SIDE : 0)) - 1) : (__mmask16)~0;
    const long second_row = pairs ? SIDE : 0, second_place = pairs ? SIDE * between : SIDE;
#pragma GCC unroll 4
    for (long n = 0; n < SIDE; n++) {
        const float *at = straight ? from + n * between : turned + n * SIDE;
        __m512 first, second;
        if (straight) {
            first = n < down ? _mm512_maskz_loadu_ps(there, at) : _mm512_setzero_ps();
            second = n + second_row < down ? _mm512_maskz_loadu_ps(more, at + second_place) : _mm512_setzero_ps();
            __builtin_prefetch(at + ahead, 0, 3);
            __builtin_prefetch(at + ahead + second_place, 0, 3);
        } else
            first = _mm512_loadu_ps(at), second = _mm512_loadu_ps(at + TILE_WORDS);
        if (scale != 1.0f) first *= scale, second *= scale;
        split_pairs(first, second, to + n * SIDE, TILE_WORDS);
    }
}

/* Two strips of up to 16 lines of a side of some products: so many tiles from place `start` of the terms' depths on. */
typedef struct {
    const product_sum *p;
    long first, end, start, tiles; /* lines, and tiles of each strip */
    float *to;
} strips;

/* Their tile n: the first of the first strip, that of the second, the second of the first ... */
TARGET_TILES static __attribute__((noinline)) void split_nth(const strips *s, const int pairs, long n) {
    const long first = s->first + n % 2 * SIDE, lines = s->end - first;
    const term *t = s->p->terms;
    long place = s->start + n / 2;
    if (lines <= 0) return;
    for (long own; place >= (own = (t->width + DEPTH - 1) / DEPTH); t++) place -= own;
    const long line = pairs ? t->b_step : t->a_row, step = pairs ? t->b_row : t->a_step;
    split_tile((pairs ? t->b : t->a) + first * line + place * DEPTH * step, line, step, lines < SIDE ? lines : SIDE,
               t->width - place * DEPTH < DEPTH ? t->width - place * DEPTH : DEPTH, pairs ? 1.0f : t->scale, pairs,
               DEPTH * step, s->to + (n % 2 * s->tiles + n / 2) * PIECES * TILE_WORDS);
}

/* Rows of two tiles of lines whose numbers lie side by side, to be split while tiles multiply others: null for none. */
typedef struct {
    const float *from;
    long line, ahead, second; /* numbers from one line to the next, to what is asked for, and to the second tile of pieces */
    float *to;
    int both;
} waiting_lines;

/* A sixth of them. */
TARGET_TILES INLINE void split_sixth(const waiting_lines *w, const int sixth) {
    if (!w->from) return;
#pragma GCC unroll 6
    for (int n = 2 * SIDE * sixth / 6; n < 2 * SIDE * (sixth + 1) / 6; n++) {
        const float *at = w->from + n * w->line;
        if (n >= SIDE && !w->both) return;
        __builtin_prefetch(at + w->ahead, 0, 3);
        __builtin_prefetch(at + w->ahead + SIDE, 0, 3);
        split_pairs(_mm512_loadu_ps(at), _mm512_loadu_ps(at + SIDE), w->to + n / SIDE * w->second + n % SIDE * SIDE, TILE_WORDS);
    }
}

/* All of them. */
TARGET_TILES INLINE void split_lines(const waiting_lines *w) {
#pragma GCC unroll 6
    for (int sixth = 0; sixth < 6; sixth++) split_sixth(w, sixth);
}

/* Asks for a sixth of the tiles that follow these. */
INLINE void sixth_after(const float *b, const float *second_b, const int sixth) {
#pragma GCC unroll 8
    for (int line = PIECES * SIDE * sixth / 6; line < PIECES * SIDE * (sixth + 1) / 6; line++) {
        __builtin_prefetch(b + PIECES * TILE_WORDS + line * SIDE, 0, 3);
        __builtin_prefetch(second_b + PIECES * TILE_WORDS + line * SIDE, 0, 3);
    }
}

#define LOADED(one, two, first, second, piece)                    \
    do {                                                          \
        _tile_loadd(one, first + (piece)*TILE_WORDS, 4 * SIDE);   \
        _tile_loadd(two, second + (piece)*TILE_WORDS, 4 * SIDE);  \
    } while (0)
/* Each with each, and a sixth of what a processor does meanwhile, if both come by turns. */
#define MULTIPLIED(sixth)               \
    do {                                \
        _tile_dpbf16ps(0, 4, 6);        \
        _tile_dpbf16ps(1, 4, 7);        \
        _tile_dpbf16ps(2, 5, 6);        \
        _tile_dpbf16ps(3, 5, 7);        \
        sixth_after(b, second_b, sixth); \
        split_sixth(w, sixth);          \
    } while (0)

/* As `added_tiles` in amx_products.h, of split numbers; others are split meanwhile. */
TARGET_TILES INLINE void added_split_tiles(const float *a, const float *second_a, const float *b, const float *second_b, const waiting_lines *w) {
    LOADED(4, 5, a, second_a, 2);
    LOADED(6, 7, b, second_b, 0);
    MULTIPLIED(0);
    LOADED(4, 5, a, second_a, 1);
    MULTIPLIED(1);
    LOADED(6, 7, b, second_b, 1);
    MULTIPLIED(2);
    LOADED(4, 5, a, second_a, 0);
    MULTIPLIED(3);
    LOADED(6, 7, b, second_b, 2);
    MULTIPLIED(4);
    LOADED(6, 7, b, second_b, 0);
    MULTIPLIED(5);
}
#undef MULTIPLIED
#undef LOADED

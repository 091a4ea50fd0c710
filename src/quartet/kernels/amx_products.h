/* Sums of matrix products by tiles of AMX, 16 rows times 16 columns and 32 numbers of bfloat16 deep: parts of A and B are packed into
 * tiles, the numbers of B in pairs, those of float32 in three pieces each. Sums are float32 from the first term to the last, and rounded
 * once. */

enum {
    TILE_WORDS = SIDE * SIDE, /* of four bytes: two numbers */
    TILES_DEEP = 36,          /* tiles, or pieces of them, that are multiplied before their sums are put away */
    TILES_ACROSS = 24,        /* of columns, whose packed parts stay in the second cache */
    ROWS_AT_ONCE = 512,       /* whose sums wait for what is deeper */
};
#define TILE_NUMBERS (2 * TILE_WORDS)
#define TARGET_TILES __attribute__((target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16")))
/* Floats of a thread's room: packed B, packed A of 32 rows and of 32 more, sums of four tiles, sums that wait. */
#define TILES_WITHIN \
    (TILES_ACROSS * TILES_DEEP * TILE_WORDS + 4 * TILES_DEEP * TILE_WORDS + 4 * TILE_WORDS + ROWS_AT_ONCE * TILES_ACROSS * SIDE)

#include "splitting.h"

INLINE bf16 scaled_bf16(bf16 number, float scale) {
    bf16 found;
    store_bf16(&found, load_bf16(&number) * scale);
    return found;
}

/* A tile whose rows are up to 16 lines of up to 32 numbers, or for `pairs` its transposed in words: [16 pairs of numbers][16 lines].
 * Zeros where there is nothing. */
TARGET_TILES static void packed_slowly(const bf16 *from, long line, long step, long lines, long width, float scale, int pairs, bf16 *to) {
    for (long n = 0; n < SIDE; n++)
        for (long k = 0; k < DEPTH; k++) {
            const bf16 number = n < lines && k < width ? from[n * line + k * step] : 0;
            to[pairs ? k / 2 * DEPTH + 2 * n + k % 2 : n * DEPTH + k] = scale == 1.0f ? number : scaled_bf16(number, scale);
        }
}

INLINE __attribute__((target("arch=x86-64-v4,avx512bf16"))) __m512 widened(__m256i numbers) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

/* 32 numbers, each times the scale. */
TARGET_TILES INLINE __m512i scaled_numbers(__m512i numbers, float scale) {
    const __m512 low = widened(_mm512_castsi512_si256(numbers)) * scale, high = widened(_mm512_extracti64x4_epi64(numbers, 1)) * scale;
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

/* The same of 16 lines: rows that are lines, */
TARGET_TILES INLINE void packed_lines(const bf16 *from, long line, long width, float scale, const int pairs, bf16 *to) {
    const __mmask32 there = width < DEPTH ? ((__mmask32)1 << width) - 1 : ~(__mmask32)0;
    __m512 r[SIDE];
#pragma GCC unroll 16
    for (int n = 0; n < SIDE; n++) r[n] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(there, from + n * line));
    if (scale != 1.0f)
        for (int n = 0; n < SIDE; n++) r[n] = _mm512_castsi512_ps(scaled_numbers(_mm512_castps_si512(r[n]), scale));
    if (pairs)
        turn_rows_v4(SIDE, r, (float *)to, SIDE);
    else
#pragma GCC unroll 16
        for (int n = 0; n < SIDE; n++) _mm512_storeu_ps((float *)to + n * SIDE, r[n]);
}

/* and rows across up to 32 lines, for two tiles that lie `apart`; of so many pairs of rows. */
TARGET_TILES INLINE void packed_across(const bf16 *from, long step, long lines, long count, float scale, const int pairs, bf16 *to, long apart) {
    const __mmask32 there = lines < 2 * SIDE ? ((__mmask32)1 << lines) - 1 : ~(__mmask32)0;
    __m512 left[SIDE], right[SIDE];
    for (long k = count; k < SIDE; k++) {
        left[k] = right[k] = _mm512_setzero_ps();
        if (!pairs) continue;
        _mm512_storeu_ps((float *)to + k * SIDE, left[k]);
        _mm512_storeu_ps((float *)(to + apart) + k * SIDE, right[k]);
    }
#pragma GCC unroll 16
    for (long k = 0; k < count; k++) {
        const bf16 *first = from + 2 * k * step, *second = first + step;
        __builtin_prefetch(first + DEPTH * step, 0, 3);
        __builtin_prefetch(second + DEPTH * step, 0, 3);
        __m512i one = _mm512_maskz_loadu_epi16(there, first), two = _mm512_maskz_loadu_epi16(there, second);
        if (scale != 1.0f) one = scaled_numbers(one, scale), two = scaled_numbers(two, scale);
        left[k] = _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(one)),
                                                      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(two)), 16)));
        right[k] = _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(one, 1)),
                                                       _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(two, 1)), 16)));
        if (pairs) {
            _mm512_storeu_ps((float *)to + k * SIDE, left[k]);
            _mm512_storeu_ps((float *)(to + apart) + k * SIDE, right[k]);
        }
    }
    if (pairs) return;
    turn_rows_v4(SIDE, left, (float *)to, SIDE);
    if (lines > SIDE) turn_rows_v4(SIDE, right, (float *)(to + apart), SIDE);
}

/* Tiles of up to 32 lines, 16 in each of two strips; each term begins with a tile of its own. */
TARGET_TILES INLINE void packed_strips(const strips *s, const int pieces, const int pairs) {
    const long apart = s->tiles * TILE_NUMBERS, lines = s->end - s->first;
    long place = 0, start = s->start, tiles = s->tiles;
    bf16 *out = (bf16 *)s->to;
    for (long n = 0; pieces > 1 && n < 2 * tiles; n++) split_nth(s, pairs, n);
    for (long n = 0; pieces == 1 && n < s->p->count && tiles > 0; n++) {
        const term *t = s->p->terms + n;
        const long own = (t->width + DEPTH - 1) / DEPTH, from = start - place;
        place += own;
        if (from >= own) continue;
        const long line = pairs ? t->b_step : t->a_row, step = pairs ? t->b_row : t->a_step;
        const bf16 *base = (const bf16 *)(pairs ? t->b : t->a) + s->first * line;
        const float scale = pairs ? 1.0f : t->scale;
        for (long k = from; k < own && tiles > 0; k++, tiles--, start++, out += TILE_NUMBERS) {
            const long width = t->width - k * DEPTH;
            const bf16 *at = base + k * DEPTH * step;
            if (line == 1 && (width >= DEPTH || width % 2 == 0)) {
                if (width >= DEPTH)
                    packed_across(at, step, lines, SIDE, scale, pairs, out, apart);
                else
                    packed_across(at, step, lines, width / 2, scale, pairs, out, apart);
                continue;
            }
            for (long strip = 0; strip < 2 && lines > strip * SIDE; strip++) {
                const bf16 *here = at + strip * SIDE * line;
                if (step == 1 && lines >= (strip + 1) * SIDE)
                    packed_lines(here, line, width, scale, pairs, out + strip * apart);
                else
                    packed_slowly(here, line, step, lines - strip * SIDE, width, scale, pairs, out + strip * apart);
            }
        }
    }
}

/* 16 rows of sums to where they belong. */
TARGET_TILES INLINE void put_sums(const product_sum *p, const float *sums, long i, long j, long rows, long columns) {
    const __mmask16 there = (__mmask16)((1u << columns) - 1);
    for (long r = 0; r < rows; r++) {
        __m512 found = _mm512_loadu_ps(sums + r * SIDE);
        const long place = (i + r) * p->out_row + j;
        if (p->wide) {
            float *out = p->out + place;
            if (p->bias) found += _mm512_maskz_loadu_ps(there, p->bias + j);
            if (p->add) found += _mm512_maskz_loadu_ps(there, out);
            _mm512_mask_storeu_ps(out, there, found);
            continue;
        }
        bf16 *out = (bf16 *)p->out + place;
        if (p->bias)
            found += widened(_mm256_maskz_loadu_epi16(there, (const bf16 *)p->bias + j));
        if (p->add) found += widened(_mm256_maskz_loadu_epi16(there, out));
        _mm256_mask_storeu_epi16(out, there, (__m256i)_mm512_cvtneps_pbh(found));
    }
}

/* The products of two strips of A and two of B, or of one twice, are added to the first four tiles; asks for what
 * follows in B, which comes from the second cache. */
TARGET_TILES INLINE void added_tiles(const float *a, const float *second_a, const float *b, const float *second_b, long deep) {
    for (long k = 0; k < deep * TILE_WORDS; k += TILE_WORDS) {
#pragma GCC unroll 16
        for (int line = 0; line < SIDE; line++) {
            __builtin_prefetch(b + k + TILE_WORDS + line * SIDE, 0, 3);
            __builtin_prefetch(second_b + k + TILE_WORDS + line * SIDE, 0, 3);
        }
        _tile_loadd(4, a + k, 4 * SIDE);
        _tile_loadd(6, b + k, 4 * SIDE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, second_b + k, 4 * SIDE);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, second_a + k, 4 * SIDE);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

/* A part of a product: packed A of up to 32 rows from `i` on and packed B of columns `j` to `end`, of one depth, the `first` or `last` of
 * all. Between depths the sums are kept in `waiting`. */
typedef struct {
    const float *a, *b;
    long deep, i, bottom, j, end;
    float *sums, *waiting;
    int first, last;
} tile_block;

/* Sums of four tiles added to those that wait: so they are as exact as if few numbers had been summed up at a time. */
TARGET_TILES INLINE void more_sums(const float *sums, const float *waiting, float *out) {
    for (long i = 0; i < 4 * TILE_WORDS; i += SIDE) _mm512_storeu_ps(out + i, _mm512_loadu_ps(sums + i) + _mm512_loadu_ps(waiting + i));
}

/* Multiplied; meanwhile numbers of the `next` rows, unless null, are split: a processor does both at once. */
TARGET_TILES INLINE void rows_of_tiles(const product_sum *p, const int pieces, const tile_block *t, const strips *next) {
    const int both = t->i + SIDE < t->bottom;
    const long strip = t->deep * pieces * TILE_WORDS, pairs = (t->end - t->j + 2 * SIDE - 1) / (2 * SIDE);
    const float *b = t->b, *second_a = t->a + (both ? strip : 0);
    for (long n = 0, c = t->j; n < pairs; n++, c += 2 * SIDE, b += 2 * strip) {
        const int more = c + SIDE < t->end;
        float *waiting = t->waiting + 4 * n * TILE_WORDS, *done = t->first && !t->last ? waiting : t->sums;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        if (pieces > 1) {
            for (long k = 0; k < strip; k += PIECES * TILE_WORDS)
                added_split_tiles(t->a + k, second_a + k, b + k, b + (more ? strip : 0) + k, &(waiting_lines){0});
            for (long tile = 2 * t->deep * n / pairs; next && tile < 2 * t->deep * (n + 1) / pairs; tile++) split_nth(next, 0, tile);
        } else
            added_tiles(t->a, second_a, b, b + (more ? strip : 0), t->deep);
        _tile_stored(0, done, 4 * SIDE);
        _tile_stored(1, done + TILE_WORDS, 4 * SIDE);
        _tile_stored(2, done + 2 * TILE_WORDS, 4 * SIDE);
        _tile_stored(3, done + 3 * TILE_WORDS, 4 * SIDE);
        __asm__ volatile("" ::: "memory"); /* as in `whole_tiles` */
        if (!t->first) more_sums(t->sums, waiting, t->last ? t->sums : waiting);
        for (int q = 0; t->last && q < 4; q++) {
            const long row = t->i + q / 2 * SIDE, column = c + q % 2 * SIDE;
            if ((q / 2 && !both) || (q % 2 && !more)) continue;
            put_sums(p, t->sums + q * TILE_WORDS, row, column, t->bottom - row < SIDE ? t->bottom - row : SIDE,
                     t->end - column < SIDE ? t->end - column : SIDE);
        }
    }
}

/* Rows `from` to `to` of columns `left` to `right`. */
TARGET_TILES INLINE void tiles_multiplied(const product_sum *p, const int pieces, float *room, long from, long to, long left, long right) {
    float *own_b = room, *own_a = own_b + TILES_ACROSS * TILES_DEEP * TILE_WORDS, *other_a = own_a + 2 * TILES_DEEP * TILE_WORDS;
    float *sums = other_a + 2 * TILES_DEEP * TILE_WORDS, *waiting = sums + 4 * TILE_WORDS;
    long total = 0;
    for (long n = 0; n < p->count; n++) total += (p->terms[n].width + DEPTH - 1) / DEPTH;
    const long most = TILES_DEEP / pieces, blocks = (total + most - 1) / most;
    whole_tiles();
    const long parts = (to - from + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, pairs = (to - from + 2 * SIDE - 1) / (2 * SIDE);
    const long high = (pairs + parts - 1) / parts * 2 * SIDE; /* rows at once, about as many each time */
    for (long top = from; top < to; top += high)
        for (long j = left; j < right; j += TILES_ACROSS * SIDE) {
            const long bottom = to - top < high ? to : top + high;
            const long end = right - j < TILES_ACROSS * SIDE ? right : j + TILES_ACROSS * SIDE;
            for (long n = 0; n < blocks; n++) {
                const long start = total * n / blocks, deep = total * (n + 1) / blocks - start;
                for (long c = j; c < end; c += 2 * SIDE)
                    packed_strips(&(strips){p, c, end - c < 2 * SIDE ? end : c + 2 * SIDE, start, deep, own_b + (c - j) / SIDE * deep * pieces * TILE_WORDS},
                                  pieces, 1);
                strips rows = {p, top, bottom - top < 2 * SIDE ? bottom : top + 2 * SIDE, start, deep, own_a};
                packed_strips(&rows, pieces, 0);
                for (long i = top; i < bottom; i += 2 * SIDE) {
                    const float *a = rows.to;
                    const int more = i + 2 * SIDE < bottom;
                    rows.first = rows.end;
                    rows.end = bottom - rows.end < 2 * SIDE ? bottom : rows.end + 2 * SIDE;
                    rows.to = a == own_a ? other_a : own_a;
                    if (pieces == 1 && more) packed_strips(&rows, 1, 0);
                    __asm__ volatile("" ::: "memory"); /* as in `whole_tiles` */
                    rows_of_tiles(p, pieces,
                                  &(tile_block){a, own_b, deep, i, bottom, j, end, sums, waiting + (i - top) / SIDE * TILES_ACROSS * TILE_WORDS, n == 0,
                                                n + 1 == blocks},
                                  more ? &rows : 0);
                }
            }
        }
    _tile_release();
}

/* The part of one of `high * across` threads. */
TARGET_TILES INLINE void tiles_of_thread(const product_sum *p, const int pieces, long thread, long high, long across) {
    const long tall = (p->rows + 31) / 32, wide = (p->columns + 31) / 32, down = thread / across, along = thread % across;
    const long from = tall * down / high * 32, to = tall * (down + 1) / high * 32;
    const long left = wide * along / across * 32, right = wide * (along + 1) / across * 32;
    if (from < to && left < right)
        tiles_multiplied(p, pieces, p->room + thread * TILES_WITHIN, from, to < p->rows ? to : p->rows, left, right < p->columns ? right : p->columns);
}

TARGET_TILES static void part_by_tiles(const product_sum *p, long thread, long high, long across) { tiles_of_thread(p, 1, thread, high, across); }
TARGET_TILES static void part_by_pieces(const product_sum *p, long thread, long high, long across) {
    tiles_of_thread(p, PIECES, thread, high, across);
}

/* Sums of matrix products, after Goto and van de Geijn (doi 10.1145/1356052.1356053): parts of A that stay in the second cache and
 * of B that stay in the third are packed into panels in the order in which tiles read them. Included for each generation of
 * processors. A number's sum runs in the same order whatever is computed beside it. */

#define LINE 16 /* numbers */
#define AT_ONCE 8 /* lines that may lie on one set of the nearest cache */

/* A few numbers that lie side by side. */
TARGET INLINE void SUITED(copied)(const int side, const float *from, float scale, float *out) {
    int n = 0;
#pragma GCC unroll 8
    for (; n + LANES <= side; n += LANES) SUITED(store)(out + n, SUITED(load_f32)(from + n) * scale);
#pragma GCC unroll 8
    for (; n + 4 <= side; n += 4) *(SUITED(four_given) *)(out + n) = *(const SUITED(four_given) *)(from + n) * scale;
#pragma GCC unroll 8
    for (; n + 2 <= side; n += 2) *(SUITED(two_given) *)(out + n) = *(const SUITED(two_given) *)(from + n) * scale;
}

/* Panels of `side` places for each of some lines' numbers, `deep` from one number to the next panel's: out[i * deep + k * side + n] =
 * scale from[(i + n) * line + k * step], zeros after the last line. Asks for what comes next meanwhile: lines are too short, and too
 * many, for a processor to see where they lead. */
TARGET INLINE void SUITED(panels)(const int side, const float *from, long line, long step, long count, long width, float scale,
                                  float *out, long deep) {
    long i = 0;
    if (line == 1) { /* along memory, across the panels */
        const long whole = count / side * side;
        for (long k = 0; k < width; k += AT_ONCE) {
            const long end = k + AT_ONCE < width ? k + AT_ONCE : width;
            for (i = 0; i < whole; i += side)
                for (long m = k; m < end; m++) {
                    __builtin_prefetch(from + (m + AT_ONCE) * step + i, 0, 3);
                    SUITED(copied)(side, from + m * step + i, scale, out + i * deep + m * side);
                }
        }
        i = whole;
    }
    for (; i < count; i += side) {
        const long some = count - i < side ? count - i : side;
        const float *lines = from + i * line;
        float *to = out + i * deep;
        long k = 0;
#if LANES == 16
        if (step == 1 && some == side)
            for (; k + LINE <= width; k += LINE) {
                int n = 0;
#pragma GCC unroll 16
                for (int r = 0; r < side; r++) __builtin_prefetch(lines + (r + side) * line + k, 0, 3);
#pragma GCC unroll 2
                for (; n + LINE <= side; n += LINE) SUITED(turn_line)(LINE, lines + n * line + k, line, scale, to + k * side + n, side);
                if (n < side) SUITED(turn_line)(side - n, lines + n * line + k, line, scale, to + k * side + n, side);
            }
#endif
        if (step == 1 && some == side)
            for (; k + 4 <= width; k += LINE) { /* whole cache lines, of few rows at once: AT_ONCE */
                const long end = k + LINE < width ? k + LINE : width;
                int n = 0;
#pragma GCC unroll 16
                for (int r = 0; r < side; r++) __builtin_prefetch(lines + (r + side) * line + k, 0, 3);
#pragma GCC unroll 8
                for (; n + 4 <= side; n += 4)
                    for (long m = k; m + 4 <= end; m += 4) SUITED(turn)(lines + n * line + m, line, scale, to + m * side + n, side);
#pragma GCC unroll 2
                for (; n + 2 <= side; n += 2)
                    for (long m = k; m + 4 <= end; m += 4) SUITED(turn_two)(lines + n * line + m, line, scale, to + m * side + n, side);
                if (end - k < LINE) {
                    k += (end - k) / 4 * 4;
                    break;
                }
            }
        for (; k < width; k++)
            for (long n = 0; n < side; n++) to[k * side + n] = n < some ? scale * lines[n * line + k * step] : 0.0f;
    }
}

/* The same of all terms, from place `start` of their widths on, which are put one after the other; `scaled`: by their scales. */
TARGET INLINE void SUITED(packed)(const int side, int left, int scaled, const product_sum *p, long first, long count, long start, long width,
                                  float *out) {
    long place = 0; /* of a term's first number */
    for (long n = 0; n < p->count; place += p->terms[n].width, n++) {
        const term *t = p->terms + n;
        const long from = start > place ? start - place : 0;
        const long end = start + width - place < t->width ? start + width - place : t->width;
        if (end <= from) continue;
        const long line = left ? t->a_row : t->b_step, step = left ? t->a_step : t->b_row;
        SUITED(panels)(side, (left ? t->a : t->b) + first * line + from * step, line, step, count, end - from,
                       scaled ? t->scale : 1.0f, out, width);
        out += (end - from) * side;
    }
}

/* Up to TILE rows of `out` and up to so many columns as one or two vectors hold; `b_row` numbers from one row of these vectors to the
 * next. Asks for the numbers so many places `ahead` in each row of b meanwhile, unless 0. */
TARGET INLINE void SUITED(corner)(const int rows, const int vectors, const float *a, long a_row, long a_step, const float *b, long b_row,
                                  long width, float *out, long out_row, long columns, int add, const long ahead) {
    const int sums = rows * vectors;
    SUITED(lanes) sum[2 * TILE];
#pragma GCC unroll 24
    for (int i = 0; i < sums; i++) sum[i] = (SUITED(lanes)){0};
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
        for (int line = 0; line < vectors * LANES; line += LINE) __builtin_prefetch(out + i * out_row + line, 1, 3);
    const float *second = a + (rows > 4 ? 4 : 0) * a_row, *third = a + (rows > 8 ? 8 : 0) * a_row;
#pragma GCC unroll 4
    for (long k = 0; k < width; k++) {
        SUITED(lanes) row[2];
        for (int line = 0; ahead && line < vectors * LANES; line += LINE) __builtin_prefetch(b + k * b_row + ahead + line, 0, 3);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) row[v] = SUITED(load_f32)(b + k * b_row + v * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            const float *one = i < 4 ? a + i * a_row : i < 8 ? second + (i - 4) * a_row : third + (i - 8) * a_row;
            const float number = one[k * a_step];
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) sum[i * vectors + v] += row[v] * number;
        }
    }
    if (columns == vectors * LANES) {
#pragma GCC unroll 24
        for (int i = 0; i < sums; i++) {
            float *o = out + i / vectors * out_row + i % vectors * LANES;
            SUITED(store)(o, add ? sum[i] + SUITED(load_f32)(o) : sum[i]);
        }
        return;
    }
    float whole[2 * TILE * LANES];
#pragma GCC unroll 24
    for (int i = 0; i < sums; i++) SUITED(store)(whole + i * LANES, sum[i]);
    for (int i = 0; i < rows; i++)
        for (long j = 0; j < columns; j++) out[i * out_row + j] = whole[i * vectors * LANES + j] + (add ? out[i * out_row + j] : 0.0f);
}

/* The tiles of a panel, as below. */
TARGET INLINE void SUITED(tiled_panel)(const int vectors, const float *a, long a_row, long a_step, long a_tile, const float *b, long b_row,
                                       long rows, long width, float *out, long out_row, long columns, int add, const long ahead) {
    long i = 0;
    for (; i + TILE <= rows; i += TILE)
        SUITED(corner)(TILE, vectors, a + i / TILE * a_tile, a_row, a_step, b, b_row, width, out + i * out_row, out_row, columns, add, ahead);
    a += i / TILE * a_tile;
    for (; i + 4 <= rows; i += 4, a += 4 * a_row)
        SUITED(corner)(4, vectors, a, a_row, a_step, b, b_row, width, out + i * out_row, out_row, columns, add, ahead);
    for (; i < rows; i++, a += a_row)
        SUITED(corner)(1, vectors, a, a_row, a_step, b, b_row, width, out + i * out_row, out_row, columns, add, ahead);
}

/* All tiles of rows that are packed (a_row 1, a_step TILE), or read where they are (a_step 1), and of columns that are packed (b_row
 * 2 LANES, `b_column` the width), or read where they are (b_column 1). */
TARGET INLINE void SUITED(tiled)(const float *a, long a_row, long a_step, long a_tile, const float *b, long b_row, long b_column,
                                 long rows, long columns, long width, float *out, long out_row, int add, const long ahead) {
    for (long j = 0; j < columns; j += 2 * LANES) {
        const long across = columns - j < 2 * LANES ? columns - j : 2 * LANES;
        if (across <= LANES)
            SUITED(tiled_panel)(1, a, a_row, a_step, a_tile, b + j * b_column, b_row, rows, width, out + j, out_row, across, add, ahead);
        else
            SUITED(tiled_panel)(2, a, a_row, a_step, a_tile, b + j * b_column, b_row, rows, width, out + j, out_row, across, add, ahead);
    }
}

/* Rows `from` to `to` of columns `left` to `right`. */
TARGET static void SUITED(block_multiplied)(const product_sum *p, float *room, long from, long to, long left, long right) {
    float *own_a = room, *own_b = room + DEEP * HIGH;
    long total = 0;
    for (long n = 0; n < p->count; n++) total += p->terms[n].width;
    const term *t = p->terms;
    /* Never where a row is a token's: it is summed up in blocks of one depth, however many there are. */
    const int upright = p->count == 1 && p->rows <= FEW_ROWS && t->a_step != 1 && t->b_step == 1 && p->columns % (2 * LANES) == 0;
    const int direct = p->count == 1 && t->a_step == 1 && p->columns <= FEW_COLUMNS; /* B has the scale in it then */
    const long deep = upright ? SHALLOW : DEEP, blocks = (total + deep - 1) / deep;
    for (long j = left; j < right; j += ACROSS) {
        const long columns = right - j < ACROSS ? right - j : ACROSS;
        for (long n = 0; n < blocks; n++) {
            const long start = total * n / blocks, width = total * (n + 1) / blocks - start;
            if (!upright) SUITED(packed)(2 * LANES, 0, direct, p, j, columns, start, width, own_b);
            for (long i = from; i < to; i += HIGH) {
                const long rows = to - i < HIGH ? to - i : HIGH;
                float *out = p->out + i * p->out_row + j;
                if (!n && p->bias)
                    for (long r = 0; r < rows; r++)
                        for (long c = 0; c < columns; c++) out[r * p->out_row + c] = p->bias[j + c] + (p->add ? out[r * p->out_row + c] : 0.0f);
                const int more = n || p->add || p->bias;
                if (direct) {
                    const float *a = t->a + i * t->a_row + start;
                    SUITED(tiled)(a, t->a_row, 1, TILE * t->a_row, own_b, 2 * LANES, width, rows, columns, width, out, p->out_row, more, 0);
                    continue;
                }
                SUITED(packed)(TILE, 1, 1, p, i, rows, start, width, own_a);
                if (upright)
                    SUITED(tiled)(own_a, 1, TILE, TILE * width, t->b + start * t->b_row + j, t->b_row, 1, rows, columns, width, out, p->out_row, more,
                                  4 * LANES); /* two tiles on */
                else
                    SUITED(tiled)(own_a, 1, TILE, TILE * width, own_b, 2 * LANES, width, rows, columns, width, out, p->out_row, more, 0);
            }
        }
    }
}
#undef AT_ONCE
#undef LINE

/* Products of a few rows with float32 weights by tiles of AMX: `product_by_tiles` of numbers in pieces. */

enum { PART = 2 /* tiles of the width that are split at once, while tiles multiply the part before */ };

/* Rows side by side, `[width][rows]`, in pieces: [rows / 16][width / 32] tiles of each. */
TARGET_TILES static void split_rows(const float *x, long rows, long width, float *to) {
    for (long m = 0; m < rows; m += SIDE)
        for (long k = 0; k < width; k += DEPTH, to += PIECES * TILE_WORDS)
            split_tile(x + k * rows + m, 1, rows, SIDE, DEPTH, 1.0f, 1, DEPTH * rows, to);
}

/* Numbers `k` and more of 16 features from `n` on and of the next, if there are any: their tiles of pieces are PART apart. None where
 * nothing is `wanted`. */
TARGET_TILES INLINE waiting_lines lines_of(int wanted, const float *w, long width, long n, long to, long k, float *pieces) {
    const long ahead = k + 2 * AHEAD < width ? 2 * AHEAD : 2 * AHEAD + (2 * SIDE - 1) * width;
    return (waiting_lines){wanted ? w + n * width + k : 0, width, ahead, PART * PIECES * TILE_WORDS, pieces, n + SIDE < to};
}

/* As `product`, where the width is a multiple of 32 and the number of features one of 16. */
TARGET_TILES static void product_by_pieces(const float *packed, long rows, const float *w, long width, float *out, long from, long to) {
    float room[2][2 * PART * PIECES * TILE_WORDS] __attribute__((aligned(LINE)));
    const long tiles = width / DEPTH, parts = (tiles + PART - 1) / PART, strip = tiles * PIECES * TILE_WORDS;
    const long all = (to - from + 2 * SIDE - 1) / (2 * SIDE) * parts;
    const int alone = rows <= 2 * SIDE; /* sums stay in their tiles */
    if (from >= to) return;
    whole_tiles();
    for (long k = 0; k < PART && k < tiles; k++) {
        const waiting_lines lines = lines_of(1, w, width, from, to, k * DEPTH, room[0] + k * PIECES * TILE_WORDS);
        split_lines(&lines);
    }
    for (long n = 0; n < all; n++) { /* parts of two strips of features each */
        const long own = from + n / parts * 2 * SIDE, next = from + (n + 1) / parts * 2 * SIDE;
        const long begin = n % parts * PART, deep = tiles - begin < PART ? tiles - begin : PART;
        const long start = (n + 1) % parts * PART, coming = n + 1 == all ? 0 : tiles - start < PART ? tiles - start : PART;
        const int more = own + SIDE < to;
        const float *a = room[n & 1];
        float *b = room[(n + 1) & 1];
        __asm__ volatile("" ::: "memory"); /* as in `whole_tiles` */
        for (long m = 0; m < rows; m += 2 * SIDE) {
            const int both = m + SIDE < rows;
            const float *x = packed + m / SIDE * strip + begin * PIECES * TILE_WORDS;
            float *o = out + own * rows + m;
            if (!begin) {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            } else if (!alone) {
                _tile_loadd(0, o, 4 * rows);
                if (both) _tile_loadd(1, o + SIDE, 4 * rows);
                if (more) _tile_loadd(2, o + SIDE * rows, 4 * rows);
                if (both && more) _tile_loadd(3, o + SIDE * rows + SIDE, 4 * rows);
            }
            for (long k = 0; k < PART; k++) {
                const long place = k * PIECES * TILE_WORDS;
                const waiting_lines lines = lines_of(!m && k < coming, w, width, next, to, (start + k) * DEPTH, b + place);
                if (k < deep)
                    added_split_tiles(a + place, a + (more ? PART * PIECES * TILE_WORDS : 0) + place, x + place, x + (both ? strip : 0) + place, &lines);
                else
                    split_lines(&lines);
            }
            if (alone && begin + deep < tiles) continue;
            _tile_stored(0, o, 4 * rows);
            if (both) _tile_stored(1, o + SIDE, 4 * rows);
            if (more) _tile_stored(2, o + SIDE * rows, 4 * rows);
            if (both && more) _tile_stored(3, o + SIDE * rows + SIDE, 4 * rows);
        }
    }
    _tile_release();
}

/* Rows to columns, within registers. Included for each generation of processors. */

typedef float SUITED(four) __attribute__((vector_size(16)));
typedef float SUITED(four_given) __attribute__((vector_size(16), aligned(4), may_alias));
typedef float SUITED(two_given) __attribute__((vector_size(8), aligned(4), may_alias));
typedef int32_t SUITED(places) __attribute__((vector_size(16)));

#ifdef __clang__
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (SUITED(places)){__VA_ARGS__})
#endif

/* Four numbers of four rows each: out[k * out_row + i] = scale from[i * row + k]. */
TARGET INLINE void SUITED(turn)(const float *from, long row, float scale, float *out, long out_row) {
    SUITED(four) r[4];
    for (int i = 0; i < 4; i++) r[i] = *(const SUITED(four_given) *)(from + i * row) * scale;
    const SUITED(four) low = SHUFFLED(r[0], r[1], 0, 4, 1, 5), high = SHUFFLED(r[0], r[1], 2, 6, 3, 7);
    const SUITED(four) low2 = SHUFFLED(r[2], r[3], 0, 4, 1, 5), high2 = SHUFFLED(r[2], r[3], 2, 6, 3, 7);
    *(SUITED(four_given) *)out = SHUFFLED(low, low2, 0, 1, 4, 5);
    *(SUITED(four_given) *)(out + out_row) = SHUFFLED(low, low2, 2, 3, 6, 7);
    *(SUITED(four_given) *)(out + 2 * out_row) = SHUFFLED(high, high2, 0, 1, 4, 5);
    *(SUITED(four_given) *)(out + 3 * out_row) = SHUFFLED(high, high2, 2, 3, 6, 7);
}

/* The same of two rows. */
TARGET INLINE void SUITED(turn_two)(const float *from, long row, float scale, float *out, long out_row) {
    const SUITED(four) first = *(const SUITED(four_given) *)from * scale, second = *(const SUITED(four_given) *)(from + row) * scale;
    const SUITED(four) low = SHUFFLED(first, second, 0, 4, 1, 5), high = SHUFFLED(first, second, 2, 6, 3, 7);
    __builtin_memcpy(out, &low, 8);
    __builtin_memcpy(out + out_row, (const char *)&low + 8, 8);
    __builtin_memcpy(out + 2 * out_row, &high, 8);
    __builtin_memcpy(out + 3 * out_row, (const char *)&high + 8, 8);
}

#if LANES == 16
/* Sixteen numbers of four bytes of up to sixteen rows, a multiple of four, become rows of a row each: by pairs of numbers, of pairs, then
 * of fours. */
TARGET INLINE void SUITED(turn_rows)(const int rows, const __m512 *r, float *out, long out_row) {
    __m512 pairs[16], fours[16];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i += 2) {
        pairs[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int n = 0; n < 2; n++) {
            const __m512d low = _mm512_castps_pd(pairs[(i < rows ? i : 0) + n]), high = _mm512_castps_pd(pairs[(i < rows ? i : 0) + 2 + n]);
            fours[i + 2 * n] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            fours[i + 2 * n + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    const __mmask16 there = (__mmask16)((1u << rows) - 1);
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
        const __m512 low = _mm512_shuffle_f32x4(fours[n], fours[4 + n], 0x88), low2 = _mm512_shuffle_f32x4(fours[8 + n], fours[12 + n], 0x88);
        const __m512 high = _mm512_shuffle_f32x4(fours[n], fours[4 + n], 0xdd), high2 = _mm512_shuffle_f32x4(fours[8 + n], fours[12 + n], 0xdd);
        _mm512_mask_storeu_ps(out + n * out_row, there, _mm512_shuffle_f32x4(low, low2, 0x88));
        _mm512_mask_storeu_ps(out + (n + 4) * out_row, there, _mm512_shuffle_f32x4(high, high2, 0x88));
        _mm512_mask_storeu_ps(out + (n + 8) * out_row, there, _mm512_shuffle_f32x4(low, low2, 0xdd));
        _mm512_mask_storeu_ps(out + (n + 12) * out_row, there, _mm512_shuffle_f32x4(high, high2, 0xdd));
    }
}

/* `turn` of sixteen numbers of so many rows. */
TARGET INLINE void SUITED(turn_line)(const int rows, const float *from, long row, float scale, float *out, long out_row) {
    __m512 r[16];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) r[i] = _mm512_loadu_ps(from + i * row) * scale;
    SUITED(turn_rows)(rows, r, out, out_row);
}
#endif
#undef SHUFFLED

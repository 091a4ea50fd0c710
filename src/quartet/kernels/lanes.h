/* Vectors of one generation of processors: included once for each. */

typedef float SUITED(lanes) __attribute__((vector_size(LANES * 4)));
typedef float SUITED(given) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t SUITED(narrow) __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint32_t SUITED(wide) __attribute__((vector_size(LANES * 4)));

INLINE SUITED(lanes) SUITED(load_f32)(const float *p) { return *(const SUITED(given) *)p; }
INLINE SUITED(lanes) SUITED(load_bf16)(const bf16 *p) {
    return (SUITED(lanes))(__builtin_convertvector(*(const SUITED(narrow) *)p, SUITED(wide)) << 16);
}
/* Sums of neighbours: those of the first vector, then those of the second. */
INLINE SUITED(lanes) SUITED(neighbours)(SUITED(lanes) a, SUITED(lanes) b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, EVEN) + __builtin_shufflevector(a, b, ODD);
#else
    return __builtin_shuffle(a, b, (SUITED(wide)){EVEN}) + __builtin_shuffle(a, b, (SUITED(wide)){ODD});
#endif
}

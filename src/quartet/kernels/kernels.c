/* What training and decoding on a CPU spend their time on beside large products.
 *
 * Plain C: no header of torch or Python, so that one build serves every version of both. The functions that the library
 * exports take raw pointers, sizes and the number of threads; the Python files beside this one check tensors and call them.
 * Numbers are computed in float32 and rounded to the dtype of the output. NaN and infinities pass through, but for
 * infinities that tiles multiply in float32 (splitting.h): they become NaN.
 */
#include <stdint.h>
#include <math.h>

#ifndef CLONES /* a compiler that does not know this is asked again without it (hatch_build.py) */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define GENERATIONS
#else
#define CLONES
#endif
#endif
#define INLINE static inline __attribute__((always_inline))
#define PASTE(a, b) a##b
#define JOIN(a, b) PASTE(a, b)
#define LEAST 16384 /* numbers below which a second thread costs more than it saves */

typedef uint16_t bf16;

typedef union { uint32_t bits; float number; } either;

INLINE float as_float(uint32_t bits) { return ((either){.bits = bits}).number; }
INLINE uint32_t as_bits(float f) { return ((either){.number = f}).bits; }
INLINE float load_f32(const float *p) { return *p; }
INLINE void store_f32(float *p, float f) { *p = f; }
INLINE float load_bf16(const bf16 *p) { return as_float((uint32_t)*p << 16); }
INLINE void store_bf16(bf16 *p, float f) {
    uint32_t bits = as_bits(f); /* to the nearest, ties to even */
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    *p = (bf16)(f != f ? 0x7fc0u : rounded);
}

/* e^x to 1e-7 of itself, for x from -87 to 87: Cody and Waite's reduction, the polynomial of Cephes' expf. */
INLINE float exponential_within(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    float shifted = x * 1.44269504088896341f + magic, whole = shifted - magic;
    float r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * as_float((as_bits(shifted) << 23) + 0x3f800000u);
}

#define LOWEST -60.0f

/* e^x for x up to 0, as shares are made of: 0 below LOWEST, where it were 1e-26. Nothing comes near the smallest numbers, with which
 * processors are slow. */
INLINE float exponential(float x) {
    float e = exponential_within(x < LOWEST ? LOWEST : x);
    return x < LOWEST ? 0.0f : e;
}

/* 1 / (1 + e^-x); 0 below -60, likewise. */
INLINE float sigmoid(float x) {
    float y = -x;
    y = y > 60.0f ? 60.0f : y;
    y = y < -60.0f ? -60.0f : y;
    float s = 1.0f / (1.0f + exponential_within(y));
    return x < -60.0f ? 0.0f : s;
}

/* Each kernel works on rows `from` to `to`; the exported function shares the rows among threads. */
#define RANGE(rows, threads, call)                                                                                      \
    do {                                                                                                                \
        if (threads < 2) {                                                                                              \
            long from = 0, to = rows;                                                                                   \
            long thread = 0;                                                                                            \
            (void)thread, (void)to;                                                                                     \
            call;                                                                                                       \
        } else {                                                                                                        \
            _Pragma("omp parallel for schedule(static) num_threads((int)threads)") for (long thread = 0; thread < threads;   \
                                                                                   thread++) {                          \
                long from = rows * thread / threads, to = rows * (thread + 1) / threads;                                \
                (void)to;                                                                                               \
                call;                                                                                                   \
            }                                                                                                           \
        }                                                                                                               \
    } while (0)

#ifdef GENERATIONS
#include <immintrin.h>
#ifndef OLDER_THAN_V4 /* to see what older processors compute */
#define is_v4() __builtin_cpu_supports("x86-64-v4")
#else
#define is_v4() 0
#endif
#define is_v3() __builtin_cpu_supports("x86-64-v3")
#if defined(__linux__) && !defined(OLDER_THAN_V4)
#define TILES
#endif
#endif
#include "few_rows.h"
#include "sequences.h"
#include "terms.h"
#ifdef TILES
#include "amx.h"
#endif

/* A hash of the files that this was compiled from. */
const char *built_from(void) { return BUILT_FROM; }

#define NUMBER float
#define LOAD load_f32
#define STORE store_f32
#define NAMED(kernel) kernel##_f32
#include "typed.h"
#include "generations.h"
#ifdef TILES
#include "amx_products.h"
#include "few_by_pieces.h"
#endif
#include "multiplying.h"
#include "attending.h"
#include "linear.h"
#include "decoding.h"
#include "drawing.h"
#include "stretch.h"
#include "softmax.h"
#include "squares.h"
#define ANGLE float
#define LOAD_ANGLE load_f32
#define TURNED(kernel) kernel##_f32_f32
#include "rotary.h"
#include "waiting.h"
#undef NUMBER
#undef LOAD
#undef STORE
#undef NAMED
#undef TURNED

#define NUMBER bf16
#define LOAD load_bf16
#define STORE store_bf16
#define NAMED(kernel) kernel##_bf16
#include "typed.h"
#include "generations.h"
#include "attending.h"
#include "linear.h"
#include "decoding.h"
#include "drawing.h"
#include "stretch.h"
#include "softmax.h"
#define TURNED(kernel) kernel##_bf16_f32
#include "rotary.h"
#undef ANGLE
#undef LOAD_ANGLE
#undef TURNED
#define ANGLE bf16
#define LOAD_ANGLE load_bf16
#define TURNED(kernel) kernel##_bf16_bf16
#include "rotary.h"

/* Products of a few rows with bfloat16 weights by tiles of AMX: 16 features times 16 rows, 32 numbers deep. The weights are
 * multiplied as they lie; the few rows are packed in pairs instead, two numbers of a row in four bytes. */
#include <sys/syscall.h>
#include <unistd.h>

enum {
    DEPTH = 32,
    AHEAD = 4 * DEPTH, /* numbers of a feature that are asked for before they are needed */
    PERMIT = 0x1023,   /* ARCH_REQ_XCOMP_PERM */
    TILE_DATA = 18,
};

/* Whether this process may use tiles: a question to the processor, and one to the system. */
static int has_tiles(void) {
    static int known = -1;
    if (known < 0)
        known = __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bw") &&
                syscall(SYS_arch_prctl, PERMIT, TILE_DATA) == 0;
    return known;
}

/* Whether tiles multiply here, of numbers that vectors bring into their form. */
static int can_multiply_by_tiles(void) { return has_tiles() && is_v4() && __builtin_cpu_supports("avx512bf16"); }

/* Rows side by side, `[width][rows]`, of numbers that bfloat16 holds: [rows / 16][width / 2][16 rows][2]. */
static void pack_rows(const float *x, long rows, long width, uint32_t *packed) {
    for (long block = 0; block < rows; block += SIDE)
        for (long k = 0; k < width; k += 2) {
            const float *first = x + k * rows + block, *second = first + rows;
            uint32_t *to = packed + block * width / 2 + k / 2 * SIDE;
#pragma omp simd
            for (int m = 0; m < SIDE; m++) to[m] = as_bits(first[m]) >> 16 | (as_bits(second[m]) & 0xffff0000u);
        }
}

/* Have all tiles be 16 rows of 16 words. */
__attribute__((target("amx-tile"))) INLINE void whole_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) tiles.bytes[i] = 4 * SIDE, tiles.rows[i] = SIDE;
    __asm__ volatile("" ::: "memory"); /* some compilers do not know what the instruction reads */
    _tile_loadconfig(&tiles);
}

/* As `product`, where the width is a multiple of 32 and the number of features one of 16. */
__attribute__((target("amx-tile,amx-bf16"))) static void product_by_tiles(const uint32_t *packed, long rows, const bf16 *w,
                                                                          long width, float *out, long from, long to) {
    whole_tiles();
    for (long n = from; n < to; n += 2 * SIDE) {
        const int more = n + SIDE < to;
        const bf16 *first = w + n * width, *second = more ? first + SIDE * width : first;
        for (long m = 0; m < rows; m += 2 * SIDE) {
            const int both = m + SIDE < rows;
            const uint32_t *left = packed + m * width / 2, *right = both ? left + SIDE * width / 2 : left;
            float *o = out + n * rows + m;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (long k = 0; k < width; k += DEPTH) {
                const long far = k + AHEAD < width ? k + AHEAD : k + AHEAD + (2 * SIDE - 1) * width;
                if (!m) {
#pragma GCC unroll 16
                    for (long i = 0; i < SIDE; i++) {
                        __builtin_prefetch(first + i * width + far, 0, 3);
                        __builtin_prefetch(second + i * width + far, 0, 3);
                    }
                }
                _tile_loadd(4, first + k, width * 2);
                _tile_loadd(6, left + k * SIDE / 2, 4 * SIDE);
                _tile_dpbf16ps(0, 4, 6);
                if (more) {
                    _tile_loadd(5, second + k, width * 2);
                    _tile_dpbf16ps(1, 5, 6);
                }
                if (both) {
                    _tile_loadd(7, right + k * SIDE / 2, 4 * SIDE);
                    _tile_dpbf16ps(2, 4, 7);
                    if (more) _tile_dpbf16ps(3, 5, 7);
                }
            }
            _tile_stored(0, o, 4 * rows);
            if (more) _tile_stored(1, o + SIDE * rows, 4 * rows);
            if (both) _tile_stored(2, o + SIDE, 4 * rows);
            if (both && more) _tile_stored(3, o + SIDE * rows + SIDE, 4 * rows);
        }
    }
    _tile_release();
}

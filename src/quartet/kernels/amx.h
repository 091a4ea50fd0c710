/* Products of a few rows with bfloat16 weights by tiles of AMX: 16 features times 16 rows, 32 numbers deep. The weights are
 * multiplied as they lie; the few rows are packed in pairs instead. */
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SIDE = 16, DEPTH = 32, PERMIT = 0x1023 /* ARCH_REQ_XCOMP_PERM */, TILE_DATA = 18 };

/* Whether this process may use tiles: a question to the processor, and one to the system. */
static int has_tiles(void) {
    static int known = -1;
    if (known < 0)
        known = __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bw") &&
                syscall(SYS_arch_prctl, PERMIT, TILE_DATA) == 0;
    return known;
}

/* Rows of numbers that bfloat16 holds: [blocks of 16 rows][width / 2][16 rows][2]. */
static void pack_rows(const float *x, long x_row, long rows, long width, uint32_t *packed) {
    for (long block = 0; block < rows; block += SIDE)
        for (long m = 0; m < SIDE; m++) {
            const float *row = x + (block + m < rows ? block + m : block) * x_row;
            uint32_t *to = packed + block * width / 2 + m;
            for (long k = 0; k < width; k += 2) to[k * SIDE / 2] = as_bits(row[k]) >> 16 | (as_bits(row[k + 1]) & 0xffff0000u);
        }
}

/* As `product`, where the width is a multiple of 32 and the number of features one of 16. */
__attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw"))) static void product_by_tiles(const uint32_t *packed,
                                                                                           const bf16 *w, long width,
                                                                                           float *out, long out_row, long rows,
                                                                                           long from, long to) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) tiles.bytes[i] = 4 * SIDE, tiles.rows[i] = SIDE;
    _tile_loadconfig(&tiles);
    float sums[4][SIDE * SIDE];
    for (long n = from; n < to; n += 2 * SIDE) {
        const bf16 *first = w + n * width, *second = n + SIDE < to ? first + SIDE * width : first;
        for (long m = 0; m < rows; m += 2 * SIDE) {
            const int both = m + SIDE < rows;
            const uint32_t *upper = packed + m * width / 2, *lower = both ? upper + SIDE * width / 2 : upper;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (long k = 0; k < width; k += DEPTH) {
                _tile_loadd(4, first + k, width * 2);
                _tile_loadd(6, upper + k * SIDE / 2, 4 * SIDE);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, second + k, width * 2);
                _tile_dpbf16ps(1, 5, 6);
                if (both) {
                    _tile_loadd(7, lower + k * SIDE / 2, 4 * SIDE);
                    _tile_dpbf16ps(2, 4, 7);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
            _tile_stored(0, sums[0], 4 * SIDE);
            _tile_stored(1, sums[1], 4 * SIDE);
            _tile_stored(2, sums[2], 4 * SIDE);
            _tile_stored(3, sums[3], 4 * SIDE);
            for (int tile = 0; tile < 4; tile++) {
                const long row = m + (tile >> 1) * SIDE, feature = n + (tile & 1) * SIDE;
                for (int i = 0; feature < to && i < SIDE && row + i < rows; i++)
                    for (int j = 0; j < SIDE; j++) out[(row + i) * out_row + feature + j] = sums[tile][j * SIDE + i];
            }
        }
    }
    _tile_release();
}

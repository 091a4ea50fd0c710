/* What sums of matrix products are given; kernels/multiplying.py lays the same out. */

/* scale A B with A `[rows][width]` and B `[width][columns]`: numbers from one row to the next, and from one column to the next. */
typedef struct {
    const float *a, *b;
    long a_row, a_step, b_row, b_step, width;
    float scale;
} term;

/* out, `[rows][columns]` with `out_row` numbers from one row to the next, is overwritten by the sum of the terms and, unless null, of
 * a bias for each column; or they are added to what is there. `room`: WITHIN numbers for each thread, or TILES_WITHIN
 * (amx_products.h) where there are tiles. `wide`: the result is float32. */
typedef struct {
    long rows, columns, out_row, add, wide, count, threads;
    float *out, *room;
    const float *bias;
    term terms[]; /* `count` of them */
} product_sum;

#define DEEP 288      /* of the widths, put one after the other, that panels hold at once */
#define HIGH 96       /* rows of A; a multiple of every TILE */
#define ACROSS 1024   /* columns of B */
#define FEW_COLUMNS 32 /* up to which rows of A are read where they are: packing them would take longer than it saves */
#define FEW_ROWS 32    /* the same of rows and B, */
#define SHALLOW 64    /* of whose rows so many are read again from the caches for each tile */
#define WITHIN (DEEP * (HIGH + ACROSS + 32))

/* `generation.h` for each generation of processors, with
 *
 *   SUITED(name)      a name of its own
 *   TARGET            what tells the compiler of it
 *   LANES, TILE       numbers in a vector, and features of a tile: its sums stay in registers
 *   EVEN, ODD         every second number of a pair of vectors
 */
#ifdef GENERATIONS
#define SUITED(name) JOIN(name, _v4)
#define TARGET __attribute__((target("arch=x86-64-v4")))
#define LANES 16
#define TILE 12
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#include "generation.h"

#define SUITED(name) JOIN(name, _v3)
#define TARGET __attribute__((target("arch=x86-64-v3")))
#define LANES 8
#define TILE 6
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#include "generation.h"
#endif

#define SUITED(name) JOIN(name, _any)
#define TARGET
#define LANES 4
#define TILE 6
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#include "generation.h"

#ifndef LANES_KNOWN
#define LANES_KNOWN
/* A kernel as it is for this processor. */
#ifdef GENERATIONS
#define BEST(kernel) (is_v4() ? JOIN(kernel, _v4) : is_v3() ? JOIN(kernel, _v3) : JOIN(kernel, _any))
#else
#define BEST(kernel) JOIN(kernel, _any)
#endif
#endif

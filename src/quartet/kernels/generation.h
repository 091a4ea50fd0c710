/* The kernels of one generation of processors: generations.h says of which. */
#ifndef LANES_KNOWN
#include "lanes.h"
#include "turns.h"
#include "panels.h"
#endif
#include "products.h"
#include "attention.h"
#undef SUITED
#undef TARGET
#undef LANES
#undef TILE
#undef EVEN
#undef ODD

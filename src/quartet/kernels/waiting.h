/* Calls of kernels one after the other: what lies between them, in a language that takes long for it, finds nothing of its own in the
 * caches through which they went. kernels/waiting.py lays the calls out. */

enum { MULTIPLY, SILU_PRODUCT, SILU_GRADIENT };

/* `count`, and so many calls: a kernel's number, the bytes that follow, and what it is given. */
void run(const long *calls) {
    long count = *calls++;
    for (; count > 0; count--) {
        const long kernel = *calls++, size = *calls++;
        const long *a = calls;
        calls += size / (long)sizeof(long);
        if (kernel == MULTIPLY)
            multiply((const product_sum *)a);
        else if (kernel == SILU_PRODUCT)
            silu_product_f32((const float *)a[0], (const float *)a[1], (float *)a[2], a[3], a[4], a[5], a[6], a[7], a[8]);
        else if (kernel == SILU_GRADIENT)
            silu_gradient_f32((const float *)a[0], (const float *)a[1], (const float *)a[2], (float *)a[3], (float *)a[4], (float *)a[5],
                              a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14]);
    }
}

/* Calls of kernels one after the other: what lies between them, in a language that takes long for it, finds nothing of its own in the
 * caches through which they went. kernels/waiting.py lays the calls out. */

enum { MULTIPLY, ADD, SILU_PRODUCT, SILU_GRADIENT, RMS_NORM, RMS_NORM_GRADIENT, ROTARY, ATTENTION, ATTENTION_GRADIENT };

#define IN(i) ((const float *)a[i])
#define OUT(i) ((float *)a[i])

/* `count`, and so many calls: a kernel's number, the bytes that follow, and what it is given. */
void run(const long *calls) {
    long count = *calls++;
    for (; count > 0; count--) {
        const long kernel = *calls++, size = *calls++;
        const long *a = calls;
        calls += size / (long)sizeof(long);
        switch (kernel) {
        case MULTIPLY:
            multiply((const product_sum *)a);
            break;
        case ADD:
            add_f32(OUT(0), IN(1), a[2], a[3], a[4]);
            break;
        case SILU_PRODUCT:
            silu_product_f32(IN(0), IN(1), OUT(2), a[3], a[4], a[5], a[6], a[7], a[8]);
            break;
        case SILU_GRADIENT:
            silu_gradient_f32(IN(0), IN(1), IN(2), OUT(3), OUT(4), OUT(5), a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14]);
            break;
        case RMS_NORM:
            rms_norm_f32(IN(0), IN(1), OUT(2), OUT(3), OUT(4), a[5], a[6], *(const float *)(a + 7), a[8]);
            break;
        case RMS_NORM_GRADIENT:
            rms_norm_gradient_f32(IN(0), IN(1), IN(2), IN(3), IN(4), OUT(5), OUT(6), a[7], a[8], a[9]);
            break;
        case ROTARY:
            rotary_f32_f32(IN(0), IN(1), IN(2), OUT(3), a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15],
                           a[16], a[17]);
            break;
        case ATTENTION:
            attention_f32((const attention *)a[0], IN(1), IN(2), IN(3), OUT(4));
            break;
        case ATTENTION_GRADIENT:
            attention_gradient_f32((const attention *)a[0], IN(1), IN(2), IN(3), IN(4), IN(5), OUT(6), OUT(7), OUT(8));
        }
    }
}
#undef IN
#undef OUT

/* Who can win a draw: for one instruction set, included by module.c once for each. Expects NAME(f).
 *
 * A draw is the argmax of logit + Gumbel noise, noise keyed by (seed, position, token) through Philox4x32-10; philox.py has its
 * definition. Here the noise is approximate, within NOISE_ERROR, and all tokens within twice that of the best are returned:
 * the caller computes the exact noise of these few. */

/* ln x for positive normal x, absolute error below 1e-6 (polynomial of Cephes' logf). */
static inline float NAME(ln)(float x) {
    union { float f; int32_t i; } u = { .f = x };
    int32_t power = ((u.i - 0x3F3504F3) >> 23); /* so that the mantissa lies between sqrt(1/2) and sqrt(2) */
    u.i -= power << 23;
    float m = u.f - 1.0f, k = (float)power, p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    return k * 0.69314718f + (m + m * m * (p * m - 0.5f));
}

/* -ln(-ln(1 - v)) for v = (word + 1/2) / 2^32. */
static inline float NAME(gumbel)(uint32_t word) {
    float v = ((float)(int32_t)(word >> 8) + 0.5f * (1.0f / 256.0f) + (float)(int32_t)(word & 255) * (1.0f / 256.0f)) * 5.9604645e-8f;
    v = v > 0.99999994f ? 0.99999994f : v;
    /* Near 0, 1 - v has lost what matters: there the series v + v^2 / 2 + v^3 / 3 is exact enough. */
    float series = v * (1.0f + v * (0.5f + v * 0.33333333f)), direct = -NAME(ln)(1.0f - v);
    return -NAME(ln)(v < 0.01f ? series : direct);
}

static void NAME(noisy_scores)(const float *logits, float *scores, long vocab, uint32_t k0, uint32_t k1, uint32_t position) {
    for (long first = 0; first < (vocab + 3) / 4; first += NOISE_GROUPS) {
        uint32_t x0[NOISE_GROUPS], x1[NOISE_GROUPS], x2[NOISE_GROUPS], x3[NOISE_GROUPS];
        uint32_t a = k0, b = k1;
        for (long i = 0; i < NOISE_GROUPS; i++) x0[i] = (uint32_t)(first + i), x1[i] = position, x2[i] = x3[i] = 0;
        for (int round = 0; round < 10; round++, a += 0x9E3779B9u, b += 0xBB67AE85u) {
            _Pragma("omp simd")
            for (long i = 0; i < NOISE_GROUPS; i++) {
                uint64_t p0 = (uint64_t)x0[i] * 0xD2511F53u, p1 = (uint64_t)x2[i] * 0xCD9E8D57u;
                x0[i] = (uint32_t)(p1 >> 32) ^ x1[i] ^ a, x1[i] = (uint32_t)p1;
                x2[i] = (uint32_t)(p0 >> 32) ^ x3[i] ^ b, x3[i] = (uint32_t)p0;
            }
        }
        float noise[4 * NOISE_GROUPS];
        _Pragma("omp simd")
        for (long i = 0; i < NOISE_GROUPS; i++) {
            noise[4 * i] = NAME(gumbel)(x0[i]), noise[4 * i + 1] = NAME(gumbel)(x1[i]);
            noise[4 * i + 2] = NAME(gumbel)(x2[i]), noise[4 * i + 3] = NAME(gumbel)(x3[i]);
        }
        long begin = 4 * first, end = begin + 4 * NOISE_GROUPS < vocab ? begin + 4 * NOISE_GROUPS : vocab;
        _Pragma("omp simd")
        for (long t = begin; t < end; t++) scores[t] = logits[t] + noise[t - begin];
    }
}

/* Tokens of finite logits that may have the highest score, ascending; returns how many there are, of which at most `most` are
 * written to `winners`; -1 if out of memory. */
static long NAME(contenders)(const float *logits, long vocab, uint32_t k0, uint32_t k1, uint32_t position, int64_t *winners,
                             long most) {
    float *scores = malloc((size_t)vocab * sizeof(float)), best = -INFINITY;
    if (!scores) return -1;
    NAME(noisy_scores)(logits, scores, vocab, k0, k1, position);
    _Pragma("omp simd reduction(max:best)")
    for (long t = 0; t < vocab; t++) best = scores[t] > best ? scores[t] : best;
    long count = 0;
    for (long t = 0; t < vocab; t++)
        if (scores[t] >= best - 2.0f * NOISE_ERROR) {
            if (count < most) winners[count] = t;
            count++;
        }
    free(scores);
    return count;
}

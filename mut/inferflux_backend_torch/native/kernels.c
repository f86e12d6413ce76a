/* CPU kernels for one element type and one instruction set: module.c includes this file once for each pair.
 *
 * Expects  ELEMENT       the type of activations and cache: float, or uint16_t holding bfloat16
 *          LOAD(e)       element -> float          STORE(f)  float -> element, rounded to nearest even
 *          WIDEN(to, from, n), NARROW(to, from, n)  the same for n elements, n even, in an order of floats that suits the type
 *          NAME(f)       f with a suffix for the pair
 * All arithmetic is in float. The meaning of every function is that of the method of the same name of ops.TorchOps.
 */

/* e^x, relative error below 2e-7 within [-60, 60], and the value at the nearer end beyond: 1e-26 is nothing beside 1, and
 * products with smaller numbers would be subnormal, which costs a hundred cycles each. Without branches and calls, so that
 * loops over it vectorise. */
static inline float NAME(exp_clamped)(float x) {
    x = x < -60.0f ? -60.0f : x;
    x = x > 60.0f ? 60.0f : x;
    int32_t power = (int32_t)(x * 1.44269504f + 128.5f) - 128; /* of a positive number, cutting is rounding down */
    float k = (float)power, r = x - k * 0.693359375f + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } scale = { .i = (power + 127) << 23 };
    return p * scale.f;
}

static inline float NAME(sigmoid)(float x) { return 1.0f / (1.0f + NAME(exp_clamped)(-x)); }

static inline float NAME(tanh_fast)(float x) { return 2.0f * NAME(sigmoid)(2.0f * x) - 1.0f; }

static inline float NAME(inverse_rms)(const float *x, long n, float eps) {
    float sum = 0.0f;
    _Pragma("omp simd reduction(+:sum)")
    for (long i = 0; i < n; i++) sum += x[i] * x[i];
    return 1.0f / sqrtf(sum / (float)n + eps);
}

/* residual may be NULL; else residual += x first. x and out may be the same rows. */
static void NAME(rms_norm)(const ELEMENT *x, long x_stride, ELEMENT *residual, ELEMENT *out, const float *weight, long rows,
                           long width, float eps) {
    _Pragma("omp parallel for schedule(static) if (rows * width > SERIAL_ELEMENTS)")
    for (long t = 0; t < rows; t++) {
        const ELEMENT *in = x + t * x_stride;
        ELEMENT *kept = residual ? residual + t * width : NULL, *to = out + t * width;
        float sum = 0.0f;
        if (kept) {
            _Pragma("omp simd")
            for (long i = 0; i < width; i++) kept[i] = STORE(LOAD(kept[i]) + LOAD(in[i]));
            in = kept;
        }
        _Pragma("omp simd reduction(+:sum)")
        for (long i = 0; i < width; i++) sum += LOAD(in[i]) * LOAD(in[i]);
        float scale = 1.0f / sqrtf(sum / (float)width + eps);
        _Pragma("omp simd")
        for (long i = 0; i < width; i++) to[i] = STORE(LOAD(in[i]) * scale * weight[i]);
    }
}

static void NAME(act_mul)(const ELEMENT *gate_up, ELEMENT *out, long rows, long width, int activation) {
    _Pragma("omp parallel for schedule(static) if (rows * width > SERIAL_ELEMENTS)")
    for (long t = 0; t < rows; t++) {
        const ELEMENT *gate = gate_up + t * 2 * width, *up = gate + width;
        ELEMENT *to = out + t * width;
        if (activation == ACT_SILU) {
            _Pragma("omp simd")
            for (long i = 0; i < width; i++) {
                float g = LOAD(gate[i]);
                to[i] = STORE(g * NAME(sigmoid)(g) * LOAD(up[i]));
            }
        } else {
            _Pragma("omp simd")
            for (long i = 0; i < width; i++) {
                float g = LOAD(gate[i]);
                float inner = 0.7978845608f * (g + 0.044715f * g * g * g);
                to[i] = STORE(0.5f * g * (1.0f + NAME(tanh_fast)(inner)) * LOAD(up[i]));
            }
        }
    }
}

/* One head: norm, rotate, and store to `to`. */
static inline void NAME(head)(const ELEMENT *x, ELEMENT *to, long dim, const float *norm, float eps, const float *cos_sin,
                              long rotary) {
    float h[MAX_HEAD_DIM];
    _Pragma("omp simd")
    for (long i = 0; i < dim; i++) h[i] = LOAD(x[i]);
    if (norm) {
        float scale = NAME(inverse_rms)(h, dim, eps);
        _Pragma("omp simd")
        for (long i = 0; i < dim; i++) h[i] = h[i] * scale * norm[i];
    }
    if (cos_sin) {
        long half = rotary / 2;
        _Pragma("omp simd")
        for (long i = 0; i < half; i++) {
            float c = cos_sin[i], s = cos_sin[half + i], a = h[i], b = h[half + i];
            h[i] = a * c - b * s;
            h[half + i] = b * c + a * s;
        }
    }
    _Pragma("omp simd")
    for (long i = 0; i < dim; i++) to[i] = STORE(h[i]);
}

static void NAME(rope_and_cache)(ELEMENT *qkv, ELEMENT *keys, ELEMENT *values, const int64_t *positions, const int64_t *slots,
                                 const float *rope, const float *q_norm, const float *k_norm, long rows, long heads,
                                 long kv_heads, long dim, long rotary, float eps) {
    long width = (heads + 2 * kv_heads) * dim;
    _Pragma("omp parallel for schedule(static) if (rows * width > SERIAL_ELEMENTS)")
    for (long t = 0; t < rows; t++) {
        ELEMENT *q = qkv + t * width, *k = q + heads * dim, *v = k + kv_heads * dim;
        const float *cos_sin = rope ? rope + positions[t] * rotary : NULL;
        ELEMENT *to = keys + slots[t] * kv_heads * dim;
        if (q_norm || cos_sin)
            for (long h = 0; h < heads; h++) NAME(head)(q + h * dim, q + h * dim, dim, q_norm, eps, cos_sin, rotary);
        for (long h = 0; h < kv_heads; h++) NAME(head)(k + h * dim, to + h * dim, dim, k_norm, eps, cos_sin, rotary);
        memcpy(values + slots[t] * kv_heads * dim, v, (size_t)(kv_heads * dim) * sizeof(ELEMENT));
    }
}

static inline void NAME(prefetch)(const ELEMENT *p, long dim) {
    for (long i = 0; i < dim; i += 64 / (long)sizeof(ELEMENT)) __builtin_prefetch(p + i);
}

/* Attention of one query token's group of heads over tokens [first, last) of its sequence.
 * acc: [group, dim] unnormalised, in the order of WIDEN; best, total: [group], maximum of the scores and sum of exp(score - maximum).
 * TILE tokens at a time, so that each is converted once for all heads and the accumulators are touched once for the tile. */
static inline __attribute__((always_inline)) void NAME(attend_dim)(
    const ELEMENT *q, const ELEMENT *keys, const ELEMENT *values, const int32_t *table, long first, long last, long group,
    long kv_heads, const long dim, long block_size, float scale, float softcap, float *acc, float *best, float *total) {
    float query[MAX_GROUP_DIM], scores[MAX_GROUP][SEGMENT], tile[TILE][MAX_HEAD_DIM];
    long stride = kv_heads * dim, length = last - first, padded = (length + TILE - 1) / TILE * TILE;
    long offsets[SEGMENT + AHEAD]; /* of each token in the cache; past the end the last one's, with a weight of 0 */
    long block = first / block_size, within = first % block_size;
    for (long n = 0; n < length; n++) {
        offsets[n] = (table[block] * block_size + within) * stride;
        if (++within == block_size) within = 0, block++;
    }
    for (long n = length; n < padded + AHEAD; n++) offsets[n] = offsets[length - 1];
    for (long g = 0; g < group; g++) {
        float *qg = query + g * dim;
        WIDEN(qg, q + g * dim, dim);
        _Pragma("omp simd")
        for (long i = 0; i < dim; i++) qg[i] *= scale;
    }
    for (long n = 0; n < padded; n += TILE) {
        for (long j = 0; j < TILE; j++) {
            const ELEMENT *k = keys + offsets[n + j];
            NAME(prefetch)(keys + offsets[n + j + AHEAD], dim);
            WIDEN(tile[j], k, dim);
        }
        for (long g = 0; g < group; g++) {
            const float *qg = query + g * dim;
            float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
            _Pragma("omp simd reduction(+:s0, s1, s2, s3)")
            for (long i = 0; i < dim; i++) {
                s0 += qg[i] * tile[0][i];
                s1 += qg[i] * tile[1][i];
                s2 += qg[i] * tile[2][i];
                s3 += qg[i] * tile[3][i];
            }
            scores[g][n] = s0, scores[g][n + 1] = s1, scores[g][n + 2] = s2, scores[g][n + 3] = s3;
        }
    }
    for (long g = 0; g < group; g++) {
        float *s = scores[g], highest = -INFINITY, sum = 0.0f;
        if (softcap > 0.0f) {
            _Pragma("omp simd")
            for (long n = 0; n < length; n++) s[n] = softcap * NAME(tanh_fast)(s[n] / softcap);
        }
        _Pragma("omp simd reduction(max:highest)")
        for (long n = 0; n < length; n++) highest = s[n] > highest ? s[n] : highest;
        _Pragma("omp simd reduction(+:sum)")
        for (long n = 0; n < length; n++) {
            s[n] = NAME(exp_clamped)(s[n] - highest);
            sum += s[n];
        }
        for (long n = length; n < padded; n++) s[n] = 0.0f;
        best[g] = highest;
        total[g] = sum;
    }
    memset(acc, 0, (size_t)(group * dim) * sizeof(float));
    for (long n = 0; n < padded; n += TILE) {
        for (long j = 0; j < TILE; j++) {
            const ELEMENT *v = values + offsets[n + j];
            NAME(prefetch)(values + offsets[n + j + AHEAD], dim);
            WIDEN(tile[j], v, dim);
        }
        for (long g = 0; g < group; g++) {
            const float *p = scores[g] + n;
            float *a = acc + g * dim;
            _Pragma("omp simd")
            for (long i = 0; i < dim; i++)
                a[i] += p[0] * tile[0][i] + p[1] * tile[1][i] + p[2] * tile[2][i] + p[3] * tile[3][i];
        }
    }
}

/* Loops over a constant are unrolled: the usual head sizes get their own code. */
static void NAME(attend)(const ELEMENT *q, const ELEMENT *keys, const ELEMENT *values, const int32_t *table, long first,
                         long last, long group, long kv_heads, long dim, long block_size, float scale, float softcap,
                         float *acc, float *best, float *total) {
    if (dim == 64)
        NAME(attend_dim)(q, keys, values, table, first, last, group, kv_heads, 64, block_size, scale, softcap, acc, best, total);
    else if (dim == 128)
        NAME(attend_dim)(q, keys, values, table, first, last, group, kv_heads, 128, block_size, scale, softcap, acc, best, total);
    else
        NAME(attend_dim)(q, keys, values, table, first, last, group, kv_heads, dim, block_size, scale, softcap, acc, best, total);
}

/* Query tokens (each with its own sequence) over the paged cache. Long contexts are cut into segments, so that one
 * sequence keeps all threads busy, and merged by their log-sum-exp (as in Flash-Decoding).
 *   rows[i]: token of the batch; seqs[i]: its sequence; ends[i]: tokens that it sees, itself included. Returns -1 if out of memory. */
static int NAME(paged_attention)(const ELEMENT *qkv, ELEMENT *out, const ELEMENT *keys, const ELEMENT *values,
                                 const int32_t *tables, long table_width, const int32_t *rows, const int32_t *seqs,
                                 const int32_t *ends, long count, long heads, long kv_heads, long dim, long block_size,
                                 float scale, long window, float softcap) {
    long group = heads / kv_heads, qkv_width = (heads + 2 * kv_heads) * dim, longest = 1, work = 0;
    for (long i = 0; i < count; i++) {
        long begin = window && ends[i] > window ? ends[i] - window : 0, segments = (ends[i] - begin + SEGMENT - 1) / SEGMENT;
        longest = segments > longest ? segments : longest;
        work += (ends[i] - begin) * heads * dim;
    }
    long tasks = count * kv_heads * longest, width = group * (dim + 2);
    float *partial = malloc((size_t)(tasks * width) * sizeof(float));
    if (!partial) return -1;
    _Pragma("omp parallel if (work > SERIAL_ELEMENTS)")
    {
        _Pragma("omp for schedule(dynamic, 1)")
        for (long task = 0; task < tasks; task++) {
            long segment = task % longest, head = task / longest % kv_heads, i = task / longest / kv_heads;
            long begin = window && ends[i] > window ? ends[i] - window : 0;
            long first = begin + segment * SEGMENT, last = first + SEGMENT < ends[i] ? first + SEGMENT : ends[i];
            float *acc = partial + task * width;
            if (first < last)
                NAME(attend)(qkv + rows[i] * qkv_width + head * group * dim, keys + head * dim, values + head * dim,
                             tables + seqs[i] * table_width, first, last, group, kv_heads, dim, block_size, scale, softcap, acc,
                             acc + group * dim, acc + group * dim + group);
        }
        _Pragma("omp for schedule(static)")
        for (long pair = 0; pair < count * kv_heads; pair++) {
            long i = pair / kv_heads, head = pair % kv_heads;
            long begin = window && ends[i] > window ? ends[i] - window : 0, segments = (ends[i] - begin + SEGMENT - 1) / SEGMENT;
            for (long g = 0; g < group; g++) {
                float merged[MAX_HEAD_DIM] = {0}, highest = -INFINITY, sum = 0.0f;
                for (long s = 0; s < segments; s++) {
                    float best = partial[(pair * longest + s) * width + group * dim + g];
                    highest = best > highest ? best : highest;
                }
                for (long s = 0; s < segments; s++) {
                    const float *part = partial + (pair * longest + s) * width;
                    float weight = NAME(exp_clamped)(part[group * dim + g] - highest);
                    sum += weight * part[group * dim + group + g];
                    _Pragma("omp simd")
                    for (long d = 0; d < dim; d++) merged[d] += weight * part[g * dim + d];
                }
                ELEMENT *to = out + rows[i] * heads * dim + (head * group + g) * dim;
                _Pragma("omp simd")
                for (long d = 0; d < dim; d++) merged[d] /= sum;
                NARROW(to, merged, dim);
            }
        }
    }
    free(partial);
    return 0;
}

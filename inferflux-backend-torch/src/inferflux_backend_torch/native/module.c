/* The Python module of the CPU kernels: tensors come as addresses, shapes are trusted; native_ops.py is the only caller. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_HEAD_DIM = 512, MAX_GROUP = 64, MAX_GROUP_DIM = 8192, SEGMENT = 256, TILE = 4, AHEAD = 16, ACT_SILU = 0, ACT_GELU_TANH = 1 };
/* Less work than this is done before a second thread would have woken up. */
enum { SERIAL_ELEMENTS = 16384, NOISE_GROUPS = 64 /* of four tokens, at a time */ };
#define NOISE_ERROR 1e-4f /* measured: 3.3e-6 over every 97th word and all near the ends */

static inline float load_bf16(uint16_t e) {
    union { uint32_t i; float f; } u = { .i = (uint32_t)e << 16 };
    return u.f;
}

static inline uint16_t store_bf16(float f) {
    union { float f; uint32_t i; } u = { .f = f };
    uint32_t rounded = (u.i + 0x7FFF + ((u.i >> 16) & 1)) >> 16;
    return f != f ? 0x7FC0 : (uint16_t)rounded;
}

/* Pairs of bfloat16 are words of 32 bits: all first elements come before all second ones, which takes a shift and a mask
 * where widening in order takes shuffles. */
typedef uint32_t __attribute__((may_alias)) word;

static inline __attribute__((always_inline)) void widen_bf16(float *to, const uint16_t *from, long n) {
    const word *pairs = (const word *)from;
    long half = n / 2;
    union { uint32_t i; float f; } first, second;
    _Pragma("omp simd private(first, second)")
    for (long i = 0; i < half; i++) {
        first.i = pairs[i] << 16, second.i = pairs[i] & 0xFFFF0000u;
        to[i] = first.f, to[half + i] = second.f;
    }
}

static inline __attribute__((always_inline)) void copy_f32(float *to, const float *from, long n) {
    _Pragma("omp simd")
    for (long i = 0; i < n; i++) to[i] = from[i];
}

static inline __attribute__((always_inline)) void narrow_bf16(uint16_t *to, const float *from, long n) {
    word *pairs = (word *)to;
    long half = n / 2;
    _Pragma("omp simd")
    for (long i = 0; i < half; i++) pairs[i] = store_bf16(from[i]) | (uint32_t)store_bf16(from[half + i]) << 16;
}

#define BASELINE_F32(f) f##_f32
#define BASELINE_BF16(f) f##_bf16
#define V3_F32(f) f##_f32_v3
#define V3_BF16(f) f##_bf16_v3
#define V4_F32(f) f##_f32_v4
#define V4_BF16(f) f##_bf16_v4

#define ELEMENT float
#define LOAD(e) (e)
#define STORE(f) (f)
#define WIDEN(to, from, n) copy_f32(to, from, n)
#define NARROW(to, from, n) copy_f32(to, from, n)
#define NAME BASELINE_F32
#include "kernels.c"
#include "noise.c"
#undef NAME
#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_LEVELS
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#define NAME V3_F32
#include "kernels.c"
#include "noise.c"
#undef NAME
#pragma GCC pop_options
/* AVX-512 with vectors of 256 bits: their sums over lanes take fewer shuffles, measured 1.7 times as fast for attention. */
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2,prefer-vector-width=256")
#define NAME V4_F32
#include "kernels.c"
#include "noise.c"
#undef NAME
#pragma GCC pop_options
#endif
#undef ELEMENT
#undef LOAD
#undef STORE
#undef WIDEN
#undef NARROW

#define ELEMENT uint16_t
#define LOAD(e) load_bf16(e)
#define STORE(f) store_bf16(f)
#define WIDEN(to, from, n) widen_bf16(to, from, n)
#define NARROW(to, from, n) narrow_bf16(to, from, n)
#define NAME BASELINE_BF16
#include "kernels.c"
#undef NAME
#ifdef HAVE_LEVELS
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#define NAME V3_BF16
#include "kernels.c"
#undef NAME
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2,prefer-vector-width=256")
#define NAME V4_BF16
#include "kernels.c"
#undef NAME
#pragma GCC pop_options
#endif

static int level = 0; /* 0 baseline, 1 AVX2, 2 AVX-512 */

#ifdef HAVE_LEVELS
#define DISPATCH(type, f, ...)                                             \
    (level == 2 ? f##_##type##_v4(__VA_ARGS__) : level == 1 ? f##_##type##_v3(__VA_ARGS__) : f##_##type(__VA_ARGS__))
#else
#define DISPATCH(type, f, ...) f##_##type(__VA_ARGS__)
#endif

/* Arguments of a call: integers (addresses too) and floats, in order. */
typedef struct { PyObject *const *items; Py_ssize_t left; int failed; } Arguments;

static long long next_int(Arguments *a) {
    if (a->left-- <= 0) { a->failed = 1; return 0; }
    long long value = PyLong_AsLongLong(*a->items++);
    if (value == -1 && PyErr_Occurred()) a->failed = 1;
    return value;
}

static float next_float(Arguments *a) {
    if (a->left-- <= 0) { a->failed = 1; return 0; }
    double value = PyFloat_AsDouble(*a->items++);
    if (value == -1.0 && PyErr_Occurred()) a->failed = 1;
    return (float)value;
}

static void *next_address(Arguments *a) { return (void *)(intptr_t)next_int(a); }

static int complete(const Arguments *a) {
    if (!a->failed && a->left == 0) return 1;
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "wrong number of arguments");
    return 0;
}

static PyObject *py_rms_norm(PyObject *self, PyObject *const *items, Py_ssize_t count) {
    Arguments a = { items, count, 0 };
    int bf16 = (int)next_int(&a);
    void *x = next_address(&a);
    long stride = next_int(&a);
    void *residual = next_address(&a), *out = next_address(&a), *weight = next_address(&a);
    long rows = next_int(&a), width = next_int(&a);
    float eps = next_float(&a);
    if (!complete(&a)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (bf16) DISPATCH(bf16, rms_norm, x, stride, residual, out, weight, rows, width, eps);
    else DISPATCH(f32, rms_norm, x, stride, residual, out, weight, rows, width, eps);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_act_mul(PyObject *self, PyObject *const *items, Py_ssize_t count) {
    Arguments a = { items, count, 0 };
    int bf16 = (int)next_int(&a);
    void *gate_up = next_address(&a), *out = next_address(&a);
    long rows = next_int(&a), width = next_int(&a);
    int activation = (int)next_int(&a);
    if (!complete(&a)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (bf16) DISPATCH(bf16, act_mul, gate_up, out, rows, width, activation);
    else DISPATCH(f32, act_mul, gate_up, out, rows, width, activation);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_rope_and_cache(PyObject *self, PyObject *const *items, Py_ssize_t count) {
    Arguments a = { items, count, 0 };
    int bf16 = (int)next_int(&a);
    void *qkv = next_address(&a), *keys = next_address(&a), *values = next_address(&a);
    void *positions = next_address(&a), *slots = next_address(&a), *rope = next_address(&a);
    void *q_norm = next_address(&a), *k_norm = next_address(&a);
    long rows = next_int(&a), heads = next_int(&a), kv_heads = next_int(&a), dim = next_int(&a), rotary = next_int(&a);
    float eps = next_float(&a);
    if (!complete(&a)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (bf16)
        DISPATCH(bf16, rope_and_cache, qkv, keys, values, positions, slots, rope, q_norm, k_norm, rows, heads, kv_heads, dim,
                 rotary, eps);
    else
        DISPATCH(f32, rope_and_cache, qkv, keys, values, positions, slots, rope, q_norm, k_norm, rows, heads, kv_heads, dim,
                 rotary, eps);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_paged_attention(PyObject *self, PyObject *const *items, Py_ssize_t count) {
    Arguments a = { items, count, 0 };
    int bf16 = (int)next_int(&a), status;
    void *qkv = next_address(&a), *out = next_address(&a), *keys = next_address(&a), *values = next_address(&a);
    void *tables = next_address(&a);
    long table_width = next_int(&a);
    void *rows = next_address(&a), *seqs = next_address(&a), *ends = next_address(&a);
    long number = next_int(&a), heads = next_int(&a), kv_heads = next_int(&a), dim = next_int(&a), block = next_int(&a);
    float scale = next_float(&a);
    long window = next_int(&a);
    float softcap = next_float(&a);
    if (!complete(&a)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (bf16)
        status = DISPATCH(bf16, paged_attention, qkv, out, keys, values, tables, table_width, rows, seqs, ends, number, heads,
                          kv_heads, dim, block, scale, window, softcap);
    else
        status = DISPATCH(f32, paged_attention, qkv, out, keys, values, tables, table_width, rows, seqs, ends, number, heads,
                          kv_heads, dim, block, scale, window, softcap);
    Py_END_ALLOW_THREADS
    if (status) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *py_contenders(PyObject *self, PyObject *const *items, Py_ssize_t count) {
    Arguments a = { items, count, 0 };
    void *logits = next_address(&a);
    long vocab = next_int(&a), found;
    uint64_t seed = (uint64_t)next_int(&a);
    uint32_t position = (uint32_t)next_int(&a);
    void *winners = next_address(&a);
    long most = next_int(&a);
    if (!complete(&a)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    found = DISPATCH(f32, contenders, logits, vocab, (uint32_t)seed, (uint32_t)(seed >> 32), position, winners, most);
    Py_END_ALLOW_THREADS
    if (found < 0) return PyErr_NoMemory();
    return PyLong_FromLong(found);
}

/* set_level(n): use at most this instruction set (tests run them all); returns what is in use. */
static PyObject *py_set_level(PyObject *self, PyObject *const *items, Py_ssize_t count) {
    Arguments a = { items, count, 0 };
    int wanted = (int)next_int(&a), best = 0;
    if (!complete(&a)) return NULL;
#ifdef HAVE_LEVELS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) best = 1;
    if (best && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        best = 2;
#endif
    level = wanted < best ? wanted : best;
    return PyLong_FromLong(level);
}

#define FAST(name) { #name, (PyCFunction)(void (*)(void))py_##name, METH_FASTCALL, NULL }
static PyMethodDef methods[] = {
    FAST(rms_norm), FAST(act_mul), FAST(rope_and_cache), FAST(paged_attention), FAST(contenders), FAST(set_level), { NULL, NULL, 0, NULL },
};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_native", .m_size = -1, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__native(void) {
    PyObject *module = PyModule_Create(&definition);
    if (module) {
        PyModule_AddIntConstant(module, "MAX_HEAD_DIM", MAX_HEAD_DIM);
        PyModule_AddIntConstant(module, "MAX_GROUP", MAX_GROUP);
        PyModule_AddIntConstant(module, "MAX_GROUP_DIM", MAX_GROUP_DIM);
    }
    return module;
}

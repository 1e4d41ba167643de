/* Mamba's selective scan on a CPU, forwards and backwards, with softplus, skip and gate in the same pass.
 *
 * Plain C with a plain C interface (one struct of pointers and strides), for ctypes. GCC or Clang: the vectors are their vector extensions.
 * The file includes itself once for every number type and instruction set; which of them runs is decided when it is called.
 *
 * Work is cut into items: one sequence of the batch x a block of LANES channels. An item walks over its sequence in chunks of STEPS steps. Per chunk its inputs are
 * copied from any memory layout into small tiles, and for each state number n a vector of states runs through the chunk in registers. The forward pass keeps
 * the states before each chunk; the backward pass recomputes the others from them. So no array of [batch, channels, length, states] exists.
 *
 * In the backward pass an item is a group of blocks, so many that there is work for some dozens of threads. Gradients that sum over items (A, B, C, D, bias) are
 * written apart for each item and added in a fixed order: groups depend on the sizes only, so results do not depend on the number of threads.
 * The processor's floating-point mode is not touched. Do not link with -ffast-math: that would change it for the whole process.
 */
#ifndef REAL
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#include <sys/mman.h>
#endif

#if !defined(__GNUC__)
#error "GCC or Clang is needed"
#endif
#define INLINE static inline __attribute__((always_inline))
enum { STEPS = 16, BLOCK_BYTES = 128, MISSING_MEMORY = 1, UNKNOWN_TYPE = 2 };

typedef struct { char *data; int64_t s0, s1, s2; } tensor;  /* strides in numbers; data 0: absent */

typedef struct {
    int64_t batch, channels, states, length, softplus, threads, bytes, level, groups;  /* bytes of a number; level: highest instruction set, see levels() */
    tensor u, delta, A, B, C, D, z, bias;                   /* [b,d,t] [b,d,t] [d,n] [b,n,t] [b,n,t] [d] [b,d,t] [d] */
    tensor y, last;                                         /* [b,d,t] [b,d,n] */
    tensor dy, dlast;                                       /* gradients that come in; dlast may be absent */
    tensor du, ddelta, dA, dB, dC, dD, dz, dbias;           /* gradients that go out; dD, dz, dbias absent where D, z, bias are */
    char *checkpoints;                                      /* [b, block, chunk, n, LANES], or 0 when no gradient is wanted */
    char *partial_BC, *partial_A, *partial_d;               /* [b, group, chunk, 2, n, STEPS], [b, block, n, LANES], [b, block, 2, LANES] */
} scan;

typedef void item_function(const scan *, int64_t b, int64_t block, char *work);
typedef void list_function(int64_t which, const char *x, char *y, int64_t count);

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

#define SELF "selective_scan.c"
#define REAL float
#define INT int32_t
#define DOUBLE 0
#define W 4
#define V 2
#define M 1
#define TARGET
#define NAME(x) JOIN(x, _float_base)
#include SELF
#if defined(__x86_64__) || defined(__i386__)
#define W 8
#define V 2
#define M 1
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(x) JOIN(x, _float_avx2)
#include SELF
#define W 16
#define V 2
#define M 2
#define TARGET __attribute__((target("avx512f,avx2,fma")))
#define NAME(x) JOIN(x, _float_avx512)
#include SELF
#endif
#undef REAL
#undef INT
#undef DOUBLE
#define REAL double
#define INT int64_t
#define DOUBLE 1
#define W 2
#define V 2
#define M 1
#define TARGET
#define NAME(x) JOIN(x, _double_base)
#include SELF
#if defined(__x86_64__) || defined(__i386__)
#define W 4
#define V 2
#define M 1
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(x) JOIN(x, _double_avx2)
#include SELF
#define W 8
#define V 2
#define M 2
#define TARGET __attribute__((target("avx512f,avx2,fma")))
#define NAME(x) JOIN(x, _double_avx512)
#include SELF
#endif

/* ---- which functions ---- */
typedef struct { item_function *forward, *backward, *sum_BC, *sum_d; list_function *list; } functions;
#define FUNCTIONS(suffix) { forward##suffix, backward##suffix, sum_BC##suffix, sum_d##suffix, list##suffix }
#if defined(__x86_64__) || defined(__i386__)
static const functions table[2][3] = {{FUNCTIONS(_float_base), FUNCTIONS(_float_avx2), FUNCTIONS(_float_avx512)},
                                      {FUNCTIONS(_double_base), FUNCTIONS(_double_avx2), FUNCTIONS(_double_avx512)}};
#else
static const functions table[2][1] = {{FUNCTIONS(_float_base)}, {FUNCTIONS(_double_base)}};
#endif

int64_t pahcl_levels(void) {  /* 1: what every processor of this kind has, 2: AVX2, 3: AVX-512 */
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("fma")) return 3;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 2;
#endif
    return 1;
}

static const functions *choose(int64_t bytes, int64_t level) {
    int64_t most = pahcl_levels();
    if (bytes != 4 && bytes != 8) return NULL;
    return &table[bytes == 8][(level < 1 || level > most ? most : level) - 1];
}

/* ---- threads: OpenMP's do not survive a fork, so a forked child works alone ---- */
static volatile int forked = 0;
int64_t pahcl_forked(void) { return forked; }
int64_t pahcl_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
#ifndef _WIN32
static void in_child(void) { forked = 1; }
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, in_child); }
#endif

static int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t lanes_of(const scan *s) { return BLOCK_BYTES / s->bytes; }

/* every item of the first function (parts of each sequence), then (behind a barrier) every item of the second, then of the third */
static int run(const scan *s, item_function *first, int64_t parts, item_function *second, int64_t seconds, item_function *third, int64_t thirds) {
    int64_t items = s->batch * parts, failed = 0;
    size_t bytes = (size_t)(s->states * (5 * BLOCK_BYTES + 2 * STEPS * s->bytes) + 2 * BLOCK_BYTES);
    int threads = forked || s->threads < 1 ? 1 : (int)(s->threads > items ? items : s->threads);
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *memory = malloc(bytes + 2 * BLOCK_BYTES);
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        }
        char *work = memory ? (char *)(((uintptr_t)memory + BLOCK_BYTES - 1) / BLOCK_BYTES * BLOCK_BYTES) : NULL;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < items; i++) if (work) first(s, i / parts, i % parts, work);
        if (second) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < seconds; i++) second(s, i, 0, work);
        }
        if (third) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < thirds; i++) third(s, 0, i, work);
        }
        free(memory);
    }
    return failed ? MISSING_MEMORY : 0;
}

/* new memory comes from the system page by page when it is first written: large pages make that cheap. Advice only; it is free to decline */
static void large_pages(const char *start, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    uintptr_t page = 2 << 20, first = ((uintptr_t)start + page - 1) / page * page, end = ((uintptr_t)start + (uintptr_t)bytes) / page * page;
    if (start && end > first) madvise((void *)first, end - first, MADV_HUGEPAGE);
#else
    (void)start; (void)bytes;
#endif
}

int64_t pahcl_size(void) { return sizeof(scan); }

int64_t pahcl_forward(const scan *s) {
    const functions *f = choose(s->bytes, s->level);
    int64_t size = s->batch * s->channels * s->length * s->bytes;
    large_pages(s->y.data, size);
    large_pages(s->checkpoints, s->batch * ceiling(s->channels, lanes_of(s)) * ceiling(s->length, STEPS) * s->states * BLOCK_BYTES);
    return f ? run(s, f->forward, ceiling(s->channels, lanes_of(s)), NULL, 0, NULL, 0) : UNKNOWN_TYPE;
}

int64_t pahcl_backward(const scan *s) {
    const functions *f = choose(s->bytes, s->level);
    int64_t size = s->batch * s->channels * s->length * s->bytes;
    large_pages(s->du.data, size);
    large_pages(s->ddelta.data, size);
    large_pages(s->dz.data, size);
    return f ? run(s, f->backward, s->groups, f->sum_BC, s->batch, f->sum_d, ceiling(s->channels, lanes_of(s))) : UNKNOWN_TYPE;
}

/* the elementary functions on a list of numbers, so that tests can state their errors; which: 0 exp, 1 softplus, 2 logistic function */
int64_t pahcl_list(int64_t which, const char *x, char *y, int64_t count, int64_t bytes, int64_t level) {
    const functions *f = choose(bytes, level);
    if (!f) return UNKNOWN_TYPE;
    f->list(which, x, y, count);
    return 0;
}

#else  /* ---- the body, for one number type REAL and one instruction set TARGET with W numbers in a vector ---- */

#define LANES (BLOCK_BYTES / (int)sizeof(REAL))
#define VEC NAME(vec)
#define IVEC NAME(ivec)
typedef REAL VEC __attribute__((vector_size(W * sizeof(REAL)), may_alias));
typedef INT IVEC __attribute__((vector_size(W * sizeof(REAL)), may_alias));
typedef REAL NAME(tile)[STEPS][LANES] __attribute__((aligned(BLOCK_BYTES)));
#define AT(p, i) (*(VEC *)((p) + (i)))
#define SPLAT(x) ((VEC){0} + (REAL)(x))
#define FN INLINE TARGET
#if DOUBLE
#define MANTISSA 52
#define MAGIC (6755399441055744.0 + 1023)
#define LOWEST -1021.0
#define HIGHEST 1023.5
#define LN2_HIGH 6.93147180369123816490e-01
#define LN2_LOW 1.90821492927058770002e-10
#define SERIES 19
#else
#define MANTISSA 23
#define MAGIC (12582912.0f + 127)
#define LOWEST -125.0f
#define HIGHEST 127.5f
#define LN2_HIGH 6.93359375e-01f
#define LN2_LOW -2.12194440e-04f
#define SERIES 8
#endif
#define LN2 ((REAL)0.69314718055994530942)
#define LOG2E ((REAL)1.44269504088896340736)

FN VEC NAME(choose)(IVEC mask, VEC yes, VEC no) { return (VEC)(((IVEC)yes & mask) | ((IVEC)no & ~mask)); }

/* 2^r for |r| <= 1/2. Relative error before rounding: 5e-9 (float), 1e-19 (double), both interpolated in Chebyshev nodes. quick (float only): 9e-8, the
 * smallest that a polynomial of degree 5 with p(0) = 1 can have; that is less than rounding adds over a recurrence */
FN VEC NAME(power)(VEC r, const int quick) {
#if DOUBLE
    (void)quick;
    VEC p = SPLAT(2.5729324177362304214e-11);
    p = p * r + 4.455817908336064493e-10; p = p * r + 7.0548973041554992774e-9; p = p * r + 1.0178057087733941105e-7;
    p = p * r + 1.321548680870556279e-6; p = p * r + 0.000015252733841556772589; p = p * r + 0.00015403530393370733411;
    p = p * r + 0.0013333558146406470697; p = p * r + 0.0096181291076284794928; p = p * r + 0.055504108664821627039;
    p = p * r + 0.24022650695910071233; p = p * r + 0.69314718055994530925;
#else
    if (quick) {
        VEC q = SPLAT(0.0013264727123610484f);
        q = q * r + 0.009671512644825714f; q = q * r + 0.055507337434970716f; q = q * r + 0.2402224208526226f; q = q * r + 0.693146977598993f;
        return q * r + (REAL)1;
    }
    VEC p = SPLAT(0.000154531629451206902f);
    p = p * r + 0.00133908633646712344f; p = p * r + 0.00961808255727785149f; p = p * r + 0.0555035711421907782f;
    p = p * r + 0.240226507605681269f; p = p * r + 0.693147188026228781f;
#endif
    return p * r + (REAL)1;
}

/* 2^(x y): 0 below the smallest normal number, infinite above the largest, NaN stays NaN; exactly 1 for 0. With safe, x y must be in LOWEST ... -LOWEST */
FN VEC NAME(exp2)(VEC x, VEC y, const int safe) {
    VEC shifted = x * y + MAGIC, n = shifted - MAGIC;  /* the nearest integer; with the bias of the exponent, it is in the low bits of shifted */
    VEC e = NAME(power)(x * y - n, 1) * (VEC)((IVEC)shifted << MANTISSA);
    if (safe) return e;
    e = (VEC)((IVEC)e & ~(n < LOWEST));
    return NAME(choose)(n > HIGHEST, SPLAT(INFINITY), e);
}

/* e^x, more exact than exp2(x log2 e) for large |x| */
FN VEC NAME(exp)(VEC x) {
    VEC n = (x * LOG2E + MAGIC) - MAGIC, r = ((x - n * LN2_HIGH) - n * LN2_LOW) * LOG2E;
    IVEC scale = (IVEC)(n + MAGIC) << MANTISSA;
    VEC y = NAME(power)(r, 0) * (VEC)scale;
    y = (VEC)((IVEC)y & ~(n < LOWEST));
    return NAME(choose)(n > HIGHEST, SPLAT(INFINITY), y);
}

FN VEC NAME(logistic)(VEC x) { return 1 / (1 + NAME(exp)(-x)); }

/* log(1 + e^x) = max(x, 0) + 2 artanh(w / (2 + w)), w = e^-|x|; x itself above 20, as in PyTorch. slope: where the derivative goes, or 0 */
FN VEC NAME(softplus)(VEC x, REAL *slope) {
    VEC w = NAME(exp)(NAME(choose)(x > 0, -x, x)), s, sum = SPLAT((REAL)1 / (2 * SERIES + 1));
    if (slope) {  /* one division for both */
        VEC inverse = 1 / ((2 + w) * (1 + w)), up = (2 + w) * inverse;
        s = w * (1 + w) * inverse;
        AT(slope, 0) = NAME(choose)(x > 20, SPLAT(1), NAME(choose)(x > 0, up, w * up));
    } else s = w / (2 + w);
    VEC q = s * s;
    for (int i = SERIES - 1; i >= 0; i--) sum = sum * q + (REAL)1 / (2 * i + 1);
    VEC positive = NAME(choose)(x < 0, SPLAT(0), x);
    return NAME(choose)(x > 20, x, positive + 2 * s * sum);
}

static TARGET void NAME(list)(int64_t which, const char *x_, char *y_, int64_t count) {
    const REAL *x = (const REAL *)x_;
    REAL *y = (REAL *)y_;
    for (int64_t i = 0; i < count; i += W) {
        VEC v = {0};
        size_t bytes = sizeof(REAL) * (count - i < W ? count - i : W);
        memcpy(&v, x + i, bytes);
        v = which == 0 ? NAME(exp)(v) : which == 1 ? NAME(softplus)(v, NULL) : NAME(logistic)(v);
        memcpy(y + i, &v, bytes);
    }
}

/* sums over the numbers of each of STEPS vectors: neighbours are added pairwise, in a fixed order */
#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (IVEC){__VA_ARGS__})
#endif
FN VEC NAME(pairs)(VEC a, VEC b) {
#if W == 2
    return PICK(a, b, 0, 2) + PICK(a, b, 1, 3);
#elif W == 4
    return PICK(a, b, 0, 2, 4, 6) + PICK(a, b, 1, 3, 5, 7);
#elif W == 8
    return PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) + PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#endif
}

FN void NAME(add_sums)(VEC *v, REAL *out) {  /* v [STEPS] is overwritten; out [STEPS] += sum of each */
    int count = STEPS;
    for (int width = W; width > 1; width /= 2, count /= 2)
        for (int i = 0; i < count / 2; i++) v[i] = NAME(pairs)(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < STEPS / W; i++) AT(out, i * W) += v[i];
}

/* ---- tiles: from any memory layout and back ---- */
/* next: how many steps further on the next tile starts; a processor does not foresee jumps from row to row, so its rows are asked for in time */
FN void NAME(get)(NAME(tile) out, tensor a, int64_t b, int64_t first, int64_t lanes, int64_t start, int64_t steps, int next) {
    const REAL *p = (const REAL *)a.data + b * a.s0 + first * a.s1 + start * a.s2;
    if (lanes < LANES || steps < STEPS) memset(out, 0, sizeof(NAME(tile)));
    if (a.s1 == 1 && lanes == LANES) for (int64_t k = 0; k < steps; k++) {
        for (int i = 0; i < BLOCK_BYTES; i += 64) __builtin_prefetch((const char *)(p + (k + next) * a.s2) + i);
        memcpy(out[k], p + k * a.s2, sizeof(out[k]));
    }
    else for (int64_t d = 0; d < lanes; d++) for (int64_t k = 0; k < steps; k++) out[k][d] = p[d * a.s1 + k * a.s2];
}

FN void NAME(put)(NAME(tile) in, tensor a, int64_t b, int64_t first, int64_t lanes, int64_t start, int64_t steps) {
    REAL *p = (REAL *)a.data + b * a.s0 + first * a.s1 + start * a.s2;
    if (a.s1 == 1 && lanes == LANES) for (int64_t k = 0; k < steps; k++) memcpy(p + k * a.s2, in[k], sizeof(in[k]));
    else for (int64_t d = 0; d < lanes; d++) for (int64_t k = 0; k < steps; k++) p[d * a.s1 + k * a.s2] = in[k][d];
}

FN void NAME(get_list)(REAL *out, tensor a, int64_t first, int64_t lanes) {
    for (int64_t d = 0; d < LANES; d++) out[d] = a.data && d < lanes ? ((const REAL *)a.data)[(first + d) * a.s0] : 0;
}

FN void NAME(get_states)(REAL *out, tensor a, int64_t b, int64_t states, int64_t start, int64_t steps) {  /* [STEPS, n] */
    const REAL *p = (const REAL *)a.data + b * a.s0 + start * a.s2;
    if (steps < STEPS) memset(out, 0, sizeof(REAL) * states * STEPS);
    if (a.s1 == 1) for (int64_t k = 0; k < steps; k++) memcpy(out + k * states, p + k * a.s2, sizeof(REAL) * states);
    else for (int64_t k = 0; k < steps; k++) for (int64_t n = 0; n < states; n++) out[k * states + n] = p[n * a.s1 + k * a.s2];
}

FN void NAME(get_rates)(REAL *out, tensor a, int64_t first, int64_t lanes, int64_t states) {  /* [n, LANES], in powers of 2 */
    for (int64_t n = 0; n < states; n++) for (int64_t d = 0; d < LANES; d++)
        out[n * LANES + d] = d < lanes ? ((const REAL *)a.data)[(first + d) * a.s0 + n * a.s1] * LOG2E : 0;
}

/* in place: raw step sizes to step sizes; slope becomes the derivative. Steps after the end have size 0: they change no state. Returns the largest size */
FN REAL NAME(step_sizes)(NAME(tile) delta, const REAL *bias, int softplus, int64_t steps, REAL (*slope)[LANES]) {
    VEC most = SPLAT(0);
    for (int k = 0; k < STEPS; k++) for (int i = 0; i < LANES; i += W) {
        VEC x = AT(delta[k], i) + AT(bias, i);
        if (softplus) x = NAME(softplus)(x, slope ? slope[k] + i : NULL);
        else if (slope) AT(slope[k], i) = SPLAT(1);
        if (k >= steps) x = SPLAT(0);
        AT(delta[k], i) = x;
        x = NAME(choose)(x < 0, -x, x);
        most = NAME(choose)(x > most, x, most);
    }
    REAL largest = 0;
    for (int j = 0; j < W; j++) if (most[j] > largest) largest = most[j];
    return largest;
}

FN REAL NAME(largest)(const REAL *x, int64_t count) {
    REAL largest = 0;
    for (int64_t j = 0; j < count; j++) { REAL size = x[j] < 0 ? -x[j] : x[j]; if (size > largest) largest = size; }
    return largest;
}

/* V vectors of channels, count numbers of state side by side, STEPS steps; pointers at their first channel. What is shared by the numbers of state is
 * loaded once, and count * V chains of dependent operations hide each other's latency */
FN void NAME(steps_forward)(const int safe, const int count, REAL *h, const REAL *A, REAL (*delta)[LANES], REAL (*drive)[LANES], REAL (*y)[LANES],
                            const REAL *B, const REAL *C, int64_t N, int i) {
    VEC a[M][V], state[M][V];
    for (int m = 0; m < count; m++) for (int v = 0; v < V; v++) a[m][v] = AT(A + m * LANES, i + v * W), state[m][v] = AT(h + m * LANES, i + v * W);
    for (int k = 0; k < STEPS; k++) for (int v = 0; v < V; v++) {
        VEC size = AT(delta[k], i + v * W), push = AT(drive[k], i + v * W), out = AT(y[k], i + v * W);
        for (int m = 0; m < count; m++) {
            state[m][v] = NAME(exp2)(size, a[m][v], safe) * state[m][v] + push * B[k * N + m];
            out += state[m][v] * C[k * N + m];
        }
        AT(y[k], i + v * W) = out;
    }
    for (int m = 0; m < count; m++) for (int v = 0; v < V; v++) AT(h + m * LANES, i + v * W) = state[m][v];
}

typedef struct { NAME(tile) u, delta, slope, y, gate, dy, drive, d_drive, d_delta; } NAME(tiles);

FN void NAME(steps_backward)(const int safe, const int count, const REAL *h, REAL *g, const REAL *A, REAL *dA, NAME(tiles) *t,
                             const REAL *B, const REAL *C, REAL *dB, REAL *dC, int64_t N, int i) {
    VEC sum[M][STEPS], decay[STEPS][V][M], before[STEPS][V][M], a[M][V], state[M][V], da[M][V];
    for (int m = 0; m < count; m++) for (int v = 0; v < V; v++) a[m][v] = AT(A + m * LANES, i + v * W), state[m][v] = AT(h + m * LANES, i + v * W);
    for (int k = 0; k < STEPS; k++) {
        for (int v = 0; v < V; v++) {
            VEC size = AT(t->delta[k], i + v * W), push = AT(t->drive[k], i + v * W), out = AT(t->y[k], i + v * W), dy = AT(t->dy[k], i + v * W);
            for (int m = 0; m < count; m++) {
                before[k][v][m] = state[m][v];
                decay[k][v][m] = NAME(exp2)(size, a[m][v], safe);
                state[m][v] = decay[k][v][m] * state[m][v] + push * B[k * N + m];
                out += state[m][v] * C[k * N + m];
                sum[m][k] = v ? sum[m][k] + state[m][v] * dy : state[m][v] * dy;
            }
            AT(t->y[k], i + v * W) = out;
        }
    }
    for (int m = 0; m < count; m++) NAME(add_sums)(sum[m], dC + m * STEPS);
    for (int m = 0; m < count; m++) for (int v = 0; v < V; v++) state[m][v] = AT(g + m * LANES, i + v * W), da[m][v] = AT(dA + m * LANES, i + v * W);
    for (int k = STEPS - 1; k >= 0; k--) {
        for (int v = 0; v < V; v++) {  /* from here on, state is the gradient of the state */
            VEC size = AT(t->delta[k], i + v * W), push = AT(t->drive[k], i + v * W), dy = AT(t->dy[k], i + v * W);
            VEC d_push = AT(t->d_drive[k], i + v * W), d_size = AT(t->d_delta[k], i + v * W);
            for (int m = 0; m < count; m++) {
                state[m][v] += dy * C[k * N + m];
                sum[m][k] = v ? sum[m][k] + state[m][v] * push : state[m][v] * push;
                d_push += state[m][v] * B[k * N + m];
                state[m][v] *= decay[k][v][m];
                VEC q = state[m][v] * before[k][v][m];
                da[m][v] += q * size;
                d_size += q * a[m][v];
            }
            AT(t->d_drive[k], i + v * W) = d_push;
            AT(t->d_delta[k], i + v * W) = d_size;
        }
    }
    for (int m = 0; m < count; m++) NAME(add_sums)(sum[m], dB + m * STEPS);
    for (int m = 0; m < count; m++) for (int v = 0; v < V; v++) AT(g + m * LANES, i + v * W) = state[m][v], AT(dA + m * LANES, i + v * W) = da[m][v];
}

static TARGET void NAME(forward)(const scan *s, int64_t b, int64_t block, char *work) {
    const int64_t first = block * LANES, lanes = s->channels - first < LANES ? s->channels - first : LANES, N = s->states;
    const int64_t blocks = (s->channels + LANES - 1) / LANES, chunks = (s->length + STEPS - 1) / STEPS;
    REAL *h = (REAL *)work, *A = h + N * LANES, *bias = A + N * LANES, *skip = bias + LANES, *B = skip + LANES, *C = B + N * STEPS;
    NAME(tile) u, delta, y, gate;
    NAME(get_rates)(A, s->A, first, lanes, N);
    const REAL fastest = NAME(largest)(A, N * LANES);
    NAME(get_list)(bias, s->bias, first, lanes);
    NAME(get_list)(skip, s->D, first, lanes);
    memset(h, 0, sizeof(REAL) * N * LANES);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t start = chunk * STEPS, steps = s->length - start < STEPS ? s->length - start : STEPS;
        if (s->checkpoints) memcpy((REAL *)s->checkpoints + ((b * blocks + block) * chunks + chunk) * N * LANES, h, sizeof(REAL) * N * LANES);
        NAME(get)(u, s->u, b, first, lanes, start, steps, STEPS);
        NAME(get)(delta, s->delta, b, first, lanes, start, steps, STEPS);
        NAME(get_states)(B, s->B, b, N, start, steps);
        NAME(get_states)(C, s->C, b, N, start, steps);
        const int safe = NAME(step_sizes)(delta, bias, (int)s->softplus, steps, NULL) * fastest < -LOWEST;
        for (int k = 0; k < STEPS; k++) for (int i = 0; i < LANES; i += W) {
            AT(y[k], i) = AT(u[k], i) * AT(skip, i);
            AT(u[k], i) *= AT(delta[k], i);
        }
        for (int i = 0; i < LANES; i += V * W) {
            int64_t n = 0;
            if (safe) for (; n + M <= N; n += M) NAME(steps_forward)(1, M, h + n * LANES, A + n * LANES, delta, u, y, B + n, C + n, N, i);
            for (; n < N; n++) NAME(steps_forward)(0, 1, h + n * LANES, A + n * LANES, delta, u, y, B + n, C + n, N, i);
        }
        if (s->z.data) {
            NAME(get)(gate, s->z, b, first, lanes, start, steps, STEPS);
            for (int k = 0; k < STEPS; k++) for (int i = 0; i < LANES; i += W) AT(y[k], i) *= AT(gate[k], i) * NAME(logistic)(AT(gate[k], i));
        }
        NAME(put)(y, s->y, b, first, lanes, start, steps);
    }
    for (int64_t n = 0; n < N; n++) for (int64_t d = 0; d < lanes; d++)
        ((REAL *)s->last.data)[b * s->last.s0 + (first + d) * s->last.s1 + n * s->last.s2] = h[n * LANES + d];
}

/* one block of channels of one sequence; adds to dB and dC [chunk, 2, n, STEPS] */
FN void NAME(backward_block)(const scan *s, int64_t b, int64_t block, char *work, REAL *dBC) {
    const int64_t first = block * LANES, lanes = s->channels - first < LANES ? s->channels - first : LANES, N = s->states;
    const int64_t blocks = (s->channels + LANES - 1) / LANES, chunks = (s->length + STEPS - 1) / STEPS, item = b * blocks + block;
    REAL *g = (REAL *)work, *A = g + N * LANES, *bias = A + N * LANES, *skip = bias + LANES, *B = skip + LANES, *C = B + N * STEPS;
    REAL *dA = (REAL *)s->partial_A + item * N * LANES, *dD = (REAL *)s->partial_d + item * 2 * LANES, *dbias = dD + LANES;
    NAME(tiles) t;
    NAME(get_rates)(A, s->A, first, lanes, N);
    NAME(get_list)(bias, s->bias, first, lanes);
    NAME(get_list)(skip, s->D, first, lanes);
    const REAL fastest = NAME(largest)(A, N * LANES);
    memset(dA, 0, sizeof(REAL) * N * LANES);
    memset(dD, 0, sizeof(REAL) * 2 * LANES);
    memset(g, 0, sizeof(REAL) * N * LANES);
    if (s->dlast.data) for (int64_t n = 0; n < N; n++) for (int64_t d = 0; d < lanes; d++)
        g[n * LANES + d] = ((REAL *)s->dlast.data)[b * s->dlast.s0 + (first + d) * s->dlast.s1 + n * s->dlast.s2];
    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
        const int64_t start = chunk * STEPS, steps = s->length - start < STEPS ? s->length - start : STEPS;
        const REAL *h = (const REAL *)s->checkpoints + (item * chunks + chunk) * N * LANES;
        REAL *dB = dBC + chunk * 2 * N * STEPS, *dC = dB + N * STEPS;
        NAME(get)(t.u, s->u, b, first, lanes, start, steps, -STEPS);
        NAME(get)(t.delta, s->delta, b, first, lanes, start, steps, -STEPS);
        NAME(get)(t.dy, s->dy, b, first, lanes, start, steps, -STEPS);
        NAME(get_states)(B, s->B, b, N, start, steps);
        NAME(get_states)(C, s->C, b, N, start, steps);
        const int safe = NAME(step_sizes)(t.delta, bias, (int)s->softplus, steps, t.slope) * fastest < -LOWEST;
        memset(t.d_drive, 0, sizeof(t.d_drive));
        memset(t.d_delta, 0, sizeof(t.d_delta));
        if (s->z.data) {  /* the gate's own gradient needs the ungated output, which comes last: gate becomes dy silu'(z), dy becomes dy silu(z) */
            NAME(get)(t.gate, s->z, b, first, lanes, start, steps, -STEPS);
            for (int k = 0; k < STEPS; k++) for (int i = 0; i < LANES; i += W) {
                VEC z = AT(t.gate[k], i), open = NAME(logistic)(z), d = AT(t.dy[k], i);
                AT(t.dy[k], i) = d * z * open;
                AT(t.gate[k], i) = d * open * (1 + z * (1 - open));
            }
        }
        for (int k = 0; k < STEPS; k++) for (int i = 0; i < LANES; i += W) {
            AT(t.y[k], i) = AT(t.u[k], i) * AT(skip, i);
            AT(t.drive[k], i) = AT(t.u[k], i) * AT(t.delta[k], i);
        }
        for (int i = 0; i < LANES; i += V * W) {
            int64_t n = 0;
            if (safe) for (; n + M <= N; n += M)
                NAME(steps_backward)(1, M, h + n * LANES, g + n * LANES, A + n * LANES, dA + n * LANES, &t, B + n, C + n, dB + n * STEPS, dC + n * STEPS, N, i);
            for (; n < N; n++)
                NAME(steps_backward)(0, 1, h + n * LANES, g + n * LANES, A + n * LANES, dA + n * LANES, &t, B + n, C + n, dB + n * STEPS, dC + n * STEPS, N, i);
        }
        for (int64_t k = 0; k < steps; k++) for (int i = 0; i < LANES; i += W) {
            VEC d = (AT(t.d_delta[k], i) * LN2 + AT(t.d_drive[k], i) * AT(t.u[k], i)) * AT(t.slope[k], i);
            AT(t.d_delta[k], i) = d;
            AT(dbias, i) += d;
            AT(dD, i) += AT(t.dy[k], i) * AT(t.u[k], i);
            AT(t.d_drive[k], i) = AT(t.d_drive[k], i) * AT(t.delta[k], i) + AT(t.dy[k], i) * AT(skip, i);
            if (s->z.data) AT(t.gate[k], i) *= AT(t.y[k], i);
        }
        NAME(put)(t.d_drive, s->du, b, first, lanes, start, steps);
        NAME(put)(t.d_delta, s->ddelta, b, first, lanes, start, steps);
        if (s->z.data) NAME(put)(t.gate, s->dz, b, first, lanes, start, steps);
    }
}

/* the blocks of one group in their order */
static TARGET void NAME(backward)(const scan *s, int64_t b, int64_t group, char *work) {
    const int64_t blocks = (s->channels + LANES - 1) / LANES, numbers = (s->length + STEPS - 1) / STEPS * 2 * s->states * STEPS;
    REAL *dBC = (REAL *)s->partial_BC + (b * s->groups + group) * numbers;
    memset(dBC, 0, sizeof(REAL) * numbers);
    for (int64_t block = group * blocks / s->groups; block < (group + 1) * blocks / s->groups; block++) NAME(backward_block)(s, b, block, work, dBC);
}

/* dB and dC of one sequence: the groups' shares in their order */
static TARGET void NAME(sum_BC)(const scan *s, int64_t b, int64_t unused, char *work) {
    const int64_t N = s->states, chunks = (s->length + STEPS - 1) / STEPS;
    (void)unused; (void)work;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t start = chunk * STEPS, steps = s->length - start < STEPS ? s->length - start : STEPS;
        REAL *sum = (REAL *)s->partial_BC + (b * s->groups * chunks + chunk) * 2 * N * STEPS;
        for (int64_t group = 1; group < s->groups; group++) {
            const REAL *other = sum + group * chunks * 2 * N * STEPS;
            for (int64_t i = 0; i < 2 * N * STEPS; i++) sum[i] += other[i];
        }
        for (int64_t k = 0; k < steps; k++) for (int64_t n = 0; n < N; n++) {
            ((REAL *)s->dB.data)[b * s->dB.s0 + n * s->dB.s1 + (start + k) * s->dB.s2] = sum[n * STEPS + k];
            ((REAL *)s->dC.data)[b * s->dC.s0 + n * s->dC.s1 + (start + k) * s->dC.s2] = sum[(N + n) * STEPS + k];
        }
    }
}

/* dA, dD and dbias of one block of channels: the sequences' shares in their order */
static TARGET void NAME(sum_d)(const scan *s, int64_t unused, int64_t block, char *work) {
    const int64_t first = block * LANES, lanes = s->channels - first < LANES ? s->channels - first : LANES, N = s->states;
    const int64_t blocks = (s->channels + LANES - 1) / LANES;
    REAL *A = (REAL *)s->partial_A + block * N * LANES, *d = (REAL *)s->partial_d + block * 2 * LANES;
    (void)unused; (void)work;
    for (int64_t b = 1; b < s->batch; b++) {
        const REAL *other_A = A + b * blocks * N * LANES, *other_d = d + b * blocks * 2 * LANES;
        for (int64_t i = 0; i < N * LANES; i++) A[i] += other_A[i];
        for (int64_t i = 0; i < 2 * LANES; i++) d[i] += other_d[i];
    }
    for (int64_t i = 0; i < lanes; i++) {
        for (int64_t n = 0; n < N; n++) ((REAL *)s->dA.data)[(first + i) * s->dA.s0 + n * s->dA.s1] = A[n * LANES + i];
        if (s->dD.data) ((REAL *)s->dD.data)[(first + i) * s->dD.s0] = d[i];
        if (s->dbias.data) ((REAL *)s->dbias.data)[(first + i) * s->dbias.s0] = d[LANES + i];
    }
}

#undef LANES
#undef VEC
#undef IVEC
#undef AT
#undef SPLAT
#undef FN
#undef PICK
#undef MANTISSA
#undef MAGIC
#undef LOWEST
#undef HIGHEST
#undef LN2_HIGH
#undef LN2_LOW
#undef LN2
#undef LOG2E
#undef SERIES
#undef W
#undef V
#undef M

#undef TARGET
#undef NAME
#endif

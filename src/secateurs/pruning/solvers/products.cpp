// Products of bfloat16 matrices, summed over tokens in float32, on a CPU with AVX-512 BF16.
//
// What a layer's statistics are made of. torch's own products of bfloat16 matrices round their result to bfloat16,
// which a sum over many chunks of tokens cannot afford, and in float32 they take twice the instructions.
//
// The usual scheme: a few tokens at a time are packed, in the pairs that the instruction multiplies, into panels
// that stay in the caches; a tile of the result stays in registers. Every tile is summed in the order of the
// tokens, so the result is the same for any number of threads.
//
// A plain C interface over pointers: no torch headers, hence no rebuild when torch changes.

#include <algorithm>
#include <cstdint>

#if defined(__GNUC__)
#define EXPORT extern "C" __attribute__((visibility("default")))
#else
#define EXPORT extern "C" __declspec(dllexport)
#endif

#if defined(__x86_64__) && (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 10))  // that know it
#define SECATEURS_BF16 1
#include <immintrin.h>
#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,fma")))
#endif

namespace {

constexpr int64_t kRows = 8, kVectors = 3, kColumns = 16 * kVectors;  // a tile: 24 registers of 16 sums
constexpr int64_t kPairs = 128;  // of tokens, packed at a time: a panel of columns is then 24 KiB
constexpr int64_t kTaskRows = 128;

struct Matrix {
    const uint16_t* values;  // bfloat16, (tokens, width)
    int64_t stride, width;
};

constexpr int64_t panels(int64_t width, int64_t size) { return (width + size - 1) / size; }

#ifdef SECATEURS_BF16

// Of one panel, (pairs, size): the values of two tokens beside each other; zeros where there are none.
template <int64_t size>
AVX512_BF16 void pack(const Matrix& matrix, int64_t panel, int64_t first, int64_t last, uint32_t* packed) {
    const int64_t column = panel * size, count = std::min(size, matrix.width - column);
    for (int64_t token = first; token < last; token += 2, packed += size) {
        const uint16_t* even = matrix.values + token * matrix.stride + column;
        const uint16_t* odd = token + 1 < last ? even + matrix.stride : nullptr;
        for (int64_t j = 0; j < count; ++j) packed[j] = even[j] | (odd ? uint32_t(odd[j]) << 16 : 0);
        for (int64_t j = count; j < size; ++j) packed[j] = 0;
    }
}

// out = beta out + alpha rows^T columns, for one tile.
AVX512_BF16 void tile(const uint32_t* rows, const uint32_t* columns, int64_t pairs, float* out, int64_t stride,
                      int64_t height, int64_t width, float beta, float alpha) {
    __m512 sums[kRows][kVectors];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
        for (int64_t v = 0; v < kVectors; ++v) sums[i][v] = _mm512_setzero_ps();
    }
    for (int64_t pair = 0; pair < pairs; ++pair, rows += kRows, columns += kColumns) {
        __m512bh right[kVectors];
#pragma GCC unroll 3
        for (int64_t v = 0; v < kVectors; ++v) right[v] = (__m512bh)_mm512_loadu_si512(columns + 16 * v);
#pragma GCC unroll 8
        for (int64_t i = 0; i < kRows; ++i) {
            const __m512bh left = (__m512bh)_mm512_set1_epi32(int32_t(rows[i]));
#pragma GCC unroll 3
            for (int64_t v = 0; v < kVectors; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], left, right[v]);
        }
    }
    __mmask16 inside[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) {
        const int64_t left = std::clamp<int64_t>(width - 16 * v, 0, 16);
        inside[v] = __mmask16((1u << left) - 1);
    }
    const __m512 old = _mm512_set1_ps(beta), scale = _mm512_set1_ps(alpha), none = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRows; ++i) {
        if (i >= height) break;
#pragma GCC unroll 3
        for (int64_t v = 0; v < kVectors; ++v) {
            float* place = out + i * stride + 16 * v;
            const __m512 before =
                beta == 0 ? none : _mm512_mul_ps(old, _mm512_maskz_loadu_ps(inside[v], place));
            _mm512_mask_storeu_ps(place, inside[v], _mm512_fmadd_ps(scale, sums[i][v], before));
        }
    }
}

#endif

}  // namespace

// Numbers of 32 bits that a product takes as scratch; 0 where this machine has no such products.
EXPORT int64_t secateurs_products_scratch(int64_t a_width, int64_t b_width) {
#ifdef SECATEURS_BF16
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bf16")) {
        return kPairs * (panels(a_width, kRows) * kRows + panels(b_width, kColumns) * kColumns);
    }
#endif
    return 0;
}

// out = beta out + alpha a^T b, (a_width, b_width) and contiguous, for a and b (tokens, width) with rows `stride`
// apart, and one token at least. With `upper`, of a square result only what is not left of the diagonal is sure to
// be computed.
EXPORT void secateurs_products(float* out, const uint16_t* a, int64_t a_stride, int64_t a_width, const uint16_t* b,
                               int64_t b_stride, int64_t b_width, int64_t tokens, float beta, float alpha,
                               int32_t upper, uint32_t* scratch, int32_t threads) {
#ifdef SECATEURS_BF16
    const Matrix left{a, a_stride, a_width}, right{b, b_stride, b_width};
    const int64_t left_panels = panels(a_width, kRows), right_panels = panels(b_width, kColumns);
    const int64_t bands = panels(a_width, kTaskRows);
    uint32_t* columns = scratch;
    uint32_t* rows = scratch + right_panels * kPairs * kColumns;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
    for (int64_t first = 0; first < tokens; first += 2 * kPairs) {
        const int64_t last = std::min(first + 2 * kPairs, tokens), pairs = (last - first + 1) / 2;
#ifdef _OPENMP
#pragma omp for schedule(static) nowait
#endif
        for (int64_t panel = 0; panel < left_panels; ++panel) {
            pack<kRows>(left, panel, first, last, rows + panel * kPairs * kRows);
        }
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (int64_t panel = 0; panel < right_panels; ++panel) {
            pack<kColumns>(right, panel, first, last, columns + panel * kPairs * kColumns);
        }
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
        for (int64_t task = 0; task < right_panels * bands; ++task) {
            const int64_t column = task / bands * kColumns, top = task % bands * kTaskRows;
            const int64_t width = std::min(kColumns, b_width - column);
            const int64_t bottom = std::min(top + kTaskRows, upper ? std::min(a_width, column + width) : a_width);
            for (int64_t row = top; row < bottom; row += kRows) {
                tile(rows + row * kPairs, columns + column * kPairs, pairs, out + row * b_width + column, b_width,
                     std::min(kRows, a_width - row), width, first ? 1.0f : beta, alpha);
            }
        }
    }
#endif
    (void)threads;
}

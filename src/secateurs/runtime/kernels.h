// What the kernels share: the numbers that their callers use, conversions, and threads.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define SECATEURS_X86 1
#include <cpuid.h>
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,fma,f16c,popcnt,bmi,bmi2")))
#define AVX512_BF16 \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,fma,f16c,popcnt,bmi,bmi2")))
#endif

#if defined(__aarch64__) && defined(__ARM_NEON) && defined(__GNUC__)
#define SECATEURS_NEON 1
#include <arm_neon.h>
#endif

#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kDtypes = 3 };
enum Isa : int32_t { kPortable = 0, kNeon = 1, kAvx2 = 2, kAvx512 = 3, kAvx512Bf16 = 4, kIsas = 5 };

constexpr int kTokens = 8;  // tokens that share one expansion of a row; more would spill registers

constexpr int64_t size_of(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }
constexpr int64_t padded(int64_t columns) { return (columns + 63) / 64 * 64; }

// ---- scalar conversions ----

inline float float_from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t bits_from_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float from_half(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return float_from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // A half is a float whose exponent bias is smaller by 112; the product handles subnormals too.
    return float_from_bits(sign | bits_from_float(float_from_bits(magnitude << 13) * 0x1p112f));
}

inline uint16_t to_half(float value) {
    const uint32_t bits = bits_from_float(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (magnitude < 0x38800000) {  // subnormal: let the adder round at 2^-24
        const float rounded = float_from_bits(magnitude) + 0.5f;
        return uint16_t(sign | (bits_from_float(rounded) - bits_from_float(0.5f)));
    }
    return uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

inline uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_from_float(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float load(const void* base, int32_t dtype, int64_t index) {
    uint16_t narrow;
    if (dtype == kFloat32) {
        float value;
        std::memcpy(&value, static_cast<const char*>(base) + 4 * index, 4);
        return value;
    }
    std::memcpy(&narrow, static_cast<const char*>(base) + 2 * index, 2);
    return dtype == kBfloat16 ? float_from_bits(uint32_t(narrow) << 16) : from_half(narrow);
}

inline void store(void* base, int32_t dtype, int64_t index, float value) {
    if (dtype == kFloat32) {
        std::memcpy(static_cast<char*>(base) + 4 * index, &value, 4);
        return;
    }
    const uint16_t narrow = dtype == kBfloat16 ? to_bfloat16(value) : to_half(value);
    std::memcpy(static_cast<char*>(base) + 2 * index, &narrow, 2);
}

// Calls work(begin, end) on shares of [0, count), one per thread, if there are bytes enough to wake threads for.
template <class Work>
void shared_out(int64_t count, int64_t bytes, int32_t threads, const Work& work) {
    const int64_t workers = std::min({int64_t(threads), count, 1 + bytes / 65536});
#ifdef _OPENMP
    if (workers > 1) {
#pragma omp parallel for num_threads(workers) schedule(static)
        for (int64_t worker = 0; worker < workers; ++worker) {
            work(worker * count / workers, (worker + 1) * count / workers);
        }
        return;
    }
#endif
    work(0, count);
}

struct alignas(64) CacheLine {
    uint8_t bytes[64];
};

// Calls work(begin, end) on ranges of rows that cover [first, last), one per thread, with the same bytes each.
template <class Work>
void in_parallel(const int32_t* offsets, int64_t first, int64_t last, int64_t columns, int64_t value_bytes,
                 int32_t threads, const Work& work) {
    const int64_t mask_bytes = padded(columns) / 8;
    const auto bytes_before = [&](int64_t row) {
        return (row - first) * mask_bytes + (int64_t(offsets[row]) - offsets[first]) * value_bytes;
    };
    const int64_t total = bytes_before(last);
    // Waking a thread costs microseconds, in which one alone reads tens of kilobytes.
    const int32_t workers = int32_t(std::min<int64_t>(threads, 1 + total / 65536));
    const auto start = [&](int64_t worker) {
        int64_t low = first, high = last;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (bytes_before(middle) * workers < total * worker) low = middle + 1;
            else high = middle;
        }
        return low;
    };
#ifdef _OPENMP
    if (workers > 1) {
#pragma omp parallel num_threads(workers)
        {
            // The runtime may grant fewer threads than asked for.
            for (int32_t worker = omp_get_thread_num(); worker < workers; worker += omp_get_num_threads()) {
                work(start(worker), worker + 1 == workers ? last : start(worker + 1));
            }
        }
        return;
    }
#endif
    (void)start;
    work(first, last);
}

// Some rows' sums and biases, to y from `start` on.
template <int32_t D>
void put_as(const float* sums, const void* bias, int64_t begin, int64_t end, int64_t start, void* y) {
    for (int64_t row = begin; row < end; ++row) {
        store(y, D, start + row, sums[row - begin] + (bias ? load(bias, D, row) : 0.0f));
    }
}

void put(const float* sums, const void* bias, int64_t begin, int64_t end, int64_t start, void* y, int32_t dtype) {
    const auto as = dtype == kFloat32 ? put_as<kFloat32> : dtype == kBfloat16 ? put_as<kBfloat16> : put_as<kFloat16>;
    as(sums, bias, begin, end, start, y);
}

// ---- strips ----
//
// Where many tokens share an expansion, 32 rows do too, in two panels of 16: a vector holds four bytes of each row,
// so that a lane is a row, and four bytes of a token are one operand for all of them.

constexpr int64_t kStrip = 32;
constexpr int64_t kMany = 7;             // tokens from which it is quicker
constexpr int64_t kChunk = 8;            // vectors of each row at a time: a strip's are a third of a first-level cache
constexpr int64_t kPanel = 16 * kChunk;  // vectors of 16 rows

// Tokens are taken two at a time at least.
inline int64_t whole_tiles(int64_t tokens) { return (tokens + 1) / 2 * 2; }

// Tokens for which weights are expanded at once: as many as a megabyte of second-level cache has room for, and enough.
inline int64_t tokens_at_once(int64_t bytes_of_a_token) {
    return std::max<int64_t>(128, std::min<int64_t>(256, (1 << 20) / bytes_of_a_token / 2 * 2));
}

// Calls strip(row, last, panels, sums), which has room for so many vectors, for strips of all rows, and threads.
template <class Strip>
void in_strips(int64_t rows, int64_t columns, int64_t tokens, int64_t panels, int32_t threads, const Strip& strip) {
    const int64_t strips = (rows + kStrip - 1) / kStrip;
    // A thread makes some twenty products in the time in which it would read a byte.
    shared_out(strips, rows * columns * tokens / 20, threads, [&](int64_t begin, int64_t end) {
        std::vector<CacheLine> lines(size_t(panels + 2 * whole_tiles(tokens)));
        for (int64_t row = begin * kStrip; row < std::min(end * kStrip, rows); row += kStrip) {
            strip(row, std::min(row + kStrip, rows), lines.data(), lines.data() + panels);
        }
    });
}

#ifdef SECATEURS_X86
// Whether the processor multiplies tiles (AMX): where it does, torch's products of many tokens are out of reach.
inline bool has_tiles() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);  // AMX-BF16
}

// So many bytes before they are needed weights are fetched: a third of it is too late on AMD Zen 5.
constexpr int kAhead = 4096;

// A load that stays apart from the expansion: with its operand in memory the instruction is several times slower on
// AMD Zen 4, and compilers like to fold the two.
AVX512 inline __m512i load_packed(const uint8_t* values) {
    __m512i packed = _mm512_loadu_si512(values);
    asm("" : "+v"(packed));
    return packed;
}

// Lines that are needed some thousand cycles later, for the second-level cache; moves on.
AVX512 INLINE void fetch(const uint8_t*& lines, int count) {
    for (int i = 0; i < count; ++i, lines += 64) _mm_prefetch(reinterpret_cast<const char*>(lines), _MM_HINT_T1);
}

// Rows of 16 words of 32 bits to columns.
AVX512 INLINE void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}
#endif

}  // namespace

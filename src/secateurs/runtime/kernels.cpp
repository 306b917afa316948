// Products with a sparse matrix held as a bitmask and its packed non-zeros, on the CPU.
//
// Decoding is bound by the bytes of weights read, so a row is expanded in registers and multiplied at once:
// nothing dense is ever written. With AVX-512 VBMI2 the expansion is one instruction per 32 weights; with AVX2 and
// NEON a byte of the mask picks a shuffle from a table; elsewhere the set bits are walked one by one. The
// instruction set is chosen by the caller at run time, so one binary serves every machine.
//
// A plain C interface over pointers: no torch headers, hence no rebuild when torch changes.
//
// Layout (docs/format.md): the mask of a row is columns rounded up to 64 bits, bit j of byte i is column 8 i + j,
// bits past the last column are zero; values follow in row order and end with 64 bytes of zeros, so that vector
// loads may run over the end of the last row.

#include "kernels.h"

namespace {

// ---- one row of the matrix times N tokens ----
// mask: words * 8 bytes; values: the row's first; x: (N, stride), prepared for the kernel; y: (N).

using Row = void (*)(const uint8_t* mask, const uint8_t* values, int64_t words, const void* x, int64_t stride,
                     float* y);

template <int32_t D, int N>
void row_portable(const uint8_t* mask, const uint8_t* values, int64_t words, const void* x, int64_t stride,
                  float* y) {
    const float* columns = static_cast<const float*>(x);
    float sums[N] = {};
    for (int64_t word = 0; word < words; ++word, columns += 64) {
        uint64_t bits = 0;
        for (int byte = 0; byte < 8; ++byte) bits |= uint64_t(mask[8 * word + byte]) << 8 * byte;
        for (; bits; bits &= bits - 1, values += size_of(D)) {
            const float value = load(values, D, 0);
            const float* column = columns + __builtin_ctzll(bits);
            for (int n = 0; n < N; ++n) sums[n] += value * column[n * stride];
        }
    }
    std::copy(sums, sums + N, y);
}

#if defined(SECATEURS_X86) || defined(SECATEURS_NEON)

// A byte of the mask -> where each of eight lanes finds its value among the packed ones.
struct Shuffles {
    alignas(16) uint8_t words[256][16];  // byte indices of 16-bit lanes, 0x80 (which shuffles in a zero) if empty
    alignas(8) uint8_t lanes[256][8];    // lane indices of 32-bit lanes
    alignas(16) uint8_t quads[16][16];   // byte indices of four 32-bit lanes, by half a byte
};

constexpr Shuffles make_shuffles() {
    Shuffles table{};
    for (int byte = 0; byte < 256; ++byte) {
        uint8_t next = 0;
        for (int lane = 0; lane < 8; ++lane) {
            const bool kept = byte >> lane & 1;
            table.words[byte][2 * lane] = kept ? uint8_t(2 * next) : 0x80;
            table.words[byte][2 * lane + 1] = kept ? uint8_t(2 * next + 1) : 0x80;
            table.lanes[byte][lane] = next;
            for (int i = 0; byte < 16 && lane < 4 && i < 4; ++i) {
                table.quads[byte][4 * lane + i] = kept ? uint8_t(4 * next + i) : 0x80;
            }
            next = uint8_t(next + kept);
        }
    }
    return table;
}

constexpr Shuffles kShuffles = make_shuffles();

#endif

#ifdef SECATEURS_NEON

// Eight weights as two vectors of floats.
template <int32_t D>
inline float32x4x2_t expand8(const uint8_t* values, uint8_t byte) {
    if constexpr (D == kFloat32) {
        const uint8_t low = byte & 15, high = byte >> 4;
        const uint8x16_t later = vld1q_u8(values + 4 * __builtin_popcount(low));
        return {vreinterpretq_f32_u8(vqtbl1q_u8(vld1q_u8(values), vld1q_u8(kShuffles.quads[low]))),
                vreinterpretq_f32_u8(vqtbl1q_u8(later, vld1q_u8(kShuffles.quads[high])))};
    }
    const uint16x8_t words = vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(values), vld1q_u8(kShuffles.words[byte])));
    if constexpr (D == kFloat16) {
        const float16x8_t halves = vreinterpretq_f16_u16(words);
        return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
    }
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(words), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(words, 16))};
}

template <int32_t D, int N>
void row_neon(const uint8_t* mask, const uint8_t* values, int64_t words, const void* x, int64_t stride, float* y) {
    const float* columns = static_cast<const float*>(x);
    float32x4_t even[N], odd[N];
    for (int n = 0; n < N; ++n) even[n] = odd[n] = vdupq_n_f32(0);
    for (int64_t byte = 0; byte < 8 * words; ++byte, columns += 8) {
        const float32x4x2_t weights = expand8<D>(values, mask[byte]);
        values += size_of(D) * __builtin_popcount(mask[byte]);
        for (int n = 0; n < N; ++n) {
            even[n] = vfmaq_f32(even[n], weights.val[0], vld1q_f32(columns + n * stride));
            odd[n] = vfmaq_f32(odd[n], weights.val[1], vld1q_f32(columns + n * stride + 4));
        }
    }
    for (int n = 0; n < N; ++n) y[n] = vaddvq_f32(vaddq_f32(even[n], odd[n]));
}

#endif

#ifdef SECATEURS_X86

AVX2 inline __m128i expand8_words(const uint8_t* values, uint8_t byte) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    return _mm_shuffle_epi8(packed, _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffles.words[byte])));
}

AVX2 inline __m256 expand8_floats(const uint8_t* values, uint8_t byte) {
    const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kShuffles.lanes[byte]));
    const __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(values)),
                                                   _mm256_cvtepu8_epi32(lanes));
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(byte), bit), bit);
    return _mm256_and_ps(spread, _mm256_castsi256_ps(kept));
}

template <int32_t D>
AVX2 inline __m256 expand8(const uint8_t* values, uint8_t byte) {
    if constexpr (D == kFloat32) return expand8_floats(values, byte);
    const __m128i words = expand8_words(values, byte);
    if constexpr (D == kFloat16) return _mm256_cvtph_ps(words);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

AVX2 inline float sum8(__m256 lanes) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

template <int32_t D, int N>
AVX2 void row_avx2(const uint8_t* mask, const uint8_t* values, int64_t words, const void* x, int64_t stride,
                   float* y) {
    const float* columns = static_cast<const float*>(x);
    __m256 even[N], odd[N];  // two sums each, or the latency of the additions would set the pace
    for (int n = 0; n < N; ++n) even[n] = odd[n] = _mm256_setzero_ps();
    for (int64_t byte = 0; byte < 8 * words; byte += 2, columns += 16) {
        const __m256 first = expand8<D>(values, mask[byte]);
        values += size_of(D) * _mm_popcnt_u32(mask[byte]);
        const __m256 second = expand8<D>(values, mask[byte + 1]);
        values += size_of(D) * _mm_popcnt_u32(mask[byte + 1]);
        for (int n = 0; n < N; ++n) {
            even[n] = _mm256_fmadd_ps(first, _mm256_loadu_ps(columns + n * stride), even[n]);
            odd[n] = _mm256_fmadd_ps(second, _mm256_loadu_ps(columns + n * stride + 8), odd[n]);
        }
    }
    for (int n = 0; n < N; ++n) y[n] = sum8(_mm256_add_ps(even[n], odd[n]));
}

// 32 weights as two vectors of floats. bfloat16 comes out as even and odd columns, which costs a shift and an
// `and`; x is laid out to match.
template <int32_t D>
AVX512 inline void expand32(const uint8_t* values, uint32_t bits, __m512& first, __m512& second) {
    if constexpr (D == kFloat32) {
        const __m512i low = load_packed(values);
        const __m512i high = load_packed(values + 4 * _mm_popcnt_u32(bits & 0xffff));
        first = _mm512_maskz_expand_ps(__mmask16(bits), _mm512_castsi512_ps(low));
        second = _mm512_maskz_expand_ps(__mmask16(bits >> 16), _mm512_castsi512_ps(high));
        return;
    }
    const __m512i words = _mm512_maskz_expand_epi16(bits, load_packed(values));
    first = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    second = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int32_t(0xffff0000))));
}

template <int32_t D, int N>
AVX512 void row_avx512(const uint8_t* mask, const uint8_t* values, int64_t words, const void* x, int64_t stride,
                       float* y) {
    const float* columns = static_cast<const float*>(x);
    constexpr int kSums = N == 1 ? 4 : 2;  // of each token: one alone needs more to hide the latency of additions
    __m512 sums[N][kSums];
    for (int n = 0; n < N; ++n) {
        for (int i = 0; i < kSums; ++i) sums[n][i] = _mm512_setzero_ps();
    }
    for (int64_t word = 0; word < words; ++word, columns += 64) {
        uint32_t low, high;
        std::memcpy(&low, mask + 8 * word, 4);
        std::memcpy(&high, mask + 8 * word + 4, 4);
        const uint8_t* later = values + size_of(D) * _mm_popcnt_u32(low);
        __m512 parts[4];
        expand32<D>(values, low, parts[0], parts[1]);
        expand32<D>(later, high, parts[2], parts[3]);
        values = later + size_of(D) * _mm_popcnt_u32(high);
        for (int n = 0; n < N; ++n) {
            for (int i = 0; i < 4; ++i) {
                const __m512 column = _mm512_loadu_ps(columns + n * stride + 16 * i);
                sums[n][i % kSums] = _mm512_fmadd_ps(parts[i], column, sums[n][i % kSums]);
            }
        }
    }
    for (int n = 0; n < N; ++n) {
        for (int i = 1; i < kSums; ++i) sums[n][0] = _mm512_add_ps(sums[n][0], sums[n][i]);
        y[n] = _mm512_reduce_add_ps(sums[n][0]);
    }
}

// bfloat16 weights and activations: the dot-product instruction takes 32 of each and accumulates in float.
template <int N>
AVX512_BF16 void row_avx512_bf16(const uint8_t* mask, const uint8_t* values, int64_t words, const void* x,
                                 int64_t stride, float* y) {
    const uint16_t* columns = static_cast<const uint16_t*>(x);
    __m512 even[N], odd[N];
    for (int n = 0; n < N; ++n) even[n] = odd[n] = _mm512_setzero_ps();
    for (int64_t word = 0; word < words; ++word, columns += 64) {
        uint32_t low, high;
        std::memcpy(&low, mask + 8 * word, 4);
        std::memcpy(&high, mask + 8 * word + 4, 4);
        const uint8_t* later = values + 2 * _mm_popcnt_u32(low);
        const __m512bh first = (__m512bh)_mm512_maskz_expand_epi16(low, load_packed(values));
        const __m512bh second = (__m512bh)_mm512_maskz_expand_epi16(high, load_packed(later));
        _mm_prefetch(reinterpret_cast<const char*>(values) + kAhead, _MM_HINT_T0);
        values = later + 2 * _mm_popcnt_u32(high);
        for (int n = 0; n < N; ++n) {
            even[n] = _mm512_dpbf16_ps(even[n], first, (__m512bh)_mm512_loadu_si512(columns + n * stride));
            odd[n] = _mm512_dpbf16_ps(odd[n], second, (__m512bh)_mm512_loadu_si512(columns + n * stride + 32));
        }
    }
    for (int n = 0; n < N; ++n) y[n] = _mm512_reduce_add_ps(_mm512_add_ps(even[n], odd[n]));
}

// ---- a strip of rows times many tokens ----

// Where a row's next piece is, 32 columns; or the next strip's, to be fetched.
struct Place {
    const uint8_t *mask, *values;
};

typedef int32_t Bits32 __attribute__((aligned(1), may_alias));  // to be an operand where it lies

// 16 rows' next pieces: two columns of all rows to a vector.
AVX512_BF16 void turn_pieces(Place* places, int64_t count, Place& ahead, __m512i* panel) {
    for (int64_t piece = 0; piece < count; ++piece, panel += 16) {
        fetch(ahead.mask, 1);
        fetch(ahead.values, 8);  // if half are kept
        __m512i rows[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            const Bits32* bits = reinterpret_cast<const Bits32*>(places[i].mask);
            __mmask32 kept;
            asm("kmovd %1, %0" : "=k"(kept) : "m"(*bits));  // not by way of a general register: see quantised.cpp
            rows[i] = _mm512_maskz_expand_epi16(kept, load_packed(places[i].values));
            places[i].mask += 4;
            places[i].values += 2 * _mm_popcnt_u32(uint32_t(*bits));
        }
        transpose(rows);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(panel + i, rows[i]);
    }
}

// Pairs of columns, which two panels hold, of N tokens; added to sums (N, 32). With eight the latency of the
// instruction does not show.
template <int N>
AVX512_BF16 void add_pairs(const __m512i* panels, int64_t pairs, const uint16_t* x, int64_t stride, __m512* sums) {
    __m512 low[N], high[N];
    const uint16_t* token[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
        low[n] = sums[2 * n];
        high[n] = sums[2 * n + 1];
        token[n] = x + n * stride;
    }
    for (int64_t i = 0; i < pairs; ++i) {
        const __m512i some = _mm512_load_si512(panels + i), others = _mm512_load_si512(panels + kPanel + i);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            __m512i two;
            asm("vpbroadcastd %1, %0" : "=v"(two) : "m"(*reinterpret_cast<const Bits32*>(token[n] + 2 * i)));
            asm("vdpbf16ps %2, %1, %0" : "+v"(low[n]) : "v"(some), "v"(two));
            asm("vdpbf16ps %2, %1, %0" : "+v"(high[n]) : "v"(others), "v"(two));
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
        sums[2 * n] = low[n];
        sums[2 * n + 1] = high[n];
    }
}

// Rows [begin, end), at most a strip, times tokens from x on; to sums (count, 32).
AVX512_BF16 void strip(const uint8_t* mask, const uint8_t* values, const int32_t* offsets, int64_t rows, int64_t words,
                       int64_t begin, int64_t end, const uint16_t* x, int64_t count, __m512i* panels, __m512* sums) {
    Place places[kStrip], ahead[2];
    const auto place_of = [&](int64_t row) { return Place{mask + row * 8 * words, values + 2 * int64_t(offsets[row])}; };
    for (int i = 0; i < kStrip; ++i) places[i] = place_of(std::min(begin + i, end - 1));  // the last are nobody's
    for (int half = 0; half < 2; ++half) ahead[half] = place_of(std::min(end + 16 * half, rows));
    for (int64_t n = 0; n < 2 * count; ++n) sums[n] = _mm512_setzero_ps();
    for (int64_t piece = 0; piece < 2 * words; piece += kChunk) {
        const int64_t some = std::min(kChunk, 2 * words - piece);
        for (int half = 0; half < 2; ++half) turn_pieces(places + 16 * half, some, ahead[half], panels + half * kPanel);
        for (int64_t n = 0; n < count;) {
            const int64_t left = count - n, tile = left >= 8 ? 8 : left >= 4 ? 4 : 2;
            const auto add = tile == 8 ? add_pairs<8> : tile == 4 ? add_pairs<4> : add_pairs<2>;
            add(panels, 16 * some, x + 64 * words * n + 32 * piece, 64 * words, sums + 2 * n);
            n += tile;
        }
    }
}

#endif

// ---- choosing a kernel ----

template <int32_t D, size_t... N>
std::array<Row, kTokens> rows_for(int32_t isa, std::index_sequence<N...>) {
#ifdef SECATEURS_X86
    // Halves stay with AVX2: converting sixteen of them at once takes twice as long on AMD Zen 4.
    if constexpr (D != kFloat16) {
        if (isa >= kAvx512) return {row_avx512<D, int(N) + 1>...};
    }
    if (isa >= kAvx2) return {row_avx2<D, int(N) + 1>...};
#endif
#ifdef SECATEURS_NEON
    if (isa == kNeon) return {row_neon<D, int(N) + 1>...};
#endif
    (void)isa;
    return {row_portable<D, int(N) + 1>...};
}

#ifdef SECATEURS_X86
template <size_t... N>
std::array<Row, kTokens> rows_for_bf16(std::index_sequence<N...>) {
    return {row_avx512_bf16<int(N) + 1>...};
}
#endif

// How a kernel wants its tokens: in which dtype, and whether the even columns of every 32 come before the odd ones.
struct Kernel {
    std::array<Row, kTokens> rows;  // [N - 1] takes N tokens
    int32_t x_dtype;
    bool deinterleaved;
};

Kernel kernel_for(int32_t isa, int32_t dtype, int32_t x_dtype) {
    const auto sizes = std::make_index_sequence<kTokens>();
#ifdef SECATEURS_X86
    if (isa == kAvx512Bf16 && dtype == kBfloat16 && x_dtype == kBfloat16) {
        return {rows_for_bf16(sizes), kBfloat16, false};
    }
#endif
    (void)x_dtype;
    if (dtype == kFloat32) return {rows_for<kFloat32>(isa, sizes), kFloat32, false};
    if (dtype == kFloat16) return {rows_for<kFloat16>(isa, sizes), kFloat32, false};
    return {rows_for<kBfloat16>(isa, sizes), kFloat32, isa >= kAvx512};
}

// (tokens, columns) -> (tokens, padded columns), zeros behind, as the kernel wants it; no vector crosses a cache line.
std::vector<CacheLine> prepare(const void* x, int32_t dtype, int64_t tokens, int64_t columns, const Kernel& kernel) {
    const int64_t stride = padded(columns);
    std::vector<CacheLine> prepared(size_t(whole_tiles(tokens) * stride * size_of(kernel.x_dtype) / 64));
    for (int64_t n = 0; n < tokens; ++n) {
        if (kernel.x_dtype == kBfloat16) {
            std::memcpy(prepared[0].bytes + 2 * n * stride, static_cast<const char*>(x) + 2 * n * columns,
                        size_t(2 * columns));
            continue;
        }
        float* row = reinterpret_cast<float*>(prepared.data()) + n * stride;
        for (int64_t j = 0; j < columns; ++j) {
            const int64_t within = j % 32;
            const int64_t place = kernel.deinterleaved ? j - within + within / 2 + 16 * (within % 2) : j;
            row[place] = load(x, dtype, n * columns + j);
        }
    }
    return prepared;
}

// ---- expansion to dense ----

template <class Word>
void unpack_row(const uint8_t* mask, const uint8_t* values, int64_t columns, uint8_t* dense) {
    std::memset(dense, 0, size_t(columns) * sizeof(Word));
    for (int64_t byte = 0; 8 * byte < columns; ++byte) {
        for (uint32_t bits = mask[byte]; bits; bits &= bits - 1, values += sizeof(Word)) {
            std::memcpy(dense + (8 * byte + __builtin_ctz(bits)) * int64_t(sizeof(Word)), values, sizeof(Word));
        }
    }
}

#ifdef SECATEURS_X86
template <class Word>
AVX512 void unpack_row_avx512(const uint8_t* mask, const uint8_t* values, int64_t columns, uint8_t* dense) {
    constexpr int64_t lanes = 64 / sizeof(Word);
    for (int64_t column = 0; column < columns; column += lanes, dense += 64) {
        uint32_t bits = 0;
        std::memcpy(&bits, mask + column / 8, lanes / 8);
        const int64_t inside = std::min(lanes, columns - column);
        const uint64_t stored = ~uint64_t(0) >> (64 - inside * int64_t(sizeof(Word)));
        const __m512i packed = load_packed(values);
        const __m512i row = sizeof(Word) == 2 ? _mm512_maskz_expand_epi16(bits, packed)
                                              : _mm512_maskz_expand_epi32(__mmask16(bits), packed);
        _mm512_mask_storeu_epi8(dense, stored, row);
        values += int64_t(sizeof(Word)) * _mm_popcnt_u32(bits);
    }
}
#endif

using UnpackRow = void (*)(const uint8_t* mask, const uint8_t* values, int64_t columns, uint8_t* dense);

UnpackRow unpack_row_for(int32_t isa, int64_t value_bytes) {
#ifdef SECATEURS_X86
    if (isa >= kAvx512) return value_bytes == 2 ? unpack_row_avx512<uint16_t> : unpack_row_avx512<uint32_t>;
#endif
    (void)isa;
    return value_bytes == 2 ? unpack_row<uint16_t> : unpack_row<uint32_t>;
}

}  // namespace

// Whether this machine has an instruction set: the numbers that it may pass to the functions below.
EXPORT int32_t secateurs_has_isa(int32_t isa) {
#ifdef SECATEURS_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vbmi2");
    if (isa == kAvx2) return avx2;
    if (isa == kAvx512) return avx512;
    if (isa == kAvx512Bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#ifdef SECATEURS_NEON
    if (isa == kNeon) return true;
#endif
    return isa == kPortable;
}

// Whether the product below shares an expansion between many tokens, and pays beside those of torch.
EXPORT int32_t secateurs_takes_many(int32_t dtype, int32_t x_dtype, int32_t isa) {
    return kernel_for(isa, dtype, x_dtype).x_dtype == kBfloat16 && !has_tiles();
}

// y (tokens, rows) = x (tokens, columns) W^T + bias, both contiguous and of x_dtype; sums in float32.
EXPORT void secateurs_linear(const uint8_t* mask, const uint8_t* values, const int32_t* offsets, const void* bias,
                             const void* x, void* y, int64_t rows, int64_t columns, int64_t tokens, int32_t dtype,
                             int32_t x_dtype, int32_t threads, int32_t isa) {
    const Kernel kernel = kernel_for(isa, dtype, x_dtype);
    const int64_t stride = padded(columns), words = stride / 64;
#ifdef SECATEURS_X86
    if (kernel.x_dtype == kBfloat16 && tokens >= kMany) {
        const int64_t block = tokens_at_once(2 * stride);
        for (int64_t first = 0; first < tokens; first += block) {
            const int64_t count = std::min(block, tokens - first);
            const std::vector<CacheLine> some =
                prepare(static_cast<const uint16_t*>(x) + first * columns, x_dtype, count, columns, kernel);
            const uint16_t* own = reinterpret_cast<const uint16_t*>(some.data());
            in_strips(rows, columns, count, 2 * kPanel, threads, [&](int64_t row, int64_t last, CacheLine* panels,
                                                                     CacheLine* sums) {
                strip(mask, values, offsets, rows, words, row, last, own, whole_tiles(count),
                      reinterpret_cast<__m512i*>(panels), reinterpret_cast<__m512*>(sums));
                const float* sum = reinterpret_cast<const float*>(sums);
                for (int64_t n = 0; n < count; ++n) put(sum + n * kStrip, bias, row, last, (first + n) * rows, y, x_dtype);
            });
        }
        return;
    }
#endif
    const std::vector<CacheLine> prepared = prepare(x, x_dtype, tokens, columns, kernel);
    in_parallel(offsets, 0, rows, columns, size_of(dtype), threads, [&](int64_t begin, int64_t end) {
        float sums[kTokens];
        for (int64_t row = begin; row < end; ++row) {
            const float shift = bias ? load(bias, x_dtype, row) : 0.0f;
            for (int64_t first = 0; first < tokens; first += kTokens) {
                const int64_t count = std::min<int64_t>(kTokens, tokens - first);
                kernel.rows[size_t(count - 1)](mask + row * 8 * words, values + offsets[row] * size_of(dtype), words,
                                               prepared[0].bytes + first * stride * size_of(kernel.x_dtype), stride,
                                               sums);
                for (int64_t n = 0; n < count; ++n) store(y, x_dtype, (first + n) * rows + row, sums[n] + shift);
            }
        }
    });
}

// Rows [first, last) of W as a dense (last - first, columns) matrix of the values' own dtype.
EXPORT void secateurs_unpack(const uint8_t* mask, const uint8_t* values, const int32_t* offsets, void* dense,
                             int64_t first, int64_t last, int64_t columns, int32_t dtype, int32_t threads,
                             int32_t isa) {
    const int64_t value_bytes = size_of(dtype), mask_bytes = padded(columns) / 8;
    const UnpackRow unpack = unpack_row_for(isa, value_bytes);
    in_parallel(offsets, first, last, columns, value_bytes, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            unpack(mask + row * mask_bytes, values + offsets[row] * value_bytes, columns,
                   static_cast<uint8_t*>(dense) + (row - first) * columns * value_bytes);
        }
    });
}

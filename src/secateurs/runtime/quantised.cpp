// Products with a matrix of a few bits a weight, with or without a mask, on the CPU.
//
// Weights are codes, one scale for every group of a row's columns; activations are rounded to eight bits, one
// scale for each group too, so that a group's products are sums of small whole numbers and only the groups' sums
// are floats. With AVX-512 (VBMI2, VNNI) codes go from memory into the product without a detour: unpacked,
// spread out by the mask and multiplied, all in registers. They stay unsigned, as that instruction wants them,
// and places without a weight are filled with the code of zero; what that adds to a sum is known from the
// activations alone, and is taken away from the row's result (from each group's whole number it would be exact,
// and cost a fifth of the time). Elsewhere a row is first expanded to signed bytes, which stay in the first-level cache.
//
// Layout (docs/format.md). A row is cut into words of 64 columns, the last one filled up; of each word the codes
// that the mask keeps (without a mask all 64) follow in order:
//   8 bits     one byte each
//   4 bits     words are taken in spans of max(group, 64) columns; codes of even spans are the low halves of a
//              row's bytes, those of odd spans the high halves, each from the row's first byte on
//   3, 2 bits  packed, the first code in the lowest bits; each word begins at a byte
// Scales are bfloat16. Behind everything are 64 bytes of zeros, so that vector loads may run over the end.

#include "kernels.h"

#include <cmath>

#ifdef SECATEURS_X86
#define AVX512_VNNI                                                                                               \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,fma,f16c,popcnt," \
                          "bmi,bmi2")))
#endif

namespace {

constexpr int64_t kLanes = 16;  // scales at once: their rows are padded to whole vectors

struct Form {
    int32_t bits;
    int64_t group;  // columns that share a scale: 32, 64 or 128
    bool half;      // levels are the odd numbers
    bool masked;

    int32_t step() const { return half ? 2 : 1; }
    int32_t zero() const { return half ? (1 << bits) - 1 : 1 << (bits - 1); }  // level = step * code - zero
};

int64_t groups_of(const Form& form, int64_t columns) { return (columns + form.group - 1) / form.group; }
int64_t whole_lanes(int64_t groups) { return (groups + kLanes - 1) / kLanes * kLanes; }

struct Matrix {
    Form form;
    const uint8_t* mask;  // null without one
    const uint8_t* codes;
    const uint8_t* scales;
    const int32_t* offsets;  // where each row's codes begin, in bytes
    int64_t rows, columns;

    int64_t words() const { return padded(columns) / 64; }
    int64_t groups() const { return groups_of(form, columns); }
    const uint8_t* mask_of(int64_t row) const { return form.masked ? mask + row * 8 * words() : nullptr; }
    bool is_empty(int64_t row) const { return offsets[row] == offsets[row + 1]; }
    const uint8_t* codes_of(int64_t row) const { return codes + offsets[row]; }
    const uint8_t* scales_of(int64_t row) const { return scales + row * groups() * 2; }
};

INLINE float scale_at(const uint8_t* scales, int64_t group) { return load(scales, kBfloat16, group); }

// ---- activations ----

// Of some tokens: what is behind the last column or group is zero.
struct Tokens {
    int64_t stride;  // bytes of a token's activations: whole pairs of words
    int64_t lanes;   // floats of a token's scales
    std::vector<CacheLine> bytes, floats;

    Tokens(int64_t tokens, int64_t columns, const Form& form)
        : stride((columns + 127) / 128 * 128),
          lanes(whole_lanes(groups_of(form, columns))),
          bytes(size_t(whole_tiles(tokens) * stride / 64)),
          floats(size_t(whole_tiles(tokens) * 2 * lanes * 4 / 64)) {}

    const int8_t* activations(int64_t token) const {
        return reinterpret_cast<const int8_t*>(bytes.data()) + token * stride;
    }
    const float* scales(int64_t token) const {
        return reinterpret_cast<const float*>(floats.data()) + 2 * token * lanes;
    }
    // For each group: what the unsigned codes add too much.
    const float* excess(int64_t token) const { return scales(token) + lanes; }
};

// As bits: 2^-118. Below, 127 divided by it would not be finite.
constexpr int32_t kSmallest = (127 - 118) << 23;

// One group: to whole numbers up to 127, and their sum; to zeros if all of it is next to nothing.
INLINE float round_group(const float* x, int64_t count, int8_t* rounded, int32_t& sum) {
    int32_t largest = 0;  // as bits, which are in the order of the numbers and can be compared many at a time
    for (int64_t j = 0; j < count; ++j) {
        largest = std::max(largest, int32_t(bits_from_float(x[j]) & 0x7fffffff));
    }
    sum = 0;
    if (largest < kSmallest) {
        std::memset(rounded, 0, size_t(count));
        return 0.0f;
    }
    const float most = float_from_bits(uint32_t(largest)), inverse = 127.0f / most;
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: its last bit counts ones, so that adding rounds
    for (int64_t j = 0; j < count; ++j) {
        const int32_t level = int32_t(bits_from_float(x[j] * inverse + kShift)) - 0x4b400000;
        rounded[j] = int8_t(level);
        sum += level;
    }
    // Infinities and NaN must not get lost.
    return largest < 0x7f800000 ? most / 127.0f : float_from_bits(0x7fc00000);
}

// Tokens [begin, end) of x.
INLINE void round_tokens(const void* x, int32_t dtype, int64_t columns, const Form& form, int64_t begin, int64_t end,
                         Tokens& rounded) {
    std::vector<float> row(size_t(rounded.stride), 0.0f);
    for (int64_t n = begin; n < end; ++n) {
        for (int64_t j = 0; j < columns; ++j) row[size_t(j)] = load(x, dtype, n * columns + j);
        int8_t* activations = const_cast<int8_t*>(rounded.activations(n));
        float* scales = const_cast<float*>(rounded.scales(n));
        for (int64_t group = 0; group < groups_of(form, columns); ++group) {
            const int64_t first = group * form.group;
            int32_t sum;
            scales[group] = round_group(&row[size_t(first)], form.group, activations + first, sum);
            scales[rounded.lanes + group] = -scales[group] * float(form.zero()) * float(sum);
        }
    }
}

// ---- a row as signed bytes ----

struct SpreadBytes {
    alignas(8) uint8_t places[256][8];  // of each lane's byte among the packed ones, 0x80 if it has none
};

constexpr SpreadBytes make_spread() {
    SpreadBytes table{};
    for (int byte = 0; byte < 256; ++byte) {
        uint8_t next = 0;
        for (int lane = 0; lane < 8; ++lane) {
            const bool kept = byte >> lane & 1;
            table.places[byte][lane] = kept ? next : 0x80;
            next = uint8_t(next + kept);
        }
    }
    return table;
}

constexpr SpreadBytes kSpread = make_spread();

// How eight packed bytes go to the places that a byte of the mask keeps; zero elsewhere.

struct Portable {
    static INLINE void spread8(const int8_t* packed, uint8_t mask, int8_t* row) {
        std::memset(row, 0, 8);
        for (uint32_t bits = mask; bits; bits &= bits - 1) row[__builtin_ctz(bits)] = *packed++;
    }
};

#ifdef SECATEURS_X86
struct WithShuffle {
    static AVX2 inline void spread8(const int8_t* packed, uint8_t mask, int8_t* row) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed));
        const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSpread.places[mask]));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(row), _mm_shuffle_epi8(bytes, places));
    }
};
#endif

#ifdef SECATEURS_NEON
struct WithTable {
    static INLINE void spread8(const int8_t* packed, uint8_t mask, int8_t* row) {
        vst1_s8(row, vtbl1_s8(vld1_s8(packed), vld1_s8(reinterpret_cast<const int8_t*>(kSpread.places[mask]))));
    }
};
#endif

// The levels of `count` packed codes; up to 64, and always 64 written.
INLINE void unpack_word(const uint8_t* packed, int32_t bits, bool high, int32_t step, int32_t zero, int8_t* levels) {
    if (bits == 8) {
        for (int i = 0; i < 64; ++i) levels[i] = int8_t(packed[i] - zero);
    } else if (bits == 4) {
        const int shift = high ? 4 : 0;
        for (int i = 0; i < 64; ++i) levels[i] = int8_t(step * (packed[i] >> shift & 15) - zero);
    } else {
        const uint32_t code = (1u << bits) - 1;
        for (int eight = 0; eight < 8; ++eight, packed += bits) {
            uint32_t some = 0;
            std::memcpy(&some, packed, size_t(bits));
            for (int i = 0; i < 8; ++i) levels[8 * eight + i] = int8_t(step * int32_t(some >> i * bits & code) - zero);
        }
    }
}

// A row's levels, (words * 64) of them.
template <class Isa>
INLINE void expand_row(const Matrix& matrix, int64_t row, int8_t* levels) {
    const Form& form = matrix.form;
    const uint8_t* mask = matrix.mask_of(row);
    const uint8_t* streams[2] = {matrix.codes_of(row), matrix.codes_of(row)};
    const int64_t span = std::max<int64_t>(form.group, 64) / 64;
    int8_t packed[64 + 8];
    for (int64_t word = 0; word < matrix.words(); ++word, levels += 64) {
        const bool high = form.bits == 4 && word / span % 2;
        const uint8_t*& codes = streams[high];
        if (!mask) {
            unpack_word(codes, form.bits, high, form.step(), form.zero(), levels);
            codes += form.bits == 4 ? 64 : 8 * form.bits;
            continue;
        }
        unpack_word(codes, form.bits, high, form.step(), form.zero(), packed);
        int64_t count = 0;
        for (int byte = 0; byte < 8; ++byte) {
            Isa::spread8(packed + count, mask[8 * word + byte], levels + 8 * byte);
            count += __builtin_popcount(mask[8 * word + byte]);
        }
        codes += form.bits == 4 ? count : (count * form.bits + 7) / 8;
    }
}

// ---- rows [begin, end) times some tokens, to y (tokens, kRows); by way of their levels ----

constexpr int64_t kRows = 16;  // at most

template <class Isa>
INLINE void rows_by_levels(const Matrix& matrix, int64_t begin, int64_t end, const Tokens& x, int64_t first,
                           int64_t tokens, int8_t* levels, float* y) {
    const int64_t groups = matrix.groups(), group = matrix.form.group;
    for (int64_t row = begin; row < end; ++row) {
        if (matrix.is_empty(row)) {  // exactly zero, which floats would miss
            for (int64_t n = 0; n < tokens; ++n) y[n * kRows + row - begin] = 0.0f;
            continue;
        }
        expand_row<Isa>(matrix, row, levels);
        const uint8_t* scales = matrix.scales_of(row);
        for (int64_t n = 0; n < tokens; ++n) {
            const int8_t* activations = x.activations(first + n);
            const float* steps = x.scales(first + n);
            float total = 0.0f;
            for (int64_t g = 0; g < groups; ++g) {
                int32_t sum = 0;
                for (int64_t j = g * group; j < (g + 1) * group; ++j) {
                    sum += int32_t(levels[j]) * int32_t(activations[j]);
                }
                total += scale_at(scales, g) * steps[g] * float(sum);
            }
            y[n * kRows + row - begin] = total;
        }
    }
}

// (last - first, columns) rows, dense.
template <class Isa>
INLINE void rows_to_dense(const Matrix& matrix, int64_t first, int64_t begin, int64_t end, int32_t dtype,
                          int8_t* levels, uint8_t* dense) {
    for (int64_t row = begin; row < end; ++row) {
        expand_row<Isa>(matrix, row, levels);
        const uint8_t* scales = matrix.scales_of(row);
        uint8_t* out = dense + (row - first) * matrix.columns * size_of(dtype);
        for (int64_t g = 0; g < matrix.groups(); ++g) {
            const float scale = scale_at(scales, g);
            const int64_t stop = std::min(matrix.columns, (g + 1) * matrix.form.group);
            for (int64_t j = g * matrix.form.group; j < stop; ++j) {
                // A zero behind the mask is +0 whatever the scale's sign.
                store(out, dtype, j, float(levels[j]) * scale + 0.0f);
            }
        }
    }
}

#ifdef SECATEURS_X86

// ---- rows [begin, end) times some tokens, to y (tokens, kRows); in registers ----

// What does not change from row to row.
struct Constants {
    __m512i fill[2];  // zero's code, in the low and the high halves
    __m512i places;   // of three bytes for each eight codes
    __m512i shifts;   // of eight codes in eight bytes
    __m512i keep;     // of a code's bits
    __m512 factors;   // of 16 groups: what undoes that codes are multiples
};

AVX512_VNNI Constants constants_of(const Form& form) {
    Constants c{};
    const int32_t zero = form.zero(), lead = form.step() - 1;
    float low = 1.0f, high = 1.0f;
    if (form.bits == 4) {
        // The high halves stay where they are, as sixteenfold codes. Odd levels need half a step at places without
        // a weight: where there are such, the low codes are doubled.
        low = form.half && !form.masked ? 2.0f : 1.0f;
        high = float(form.step()) / 16.0f;
        c.fill[1] = _mm512_set1_epi8(char(zero * 16 / form.step()));
    }
    c.fill[0] = _mm512_set1_epi8(char(zero));
    alignas(64) uint8_t places[64] = {}, shifts[64];
    for (int lane = 0; lane < 8; ++lane) {
        for (int i = 0; i < 8; ++i) {
            if (i < form.bits) places[8 * lane + i] = uint8_t(form.bits * lane + i);
            // One bit earlier makes a code twice as large.
            shifts[8 * lane + i] = uint8_t((form.bits * i - lead) & 63);
        }
    }
    c.places = _mm512_load_si512(places);
    c.shifts = _mm512_load_si512(shifts);
    c.keep = _mm512_set1_epi8(char(((1 << form.bits) - 1) << lead));
    alignas(64) float factors[kLanes];
    const int64_t each = form.group == 32 ? 2 : 1;  // groups of a word or of a span
    for (int64_t i = 0; i < kLanes; ++i) factors[i] = i / each % 2 ? high : low;
    c.factors = _mm512_load_ps(factors);
    return c;
}

typedef uint64_t Unaligned __attribute__((aligned(1), may_alias));  // to be an operand where it lies

// 64 weights, unsigned; moves on to the next ones.
template <int Bits, bool High, bool Masked, bool Half>
AVX512_VNNI INLINE __m512i next_word(const uint8_t*& codes, const uint8_t*& mask, const Constants& c) {
    __m512i weights = load_packed(codes);
    if constexpr (Bits == 4) {
        if constexpr (High) weights = _mm512_and_si512(weights, _mm512_set1_epi8(char(0xf0)));
        else if constexpr (Half && Masked) {
            weights = _mm512_and_si512(_mm512_slli_epi16(weights, 1), _mm512_set1_epi8(0x1e));
        } else weights = _mm512_and_si512(weights, _mm512_set1_epi8(0x0f));
    } else if constexpr (Bits < 4) {
        weights = _mm512_permutexvar_epi8(c.places, weights);
        weights = _mm512_and_si512(_mm512_multishift_epi64_epi8(c.shifts, weights), c.keep);
    }
    if constexpr (!Masked) {
        codes += Bits == 4 ? 64 : 8 * Bits;
        return weights;
    }
    // From memory to a mask. Compilers go by way of a general register, which on AMD Zen 5 expansion waits for.
    const Unaligned* bits = reinterpret_cast<const Unaligned*>(mask);
    __mmask64 kept;
    asm("kmovq %1, %0" : "=k"(kept) : "m"(*bits));
    const int64_t count = _mm_popcnt_u64(*bits);
    mask += 8;
    codes += Bits == 8 || Bits == 4 ? count : (count * Bits + 7) / 8;
    return _mm512_mask_expand_epi8(c.fill[High], kept, weights);
}

// A unit: what is summed in whole numbers. One word, or with groups of 128 columns two.
template <int Bits, int Group, bool High, bool Masked, bool Half, int N>
AVX512_VNNI INLINE void add_unit(const uint8_t*& codes, const uint8_t*& mask, const Constants& c, int words,
                                 const int8_t* const* x, int64_t at, const float* const* factors, int64_t unit,
                                 __m512* sums) {
    __m512i products[N];
    for (int n = 0; n < N; ++n) products[n] = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int word = 0; word < words; ++word) {
        const __m512i weights = next_word<Bits, High, Masked, Half>(codes, mask, c);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            products[n] = _mm512_dpbusd_epi32(products[n], weights, _mm512_load_si512(x[n] + at + 64 * word));
        }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
        __m512 factor;
        if constexpr (Group == 32) {
            const __m512 first = _mm512_set1_ps(factors[n][2 * unit]), second = _mm512_set1_ps(factors[n][2 * unit + 1]);
            factor = _mm512_mask_blend_ps(0xff00, first, second);
        } else factor = _mm512_set1_ps(factors[n][unit]);
        sums[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[n]), factor, sums[n]);
    }
}

template <int Bits, int Group, bool Masked, bool Half, int N>
AVX512_VNNI void rows_in_registers(const Matrix& matrix, int64_t begin, int64_t end, const Tokens& tokens,
                                   int64_t first, const Constants& c, float* scratch, float* y) {
    constexpr int kWords = Group == 128 ? 2 : 1;
    constexpr int kPairs = N == 1 ? 2 : 1;  // one token alone needs more sums to hide the latency of additions
    constexpr int kBytes = 2 * kPairs * kWords * Bits * (Masked ? 4 : 8);  // of codes in a pass; if half are kept
    const int64_t words = matrix.words(), units = words / kWords;
    const int64_t groups = (matrix.columns + Group - 1) / Group;  // a division by a constant
    const int8_t* x[N];
    float* factors[N];
    for (int n = 0; n < N; ++n) {
        x[n] = tokens.activations(first + n);
        factors[n] = scratch + n * tokens.lanes;
    }
    for (int64_t row = begin; row < end; ++row) {
        if (matrix.is_empty(row)) {  // as above
            for (int n = 0; n < N; ++n) y[n * kRows + row - begin] = 0.0f;
            continue;
        }
        const uint8_t* mask = matrix.mask_of(row);
        const uint8_t *low = matrix.codes_of(row), *high = low, *scales = matrix.scales + row * groups * 2;
        __m512 even[kPairs][N], odd[kPairs][N];
        for (int n = 0; n < N; ++n) {
            for (int i = 0; i < kPairs; ++i) even[i][n] = odd[i][n] = _mm512_setzero_ps();
        }
        for (int64_t g = 0; g < groups; g += kLanes) {
            const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + 2 * g));
            const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
            for (int n = 0; n < N; ++n) {
                even[0][n] = _mm512_fmadd_ps(scale, _mm512_load_ps(tokens.excess(first + n) + g), even[0][n]);
                const __m512 step = _mm512_mul_ps(_mm512_load_ps(tokens.scales(first + n) + g), c.factors);
                _mm512_store_ps(factors[n] + g, _mm512_mul_ps(scale, step));
            }
        }
        asm volatile("" ::: "memory");  // they are read one at a time from here on
        int64_t unit = 0, at = 0;
        // Only four bits come in two streams.
        const uint8_t*& second = Bits == 4 ? high : low;
        for (; unit + 2 * kPairs <= units; unit += 2 * kPairs) {
#pragma GCC unroll 8
            for (int byte = 0; byte < kBytes; byte += 64) {
                _mm_prefetch(reinterpret_cast<const char*>(low) + kAhead + byte, _MM_HINT_T0);
            }
            if constexpr (Masked) _mm_prefetch(reinterpret_cast<const char*>(mask) + kAhead, _MM_HINT_T0);
#pragma GCC unroll 2
            for (int pair = 0; pair < kPairs; ++pair) {
                add_unit<Bits, Group, false, Masked, Half, N>(low, mask, c, kWords, x, at, factors, unit + 2 * pair,
                                                              even[pair]);
                at += 64 * kWords;
                add_unit<Bits, Group, Bits == 4, Masked, Half, N>(second, mask, c, kWords, x, at, factors,
                                                                  unit + 2 * pair + 1, odd[pair]);
                at += 64 * kWords;
            }
        }
        for (; at < 64 * words; ++unit) {
            const int left = int(std::min<int64_t>(kWords, words - at / 64));
            if (unit % 2) {
                add_unit<Bits, Group, Bits == 4, Masked, Half, N>(second, mask, c, left, x, at, factors, unit, odd[0]);
            } else {
                add_unit<Bits, Group, false, Masked, Half, N>(low, mask, c, left, x, at, factors, unit, even[0]);
            }
            at += 64 * left;
        }
        for (int n = 0; n < N; ++n) {
            for (int i = 1; i < kPairs; ++i) {
                even[0][n] = _mm512_add_ps(even[0][n], even[i][n]);
                odd[0][n] = _mm512_add_ps(odd[0][n], odd[i][n]);
            }
            y[n * kRows + row - begin] = _mm512_reduce_add_ps(_mm512_add_ps(even[0][n], odd[0][n]));
        }
    }
}

using InRegisters = void (*)(const Matrix& matrix, int64_t begin, int64_t end, const Tokens& tokens, int64_t first,
                             const Constants& c, float* scratch, float* y);

template <int Bits, int Group, bool Masked, bool Half>
InRegisters for_tokens(int64_t tokens) {
    if (tokens >= 4) return rows_in_registers<Bits, Group, Masked, Half, 4>;
    if (tokens >= 2) return rows_in_registers<Bits, Group, Masked, Half, 2>;
    return rows_in_registers<Bits, Group, Masked, Half, 1>;
}

template <int Bits, int Group>
InRegisters for_mask(const Form& form, int64_t tokens) {
    if (!form.masked) return for_tokens<Bits, Group, false, false>(tokens);
    // With fewer bits than four the odd levels are a matter of constants.
    if (Bits == 4 && form.half) return for_tokens<Bits, Group, true, true>(tokens);
    return for_tokens<Bits, Group, true, false>(tokens);
}

template <int Bits>
InRegisters for_group(const Form& form, int64_t tokens) {
    if (form.group == 32) return for_mask<Bits, 32>(form, tokens);
    if (form.group == 64) return for_mask<Bits, 64>(form, tokens);
    return for_mask<Bits, 128>(form, tokens);
}

InRegisters for_form(const Form& form, int64_t tokens) {
    if (form.bits == 8) return for_group<8>(form, tokens);
    if (form.bits == 4) return for_group<4>(form, tokens);
    if (form.bits == 3) return for_group<3>(form, tokens);
    return for_group<2>(form, tokens);
}

// ---- a strip of rows times many tokens ----

// Four activations times four columns of twice 16 rows. Of intrinsics GCC 12 makes two copies more for each product.
AVX512_VNNI INLINE void add_products(__m512i& lower, __m512i& upper, __m512i some, __m512i others, const int8_t* x) {
    typedef int32_t Four __attribute__((aligned(1), may_alias));
    __m512i four;
    asm("vpbroadcastd %1, %0" : "=v"(four) : "m"(*reinterpret_cast<const Four*>(x)));
    asm("vpdpbusd %2, %1, %0" : "+v"(lower) : "v"(some), "v"(four));
    asm("vpdpbusd %2, %1, %0" : "+v"(upper) : "v"(others), "v"(four));
}

// Where a row's next word is.
struct Place {
    const uint8_t *low, *high, *mask;
};

// Sixteen rows' words; and, while they are read, where the next sixteen rows' begin, to be fetched.
struct Places {
    Place of[16];
    const uint8_t *codes, *mask;
};

// A word of each row, to 16 vectors.
template <int Bits, bool High, bool Masked, bool Half>
AVX512_VNNI INLINE void turn_word(Places& places, const Constants& c, __m512i* panel) {
    fetch(places.codes, (Masked ? 1 : 2) * Bits);  // if half are kept
    if constexpr (Masked) fetch(places.mask, 2);
    __m512i rows[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
        Place& place = places.of[i];
        rows[i] = next_word<Bits, High, Masked, Half>(High ? place.high : place.low, place.mask, c);
    }
    transpose(rows);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(panel + i, rows[i]);
}

template <int Bits, bool Masked, bool Half>
AVX512_VNNI void turn_words(Places& places, int64_t first, int64_t count, int64_t span, const Constants& c,
                            __m512i* panel) {
    for (int64_t word = first; word < first + count; ++word, panel += 16) {
        if (Bits == 4 && word / span % 2) turn_word<Bits, Bits == 4, Masked, Half>(places, c, panel);
        else turn_word<Bits, false, Masked, Half>(places, c, panel);
    }
}

using TurnWords = void (*)(Places& places, int64_t first, int64_t count, int64_t span, const Constants& c,
                           __m512i* panel);

template <int Bits>
TurnWords turn_for_mask(const Form& form) {
    if (!form.masked) return turn_words<Bits, false, false>;
    return Bits == 4 && form.half ? turn_words<Bits, true, true> : turn_words<Bits, true, false>;
}

TurnWords turn_for(const Form& form) {
    if (form.bits == 8) return turn_for_mask<8>(form);
    if (form.bits == 4) return turn_for_mask<4>(form);
    return form.bits == 3 ? turn_for_mask<3>(form) : turn_for_mask<2>(form);
}

// Groups [begin, end), whose weights two panels hold, of N tokens; added to sums (N, 32). There are registers for six.
template <int N>
AVX512_VNNI void add_groups(const __m512i* panels, int64_t columns, const Form& form, const Tokens& tokens,
                            int64_t first, int64_t begin, int64_t end, const Constants& c, const __m512* scales,
                            __m512* sums) {
    const int8_t* x[N];
    const float* steps[N];
    __m512 low[N], high[N];
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) {
        x[n] = tokens.activations(first + n) + begin * form.group;
        steps[n] = tokens.scales(first + n);
        low[n] = sums[2 * n];
        high[n] = sums[2 * n + 1];
    }
    alignas(64) float factors[kLanes];
    _mm512_store_ps(factors, c.factors);
    for (int64_t g = begin; g < end; ++g) {
        __m512i upper[N], lower[N];
#pragma GCC unroll 6
        for (int n = 0; n < N; ++n) upper[n] = lower[n] = _mm512_setzero_si512();
        const int64_t count = std::min(form.group, columns - (g - begin) * form.group) / 4;
        for (int64_t i = 0; i < count; ++i) {
            const __m512i some = _mm512_load_si512(panels), others = _mm512_load_si512(panels++ + kPanel);
#pragma GCC unroll 6
            for (int n = 0; n < N; ++n) add_products(lower[n], upper[n], some, others, x[n] + 4 * i);
        }
        const __m512 factor = _mm512_set1_ps(factors[g % kLanes]);
        const __m512 first_scale = scales[2 * g], second_scale = scales[2 * g + 1];
        const __m512 first_step = _mm512_mul_ps(first_scale, factor), second_step = _mm512_mul_ps(second_scale, factor);
#pragma GCC unroll 6
        for (int n = 0; n < N; ++n) {
            x[n] += form.group;
            const __m512 step = _mm512_set1_ps(steps[n][g]), excess = _mm512_set1_ps(steps[n][tokens.lanes + g]);
            low[n] = _mm512_fmadd_ps(first_scale, excess, low[n]);
            high[n] = _mm512_fmadd_ps(second_scale, excess, high[n]);
            low[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(lower[n]), _mm512_mul_ps(first_step, step), low[n]);
            high[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(upper[n]), _mm512_mul_ps(second_step, step), high[n]);
        }
    }
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) {
        sums[2 * n] = low[n];
        sums[2 * n + 1] = high[n];
    }
}

// Rows [begin, end), at most 32, times tokens; to sums (count, 32).
AVX512_VNNI void strip(const Matrix& matrix, int64_t begin, int64_t end, const Tokens& tokens, int64_t count,
                       const Constants& c, TurnWords turn, __m512i* panels, __m512* scales,
                       __m512* sums) {
    Places places[2];
    const int64_t groups = matrix.groups(), words = matrix.words(), group = matrix.form.group;
    for (int half = 0; half < 2; ++half) {
        const int64_t ahead = std::min(end + 16 * half, matrix.rows);
        places[half].codes = matrix.codes_of(ahead);
        places[half].mask = matrix.mask_of(ahead);
        int64_t row[16];
        for (int i = 0; i < 16; ++i) {
            row[i] = std::min(begin + 16 * half + i, end - 1);  // those behind the last are nobody's
            places[half].of[i] = {matrix.codes_of(row[i]), matrix.codes_of(row[i]), matrix.mask_of(row[i])};
        }
        for (int64_t g = 0; g < groups; g += kLanes) {
            __m512i turned[16];
            for (int i = 0; i < 16; ++i) {
                const uint8_t* own = matrix.scales_of(row[i]) + 2 * g;
                const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(own));
                turned[i] = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
            }
            transpose(turned);
            for (int i = 0; i < 16; ++i) scales[2 * (g + i) + half] = _mm512_castsi512_ps(turned[i]);
        }
    }
    for (int64_t n = 0; n < 2 * count; ++n) sums[n] = _mm512_setzero_ps();
    const int64_t span = std::max<int64_t>(group, 64) / 64;
    for (int64_t word = 0; word < words; word += kChunk) {
        const int64_t some = std::min(kChunk, words - word), columns = 64 * some;
        for (int half = 0; half < 2; ++half) turn(places[half], word, some, span, c, panels + half * kPanel);
        const int64_t from = 64 * word / group, to = std::min(groups, from + (columns + group - 1) / group);
        for (int64_t n = 0; n < count;) {
            const int64_t left = count - n, tile = left >= 6 && left != 8 ? 6 : left >= 4 ? 4 : 2;
            const auto add = tile == 6 ? add_groups<6> : tile == 4 ? add_groups<4> : add_groups<2>;
            add(panels, columns, matrix.form, tokens, n, from, to, c, scales, sums + 2 * n);
            n += tile;
        }
    }
}

bool has_vnni() {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512dq");
}

// The same code, for compilers to make the most of what an instruction set has.

AVX512_VNNI void round_tokens_avx512(const void* x, int32_t dtype, int64_t columns, const Form& form, int64_t begin,
                                     int64_t end, Tokens& rounded) {
    round_tokens(x, dtype, columns, form, begin, end, rounded);
}

AVX2 void rows_by_levels_avx2(const Matrix& matrix, int64_t begin, int64_t end, const Tokens& x, int64_t first,
                              int64_t tokens, int8_t* levels, float* y) {
    rows_by_levels<WithShuffle>(matrix, begin, end, x, first, tokens, levels, y);
}

AVX2 void rows_to_dense_avx2(const Matrix& matrix, int64_t first, int64_t begin, int64_t end, int32_t dtype,
                             int8_t* levels, uint8_t* dense) {
    rows_to_dense<WithShuffle>(matrix, first, begin, end, dtype, levels, dense);
}

#endif

#ifdef SECATEURS_NEON
using Best = WithTable;
#else
using Best = Portable;
#endif

void rows_by_levels_for(int32_t isa, const Matrix& matrix, int64_t begin, int64_t end, const Tokens& x, int64_t first,
                        int64_t tokens, int8_t* levels, float* y) {
#ifdef SECATEURS_X86
    if (isa >= kAvx2) return rows_by_levels_avx2(matrix, begin, end, x, first, tokens, levels, y);
#endif
    if (isa == kPortable) return rows_by_levels<Portable>(matrix, begin, end, x, first, tokens, levels, y);
    rows_by_levels<Best>(matrix, begin, end, x, first, tokens, levels, y);
}

}  // namespace

// Whether the product below shares an expansion between many tokens, and pays beside those of torch.
EXPORT int32_t secateurs_quantised_takes_many(int32_t isa) {
#ifdef SECATEURS_X86
    return isa >= kAvx512 && has_vnni() && !has_tiles();
#endif
    (void)isa;
    return 0;
}

// y (tokens, rows) = x (tokens, columns) W^T + bias, both contiguous and of x_dtype; x is rounded to eight bits.
EXPORT void secateurs_quantised_linear(const uint8_t* mask, const uint8_t* codes, const uint8_t* scales,
                                       const int32_t* offsets, const void* bias, const void* x, void* y, int64_t rows,
                                       int64_t columns, int64_t tokens, int32_t bits, int32_t group, int32_t half,
                                       int32_t x_dtype, int32_t threads, int32_t isa) {
    const Matrix matrix{{bits, group, half != 0, mask != nullptr}, mask, codes, scales, offsets, rows, columns};
#ifdef SECATEURS_X86
    const bool in_registers = isa >= kAvx512 && has_vnni(), many = in_registers && tokens >= kMany;
    Constants constants;
    if (in_registers) constants = constants_of(matrix.form);
#else
    const bool in_registers = false, many = false;
#endif
    const int64_t block = many ? tokens_at_once(columns) : tokens;
    for (int64_t first = 0; first < tokens; first += block) {
        const int64_t count = std::min(block, tokens - first);
        const uint8_t* own = static_cast<const uint8_t*>(x) + first * columns * size_of(x_dtype);
        Tokens rounded(count, columns, matrix.form);
        // A number is rounded in the time in which some eight bytes would be read.
        shared_out(count, 8 * count * columns, threads, [&](int64_t begin, int64_t end) {
#ifdef SECATEURS_X86
            if (in_registers) {
                return round_tokens_avx512(own, x_dtype, columns, matrix.form, begin, end, rounded);
            }
#endif
            round_tokens(own, x_dtype, columns, matrix.form, begin, end, rounded);
        });
#ifdef SECATEURS_X86
        if (many) {
            const TurnWords turn = turn_for(matrix.form);
            const int64_t vectors = 2 * (kPanel + rounded.lanes);
            in_strips(rows, columns, count, vectors, threads, [&](int64_t row, int64_t last, CacheLine* room,
                                                                  CacheLine* lines) {
                __m512i* panels = reinterpret_cast<__m512i*>(room);
                strip(matrix, row, last, rounded, whole_tiles(count), constants, turn, panels,
                      reinterpret_cast<__m512*>(panels + 2 * kPanel), reinterpret_cast<__m512*>(lines));
                float* sums = reinterpret_cast<float*>(lines);
                for (int64_t i = row; i < last; ++i) {
                    if (!matrix.is_empty(i)) continue;  // exactly zero, which floats would miss
                    for (int64_t n = 0; n < count; ++n) sums[n * kStrip + i - row] = 0.0f;
                }
                for (int64_t n = 0; n < count; ++n) put(sums + n * kStrip, bias, row, last, (first + n) * rows, y, x_dtype);
            });
            continue;
        }
#endif
        in_parallel(offsets, 0, rows, columns, 1, threads, [&](int64_t begin, int64_t end) {
            std::vector<CacheLine> scratch(size_t(std::max(4 * rounded.lanes * 4, padded(columns) + 128) / 64 + 1));
            float sums[kTokens * kRows];
            for (int64_t row = begin; row < end; row += kRows) {
                const int64_t last = std::min(row + kRows, end);
                for (int64_t n = 0; n < tokens;) {
                    int64_t some = std::min<int64_t>(kTokens, tokens - n);
#ifdef SECATEURS_X86
                    if (in_registers) {
                        some = some >= 4 ? 4 : some >= 2 ? 2 : 1;
                        for_form(matrix.form, some)(matrix, row, last, rounded, n, constants,
                                                    reinterpret_cast<float*>(scratch.data()), sums);
                    } else
#endif
                        rows_by_levels_for(isa, matrix, row, last, rounded, n, some,
                                           reinterpret_cast<int8_t*>(scratch.data()), sums);
                    for (int64_t i = 0; i < some; ++i) {
                        put(sums + i * kRows, bias, row, last, (n + i) * rows, y, x_dtype);
                    }
                    n += some;
                }
            }
        });
    }
}

// Rows [first, last) of W as a dense (last - first, columns) matrix: level * scale, rounded to the dtype.
EXPORT void secateurs_quantised_unpack(const uint8_t* mask, const uint8_t* codes, const uint8_t* scales,
                                       const int32_t* offsets, void* dense, int64_t first, int64_t last,
                                       int64_t columns, int32_t bits, int32_t group, int32_t half, int32_t dtype,
                                       int32_t threads, int32_t isa) {
    const Matrix matrix{{bits, group, half != 0, mask != nullptr}, mask, codes, scales, offsets, last, columns};
    uint8_t* out = static_cast<uint8_t*>(dense);
    in_parallel(offsets, first, last, columns, 1, threads, [&](int64_t begin, int64_t end) {
        std::vector<CacheLine> scratch(size_t(padded(columns) / 64 + 2));
        int8_t* levels = reinterpret_cast<int8_t*>(scratch.data());
#ifdef SECATEURS_X86
        if (isa >= kAvx2) return rows_to_dense_avx2(matrix, first, begin, end, dtype, levels, out);
#endif
        if (isa == kPortable) return rows_to_dense<Portable>(matrix, first, begin, end, dtype, levels, out);
        rows_to_dense<Best>(matrix, first, begin, end, dtype, levels, out);
    });
}

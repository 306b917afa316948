// Drives the kernels for values of a few bits, as sanitize.cpp does the others: every buffer is a heap block of
// exactly the size that docs/format.md promises, and results are compared with a plain product.

#include "../src/secateurs/runtime/quantised.cpp"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

// Only one of the two sources is included here; this is the other's.
EXPORT int32_t secateurs_has_isa(int32_t isa) {
#ifdef SECATEURS_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == kAvx2) return avx2;
    if (isa == kAvx512) return avx2 && __builtin_cpu_supports("avx512vbmi2") && has_vnni();
#endif
#ifdef SECATEURS_NEON
    if (isa == kNeon) return true;
#endif
    return isa == kPortable;
}

namespace {

std::mt19937 random_bits(0);

float uniform() { return std::uniform_real_distribution<float>(-1, 1)(random_bits); }

void put(std::vector<uint8_t>& bytes, int64_t bit, int32_t code, int32_t bits) {
    for (int32_t i = 0; i < bits; ++i, ++bit) {
        if (int64_t(bytes.size()) <= bit / 8) bytes.resize(size_t(bit / 8 + 1));
        bytes[size_t(bit / 8)] |= uint8_t((code >> i & 1) << bit % 8);
    }
}

// A row's bytes, code by code.
std::vector<uint8_t> pack_row(const std::vector<int32_t>& codes, const std::vector<bool>& kept, const Form& form) {
    std::vector<uint8_t> bytes;
    const int64_t columns = int64_t(codes.size()), span = std::max<int64_t>(form.group, 64);
    int64_t next[2] = {0, 0}, bit = 0;
    for (int64_t j = 0; j < columns; ++j) {
        if (j % 64 == 0) bit = (bit + 7) / 8 * 8;
        if (!kept[size_t(j)]) continue;
        if (form.bits == 4) {
            const int64_t half = j / span % 2;
            put(bytes, 8 * next[half]++ + 4 * half, codes[size_t(j)], 4);
        } else {
            put(bytes, bit, codes[size_t(j)], form.bits);
            bit += form.bits;
        }
    }
    return bytes;
}

void check(const Form& form, int64_t rows, int64_t columns, int64_t tokens, double sparsity, int32_t x_dtype,
           int32_t isa, int64_t shift) {
    const int64_t width = padded(columns), groups = groups_of(form, columns);
    std::vector<uint8_t> mask(size_t(form.masked ? rows * width / 8 : 0)), codes;
    std::vector<float> scales, dense(size_t(rows * columns));
    std::vector<int32_t> offsets(1, 0);
    for (int64_t row = 0; row < rows; ++row) {
        std::vector<int32_t> own(size_t(width), 0);
        std::vector<bool> kept(size_t(width), !form.masked);
        for (int64_t g = 0; g < groups; ++g) scales.push_back(float(int(random_bits() % 255) - 127) / 64);
        for (int64_t j = 0; j < columns; ++j) {
            if (form.masked && std::abs(uniform()) < sparsity) continue;
            if (form.masked) mask[size_t(row * width / 8 + j / 8)] |= uint8_t(1 << j % 8);
            kept[size_t(j)] = true;
            own[size_t(j)] = int32_t(random_bits() % (1u << form.bits));
            dense[size_t(row * columns + j)] = float(form.step() * own[size_t(j)] - form.zero()) *
                                               scales[size_t(row * groups + j / form.group)];
        }
        const std::vector<uint8_t> bytes = pack_row(own, kept, form);
        codes.insert(codes.end(), bytes.begin(), bytes.end());
        offsets.push_back(int32_t(codes.size()));
    }
    const size_t size = mask.size() + codes.size() + 2 * scales.size() + 64;
    std::unique_ptr<uint8_t[]> block(new uint8_t[size + size_t(shift)]());
    uint8_t* packed = block.get() + shift;
    std::copy(mask.begin(), mask.end(), packed);
    std::copy(codes.begin(), codes.end(), packed + mask.size());
    uint8_t* packed_scales = packed + mask.size() + codes.size();
    for (size_t i = 0; i < scales.size(); ++i) store(packed_scales, kBfloat16, int64_t(i), scales[i]);
    const uint8_t* given_mask = form.masked ? packed : nullptr;
    const int64_t x_size = size_of(x_dtype);
    std::unique_ptr<uint8_t[]> x(new uint8_t[size_t(tokens * columns * x_size)]);
    std::unique_ptr<uint8_t[]> y(new uint8_t[size_t(tokens * rows * x_size)]);
    std::unique_ptr<int32_t[]> exact_offsets(new int32_t[size_t(rows + 1)]);
    std::copy(offsets.begin(), offsets.end(), exact_offsets.get());
    for (int64_t i = 0; i < tokens * columns; ++i) store(x.get(), x_dtype, i, uniform());
    std::unique_ptr<uint8_t[]> bias(random_bits() % 2 ? new uint8_t[size_t(rows * x_size)] : nullptr);
    for (int64_t row = 0; bias && row < rows; ++row) store(bias.get(), x_dtype, row, uniform());

    secateurs_quantised_linear(given_mask, packed + mask.size(), packed_scales, exact_offsets.get(), bias.get(),
                               x.get(), y.get(), rows, columns, tokens, form.bits, int32_t(form.group), form.half,
                               x_dtype, 2, isa);
    for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t row = 0; row < rows; ++row) {
            double sum = bias ? load(bias.get(), x_dtype, row) : 0.0f, most = 0.1;  // floats carry sums of what unsigned codes add, up to some hundreds
            for (int64_t j = 0; j < columns; ++j) {
                const double weight = dense[size_t(row * columns + j)];
                sum += weight * load(x.get(), x_dtype, token * columns + j);
                most += std::abs(weight);  // activations are below one: half a step of 1/127 each
            }
            const double given = load(y.get(), x_dtype, token * rows + row);
            if (!(std::abs(given - sum) <= most * 0.0045 + std::abs(sum) * 0.004)) {
                std::printf("wrong product: %g, not %g (%d bits, group %d)\n", given, sum, form.bits, int(form.group));
                std::exit(1);
            }
        }
    }
    const int64_t first = rows / 2;
    std::unique_ptr<uint8_t[]> back(new uint8_t[size_t((rows - first) * columns * 4)]);
    secateurs_quantised_unpack(given_mask, packed + mask.size(), packed_scales, exact_offsets.get(), back.get(), first,
                               rows, columns, form.bits, int32_t(form.group), form.half, kFloat32, 2, isa);
    for (int64_t i = 0; i < (rows - first) * columns; ++i) {
        if (load(back.get(), kFloat32, i) != dense[size_t(first * columns + i)]) {
            std::printf("wrong weight (%d bits, group %d)\n", form.bits, int(form.group));
            std::exit(1);
        }
    }
}

}  // namespace

int main() {
    for (int32_t isa = 0; isa < kIsas; ++isa) {
        if (!secateurs_has_isa(isa)) continue;
        for (int32_t bits : {8, 4, 3, 2}) {
            for (int64_t group : {32, 64, 128}) {
                for (int variant = 0; variant < 4; ++variant) {
                    const Form form{bits, group, variant % 2 == 1, variant / 2 == 1};
                    if (bits == 8 && form.half) continue;
                    for (int64_t columns : {1, 63, 64, 65, 129, 320, 700}) {
                        for (double sparsity : {0.0, 0.5, 0.97, 2.0}) {
                            const int64_t tokens = 1 + int64_t(random_bits() % 20), rows = 1 + int64_t(random_bits() % 40);
                            check(form, rows, columns, tokens, sparsity, int32_t(random_bits() % kDtypes), isa,
                                  int64_t(random_bits() % 3));
                            if (!form.masked) break;
                        }
                    }
                    check(form, 1200, 700, 3, 0.5, kBfloat16, isa, 1);  // enough for two threads
                    check(form, 70, 700, 260, 0.5, kFloat32, isa, 2);   // more tokens than weights are expanded for
                }
            }
        }
    }
    std::puts("ok");
}

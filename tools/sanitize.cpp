// Drives the CPU kernels for tools/sanitize.sh: every buffer is a heap block of exactly the size that the format
// promises, so that reading or writing one byte outside of it is seen. Results are compared with a plain product.

#include "../src/secateurs/runtime/kernels.cpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

namespace {

std::mt19937 random_bits(0);

float uniform() { return std::uniform_real_distribution<float>(-1, 1)(random_bits); }

void check(int64_t rows, int64_t columns, int64_t tokens, double sparsity, int32_t dtype, int32_t x_dtype,
           int32_t isa, bool misaligned) {
    const int64_t mask_bytes = rows * padded(columns) / 8, size = size_of(dtype);
    std::vector<float> dense(size_t(rows * columns));
    std::vector<int32_t> offsets(1, 0);
    int64_t nonzeros = 0;
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t column = 0; column < columns; ++column) {
            if (std::abs(uniform()) < sparsity) continue;
            // Round to what every dtype can hold, so that the plain product sees the same weight.
            dense[size_t(row * columns + column)] = float(1 + int(random_bits() % 127)) / 64;
            ++nonzeros;
        }
        offsets.push_back(int32_t(nonzeros));
    }
    const int64_t shift = misaligned ? 1 : 0, bytes = mask_bytes + nonzeros * size + 64;
    std::unique_ptr<uint8_t[]> block(new uint8_t[size_t(bytes + shift)]());
    uint8_t* mask = block.get() + shift;
    uint8_t* values = mask + mask_bytes;
    for (int64_t i = 0, next = 0; i < rows * columns; ++i) {
        if (dense[size_t(i)] == 0) continue;
        const int64_t row = i / columns, column = i % columns;
        mask[row * padded(columns) / 8 + column / 8] |= uint8_t(1 << column % 8);
        store(values, dtype, next++, dense[size_t(i)]);
    }
    const int64_t x_size = size_of(x_dtype);
    std::unique_ptr<uint8_t[]> x(new uint8_t[size_t(tokens * columns * x_size)]);
    std::unique_ptr<uint8_t[]> y(new uint8_t[size_t(tokens * rows * x_size)]);
    std::unique_ptr<uint8_t[]> bias(new uint8_t[size_t(rows * x_size)]);
    std::unique_ptr<int32_t[]> exact_offsets(new int32_t[size_t(rows + 1)]);
    std::copy(offsets.begin(), offsets.end(), exact_offsets.get());
    for (int64_t i = 0; i < tokens * columns; ++i) store(x.get(), x_dtype, i, uniform());
    for (int64_t i = 0; i < rows; ++i) store(bias.get(), x_dtype, i, uniform());

    secateurs_linear(mask, values, exact_offsets.get(), bias.get(), x.get(), y.get(), rows, columns, tokens, dtype,
                     x_dtype, 2, isa);
    for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t row = 0; row < rows; ++row) {
            double sum = load(bias.get(), x_dtype, row), scale = 1;
            for (int64_t column = 0; column < columns; ++column) {
                const double term = double(dense[size_t(row * columns + column)]) *
                                    load(x.get(), x_dtype, token * columns + column);
                sum += term;
                scale += std::abs(term);
            }
            if (!(std::abs(load(y.get(), x_dtype, token * rows + row) - sum) <= 0.005 * scale)) {
                std::printf("wrong: isa %d, %ld x %ld, %ld tokens\n", isa, long(rows), long(columns), long(tokens));
                std::exit(1);
            }
        }
    }
    const int64_t first = rows / 3;
    std::unique_ptr<uint8_t[]> unpacked(new uint8_t[size_t((rows - first) * columns * size)]);
    secateurs_unpack(mask, values, exact_offsets.get(), unpacked.get(), first, rows, columns, dtype, 2, isa);
    for (int64_t i = 0; i < (rows - first) * columns; ++i) {
        if (load(unpacked.get(), dtype, i) != dense[size_t(first * columns + i)]) {
            std::printf("wrong: unpack, isa %d, %ld x %ld\n", isa, long(rows), long(columns));
            std::exit(1);
        }
    }
}

}  // namespace

int main() {
    const int64_t shapes[][2] = {{1, 1}, {1, 64}, {3, 31}, {5, 63}, {4, 65}, {2, 127}, {17, 100}, {9, 1000}, {40, 300}};
    long checks = 0;
    std::vector<int32_t> isas;
    for (int32_t isa = 0; isa < kIsas; ++isa)
        if (secateurs_has_isa(isa)) isas.push_back(isa);
    for (int32_t isa : isas)
        for (int32_t dtype = 0; dtype < kDtypes; ++dtype)
            for (int32_t x_dtype = 0; x_dtype < kDtypes; ++x_dtype)
                for (const auto& shape : shapes)
                    for (double sparsity : {0.0, 0.5, 0.95, 1.0})
                        for (int64_t tokens : {1, 2, 7, 8, 9, 17, 260})
                            for (bool misaligned : {false, true}) {
                                check(shape[0], shape[1], tokens, sparsity, dtype, x_dtype, isa, misaligned);
                                ++checks;
                            }
    // Large enough for two threads.
    for (int32_t isa : isas) check(301, 2049, 3, 0.5, kBfloat16, kBfloat16, isa, false);
    std::printf("ok: %ld products and expansions, %d instruction sets\n", checks, int(isas.size()));
}

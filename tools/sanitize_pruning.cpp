// Drives the CPU kernels of pruning for tools/sanitize.sh: every buffer is a heap block of exactly the size that is
// promised, so that reading or writing one element outside of it is seen. Results are compared with plain loops.

#include "../src/secateurs/pruning/solvers/products.cpp"
#include "../src/secateurs/pruning/solvers/sweep.cpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

namespace {

std::mt19937 random_bits(0);

void expect(bool right, const char* what) {
    if (right) return;
    std::fprintf(stderr, "%s differs\n", what);
    std::exit(1);
}

// Small whole numbers, which bfloat16 holds and whose sums float32 holds.
std::unique_ptr<uint16_t[]> matrix(int64_t tokens, int64_t stride, int64_t width) {
    const int64_t size = (tokens - 1) * stride + width;
    std::unique_ptr<uint16_t[]> values(new uint16_t[size_t(size)]);
    for (int64_t i = 0; i < size; ++i) {
        const float value = float(int(random_bits() % 9) - 4);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        values[size_t(i)] = uint16_t(bits >> 16);
    }
    return values;
}

float value_of(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

void check_products(int64_t tokens, int64_t a_width, int64_t b_width, int64_t beside, int32_t threads) {
    const int64_t a_stride = a_width + beside, b_stride = b_width + 2 * beside;
    const auto a = matrix(tokens, a_stride, a_width), b = matrix(tokens, b_stride, b_width);
    const int64_t most = secateurs_products_scratch(a_width, std::max(a_width, b_width));
    std::unique_ptr<uint32_t[]> scratch(new uint32_t[size_t(most)]);
    std::unique_ptr<float[]> out(new float[size_t(a_width * b_width)]);
    std::fill_n(out.get(), a_width * b_width, 8.0f);
    secateurs_products(out.get(), a.get(), a_stride, a_width, b.get(), b_stride, b_width, tokens, 0.5f, 0.25f, 0,
                       scratch.get(), threads);
    for (int64_t i = 0; i < a_width; ++i) {
        for (int64_t j = 0; j < b_width; ++j) {
            float sum = 0;
            for (int64_t t = 0; t < tokens; ++t) {
                sum += value_of(a[size_t(t * a_stride + i)]) * value_of(b[size_t(t * b_stride + j)]);
            }
            expect(out[size_t(i * b_width + j)] == 4 + sum / 4, "a product");
        }
    }
    std::unique_ptr<float[]> square(new float[size_t(a_width * a_width)]());
    secateurs_products(square.get(), a.get(), a_stride, a_width, a.get(), a_stride, a_width, tokens, 0, 1, 1,
                       scratch.get(), threads);
    for (int64_t i = 0; i < a_width; ++i) {
        for (int64_t j = i; j < a_width; ++j) {
            float sum = 0;
            for (int64_t t = 0; t < tokens; ++t) {
                sum += value_of(a[size_t(t * a_stride + i)]) * value_of(a[size_t(t * a_stride + j)]);
            }
            expect(square[size_t(i * a_width + j)] == sum, "a triangle");
        }
    }
}

void check_sweep(int64_t outputs, int64_t columns, int64_t n, int64_t m, int32_t threads, int32_t isa) {
    const int64_t size = columns * outputs;
    std::unique_ptr<float[]> weight(new float[size_t(size)]), inverse(new float[size_t(columns * columns)]());
    std::unique_ptr<uint8_t[]> keep(m ? nullptr : new uint8_t[size_t(size)]);
    for (int64_t i = 0; i < size; ++i) weight[size_t(i)] = float(1 + int(random_bits() % 100));
    for (int64_t i = 0; i < size && !m; ++i) keep[size_t(i)] = uint8_t(random_bits() % 2);
    for (int64_t j = 0; j < columns; ++j) inverse[size_t(j * columns + j)] = 1;  // then a mask is all there is to it
    std::unique_ptr<float[]> before(new float[size_t(size)]);
    std::copy_n(weight.get(), size, before.get());
    secateurs_sweep(weight.get(), inverse.get(), keep.get(), outputs, columns, n, m, threads, isa);
    for (int64_t r = 0; r < outputs; ++r) {
        for (int64_t j = 0; j < columns; ++j) {
            bool stays = !m && keep[size_t(j * outputs + r)];
            if (m) {
                const float own = before[size_t(j * outputs + r)];
                int64_t ahead = 0;
                for (int64_t i = j / m * m; i < j / m * m + m; ++i) {
                    const float rival = before[size_t(i * outputs + r)];
                    ahead += rival > own || (rival == own && i < j);
                }
                stays = ahead < n;
            }
            const float expected = stays ? before[size_t(j * outputs + r)] : 0;
            expect(weight[size_t(j * outputs + r)] == expected, "a sweep");
        }
    }
}

}  // namespace

int main() {
    for (int32_t threads : {1, 3}) {
        if (secateurs_products_scratch(1, 1)) {
            for (int64_t tokens : {1, 2, 255, 256, 257, 600}) {
                check_products(tokens, 1, 1, 0, threads);
                check_products(tokens, 8, 48, 1, threads);
                check_products(tokens, 9, 49, 0, threads);
                check_products(tokens, 137, 65, 3, threads);
            }
        }
        for (int32_t isa : {0, 1, 2}) {
            for (int64_t outputs : {1, 31, 32, 33, 70}) {
                check_sweep(outputs, 1, 0, 0, threads, isa);
                check_sweep(outputs, 37, 0, 0, threads, isa);
                check_sweep(outputs, 12, 2, 4, threads, isa);
                check_sweep(outputs, 15, 3, 5, threads, isa);
            }
        }
    }
    std::puts("ok");
}

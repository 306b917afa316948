// A bitmask against a 16-bit column index per non-zero, at high sparsity: is a second layout worth having?
//
// One token through a matrix of 44032 x 4096 bfloat16 weights, one thread, best of 15. The bitmask kernel is the
// library's; the index kernel gathers 32 columns at a time with AVX-512, and rows are otherwise the same.
//
//     g++ -O3 -std=c++17 -w benchmarks/layouts.cpp -o layouts && ./layouts > benchmarks/results/layouts.json

#include "../src/secateurs/runtime/kernels.cpp"

#include <chrono>
#include <cstdio>
#include <random>

namespace {

// Sixteen products with the columns that the indices name.
AVX512 __m512 gathered(const uint16_t* values, const uint16_t* indices, const float* x) {
    const __m256i* narrow = reinterpret_cast<const __m256i*>(values);
    const __m512i value = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(narrow)), 16);
    const __m256i* places = reinterpret_cast<const __m256i*>(indices);
    const __m512i column = _mm512_cvtepu16_epi32(_mm256_loadu_si256(places));
    return _mm512_mul_ps(_mm512_castsi512_ps(value), _mm512_i32gather_ps(column, x, 4));
}

AVX512 float row_indexed(const uint16_t* values, const uint16_t* indices, int count, const float* x) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    int i = 0;
    for (; i + 32 <= count; i += 32) {
        even = _mm512_add_ps(even, gathered(values + i, indices + i, x));
        odd = _mm512_add_ps(odd, gathered(values + i + 16, indices + i + 16, x));
    }
    float sum = _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
    for (; i < count; ++i) sum += load(values + i, kBfloat16, 0) * x[indices[i]];
    return sum;
}

template <class Run>
double best_ms(const Run& run) {
    double best = 1e9;
    for (int round = 0; round < 15; ++round) {
        const auto start = std::chrono::steady_clock::now();
        run();
        const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;
        best = std::min(best, elapsed.count());
    }
    return best;
}

}  // namespace

int main() {
    constexpr int64_t kRows = 44032, kColumns = 4096;
    const double sparsities[] = {0.7, 0.8, 0.85, 0.9, 0.95};
    std::printf("{\n \"rows\": [");
    for (double sparsity : sparsities) {
        std::mt19937 random(0);
        std::vector<uint8_t> mask(kRows * kColumns / 8);
        std::vector<uint16_t> indices, values;
        std::vector<int32_t> offsets(1, 0);
        for (int64_t i = 0; i < kRows * kColumns; ++i) {
            if (random() >= sparsity * 4294967295.0) {
                mask[size_t(i / 8)] |= uint8_t(1 << i % 8);
                indices.push_back(uint16_t(i % kColumns));
                values.push_back(to_bfloat16(float(random() % 100) / 100));
            }
            if ((i + 1) % kColumns == 0) offsets.push_back(int32_t(values.size()));
        }
        const size_t mask_layout = mask.size() + 2 * values.size(), index_layout = 4 * values.size();
        values.resize(values.size() + 32);
        indices.resize(values.size());
        const std::vector<uint16_t> x(kColumns, to_bfloat16(1));
        const std::vector<float> wide(kColumns, 1);
        std::vector<uint16_t> y(kRows);
        const double bitmask = best_ms([&] {
            secateurs_linear(mask.data(), reinterpret_cast<const uint8_t*>(values.data()), offsets.data(), nullptr,
                             x.data(), y.data(), kRows, kColumns, 1, kBfloat16, kBfloat16, 1, secateurs_has_isa(kAvx512Bf16) ? kAvx512Bf16 : kAvx512);
        });
        const double index = best_ms([&] {
            for (int64_t row = 0; row < kRows; ++row) {
                const int32_t begin = offsets[size_t(row)], end = offsets[size_t(row + 1)];
                y[size_t(row)] =
                    to_bfloat16(row_indexed(values.data() + begin, indices.data() + begin, end - begin, wide.data()));
            }
        });
        std::printf("%s\n  {\"sparsity\": %.2f, \"bitmask_ms\": %.3f, \"index_ms\": %.3f, \"bitmask_bytes\": %zu, "
                    "\"index_bytes\": %zu}",
                    sparsity == sparsities[0] ? "" : ",", sparsity, bitmask, index, mask_layout, index_layout);
    }
    std::printf("\n ]\n}\n");
}

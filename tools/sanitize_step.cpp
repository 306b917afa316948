// Drives the call for one token through awkward shapes, as sanitize.cpp does the products: every buffer is a heap
// block of exactly the size that it is promised to have. (Whether the results are right, the tests ask.)

#include "../src/secateurs/runtime/kernels.cpp"
#include "../src/secateurs/runtime/step.cpp"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

// Codes are driven by sanitize_codes.cpp.
EXPORT void secateurs_quantised_linear(const uint8_t*, const uint8_t*, const uint8_t*, const int32_t*, const void*,
                                       const void*, void*, int64_t, int64_t, int64_t, int32_t, int32_t, int32_t,
                                       int32_t, int32_t, int32_t) {
    std::abort();
}

namespace {

std::mt19937 random_bits(0);
std::vector<std::unique_ptr<uint8_t[]>> held;

uint8_t* block_of(int64_t bytes) {
    held.emplace_back(new uint8_t[size_t(bytes)]());
    return held.back().get();
}

uint8_t* numbers(int64_t count, int32_t dtype, float size) {
    uint8_t* made = block_of(count * size_of(dtype));
    for (int64_t i = 0; i < count; ++i) {
        store(made, dtype, i, size * std::uniform_real_distribution<float>(-1, 1)(random_bits));
    }
    return made;
}

Linear matrix(int64_t rows, int64_t columns, int32_t dtype) {
    const int64_t width = padded(columns);
    std::vector<uint8_t> mask(size_t(rows * width / 8));
    std::vector<int32_t> offsets(1, 0);
    for (int64_t row = 0; row < rows; ++row) {
        int32_t count = offsets.back();
        for (int64_t j = 0; j < columns; ++j) {
            if (random_bits() % 2) continue;
            mask[size_t(row * width / 8 + j / 8)] |= uint8_t(1 << j % 8);
            ++count;
        }
        offsets.push_back(count);
    }
    uint8_t* packed = block_of(int64_t(mask.size()) + offsets.back() * size_of(dtype) + 64);
    std::copy(mask.begin(), mask.end(), packed);
    uint8_t* values = packed + mask.size();
    for (int64_t i = 0; i < offsets.back(); ++i) {
        store(values, dtype, i, std::uniform_real_distribution<float>(-1, 1)(random_bits));
    }
    int32_t* exact = reinterpret_cast<int32_t*>(block_of(4 * (rows + 1)));
    std::copy(offsets.begin(), offsets.end(), exact);
    return {packed, values, nullptr, exact, nullptr, rows, columns, dtype, 0, 0, 0};
}

void check(const Shape& shape, int32_t dtype, int32_t isa) {
    const int64_t queries = shape.heads * shape.head_size, keys = shape.key_heads * shape.head_size, tokens = 20;
    std::vector<Block> blocks;
    const auto norm = [&](int64_t size, bool there) {
        return Norm{there ? numbers(size, dtype, 1) : nullptr, 1e-5f, int32_t(random_bits() % 2)};
    };
    for (int64_t i = 0; i < shape.blocks; ++i) {
        const bool more = i % 2;
        Block block{};
        block.query = matrix(queries, shape.width, dtype);
        block.key = matrix(keys, shape.width, dtype);
        block.value = matrix(keys, shape.width, dtype);
        block.output = matrix(shape.width, queries, dtype);
        block.gate = matrix(shape.channels, shape.width, dtype);
        block.up = matrix(shape.channels, shape.width, dtype);
        block.down = matrix(shape.width, shape.channels, dtype);
        block.attention_norm = norm(shape.width, true);
        block.mlp_norm = norm(shape.width, true);
        block.query_norm = norm(shape.head_size, more);
        block.key_norm = norm(shape.head_size, more);
        block.attended_norm = norm(shape.width, more);
        block.mlp_made_norm = norm(shape.width, more);
        block.keys = block_of(keys * tokens * size_of(dtype));
        block.values = block_of(keys * tokens * size_of(dtype));
        block.room = tokens;
        block.cosines = more ? nullptr : numbers(shape.head_size, dtype, 1);
        block.sines = more ? nullptr : numbers(shape.head_size, dtype, 1);
        block.scaling = 0.3f;
        block.residual = 0.5f;
        blocks.push_back(block);
    }
    const Norm last = norm(shape.width, true);
    for (int64_t length = 0; length < tokens; ++length) {
        uint8_t* hidden = numbers(shape.width, dtype, 1);
        for (Block& block : blocks) block.length = length;
        secateurs_step(blocks.data(), &shape, &last, hidden, dtype, 2, isa);
        for (int64_t i = 0; i < shape.width; ++i) {
            if (!std::isfinite(load(hidden, dtype, i))) {
                std::puts("not finite");
                std::exit(1);
            }
        }
    }
    held.clear();
}

}  // namespace

int main() {
    for (int32_t isa = 0; isa < kIsas; ++isa) {
        if (!secateurs_has_isa(isa)) continue;
        for (int32_t dtype = 0; dtype < kDtypes; ++dtype) {
            for (int64_t size : {2, 16, 24, 66}) {
                for (int64_t width : {1, 63, 80, 129}) {
                    const int64_t key_heads = 1 + int64_t(random_bits() % 3);
                    const int64_t heads = key_heads * (1 + int64_t(random_bits() % 3));
                    check({2, width, 1 + int64_t(random_bits() % 200), heads, key_heads, size, int64_t(random_bits() % 2)},
                          dtype, isa);
                }
            }
        }
    }
    std::puts("ok");
}

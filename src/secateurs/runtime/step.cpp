// One token through all blocks of a Llama-like decoder, in one call.
//
// With few bits a weight a block's products take some tens of microseconds each, and a framework's own work
// between them takes as long. Here it is next to nothing: norms, rotation, attention over the keys and values so
// far, and the gated MLP are plain loops over vectors, and the products are those of kernels.cpp and
// quantised.cpp. Every intermediate is rounded to the model's dtype where the model's own code rounds it.

#include "kernels.h"

#include <cmath>

EXPORT void secateurs_linear(const uint8_t*, const uint8_t*, const int32_t*, const void*, const void*, void*, int64_t,
                             int64_t, int64_t, int32_t, int32_t, int32_t, int32_t);
EXPORT void secateurs_quantised_linear(const uint8_t*, const uint8_t*, const uint8_t*, const int32_t*, const void*,
                                       const void*, void*, int64_t, int64_t, int64_t, int32_t, int32_t, int32_t,
                                       int32_t, int32_t, int32_t);

// As step.py has them.

struct Linear {
    const uint8_t *mask, *values, *scales;  // without scales the values are of `dtype`
    const int32_t* offsets;
    const void* bias;  // null without one
    int64_t rows, columns;
    int32_t dtype, bits, group, half;
};

struct Norm {
    const void* weight;  // null without one
    float epsilon;
    int32_t from_one;  // the weight is what is added to 1, and nothing is rounded before it
};

struct Block {
    Linear query, key, value, output, gate, up, down;
    Norm attention_norm, mlp_norm, query_norm, key_norm;
    Norm attended_norm, mlp_made_norm;  // of what attention and MLP make
    void *keys, *values;  // (key heads, room, head size) each
    int64_t room, length;  // of them there are `length`
    const void *cosines, *sines;  // (head size), of the position; null where heads are not turned
    float scaling, residual;  // of scores, and of what is added to the hidden state
};

struct Shape {
    int64_t blocks, width, channels, heads, key_heads, head_size;
    int64_t gelu;  // by tanh; otherwise SiLU
};

namespace {

constexpr int kSums = 16;  // partial sums, which a compiler may keep in one vector

template <int32_t D>
INLINE float rounded(float value) {
    if constexpr (D == kBfloat16) return float_from_bits(uint32_t(to_bfloat16(value)) << 16);
    if constexpr (D == kFloat16) return from_half(to_half(value));
    return value;
}

INLINE float total(const float* sums) {
    float all = 0.0f;
    for (int i = 0; i < kSums; ++i) all += sums[i];
    return all;
}

// Right to a few units in the last place between -87 and 88, and beyond them what it is there.
INLINE float exponential(float given) {
    const float x = std::max(-87.0f, std::min(88.0f, given));
    constexpr float kShift = 12582912.0f;
    const float count = (x * 1.44269504f + kShift) - kShift;
    const float rest = (x - count * 0.693359375f) + count * 2.12194440e-4f;
    float power = 1.9875691500e-4f;
    power = power * rest + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
    const float result = float_from_bits(bits_from_float(power) + (uint32_t(int32_t(count)) << 23));
    return given == given ? result : given;  // NaN must not get lost
}

// x / sqrt(mean of squares) * weight, in place of `y`; without a weight y is x.
template <int32_t D>
INLINE void normalise(const void* x, const Norm& norm, int64_t count, void* y) {
    float squares[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= count; i += kSums) {
        for (int lane = 0; lane < kSums; ++lane) {
            const float value = load(x, D, i + lane);
            squares[lane] += value * value;
        }
    }
    float sum = total(squares);
    for (; i < count; ++i) sum += load(x, D, i) * load(x, D, i);
    const float factor = 1.0f / std::sqrt(sum / float(count) + norm.epsilon);
    if (norm.from_one) {
        for (i = 0; i < count; ++i) store(y, D, i, load(x, D, i) * factor * (1.0f + load(norm.weight, D, i)));
        return;
    }
    for (i = 0; i < count; ++i) {
        store(y, D, i, load(norm.weight, D, i) * rounded<D>(load(x, D, i) * factor));
    }
}

// Each head: halves turned into each other by the position's angles.
template <int32_t D>
INLINE void rotate(void* x, const void* cosines, const void* sines, int64_t heads, int64_t size) {
    for (int64_t head = 0; head < heads; ++head) {
        for (int64_t i = 0; i < size / 2; ++i) {
            const int64_t first = head * size + i, second = first + size / 2;
            const float a = load(x, D, first), b = load(x, D, second);
            const float turned = rounded<D>(a * load(cosines, D, i)) + rounded<D>(-b * load(sines, D, i));
            const float other = rounded<D>(b * load(cosines, D, i + size / 2)) +
                                rounded<D>(a * load(sines, D, i + size / 2));
            store(x, D, first, turned);
            store(x, D, second, other);
        }
    }
}

// One head's query over all positions: softmax of the products with keys, times the values.
template <int32_t D>
INLINE void attend(const void* query, const void* keys, const void* values, int64_t length, int64_t size,
                   float scaling, float* scores, float* sums, void* output) {
    float most = -INFINITY;
    for (int64_t i = 0; i < size; ++i) sums[i] = load(query, D, i);
    for (int64_t at = 0; at < length; ++at) {
        float products[kSums] = {};
        int64_t i = 0;
        for (; i + kSums <= size; i += kSums) {
            for (int lane = 0; lane < kSums; ++lane) {
                products[lane] += sums[i + lane] * load(keys, D, at * size + i + lane);
            }
        }
        float score = total(products);
        for (; i < size; ++i) score += sums[i] * load(keys, D, at * size + i);
        scores[at] = score * scaling;
        most = std::max(most, scores[at]);
    }
    float shares[kSums] = {};
    int64_t at = 0;
    for (; at + kSums <= length; at += kSums) {
        for (int lane = 0; lane < kSums; ++lane) shares[lane] += scores[at + lane] = exponential(scores[at + lane] - most);
    }
    float all = total(shares);
    for (; at < length; ++at) all += scores[at] = exponential(scores[at] - most);
    for (int64_t i = 0; i < size; ++i) sums[i] = 0.0f;
    for (at = 0; at < length; ++at) {
        for (int64_t i = 0; i < size; ++i) sums[i] += scores[at] * load(values, D, at * size + i);
    }
    for (int64_t i = 0; i < size; ++i) store(output, D, i, sums[i] / all);
}

// GELU by tanh is x times the sigmoid of twice what tanh is of.
template <int32_t D>
INLINE void gated(const void* gate, const void* up, bool gelu, int64_t count, void* y) {
    const float linear = gelu ? 1.5957691216f : 1.0f, cubic = gelu ? 0.0713548163f : 0.0f;
    for (int64_t i = 0; i < count; ++i) {
        const float value = load(gate, D, i), inner = value * (linear + cubic * value * value);
        store(y, D, i, rounded<D>(value / (1.0f + exponential(-inner))) * load(up, D, i));
    }
}

template <int32_t D>
INLINE void add(const void* x, float factor, int64_t count, void* y) {
    for (int64_t i = 0; i < count; ++i) store(y, D, i, load(y, D, i) + rounded<D>(load(x, D, i) * factor));
}

void multiply(const Linear& w, const void* x, void* y, int32_t dtype, int32_t threads, int32_t isa) {
    if (w.scales) {
        secateurs_quantised_linear(w.mask, w.values, w.scales, w.offsets, w.bias, x, y, w.rows, w.columns, 1, w.bits,
                                   w.group, w.half, dtype, threads, isa);
    } else {
        secateurs_linear(w.mask, w.values, w.offsets, w.bias, x, y, w.rows, w.columns, 1, w.dtype, dtype, threads,
                         isa);
    }
}

// The loops of a step, compiled for an instruction set.
struct Loops {
    void (*normalise)(const void* x, const Norm& norm, int64_t count, void* y);
    void (*rotate)(void* x, const void* cosines, const void* sines, int64_t heads, int64_t size);
    void (*attend)(const void* query, const void* keys, const void* values, int64_t length, int64_t size,
                   float scaling, float* scores, float* sums, void* output);
    void (*gated)(const void* gate, const void* up, bool gelu, int64_t count, void* y);
    void (*add)(const void* x, float factor, int64_t count, void* y);
};

#define LOOPS(NAME, TARGET)                                                                                          \
    template <int32_t D>                                                                                             \
    struct NAME {                                                                                                    \
        TARGET static void normalised(const void* x, const Norm& norm, int64_t count, void* y) {                     \
            normalise<D>(x, norm, count, y);                                                                         \
        }                                                                                                            \
        TARGET static void rotated(void* x, const void* cosines, const void* sines, int64_t heads, int64_t size) {   \
            rotate<D>(x, cosines, sines, heads, size);                                                               \
        }                                                                                                            \
        TARGET static void attended(const void* query, const void* keys, const void* values, int64_t length,         \
                                    int64_t size, float scaling, float* scores, float* sums, void* output) {         \
            attend<D>(query, keys, values, length, size, scaling, scores, sums, output);                             \
        }                                                                                                            \
        TARGET static void gate(const void* x, const void* up, bool gelu, int64_t count, void* y) {                  \
            gated<D>(x, up, gelu, count, y);                                                                         \
        }                                                                                                            \
        TARGET static void added(const void* x, float factor, int64_t count, void* y) { add<D>(x, factor, count, y); } \
        static Loops all() { return {normalised, rotated, attended, gate, added}; }                                  \
    };

LOOPS(PlainLoops, )
#ifdef SECATEURS_X86
LOOPS(Avx2Loops, AVX2)
LOOPS(Avx512Loops, AVX512)
#endif

template <int32_t D>
Loops loops_of(int32_t isa) {
#ifdef SECATEURS_X86
    if (isa >= kAvx512) return Avx512Loops<D>::all();
    if (isa >= kAvx2) return Avx2Loops<D>::all();
#endif
    (void)isa;
    return PlainLoops<D>::all();
}

Loops loops_for(int32_t isa, int32_t dtype) {
    if (dtype == kFloat32) return loops_of<kFloat32>(isa);
    return dtype == kBfloat16 ? loops_of<kBfloat16>(isa) : loops_of<kFloat16>(isa);
}

}  // namespace

// `hidden` (width), of one token, becomes the last block's output, normalised; its keys and values are put behind
// those that there are. All in `dtype`.
EXPORT void secateurs_step(const Block* blocks, const Shape* shape, const Norm* norm, void* hidden, int32_t dtype,
                           int32_t threads, int32_t isa) {
    const Loops loops = loops_for(isa, dtype);
    const int64_t size = shape->head_size, each = size_of(dtype), queries = shape->heads * size;
    const int64_t shared = shape->heads / shape->key_heads, keys = shape->key_heads * size;
    std::vector<CacheLine> room(size_t((3 * std::max(shape->width, queries) + 2 * keys + 2 * shape->channels) * 4 / 64 + 8));
    uint8_t* next = room[0].bytes;
    const auto vector_of = [&](int64_t count) {
        uint8_t* start = next;
        next += (count * each + 63) / 64 * 64;
        return start;
    };
    uint8_t *x = vector_of(shape->width), *query = vector_of(queries), *mixed = vector_of(std::max(shape->width, queries));
    uint8_t *key = vector_of(keys), *value = vector_of(keys);
    uint8_t *gate = vector_of(shape->channels), *up = vector_of(shape->channels);
    const auto product = [&](const Linear& weight, const void* from, void* to) {
        multiply(weight, from, to, dtype, threads, isa);
    };
    for (const Block* block = blocks; block < blocks + shape->blocks; ++block) {
        loops.normalise(hidden, block->attention_norm, shape->width, x);
        product(block->query, x, query);
        product(block->key, x, key);
        product(block->value, x, value);
        for (int64_t head = 0; block->query_norm.weight && head < shape->heads; ++head) {
            loops.normalise(query + head * size * each, block->query_norm, size, query + head * size * each);
        }
        for (int64_t head = 0; block->key_norm.weight && head < shape->key_heads; ++head) {
            loops.normalise(key + head * size * each, block->key_norm, size, key + head * size * each);
        }
        if (block->cosines) {
            loops.rotate(query, block->cosines, block->sines, shape->heads, size);
            loops.rotate(key, block->cosines, block->sines, shape->key_heads, size);
        }
        const int64_t bytes = size * each, apart = block->room * bytes, length = block->length;
        uint8_t *all_keys = static_cast<uint8_t*>(block->keys), *all_values = static_cast<uint8_t*>(block->values);
        for (int64_t head = 0; head < shape->key_heads; ++head) {
            std::memcpy(all_keys + head * apart + length * bytes, key + head * bytes, size_t(bytes));
            std::memcpy(all_values + head * apart + length * bytes, value + head * bytes, size_t(bytes));
        }
        shared_out(shape->heads, 2 * shape->heads * (length + 1) * bytes, threads, [&](int64_t begin, int64_t end) {
            std::vector<float> scores(size_t(length + 1 + size));
            for (int64_t head = begin; head < end; ++head) {
                const int64_t from = head / shared * apart;
                loops.attend(query + head * bytes, all_keys + from, all_values + from, length + 1, size,
                             block->scaling, scores.data() + size, scores.data(), mixed + head * bytes);
            }
        });
        product(block->output, mixed, x);
        if (block->attended_norm.weight) loops.normalise(x, block->attended_norm, shape->width, x);
        loops.add(x, block->residual, shape->width, hidden);
        loops.normalise(hidden, block->mlp_norm, shape->width, x);
        product(block->gate, x, gate);
        product(block->up, x, up);
        loops.gated(gate, up, shape->gelu != 0, shape->channels, gate);
        product(block->down, gate, x);
        if (block->mlp_made_norm.weight) loops.normalise(x, block->mlp_made_norm, shape->width, x);
        loops.add(x, block->residual, shape->width, hidden);
    }
    loops.normalise(hidden, *norm, shape->width, hidden);
}

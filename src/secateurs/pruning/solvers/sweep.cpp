// Sweeps over one block of columns, on the CPU: SparseGPT's, and rounding to a grid.
//
// A thread holds a few outputs and all columns of the block in its cache from start to end, where a loop over
// columns in torch passes over memory, and through Python, for each of them. Outputs do not depend on each other,
// so the result is the same for any number of threads.
//
// A plain C interface over pointers: no torch headers, hence no rebuild when torch changes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define SECATEURS_X86 1
#define AVX2 __attribute__((target("avx2,fma")))
#if defined(__clang__)  // which takes the widest vectors by itself
#define AVX512 __attribute__((target("avx512f,avx512vl,fma")))
#else
#define AVX512 __attribute__((target("avx512f,avx512vl,fma,prefer-vector-width=512")))
#endif
#endif

#if defined(__GNUC__)
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define EXPORT extern "C" __attribute__((visibility("default")))
#else
#define ALWAYS_INLINE inline
#define EXPORT extern "C" __declspec(dllexport)
#endif

namespace {

constexpr int64_t kTile = 32;  // outputs swept together: 128 columns of them take 16 KiB, and what stays as much

enum Isa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

struct Block {
    float* weight;         // (columns, outputs)
    const float* inverse;  // (columns, columns), upper triangular
    const uint8_t* keep;   // (columns, outputs), 1 where a weight stays; not read where m is set
    int64_t outputs, columns;
    int64_t n, m;  // of n:m; m is 0 for an unstructured pattern
};

// Mark the n largest of every output's m scores; of equal ones the first.
ALWAYS_INLINE void choose(const Block& block, const float* tile, float* stays, int64_t first) {
    for (int64_t j = first; j < first + block.m; ++j) {
        int32_t ahead[kTile] = {};
        const float own = block.inverse[j * block.columns + j];
        for (int64_t i = first; i < first + block.m; ++i) {
            const float scale = block.inverse[i * block.columns + i];
            for (int64_t r = 0; r < kTile; ++r) {
                const float rival = std::fabs(tile[i * kTile + r]) / scale;
                const float score = std::fabs(tile[j * kTile + r]) / own;
                ahead[r] += int32_t(rival > score) | (int32_t(rival == score) & int32_t(i < j));
            }
        }
        for (int64_t r = 0; r < kTile; ++r) stays[j * kTile + r] = ahead[r] < block.n ? 1.0f : 0.0f;
    }
}

// Sweep `count` outputs from `first` on. `scratch` is (2, columns, kTile).
ALWAYS_INLINE void sweep_tile(const Block& block, int64_t first, float* scratch) {
    const int64_t columns = block.columns, count = std::min(kTile, block.outputs - first);
    float *tile = scratch, *stays = scratch + columns * kTile;
    for (int64_t j = 0; j < columns; ++j) {
        for (int64_t r = 0; r < kTile; ++r) {
            const int64_t at = j * block.outputs + first + r;
            tile[j * kTile + r] = r < count ? block.weight[at] : 0.0f;
            stays[j * kTile + r] = r < count && !block.m ? float(block.keep[at]) : 0.0f;
        }
    }
    for (int64_t j = 0; j < columns; ++j) {
        if (block.m && j % block.m == 0) choose(block, tile, stays, j);
        const float* row = block.inverse + j * columns;
        float error[kTile];
        for (int64_t r = 0; r < kTile; ++r) {
            error[r] = tile[j * kTile + r] * ((1.0f - stays[j * kTile + r]) / row[j]);
        }
        for (int64_t k = j + 1; k < columns; ++k) {
            for (int64_t r = 0; r < kTile; ++r) tile[k * kTile + r] -= row[k] * error[r];
        }
    }
    for (int64_t j = 0; j < columns; ++j) {
        for (int64_t r = 0; r < count; ++r) {
            block.weight[j * block.outputs + first + r] = tile[j * kTile + r] * stays[j * kTile + r];
        }
    }
}

// The same for each instruction set: the compiler vectorises the loops over outputs for the widest it may use.
void sweep_portable(const Block& block, int64_t first, float* scratch) { sweep_tile(block, first, scratch); }

#ifdef SECATEURS_X86
AVX2 void sweep_avx2(const Block& block, int64_t first, float* scratch) {
    sweep_tile(block, first, scratch);
}

AVX512 void sweep_avx512(const Block& block, int64_t first, float* scratch) {
    sweep_tile(block, first, scratch);
}
#endif

// ---- rounding ----

struct Grid {
    float lowest, step, last;  // the level of code 0, from one level to the next, the last code
};

// The level nearest to x. Adding and taking away 1.5 * 2^23 rounds, to even where it is halfway.
ALWAYS_INLINE float level_of(float x, Grid grid) {
    const float code = std::min(std::max((x - grid.lowest) / grid.step, 0.0f), grid.last);
    return ((code + 12582912.0f) - 12582912.0f) * grid.step + grid.lowest;
}

ALWAYS_INLINE float as_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    std::memcpy(&value, &bits, 4);
    return value;
}

ALWAYS_INLINE float live(float divisor) { return divisor == 0.0f ? 1.0f : divisor; }

struct Group {
    float* weight;            // (columns, outputs)
    const float* before;      // (columns, outputs), or null for the weight itself
    const uint8_t* keep;      // (columns, outputs)
    float* scale;             // (outputs,)
    const float* push;        // (columns, columns), above the diagonal
    const float* importance;  // (columns,)
    const float* trials;      // (trials,): of the largest weight, which scales are tried
    int64_t outputs, columns, tried, refits;
    Grid grid;
};

// Round columns one after the other, and push what each changes by.
ALWAYS_INLINE void settle_tile(const Group& group, int64_t first, float* tile) {
    const int64_t columns = group.columns, count = std::min(kTile, group.outputs - first);
    float scale[kTile], inverse[kTile];
    for (int64_t r = 0; r < kTile; ++r) {
        scale[r] = r < count ? group.scale[first + r] : 0.0f;
        inverse[r] = 1.0f / live(scale[r]);
    }
    for (int64_t j = 0; j < columns; ++j) {
        for (int64_t r = 0; r < kTile; ++r) {
            tile[j * kTile + r] = r < count ? group.weight[j * group.outputs + first + r] : 0.0f;
        }
    }
    for (int64_t j = 0; j < columns; ++j) {
        float* own = tile + j * kTile;
        float change[kTile], stays[kTile];
        for (int64_t r = 0; r < kTile; ++r) {
            const int64_t at = j * group.outputs + first + r;
            stays[r] = r < count ? float(group.keep[at]) : 0.0f;
            change[r] = r < count && group.before ? group.before[at] : own[r];
        }
        for (int64_t r = 0; r < kTile; ++r) {
            own[r] = level_of(own[r] * inverse[r], group.grid) * scale[r] * stays[r];
            change[r] -= own[r];
        }
        const float* row = group.push + j * columns;
        for (int64_t k = j + 1; k < columns; ++k) {
            for (int64_t r = 0; r < kTile; ++r) tile[k * kTile + r] += row[k] * change[r];
        }
    }
    for (int64_t j = 0; j < columns; ++j) {
        for (int64_t r = 0; r < count; ++r) group.weight[j * group.outputs + first + r] = tile[j * kTile + r];
    }
}

// Choose the scales: the best of some, then least squares for the levels that it leads to, a few times.
ALWAYS_INLINE void scales_tile(const Group& group, int64_t first, float* scratch) {
    const int64_t columns = group.columns, count = std::min(kTile, group.outputs - first);
    float *tile = scratch, *counts = scratch + columns * kTile;
    float largest[kTile] = {}, best[kTile] = {}, least[kTile];
    for (int64_t r = 0; r < kTile; ++r) least[r] = INFINITY;
    for (int64_t j = 0; j < columns; ++j) {
        for (int64_t r = 0; r < kTile; ++r) {
            const int64_t at = j * group.outputs + first + r;
            const bool kept = r < count && group.keep[at] && group.importance[j] != 0.0f;
            tile[j * kTile + r] = kept ? group.weight[at] : 0.0f;
            counts[j * kTile + r] = kept ? group.importance[j] : 0.0f;
            largest[r] = std::max(largest[r], std::fabs(tile[j * kTile + r]));
        }
    }
    float along[kTile] = {}, square[kTile] = {};  // of the best: its levels with the weights, and themselves
    for (int64_t trial = 0; trial < group.tried + group.refits; ++trial) {
        float scale[kTile], inverse[kTile], error[kTile] = {}, with[kTile] = {}, own[kTile] = {};
        for (int64_t r = 0; r < kTile; ++r) {
            const bool first_tries = trial < group.tried;
            scale[r] = as_bfloat16(first_tries ? largest[r] * group.trials[trial] : along[r] / live(square[r]));
            inverse[r] = 1.0f / live(scale[r]);
        }
        for (int64_t j = 0; j < columns; ++j) {
            const float *weight = tile + j * kTile, *count_of = counts + j * kTile;
            for (int64_t r = 0; r < kTile; ++r) {
                const float level = level_of(weight[r] * inverse[r], group.grid);
                const float gap = level * scale[r] - weight[r], weighed = level * count_of[r];
                error[r] += gap * gap * count_of[r];
                with[r] += weighed * weight[r];
                own[r] += weighed * level;
            }
        }
        for (int64_t r = 0; r < kTile; ++r) {
            const bool better = error[r] < least[r];
            least[r] = better ? error[r] : least[r];
            best[r] = better ? scale[r] : best[r];
            along[r] = better ? with[r] : along[r];
            square[r] = better ? own[r] : square[r];
        }
    }
    for (int64_t r = 0; r < count; ++r) group.scale[first + r] = best[r];
}

void settle_portable(const Group& group, int64_t first, float* scratch) { settle_tile(group, first, scratch); }
void scales_portable(const Group& group, int64_t first, float* scratch) { scales_tile(group, first, scratch); }

#ifdef SECATEURS_X86
AVX2 void settle_avx2(const Group& group, int64_t first, float* scratch) {
    settle_tile(group, first, scratch);
}
AVX2 void scales_avx2(const Group& group, int64_t first, float* scratch) {
    scales_tile(group, first, scratch);
}

AVX512 void settle_avx512(const Group& group, int64_t first, float* scratch) {
    settle_tile(group, first, scratch);
}
AVX512 void scales_avx512(const Group& group, int64_t first, float* scratch) {
    scales_tile(group, first, scratch);
}
#endif

// ---- which code, and by whom ----

// The best instruction set that this machine has, up to `isa`.
int32_t best_isa(int32_t isa) {
#ifdef SECATEURS_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
    if (avx512 && isa >= kAvx512) return kAvx512;
    if (avx2 && isa >= kAvx2) return kAvx2;
#endif
    (void)isa;
    return kPortable;
}

template <typename Work>
void in_tiles(const Work& work, void (*one)(const Work&, int64_t, float*), int32_t threads) {
    const int64_t tiles = (work.outputs + kTile - 1) / kTile;
    const int32_t workers = int32_t(std::min<int64_t>(threads, tiles));
#ifdef _OPENMP
#pragma omp parallel num_threads(workers)
#endif
    {
        std::vector<float> scratch(size_t(2 * work.columns * kTile));
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (int64_t tile = 0; tile < tiles; ++tile) one(work, tile * kTile, scratch.data());
    }
    (void)workers;
}

}  // namespace

// Prune a block of columns in place, as `sparsegpt.sweep` does.
EXPORT void secateurs_sweep(float* weight, const float* inverse, const uint8_t* keep, int64_t outputs,
                            int64_t columns, int64_t n, int64_t m, int32_t threads, int32_t isa) {
    const Block block{weight, inverse, keep, outputs, columns, n, m};
    auto sweep = sweep_portable;
#ifdef SECATEURS_X86
    if (best_isa(isa) == kAvx2) sweep = sweep_avx2;
    if (best_isa(isa) == kAvx512) sweep = sweep_avx512;
#endif
    in_tiles(block, sweep, threads);
}

// Round a group of columns in place, as `grid.settle` does.
EXPORT void secateurs_settle(float* weight, const float* before, const uint8_t* keep, float* scale,
                             const float* push, int64_t outputs, int64_t columns, float lowest, float step,
                             float last, int32_t threads, int32_t isa) {
    const Group group{weight, before, keep, scale, push, nullptr, nullptr, outputs, columns, 0, 0, {lowest, step, last}};
    auto settle = settle_portable;
#ifdef SECATEURS_X86
    if (best_isa(isa) == kAvx2) settle = settle_avx2;
    if (best_isa(isa) == kAvx512) settle = settle_avx512;
#endif
    in_tiles(group, settle, threads);
}

// Choose the scales of a group of columns, as `grid.choose_scales` does.
EXPORT void secateurs_scales(const float* weight, const uint8_t* keep, const float* importance, float* scale,
                             const float* trials, int64_t tried, int64_t refits, int64_t outputs,
                             int64_t columns, float lowest, float step, float last, int32_t threads,
                             int32_t isa) {
    const Group group{const_cast<float*>(weight), nullptr, keep, scale, nullptr, importance, trials, outputs, columns,
                      tried, refits, {lowest, step, last}};
    auto scales = scales_portable;
#ifdef SECATEURS_X86
    if (best_isa(isa) == kAvx2) scales = scales_avx2;
    if (best_isa(isa) == kAvx512) scales = scales_avx512;
#endif
    in_tiles(group, scales, threads);
}

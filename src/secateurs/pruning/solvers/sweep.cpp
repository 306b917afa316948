// SparseGPT's sweep over one block of columns, on the CPU.
//
// A thread holds a few outputs and all columns of the block in its cache from start to end, where a loop over
// columns in torch passes over memory, and through Python, for each of them. Outputs do not depend on each other,
// so the result is the same for any number of threads.
//
// A plain C interface over pointers: no torch headers, hence no rebuild when torch changes.

#include <algorithm>
#include <cmath>
#include <cstdint>
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

using Sweep = void (*)(const Block& block, int64_t first, float* scratch);

// The best that this machine has, up to `isa`.
Sweep sweep_for(int32_t isa) {
#ifdef SECATEURS_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
    if (avx512 && isa >= kAvx512) return sweep_avx512;
    if (avx2 && isa >= kAvx2) return sweep_avx2;
#endif
    (void)isa;
    return sweep_portable;
}

}  // namespace

// Prune a block of columns in place, as `sparsegpt.sweep` does.
EXPORT void secateurs_sweep(float* weight, const float* inverse, const uint8_t* keep, int64_t outputs,
                            int64_t columns, int64_t n, int64_t m, int32_t threads, int32_t isa) {
    const Block block{weight, inverse, keep, outputs, columns, n, m};
    const Sweep sweep = sweep_for(isa);
    const int64_t tiles = (outputs + kTile - 1) / kTile;
    const int32_t workers = int32_t(std::min<int64_t>(threads, tiles));
#ifdef _OPENMP
#pragma omp parallel num_threads(workers)
#endif
    {
        std::vector<float> scratch(size_t(2 * columns * kTile));
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (int64_t tile = 0; tile < tiles; ++tile) sweep(block, tile * kTile, scratch.data());
    }
    (void)workers;
}

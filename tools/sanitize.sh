#!/bin/sh
# Runs the CPU kernels on awkward shapes, on every instruction set of this machine, under AddressSanitizer and
# UndefinedBehaviorSanitizer. Ends with "ok", or with the sanitizer's report and a failing status. Where Debian's
# g++-aarch64-linux-gnu and qemu-user are installed, NEON runs too, under UndefinedBehaviorSanitizer.
set -eu
cd "$(dirname "$0")/.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
for kernels in sanitize sanitize_codes sanitize_step sanitize_pruning; do
    "${CXX:-g++}" -std=c++17 -O1 -g -w -fopenmp -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all \
        "tools/$kernels.cpp" -o "$build/$kernels"
    ASAN_OPTIONS=detect_leaks=0 "$build/$kernels"
done
if command -v aarch64-linux-gnu-g++ qemu-aarch64 > "$build/found"; then
    for kernels in sanitize sanitize_codes sanitize_step; do
        aarch64-linux-gnu-g++ -std=c++17 -O1 -g -w -fopenmp -static -fsanitize=undefined -fno-sanitize-recover=all \
            "tools/$kernels.cpp" -o "$build/neon"
        qemu-aarch64 "$build/neon"
    done
fi

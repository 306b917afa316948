#!/bin/sh
# Runs the CPU kernels on awkward shapes, on every instruction set of this machine, under AddressSanitizer and
# UndefinedBehaviorSanitizer. Ends with "ok", or with the sanitizer's report and a failing status.
set -eu
cd "$(dirname "$0")/.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
"${CXX:-g++}" -std=c++17 -O1 -g -w -fopenmp -fsanitize=address,undefined -fno-sanitize-recover=all \
    tools/sanitize.cpp -o "$build/sanitize"
ASAN_OPTIONS=detect_leaks=0 "$build/sanitize"

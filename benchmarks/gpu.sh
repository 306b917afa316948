#!/usr/bin/env bash
# All that is to be known of a GPU, in one call of under twelve minutes on a bare machine: torch, transformers and
# triton suffice, and where there is pytest, the tests run too. Secateurs is not installed, but imported from src.
#
#     bash benchmarks/gpu.sh [FOLDER] [rehearse]
#
# Results come into FOLDER, or $OUT, or benchmarks/results, as they are measured. Each part has a limit of its own,
# and the others run whatever becomes of it. With "rehearse", tiny models on a processor, whose kernels Triton
# interprets: five minutes, for a run before the run.

cd "$(dirname "$0")/.." || exit
out=$(realpath -m "${1:-${OUT:-benchmarks/results}}")
mkdir -p "$out"
export PYTHONPATH=src PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}
summary=()
TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) # its own: a part that is cut off leaves half a library there
export TORCHINDUCTOR_CACHE_DIR
trap 'rm -rf "$TORCHINDUCTOR_CACHE_DIR"' EXIT

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    printf '\n=== %s (%s s at most): %s\n' "$name" "$limit" "$*"
    timeout -k 5 "$limit" "$@"
    status=$?
    case $status in
        0) status=done ;;
        124 | 137) status="cut off" ;;
        *) status="FAILED with status $status" ;;
    esac
    summary+=("$name: $status after $((SECONDS - start)) s")
    printf -- '--- %s\n' "${summary[-1]}"
}

decode=() prune=() compiling=80
sat=(--device cuda --width 2048 --channels 8192 --blocks 16 --heads 32 --kv-heads 8 --vocabulary 32000)
sat+=(--batch-size 4 --length 2048 --repetitions 5)
if [ "$2" = rehearse ]; then
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
    decode=(--device cpu --width 64 --mlp 192 --rounds 1 --copies 1 --tokens 1 16 64)
    prune=(--device cpu --width 64 --mlp 192 --heads 4 --samples 8 --length 32 --product 256)
    sat=(--width 64 --channels 128 --blocks 1 --heads 4 --vocabulary 200 --length 32 --repetitions 2)
    compiling=300 # by a C++ compiler
fi
tests=(tests/runtime/test_gpu.py tests/pruning/solvers/test_sweep_triton.py)
tests+=(tests/pruning/test_on_gpu.py tests/training/test_training_on_gpu.py)

{
    command -v nvidia-smi && nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm,clocks.mem --format=csv
    part import 40 "$python" -c 'import secateurs, torch; print(secateurs.__version__, torch.cuda.is_available())'
    if "$python" -c 'import pytest, hypothesis' 2>/dev/null; then
        part tests 120 "$python" -m pytest -q -p no:cacheprovider "${tests[@]}"
    else
        summary+=("tests: left out, there is no pytest or hypothesis")
    fi
    part decode 80 "$python" benchmarks/decode_gpu.py "${decode[@]}" --results "$out/gpu_decode.json"
    if "$python" -c 'import torchao' 2>/dev/null; then
        part int4 40 "$python" benchmarks/decode_gpu.py --sparsities --int4 1 4 16 "${decode[@]}" \
            --results "$out/gpu_int4.json"
    else
        summary+=("int4: left out, there is no torchao")
    fi
    part tiles 45 "$python" benchmarks/decode_gpu.py --sparsities --tiles 0.7 "${decode[@]}" --rounds 10 \
        --results "$out/gpu_tiles.json"
    part training 70 "$python" benchmarks/sat_step_time.py --rates 0.5 "${sat[@]}" \
        --results "$out/gpu_sat_step_time.json"
    part compiled "$compiling" "$python" benchmarks/sat_step_time.py --rates 0.5 --compile "${sat[@]}" \
        --results "$out/gpu_sat_step_time_compiled.json"
    part pruning 210 "$python" benchmarks/prune_gpu.py "${prune[@]}" --results "$out/gpu_prune.json"
    if [ "$2" != rehearse ]; then # torch multiplies them on GPUs alone
        part 2:4 25 "$python" benchmarks/decode_gpu.py --sparsities --two-of-four 16 64 512 2048 \
            --results "$out/gpu_two_of_four.json"
    fi
    printf '\n%s\n' "=== all of it: $SECONDS s"
    printf '%s\n' "${summary[@]}"
} 2>&1 | tee "$out/gpu.log"

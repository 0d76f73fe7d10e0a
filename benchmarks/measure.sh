#!/bin/sh
# All GPU figures of README and docs, in one call of some nine minutes:
#
#     benchmarks/measure.sh GPUS FOLDER [SECONDS]
#
# GPUS: 1, or how many GPUs of this host the ranks take. FOLDER gets one file of JSON lines a run; a line is there as
# soon as it is measured, so that a call that is cut short keeps what it has. SECONDS: most for each run (240).
# MACHINE names a file of configs/hardware for more than one GPU, by which shadows and plans are chosen (h200xGPUS).
set -u
gpus=$1 most=${3:-240}
mkdir -p "$2" && out=$(cd "$2" && pwd) && cd "$(dirname "$0")/.." || exit 1
machine=configs/hardware/${MACHINE:-h200x$gpus}.json
if [ "$gpus" != 1 ] && [ ! -f "$machine" ]; then
    echo "MACHINE (${MACHINE:-h200x$gpus}) must name a file of configs/hardware" >&2
    exit 1
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
export TORCH_SYMM_MEM_DISABLE_MULTICAST=1  # some hosts have none, and nothing here uses it
model="-m benchmarks.model.bench_model --random_weights --batch 1,8,64,256 --prompt_len 128 --new_tokens 256 --prefill 8x2048"
failed=0

run() {  # NAME COMMAND…
    name=$1 && shift
    echo "$(date +%T) $name: $*" >&2
    timeout -k 10 "$most" "$@" --output "$out/$name.jsonl" >"$out/$name.log" 2>&1 || {
        echo "$(date +%T) $name ended with $?:" >&2
        tail -5 "$out/$name.log" >&2
        failed=1
    }
}

if [ "$gpus" = 1 ]; then
    run model python $model
    run moe-kernels python -m benchmarks.layer.bench_moe_kernels --routing uniform,skew:0.5
else
    ranks="torchrun --standalone --nproc_per_node=$gpus"
    run moe-layer $ranks -m benchmarks.layer.bench_moe_layer --tokens 1024,256,16 --routing uniform,skew:0.5 --repeats 7 \
        --hardware "$machine" --variants contiguous,hot_cold,hot_cold+capacity0.5,hot_cold+capacity0.5+reroute,balanced,everywhere,shadow,two_phase,coherent,tensor_parallel,tensor_parallel+gathered,contiguous+exact,contiguous+schedule
    run model-dp $ranks $model --attention dp --experts ep --repeats 2 --hardware "$machine" \
        --plan contiguous,contiguous+shadow,contiguous+managed,hot_cold,hot_cold+capacity0.5,balanced+2,everywhere
    run model-tp $ranks $model --attention tp --experts tp --repeats 2
fi
exit $failed

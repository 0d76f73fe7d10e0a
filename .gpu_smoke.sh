set -x
mkdir -p $OUT
export CUDA_DEVICE_MAX_CONNECTIONS=8 PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
(CUDA_VISIBLE_DEVICES=0 timeout 230 python3 benchmarks/bench_model.py --model configs/models/mixtral-8x7b.json --random_weights --batch 1,8,64,256 --prompt_len 128 --new_tokens 256 --prefill 8x2048 --output $OUT/model-h200.json > $OUT/one.log 2>&1; echo rc $? >> $OUT/one.log) &
(CUDA_VISIBLE_DEVICES=1 timeout 230 python3 -m pytest -q -x -n 4 -m gpu tests/gpu/test_engine.py tests/gpu/test_attention.py > $OUT/tests.log 2>&1; tail -15 $OUT/tests.log) &
wait
tail -25 $OUT/one.log
timeout 240 torchrun --standalone --nproc_per_node=2 benchmarks/bench_model.py --model configs/models/mixtral-8x7b.json --random_weights --batch 1,64 --prompt_len 128 --new_tokens 64 --prefill 8x2048 --attention dp --experts ep --plan contiguous,contiguous+shadow,hot_cold+capacity0.5,contiguous+managed --output $OUT/plans.json > $OUT/two.log 2>&1; echo rc $?
tail -40 $OUT/two.log

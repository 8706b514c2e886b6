#!/usr/bin/env bash
# r1zero against stock TRL, the standing comparisons:  bash benchmarks/against_trl.sh WHAT OUT
#
#   rehearse   no GPU: a tiny model, every part of the script once (R1ZERO_CPU_SERVER_PYTHON: a Python with vLLM's CPU build)
#   check      any GPUs: the same tiny model with all sides that fit, 3 minutes or so, before time is spent on the others
#   two        two GPUs: 1.5B shape, random weights, 512 completions of the realistic spread, r1zero and trl-server
#   two-sweep  two GPUs: which completions a forward, and Liger or not, are stock's best there
#   one        one GPU: SmolLM2-135M on GSM8K, 512 completions, natural lengths, r1zero and trl-colocate
#   one-sweep  one GPU: the same for colocate
#
# Where WHAT and OUT are those of before, only the turns that are missing are made. SECONDS_AT_MOST begins no turn later.
#   PYTHON           default python3
#   MODEL            for one: folder of SmolLM2-135M, best after its cold start
#   GSM8K            for one: its train.jsonl
#   TOKENIZER        for two: any folder with a tokenizer; default: the embedded model's characters
#   STOCK            what a sweep found, such as "per_device_train_batch_size=32 use_liger_kernel=true"
#   OURS             the same for r1zero
#   ROUNDS           in all, default 3
#   STEPS            that count, default 6 for two and 20 for one; WARMUP before them, default 2
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:?WHAT: rehearse, check, two, two-sweep, one or one-sweep} out=${2:?OUT: a folder for results}
read -r -a stock <<< "${STOCK:-}"
read -r -a ours <<< "${OURS:-}"
export HF_HUB_OFFLINE=1
compare() {
    "${PYTHON:-python3}" benchmarks/against_trl.py "$@" --out "$out" \
        ${SECONDS_AT_MOST:+--seconds "$SECONDS_AT_MOST"} \
        ${stock[0]:+--stock "${stock[@]}"} ${ours[0]:+--ours "${ours[@]}"}
}
warmup=(--warmup "${WARMUP:-2}")
sweep=(--rounds 1 --steps 3 --warmup 1 --ceiling-rounds 0)
two() {
    compare "$out/qwen2.5-1.5b" --random-shape qwen2.5-1.5b ${TOKENIZER:+--tokenizer "$TOKENIZER"} --gpus 2 \
        --case spread --completions 512 --group 8 --per-device-batch 8 "$@"
}
one() {
    compare "${MODEL:?folder of SmolLM2-135M}" --dataset "${GSM8K:?its train.jsonl}" --prompt-template r1rl --gpus 1 \
        --case natural --longest 192 --completions 512 --group 32 --per-device-batch 64 --learning-rate 5e-6 "$@"
}
case $what in
    rehearse) compare --small --modes r1zero trl-transformers ;;
    check)
        modes=(r1zero trl-colocate)
        if [ "$(nvidia-smi --list-gpus | wc -l)" -gt 1 ]; then modes+=(trl-server); fi
        compare --small --modes "${modes[@]}"
        ;;
    two) two --modes r1zero trl-server --rounds "${ROUNDS:-3}" --steps "${STEPS:-6}" "${warmup[@]}" ;;
    two-sweep) two --modes trl-server "${sweep[@]}" \
        --sweep per_device_train_batch_size=4,8,16 use_liger_kernel=false,true ;;
    one) one --modes r1zero trl-colocate --rounds "${ROUNDS:-3}" --steps "${STEPS:-20}" "${warmup[@]}" ;;
    one-sweep) one --modes trl-colocate "${sweep[@]}" \
        --sweep per_device_train_batch_size=32,64,128 vllm_gpu_memory_utilization=0.3,0.5 ;;
    *) echo "WHAT is rehearse, check, two, two-sweep, one or one-sweep, not $what" >&2; exit 2 ;;
esac

#!/usr/bin/env bash
# Lockbox: does an agent learn to peek first, for a later episode's sake? Both credits, three seeds.
#   results/lockbox.sh tiny FOLDER            the tiny policy, 6 minutes on one core
#   results/lockbox.sh smollm2 FOLDER         a model's folder (bench/smollm2.py), 30 minutes
# FOLDER is where runs are kept. What is done is skipped, and a killed run goes on; the results are
# results/lockbox-MODEL-gGAMMA-sSEED.json, and -swapped.json with another task's memory.
set -euo pipefail
model=$1 runs=$2 name=$(basename "$1")
cd "$(dirname "$0")/.."
flags=(--env lockbox --model "$model" --device cpu)
[ "$model" = tiny ] || flags+=(--warm_steps 40)
mkdir -p "$runs"
for seed in 0 1 2; do
    for gamma in 0.6 0; do
        key=lockbox-$name-g$gamma-s$seed
        out=$runs/$key
        [ -f "results/$key-swapped.json" ] && continue
        if ls -d "$out"/step_* >/dev/null 2>&1; then
            python train.py --resume "$out"
        else
            python train.py "${flags[@]}" --seed "$seed" --gamma_traj "$gamma" --out "$out"
        fi
        python eval.py --model "$out" --json "results/$key.json"
        python eval.py --model "$out" --memory swapped --json "results/$key-swapped.json"
    done
done

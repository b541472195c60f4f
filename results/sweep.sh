#!/usr/bin/env bash
# MineSweeper over gamma_traj, all from one warm start: does a large one pay for putting off a win?
#   results/sweep.sh FOLDER [SEEDS...]      seed 0; 7 runs of 8 minutes each on one core
# FOLDER is where runs are kept. What is done is skipped, and a killed run goes on; the results are
# results/sweep-REWARD-gGAMMA-sSEED.json, and what was passed up results/passed-sSEED.json. With
# REWARD success only the win counts: there is nothing to collect by losing.
set -euo pipefail
runs=$1
seeds=("${@:2}")
cd "$(dirname "$0")/.."
mkdir -p "$runs"
for seed in "${seeds[@]:-0}"; do
    folders=()
    for how in "env 0" "env .6" "env .9" "env 1" "env .3" "success .9" "success 1"; do
        read -r reward gamma <<<"$how"
        key=sweep-$reward-g$gamma-s$seed
        folders+=("$runs/$key")
        [ -f "results/$key.json" ] && continue
        if ls -d "$runs/$key"/step_* >/dev/null 2>&1; then
            python train.py --resume "$runs/$key"
        else
            python train.py --env minesweeper --model tiny --device cpu --gamma_traj "$gamma" \
                --reward "$reward" --eval_every 0 --seed "$seed" --out "$runs/$key"
        fi
        python eval.py --model "$runs/$key" --json "results/$key.json"
    done
    python results/passed.py "${folders[@]}" >"results/passed-s$seed.json"
done

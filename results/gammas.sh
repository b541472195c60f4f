#!/usr/bin/env bash
# Lockbox over gamma_traj, against the best policy there is: is the learned one on its side of every threshold?
#   results/gammas.sh FOLDER [SEEDS...]      seed 0; 28 runs of under a minute each on one core
# FOLDER is where runs are kept. What is done is skipped, and a killed run goes on; the results are
# results/gammas-PRESET-nEPISODES-gGAMMA-sSEED.json, to be drawn by results/gammas.py.
set -euo pipefail
runs=$1
seeds=("${@:2}")
cd "$(dirname "$0")/.."
mkdir -p "$runs"
for seed in "${seeds[@]:-0}"; do
    for preset in paper official; do
        for episodes in 2 3; do
            for gamma in 0 .05 .1 .2 .3 .6 .9; do
                key=gammas-$preset-n$episodes-g$gamma-s$seed
                [ -f "results/$key.json" ] && continue
                if ls -d "$runs/$key"/step_* >/dev/null 2>&1; then
                    python train.py --resume "$runs/$key"
                else
                    # Every run of a seed starts from one policy, imitated over three episodes.
                    python train.py --env lockbox --model tiny --device cpu --warm_episodes 3 \
                        --episodes $episodes --gamma_traj $gamma --preset $preset --eval_every 0 \
                        --seed "$seed" --out "$runs/$key"
                fi
                python eval.py --model "$runs/$key" --json "results/$key.json"
            done
        done
    done
done

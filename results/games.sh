#!/usr/bin/env bash
# The games: meta-RL and RL of equal budget, both from one warm start; is the memory used?
#   results/games.sh tiny FOLDER minesweeper 0 1 2       seeds; 20 minutes each on one core
#   results/games.sh smollm2 FOLDER minesweeper 0        a model's folder (bench/smollm2.py)
# 256 fixed tasks, 1,024 for the tiny policy before RL (is its memory used?); TASKS=128 plays so many.
# WARM=100 imitates for so many steps, where 60 are the rule for a model's folder.
# FOLDER is where runs are kept. What is done is skipped, and a killed run goes on; the results are
# results/ENV-MODEL-METHOD-sSEED-MEMORY.json, METHOD being warm, meta or rl.
set -euo pipefail
model=$1 runs=$2 env=$3 name=$(basename "$1")
seeds=("${@:4}")
cd "$(dirname "$0")/.."
flags=(--env "$env" --model "$model" --device cpu)
[ "$model" = tiny ] || flags+=(--style compact --warm_steps "${WARM:-60}" --eval_every 0 --save_every 1)
mkdir -p "$runs"
novice=results/$env-$name-novice-s0-
if [ "$model" = tiny ] && [ ! -f "${novice}none.json" ]; then # whom the warm start imitates
    python results/teacher.py "$env" "$novice"
fi
for seed in "${seeds[@]}"; do
    for method in warm meta rl; do
        tasks=256
        case $method in
            warm)
                more=(--steps 0)
                [ "$model" != tiny ] || tasks=1024
                ;;
            meta) more=() ;;
            rl) more=(--episodes 1 --group_size 24) ;; # as many episodes as 8 trials of 3
        esac
        key=$env-$name-$method-s$seed
        out=$runs/$key
        if ls -d "$out"/step_* >/dev/null 2>&1; then
            [ $method = warm ] || python train.py --resume "$out"
        else
            python train.py "${flags[@]}" "${more[@]}" --seed "$seed" --out "$out"
        fi
        for memory in reflection swapped none; do
            [ $method = rl ] && [ $memory != none ] && continue
            [ -f "results/$key-$memory.json" ] && continue
            python eval.py --model "$out" --memory $memory --json "results/$key-$memory.json" \
                --num_tasks "${TASKS:-$tasks}"
        done
    done
done

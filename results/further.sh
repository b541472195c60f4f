#!/usr/bin/env bash
# Further than trained: eight episodes after training with three, and boards with a third mine.
#   results/further.sh FOLDER 0 1 2      the seeds of results/games.sh tiny FOLDER minesweeper 0 1 2
# Five minutes a seed on one busy core; what is done is skipped. The results are
# results/further-WHAT-METHOD-sSEED.json: WHAT is eight or mines, METHOD meta, swapped (the same with
# another task's notes) or rl.
set -euo pipefail
runs=$1
cd "$(dirname "$0")/.."
for seed in "${@:2}"; do
    for what in "eight --episodes 8" "mines --mines 3"; do
        for how in "meta meta reflection" "swapped meta swapped" "rl rl none"; do
            read -r name flags <<<"$what"
            read -r method run memory <<<"$how"
            key=further-$name-$method-s$seed
            [ -f "results/$key.json" ] && continue
            # shellcheck disable=SC2086
            python eval.py --model "$runs/minesweeper-tiny-$run-s$seed" --memory "$memory" $flags \
                --json "results/$key.json"
        done
    done
done

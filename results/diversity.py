"""How much do a policy's first moves vary? The entropy of trajectories, and success beside it.

    python results/diversity.py runs/meta runs/rl runs/warm > results/diversity-minesweeper.json

64 trials of each of 64 tasks: the entropy of the empirical distribution of the first three actions
of a trial, divided by that of 64 different ones, ln 64; mean over the tasks. Sampled at temperature
1. Prints JSON: for every policy the mean, the value of every task, success after each episode of
these trials, and for the first task the trajectories with their shares.
"""

import json
import math
import sys
from collections import Counter
from typing import Any

from playing import Player, provenance, task_seeds

import train
from lamer import Trial

NUM_TASKS, NUM_SAMPLES, NUM_ACTIONS = 64, 64, 3


def trajectories(trials: list[Trial]) -> Counter:
    """How often each sequence of first actions was played; of one episode, the first."""
    played = [trial.episodes_played()[0][:NUM_ACTIONS] for trial in trials]
    return Counter(" > ".join(turn.action for turn in turns) for turns in played)


def normalized_entropy(counts: Counter) -> float:
    """0 if all are alike, 1 if all differ."""
    num = sum(counts.values())
    entropy = -sum(count / num * math.log(count / num) for count in counts.values())
    return entropy / math.log(num)


def measure(model: str) -> dict[str, Any]:
    """What one policy plays."""
    num = NUM_TASKS * NUM_SAMPLES
    player = Player(model, num)
    trials = player.play(player.trials(task_seeds(NUM_TASKS, NUM_SAMPLES)), temperature=1.0)
    tasks = [trials[i : i + NUM_SAMPLES] for i in range(0, num, NUM_SAMPLES)]
    entropies = [normalized_entropy(trajectories(task)) for task in tasks]
    wins = [sum(trial.success_after(k + 1) for trial in trials) for k in range(trials[0].episodes)]
    first = trajectories(tasks[0]).most_common()
    return {
        "entropy": sum(entropies) / NUM_TASKS,
        "entropies": [round(entropy, 4) for entropy in entropies],
        "success": [won / num for won in wins],
        "first_task": [[actions, count / NUM_SAMPLES] for actions, count in first],
    }


def main(argv: list[str]) -> None:
    if not argv:
        sys.exit(__doc__)
    try:
        found = {model: measure(model) for model in argv}
    except ValueError as error:
        sys.exit(f"diversity.py: {error}")
    made = provenance("results/diversity.py", argv, train.default_device())
    print(json.dumps({**made, "policies": found}))


if __name__ == "__main__":
    main(sys.argv[1:])

"""What a MineSweeper policy passes up in first episodes: is losing worth more to it than winning?

    python results/passed.py RUN [RUN...] > results/passed-s0.json

On the tasks of eval.py, 256 of them. Prints JSON, for every policy: in how many first-episode turns
some closed cell was safe by what is shown (no arrangement of the mines that fits has one there),
the share of these that opened such a cell, and the share that opened one that is surely a mine,
which ends the episode with all earlier rewards kept.
"""

import json
import sys
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from playing import Player, provenance, task_seeds

import train
from envs import MineSweeper, make_env, neighbours
from lamer import Trial

NUM_TASKS = 256


def certain(shown: Sequence[str], size: int, mines: int) -> tuple[set[int], set[int]]:
    """The closed cells that are safe for certain, and those that are mines for certain."""
    closed = [i for i, cell in enumerate(shown) if cell == "?"]
    counts = {i: int(cell.replace(".", "0")) for i, cell in enumerate(shown) if cell != "?"}
    near = {i: {j for j in neighbours(size)[i] if j in closed} for i in counts}
    fitting = [
        layout
        for layout in map(set, combinations(closed, mines))
        if all(len(near[i] & layout) == count for i, count in counts.items())
    ]
    return set(closed) - set.union(*fitting), set.intersection(*fitting)


def passed_up(env: MineSweeper, trials: Sequence[Trial]) -> dict[str, float]:
    """What was chosen where a safe cell could be told."""
    turns = safe = mines = 0
    for trial in trials:
        env.reset(trial.seed)
        for turn in trial.episodes_played()[0]:
            are_safe, are_mines = certain(env.shown, env.size, env.mines)
            row, col = action = env.parse(turn.reply)[0]
            if are_safe:
                turns += 1
                inside = 1 <= row <= env.size and 1 <= col <= env.size
                cell = (row - 1) * env.size + col - 1 if inside else -1
                safe += cell in are_safe
                mines += cell in are_mines
            env.step(action)
    return {"turns": turns, "opened_safe": safe / turns, "opened_mine": mines / turns}


def measure(model: str) -> dict[str, Any]:
    """What one policy does on the tasks of eval.py."""
    player = Player(model, NUM_TASKS)
    trials = player.play(player.trials(task_seeds(NUM_TASKS)))
    env = make_env(player.config.env, **player.config.env_options)
    won = [sum(trial.success_after(k + 1) for trial in trials) for k in range(trials[0].episodes)]
    row = {"gamma_traj": player.config.gamma_traj, "reward": player.config.reward}
    return row | {"success": [n / NUM_TASKS for n in won], **passed_up(env, trials)}


def main(argv: list[str]) -> None:
    if not argv:
        sys.exit(__doc__)
    try:
        found = {model: measure(model) for model in argv}
    except ValueError as error:
        sys.exit(f"passed.py: {error}")
    row = provenance("results/passed.py", argv, train.default_device()) | {"num_tasks": NUM_TASKS}
    print(json.dumps(row | {"policies": found}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])

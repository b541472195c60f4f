"""What is learned exploration worth? First episodes by others, the rest by the trained policy.

    python results/swap.py runs/meta runs/warm > results/swap-minesweeper-tiny-s0.json

A trial's first episode is played by the trained policy itself, by the one it started from, or by
the environment's scripted player without skill; what follows, the reflection on it included, by the
trained one. Prints JSON: success after each episode for each, over the same 256 tasks, and the
outcome of every task. The drop after the last episode is the value of first episodes.
"""

import json
import random
import sys
from typing import Any

from playing import Player, after, provenance, task_seeds

from envs import make_env
from lamer import Trial
from policy import scripted_trial

NUM_TASKS = 256


def continued(player: Player, firsts: list[Trial]) -> list[Trial]:
    """Trials that begin with these first episodes and are played on by the player."""
    seeds = [trial.seed for trial in firsts]
    open_trials = []  # whose first episode did not solve the task
    for first, trial in zip(firsts, player.trials(seeds), strict=True):
        if first.won_in != 0:
            begun = [turn for turn in first.turns if turn.episode == 0 and turn.phase == "play"]
            open_trials.append(after(begun, trial))
    played = iter(player.play(open_trials))
    return [first if first.won_in == 0 else next(played) for first in firsts]


def summary(trials: list[Trial], episodes: int) -> dict[str, Any]:
    """Success after each episode, and in which one every task was solved."""
    wins = [sum(trial.success_after(k + 1) for trial in trials) for k in range(episodes)]
    return {
        "success": [won / len(trials) for won in wins],
        "won_in": [trial.won_in for trial in trials],
    }


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        sys.exit(__doc__)
    try:
        player, start = Player(argv[0], NUM_TASKS), Player(argv[1], NUM_TASKS)
    except ValueError as error:
        sys.exit(f"swap.py: {error}")
    config, seeds = player.config, task_seeds(NUM_TASKS)
    env, rng = make_env(config.env, **config.env_options), random.Random(0)
    options = dict(style=config.style, max_prompt=config.max_prompt, memory=config.memory)
    scripted = [
        scripted_trial(env, seed, 1, player.chat, skill=env.warm_skill, rng=rng, **options)
        for seed in seeds
    ]
    firsts = {
        "itself": player.play(player.trials(seeds)),
        "start": start.play(start.trials(seeds)),
        "scripted": scripted,
    }
    found = {
        name: summary(continued(player, trials), config.episodes) for name, trials in firsts.items()
    }
    made = provenance("results/swap.py", argv, config.device)
    print(json.dumps({**made, "first_episode_by": found}))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Rollout speed of the two samplers on the same trials, alternating in one process.

    python bench/samplers.py --env minesweeper --rounds 5        options as in train.py

Prints seconds, tokens per second and the ratio of the two.
"""

import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train
from policy import load_policy, warm_policy
from sampler import Sampling, make_sampler, rollout


def main(argv: list[str]) -> None:
    rounds = 5
    if "--rounds" in argv:
        at = argv.index("--rounds")
        rounds = int(argv[at + 1])
        argv = argv[:at] + argv[at + 2 :]
    config = train.make_config(**train.parse_flags(train.Config, argv, __doc__))
    source = str(warm_policy(config)) if config.model == "tiny" else config.model
    model, chat = load_policy(source, getattr(torch, config.dtype), config.device)
    trial_ids = range(config.num_tasks * config.group_size)
    seeds = [i // config.group_size for i in trial_ids]
    samplers = {}
    for kind in train.SAMPLERS:
        config.sampler = kind
        slots = train.count_slots(config, model, len(trial_ids))
        samplers[kind] = make_sampler(config, model, chat, slots)
    seconds = {kind: [] for kind in samplers}
    for step in range(rounds + 1):  # the first round warms up and is not counted
        for kind, sampler in samplers.items():
            start = time.perf_counter()
            trials = rollout(config, sampler, seeds, trial_ids, Sampling(config.seed, step))
            seconds[kind].append(time.perf_counter() - start)
    tokens = sum(len(turn.reply_ids) for trial in trials for turn in trial.turns)
    for kind, spent in seconds.items():
        speed = f"{tokens / spent[-1]:8.0f} reply tokens/s in the last"
        print(f"{kind:10s} {median(spent[1:]):7.2f} s a rollout (median of {rounds}), {speed}")
    pairs = zip(seconds["continuous"][1:], seconds["generate"][1:], strict=True)
    ratios = sorted(plain / ours for ours, plain in pairs)
    print(
        f"generate / continuous: median {median(ratios):.2f}, "
        f"from {ratios[0]:.2f} to {ratios[-1]:.2f}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])

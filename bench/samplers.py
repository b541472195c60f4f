"""Rollout speed of the two samplers on the same trials, in turn, in one process: tokens per second and their ratio.

python bench/samplers.py --env minesweeper --rounds 5          from the project's root; options as in train.py
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from lamer import Sampling


def main(argv: list[str]) -> None:
    rounds = 5
    if "--rounds" in argv:
        at = argv.index("--rounds")
        rounds = int(argv[at + 1])
        argv = argv[:at] + argv[at + 2 :]
    config = train.resolve(train.Config(**train.parse_flags(train.Config, argv, __doc__)))
    source = str(train.warm_policy(config)) if config.model == "tiny" else config.model
    model, chat = train.load_policy(source, config.dtype, config.device)
    ids = range(config.num_tasks * config.group_size)
    seeds = [i // config.group_size for i in ids]
    seconds = {"slots": [], "generate": []}
    for step in range(rounds + 1):  # the first round warms up and is not counted
        for kind, spent in seconds.items():
            config.sampler = kind
            sampler = train.make_sampler(config, model, chat)
            start = time.perf_counter()
            trials = train.rollout(config, sampler, seeds, ids, Sampling(config.seed, step))
            spent.append(time.perf_counter() - start)
    tokens = sum(len(turn.reply_ids) for trial in trials for turn in trial.turns)
    for kind, spent in seconds.items():
        median = sorted(spent[1:])[rounds // 2]
        print(
            f"{kind:9s} {median:7.2f} s a rollout (median of {rounds}), "
            f"{tokens / spent[-1]:8.0f} reply tokens/s in the last"
        )
    ratios = sorted(b / a for a, b in zip(seconds["slots"][1:], seconds["generate"][1:], strict=True))
    print(f"generate / slots: median {ratios[rounds // 2]:.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])

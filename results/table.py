"""A table of success from results/*.json, and the differences that the claims are about.

    python results/table.py minesweeper-tiny          the results of results/games.sh
    python results/table.py minesweeper-tiny warm     what holds before RL
    python results/table.py swap-minesweeper-tiny     those of results/swap.py

Success in percent after each episode, mean over the seeds, in brackets the least and the most of
the last. Differences after the last episode are paired by task, with a 95% interval from 10,000
bootstrap draws of the tasks within each seed; a claim needs one above 0 and the same sign in all
seeds.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent


def read(name: str) -> dict[str, dict[str, np.ndarray]]:
    """{method and memory: {seed: (tasks, episodes) of wins so far}} of an environment and model."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for path in sorted(HERE.glob(f"{name}-*.json")):
        row = json.loads(path.read_text())
        if name.startswith("swap-"):
            for who, played in row["first_episode_by"].items():
                wins = wins_so_far(played["won_in"], len(played["success"]))
                found.setdefault(who, {})[path.stem.rpartition("-s")[2]] = wins
            continue
        method, seed, memory = re.fullmatch(rf"{name}-(\w+)-s(\d+)-(\w+)", path.stem).groups()
        wins = wins_so_far([task["won_in"] for task in row["tasks"]], row["episodes"])
        found.setdefault(f"{method}-{memory}", {})[seed] = wins
    return found


def wins_so_far(won_in: list[int | None], episodes: int) -> np.ndarray:
    """Whether each task was solved within the first 1..episodes episodes: (tasks, episodes)."""
    return np.array([[won is not None and won <= k for k in range(episodes)] for won in won_in])


def success(by_seed: dict[str, np.ndarray]) -> str:
    """Percent after each episode, and the least and the most after the last."""
    shares = np.array([wins.mean(0) for wins in by_seed.values()]) * 100  # (seeds, episodes)
    mean = " / ".join(f"{share:.0f}" for share in shares.mean(0))
    return f"{mean} ({shares[:, -1].min():.0f}..{shares[:, -1].max():.0f})"


def interval(by_seed: Sequence[np.ndarray]) -> np.ndarray:
    """95% interval (2,) of the mean over seeds of the mean over tasks, each (tasks,)."""
    rng = np.random.default_rng(0)
    draws = [each[rng.integers(len(each), size=(10_000, len(each)))].mean(1) for each in by_seed]
    return np.quantile(np.mean(draws, axis=0), [0.025, 0.975])


def compare(ours: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> str:
    """The difference of two ways after their last episode, over the seeds that both have."""
    pairs = [ours[seed][:, -1] * 1.0 - other[seed][:, -1] for seed in ours if seed in other]
    low, high = interval(pairs) * 100
    each = ", ".join(f"{100 * pair.mean():+.1f}" for pair in pairs)
    return (
        f"{100 * np.mean([pair.mean() for pair in pairs]):+.1f} [{low:+.1f}, {high:+.1f}] ({each})"
    )


def main(argv: list[str]) -> None:
    if not argv:
        sys.exit(__doc__)
    found = read(argv[0])
    if not found:
        sys.exit(f"table.py: there is no results/{argv[0]}-*.json")
    for way, by_seed in found.items():
        print(f"{way:20s} {success(by_seed):28s} {len(by_seed)} seeds")
    method = argv[1] if len(argv) > 1 else "meta"
    pairs = [("reflection", "swapped"), ("reflection", "none"), ("swapped", "none")]
    pairs = [(f"{method}-{ours}", f"{method}-{other}") for ours, other in pairs]
    pairs += [(way, "rl-none") for way in ("meta-reflection", "meta-swapped", "meta-none")]
    pairs += [("itself", "start"), ("itself", "scripted")]
    for ours, other in pairs:
        if ours in found and other in found:
            print(f"{ours} minus {other}: {compare(found[ours], found[other])}")


if __name__ == "__main__":
    main(sys.argv[1:])

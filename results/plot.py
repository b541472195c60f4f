"""Draw success after each episode over the training steps, from run folders; needs matplotlib.

    python results/plot.py results/lockbox.svg \\
        "gamma_traj 0.6" runs/study/lockbox-tiny-g0.6-s* \\
        "gamma_traj 0" runs/study/lockbox-tiny-g0-s*

    python results/plot.py results/minesweeper.svg --evals \\
        "meta-RL" runs/study/minesweeper-tiny-meta-s* "RL" runs/study/minesweeper-tiny-rl-s*

A name is followed by its runs, which differ in nothing but the seed: a panel each, with the mean
over the runs as a line and their least and most as a band. Success is that of the training trials
over five steps, with --evals that of the evaluations during training.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np


def read(run: Path, evals: bool) -> tuple[np.ndarray, np.ndarray]:
    """Steps (S,) and success after each episode (S, episodes)."""
    lines = (run / ("evals.jsonl" if evals else "metrics.jsonl")).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps, success = (np.array([row[name] for row in rows]) for name in ("step", "success"))
    if evals:
        return steps, success
    window = min(5, len(rows))
    means = [success[end - window : end].mean(0) for end in range(window, len(rows) + 1)]
    return steps[window - 1 :], np.array(means)


def main(argv: list[str]) -> None:
    groups: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    name, evals = "", "--evals" in argv
    for word in [word for word in argv[1:] if word != "--evals"]:
        if Path(word, "metrics.jsonl").is_file():
            groups.setdefault(name, []).append(read(Path(word), evals))
        else:
            name = word
            groups[name] = []
    if not groups or not all(groups.values()):
        sys.exit(__doc__)
    width = 3.6 * len(groups)
    figure, panels = plt.subplots(1, len(groups), sharey=True, squeeze=False, figsize=(width, 2.8))
    for panel, (name, runs) in zip(panels[0], groups.items(), strict=True):
        count = min(len(steps) for steps, _ in runs)
        steps = runs[0][0][:count]
        success = 100 * np.array([run[:count] for _, run in runs])  # (runs, steps, episodes)
        for episode in range(success.shape[2]):
            band, color = success[:, :, episode], f"C{episode}"
            panel.plot(steps, band.mean(0), color=color, label=f"after episode {episode + 1}")
            panel.fill_between(steps, band.min(0), band.max(0), color=color, alpha=0.2, lw=0)
        panel.set(title=name, xlabel="training step", ylim=(-3, 103))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("success, %")
    panels[0, 0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(argv[0], metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1:])

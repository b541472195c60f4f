"""Draw success after each episode, a panel for each game, from results/*.json; needs matplotlib.

    python results/figure.py results/games.svg MineSweeper minesweeper-tiny ALFWorld alfworld-tiny

A title is followed by the name that results/table.py takes. Mean over the seeds; bars are 95%
intervals from a bootstrap of the tasks within each seed.
"""

import sys

import matplotlib
import numpy as np
from table import interval, read

matplotlib.use("svg")
import matplotlib.pyplot as plt

# Blue, orange and grey differ for everybody (Okabe and Ito); dashes are the same policy's control.
WAYS = {
    "meta-reflection": ("meta-RL", "#0072B2", "-"),
    "meta-swapped": ("meta-RL, another task's notes", "#0072B2", ":"),
    "rl-none": ("RL, three attempts", "#D55E00", "-"),
    "warm-reflection": ("before RL", "#777777", "-"),
}


def main(argv: list[str]) -> None:
    names = list(zip(argv[1::2], argv[2::2], strict=False))
    if not names or not all(read(name) for _, name in names):
        sys.exit(__doc__)
    size = (2.6 + 3.2 * len(names), 3.2)
    figure, panels = plt.subplots(1, len(names), sharey=True, squeeze=False, figsize=size)
    for panel, (title, name) in zip(panels[0], names, strict=True):
        found = read(name)
        for shift, (way, (label, color, dashes)) in enumerate(WAYS.items()):
            wins = list(found[way].values())  # of every seed (tasks, episodes)
            episodes = np.arange(wins[0].shape[1])
            mean = 100 * np.mean([each.mean(0) for each in wins], axis=0)
            ends = 100 * np.array([interval([w[:, k] for w in wins]) for k in episodes])
            bars = np.abs(ends.T - mean)  # (2, episodes)
            x = episodes + 1 + 0.02 * (shift - 1.5)  # side by side where they coincide
            style = dict(color=color, linestyle=dashes, marker="o", markersize=4, capsize=2)
            panel.errorbar(x, mean, bars, label=label, **style)
        panel.set_title(title, loc="left", fontsize=10)
        panel.set(xlabel="episodes played", xticks=episodes + 1, ylim=(0, 100))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("success, %")
    panels[0, -1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(argv[0], metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1:])

"""Draw success after each episode over the training steps, from run folders; needs matplotlib.

    python results/plot.py results/lockbox.svg \\
        "gamma_traj 0.6" runs/study/lockbox-tiny-g0.6-s* \\
        "gamma_traj 0" runs/study/lockbox-tiny-g0-s*

A name is followed by its runs, which differ in nothing but the seed: a panel each, with the mean
over the runs as a line and their least and most as a band. Success is that of the training trials.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np


def read(run: Path) -> np.ndarray:
    """Success after each episode (steps, episodes), averaged over five steps."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    success = np.array([json.loads(line)["success"] for line in lines])
    window = min(5, len(success))
    starts = range(len(success) - window + 1)
    return np.array([success[start : start + window].mean(0) for start in starts])


def main(argv: list[str]) -> None:
    groups: dict[str, list[np.ndarray]] = {}
    name = ""
    for word in argv[1:]:
        if Path(word, "metrics.jsonl").is_file():
            groups.setdefault(name, []).append(read(Path(word)))
        else:
            name = word
            groups[name] = []
    if not groups or not all(groups.values()):
        sys.exit(__doc__)
    width = 3.6 * len(groups)
    figure, panels = plt.subplots(1, len(groups), sharey=True, squeeze=False, figsize=(width, 2.8))
    for panel, (name, runs) in zip(panels[0], groups.items(), strict=True):
        steps = min(len(run) for run in runs)
        success = 100 * np.array([run[:steps] for run in runs])  # (runs, steps, episodes)
        for episode in range(success.shape[2]):
            band, color = success[:, :, episode], f"C{episode}"
            panel.plot(band.mean(0), color=color, label=f"after episode {episode + 1}")
            panel.fill_between(range(steps), band.min(0), band.max(0), color=color, alpha=0.2, lw=0)
        panel.set(title=name, xlabel="training step", ylim=(-3, 103))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("success, %")
    panels[0, 0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(argv[0], metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1:])

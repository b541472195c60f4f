"""Lockbox over gamma_traj: what was learned beside the best policy, from results/gammas.sh.

    python results/gammas.py                          a table
    python results/gammas.py results/gammas.svg       and a picture; needs matplotlib

The best policy is that of the dynamic program of test_lamer.py, for the return across episodes of
the paper. A cell of the table is the most frequent first action and success after each episode, in
percent of 256 tasks.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from test_lamer import lockbox_values

CODES = 8
COLORS = ("#0072b2", "#d55e00", "#009e73")  # after 1, 2, 3 episodes; told apart by everyone


class Point(NamedTuple):
    """A policy that was learned."""

    preset: str
    episodes: int
    gamma: float
    row: dict[str, Any]


def points() -> Iterator[Point]:
    """What results/*.json holds."""
    for path in sorted(Path(__file__).parent.glob("gammas-*.json")):
        preset, episodes, gamma = re.fullmatch(r"gammas-(\w+)-n(\d)-g(.*)-s\d+", path.stem).groups()
        yield Point(preset, int(episodes), float(gamma), json.loads(path.read_text()))


def optimum(episodes: int, gamma: float) -> tuple[str, np.ndarray]:
    """The best first action, without its code, and success after 1..episodes episodes."""
    options = lockbox_values(CODES, episodes, gamma)
    best = max(options, key=lambda action: options[action][0])
    return best.split()[0], options[best][1]


def learned(point: Point) -> str:
    """The most frequent kind of first action."""
    kinds: dict[str, int] = {}
    for action, count in point.row["first_actions"].items():
        kind = action.split()[0] if action else "nothing"
        kinds[kind] = kinds.get(kind, 0) + count
    return max(kinds, key=kinds.__getitem__)


def percent(shares: Any) -> str:
    """[0.125, 0.25] -> "12 / 25"."""
    return " / ".join(f"{100 * share:.0f}" for share in shares)


def table(found: list[Point]) -> str:
    """A column for every gamma_traj; a cell has one entry for every seed."""
    gammas = sorted({point.gamma for point in found})
    lines = [" | ".join(["gamma_traj", *(f"{gamma:g}" for gamma in gammas)])]
    lines.append("|".join(["---"] * (1 + len(gammas))))
    for episodes in sorted({point.episodes for point in found}):
        best = [optimum(episodes, gamma) for gamma in gammas]
        cells = [f"{action} {percent(success)}" for action, success in best]
        lines.append(" | ".join([f"{episodes} episodes: best policy", *cells]))
        for preset in ("paper", "official"):
            cells = []
            for gamma in gammas:
                key = (preset, episodes, gamma)
                same = [p for p in found if (p.preset, p.episodes, p.gamma) == key]
                cells.append(", ".join(f"{learned(p)} {percent(p.row['success'])}" for p in same))
            lines.append(" | ".join([f"learned, `--preset {preset}`", *cells]))
    return "\n".join(f"| {line} |" if " | " in line else f"|{line}|" for line in lines)


def draw(found: list[Point], file: str) -> None:
    """Success over gamma_traj: lines are the best policy's, points with 95% intervals learned."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, sharex=True, sharey=True, figsize=(7.2, 4.6))
    grid = np.linspace(0, 0.95, 191)
    for line, preset in zip(panels, ("paper", "official"), strict=True):
        for panel, episodes in zip(line, (2, 3), strict=True):
            best = np.array([optimum(episodes, gamma)[1] for gamma in grid])  # (G, episodes)
            for k in range(episodes):
                color, name = COLORS[k], f"after episode {k + 1}"
                panel.plot(grid, 100 * best[:, k], color=color, lw=1, label=name)
                for point in found:
                    if (point.preset, point.episodes) == (preset, episodes):
                        share, (low, high) = point.row["success"][k], point.row["ci95"][k]
                        bars = [[100 * (share - low)], [100 * (high - share)]]
                        x = point.gamma + 0.008 * (k - 1)
                        panel.errorbar(x, 100 * share, bars, fmt="o", ms=4, color=color)
            panel.set(title=f"{preset}, {episodes} episodes", ylim=(-4, 104))
            panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[1]:
        panel.set_xlabel("gamma_traj")
    for line in panels:
        line[0].set_ylabel("success, %")
    panels[0, 1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main(argv: list[str]) -> None:
    found = [*points()]
    if not found:
        sys.exit("gammas.py: there is no results/gammas-*.json; results/gammas.sh makes them")
    print(table(found))
    if argv:
        draw(found, argv[0])


if __name__ == "__main__":
    main(sys.argv[1:])

"""The README's tables are those of the JSON beside this file."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import table  # noqa: E402

README = (HERE.parent / "README.md").read_text(encoding="utf-8")


def cells_of(name: str) -> list[str]:
    """The cells of the README's row that begins with this name."""
    [row] = [line for line in README.splitlines() if line.startswith(f"| {name}")]
    return [cell.strip().replace("**", "") for cell in row.strip("| ").split("|")][1:]


@pytest.mark.parametrize(("name", "model"), [("tiny policy", "tiny"), ("SmolLM2-135M", "smollm2")])
def test_lockbox(name, model):
    expected = []
    for kind in ("g0.6-s{}", "g0.6-s{}-swapped", "g0-s{}"):
        seeds = []
        for seed in range(3):
            file = HERE / f"lockbox-{model}-{kind.format(seed)}.json"
            row = json.loads(file.read_text(encoding="utf-8"))
            assert row["num_tasks"] == len(row["tasks"]) == 256
            seeds.append(" / ".join(f"{100 * share:.0f}" for share in row["success"]))
        expected.append(", ".join(seeds))
    assert cells_of(name) == expected


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("warm-started, before RL", "warm-reflection"),
        ("RL: single episodes", "rl-none"),
        ("meta-RL (LaMer)", "meta-reflection"),
        ("the same with its memory swapped", "meta-swapped"),
        ("the same without memory, three", "meta-none"),
    ],
)
def test_minesweeper(name, way):
    found = table.read("minesweeper-tiny")[way]
    assert len(found) == 3, "three seeds"
    assert cells_of(name)[0] == table.success(found)


def test_differences_by_hand():
    """Ten tasks: ours wins all, the other none, then half; draws keep to their seed."""
    wins, none, half = np.ones((10, 2)), np.zeros((10, 2)), np.array([[0, 1], [0, 0]] * 5)
    assert table.compare({"0": wins}, {"0": none}) == "+100.0 [+100.0, +100.0] (+100.0)"
    text = table.compare({"0": wins, "1": wins, "2": wins}, {"0": none, "1": half})
    assert text.startswith("+75.0 [") and text.endswith("(+100.0, +50.0)")
    assert table.success({"0": half, "1": wins}) == "50 / 75 (50..100)"

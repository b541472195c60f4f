"""Seconds of a training step and of a step of imitation, with the tiny policy of every environment.

    python bench/steps.py                                  this code
    python bench/steps.py --tree OTHER --rounds 5          alternating with another checkout of it

Imitation is timed from scratch, training from one policy of 200 steps of imitation, every round in
processes of its own with one thread; with a learning rate of 0, so that all code is timed on the
same trials. `rl_rollout`, on MineSweeper, is the time that RL on single
episodes, the same policy and as many episodes a step, takes for as many reply tokens. Prints
medians over the rounds, each run's first training step left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent.parent
ENVS = ("lockbox", "minesweeper", "sokoban", "webshop", "alfworld")
WARM_START = """
import sys, time
import train
from policy import warm_policy
config = train.make_config(env=sys.argv[1], model="tiny", device="cpu", warm_steps=int(sys.argv[2]))
begin = time.perf_counter()
folder = warm_policy(config)
print(time.perf_counter() - begin, folder)
"""


def python(tree: Path, cache: str, *command: object) -> str:
    """What a command prints that runs in a checkout, with one thread."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "LAMER_CACHE": cache}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(
        words, cwd=tree, env=variables, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def measure(tree: Path, env: str, policy: str) -> dict[str, float]:
    """Seconds of one step of imitation, and of rollout and update of a training step."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = [python(tree, folder, "-c", WARM_START, env, steps) for steps in (3, 13)]
        short, long = (float(line.split()[0]) for line in seconds)
        flags = ["--env", env, "--model", policy, "--device", "cpu", "--eval_every", 0]
        flags += ["--lr", 0, "--steps", 3, "--out"]  # all steps play alike
        rows = train(tree, folder, [*flags, f"{folder}/meta"])
        rl = [*flags, f"{folder}/rl", "--episodes", 1, "--group_size", 24]
        rl_rows = train(tree, folder, rl) if env == "minesweeper" else []
    row = {name: median(row["seconds"][name] for row in rows) for name in ("rollout", "update")}
    row |= {
        "imitation": (long - short) / 10,
        "reply_tokens": median(row["reply_tokens"] for row in rows),
    }
    if rl_rows:
        a_token = median(each["seconds"]["rollout"] / each["reply_tokens"] for each in rl_rows)
        row["rl_rollout"] = a_token * row["reply_tokens"]
    return row


def train(tree: Path, cache: str, flags: list[object]) -> list[dict]:
    """The log of a run, without its first step."""
    python(tree, cache, "train.py", *flags)
    log = Path(flags[flags.index("--out") + 1], "metrics.jsonl").read_text()
    return [json.loads(line) for line in log.splitlines()][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--envs", nargs="+", default=ENVS)
    parser.add_argument("--cache", default=tempfile.gettempdir(), help="where policies are kept")
    options = parser.parse_args()
    trees = {"this": HERE} | ({"other": options.tree} if options.tree else {})
    for env in options.envs:
        policy = python(HERE, options.cache, "-c", WARM_START, env, 200).split()[1]
        runs = {name: [] for name in trees}
        for _ in range(options.rounds):
            for name, tree in trees.items():
                runs[name].append(measure(tree, env, policy))
        for name, measured in runs.items():
            row = {key: round(median(run[key] for run in measured), 3) for key in measured[0]}
            print(json.dumps({"env": env, "code": name} | row), flush=True)


if __name__ == "__main__":
    main()

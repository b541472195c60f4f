"""Time and memory of a training step as the work grows: the tiny policy on MineSweeper.

    python bench/scaling.py                       all, a few minutes each on one core
    python bench/scaling.py group_size episodes

Each point is a run of its own, with one thread a process, from one policy of 200 steps of imitation
(for another board one of 50 steps; where episodes vary, of trials of 8); what is not varied is as
in BASE. Prints the medians of all steps but the first: seconds of rollout and update, turns, reply
tokens, peak memory in GB.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent.parent
BASE = dict(env="minesweeper", device="cpu", num_tasks=4, group_size=8, eval_every=0, steps=3)
POINTS = {
    "group_size": [4, 8, 16, 32, 64],
    "episodes": [1, 2, 3, 4, 8],
    "slots": [1, 4, 16, 64],
    "size": [4, 6, 8],  # of the board: prompts grow with its cells
    "processes": [1, 2],
}
WARM_START = """
import sys
import train
from policy import warm_policy
size, steps, episodes = map(int, sys.argv[1:])
options = dict(size=size, mines=2, turns=9)
config = train.make_config(
    env="minesweeper", model="tiny", device="cpu", warm_steps=steps, max_prompt=512, max_reply=192,
    env_options=options, warm_episodes=episodes,
)
print(warm_policy(config))
"""


def output(command: list[object]) -> str:
    """What a command prints, run at the top of the checkout."""
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.check_output(list(map(str, command)), cwd=HERE, env=variables, text=True)


def measure(vary: str, value: int) -> dict[str, float]:
    """A short run with one thing changed."""
    size, episodes = value if vary == "size" else 4, 8 if vary == "episodes" else 3
    warm = [sys.executable, "-c", WARM_START, size, 200 if size == 4 else 50, episodes]
    options = BASE | dict(model=output(warm).split()[-1], size=size, max_prompt=512, max_reply=192)
    launch = [sys.executable]
    if vary == "processes":
        launch = ["torchrun", "--nproc-per-node", value]
    else:
        options[vary] = value
    with tempfile.TemporaryDirectory() as out:
        flags = [word for name, given in options.items() for word in (f"--{name}", given)]
        output([*launch, "train.py", *flags, "--out", out])
        lines = Path(out, "metrics.jsonl").read_text().splitlines()[1:]
    rows = [json.loads(line) for line in lines]
    row = {name: median(each["seconds"][name] for each in rows) for name in ("rollout", "update")}
    row |= {name: median(each[name] for each in rows) for name in ("turns", "reply_tokens")}
    return row | {"peak_gb": max(each["peak_gb"] for each in rows)}


def main() -> None:
    for vary in sys.argv[1:] or POINTS:
        for value in POINTS[vary]:
            print(json.dumps({vary: value} | measure(vary, value)), flush=True)


if __name__ == "__main__":
    main()

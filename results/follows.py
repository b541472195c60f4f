"""What a Lockbox policy does with what it sees: does it peek, note the code, and open it?

    python results/follows.py MODEL [TASKS]          a run or a folder of a policy; 256 tasks

The trials are those of `eval.py --model MODEL`. Prints JSON; `followed` is the share of second
episodes, after a note with a code, that open this code.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import eval as evaluation
import train
from lamer import Trial
from policy import load_policy
from sampler import make_sampler, rollout


def count(trials: list[Trial]) -> dict[str, int]:
    """Trials in which each thing happened."""
    counts = dict.fromkeys(("trials", "peeked", "noted a code", "noted the right one"), 0)
    counts |= {"played on with it": 0, "opened it": 0}
    for trial in trials:
        counts["trials"] += 1
        counts["peeked"] += trial.turns[0].action == "peek"
        notes = [re.search(r"code (\d+)", past.reflection) for past in trial.past]
        if notes and notes[0]:
            counts["noted a code"] += 1
            counts["noted the right one"] += trial.task_key == notes[0][0]
            second = [turn for turn in trial.turns if turn.phase == "play" and turn.episode == 1]
            counts["played on with it"] += len(second)
            counts["opened it"] += sum(turn.action == f"open {notes[0][1]}" for turn in second)
    return counts


def main(argv: list[str]) -> None:
    if not argv:
        sys.exit(__doc__)
    tasks = argv[1] if len(argv) > 1 else "256"
    _, config, source = evaluation.prepare(["--model", argv[0]])
    model, chat = load_policy(source, getattr(torch, config.dtype), config.device)
    sampler = make_sampler(config, model, chat, train.count_slots(config, model, int(tasks)))
    seeds = [evaluation.EVAL_PY_SEED + i for i in range(int(tasks))]
    sampling = train.eval_sampling(config, seed=0, step=evaluation.EVAL_PY_DRAWS)
    counts = count(rollout(config, sampler, seeds, range(int(tasks)), sampling))
    share = counts["opened it"] / max(1, counts["played on with it"])
    print(json.dumps(counts | {"followed": round(share, 3)}))


if __name__ == "__main__":
    main(sys.argv[1:])

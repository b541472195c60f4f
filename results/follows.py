"""What a Lockbox policy does with what it sees: does it peek, note the code, and open it?

    python results/follows.py MODEL [TASKS]          a run or a folder of a policy; 256 tasks

The trials are those of `eval.py --model MODEL`. Prints JSON; `followed` is the share of second
episodes, after a note with a code, that open this code.
"""

import json
import re
import sys

from playing import Player, task_seeds

from lamer import Trial


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
    num_tasks = int(argv[1]) if len(argv) > 1 else 256
    player = Player(argv[0], num_tasks)
    counts = count(player.play(player.trials(task_seeds(num_tasks))))
    share = counts["opened it"] / max(1, counts["played on with it"])
    print(json.dumps(counts | {"followed": round(share, 3)}))


if __name__ == "__main__":
    main(sys.argv[1:])

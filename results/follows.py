"""What a policy does with its notes: does it write down what helps, and go by it?

    python results/follows.py MODEL [TASKS]          a run or a folder of a policy; 256 tasks

The trials are those of `eval.py --model MODEL`; MODEL plays Lockbox or ALFWorld. Prints JSON. On
Lockbox `followed` is the share of second episodes, after a note with a code, that open this code.
On ALFWorld it is that of the episodes, after notes of where things are, that go to such a place
first; how many of those won stands beside how many of the others did.
"""

import json
import re
import sys

from playing import Player, provenance, task_seeds

from lamer import Trial


def codes(trials: list[Trial]) -> dict[str, float]:
    """Lockbox: trials in which each thing happened."""
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
    share = counts["opened it"] / max(1, counts["played on with it"])
    return counts | {"followed": round(share, 3)}


def places(trials: list[Trial]) -> dict[str, float]:
    """ALFWorld: episodes that begin with a note like "mug 1 in drawer 2" in memory."""
    counts = dict.fromkeys(("went there", "and won", "went elsewhere", "and won anyway"), 0)
    for trial in trials:
        for episode, turns in enumerate(trial.episodes_played()):
            notes = " ".join(past.reflection for past in trial.past[:episode])
            named = re.findall(r"\w+ \d+ in (\w+ \d+)", notes)
            if named:
                went = turns[0].action in [f"go to {place}" for place in named]
                counts["went there" if went else "went elsewhere"] += 1
                counts["and won" if went else "and won anyway"] += trial.won_in == episode
    share = counts["went there"] / max(1, counts["went there"] + counts["went elsewhere"])
    return counts | {"followed": round(share, 3)}


def main(argv: list[str]) -> None:
    if not argv:
        sys.exit(__doc__)
    num_tasks = int(argv[1]) if len(argv) > 1 else 256
    player = Player(argv[0], num_tasks)
    count = {"lockbox": codes, "alfworld": places}.get(player.config.env)
    if count is None:
        sys.exit("follows.py: it knows the notes of lockbox and of alfworld")
    row = provenance("results/follows.py", argv, player.config.device) | {"num_tasks": num_tasks}
    row |= count(player.play(player.trials(task_seeds(num_tasks))))
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])

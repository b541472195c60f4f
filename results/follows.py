"""What a policy does with its notes: does it write down what helps, and go by it?

    python results/follows.py MODEL [TASKS]          a run or a folder of a policy; 256 tasks

The trials are those of `eval.py --model MODEL`; MODEL plays Lockbox or ALFWorld. Prints JSON. On
Lockbox `followed` is the share of second episodes, after a note with a code, that open this code.
On ALFWorld it counts the episodes after notes of where things are, right ones and wrong ones: how
many go there first, and how many of these and of the others are won.
"""

import itertools
import json
import re
import sys
from typing import Any

from playing import Player, provenance, task_seeds

from envs import Env, make_env
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


def places(trials: list[Trial], env: Env) -> dict[str, Any]:
    """ALFWorld: episodes that begin with a note like "mug drawer 2" about a needed thing.

    Such a note is right if a thing of its kind lies there at the start. Beside them the share of
    all that notes say, needed or not, that is so.
    """
    kinds = ("episodes", "went there", "and won", "and won, having gone elsewhere")
    counts: dict[str, Any] = {name: dict.fromkeys(kinds, 0) for name in ("right", "wrong")}
    said = []
    for trial in trials:
        env.reset(trial.seed)
        game = env.state.game
        kind_of = {name: game.names[name].split()[0] for name in game.names}
        sought = game.portable.intersection(env.wanted(game.goal))  # a lamp is looked for last
        needed = {kind_of[thing] for thing in sought}
        lies = [fact[1:] for fact in game.start if fact[0] == "inreceptacle"]
        truth = {(kind_of[thing], game.names[place]) for thing, place in lies}
        notes = [
            [
                (thing.split()[0], place)
                for place, things in env.read_notes([past.reflection]).items()
                for thing in things
            ]
            for past in trial.past
        ]
        said += [pair in truth for pair in itertools.chain(*notes)]
        for episode, turns in enumerate(trial.episodes_played()):
            named = [pair for pair in itertools.chain(*notes[:episode]) if pair[0] in needed]
            right = [pair for pair in named if pair in truth]
            if named:
                row = counts["right" if right else "wrong"]
                went = turns[0].action in [f"go to {place}" for _, place in right or named]
                row["episodes"] += 1
                row["went there"] += went
                row["and won" if went else kinds[-1]] += trial.won_in == episode
    return counts | {"said": len(said), "of which true": sum(said)}


def main(argv: list[str]) -> None:
    if not argv:
        sys.exit(__doc__)
    num_tasks = int(argv[1]) if len(argv) > 1 else 256
    player = Player(argv[0], num_tasks)
    env = make_env(player.config.env, **player.config.env_options)
    if env.name not in ("lockbox", "alfworld"):
        sys.exit("follows.py: it knows the notes of lockbox and of alfworld")
    row = provenance("results/follows.py", argv, player.config.device) | {"num_tasks": num_tasks}
    trials = player.play(player.trials(task_seeds(num_tasks)))
    row |= codes(trials) if env.name == "lockbox" else places(trials, env)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])

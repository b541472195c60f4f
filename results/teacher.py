"""How good is the player that the tiny policy imitates, and what are its notes worth to it?

    python results/teacher.py alfworld results/alfworld-tiny-novice-s0-

plays the tasks of eval.py with its own notes, with another task's and with none, and writes a JSON
each (`...reflection.json`, `...swapped.json`, `...none.json`) as eval.py does. It is what the warm
start can reach at best: `results/table.py alfworld-tiny novice`.
"""

import json
import random
import sys
from collections.abc import Sequence

from playing import provenance, task_seeds

import eval as evaluation
import train
from envs import Env, derive_seed, make_env
from lamer import PastEpisode, Reply, Trial, parse_reflection, run_trial
from policy import Recorder

NUM_TASKS = 1024


def play(
    env: Env, seed: int, episodes: int, memory: str, lent: Sequence[PastEpisode] = ()
) -> Trial:
    """A trial of the imitated player; notes of `lent` episodes stand in for its own."""
    trial = run_trial(env, seed, episodes, Recorder(), memory=memory, style="compact")
    rng, notes = random.Random(derive_seed("teacher", seed)), []
    try:
        prompt = next(trial)
        while True:
            if prompt.phase == "play":
                text = env.scripted(env.warm_skill, rng, notes)
            else:
                text = env.scripted_reflection(rng)
                note = lent[len(notes)].reflection if lent else parse_reflection(text)[0]
                notes.append(note)
            prompt = trial.send(Reply([0], [0.0], text))
    except StopIteration as stop:
        return stop.value


def main(argv: list[str]) -> None:
    if len(argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        config = train.make_config(env=argv[0], model="tiny", device="cpu")
    except ValueError as error:
        sys.exit(f"teacher.py: {error}")
    env = make_env(config.env, **config.env_options)
    seeds = task_seeds(int(argv[2]) if len(argv) == 3 else NUM_TASKS)
    own = [play(env, seed, config.episodes, "reflection") for seed in seeds]
    lenders = evaluation.donors(own, config.episodes, seed=0)
    found = {
        "reflection": own,
        "swapped": [
            play(env, seed, config.episodes, "reflection", lender.past)
            for seed, lender in zip(seeds, lenders, strict=True)
        ],
        "none": [play(env, seed, config.episodes, "none") for seed in seeds],
    }
    for memory, trials in found.items():
        row = {
            **provenance("results/teacher.py", argv, config.device),
            "env": config.env,
            "environment": config.env_options,
            "memory": memory,
            **evaluation.result(config, trials),
            "tasks_checksum": evaluation.checksum(trials),
            "tasks": [
                {"seed": trial.seed, "key": trial.task_key, "won_in": trial.won_in}
                for trial in trials
            ],
        }
        with open(f"{argv[1]}{memory}.json", "w") as file:
            file.write(json.dumps(row, indent=1) + "\n")
        shares = " / ".join(f"{100 * share:.0f}" for share in row["success"])
        print(f"{config.env}, {memory}: {shares} percent")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Write trials of a policy as one HTML page on which a person steps through them.

    python results/replay.py runs/minesweeper-1 replay.html          four tasks, eight trials each
    python results/replay.py runs/minesweeper-1 replay.html 10

The page needs no network and no server: open it from the disk. It shows every model call with what
was asked, the reply, the action it was taken for, the state after it, reward, return and advantage,
and the notes that the episode could see. Trials are sampled as in training, on tasks of eval.py;
the trials of a task are the group that advantages compare (of a ppo policy, by gigpo).
"""

import json
import sys
from pathlib import Path
from typing import Any

from playing import Player, task_seeds

import train
from envs import make_env
from lamer import Trial

GROUP = 8  # trials of a task


def states_after(config: train.Config, trial: Trial) -> list[str]:
    """What the environment showed after every turn; after a reflection, the next start."""
    env, shown = make_env(config.env, **config.env_options), []
    start, _ = env.reset(seed=trial.seed)
    for turn in trial.turns:
        if turn.phase == "reflect":
            shown.append(start)
            continue
        is_first = not shown or turn.episode != trial.turns[len(shown) - 1].episode
        if is_first:
            env.reset(seed=trial.seed)
        shown.append(env.step(env.parse(turn.reply)[0])[0])
    return shown


def as_data(config: train.Config, trial: Trial, chat: Any) -> dict[str, Any]:
    """A trial as the page reads it."""
    turns = []
    for turn, after in zip(trial.turns, states_after(config, trial), strict=True):
        is_note = config.memory in ("reflection", "both") and turn.phase == "play"
        past = trial.past[: turn.episode] if is_note else []
        turns.append(
            {
                "episode": turn.episode + 1,
                "phase": turn.phase,
                "prompt": chat.decode(turn.prompt_ids[len(chat.head) : -len(chat.tail)]),
                "before": turn.observation,
                "reply": turn.reply,
                "action": turn.action,
                "valid": turn.is_valid,
                "after": after,
                "reward": turn.reward,
                "return": round(turn.ret, 3),
                "advantage": round(turn.advantage, 3),
                "notes": [each.reflection for each in past],
            }
        )
    won = None if trial.won_in is None else trial.won_in + 1
    return {"task": trial.seed, "won": won, "turns": turns}


def page(title: str, trials: list[dict[str, Any]]) -> str:
    """The page; its data cannot end the element they stand in, whatever a model wrote."""
    data = json.dumps({"title": title, "trials": trials}).replace("<", "\\u003c")
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return template.replace("DATA", data, 1)


def play(model: str, num_tasks: int) -> tuple[str, list[dict[str, Any]]]:
    """Title and trials of a policy."""
    num = num_tasks * GROUP
    player = Player(model, num, num_tasks=num_tasks, group_size=GROUP)
    config = player.config
    if config.estimator == "ppo":
        config.estimator = "gigpo"
    trials = player.play(player.trials(task_seeds(num_tasks, GROUP)), config.temperature)
    train.assign_credit(config, None, trials)
    title = f"{config.env}, {player.source}, gamma_traj {config.gamma_traj:g}"
    return title, [as_data(config, trial, player.chat) for trial in trials]


def main(argv: list[str]) -> None:
    if len(argv) < 2:
        sys.exit(__doc__)
    try:
        title, trials = play(argv[0], int(argv[2]) if len(argv) > 2 else 4)
    except ValueError as error:
        sys.exit(f"replay.py: {error}")
    Path(argv[1]).write_text(page(title, trials), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Evaluate a policy: success after 1..N episodes of a trial, on tasks with seeds of their own, with 95% intervals.

    python eval.py --model runs/minesweeper-1                        the newest checkpoint, set up as it was trained
    python eval.py --model runs/minesweeper-1 --memory none          independent attempts, the RL way
    python eval.py --model runs/minesweeper-1 --memory swapped       every task gets the memory of another one
    python eval.py --model runs/minesweeper-1 --mines 4 --show 3     a harder task; print three whole trials
    python eval.py --model tiny --env minesweeper                    the warm start, before any RL
    python eval.py --model Qwen/Qwen3-4B --env sokoban --prompting react    any model of the hub, untrained

`--prompting` gives the paper's baselines for a frozen model: zero-shot asks for the action alone, react for reasoning
before every action, reflexion also for a reflection between episodes, which later prompts carry.

Memory "swapped" is the control for the claim that memory is used: an agent that merely gets better at playing, or that
only profits from more attempts, does not mind; one that reads its reflections does. The last row of the table is
the environment's scripted player at full skill: the most that can be won within the turn limit.
"""

import json
import math
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import train
from lamer import Episode, Sampling, Trial
from train import ENV_OPTIONS, EVAL_SEED, Config, EnvOptions


@dataclass
class EvalConfig(EnvOptions):
    """All options; the flags are built from it. None takes what the policy was trained with."""

    model: str | None = None  # a run folder (its newest checkpoint), a checkpoint folder, or a hub name
    env: str | None = None  # needed for a model that was not trained here
    memory: str | None = None  # none, history, reflection, both; or swapped
    prompting: str | None = None  # zero-shot, react or reflexion: a baseline's prompts and memory
    episodes: int | None = None  # attempts per task; 3 for a policy trained by RL on single episodes
    num_tasks: int = 256  # fixed tasks
    temperature: float | None = None  # 1 for the tiny policy, 0.7 for others (paper); 0 takes the likeliest token
    top_p: float | None = None  # 1 for the tiny policy, 0.8 for others (paper)
    top_k: int | None = None  # 0 (off) for the tiny policy, 20 for others (paper)
    seed: int = 0  # of the sampling; the tasks stay the same
    json: str | None = None  # write the result to this file
    show: int = 0  # print this many trials
    sampler: str | None = None  # slots or generate
    slots: int | None = None  # trials decoded at once
    max_prompt: int | None = None  # tokens
    max_reply: int | None = None  # tokens
    device: str | None = None  # cpu or cuda
    dtype: str | None = None  # float32 or bfloat16


PROMPTING = {
    "zero-shot": dict(style="direct", memory="none"),
    "react": dict(style="full", memory="none"),
    "reflexion": dict(style="full", memory="reflection"),
}


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share (Wilson's score interval), which stays inside [0, 1]. wilson(0, 10) is (0.0, 0.278)."""
    share, spread = successes / trials, z * z / trials
    center = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / trials / 4) / (1 + spread)
    return max(0.0, center - half), min(1.0, center + half)


def donors(trials: Sequence[Trial], episodes: int) -> list[list[Episode]]:
    """For every trial the memory of another task that failed in all episodes but the last, or in all."""
    full = [trial for trial in trials if len(trial.past) == episodes - 1]
    if len({trial.seed for trial in full}) < 2:
        raise ValueError(f"--memory swapped needs two tasks that fail {episodes - 1} times; use more --num_tasks")
    chosen = []
    for i, trial in enumerate(trials):
        others = [other for other in (full[i % len(full) :] + full[: i % len(full)])[:2] if other.seed != trial.seed]
        chosen.append(others[0].past)
    return chosen


def play(config: Config, sampler: Any, seeds: Sequence[int], sampling: Sampling, swapped: bool) -> list[Trial]:
    """One trial of every task; with `swapped` a second one that sees the memory of another task's first one."""
    ids = range(len(seeds))
    trials = train.rollout(config, sampler, seeds, ids, sampling)
    if swapped:
        trials = train.rollout(config, sampler, seeds, ids, sampling, borrowed=donors(trials, config.episodes))
    return trials


def play_scripted(config: Config, seeds: Sequence[int]) -> list[Trial] | None:
    """The scripted player at full skill on the same tasks; None if the environment has none."""
    if not train.env_of(config).has_scripted_player():
        return None
    options = dict(episodes=config.episodes, chat=train.Recorder(), skill=1.0, rng=random.Random(0))
    return [train.scripted_trial(train.env_of(config), seed, memory="none", **options) for seed in seeds]


def result(config: Config, trials: Sequence[Trial]) -> dict[str, Any]:
    """What the trials show, as plain numbers."""
    train.compute_returns(config, trials)
    won = [sum(trial.success_after(k + 1) for trial in trials) for k in range(config.episodes)]
    env = train.env_of(config)
    first = Counter(str(env.parse(trial.turns[0].reply)[0]) for trial in trials)
    scores = [trial.info["task_score"] for trial in trials if "task_score" in trial.info]  # WebShop
    extra = {"task_score": sum(scores) / len(scores)} if scores else {}
    for kind in sorted({trial.info["task_type"] for trial in trials if "task_type" in trial.info}):  # ALFWorld
        same = [trial for trial in trials if trial.info.get("task_type") == kind]
        shares = [sum(trial.success_after(k + 1) for trial in same) / len(same) for k in range(config.episodes)]
        extra.setdefault("success_by_type", {})[kind] = shares
    return {
        **train.summarize(trials, config.episodes),
        "ci95": [wilson(successes, len(trials)) for successes in won],
        "num_tasks": len(trials),
        "episodes": config.episodes,
        "first_episode_reward": sum(sum(trial.rewards()[0]) for trial in trials) / len(trials),
        "first_actions": dict(first.most_common()),
        **extra,
    }


def table_row(name: str, row: dict[str, Any]) -> str:
    """One line of the table for people."""
    cells = [f"{s:6.1%} [{low:4.0%},{high:5.0%}]" for s, (low, high) in zip(row["success"], row["ci95"], strict=True)]
    return f"{name:28s}" + "".join(f"{cell:>22s}" for cell in cells) + f"{row['return']:9.2f}{row['valid']:8.0%}"


def prepare(argv: Sequence[str]) -> tuple[EvalConfig, Config, str]:
    """The flags, the options of the policy's run as these flags change them, and the folder or name to load."""
    given = EvalConfig(**train.parse_flags(EvalConfig, argv, __doc__))
    if given.model is None:
        raise ValueError("--model is needed: a run folder, a checkpoint folder, or a hub name")
    if given.temperature is not None and given.temperature < 0:
        raise ValueError(f"--temperature must be 0 (the likeliest token) or more, got {given.temperature}")
    if given.top_p is not None and not 0 < given.top_p <= 1:
        raise ValueError(f"--top_p must be above 0 and at most 1, got {given.top_p}")
    if given.num_tasks < 1:
        raise ValueError(f"--num_tasks must be at least 1, got {given.num_tasks}")
    if given.json and not Path(given.json).absolute().parent.is_dir():
        raise ValueError(f"--json {given.json}: there is no such folder")
    if given.prompting and given.memory:
        raise ValueError("--prompting sets the memory itself; leave out --memory")
    if given.prompting and given.prompting not in PROMPTING:
        raise ValueError(f"--prompting must be one of {', '.join(PROMPTING)}, not {given.prompting!r}")
    source = train.newest_checkpoint(given.model)
    saved = train.saved_config(source)
    if not saved and given.env is None:
        raise ValueError(f"--model {given.model} was not trained here, so it needs an --env")
    if saved and given.env not in (None, saved["env"]):
        saved = {k: v for k, v in saved.items() if k not in (*ENV_OPTIONS, "episodes", "max_prompt", "max_reply")}
    changes = {f.name: value for f in fields(Config) if (value := getattr(given, f.name, None)) is not None}
    changes |= {"model": source, "seed": given.seed, "temperature": 1.0, "device": given.device}
    if saved.get("episodes") == 1:  # RL on single episodes: independent attempts
        changes = {"episodes": 3, "memory": "none"} | changes
    if given.memory == "swapped":
        changes["memory"] = saved.get("memory", "reflection")
        if changes["memory"] == "none":
            raise ValueError("--memory swapped: this policy was trained without memory, so there is none to swap")
        if given.episodes == 1:
            raise ValueError("--memory swapped needs at least 2 --episodes")
    config = train.resolve(Config(**{**saved, **changes}))
    if given.prompting:
        if config.style == "compact":
            raise ValueError("--prompting is for models that understand instructions; for the tiny one use --memory")
        vars(config).update(PROMPTING[given.prompting])
    return given, config, str(train.warm_policy(config)) if source == "tiny" else source


def main(argv: Sequence[str]) -> None:
    try:
        given, config, source = prepare(argv)
        train.env_of(config).reset(seed=EVAL_SEED)
        model, chat = train.load_policy(source, config.dtype, config.device)
        sampler = train.make_sampler(config, model, chat, given.num_tasks)
        own = {k: getattr(given, k) for k in ("temperature", "top_p", "top_k") if getattr(given, k) is not None}
        sampling = train.eval_sampling(config, seed=given.seed, step=2**33, **own)
        seeds = [EVAL_SEED + i for i in range(given.num_tasks)]
        trials = play(config, sampler, seeds, sampling, given.memory == "swapped")
    except ValueError as error:
        sys.exit(f"eval.py: {error}")

    memory = given.memory if given.memory == "swapped" else config.memory
    row = {"env": config.env, "model": source, "memory": memory, "prompting": given.prompting, "seed": given.seed}
    row |= {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k")} | result(config, trials)
    row["environment"] = {k: getattr(config, k) for k in ENV_OPTIONS if getattr(config, k) is not None}
    head = "".join(f"{f'after {k + 1}':>22s}" for k in range(config.episodes))
    print(f"{config.env}, {len(seeds)} tasks, temperature {sampling.temperature:g}, success with 95% interval\n")
    print(f"{'':28s}{head}   return   valid")
    how = given.prompting or f"memory {memory}"
    print(table_row(f"{Path(source).name}, {how}", row))
    for kind, success in row.get("success_by_type", {}).items():
        print(f"  {kind:26s}" + "".join(f"{share:22.1%}" for share in success))
    if "task_score" in row:
        print(f"  mean task score {row['task_score']:.3f}")
    if scripted := play_scripted(config, seeds):
        row["scripted"] = result(config, scripted)
        print(table_row("scripted player, full skill", row["scripted"]))
    for trial in trials[: given.show]:
        print(f"\n{trial}")
    if given.json:
        Path(given.json).write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("eval.py: stopped")
    except OSError as error:
        sys.exit(f"eval.py: {error}")
    except train.torch.OutOfMemoryError:
        sys.exit("eval.py: out of GPU memory; lower --slots or --max_prompt")

"""Evaluate a policy: success after 1..N episodes of a trial on fixed tasks, with 95% intervals.

    python eval.py --model runs/minesweeper-1                        as it was trained
    python eval.py --model runs/minesweeper-1 --memory none          independent attempts, as in RL
    python eval.py --model runs/minesweeper-1 --memory swapped       the memory of another task
    python eval.py --model runs/minesweeper-1 --mines 4 --show 3     a harder task; print 3 trials
    python eval.py --model tiny --env minesweeper                    the warm start, before any RL
    python eval.py --model Qwen/Qwen3-4B --env sokoban --prompting react    a hub model, untrained

`--prompting` gives the paper's baselines for a frozen model: zero-shot asks for the action alone,
react for reasoning before every action, reflexion also for a reflection between episodes, which
later prompts carry.

Memory "swapped" is the control for the claim that memory is used: an agent that merely gets better
at playing, or that only profits from more attempts, keeps its success; one that reads its
reflections does not. The last row of the table is the environment's scripted player at full skill:
the most that can be won within the turn limit.
"""

import hashlib
import json
import math
import platform
import random
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from envs import EVAL_SEED, derive_seed, make_env
from lamer import MEMORIES, Trial, print0
from policy import (
    Recorder,
    is_tiny,
    load_policy,
    newest_checkpoint,
    saved_config,
    scripted_trial,
    warm_policy,
)
from sampler import make_sampler, rollout, summarize
from train import (
    DTYPES,
    MOST_SEED,
    SAMPLERS,
    Config,
    check_limits,
    config_from,
    count_slots,
    default_device,
    eval_sampling,
    make_config,
    option,
    parse_flags,
)


@dataclass
class EvalConfig:
    """All options; the flags are built from them. What is not given is as in training."""

    model: str = option("", "a run folder (its newest checkpoint), a checkpoint folder, a hub name")
    env: str = option("", "needed for a model that was not trained here")
    memory: str = option("", "as in training, or swapped", choices=(*MEMORIES, "swapped"))
    prompting: str = option(
        "", "a baseline's prompts and memory", choices=("zero-shot", "react", "reflexion")
    )
    episodes: int = option(3, "attempts per task; as in training, 3 for RL policies", least=1)
    num_tasks: int = option(256, "fixed tasks", least=1, most=10**6)
    temperature: float = option(1.0, "1 for the tiny policy, else 0.7 (paper); 0: likeliest token")
    top_p: float = option(1.0, "1 for the tiny policy, else 0.8 (paper)")
    top_k: int = option(0, "0 (off) for the tiny policy, else 20 (paper)", least=0)
    seed: int = option(0, "of the sampling; the tasks stay", least=0, most=MOST_SEED)
    json: str = option("", "write the result to this file")
    show: int = option(0, "print this many trials", least=0)
    sampler: str = option("continuous", "or generate", choices=SAMPLERS)
    slots: int = option(0, "trials decoded at once; 0: as many as fit", least=0)
    max_prompt: int = option(2048, "tokens; as in training", least=1)
    max_reply: int = option(1024, "tokens; as in training", least=1)
    device: str = option("cuda", "cpu or cuda", choices=("cpu", "cuda"))
    dtype: str = option("bfloat16", "float32 or bfloat16", choices=DTYPES)
    env_options: dict[str, Any] = field(default_factory=dict)


PROMPTING = {
    "zero-shot": dict(style="direct", memory="none"),
    "react": dict(style="full", memory="none"),
    "reflexion": dict(style="full", memory="reflection"),
}
EVAL_PY_DRAWS = 2**33  # in the place of a step: draws that no training run has made
EVAL_PY_SEED = EVAL_SEED + 2**30  # seeds that no training run meets, not even in its evaluations


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share (Wilson's score interval), which stays inside [0, 1].

    wilson(0, 10) is (0.0, 0.278).
    """
    share, spread = successes / trials, z * z / trials
    center = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / trials / 4) / (1 + spread)
    return max(0.0, center - half), min(1.0, center + half)


def donors(trials: Sequence[Trial], episodes: int, seed: int) -> list[Trial]:
    """For every trial one of another task, whose memory it gets in the place of its own.

    Drawn among those that failed in all episodes but the last, so that they have all of it.
    """
    full = [trial for trial in trials if len(trial.past) == episodes - 1]
    if len({trial.task_key for trial in full}) < 2:
        raise ValueError(
            f"--memory swapped needs two tasks that fail {episodes - 1} times; use more --num_tasks"
        )
    random.Random(derive_seed("donors", seed)).shuffle(full)
    chosen = []
    for i, trial in enumerate(trials):
        following = [full[(i + k) % len(full)] for k in range(len(full))]
        chosen.append(next(each for each in following if each.task_key != trial.task_key))
    return chosen


def play_scripted(config: Config, seeds: Sequence[int]) -> list[Trial] | None:
    """The scripted player at full skill on the same tasks; None if the environment has none."""
    env = make_env(config.env, **config.env_options)
    if not env.has_scripted_player():
        return None
    options = dict(chat=Recorder(), skill=1.0, rng=random.Random(0), memory="none")
    return [scripted_trial(env, seed, config.episodes, **options) for seed in seeds]


def result(config: Config, trials: Sequence[Trial]) -> dict[str, Any]:
    """What the trials show, as plain numbers."""
    wins = [sum(trial.success_after(k + 1) for trial in trials) for k in range(config.episodes)]
    first_actions = Counter(trial.turns[0].action for trial in trials)
    row = {
        **summarize(trials, config),
        "ci95": [wilson(won, len(trials)) for won in wins],
        "num_tasks": len(trials),
        "episodes": config.episodes,
        "first_episode_reward": sum(sum(trial.rewards()[0]) for trial in trials) / len(trials),
        "first_actions": dict(first_actions.most_common()),
    }
    scores = [trial.info["task_score"] for trial in trials if "task_score" in trial.info]
    if scores:  # WebShop
        row["task_score"] = sum(scores) / len(scores)
    kinds = sorted({trial.info["task_type"] for trial in trials if "task_type" in trial.info})
    if kinds:  # ALFWorld
        row["success_by_type"] = {}
    for kind in kinds:
        same = [trial for trial in trials if trial.info.get("task_type") == kind]
        shares = [sum(t.success_after(k + 1) for t in same) / len(same) for k in range(len(wins))]
        row["success_by_type"][kind] = shares
    return row


def checksum(trials: Sequence[Trial]) -> str:
    """Of the tasks, by what each shows at its start: equal where two results can be compared."""
    shown = [[trial.seed, trial.task_key, trial.turns[0].observation] for trial in trials]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def table_row(name: str, row: dict[str, Any]) -> str:
    """One line of the table for people."""
    cells = []
    for share, (low, high) in zip(row["success"], row["ci95"], strict=True):
        cells.append(f"{f'{share:6.1%} [{low:4.0%},{high:5.0%}]':>22s}")
    return f"{name:28s}{''.join(cells)}{row['return']:9.2f}{row['valid']:8.0%}"


def prepare(argv: Sequence[str]) -> tuple[dict[str, Any], Config, str]:
    """The flags given, the options of the policy's run as they change them, and what to load."""
    given = parse_flags(EvalConfig, argv, __doc__)
    check_limits(EvalConfig, given)
    if "model" not in given:
        raise ValueError("--model is needed: a run folder, a checkpoint folder, or a hub name")
    if given.get("temperature", 0) < 0:
        raise ValueError(f"--temperature must be 0 (likeliest) or more, got {given['temperature']}")
    if not 0 < given.get("top_p", 1) <= 1:
        raise ValueError(f"--top_p must be above 0 and at most 1, got {given['top_p']}")
    if "json" in given and not Path(given["json"]).absolute().parent.is_dir():
        raise ValueError(f"--json {given['json']}: there is no such folder")
    if "json" in given and Path(given["json"]).is_dir():
        raise ValueError(f"--json {given['json']} is a folder; name a file")
    if "prompting" in given and "memory" in given:
        raise ValueError("--prompting sets the memory itself; leave out --memory")
    source = newest_checkpoint(given["model"])
    saved = saved_config(source)
    if not saved and "env" not in given:
        raise ValueError(f"--model {given['model']} was not trained here, so it needs an --env")

    # Not --seed: here it is that of the sampling, there that of the run.
    names = {each.name for each in fields(Config)} - {"temperature", "seed", "env_options"}
    changes = {name: value for name, value in given.items() if name in names}
    changes["model"] = source
    if given.get("memory") == "swapped":
        changes["memory"] = saved.get("memory", "reflection")
        if changes["memory"] == "none":
            raise ValueError("--memory swapped: this policy was trained without memory to swap")
        if given.get("episodes") == 1:
            raise ValueError("--memory swapped needs at least 2 --episodes")
    if saved.get("episodes") == 1:  # RL on single episodes: independent attempts
        changes = {"episodes": 3, "memory": "none"} | changes
    env_options = given.get("env_options", {})
    if not saved:
        config = make_config(**changes, env_options=env_options)
    else:
        if given.get("env", saved["env"]) != saved["env"]:  # another game: lengths of its own
            other = make_config(env=given["env"], model=source, env_options=env_options)
            for name in ("episodes", "max_prompt", "max_reply", "gamma_step", "gamma_traj"):
                saved[name] = getattr(other, name)
            env_options = other.env_options
        elif "data" not in env_options:  # genuine tasks have no use for the sizes of generated ones
            env_options = saved["env_options"] | env_options
        saved |= {"device": default_device()}
        config = config_from(saved, **changes | {"env_options": env_options})
    if "prompting" in given:
        if is_tiny(source):
            raise ValueError(
                "--prompting is for models that understand instructions; for the tiny one use "
                "--memory"
            )
        vars(config).update(PROMPTING[given["prompting"]])
    if source == "tiny":  # the policy that training would start from, however it is evaluated
        source = str(
            warm_policy(make_config(env=config.env, model=source, env_options=env_options))
        )
    return given, config, source


def measured(device: str) -> dict[str, Any]:
    """When, by which versions and on what: what a number needs to be repeated."""
    is_gpu = device == "cuda"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "machine": torch.cuda.get_device_name() if is_gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
    }


def main(argv: Sequence[str]) -> None:
    try:
        given, config, source = prepare(argv)
        num_tasks = given.get("num_tasks", EvalConfig.num_tasks)
        limit = make_env(config.env, **config.env_options).num_eval_tasks()
        if limit and limit < num_tasks:
            print0(f"{config.env} has {limit} tasks for evaluation: each is played once")
            num_tasks = limit
        model, chat = load_policy(source, getattr(torch, config.dtype), config.device)
        sampler = make_sampler(config, model, chat, count_slots(config, model, num_tasks))
    except ValueError as error:
        sys.exit(f"eval.py: {error}")
    how = {name: given[name] for name in ("temperature", "top_p", "top_k") if name in given}
    sampling = eval_sampling(chat, seed=given.get("seed", 0), step=EVAL_PY_DRAWS, **how)
    seeds = [EVAL_PY_SEED + i for i in range(num_tasks)]
    trials = rollout(config, sampler, seeds, range(num_tasks), sampling)
    if given.get("memory") == "swapped":  # once more, with the memory of these
        try:
            lenders = donors(trials, config.episodes, sampling.seed)
        except ValueError as error:
            sys.exit(f"eval.py: {error}")
        borrowed = [lender.past for lender in lenders]
        trials = rollout(config, sampler, seeds, range(num_tasks), sampling, borrowed)

    memory = given.get("memory", config.memory)
    row = {
        "env": config.env,
        "environment": config.env_options,
        "model": source,
        "memory": memory,
        "prompting": given.get("prompting"),
        "seed": sampling.seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "command": shlex.join(["eval.py", *argv]),
        "measured": measured(config.device),
        **result(config, trials),
        "num_different_tasks": len({trial.task_key for trial in trials}),
        "tasks_checksum": checksum(trials),
        "tasks": [
            {"seed": trial.seed, "key": trial.task_key, "won_in": trial.won_in} for trial in trials
        ],
    }
    temperature = f"temperature {sampling.temperature:g}"
    print(f"{config.env}, {num_tasks} tasks, {temperature}, success with 95% interval\n")
    head = "".join(f"{f'after {k + 1}':>22s}" for k in range(config.episodes))
    print(f"{'':28s}{head}   return   valid")
    name = given.get("prompting", f"memory {memory}")
    print(table_row(f"{Path(source).name}, {name}", row))
    for kind, success in row.get("success_by_type", {}).items():
        print(f"  {kind:26s}" + "".join(f"{share:22.1%}" for share in success))
    if row["num_different_tasks"] < num_tasks:
        print(f"  of these tasks {row['num_different_tasks']} are different")
    if row["shortened"]:
        print(f"  {row['shortened']} prompts were shortened to --max_prompt {config.max_prompt}")
    if memory == "swapped":
        row["num_donors"] = len({lender.seed for lender in lenders})
        print(f"  memory of {row['num_donors']} trials of other tasks")
        if config.env == "lockbox":
            print("  another box has another code: who follows the memory never wins")
    if "task_score" in row:
        print(f"  mean task score {row['task_score']:.3f}")
    scripted = play_scripted(config, seeds)
    if scripted:
        row["scripted"] = result(config, scripted)
        print(table_row("scripted player, full skill", row["scripted"]))
    for trial in trials[: given.get("show", 0)]:
        print(f"\n{trial}")
    if "json" in given:
        Path(given["json"]).write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("eval.py: stopped")
    except OSError as error:
        sys.exit(f"eval.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("eval.py: out of GPU memory; lower --slots or --max_prompt")

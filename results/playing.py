"""What the scripts beside this one share: a policy as eval.py loads it, to play with."""

import shlex
import sys
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import eval as evaluation
import train
from envs import make_env
from lamer import Reply, Trial, Turn, run_trial
from policy import load_policy
from sampler import make_sampler


class Player:
    """A policy and the options it was trained with, changed as told."""

    def __init__(self, model: str, num_trials: int, **changes: Any):
        """`model` is a run folder, a checkpoint, or tiny for the warm start (with env=NAME)."""
        flags = ["--model", model]
        if "env" in changes:
            flags += ["--env", changes.pop("env")]
        _, config, source = evaluation.prepare(flags)
        self.config, self.source = replace(config, **changes), source
        policy, self.chat = load_policy(source, getattr(torch, config.dtype), config.device)
        slots = train.count_slots(config, policy, num_trials)
        self.sampler = make_sampler(self.config, policy, self.chat, slots)

    def trials(self, seeds: Sequence[int]) -> list[Generator]:
        """Trials to be played, one for each seed of a task."""
        options = dict(memory=self.config.memory, style=self.config.style)
        return [
            run_trial(
                make_env(self.config.env, **self.config.env_options),
                seed,
                self.config.episodes,
                self.chat,
                max_prompt=self.config.max_prompt,
                **options,
            )
            for seed in seeds
        ]

    def play(self, trials: Sequence[Generator], temperature: float | None = None) -> list[Trial]:
        """Play them to their end, sampled as in eval.py unless a temperature is given."""
        how = {} if temperature is None else dict(temperature=temperature, top_p=1.0, top_k=0)
        sampling = train.eval_sampling(self.chat, seed=0, step=evaluation.EVAL_PY_DRAWS, **how)
        return self.sampler.run(trials, range(len(trials)), sampling)


def provenance(name: str, argv: Sequence[str], device: str) -> dict[str, Any]:
    """What the JSON of a script says of its making."""
    return {"command": shlex.join([name, *argv]), "measured": evaluation.measured(device)}


def task_seeds(num_tasks: int, times: int = 1) -> list[int]:
    """Tasks of eval.py, each so many times."""
    return [evaluation.EVAL_PY_SEED + i for i in range(num_tasks) for _ in range(times)]


def after(turns: Sequence[Turn], trial: Generator) -> Generator:
    """The trial from where it stands when these turns, taken by somebody else, lie behind it."""
    prompt = next(trial)
    for turn in turns:
        prompt = trial.send(Reply(turn.reply_ids, turn.logps, turn.reply))
    while True:
        reply = yield prompt
        try:
            prompt = trial.send(reply)
        except StopIteration as stop:
            return stop.value

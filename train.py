"""Train a language model by LaMer's meta-RL.

    python train.py --env minesweeper                                  a laptop, or one GPU
    torchrun --nproc-per-node=gpu train.py --env sokoban               every GPU of a node
    python train.py --env minesweeper --episodes 1 --group_size 24     the RL baseline, equal budget
    python train.py --env my_game.py:Game --model Qwen/Qwen3-0.6B      an environment of yours
    python train.py --resume runs/minesweeper-1                        go on as if never stopped
    python train.py --env sokoban --help                               all options, Sokoban's too

Without a GPU the policy is `tiny`: a Qwen3-shaped model of under a million weights, made on the
spot and warm-started by imitating a scripted player, so that meta-RL can be watched at work within
minutes. From there on it is a model like any other; `--warm_steps` warm-starts any other, too.
Every random draw is a function of (seed, step, trial, turn, token), so a run is repeatable and
resumes exactly, on a GPU up to the order in which its kernels add.

Simplifications against the paper and the official code:
1. One process per GPU holds the whole model and plays its own tasks; no inference servers.
2. One pass over each batch of trials, as in the official scripts. PPO's value is one per turn.
3. Data parallel (torch DDP); AdamW's moments alone are divided among the processes.
4. The learning rate is constant.
5. A mini-batch holds whole trials, whose turns share tokens, not turns at random.
"""

import argparse
import copy
import ctypes
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple

try:
    import resource
except ImportError:  # Windows
    resource = None

# Rollouts and updates cut memory differently.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import lamer
from envs import EVAL_SEED, check_env, derive_seed, env_class, make_env, reason
from lamer import MEMORIES, Policy, Trial, Turn, all_reduce_sum, print0, unwrap, world_size
from policy import (
    checkpoints,
    is_tiny,
    load_policy,
    newest_checkpoint,
    older_checkpoint,
    save_policy,
    saved_config,
    warm_policy,
)
from sampler import (
    Chat,
    ContinuousSampler,
    GenerateSampler,
    Sampling,
    first_prompt,
    make_sampler,
    rollout,
    summarize,
    uniforms,
)

torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every new shape of a batch
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

# ---------------------------------------------------------------------------- the options


def option(default: Any, meaning: str, **limits: Any) -> Any:
    """A field of Config: default, help, and what is allowed (choices, least, most, above)."""
    return field(default=default, metadata={"help": meaning, **limits})


STYLES = ("full", "direct", "compact")
SAMPLERS = ("continuous", "generate")
DTYPES = ("float32", "bfloat16")
MOST_SEED = 2**32 - 1


@dataclass
class Config:
    """All options of a run, with the paper's values where it gives one; also the command line.

    A recipe for the machine, the environment and the tiny policy changes a few (`recipe`), then
    come the flags. What the environment's constructor takes are flags, too, kept in `env_options`.
    """

    env: str = option("lockbox", "lockbox, minesweeper, sokoban, webshop, alfworld, file.py:Class")
    model: str = option("Qwen/Qwen3-4B", "a folder, a hub name, or tiny")
    out: str = option("", "run folder; empty: runs/<env>-<number>")
    resume: str = option("", "run folder to go on with; RUN/step_N with a new --out")
    seed: int = option(0, "everything random in the run follows from it", least=0, most=MOST_SEED)
    steps: int = option(300, "training steps", least=0)
    # the trial
    episodes: int = option(3, "N, episodes per trial; 1 is the RL baseline", least=1)
    num_tasks: int = option(16, "tasks per step, over all processes", least=1, most=100_000)
    group_size: int = option(
        8, "trials per task, which advantages compare; 24 for RL", least=2, most=10_000
    )
    memory: str = option("reflection", "what later episodes see of a failed one", choices=MEMORIES)
    style: str = option("full", "prompts; direct: no reasoning, compact: tiny", choices=STYLES)
    # credit
    preset: str = option("paper", "or the official code's choices", choices=("paper", "official"))
    reward: str = option("env", "success: only the win counts", choices=("env", "success"))
    credit: str = option("paper", "official: a recursion", choices=("paper", "official"))
    estimator: str = option("gigpo", "of the advantages", choices=lamer.ESTIMATORS)
    advantage_norm: str = option("mean", "of reinforce and gigpo", choices=("mean", "mean_std"))
    step_weight: float = option(1.0, "weight of gigpo's step part", least=0)
    gamma_step: float = option(0.95, "discount from turn to turn", least=0, most=1)
    gamma_traj: float = option(
        0.6, "discount from episode to episode; 0 is greedy", least=0, most=1
    )
    gae_lambda: float = option(1.0, "ppo: below 1 trusts the value head; needs --credit official")
    invalid_penalty: float = option(
        0.5, "taken from the advantage of a reply that cannot be parsed", least=0
    )
    # the update
    lr: float = option(1e-6, "learning rate", least=0, most=1)
    value_lr: float = option(1e-3, "ppo: learning rate of the value head", least=0, most=1)
    clip: float = option(0.2, "range of the probability ratio", above=0)
    dual_clip: float = option(0.0, "bound on the loss of tokens with negative advantage; 0: none")
    entropy_coef: float = option(0.0, "weight of the entropy in the objective", least=0)
    kl_coef: float = option(0.0, "weight of the KL to the starting model, a second copy", least=0)
    grad_clip: float = option(1.0, "largest gradient norm", above=0)
    weight_decay: float = option(0.0, "AdamW's", least=0)
    beta2: float = option(0.999, "AdamW's", least=0, most=0.99999)
    minibatch: int = option(64, "turns per optimizer step, over all processes", least=1)
    microbatch_tokens: int = option(4096, "per pass; lower it when memory runs out", least=1)
    grad_checkpoint: bool = option(True, "recompute activations in backward: memory for time")
    # sampling
    sampler: str = option("continuous", "or plain model.generate", choices=SAMPLERS)
    slots: int = option(0, "trials decoded at once; 0: up to 128, a GPU as many as fit", least=0)
    max_prompt: int = option(2048, "tokens; longer prompts are shortened", least=1)
    max_reply: int = option(1024, "tokens", least=1)
    temperature: float = option(1.0, "in training, of the sampler and of the loss", above=0)
    # evaluation, saving, machine
    eval_every: int = option(25, "steps; 0 is never", least=0)
    eval_tasks: int = option(64, "fixed tasks, their seeds disjoint from training", least=1)
    save_every: int = option(25, "steps; the last step is always saved", least=0)
    keep: int = option(2, "checkpoints kept, newest first", least=1)
    tensorboard: bool = option(False, "also log for TensorBoard, where it is installed")
    device: str = option("cuda", "cpu or cuda", choices=("cpu", "cuda"))
    dtype: str = option("bfloat16", "of sampler and products; weights are fp32", choices=DTYPES)
    # the warm start, and the tiny policy
    warm_steps: int = option(0, "steps of imitating a scripted player, before RL", least=0)
    warm_batch: int = option(32, "turns per step of imitation, of whole trials", least=1)
    warm_lr: float = option(1e-4, "peak learning rate of imitation", above=0, most=1)
    warm_episodes: int = option(3, "episodes per imitated trial, if --episodes is less", least=1)
    tiny_hidden: int = option(128, "width", least=8)
    tiny_layers: int = option(4, "depth", least=1)

    env_options: dict[str, Any] = field(default_factory=dict)


OFFICIAL = dict(credit="official", dual_clip=3.0, entropy_coef=0.001, weight_decay=0.01)
ON_CPU = dict(device="cpu", model="tiny", dtype="float32")
ENV_RECIPES = {  # the paper's, or the official scripts'
    "lockbox": dict(episodes=2, warm_episodes=2),
    "sokoban": dict(gamma_traj=0.9),
    "webshop": dict(steps=150, num_tasks=8, max_prompt=8192),
    "alfworld": dict(steps=150, num_tasks=8, max_prompt=4096),
}
TINY_RECIPE = dict(  # found by trying (README)
    steps=100,
    style="compact",
    lr=3e-4,
    minibatch=256,
    grad_checkpoint=False,
    max_prompt=192,
    max_reply=64,
    warm_steps=600,
    warm_batch=64,
    warm_lr=2e-3,
)
TINY_ENV_RECIPES = {
    "lockbox": dict(
        steps=90,
        warm_steps=1200,  # after 600 one policy of four did not yet open a written code
        lr=5e-4,
        beta2=0.95,
        minibatch=64,
        max_prompt=48,
        max_reply=16,
        tiny_hidden=64,
        tiny_layers=2,
    ),
    "minesweeper": dict(
        warm_steps=1200,  # after 600 notes were hardly used before RL
        env_options=dict(size=4, mines=2, turns=9),
    ),
    "sokoban": dict(steps=120, warm_steps=500, warm_batch=48, env_options=dict(boxes=1)),
    "webshop": dict(
        steps=80,
        minibatch=128,
        max_prompt=256,
        warm_steps=2400,
        warm_lr=3e-3,
        env_options=dict(turns=7),  # one purchase: what it teaches is for the next episode
    ),
    "alfworld": dict(
        steps=60,
        minibatch=128,
        max_prompt=256,
        max_reply=80,
        warm_steps=3600,
        warm_lr=3e-3,
        env_options=dict(receptacles=8, objects=8),
    ),
}
# A model of the hub small enough for a CPU, after a warm start; Lockbox's is found by trying
# (README), the other games' are sizes to begin with.
HUB_ON_CPU = dict(
    style="direct",
    lr=1e-5,
    num_tasks=8,
    minibatch=1024,
    grad_checkpoint=False,
    max_prompt=1024,
    max_reply=64,
)
HUB_ON_CPU_ENVS = {
    "lockbox": dict(
        steps=12,
        max_prompt=512,
        max_reply=16,
        env_options=dict(novice_peeks=0.4, novice_care=0.9),
    ),
    "minesweeper": dict(
        steps=12, num_tasks=4, max_reply=80, env_options=dict(size=4, mines=2, turns=9)
    ),
    "alfworld": dict(
        steps=12, num_tasks=4, max_reply=96, env_options=dict(receptacles=8, objects=8)
    ),
}
# What may change when a run is resumed: nothing that changes the numbers, but for how long it goes.
RESUME_OPTIONS = ("steps", "eval_every", "save_every", "keep", "device", "slots")
RESUME_OPTIONS += ("microbatch_tokens", "grad_checkpoint", "tensorboard")
LOGS = ("metrics.jsonl", "evals.jsonl")


def recipe(env: str, model: str, is_warmed_on_cpu: bool = False) -> dict[str, Any]:
    """What differs from the paper's values for this environment and kind of policy."""
    options = ENV_RECIPES.get(env, {})
    if model == "tiny":
        return options | TINY_RECIPE | TINY_ENV_RECIPES.get(env, {})
    if is_tiny(model):  # trained before
        options = options | TINY_RECIPE | TINY_ENV_RECIPES.get(env, {})
    elif is_warmed_on_cpu:
        options = options | HUB_ON_CPU | HUB_ON_CPU_ENVS.get(env, {}) | {"dtype": cpu_dtype()}
    return options | {"warm_steps": 0}


def cpu_dtype() -> str:
    """bfloat16 where the CPU has instructions for it; else float32, ten times as fast there."""
    able = torch.cpu.get_capabilities()
    names = ("amx_bf16", "avx512_bf16", "bf16")  # the last one is Arm's
    return "bfloat16" if any(able.get(name) for name in names) else "float32"


def default_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_config(**given: Any) -> Config:
    """The options of a run: the paper's values, preset, recipe, then what was given.

    ValueError for what cannot be.
    """
    options = {}
    if given.get("preset") == "official":
        options |= OFFICIAL
    device = given.get("device", default_device())
    if device == "cpu":
        options |= ON_CPU
    model = given.get("model", options.get("model", Config.model))
    is_warmed_on_cpu = device == "cpu" and given.get("warm_steps", 0) > 0
    options |= recipe(given.get("env", Config.env), model, is_warmed_on_cpu)
    sizes = options.pop("env_options", {})
    own = given.get("env_options", {})
    if "data" in own:  # the recipe's sizes are those of generated tasks
        sizes = {}
    config = Config(**options | given | {"env_options": sizes | own})
    return check_config(config)


def check_limits(cls: type, options: dict[str, Any]) -> None:
    """Raise a ValueError for an option outside of what its field of the dataclass allows."""
    for each in fields(cls):
        value, limits = options.get(each.name, each.default), each.metadata
        if isinstance(value, float) and not math.isfinite(value):
            problem = "be a finite number"
        elif "choices" in limits and each.name in options and value not in limits["choices"]:
            problem = f"be one of {', '.join(limits['choices'])}"
        elif "least" in limits and not value >= limits["least"]:
            problem = f"be at least {limits['least']}"
        elif "most" in limits and not value <= limits["most"]:
            problem = f"be at most {limits['most']}"
        elif "above" in limits and not value > limits["above"]:
            problem = f"be above {limits['above']}"
        else:
            continue
        raise ValueError(f"--{each.name} must {problem}, not {value} ({limits['help']})")


def check_config(config: Config) -> Config:
    """Raise a ValueError in one line for options that cannot be; returns the config as it runs."""
    check_limits(Config, vars(config))
    if config.estimator == "ppo" and config.preset == "official":
        raise ValueError(
            "--preset official has no ppo here: the official value is one per token, ours per turn"
        )
    is_recursion = config.credit == "official"
    if not 0 <= config.gae_lambda <= 1 or (config.gae_lambda < 1 and not is_recursion):
        raise ValueError("--gae_lambda is from 0 to 1, and below 1 it needs --credit official")
    if config.dual_clip != 0 and not config.dual_clip > 1:
        raise ValueError(f"--dual_clip must be 0 (off) or above 1, got {config.dual_clip}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch finds no CUDA GPU here; use --device cpu")
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard: pip install tensorboard, or leave it out")
    if config.model == "tiny" and config.warm_steps < 1:
        raise ValueError("--warm_steps must be at least 1 for the tiny policy")
    config.model = newest_checkpoint(config.model)
    if config.episodes == 1:
        config.memory = "none"
    return config


class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with one line."""

    def error(self, message: str) -> None:
        sys.exit(f"{self.prog}: {message} (--help lists all options)")


class Flag(NamedTuple):
    """What the command line needs to know of an option."""

    kind: type
    default: Any
    meaning: str


def env_flags(env: str) -> dict[str, Flag]:
    """The parameters of the environment's constructor, with the help its docstring has for them."""
    cls = env_class(env)
    hints = typing.get_type_hints(cls.__init__)
    flags = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        kind = hints.get(name, type(parameter.default))
        if typing.get_origin(kind) in (UnionType, typing.Union):  # int | None, Optional[int]
            kind = typing.get_args(kind)[0]
        if kind in (int, float, str, bool):
            line = re.search(rf"^ *{name}: (.*)$", inspect.getdoc(cls) or "", re.M)
            default = None if parameter.default is parameter.empty else parameter.default
            flags[name] = Flag(kind, default, line[1] if line else "")
    return flags


def parse_flags(cls: type, argv: Sequence[str], description: str) -> dict[str, Any]:
    """The flags given: one for every field of the dataclass, and for the environment's options.

    Two passes over the command line, since the environment is named there, or is that of the run
    or model named there. Dashes in names serve as underscores.
    """

    def underscored(word: str) -> str:
        name, is_assigned, value = word.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
            name = re.sub("^--no_", "--no-", name)
        return name + is_assigned + value

    argv = [underscored(word) for word in argv]
    first = Parser(add_help=False, allow_abbrev=False)
    for name in ("--env", "--model", "--resume"):
        first.add_argument(name)
    named = first.parse_known_args(argv)[0]
    env = named.env
    if env is None and not {"-h", "--help"} & {*argv}:  # help runs no file but that of --env
        saved = saved_config(newest_checkpoint(named.resume or named.model or ""))
        env = saved.get("env")
        if ".py:" in str(env):  # a model from somebody else must not choose what code runs here
            raise ValueError(f"that run played {env}; a file runs only when named: --env {env}")
    env = env or Config.env

    flags = {}
    for each in fields(cls):
        if "help" in each.metadata:
            meaning = each.metadata["help"]
            if "choices" in each.metadata:
                meaning += f" ({', '.join(each.metadata['choices'])})"
            flags[each.name] = Flag(each.type, each.default, meaning)
    own = env_flags(env)
    if both := [name for name in own if name in RESERVED]:
        raise ValueError(f"--env {env}: the name of its option {both[0]} is taken; rename it there")
    parser = Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser.add_argument_group("options"), flags)
    add_flags(parser.add_argument_group(f"options of {env} (--env NAME --help: of others)"), own)
    given = vars(parser.parse_args(argv))
    env_options = {name: given.pop(name) for name in own if name in given}
    return given | ({"env_options": env_options} if env_options else {})


# Names of eval.py's own options; an environment that took one could not be evaluated.
RESERVED = {each.name for each in fields(Config)}
RESERVED |= {"prompting", "json", "show", "top_p", "top_k"}


def add_flags(group: Any, flags: dict[str, Flag]) -> None:
    """Add the flags to a group of an argument parser; what is not given leaves no trace."""
    for name, flag in flags.items():
        shown = "" if flag.default in ("", None) else f" [{flag.default}]"
        options = {"default": argparse.SUPPRESS, "help": (flag.meaning + shown).replace("%", "%%")}
        if flag.kind is bool:
            group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, **options)
        else:
            metavar = flag.kind.__name__.upper()
            group.add_argument(f"--{name}", type=flag.kind, metavar=metavar, **options)


def describe(config: Config, given: dict[str, Any]) -> str:
    """The options, a line each for yours, those of recipes, and what is left as it is."""
    changed = "of that run" if config.resume else "by recipe"
    lines = {"given": [], changed: [], "as by default": []}
    for each in fields(Config):
        value = getattr(config, each.name)
        if each.name == "env_options":
            own = given.get("env_options", {})
            for name, choice in value.items():
                lines["given" if name in own else changed].append(f"{name}={choice}")
        elif each.name in given:
            lines["given"].append(f"{each.name}={value}")
        elif value != each.default:
            lines[changed].append(f"{each.name}={value}")
        elif value != "":
            lines["as by default"].append(f"{each.name}={value}")
    return "\n".join(f"{kind}: {' '.join(words)}" for kind, words in lines.items() if words)


def prepare(argv: Sequence[str]) -> tuple[Config, dict[str, Any], int]:
    """The options, those that were given, and the number of steps already done."""
    given = parse_flags(Config, argv, __doc__)
    if not given.get("resume"):
        saved = saved_config(newest_checkpoint(given["model"])) if "model" in given else {}
        start = {"env": saved["env"], "style": saved["style"]} if saved else {}
        own = given.get("env_options", {})
        if saved and given.get("env", saved["env"]) == saved["env"] and "data" not in own:
            own = saved["env_options"] | own  # the game that it knows
        config = make_config(**start | given | {"env_options": own})
        env = make_env(config.env, **config.env_options)
        check_env(config.env, env)  # before a long warm start
        if not config.out:
            stem = Path("runs", env.name)
            numbers = (Path(f"{stem}-{i}") for i in range(1, 10**6))
            config.out = str(next(path for path in numbers if not path.exists()))
        elif checkpoints(config.out):
            raise ValueError(
                f"--out {config.out} holds a run already; --resume it, or choose another folder"
            )
        return config, given, 0
    run, done = Path(given["resume"]), checkpoints(given["resume"])
    if (run / "lamer.json").is_file():  # RUN/step_N: go on from there, as another run
        done, run = {int(run.name[5:]): run}, run.parent
        if "out" not in given:
            raise ValueError(
                f"--resume {given['resume']} needs a new folder to go on in: --out NEW"
            )
    if not done:
        raise ValueError(f"--resume {run}: no complete checkpoint there")
    if "out" in given and checkpoints(given["out"]):
        raise ValueError(f"--out {given['out']} holds a run already; choose another folder")
    step = max(done)
    saved = saved_config(str(done[step]))
    if not saved:
        older = older_checkpoint(done[step])
        raise ValueError(f"{done[step]} has no lamer.json; take {older or 'another checkpoint'}")
    out = given.get("out", str(run))
    options = {k: v for k, v in given.items() if k not in ("resume", "out", "env_options")}
    defaults = {name: flag.default for name, flag in env_flags(saved["env"]).items()}
    for name, value in (options | given.get("env_options", {})).items():
        before = (defaults | saved | saved["env_options"]).get(name)
        if name not in RESUME_OPTIONS and before != value:
            raise ValueError(
                f"--resume {run}: that run has --{name} {before}, which cannot become {value}"
            )
    config = config_from(saved, **options | {"out": out, "resume": str(done[step])})
    return config, given, step


def config_from(saved: dict[str, Any], **changes: Any) -> Config:
    """The saved options of a run with these changes; ValueError for those of another version."""
    unknown = [name for name in saved if name not in {each.name for each in fields(Config)}]
    if unknown or "env_options" not in saved:
        raise ValueError(f"saved by another version of lamer (options {unknown}); use that one")
    return check_config(Config(**saved | changes))


# ------------------------------------------------------------- set-up: processes, model, optimizer


class Run(NamedTuple):
    """What one process holds."""

    policy: Policy | DistributedDataParallel
    optimizer: torch.optim.Optimizer
    sampler: ContinuousSampler | GenerateSampler
    reference: Policy | None  # the starting model, frozen; only with --kl_coef
    rank: int
    world: int


def start_run(config: Config) -> Run:
    """Set up processes, policy, optimizer and sampler; ValueError for what the user can mend."""
    rank, world = start_processes(config)
    if rank == 0:
        try:
            Path(config.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out {config.out} cannot be made: {error.strerror}") from error
        if not os.access(config.out, os.W_OK):
            raise ValueError(f"--out {config.out} cannot be written to")
        for stale in Path(config.out).glob("*.unfinished"):  # of a killed run
            shutil.rmtree(stale, ignore_errors=True)
    start = config.model
    if config.warm_steps and (config.kl_coef or not config.resume):
        if rank == 0:
            warm_policy(config)
        if world > 1:
            dist.barrier()
        start = str(warm_policy(config))
    source = config.resume or start  # of a resumed run its checkpoint

    is_bf16 = config.dtype == "bfloat16"
    model, chat = load_in_turn(source, torch.float32, config.device)
    sampling_model = half_copy(model) if is_bf16 else model
    if config.grad_checkpoint:
        model.activation_checkpointing_enable({"use_reentrant": False})
    value_head = make_value_head(model, config, source) if config.estimator == "ppo" else None
    policy = Policy(model, chat.vocab_size, config.temperature, is_bf16, value_head).eval()
    policy.check_trees(first_prompt(config, chat))
    optimizer = make_optimizer(policy, config)
    if config.resume:
        load_moments(policy, optimizer, Path(source))
    reference = None
    if config.kl_coef:
        frozen, _ = load_in_turn(start, getattr(torch, config.dtype), config.device)
        reference = Policy(frozen, chat.vocab_size, config.temperature, is_bf16).eval()
    if world > 1:
        # Rotary frequencies are buffers: without the first flag every forward would broadcast them.
        policy = DistributedDataParallel(
            policy, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
        for _ in range(2):  # DDP rebuilds its buckets after the first: now, while memory is free
            lamer.synchronize(policy)
    if rank == 0:
        check_disk(config, model.num_parameters())
    slots = count_slots(config, model, config.num_tasks // world * config.group_size, world)
    sampler = make_sampler(config, sampling_model, chat, slots)
    return Run(policy, optimizer, sampler, reference, rank, world)


PR_SET_PDEATHSIG = 1  # in Linux' prctl: the signal to get when the parent process dies
M_MMAP_THRESHOLD = -3  # in glibc's mallopt: what is larger goes back to the system when freed


def start_processes(config: Config) -> tuple[int, int]:
    """Join the other processes of torchrun, if there are any; returns rank and world size."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if config.num_tasks % world:
        raise ValueError(
            f"--num_tasks {config.num_tasks} cannot be dealt evenly to {world} processes"
        )
    is_gpu = config.device == "cuda"
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        # Else glibc raises it as it likes, and what activations leave behind lies about in pieces.
        libc.mallopt(M_MMAP_THRESHOLD, 2**22)
    if is_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        idle = torch.cuda.device_count() - int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if idle > 0:
            print0(f"{idle} GPUs stay idle; torchrun --nproc-per-node=gpu train.py ... uses all")
    if world > 1:
        if libc:
            # A killed torchrun would leave us writing to a folder that another run goes on in.
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # They wait for each other through whole rollouts and saves: ten minutes are too short.
        dist.init_process_group("nccl" if is_gpu else "gloo", timeout=timedelta(hours=2))
        shared = [config.out]  # each may have found another free number
        dist.broadcast_object_list(shared)
        config.out = shared[0]
    return rank, world


def load_in_turn(name: str, dtype: torch.dtype, device: str) -> tuple[Any, Chat]:
    """load_policy, one process after another: on its way to the GPUs a model is in RAM once."""
    for rank in range(world_size()):
        if world_size() == 1 or rank == dist.get_rank():
            loaded = load_policy(name, dtype, device)
        if world_size() > 1:
            dist.barrier()
    return loaded


def half_copy(model: Any) -> Any:
    """A bfloat16 copy of the model for sampling, to be refreshed after every update."""
    half = copy.deepcopy(model).requires_grad_(False)
    for weight in half.parameters():  # not half.to(dtype): rotary frequencies must stay fp32
        weight.data = weight.data.bfloat16()
    return half


@torch.no_grad()
def refresh(sampling_model: Any, policy: Policy | DistributedDataParallel) -> None:
    """Give the sampler's copy the weights of the policy, where it is a copy."""
    model = unwrap(policy).model
    if sampling_model is not model:
        for half, weight in zip(sampling_model.parameters(), model.parameters(), strict=True):
            half.copy_(weight)


def make_value_head(model: Any, config: Config, source: str) -> torch.nn.Linear:
    """ppo's linear head (h -> 1) in fp32: zeros, or that of the checkpoint to resume."""
    head = torch.nn.Linear(model.config.get_text_config().hidden_size, 1, device=model.device)
    for weight in head.parameters():
        torch.nn.init.zeros_(weight)
    if config.resume:
        path = Path(source, "value_head.pt")
        try:
            head.load_state_dict(torch.load(path, weights_only=True))
        except Exception as error:
            raise ValueError(f"{path} cannot be read: {reason(error)}") from error
    return head


def make_optimizer(policy: Policy, config: Config) -> torch.optim.Optimizer:
    """AdamW; with several processes its moments are divided among them (ZeRO stage 1)."""
    groups = [{"params": [*policy.model.parameters()]}]
    if policy.value_head is not None:
        head = [*policy.value_head.parameters()]
        groups.append({"params": head, "lr": config.value_lr, "weight_decay": 0.0})
    options = dict(lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay)
    # The default on a GPU makes temporary copies as large as a moment.
    options["fused"] = config.device == "cuda"
    if world_size() > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # takes a second

        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)
    return torch.optim.AdamW(groups, **options)


# -------------------------------------------------------------------- memory of a GPU


def memory_plan(config: Config, shape: Any, num_weights: int, world: int) -> dict[str, float]:
    """Gigabytes that training needs on each GPU, by what for; "slot": of one row of the cache.

    Activations are what the backward pass keeps of the longest micro-batch, in bytes a token and
    layer as measured on Qwen3's layers, and the mask of the tree; with --grad_checkpoint the input
    of every layer, and one layer in full.
    """
    width, layers, heads = shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads
    head = getattr(shape, "head_dim", None) or width // heads
    kv_heads = getattr(shape, "num_key_value_heads", heads)
    mlp = getattr(shape, "intermediate_size", None) or 4 * width
    size, half = (2, 2 * num_weights) if config.dtype == "bfloat16" else (4, 0)
    longest = config.max_prompt + config.max_reply
    tokens = max(config.microbatch_tokens, longest)
    a_token = 25 * width + 4 * size * mlp + (4 + 3 * size) * head * (heads + kv_heads)
    a_token += 2 * size * head * (heads - kv_heads)  # beside a mask keys and values are repeated
    layer = tokens * a_token + half / layers  # autocast keeps the bf16 weights it made
    kept = layers * tokens * 4 * width + layer if config.grad_checkpoint else layers * layer
    plan = {
        "weights": 4 * num_weights + half,
        "moments": 8 * num_weights / world,
        "reference": size * num_weights if config.kl_coef else 0,
        "gradients": 4 * num_weights,
        "activations": kept + size * tokens**2 + 3 * 4 * min(2**26, tokens * shape.vocab_size),
        "slot": layers * 2 * kv_heads * head * size * (longest + 1),
    }
    return {name: need / 1e9 for name, need in plan.items()}


def fit_slots(plan: dict[str, float], total_gb: float, most: int, world: int) -> int:
    """How many slots fit into `total_gb`, up to `most`, beside what else is needed.

    The cache exists during rollouts, activations during updates: the larger of the two must fit.
    With one process gradients come and go, too; with several DDP keeps them in its buckets.
    ValueError if not even one slot fits.
    """
    in_update = plan["activations"] + (plan["gradients"] if world == 1 else 0)
    free = 0.92 * total_gb - (sum(plan.values()) - plan["slot"] - in_update)
    slots = min(most, int(free / plan["slot"]))  # the 8% are for the allocator's gaps
    if slots < 1 or in_update > free:
        parts = ", ".join(f"{name} {need:.1f}" for name, need in plan.items())
        raise ValueError(
            f"GB needed per GPU: {parts}, of {total_gb:.1f}: too much; lower --microbatch_tokens "
            "or --max_prompt, or take more GPUs"
        )
    return slots


def count_slots(config: Config, model: Any, num_trials: int, world: int = 0) -> int:
    """How many trials are decoded at once: --slots, or on a GPU as many as fit into its memory.

    `world` is the number of training processes, 0 in evaluation.
    """
    if config.device != "cuda":
        return config.slots or min(128, num_trials)
    shape, num_weights = model.config.get_text_config(), model.num_parameters()
    plan = memory_plan(config, shape, num_weights, world or 1)
    free = torch.cuda.mem_get_info(config.device)[0] + torch.cuda.memory_allocated(config.device)
    total_gb = free / 1e9  # less what other programs hold
    if not world:
        size = 2 if config.dtype == "bfloat16" else 4
        plan = {"weights": size * num_weights / 1e9, "activations": 0.0, "slot": plan["slot"]}
    slots = fit_slots(plan, total_gb, config.slots or num_trials, world)
    parts = " + ".join(f"{name} {need:.1f}" for name, need in plan.items() if need)
    print0(f"memory per GPU in GB: {parts} x {slots}, of {total_gb:.1f}")
    return slots


# --------------------------------------------------------------------- checkpoints and logs


def save_checkpoint(config: Config, run: Run, step: int) -> None:
    """Save weights and optimizer after `step` steps; keep the newest `keep` checkpoints.

    Every process writes the moments it owns into one draft folder. Process 0 gives it its name
    when all have succeeded; if one fails, all raise the OSError. So a checkpoint is complete or
    not there.
    """
    folder = Path(config.out, f"step_{step:06d}")
    draft = folder.with_name(f"{folder.name}.unfinished")
    policy, problem = unwrap(run.policy), ""
    try:
        draft.mkdir(parents=True, exist_ok=True)
        torch.save(own_moments(policy, run.optimizer), draft / f"optimizer_{run.rank}.pt")
        if run.rank == 0:
            save_policy(draft, policy.model, run.sampler.chat.tokenizer, config, step)
            if policy.value_head is not None:
                torch.save(policy.value_head.state_dict(), draft / "value_head.pt")
    except Exception as error:
        problem = reason(error)
    [num_failed] = all_reduce_sum([1.0 if problem else 0.0], config.device)
    if run.rank == 0 and not num_failed:
        draft.rename(folder)
        saved = checkpoints(config.out)
        for old in sorted(saved)[: -config.keep]:
            # Under its own name a half-deleted one would count as complete.
            half_deleted = saved[old].rename(f"{saved[old]}.unfinished")
            shutil.rmtree(half_deleted, ignore_errors=True)
    if num_failed:
        shutil.rmtree(draft, ignore_errors=True)
        raise OSError(f"cannot save {folder}: {problem or 'another process failed'}")


def check_disk(config: Config, num_weights: int) -> None:
    """ValueError if not even one checkpoint fits on the disk: weights and two moments in fp32."""
    need, free = 12 * num_weights / 1e9, shutil.disk_usage(config.out).free / 1e9
    if need > free:
        raise ValueError(
            f"--out {config.out}: a checkpoint takes {need:.1f} GB, {free:.1f} are free"
        )
    if (config.keep + 1) * need > free:
        print0(f"{config.keep + 1} checkpoints of {need:.1f} GB do not fit into {free:.1f} free GB")


def own_moments(
    policy: Policy, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, torch.Tensor]]:
    """AdamW's step and moments by weight name, of the weights that this process updates."""
    names = {weight: name for name, weight in policy.named_parameters()}
    return {names[weight]: state for weight, state in local(optimizer).state.items()}


def load_moments(policy: Policy, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Take up what any number of processes saved with `own_moments`."""
    saved, parts = {}, [*folder.glob("optimizer_*.pt")]
    if not parts:
        raise ValueError(f"{folder} has no optimizer_*.pt to go on with")
    for path in parts:
        try:
            saved |= torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} cannot be read: {reason(error)}") from error
    names = {weight: name for name, weight in policy.named_parameters()}
    adamw = local(optimizer)
    for weight in [weight for group in adamw.param_groups for weight in group["params"]]:
        if saved and names[weight] not in saved:
            raise ValueError(f"{folder}: no optimizer_*.pt has the moments of {names[weight]}")
        for key, value in saved.get(names[weight], {}).items():
            # AdamW keeps its step count on the CPU, but for the fused kernel.
            is_on_cpu = key == "step" and not adamw.defaults.get("fused")
            device = "cpu" if is_on_cpu else weight.device
            adamw.state[weight][key] = value.to(device, copy=True)


def local(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """This process' own AdamW; ZeRO keeps it inside."""
    return getattr(optimizer, "optim", optimizer)


def trim_log(old: Path, new: Path, steps: int) -> None:
    """Take over a log but for the rows of steps that will be done again."""
    kept = []
    for line in old.read_text().splitlines() if old.exists() else []:
        try:
            if json.loads(line)["step"] <= steps:
                kept.append(f"{line}\n")
        except (KeyError, TypeError, ValueError):
            continue  # a killed run may leave half a line
    draft = new.with_suffix(".unfinished")
    draft.write_text("".join(kept))
    draft.replace(new)


# --------------------------------------------------------------------------- one step


def task_seeds(config: Config, trial_ids: Sequence[int], step: int) -> list[int]:
    """The task of every trial: a group shares one, and every step has others."""
    groups = [i // config.group_size for i in trial_ids]
    return [derive_seed("task", config.seed, step, group) % EVAL_SEED for group in groups]


def assign_credit(config: Config, policy: Policy, trials: Sequence[Trial]) -> dict[str, float]:
    """Returns across episodes (eq. 2 and 3), then advantages (eq. 4); returns `zero_shares`."""
    discounts = config.gamma_step, config.gamma_traj
    lamer.compute_returns(trials, config.credit, *discounts, config.reward)
    groups = in_groups(config, trials)
    how = config.estimator, config.advantage_norm, config.step_weight
    if config.preset == "official":
        lamer.official_advantages(groups, *how, config.invalid_penalty, config.reward)
        return zero_shares(config, trials)
    if config.estimator == "ppo":
        lamer.compute_values(policy, trials, config)
        lamer.ppo_advantages(trials, *discounts, config.gae_lambda)
    else:
        lamer.compute_advantages(groups, *how)
    shares = zero_shares(config, trials)
    lamer.penalize_invalid(trials, config.invalid_penalty, config.device)
    return shares


def in_groups(config: Config, trials: Sequence[Trial]) -> list[Sequence[Trial]]:
    """The trials task by task."""
    size = config.group_size
    return [trials[i : i + size] for i in range(0, len(trials), size)]


def zero_shares(config: Config, trials: Sequence[Trial]) -> dict[str, float]:
    """By phase and episode, the share of turns whose advantage is exactly 0, but for penalties.

    They teach nothing: all trials of the task did equally well there. Near 1, tasks are too easy
    or too hard, or the policy no longer varies. "groups" is the share of tasks with no other turn.
    """
    names = [f"{phase} {n + 1}" for n in range(config.episodes) for phase in ("play", "reflect")]
    counts = {name: [0, 0] for name in (*names, "groups")}  # zeros, of how many
    for turn in [turn for trial in trials for turn in trial.turns]:
        count = counts[f"{turn.phase} {turn.episode + 1}"]
        count[0] += 1 if turn.advantage == 0 else 0
        count[1] += 1
    for group in in_groups(config, trials):
        is_flat = all(turn.advantage == 0 for trial in group for turn in trial.turns)
        counts["groups"][0] += is_flat
        counts["groups"][1] += 1
    sums = all_reduce_sum([number for pair in counts.values() for number in pair], config.device)
    pairs = zip(counts, sums[::2], sums[1::2], strict=True)
    return {name: zeros / num for name, zeros, num in pairs if num}


MINIBATCH_DRAW = 1 << 40  # in the place of a turn's number: the draw of a trial's mini-batch


def deal_minibatches(
    config: Config, trials: Sequence[Trial], trial_ids: Sequence[int], step: int
) -> list[list[Turn]]:
    """This process' turns, in mini-batches of about `minibatch` turns over all processes.

    A trial stays together, since its turns have much in common, which is computed once. Which
    mini-batch it falls into depends only on (seed, step, trial).
    """
    [num_turns] = all_reduce_sum([sum(len(trial.turns) for trial in trials)], config.device)
    minibatches = [[] for _ in range(max(1, round(num_turns / config.minibatch)))]
    draws = uniforms(config.seed, step, np.array(trial_ids), MINIBATCH_DRAW)
    for trial, draw in zip(trials, draws, strict=True):
        minibatches[int(draw * len(minibatches))] += trial.turns
    return minibatches


EVAL_DRAWS = 2**32  # added to the step in evaluations: their draws are not those of training


def eval_sampling(chat: Chat, **given: Any) -> Sampling:
    """How evaluations sample: hub models as in the paper, the tiny policy as it is."""
    options = dict(temperature=0.7, top_p=0.8, top_k=20)
    if chat.is_tiny:
        options = dict(temperature=1.0, top_p=1.0, top_k=0)
    return Sampling(**options | given)


def evaluate(config: Config, run: Run, step: int) -> tuple[dict[str, Any], list[Trial]]:
    """Success on fixed tasks, spread over the processes. RL policies get three attempts."""
    if config.episodes == 1:
        config = replace(config, episodes=3)
    limit = make_env(config.env, **config.env_options).num_eval_tasks()  # 0: no end of tasks
    num_tasks = min(config.eval_tasks, limit or config.eval_tasks)
    trial_ids = list(range(num_tasks))[run.rank :: run.world]
    sampling = eval_sampling(run.sampler.chat, seed=config.seed, step=EVAL_DRAWS + step)
    seeds = [EVAL_SEED + i for i in trial_ids]
    trials = rollout(config, run.sampler, seeds, trial_ids, sampling)
    result = {"step": step, "num_tasks": num_tasks, **summarize(trials, config)}
    return result | {"prompt_gap": lamer.prompt_gap(run.policy, trials, config)}, trials


# ------------------------------------------------------------------- what may be going wrong

# For a quantity of metrics.jsonl or evals.jsonl: when it is bad in its row, and what to say then.
WARNINGS = {
    "valid": (
        lambda row: row["valid"] < 0.5,
        "most replies cannot be parsed: imitate first (--warm_steps), or lower --lr; a model that "
        "reasons may need more --max_reply",
    ),
    "shortened": (
        lambda row: row["shortened"] > 0.1 * row["turns"],
        "more than a tenth of the prompts is shortened: raise --max_prompt",
    ),
    "entropy": (  # a policy that wins need not vary
        lambda row: row["entropy"] < 0.01 and row["success"][-1] < 0.9,
        "replies hardly vary, so there is no choice to learn: lower --lr, or give --entropy_coef",
    ),
    "prompt_gap": (
        lambda row: row["prompt_gap"] < 0.05,
        "replies no longer depend on the prompt: go back to an older checkpoint, lower --lr",
    ),
    "sampler_gap": (
        lambda row: row["sampler_gap"] > 0.05,
        "sampled and recomputed log-probabilities disagree: try --dtype float32, then "
        "--sampler generate",
    ),
}
MOST_SKIPPED = 3  # steps in a row whose gradients were not finite


class Log:
    """What a run writes down: metrics.jsonl, evals.jsonl, for TensorBoard if asked for; warnings.

    Only that of the first process writes.
    """

    def __init__(self, config: Config, is_first: bool):
        self.folder, self.is_first = Path(config.out), is_first
        self.said: set[str] = set()  # warnings, each once a run
        self.board = None
        if config.tensorboard and is_first:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(config.out)

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Append a row to NAME.jsonl; JSON has no NaN. Warn of what it shows to be going wrong."""
        if not self.is_first:
            return
        row = json.loads(json.dumps(row), parse_constant=lambda _: None)
        with open(self.folder / f"{name}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        for key, value in row.items() if self.board else ():
            parts = dict(enumerate(value, 1)) if isinstance(value, list) else value
            parts = parts if isinstance(parts, dict) else {"": value}
            for part, number in parts.items():
                if number is not None:
                    self.board.add_scalar(f"{name}/{key} {part}".strip(), number, row["step"])
        for key, (is_bad, remedy) in WARNINGS.items():
            if row.get(key) is not None and key not in self.said and is_bad(row):
                self.said.add(key)
                line = f"warning: step {row['step']}: {key} {row[key]:.3g}: {remedy}"
                tqdm.write(line, file=sys.stderr)


def draw_success(out: Path) -> None:
    """success.png: the curve of evals.jsonl; only where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = [json.loads(line) for line in (out / "evals.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    panel = figure.subplots()
    for k, shares in enumerate(zip(*(row["success"] for row in rows), strict=True), 1):
        panel.plot([row["step"] for row in rows], shares, marker=".", label=f"after episode {k}")
    panel.set(xlabel="training step", ylabel="success on fixed tasks", ylim=(0, 1))
    panel.legend(frameon=False)
    figure.savefig(out / "success.png")


# --------------------------------------------------------------------------- the run


def main(argv: Sequence[str]) -> None:
    try:
        config, given, done = prepare(argv)
    except ValueError as error:
        sys.exit(f"train.py: {error}")
    try:
        run = start_run(config)
    except ValueError as error:
        older = older_checkpoint(config.resume)
        sys.exit(f"train.py: {error}" + (f"; older: --resume {older} --out NEW" if older else ""))
    out, is_first = Path(config.out), run.rank == 0
    if is_first:
        (out / "config.json").write_text(json.dumps(asdict(config), indent=1))
        before = Path(config.resume).parent if config.resume else out
        for name in LOGS:
            trim_log(before / name, out / name, done if config.resume else -1)
    print0(describe(config, given))
    log = Log(config, is_first)

    tasks = range(run.rank, config.num_tasks, run.world)  # every process plays whole groups
    members = range(config.group_size)
    trial_ids = [task * config.group_size + member for task in tasks for member in members]
    bar = tqdm(
        total=config.steps,
        initial=done,
        desc=config.env,
        disable=not is_first,
        file=sys.stderr,
    )
    num_skipped = 0  # steps in a row
    if config.eval_every and not config.resume:
        evaluate_and_log(config, run, 0, log)
    for step in range(done, config.steps):
        clock = [time.perf_counter()]
        sampling = Sampling(config.seed, step, config.temperature)
        seeds = task_seeds(config, trial_ids, step)
        trials = rollout(config, run.sampler, seeds, trial_ids, sampling)
        clock.append(time.perf_counter())

        shares = assign_credit(config, run.policy, trials)
        clock.append(time.perf_counter())

        minibatches = deal_minibatches(config, trials, trial_ids, step)
        stats = lamer.update(run.policy, run.optimizer, minibatches, config, run.reference)
        refresh(run.sampler.model, run.policy)
        clock.append(time.perf_counter())

        row = {"step": step + 1, **summarize(trials, config), **stats}
        row["zero_advantage"] = shares
        spent = [round(end - begin, 3) for begin, end in pairwise(clock)]
        row["seconds"] = dict(zip(("rollout", "credit", "update"), spent, strict=True))
        row["tokens_per_second"] = round(row["reply_tokens"] / spent[0])
        row["peak_gb"] = peak_gb(config.device)
        log.add("metrics", row)
        num_skipped = 0 if stats["updates"] else num_skipped + 1
        if num_skipped == MOST_SKIPPED:
            sys.exit(
                f"train.py: no finite gradient in {MOST_SKIPPED} steps: lower --lr (or --dtype "
                f"float32); --resume goes on from the last checkpoint, if one was saved"
            )
        bar.set_postfix(
            success=percent(row["success"]),
            ret=f"{row['return']:.2f}",
            valid=f"{row['valid']:.0%}",
            tok_s=row["tokens_per_second"],
            refresh=False,
        )
        bar.update()
        is_last = step + 1 == config.steps
        if config.eval_every and (is_last or (step + 1) % config.eval_every == 0):
            evaluate_and_log(config, run, step + 1, log)
        if is_last or (config.save_every and (step + 1) % config.save_every == 0):
            save_checkpoint(config, run, step + 1)
    bar.close()
    if config.steps == 0 and not config.resume:  # the start itself was asked for
        save_checkpoint(config, run, 0)
    print0(f"done: python eval.py --model {config.out}")
    if run.world > 1:
        dist.barrier()  # else one may tear down what another still needs
        # DDP must die before its process group. The last to hold the group, it would wait for the
        # group's thread with Python's lock in hand, which that thread may want: 1 run in 60 hung.
        del run
        dist.destroy_process_group()


def evaluate_and_log(config: Config, run: Run, step: int, log: Log) -> None:
    """Evaluate; write the row, three whole trials as text, a curve, and a line for people."""
    result, trials = evaluate(config, run, step)
    log.add("evals", result)
    if run.rank == 0:
        text = "\n\n".join(map(str, trials[:3]))
        Path(config.out, f"trials_{step:06d}.txt").write_text(text, encoding="utf-8")
        draw_success(Path(config.out))
        success = percent(result["success"])
        line = f"step {step}: on {result['num_tasks']} fixed tasks, success {success}"
        tqdm.write(line, file=sys.stderr)


def percent(shares: Sequence[float]) -> str:
    """[0.125, 0.25] -> "12% / 25%"."""
    return " / ".join(f"{share:.0%}" for share in shares)


def peak_gb(device: str) -> float:
    """Peak memory so far: of the GPU, or of the process; 0 where the system does not tell."""
    if device == "cuda":
        return round(torch.cuda.max_memory_allocated() / 1e9, 3)
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.is_file() else None
    if found:  # where there is none, getrusage, in Linux with the peak of who started us
        return round(int(found[1]) * 1024 / 1e9, 3)
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, on macOS bytes
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 3)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; --resume goes on from the last checkpoint, if one was saved")
    except OSError as error:
        sys.exit(f"train.py: {error}; --resume goes on from the last checkpoint, if one was saved")
    except torch.OutOfMemoryError:
        sys.exit("train.py: out of GPU memory; lower --slots, then --microbatch_tokens")

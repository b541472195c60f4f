"""Train a language model by LaMer's meta-RL.

    python train.py --env minesweeper                                  one process: a laptop, or one GPU
    torchrun --nproc-per-node=gpu train.py --env sokoban               every GPU of a node
    python train.py --env minesweeper --episodes 1 --group_size 24     the RL baseline of equal budget
    python train.py --env my_game.py:Game --steps 50                   an environment of yours (see envs.Env)
    python train.py --resume runs/minesweeper-1                        go on as if never stopped

Without a GPU the policy is `tiny`: a Qwen3-shaped model of under a million weights, made on the spot and warm-started
by imitating a scripted player, so that meta-RL can be watched at work within minutes. From there on it is a model like
any other. Every random draw is a function of (seed, step, trial, turn, token), so a run is repeatable and resumes
exactly, on a GPU up to the order in which its kernels add.

Simplifications against the paper and the official code:
1. One process per GPU holds the whole model and plays its own tasks; no separate inference servers.
2. One pass over each batch of trials, as in the official scripts. PPO's value is one per turn, not per token.
3. Gradients are summed over processes once per optimizer step: what DistributedDataParallel does, by hand and in fp32.
4. The learning rate is constant.
"""

import argparse
import hashlib
import inspect
import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args

try:
    import resource
except ImportError:  # Windows
    resource = None

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # rollouts and updates cut memory differently

import torch
import torch.distributed as dist
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging as transformers_logging

import lamer
from envs import Env, derive_seed, make_env
from lamer import Chat, Reply, Sampling, Trial, Turn, all_reduce_sum

torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every new shape, and texts come in all lengths
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

# ----------------------------------------------------------------------------------------- the options


@dataclass
class EnvOptions:
    """Options of the environments. Which of them apply depends on `env`, and unset ones take its own defaults."""

    size: int | None = None  # side of the board or room
    mines: int | None = None  # MineSweeper
    turns: int | None = None  # model calls per episode
    boxes: int | None = None  # Sokoban
    min_solution: int | None = None  # Sokoban: least moves of a level's shortest solution
    max_solution: int | None = None  # Sokoban: most moves of a level's shortest solution
    codes: int | None = None  # Lockbox
    data: str | None = None  # WebShop, ALFWorld: folder with the genuine files; default: a generated world
    products: int | None = None  # WebShop: size of the catalogue
    human_goals: bool | None = None  # WebShop: people's instructions instead of synthetic ones
    tasks: str | None = None  # ALFWorld: task types, such as pick,look,clean,heat
    receptacles: int | None = None  # ALFWorld: at most so many in a generated room
    objects: int | None = None  # ALFWorld: at most so many in a generated room
    validation: str | None = None  # ALFWorld: evaluate in rooms unseen or seen in training


@dataclass
class Config(EnvOptions):
    """All options of a run; the flags are built from it. None is filled in from the tables below."""

    env: str = "lockbox"  # lockbox, minesweeper, sokoban, webshop, alfworld, or a class of yours as file.py:Class
    model: str | None = None  # tiny, a folder, or a hub name; default: tiny without a GPU, Qwen/Qwen3-4B with one
    out: str | None = None  # run folder; default: runs/<env>-<number>
    resume: str | None = None  # run folder to go on with
    seed: int = 0  # everything random in the run follows from it
    steps: int | None = None  # training steps (paper: 300)
    # the trial
    episodes: int | None = None  # N, episodes per trial (paper: 3; 1 is the RL baseline)
    num_tasks: int | None = None  # tasks per step, over all processes (paper: 16)
    group_size: int = 8  # trials per task (paper: 8, and 24 for RL)
    memory: str = "reflection"  # what later episodes see of a failed one: none, history, reflection, both
    style: str | None = None  # prompts: full, direct without reasoning, or compact for the tiny policy
    # credit
    preset: str = "paper"  # paper, or official for the choices of the official code (PRESETS)
    reward: str = "env"  # env, or success: only the win counts
    credit: str | None = None  # how returns cross episodes: paper or official (see lamer.cross_episode_returns)
    estimator: str = "gigpo"  # advantages: reinforce, rloo, grpo, gigpo, ppo (see lamer.compute_advantages)
    norm: str = "mean"  # reinforce and gigpo: mean, or mean_std to divide advantages by the standard deviation
    step_weight: float = 1.0  # weight of GiGPO's step part
    gamma_step: float = 0.95  # discount from turn to turn
    gamma_traj: float | None = None  # discount from episode to episode (scripts: 0.6 MineSweeper, 0.9 Sokoban)
    gae_lambda: float = 1.0  # ppo: below 1 trusts the value head, and needs --credit official
    invalid_penalty: float = 0.5  # taken from the return of a reply that cannot be parsed
    # the update
    lr: float | None = None  # constant learning rate (paper: 1e-6)
    value_lr: float = 1e-3  # ppo: learning rate of the value head
    clip: float = 0.2  # range of the probability ratio
    clip_high: float | None = None  # its upper side, where it differs
    dual_clip: float | None = None  # bound on the loss of tokens with negative advantage; 0 is off
    entropy_bonus: float | None = None  # weight of the entropy in the objective
    kl_coef: float = 0.0  # weight of the KL divergence to the starting model, which costs a second copy of it
    kl: str = "k3"  # its estimate: k1, k2 or k3 (see lamer.kl_estimate)
    grad_clip: float = 1.0  # largest gradient norm
    weight_decay: float | None = None  # AdamW's
    beta2: float | None = None  # AdamW's; at 0.999 one rare large gradient moves weights too far (README)
    minibatch: int | None = None  # turns per optimizer step, over all processes (paper: 64)
    microbatch_tokens: int = 8192  # tokens per forward and backward pass; lower it when memory runs out
    grad_checkpoint: bool | None = None  # recompute activations in the backward pass: saves memory, costs time
    # sampling
    sampler: str = "slots"  # slots, or generate for the plain reference
    slots: int | None = None  # trials decoded at once; default: 128, on a GPU as many as fit into free memory
    max_prompt: int | None = None  # tokens; longer prompts are shortened (paper: 2048)
    max_reply: int | None = None  # tokens (paper: 1024)
    temperature: float = 1.0  # in training, of the sampler and of the loss
    # evaluation, saving, machine
    eval_every: int = 25  # steps; 0 is never
    eval_tasks: int = 64  # fixed tasks, their seeds disjoint from training
    save_every: int = 25  # steps; the last step is always saved
    keep: int = 2  # checkpoints kept, newest first
    device: str | None = None  # cpu or cuda; default: cuda if there is one
    dtype: str | None = None  # float32 or bfloat16; default: bfloat16 on a GPU
    # the tiny policy
    tiny_hidden: int | None = None  # width
    tiny_layers: int | None = None  # depth
    warm_steps: int | None = None  # steps of imitation before RL
    warm_batch: int | None = None  # turns per step of imitation
    warm_lr: float = 2e-3  # peak learning rate of imitation


# What may change when a run is resumed: nothing that changes the numbers, but for how long it goes on.
RESUME_OPTIONS = ("steps", "eval_every", "save_every", "keep", "device", "slots")
RESUME_OPTIONS += ("microbatch_tokens", "grad_checkpoint")
UPDATE_OPTIONS = ("clip", "clip_high", "dual_clip", "entropy_bonus", "kl_coef", "kl", "grad_clip")
UPDATE_OPTIONS += ("minibatch", "microbatch_tokens")
ENV_OPTIONS = tuple(f.name for f in fields(EnvOptions))
PRESETS = {
    "paper": dict(credit="paper", dual_clip=0.0, entropy_bonus=0.0, weight_decay=0.0),
    "official": dict(credit="official", dual_clip=3.0, entropy_bonus=0.001, weight_decay=0.01),
}
CHOICES = {"preset": tuple(PRESETS), "reward": ("env", "success"), "kl": lamer.KL_ESTIMATES}
CHOICES |= {"memory": lamer.MEMORIES, "style": ("full", "direct", "compact"), "credit": ("paper", "official")}
CHOICES |= {"estimator": lamer.ESTIMATORS, "norm": ("mean", "mean_std")}
CHOICES |= {"sampler": ("slots", "generate"), "dtype": ("float32", "bfloat16")}
# Later tables win. A real model trains on the paper's settings; the tiny one's were found by trying (README).
DEFAULTS = dict(steps=300, num_tasks=16, episodes=3, gamma_traj=0.6, style="full", max_prompt=2048, max_reply=1024)
DEFAULTS |= dict(lr=1e-6, minibatch=64, grad_checkpoint=True, beta2=0.999)
ENV_DEFAULTS = {
    "lockbox": dict(episodes=2),
    "sokoban": dict(gamma_traj=0.9),
    "webshop": dict(steps=150, num_tasks=8, max_prompt=8192),
    "alfworld": dict(steps=150, num_tasks=8, max_prompt=4096),
}
TINY_DEFAULTS = dict(steps=100, style="compact", lr=3e-4, minibatch=256, grad_checkpoint=False)
TINY_DEFAULTS |= dict(max_prompt=192, max_reply=64, tiny_hidden=128, tiny_layers=4, warm_steps=600, warm_batch=64)
TINY_ENV_DEFAULTS = {
    "lockbox": dict(
        steps=90, lr=5e-4, beta2=0.95, minibatch=64, max_prompt=48, max_reply=16, tiny_hidden=64, tiny_layers=2
    ),
    "minesweeper": dict(size=4, mines=2, turns=9),
    "sokoban": dict(steps=120, boxes=1, warm_steps=500, warm_batch=48),
    "webshop": dict(steps=80, minibatch=128, max_prompt=256),
    "alfworld": dict(steps=60, minibatch=128, max_prompt=256, receptacles=8, objects=8),
}


def resolve(config: Config) -> Config:
    """Fill in what was left open, by environment and kind of policy; ValueError for what cannot be."""
    config.device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    config.model = config.model or ("tiny" if config.device == "cpu" else "Qwen/Qwen3-4B")
    config.model = newest_checkpoint(config.model)
    config.dtype = config.dtype or ("float32" if config.device == "cpu" else "bfloat16")
    saved = saved_config(config.model)
    is_small = config.model == "tiny" or saved.get("style") == "compact"
    tables = [DEFAULTS, ENV_DEFAULTS.get(config.env, {})]
    tables += [TINY_DEFAULTS, TINY_ENV_DEFAULTS.get(config.env, {})] if is_small else []
    tables += [PRESETS.get(config.preset, {})]
    for name, value in {k: v for table in tables for k, v in table.items()}.items():
        is_genuine = config.data is not None and name in ("receptacles", "objects")  # sizes of generated rooms only
        if getattr(config, name) is None and not is_genuine:
            setattr(config, name, value)
    if config.episodes == 1:
        config.memory = "none"
    for name, allowed in CHOICES.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"--{name} must be one of {', '.join(allowed)}, not {getattr(config, name)!r}")
    if config.estimator == "ppo" and config.preset == "official":
        raise ValueError("--preset official has no ppo here: the official value is one per token, ours one per turn")
    if not 0 <= config.gae_lambda <= 1 or (config.gae_lambda < 1 and config.credit != "official"):
        raise ValueError("--gae_lambda is from 0 to 1, and below 1 it needs --credit official, which is a recursion")
    low = dict(steps=0, episodes=1, num_tasks=1, group_size=2, minibatch=1, slots=1, max_prompt=1, max_reply=1, keep=1)
    low |= dict(eval_every=0, save_every=0, eval_tasks=1, microbatch_tokens=1, seed=0)
    low |= dict(tiny_hidden=8, tiny_layers=1, warm_steps=1, warm_batch=1)
    for name, least in low.items():
        if getattr(config, name) is not None and getattr(config, name) < least:
            why = " (advantages compare the trials of a group)" if name == "group_size" else ""
            raise ValueError(f"--{name} must be at least {least}, got {getattr(config, name)}{why}")
    if config.kl_coef < 0 or 0 < config.dual_clip <= 1:
        raise ValueError("--kl_coef must be 0 or more, and --dual_clip 0 or above 1")
    if config.temperature <= 0:
        raise ValueError(f"--temperature must be above 0 in training, got {config.temperature}")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch finds no CUDA GPU here; use --device cpu")
    return config


class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with one line."""

    def error(self, message: str) -> None:
        sys.exit(f"{self.prog}: {message} (--help lists all options)")


def parse_flags(cls: type, argv: Sequence[str], description: str) -> dict[str, Any]:
    """The flags given on the command line; one for every field of the dataclass, with underscore or dash."""
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(cls):
        names = dict.fromkeys([f"--{f.name}", f"--{f.name.replace('_', '-')}"])
        kind = get_args(f.type)[0] if isinstance(f.type, UnionType) else f.type
        options = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument(*names, default=argparse.SUPPRESS, **options)
    return vars(parser.parse_args(argv))


def env_of(config: Config) -> Env:
    """A new environment with the options of the run."""
    return make_env(config.env, **{k: getattr(config, k) for k in ENV_OPTIONS if getattr(config, k) is not None})


# ----------------------------------------------------------------------------- the policy, tiny or not


def saved_config(folder: str | None) -> dict[str, Any]:
    """The options saved beside a checkpoint; empty for a hub name or a foreign folder."""
    path = Path(folder or "", "lamer.json")
    return json.loads(path.read_text())["config"] if path.is_file() else {}


def load_policy(name: str, dtype: str, device: str) -> tuple[Any, Chat]:
    """A causal language model and its chat format from a folder or the hub; ValueError in one line if it cannot be."""
    looks_local = Path(name).exists() or name.startswith((".", "/", "~"))
    if looks_local and not Path(name, "config.json").is_file():
        raise ValueError(f"--model {name}: no config.json there; give a run folder, a checkpoint folder or a hub name")
    try:
        shape = AutoConfig.from_pretrained(name)
        for key, value in vars(shape).items():  # dropout would make the policy trained another than the one sampled
            if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
                setattr(shape, key, 0.0)
        model = AutoModelForCausalLM.from_pretrained(name, config=shape, dtype=getattr(torch, dtype)).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
        check_logits(model)
    except Exception as error:  # transformers, safetensors and the hub each have exceptions of their own
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(f"--model {name} cannot be loaded: {type(error).__name__}: {reason}") from error
    stop_ids = model.generation_config.eos_token_id
    return model, Chat(tokenizer, stop_ids if isinstance(stop_ids, list) else [stop_ids])


@torch.no_grad()
def check_logits(model: Any) -> None:
    """Raise where logits are more than the output layer on the decoder's states, which is what lamer.py computes."""
    tokens = torch.tensor([[1, 2, 3]], device=model.device)
    ours = model.get_output_embeddings()(model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state)
    if not torch.allclose(ours, model(tokens, use_cache=False).logits, atol=1e-3, rtol=1e-2):
        raise ValueError("its logits are scaled or capped behind the output layer, which is not supported")


# Pieces of text that become one token each: tags, (row, col), row labels, words, single signs.
PIECES = re.compile(r"</?\w+>|\(\d+, \d+\)|\n?(?:[A-Z]\w* )?\d+:|\n\w+(?![\w,])| ?\w+,?| ?[^\w\s]|\s")


class Recorder:
    """Stands in for a Chat and keeps the texts: what the tiny policy's vocabulary is made from."""

    stop_ids = {0}

    def __init__(self):
        self.texts: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.texts.append(text)
        return [0]

    encode_plain = encode


def scripted_trial(
    env: Env, seed: int, episodes: int, chat: Chat | Recorder, skill: float, rng: random.Random, **options: Any
) -> Trial:
    """A trial played by the environment's scripted player instead of a model; options as for lamer.run_trial."""
    talk = lamer.run_trial(env, seed, episodes, chat, **options)
    notes: list[str] = []
    try:
        prompt = next(talk)
        while True:
            if prompt.phase == "play":
                text = env.scripted(skill, rng, notes)
            else:
                text = env.scripted_reflection(rng)
                notes.append(lamer.parse_reflection(text)[0])
            ids = chat.encode_plain(text) + [min(chat.stop_ids)]
            prompt = talk.send(Reply(ids, [0.0] * len(ids), text))
    except StopIteration as stop:
        return stop.value


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the pieces of these texts, and bytes for everything else."""
    pieces = sorted({piece for text in texts for piece in PIECES.findall(text)})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    special = dict(eos_token="<|end|>", additional_special_tokens=["<|user|>", "<|assistant|>"], is_tiny=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    tokenizer.chat_template = "<|user|>{{ messages[0]['content'] }}<|assistant|>"
    return tokenizer


def tiny_shape(config: Config, vocab_size: int, eos_token_id: int) -> Qwen3Config:
    """A Qwen3 of under a million weights, for texts of a hundred tokens."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=config.tiny_hidden,
        intermediate_size=2 * config.tiny_hidden,
        num_hidden_layers=config.tiny_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=config.tiny_hidden // 4,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},  # wavelengths of 6 to some thousand tokens
        attention_bias=True,  # lets a head look a fixed distance back, whatever stands there
        initializer_range=0.05,
        tie_word_embeddings=True,
        eos_token_id=eos_token_id,
        bos_token_id=None,
    )


def warm_policy(config: Config) -> Path:
    """The folder of the warm-started tiny policy that belongs to this configuration; made once, then kept.

    Warm start: imitate a scripted player who plays first episodes badly, writes down what was seen, and often follows
    what is written. So RL starts from a policy that knows the format and can copy from memory; when to explore, and
    how far to trust memory, is left to RL. The loss covers the prompts too: predicting a board from its remembered
    picture is what teaches a small model to look back.
    """
    episodes = max(config.episodes, ENV_DEFAULTS.get(config.env, {}).get("episodes", DEFAULTS["episodes"]))  # RL's too
    play = dict(episodes=episodes, style="compact", max_prompt=config.max_prompt)
    recorder, rng, env = Recorder(), random.Random(config.seed), env_of(config)
    if not env.has_scripted_player():
        raise ValueError(f"{env.name} has no scripted player, which the tiny policy learns from; give another --model")
    for seed in range(64):
        scripted_trial(env, seed, chat=recorder, skill=env.warm_skill, rng=rng, **play)
    options = {k: v for k, v in asdict(config).items() if k == "seed" or k.startswith(("tiny_", "warm_"))}
    code = [inspect.getsource(f) for f in (warm_policy, warm_up_and_down, imitate, make_tokenizer, tiny_shape)]
    recipe = [code, PIECES.pattern, recorder.texts, env.warm_share, play, options]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    folder = Path(os.environ.get("LAMER_CACHE", "~/.cache/lamer")).expanduser() / f"tiny-{env.name}-{key}"
    if folder.is_dir():
        return folder

    tokenizer = make_tokenizer(recorder.texts)
    chat = Chat(tokenizer)
    torch.manual_seed(config.seed)
    model = Qwen3ForCausalLM(tiny_shape(config, len(tokenizer), tokenizer.eos_token_id))
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [  # Muon needs about two thirds of AdamW's steps to learn to copy
        torch.optim.Muon(matrices, lr=10 * config.warm_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=config.warm_lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    schedule = partial(warm_up_and_down, steps=config.warm_steps)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
    turns, num_trials = [], 0
    bar = tqdm(range(config.warm_steps), desc=f"warm start on {env.name}", mininterval=1, file=sys.stderr)
    for _ in bar:
        while len(turns) < 4 * config.warm_batch:  # a pool of several trials, so that a batch mixes them
            num_trials += 1
            seed = derive_seed("warm", config.seed, num_trials) % 2**31
            played = scripted_trial(env, seed, chat=chat, skill=env.warm_skill, rng=rng, **play).turns
            for before, turn in zip([None, *played], played, strict=False):
                is_inside = turn.phase == "play" and before is not None and before.episode == turn.episode
                turns += [turn] * (not is_inside or env.warm_share == 1 or rng.random() < env.warm_share)
        rng.shuffle(turns)
        batch, turns = turns[: config.warm_batch], turns[config.warm_batch :]
        bar.set_postfix(loss=f"{imitate(model, batch, config.microbatch_tokens):.3f}", refresh=False)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        model.zero_grad()
    config = replace(config, episodes=episodes, memory="reflection", style="compact", out=None)
    save_folder(folder, lambda path: save_policy(path, model, model.state_dict(), tokenizer, config, 0))
    return folder


def warm_up_and_down(step: int, steps: int) -> float:
    """Learning-rate factor: up over 50 steps, then linearly down to a fiftieth."""
    return min(1.0, (step + 1) / 50) * max(0.02, 1 - step / steps)


def imitate(model: Any, turns: Sequence[Turn], microbatch_tokens: int) -> float:
    """Gradient of the mean loss over reply tokens plus that over prompt tokens; returns the sum of the two means."""
    num_replies, num_prompts = sum(len(t.reply_ids) for t in turns), sum(len(t.prompt_ids) - 1 for t in turns)
    total = 0.0
    for batch in lamer.micro_batches(turns, microbatch_tokens):
        tokens = lamer.pad([turn.prompt_ids + turn.reply_ids for turn in batch])  # (B, L)
        weights = torch.zeros(tokens.shape)  # (B, L)
        for row, turn in zip(weights, batch, strict=True):
            row[1 : len(turn.prompt_ids)] = 1 / num_prompts
            row[len(turn.prompt_ids) : len(turn.prompt_ids) + len(turn.reply_ids)] = 1 / num_replies
        is_target = weights[:, 1:] > 0  # (B, L-1)
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1][is_target]  # (T, h)
        losses = torch.nn.functional.cross_entropy(model.lm_head(hidden), tokens[:, 1:][is_target], reduction="none")
        loss = (losses * weights[:, 1:][is_target]).sum()
        loss.backward()
        total += loss.item()
    return total


# ------------------------------------------------------------------------------ checkpoints and resume


class Run(NamedTuple):
    """What one process holds."""

    model: Any
    optimizer: lamer.Optimizer
    sampler: lamer.SlotSampler | lamer.GenerateSampler
    value_head: torch.nn.Module | None  # ppo only
    reference: Any  # the starting model, frozen; only with --kl_coef
    rank: int
    world: int


def save_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder under another name and rename it when complete; what was there before stays as it was."""
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.unfinished")
    try:
        draft.mkdir(parents=True)
        write(draft)
        if folder.exists():  # another process made the same one meanwhile
            shutil.rmtree(draft)
        else:
            draft.rename(folder)
    except Exception as error:  # a full disk shows as OSError, RuntimeError or SafetensorError, by library
        shutil.rmtree(draft, ignore_errors=True)
        reason = next(iter(str(error).strip().splitlines()), "")
        raise OSError(f"cannot save {folder}: {type(error).__name__}: {reason}") from error


def save_policy(
    folder: Path, model: Any, weights: dict[str, Tensor], tokenizer: Any, config: Config, step: int
) -> None:
    """An ordinary from_pretrained folder, plus lamer.json with the options and the number of steps done."""
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    (folder / "lamer.json").write_text(json.dumps({"step": step, "config": asdict(config)}, indent=1))


def save_checkpoint(config: Config, run: Run, step: int) -> None:
    """Save the fp32 weights and the optimizer after `step` steps, then drop all but the newest `keep` checkpoints.

    Every process must call it: each holds a part of the optimizer. Process 0 writes.
    """
    state = run.optimizer.state()
    if run.rank > 0:
        return

    def write(folder: Path) -> None:
        masters = {name: state[name].pop("master") for name in run.optimizer.policy}
        weights = lamer.named_like(run.model, masters)
        save_policy(folder, run.model, weights, run.sampler.chat.tokenizer, config, step)
        torch.save(state, folder / "optimizer.pt")

    save_folder(Path(config.out, f"step_{step:06d}"), write)
    for old in sorted(checkpoints(config.out))[: -config.keep]:
        shutil.rmtree(checkpoints(config.out)[old], ignore_errors=True)


def checkpoints(run: str | Path) -> dict[int, Path]:
    """The complete checkpoints of a run folder by step; unfinished ones carry another name."""
    return {int(p.name[5:]): p for p in Path(run).glob("step_*") if re.fullmatch(r"step_\d+", p.name)}


def newest_checkpoint(model: str) -> str:
    """The newest checkpoint of a run folder; any other model's name as it is."""
    return str(max(checkpoints(model).items(), default=(0, model))[1])


def trim_log(path: Path, steps: int) -> None:
    """Drop the rows of steps that will be done again."""
    lines = path.read_text().splitlines() if path.exists() else []
    whole = [line for line in lines if line.endswith("}")]  # a killed run may leave half a line
    draft = path.with_suffix(".unfinished")
    draft.write_text("".join(f"{line}\n" for line in whole if json.loads(line)["step"] <= steps))
    draft.replace(path)


# ---------------------------------------------------------------------------------------------- memory


def memory_plan(config: Config, shape: Any, num_weights: int, world: int) -> dict[str, float]:
    """Gigabytes that training needs on each GPU, by what for, and "slot": those of one row of the cache.

    Activations are counted for the longest micro-batch: per token and layer what the backward pass keeps of norms,
    projections, attention and MLP, or with --grad_checkpoint the layer's input, and one layer in full.
    """
    width, layers = shape.hidden_size, shape.num_hidden_layers
    head = getattr(shape, "head_dim", None) or width // shape.num_attention_heads
    keys = 2 * head * getattr(shape, "num_key_value_heads", shape.num_attention_heads)
    mlp = getattr(shape, "intermediate_size", None) or 4 * width
    size = 2 if config.dtype == "bfloat16" else 4
    tokens = max(config.microbatch_tokens, config.max_prompt + config.max_reply)
    layer = tokens * size * (8 * width + 5 * head * shape.num_attention_heads + 5 * keys // 2 + 4 * mlp)
    kept = layers * tokens * size * width + layer if config.grad_checkpoint else layers * layer
    logits = 3 * 4 * min(2**26, tokens * shape.vocab_size)
    plan = dict(weights=size * num_weights, gradients=4 * num_weights, activations=kept + logits)
    plan["optimizer"] = (12 if size == 2 else 8) * num_weights / world
    plan["reference"] = size * num_weights if config.kl_coef else 0
    plan["slot"] = layers * keys * size * (config.max_prompt + config.max_reply + 1)
    return {name: need / 1e9 for name, need in plan.items()}


def fit_slots(plan: dict[str, float], total_gb: float, most: int) -> tuple[int, str]:
    """How many slots fit into `total_gb`, up to `most`, and the sum in words; ValueError if it is none.

    The cache exists during rollouts, gradients and activations during updates: the larger of the two must fit.
    """
    update = {name: plan[name] for name in ("gradients", "activations") if name in plan}
    always = {name: need for name, need in plan.items() if need and name not in (*update, "slot")}
    free = 0.92 * total_gb - sum(always.values())  # the rest is for the allocator's gaps
    slots = min(most, int(free / plan["slot"]))
    kept, updating = (" + ".join(f"{k} {v:.1f}" for k, v in part.items()) for part in (always, update))
    line = f"memory per GPU in GB: {kept}, then {max(slots, 0)} slots of {plan['slot']:.2f}"
    line += f" in rollouts or {updating} in updates" * bool(update) + f", of {total_gb:.1f}"
    if slots < 1 or sum(update.values()) > free:
        raise ValueError(f"{line}: too much; lower --microbatch_tokens or --max_prompt, or take more GPUs")
    return slots, line


# ------------------------------------------------------------------------------ rollout and evaluation


def make_sampler(
    config: Config, model: Any, chat: Chat, trials: int = 128, world: int = 0
) -> lamer.SlotSampler | lamer.GenerateSampler:
    """The slot sampler; the plain one where it is asked for, or where the model's attention is of another kind.

    On a GPU the slots are sized to the memory that `world` training processes leave; 0 is no training.
    """

    def say(line: str) -> None:
        if int(os.environ.get("RANK", 0)) == 0:
            print(line, file=sys.stderr)

    slots = config.slots or min(128, trials)
    if config.device.startswith("cuda"):
        plan = memory_plan(config, model.config.get_text_config(), model.num_parameters(), max(world, 1))
        plan = plan if world else {name: plan[name] for name in ("weights", "slot")}
        free = (torch.cuda.mem_get_info(config.device)[0] + torch.cuda.memory_reserved(config.device)) / 1e9
        slots, line = fit_slots(plan, free, config.slots or trials)
        say(line)
    limits = slots, config.max_prompt, config.max_reply
    if config.sampler == "slots":
        try:
            return lamer.SlotSampler(model, chat, *limits)
        except lamer.UnsupportedModelError as error:
            say(f"{error}: falling back to the plain sampler, as with --sampler generate")
    return lamer.GenerateSampler(model, chat, *limits)


def rollout(
    config: Config, sampler: Any, seeds: Sequence[int], ids: Sequence[int], sampling: Sampling, borrowed: Any = None
) -> list[Trial]:
    """Play one trial for each seed; `ids` number them for the random draws, `borrowed` are memories of other trials."""
    play = {name: getattr(config, name) for name in ("episodes", "memory", "style", "max_prompt")}
    notes = borrowed or [None] * len(seeds)
    trials = [
        lamer.run_trial(env_of(config), seed, chat=sampler.chat, borrowed=past, **play)
        for seed, past in zip(seeds, notes, strict=True)
    ]
    return sampler.run(trials, ids, sampling)


def compute_returns(config: Config, trials: Sequence[Trial]) -> None:
    """lamer.compute_returns with the options of the run."""
    discounts = config.gamma_step, config.gamma_traj
    lamer.compute_returns(trials, config.credit, *discounts, config.invalid_penalty, config.reward)


EVAL_SEED = 2**31  # evaluation tasks have seeds from here on, training tasks below


def summarize(trials: Sequence[Trial], episodes: int, device: str = "cpu") -> dict[str, Any]:
    """Over the trials of all processes: success after 1..N episodes, return G_0(0), share of valid replies, counts."""
    turns = [turn for trial in trials for turn in trial.turns]
    sums = [len(trials), sum(trial.turns[0].ret + trial.turns[0].penalty for trial in trials)]
    sums += [sum(turn.is_valid for turn in turns), len(turns)]
    sums += [sum(len(turn.reply_ids) for turn in turns), sum(trial.num_shortened for trial in trials)]
    sums += [sum(trial.success_after(k + 1) for trial in trials) for k in range(episodes)]
    num_trials, returns, valid, num_turns, num_tokens, num_shortened, *won = all_reduce_sum(sums, device)
    means = {"success": [w / num_trials for w in won], "return": returns / num_trials, "valid": valid / num_turns}
    return means | {"turns": int(num_turns), "reply_tokens": int(num_tokens), "shortened": int(num_shortened)}


def eval_sampling(config: Config, **given: Any) -> Sampling:
    """How evaluations sample: hub models as in the paper, the tiny policy as it is."""
    paper = dict(temperature=0.7, top_p=0.8, top_k=20)
    own = dict(temperature=1.0, top_p=1.0, top_k=0) if config.style == "compact" else paper
    return Sampling(**own | given)


def evaluate(config: Config, run: Run, step: int) -> tuple[dict[str, Any], list[Trial]]:
    """Success on fixed tasks, spread over the processes. An RL policy (episodes 1) gets three independent attempts."""
    config = replace(config, episodes=config.episodes if config.episodes > 1 else 3)
    ids = list(range(config.eval_tasks))[run.rank :: run.world]
    sampling = eval_sampling(config, seed=config.seed, step=2**32 + step)
    trials = rollout(config, run.sampler, [EVAL_SEED + i for i in ids], ids, sampling)
    compute_returns(config, trials)
    return {"step": step, **summarize(trials, config.episodes, config.device)}, trials


# --------------------------------------------------------------------------------------------- the run


def prepare(argv: Sequence[str]) -> tuple[Config, int]:
    """Options from the flags, or from the run to resume; returns them and the number of steps already done."""
    given = parse_flags(Config, argv, __doc__)
    if "resume" not in given:
        config = resolve(Config(**given))
        if config.out is None:
            stem = Path("runs", env_of(config).name)
            config.out = next(str(path) for i in range(1, 10**6) if not (path := Path(f"{stem}-{i}")).exists())
        elif checkpoints(config.out):
            raise ValueError(f"--out {config.out} holds a run already; --resume it, or choose another folder")
        return config, 0
    run = given.pop("resume")
    done = checkpoints(run)
    if not done:
        raise ValueError(f"--resume {run}: no complete checkpoint there")
    saved = saved_config(str(done[max(done)]))
    for name, value in given.items():
        if name not in RESUME_OPTIONS and saved.get(name) != value:
            raise ValueError(f"--resume {run}: that run has --{name} {saved.get(name)}, which cannot become {value}")
    return resolve(Config(**{**saved, **given, "out": run, "resume": run})), max(done)


def start_run(config: Config, done: int) -> Run:
    """Set up processes, policy, optimizer and sampler; ValueError in one line for whatever the user can mend."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if config.num_tasks % world:
        raise ValueError(f"--num_tasks {config.num_tasks} cannot be dealt evenly to {world} processes")
    if config.device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        idle = torch.cuda.device_count() - int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if rank == 0 and idle > 0:
            print(f"{idle} GPUs stay idle; torchrun --nproc-per-node=gpu train.py ... uses all", file=sys.stderr)
    if world > 1:
        # Processes wait for each other through whole rollouts and checkpoints: ten minutes, the default, are too short.
        dist.init_process_group("nccl" if config.device.startswith("cuda") else "gloo", timeout=timedelta(hours=2))
        shared = [config.out]
        dist.broadcast_object_list(shared)
        config.out = shared[0]

    if rank == 0:
        try:
            Path(config.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out {config.out} cannot be made: {error.strerror}") from error
        for stale in Path(config.out).glob("*.unfinished"):  # of a killed run
            shutil.rmtree(stale, ignore_errors=True)
    env = env_of(config)
    start = config.model
    if start == "tiny" and (config.kl_coef or not config.resume):
        if rank == 0:
            warm_policy(config)
        if world > 1:
            dist.barrier()
        start = str(warm_policy(config))
    source = str(checkpoints(config.resume)[done]) if config.resume else start
    reference = load_policy(start, config.dtype, config.device)[0] if config.kl_coef else None
    model, chat = load_policy(source, "float32", config.device)
    value_head = None
    if config.estimator == "ppo":
        value_head = torch.nn.Linear(model.config.get_text_config().hidden_size, 1, device=config.device)
        for weight in value_head.parameters():
            torch.nn.init.zeros_(weight)
    adamw = dict(lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, config.beta2))
    head = dict(value_head=value_head, value_lr=config.value_lr)
    optimizer = lamer.Optimizer(model, dtype=getattr(torch, config.dtype), **head, **adamw)
    if config.resume:
        optimizer.load_state(torch.load(Path(source, "optimizer.pt"), map_location="cpu", mmap=True))
    if config.grad_checkpoint:
        model.activation_checkpointing_enable({"use_reentrant": False})

    needed = len(next(lamer.run_trial(env, EVAL_SEED, 1, chat, style=config.style, max_prompt=10**9)).ids)
    if needed > config.max_prompt:
        raise ValueError(f"one turn of {env.name} needs {needed} prompt tokens, --max_prompt is {config.max_prompt}")
    sampler = make_sampler(config, model, chat, config.num_tasks // world * config.group_size, world)
    return Run(model, optimizer, sampler, value_head, reference, rank, world)


def train_step(config: Config, run: Run, ids: Sequence[int], step: int) -> dict[str, Any]:
    """One step of training on the trials numbered `ids`: play, credit, update. Returns the row to log."""
    clock = [time.perf_counter()]
    sampling = Sampling(config.seed, step, config.temperature)
    seeds = [derive_seed("task", config.seed, step, i // config.group_size) % EVAL_SEED for i in ids]
    trials = rollout(config, run.sampler, seeds, ids, sampling)
    clock.append(time.perf_counter())

    compute_returns(config, trials)
    groups = [trials[i : i + config.group_size] for i in range(0, len(trials), config.group_size)]
    if config.estimator == "ppo":
        lamer.compute_values(run.model, run.value_head, trials, config.microbatch_tokens)
        lamer.ppo_advantages(trials, config.gamma_step, config.gamma_traj, config.gae_lambda)
    elif config.preset == "official":
        lamer.official_advantages(groups, config.estimator, config.norm, config.step_weight, config.reward)
    else:
        lamer.compute_advantages(groups, config.estimator, config.norm, config.step_weight)
    clock.append(time.perf_counter())

    options = {name: getattr(config, name) for name in UPDATE_OPTIONS}
    options |= dict(reference=run.reference, value_head=run.value_head, vocab_size=run.sampler.chat.vocab_size)
    stats = lamer.update(run.model, run.optimizer, trials, ids, sampling, **options)
    clock.append(time.perf_counter())

    spent = [round(end - begin, 3) for begin, end in pairwise(clock)]
    row = {"step": step + 1, **summarize(trials, config.episodes, config.device), **stats}
    row |= {"seconds": dict(zip(("rollout", "credit", "update"), spent, strict=True))}
    return row | {"tokens_per_second": round(row["reply_tokens"] / spent[0]), "peak_gb": peak_gb(config.device)}


def main(argv: Sequence[str]) -> None:
    try:
        config, done = prepare(argv)
        run = start_run(config, done)
    except ValueError as error:
        sys.exit(f"train.py: {error}")
    out, is_first = Path(config.out), run.rank == 0
    if is_first:
        (out / "config.json").write_text(json.dumps(asdict(config), indent=1))
        for name in ("metrics.jsonl", "evals.jsonl"):
            trim_log(out / name, done)
        print(" ".join(f"{k}={v}" for k, v in asdict(config).items() if v is not None), file=sys.stderr)

    def log(name: str, row: dict[str, Any]) -> None:
        if is_first:
            with open(out / name, "a") as file:
                row = json.loads(json.dumps(row), parse_constant=lambda _: None)  # JSON has no NaN
                file.write(json.dumps(row) + "\n")

    def evaluate_and_log(step: int) -> None:
        result, trials = evaluate(config, run, step)
        log("evals.jsonl", result)
        if is_first:
            (out / f"trials_{step:06d}.txt").write_text("\n\n".join(map(str, trials[:3])), encoding="utf-8")
            line = f"step {step}: on {config.eval_tasks} fixed tasks, success {percent(result['success'])}"
            tqdm.write(line, file=sys.stderr)

    tasks = range(run.rank, config.num_tasks, run.world)  # every process plays whole groups
    ids = [task * config.group_size + member for task in tasks for member in range(config.group_size)]
    with tqdm(total=config.steps, initial=done, desc=config.env, disable=not is_first, file=sys.stderr) as bar:
        if config.eval_every and done == 0:
            evaluate_and_log(0)
        for step in range(done + 1, config.steps + 1):
            row = train_step(config, run, ids, step - 1)
            log("metrics.jsonl", row)
            shown = dict(success=percent(row["success"]), ret=f"{row['return']:.2f}", valid=f"{row['valid']:.0%}")
            bar.set_postfix(**shown, tok_s=row["tokens_per_second"], refresh=False)
            bar.update()
            if config.eval_every and (step == config.steps or step % config.eval_every == 0):
                evaluate_and_log(step)
            if step == config.steps or (config.save_every and step % config.save_every == 0):
                save_checkpoint(config, run, step)
    if is_first:
        print(f"done: python eval.py --model {config.out}", file=sys.stderr)
    if run.world > 1:
        dist.destroy_process_group()


def percent(shares: Sequence[float]) -> str:
    """[0.125, 0.25] -> "12% / 25%"."""
    return " / ".join(f"{share:.0%}" for share in shares)


def peak_gb(device: str) -> float:
    """Peak memory so far: of the GPU, or of the process; 0 where the system does not tell."""
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated() / 1e9, 3)
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
        sys.exit("train.py: out of GPU memory; lower --slots, then --microbatch_tokens, or give --grad_checkpoint")

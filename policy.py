"""The model behind the policy: loading one, the tiny one made on the spot, and its warm start.

`load_policy` takes a folder or a name of the hub. Without a GPU the policy is `tiny`: a
Qwen3-shaped model of under a million weights whose tokenizer is made from the environment's own
texts. `warm_policy` teaches it, or any other model, the format, and copying from memory, by
imitation of a scripted player, and saves it as an ordinary checkpoint folder. From there on the
tiny policy is a model like any other.
"""

import hashlib
import json
import os
import random
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from envs import Env, derive_seed, make_env, reason
from lamer import (
    Policy,
    Reply,
    Trial,
    Turn,
    make_turn,
    micro_batches,
    parse_reflection,
    run_trial,
)
from sampler import Chat

# ------------------------------------------------------------------- folders with a policy


def load_policy(name: str, dtype: torch.dtype, device: str) -> tuple[Any, Chat]:
    """A causal language model and its chat format, from a folder or the hub.

    ValueError in one line if it cannot be.
    """
    looks_local = Path(name).exists() or name.startswith((".", "/", "~"))
    if looks_local and not Path(name, "config.json").is_file():
        raise ValueError(
            f"--model {name}: no config.json there; give a run folder, a checkpoint folder or a "
            "hub name"
        )
    try:
        ours = Path(name, "lamer.json")
        saved = json.loads(ours.read_text()) if ours.is_file() else {}
        for file in saved.get("files", []):
            if not Path(name, file).is_file():
                raise ValueError(f"{file} is missing")
        # A model's own code is never run, and pickled weights, which can hold some, never read.
        shape = AutoConfig.from_pretrained(name, trust_remote_code=False)
        # Dropout would make the policy that is trained another than the one that is sampled.
        for key, value in vars(shape).items():
            if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
                setattr(shape, key, 0.0)
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            config=shape,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
        # transformers fills in random values for what is missing, and only warns.
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if found[problem]:
                raise ValueError(f"{problem.replace('_', ' ')}: {sorted(found[problem])[0]}")
        model = model.to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if not tokenizer.encode("a", add_special_tokens=False):  # transformers makes an empty one
            raise ValueError("there is no tokenizer")
        check_logits(model)
        stop_ids = model.generation_config.eos_token_id
        return model, Chat(tokenizer, stop_ids if isinstance(stop_ids, list) else [stop_ids])
    except Exception as error:  # transformers, safetensors and the hub have exceptions of their own
        raise ValueError(f"--model {name} cannot be loaded: {reason(error)}") from error


@torch.no_grad()
def check_logits(model: Any) -> None:
    """Raise where logits are more than the output layer on the decoder's states.

    That is what the policy and the sampler compute.
    """
    tokens = torch.tensor([[1, 2, 3]], device=model.device)
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    ours = model.get_output_embeddings()(hidden)
    if not torch.allclose(ours, model(tokens, use_cache=False).logits, atol=1e-3, rtol=1e-2):
        raise ValueError(
            "its logits are scaled or capped behind the output layer, which is not supported"
        )


def save_policy(folder: Path, model: Any, tokenizer: Any, config: Any, step: int) -> None:
    """An ordinary from_pretrained folder, and lamer.json: steps done, options, names of files."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # A model without its chat template would load all the same, and read prompts of another form.
    files = sorted(path.name for path in folder.iterdir() if path.suffix != ".pt")
    saved = {"step": step, "config": asdict(config), "files": files}
    (folder / "lamer.json").write_text(json.dumps(saved, indent=1))


def saved_config(folder: str | None) -> dict[str, Any]:
    """The options saved beside a checkpoint; empty for a hub name or a foreign folder."""
    path = Path(folder or "", "lamer.json")
    if not folder or not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text())["config"])
    except (KeyError, TypeError, ValueError) as error:
        older = older_checkpoint(folder) or "another checkpoint"
        raise ValueError(f"{path} cannot be read ({reason(error)}); take {older}") from error


def checkpoints(run: str | Path) -> dict[int, Path]:
    """The complete checkpoints of a run folder by step; unfinished ones carry another name."""
    return {int(p.name[5:]): p for p in Path(run).glob("step_*") if p.name[5:].isdigit()}


def newest_checkpoint(model: str) -> str:
    """The newest checkpoint of a run folder; any other model's name as it is."""
    found = checkpoints(model) if model else {}  # "" would be the current folder
    return str(found[max(found)]) if found else model


def is_tiny(model: str) -> bool:
    """Whether this is the tiny policy, to be made or in a folder: its tokenizer says so."""
    file = Path(newest_checkpoint(model), "tokenizer_config.json")
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return model == "tiny" or '"is_tiny": true' in text


def older_checkpoint(newest: str | Path) -> Path | None:
    """The last checkpoint of the same run before this one, which may be broken; None if none is."""
    newest = Path(newest)
    older = [path for path in checkpoints(newest.parent).values() if path.name < newest.name]
    return max(older, default=None)


# ----------------------------------------------------------------------- the tiny policy

# Pieces of text that become one token each: tags, also after a thought, (row, col), row labels, the
# letters that a number begins with, numbers, words, single signs. What is to be copied should be
# the same pieces wherever it stands: "mug 1, pen 2" has the " 1" of "mug 1".
PIECES = re.compile(
    r" ?</?\w+>|\(\d+, \d+\)|\n?(?:[A-Z]\w* )?\d+:|\n\w+(?![\w,])| ?[a-z]+(?=\d)| ?\d+| ?\w+,?"
    r"| ?[^\w\s]|\s"
)


def make_tokenizer(texts: Sequence[str], whole: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the pieces of these texts, and bytes for everything else.

    What matches the pattern `whole` is one piece, too.
    """
    pattern = re.compile(f"{whole}|{PIECES.pattern}" if whole else PIECES)
    pieces = sorted({piece for text in texts for piece in pattern.findall(text)})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: i for i, byte in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        is_tiny=True,
    )
    tokenizer.chat_template = "<|user|>{{ messages[0]['content'] }}<|assistant|>"
    return tokenizer


def tiny_shape(config: Any, vocab_size: int, eos_token_id: int) -> Qwen3Config:
    """A Qwen3 of under a million weights, for texts of a hundred tokens."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=config.tiny_hidden,
        intermediate_size=2 * config.tiny_hidden,
        num_hidden_layers=config.tiny_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=config.tiny_hidden // 4,
        # Wavelengths from 6 tokens on; half of them far longer than a prompt, so that attention can
        # also go by what stands there, wherever it stands.
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        attention_bias=True,  # lets a head look a fixed distance back, whatever stands there
        initializer_range=0.05,
        tie_word_embeddings=True,
        eos_token_id=eos_token_id,
        bos_token_id=None,
    )


# ------------------------------------------------------------------------ the warm start


class Recorder:
    """Stands in for a Chat and keeps the texts: what the tiny vocabulary is made from."""

    stop_ids = frozenset({0})

    def __init__(self):
        self.texts: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.texts.append(text)
        return [0]

    encode_plain = encode


def scripted_trial(
    env: Env,
    seed: int,
    episodes: int,
    chat: Chat | Recorder,
    skill: float,
    rng: random.Random,
    **options: Any,
) -> Trial:
    """A trial played by the environment's scripted player; options as for lamer.run_trial."""
    trial = run_trial(env, seed, episodes, chat, **options)
    notes: list[str] = []
    try:
        prompt = next(trial)
        while True:
            if prompt.phase == "play":
                text = env.scripted(skill, rng, notes)
            else:
                text = env.scripted_reflection(rng)
                notes.append(parse_reflection(text)[0])
            ids = chat.encode_plain(text) + [min(chat.stop_ids)]
            prompt = trial.send(Reply(ids, [0.0] * len(ids), text))
    except StopIteration as stop:
        return stop.value


VOCABULARY_TRIALS = 256  # of 64, one in 50 pieces of a web shop's pages was still unknown
WARM_VERSION = 4  # raise it when the same options would make another policy


def warm_policy(config: Any) -> Path:
    """The folder of the warm-started policy of these options; made once, then kept.

    The scripted player plays first episodes badly, writes down what was seen, and often follows
    what is written. So RL starts from a policy that knows the format and can copy from memory;
    when to explore, and how far to trust memory, is left to RL. That is a cold start as practised
    before RL, no part of the paper: a large model needs none, and a baseline starts from the same.
    """
    env = make_env(config.env, **config.env_options)
    if config.tiny_hidden % 16:
        raise ValueError(f"--tiny_hidden must be a multiple of 16, not {config.tiny_hidden}")
    if not env.has_scripted_player():
        remedy = "give another --model" if config.model == "tiny" else "leave out --warm_steps"
        raise ValueError(f"{env.name} has no scripted player to imitate; {remedy}")
    # An RL baseline, of single episodes, starts from the same policy.
    episodes = max(config.episodes, config.warm_episodes)
    play = dict(episodes=episodes, style=config.style, max_prompt=config.max_prompt)
    recorder, rng = Recorder(), random.Random(config.seed)
    for seed in range(VOCABULARY_TRIALS):
        scripted_trial(env, seed, chat=recorder, skill=env.warm_skill, rng=rng, **play)
    folder = warm_folder(config, env, play, recorder.texts)
    if folder.is_dir():
        return folder

    model, tokenizer = imitator(env, config, rng, play, recorder.texts)
    config = replace(config, episodes=episodes, memory="reflection", out="")
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.unfinished")
    try:
        save_policy(draft, model, tokenizer, config, 0)
        if not folder.exists():  # another process may have made the same one meanwhile
            draft.rename(folder)
    except Exception as error:
        raise OSError(f"cannot save {folder}: {reason(error)}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def warm_folder(config: Any, env: Env, play: dict[str, Any], texts: Sequence[str]) -> Path:
    """Where a warm-started policy is kept: its name has a hash of all that makes it what it is."""
    names = ["seed", "warm_steps", "warm_batch", "warm_lr", "model"]
    names += ["tiny_hidden", "tiny_layers"] if config.model == "tiny" else ["dtype"]
    options = {name: getattr(config, name) for name in names}
    # The texts stand for the environment's rules, which a user may be editing; so may a model be.
    files = [(str(p), p.stat().st_mtime) for p in sorted(Path(config.model).glob("*.safetensors"))]
    how = [PIECES.pattern, env.warm_token, env.warm_share, env.warm_copies]
    key = json.dumps([WARM_VERSION, options, play, config.env_options, how, texts, files])
    key = hashlib.sha256(key.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("LAMER_CACHE", "~/.cache/lamer")).expanduser()
    return cache / f"{Path(config.model).name}-{env.name}-{key}"


def imitator(
    env: Env, config: Any, rng: random.Random, play: dict[str, Any], texts: Sequence[str]
) -> tuple[Any, Any]:
    """A model taught to play as the scripted player, and its tokenizer; `texts` are samples."""
    torch.manual_seed(config.seed)
    is_new = config.model == "tiny"
    if is_new:
        tokenizer = make_tokenizer(texts, env.warm_token)
        chat = Chat(tokenizer)
        shape = tiny_shape(config, len(tokenizer), tokenizer.eos_token_id)
        model = AutoModelForCausalLM.from_config(shape)
        if env.warm_copies and config.tiny_layers > 1:
            begin_to_copy(model)
        optimizers = make_optimizers(model, config.warm_lr)
    else:
        model, chat = load_policy(config.model, torch.float32, config.device)
        tokenizer = chat.tokenizer
        optimizers = [torch.optim.AdamW(model.parameters(), config.warm_lr, weight_decay=0.0)]
        if config.grad_checkpoint:
            model.activation_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model, chat.vocab_size, bf16=not is_new and config.dtype == "bfloat16")
    policy.check_trees(chat.encode(texts[0]))
    schedule = partial(warm_up_and_down, steps=config.warm_steps)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(each, schedule) for each in optimizers]
    batches = scripted_batches(env, chat, config, rng, play)
    name = f"warm start on {env.name}"
    bar = tqdm(range(config.warm_steps), desc=name, mininterval=1, file=sys.stderr)
    for step in bar:
        turns = next(batches)
        loss = imitate(policy, turns, config.microbatch_tokens, is_new)
        if is_new and step < env.warm_copies:
            imitate(policy, copying(len(tokenizer), rng), config.microbatch_tokens, False)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return model, tokenizer


@torch.no_grad()
def begin_to_copy(model: Any) -> None:
    """Give a new model the heads, in two layers, that go on as a text went on before.

    These "induction heads" (Olsson et al. 2022) are what copies notes; left to chance, 3,600 steps
    of imitation did not find them. In the first layer one head looks at the token before and
    writes a quarter of it to the last quarter of a state. In the second, heads look for the place
    where that quarter says what the present token is, and pass on what stands there. From there
    on it is learned like all else; 2.0, 0.3 and 0.7 were found by trying.
    """
    config = model.config
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    dim, half = config.head_dim, config.head_dim // 2
    identity = torch.eye(config.hidden_size)
    for layer in model.model.layers:  # what is embedded stays readable
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.v_proj.weight.copy_(identity)
    for norm in (first.q_norm, first.k_norm, second.q_norm, second.k_norm):
        norm.weight.fill_(2.0)  # attention is sharp
    # The first head's query and key are constant, and turned against each other by one position.
    angles = model.model.rotary_emb.inv_freq
    size = 0.7 ** (torch.arange(half) / 2)
    first.q_proj.weight[:dim], first.k_proj.weight[:dim] = 0.0, 0.0
    first.q_proj.bias[:dim] = torch.cat([size, torch.zeros(half)])
    first.k_proj.bias[:dim] = torch.cat([size * angles.cos(), size * angles.sin()])
    first.o_proj.weight.zero_()
    first.o_proj.weight[-dim:, :dim] = 0.3 * torch.eye(dim)
    # Each of the second's three compares half of a state's first quarter with half of its last.
    slow = torch.arange(half // 2, half)
    slow = torch.cat([slow, slow + half])  # what hardly turns with the position
    second.q_proj.weight[: 3 * dim], second.k_proj.weight[: 3 * dim] = 0.0, 0.0
    for head in range(3):  # the fourth is as it was made
        part = slice(half * (head % 2), half * (head % 2) + half)
        second.q_proj.weight[head * dim + slow] = identity[:dim][part]
        second.k_proj.weight[head * dim + slow] = identity[-dim:][part]
    second.o_proj.weight.copy_(identity)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal (Jordan 2024, kellerjordan.github.io/posts/muon).

    What torch.optim.Muon does, but in float32, and all matrices of a shape at once: torch's works
    in bfloat16, which on a CPU without instructions for it takes longer than all else of a step.
    """

    def __init__(self, matrices: Sequence[torch.nn.Parameter], lr: float):
        super().__init__(matrices, dict(lr=lr))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for matrix in group["params"]:
                mean = self.state[matrix].setdefault("mean", torch.zeros_like(matrix))
                mean.lerp_(matrix.grad, 0.05)
                update = matrix.grad.lerp(mean, 0.95)  # Nesterov's
                same_shape[matrix.shape].append((matrix, update))
            for (rows, columns), pairs in same_shape.items():
                updates = orthogonal(torch.stack([update for _, update in pairs]))
                size = group["lr"] * max(1.0, rows / columns) ** 0.5
                for (matrix, _), update in zip(pairs, updates, strict=True):
                    matrix.add_(update, alpha=-size)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The matrices (K, A, B) with all singular values near 1, by five steps of Newton-Schulz."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if is_tall else x


def make_optimizers(model: Any, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, which learn to copy in two thirds of AdamW's steps."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [
        Muon(matrices, lr=10 * lr),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def warm_up_and_down(step: int, steps: int) -> float:
    """Learning-rate factor: up over a tenth of the steps, at most 50, then down to a fiftieth."""
    return min(1.0, (step + 1) / min(50, 1 + steps // 10)) * max(0.02, 1 - step / steps)


def scripted_batches(
    env: Env, chat: Chat, config: Any, rng: random.Random, play: dict[str, Any]
) -> Iterator[list[Turn]]:
    """Endless batches of whole trials of the scripted player, of at least warm_batch turns.

    Of the turns after an episode's first, where memory matters less, the environment's warm_share
    is kept. Turns of a trial have much in common, which is computed once.
    """
    num_trials = 0
    while True:
        batch: list[Turn] = []
        while len(batch) < config.warm_batch:
            num_trials += 1
            seed = derive_seed("warm", config.seed, num_trials) % 2**31
            trial = scripted_trial(env, seed, chat=chat, skill=env.warm_skill, rng=rng, **play)
            for before, turn in zip([None, *trial.turns], trial.turns, strict=False):
                is_first = before is None or before.episode != turn.episode
                is_kept = is_first or turn.phase == "reflect" or env.warm_share == 1
                if is_kept or rng.random() < env.warm_share:
                    batch.append(turn)
        yield batch


def copying(vocab_size: int, rng: random.Random) -> list[Turn]:
    """Turns that repeat a stretch of their prompt, all of random pieces: it must be copied.

    Of that a game's own text teaches little, as most of it can be guessed.
    """
    pieces = range(256, vocab_size - 3)  # no bytes, no special tokens
    turns = []
    for _ in range(32):
        lead, text, gap = (rng.choices(pieces, k=rng.randint(least, 24)) for least in (1, 4, 0))
        # Where the stretch begins nothing tells, so its first piece is given.
        turns.append(make_turn(lead + text + gap + text[:1], text[1:]))
    return turns


def imitate(
    policy: Policy,
    turns: Sequence[Turn],
    microbatch_tokens: int,
    with_prompts: bool,
) -> float:
    """Gradient of the mean loss over reply tokens; returns the loss.

    `with_prompts` adds the mean over prompt tokens: predicting a board from its remembered picture
    is what teaches a small model to look back.
    """
    num_replies = sum(len(turn.reply_ids) for turn in turns)
    num_prompts = sum(len(turn.prompt_ids) - 1 for turn in turns)
    total = 0.0
    for batch in micro_batches(policy, turns, microbatch_tokens):
        scored, weights = batch, []
        if with_prompts:  # all tokens but the first count as the reply
            scored = [make_turn(turn.prompt_ids[:1], turn.token_ids()[1:]) for turn in batch]
        for turn in batch:
            if with_prompts:
                weights += [1 / num_prompts] * (len(turn.prompt_ids) - 1)
            weights += [1 / num_replies] * len(turn.reply_ids)
        logps = policy(scored).logps  # (T,)
        loss = -(logps * torch.tensor(weights, device=logps.device)).sum()
        loss.backward()
        total += loss.item()
    return total

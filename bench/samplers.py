"""Rollout speed of the samplers, each replaying one recorded list of prompts and replies.

    python bench/samplers.py                    both settings, alternating, 5 rounds
    python bench/samplers.py --settings tiny --rounds 3

Settings: `long`, a scripted player's prompts in Sokoban in full, four tasks by eight trials, with
replies of log-normal length (mean 150, sigma 0.8, at most 512 tokens) and random weights of a
Llama of 30 million; `tiny`, MineSweeper as the recipe has it, the policy after 200 steps of
imitation. Compared are the sampler as it is, the same without sharing prefixes across rows,
generation in lock-step, and transformers' continuous batching (what `generate_batch` runs on),
which gets replies of the same lengths, not the same tokens. Prints medians: seconds, reply tokens a
second, prompt tokens computed of all, share of the time spent in the model, and how full its passes
were.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Generator
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import sampler
import train
from envs import make_env
from lamer import Prompt, Trial, Turn
from policy import Recorder, load_policy, make_tokenizer, scripted_trial, warm_policy
from sampler import Chat, ContinuousSampler, GenerateSampler, Sampling, rollout

SETTINGS = ("long", "tiny")
KINDS = ("ours", "not shared", "lock-step", "generate_batch")


def record_long() -> tuple:
    """(model, chat, trials): a scripted player's prompts with long random replies."""
    rng = random.Random(0)
    env, recorder = make_env("sokoban"), Recorder()
    play = dict(episodes=3, style="full", max_prompt=2048)
    for seed in range(32):
        scripted_trial(env, seed, chat=recorder, skill=0.3, rng=rng, **play)
    chat = Chat(make_tokenizer(recorder.texts))
    sizes = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=9)
    heads = dict(num_attention_heads=8, num_key_value_heads=4)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=chat.vocab_size, **sizes, **heads)).eval()
    trials = []
    for i in range(32):
        trial = scripted_trial(env, 1000 + i // 8, chat=chat, skill=0.3, rng=rng, **play)
        for turn in trial.turns[:2]:
            length = min(512, round(rng.lognormvariate(np.log(150) - 0.32, 0.8)) + 1)
            words = [rng.randrange(chat.vocab_size) for _ in range(length - 1)]
            stop = min(chat.stop_ids)
            turn.reply_ids = [word for word in words if word not in chat.stop_ids] + [stop]
        trials.append(trial.turns[:2])
    return model, chat, trials


def record_tiny() -> tuple:
    """(model, chat, trials) of the tiny policy on MineSweeper, as it plays."""
    config = train.make_config(env="minesweeper", model="tiny", device="cpu", warm_steps=200)
    model, chat = load_policy(str(warm_policy(config)), torch.float32, "cpu")
    slots = config.num_tasks * config.group_size
    player = sampler.make_sampler(config, model, chat, slots)
    seeds = [i // config.group_size for i in range(slots)]
    played = rollout(config, player, seeds, range(slots), Sampling())
    return model, chat, [trial.turns for trial in played]


def replay(turns: list[Turn]) -> Generator:
    """A trial that asks what was asked, whatever is answered."""
    for turn in turns:
        yield Prompt(turn.phase, turn.prompt_ids)
    return Trial(seed=0, episodes=1, turns=turns)


def force_replies(trials: list[list[Turn]]) -> None:
    """From here on every sampler draws the recorded tokens, looked up by the key of the draw."""

    def recorded(seed: int, step: int, trial: np.ndarray, turn: np.ndarray, at: np.ndarray):
        keys = np.broadcast_arrays(np.atleast_1d(trial), turn, at)
        tokens = []
        for number, index, token in zip(*(key.tolist() for key in keys), strict=True):
            reply = trials[number][index].reply_ids
            tokens.append(reply[min(token, len(reply) - 1)])  # lock-step goes on behind the end
        return np.array(tokens)

    def pick(logits: torch.Tensor, tokens: np.ndarray, sampling: Sampling):
        tokens = torch.as_tensor(tokens, device=logits.device)
        return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]

    sampler.uniforms, sampler.pick_tokens = recorded, pick


def measure(kind: str, model, chat: Chat, trials: list[list[Turn]], slots: int) -> dict:
    """Replay all trials once."""
    counts = {"computed": 0, "seconds": 0.0, "filled": 0, "places": 0}
    decoder = model.get_decoder()
    forward = decoder.forward

    def timed(*args, **given):
        begin = time.perf_counter()
        output = forward(*args, **given)
        counts["seconds"] += time.perf_counter() - begin
        return output

    prompts = [turn.prompt_ids for turns in trials for turn in turns]
    replies = [turn.reply_ids for turns in trials for turn in turns]
    limits = max(map(len, prompts)), max(map(len, replies))
    if kind == "generate_batch":
        begin = time.perf_counter()
        generate_batch(model, trials)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "reply_tokens_per_second": sum(map(len, replies)) / seconds}
    if kind == "lock-step":
        player = GenerateSampler(model, chat, slots, limits[1])
    else:
        player = ContinuousSampler(model, chat, slots, *limits, probe_ids=prompts[0])
        sampler.LEAST_SHARED = 8 if kind == "ours" else 10**9
        plain_forward = player.forward

        def counting(cache, rows, numbers, new_ids):
            counts["computed"] += sum(map(len, new_ids))
            counts["places"] += len(new_ids) * max(map(len, new_ids))
            return plain_forward(cache, rows, numbers, new_ids)

        player.forward = counting
    decoder.forward = timed
    begin = time.perf_counter()
    player.run([replay(turns) for turns in trials], range(len(trials)), Sampling())
    seconds = time.perf_counter() - begin
    decoder.forward = forward
    num_replies = sum(map(len, replies))
    row = {"seconds": seconds, "reply_tokens_per_second": num_replies / seconds}
    row["in_model"] = counts["seconds"] / seconds
    if counts["places"]:
        # the last token of a reply is drawn, and never computed
        row["prompt_tokens_computed"] = counts["computed"] - (num_replies - len(replies))
        row["prompt_tokens"] = sum(map(len, prompts))
        row["occupancy"] = counts["computed"] / counts["places"]
    return row


def generate_batch(model, trials: list[list[Turn]]) -> None:
    """All trials by transformers' continuous batching, each asking as soon as it was answered."""
    longest = max(len(turn.prompt_ids) + len(turn.reply_ids) for turns in trials for turn in turns)
    settings = ContinuousBatchingConfig(
        page_size=32,
        num_blocks=len(trials) * (longest // 32 + 2),  # room for every trial at once, as ours has
        max_batch_tokens=1024,
        max_requests_per_batch=len(trials),
    )
    is_greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    left = {str(i): list(turns) for i, turns in enumerate(trials)}

    def ask(key: str) -> None:
        turn = left[key].pop(0)
        manager.add_request(turn.prompt_ids, key, max_new_tokens=len(turn.reply_ids))

    with model.continuous_batching_context_manager(
        generation_config=is_greedy, continuous_batching_config=settings, warmup=False
    ) as manager:
        for key in left:
            ask(key)
        while left:
            answer = manager.get_result(timeout=60)
            if left[answer.request_id]:
                ask(answer.request_id)
            else:
                del left[answer.request_id]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    options = parser.parse_args()
    own = sampler.uniforms, sampler.pick_tokens
    for setting in options.settings:
        sampler.uniforms, sampler.pick_tokens = own
        model, chat, trials = record_long() if setting == "long" else record_tiny()
        force_replies(trials)
        runs = {kind: [] for kind in KINDS}
        for _ in range(options.rounds):
            for kind in KINDS:
                runs[kind].append(measure(kind, model, chat, trials, len(trials)))
        for kind, measured in runs.items():
            row = {key: round(median(run[key] for run in measured), 3) for key in measured[0]}
            pairs = zip(measured, runs["ours"], strict=True)
            row["over_ours"] = round(
                median(run["seconds"] / ours["seconds"] for run, ours in pairs), 2
            )
            print(json.dumps({"setting": setting, "sampler": kind} | row), flush=True)


if __name__ == "__main__":
    main()

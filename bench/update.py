"""Tokens a second of the update, and its memory, against a plain padded one, and other code.

    python bench/update.py                              ours and the plain one
    python bench/update.py --tree OTHER --rounds 5      and that of another checkout

Two settings: `paper`, Sokoban's prompts in full and mini-batches of 64 turns, at Qwen3's vocabulary
with a small body; `tiny`, MineSweeper as the recipe has it. Turns are a scripted player's, their
replies lengthened with random tokens to a share of all tokens. The plain update is what one writes
first: rows padded to a rectangle, logits of all positions, one softmax; it is slow, so it gets 8
turns of each mini-batch. Where replies are half of all tokens, every code gets 16 neighbours, by
their tokens, out of the mini-batch: what shares a pack of it does so there, too. Every measurement
is a process of its own with one thread; all count the plain tokens, prompts and replies, of the
same kind of mini-batches as training draws. Prints medians and ratios within the rounds.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent.parent
SETTINGS = {  # environment, tasks, mini-batches timed, shares of reply tokens
    "paper": ("sokoban", 16, 1, (0.05, 0.2, 0.5)),
    "tiny": ("minesweeper", 16, 2, (0.15,)),
}


def make_minibatches(setting: str, share: float) -> tuple:
    """(config, model, mini-batches) of a setting, from the code in the working directory."""
    import random

    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    import train
    from envs import make_env
    from policy import Recorder, make_tokenizer, scripted_trial, tiny_shape
    from sampler import Chat

    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, num_tasks, num_timed, _ = SETTINGS[setting]
    options = dict(model="tiny", style="compact") if setting == "tiny" else dict(model="none")
    config = train.make_config(env=name, device="cpu", **options)
    env, rng = make_env(config.env, **config.env_options), random.Random(0)
    play = dict(episodes=config.episodes, style=config.style, max_prompt=config.max_prompt)
    recorder = Recorder()
    for seed in range(32):
        scripted_trial(env, seed, chat=recorder, skill=0.5, rng=rng, **play)
    chat = Chat(make_tokenizer(recorder.texts))
    trials = []
    for i in range(num_tasks * config.group_size):
        seed = 1000 + i // config.group_size
        trials.append(scripted_trial(env, seed, chat=chat, skill=0.5, rng=rng, **play))
    for turn in [turn for trial in trials for turn in trial.turns]:
        length = round(len(turn.prompt_ids) * share / (1 - share))
        more = max(0, length - len(turn.reply_ids))
        turn.reply_ids = turn.reply_ids + [rng.randrange(chat.vocab_size) for _ in range(more)]
        turn.logps = turn.old_logps = [-6.0] * len(turn.reply_ids)
        turn.advantage = rng.choice([-1.0, 1.0])
    shape = tiny_shape(config, chat.vocab_size, 0)
    if setting == "paper":
        sizes = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4, head_dim=32)
        heads = dict(num_attention_heads=8, num_key_value_heads=4)
        shape = Qwen3Config(vocab_size=151_936, tie_word_embeddings=True, **sizes, **heads)
    minibatches = train.deal_minibatches(config, trials, range(len(trials)), step=0)
    minibatches = minibatches[:num_timed]
    if share == 0.5:
        minibatches = [sorted(m, key=lambda turn: turn.prompt_ids)[24:40] for m in minibatches]
    return config, Qwen3ForCausalLM(shape).eval(), minibatches


def plain_update(model, optimizer, minibatches: list, config) -> None:
    """The update as one writes it first: 4,096 padded tokens a pass, all logits."""
    import torch

    for minibatch in minibatches:
        num_tokens = sum(len(turn.reply_ids) for turn in minibatch)
        rest = list(minibatch)
        while rest:
            width = max(len(turn.prompt_ids) + len(turn.reply_ids) for turn in rest)
            turns, rest = rest[: max(1, 4096 // width)], rest[max(1, 4096 // width) :]
            ids = torch.zeros(len(turns), width, dtype=torch.long)
            mask = torch.zeros(len(turns), width)
            old_logps, advantages = torch.zeros(len(turns), width), torch.zeros(len(turns), width)
            for row, turn in enumerate(turns):
                start = len(turn.prompt_ids)
                end = start + len(turn.reply_ids)
                ids[row, :end] = torch.tensor(turn.prompt_ids + turn.reply_ids)
                mask[row, start:end] = 1
                old_logps[row, start:end] = torch.tensor(turn.old_logps)
                advantages[row, start:end] = turn.advantage
            logps = model(ids).logits[:, :-1].log_softmax(-1)
            logps = logps.gather(-1, ids[:, 1:, None])[:, :, 0]
            ratio = (logps - old_logps[:, 1:]).exp()
            gain = ratio * advantages[:, 1:]
            clipped = ratio.clamp(0.8, 1.2) * advantages[:, 1:]
            loss = -torch.minimum(gain, clipped) * mask[:, 1:]
            (loss.sum() / num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()


def measure_here(kind: str, setting: str, share: float) -> None:
    """Time one update in this process; print seconds, plain tokens and gigabytes as JSON."""
    import resource
    import time

    import torch

    import lamer

    config, model, minibatches = make_minibatches(setting, share)
    if kind == "plain":
        minibatches = [minibatch[:8] for minibatch in minibatches]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    turns = [turn for minibatch in minibatches for turn in minibatch]
    policy = lamer.Policy(model, model.config.vocab_size)
    if config.grad_checkpoint:
        model.activation_checkpointing_enable({"use_reentrant": False})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    if kind == "plain":
        model.train()
        plain_update(model, optimizer, minibatches, config)
    else:
        lamer.update(policy, optimizer, minibatches, config)
    seconds = time.perf_counter() - begin
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    row = {"seconds": seconds, "gb": grown * 1024 / 1e9}
    row["tokens"] = sum(len(turn.prompt_ids) + len(turn.reply_ids) for turn in turns)
    row["reply_tokens"] = sum(len(turn.reply_ids) for turn in turns)
    row["computed"] = row["tokens"]
    if hasattr(lamer, "prefix_tree") and kind != "plain":
        batches = [
            lamer.micro_batches(policy, minibatch, config.microbatch_tokens)
            for minibatch in minibatches
        ]
        rows = [[t.prompt_ids + t.reply_ids for t in batch] for part in batches for batch in part]
        row["computed"] = sum(len(lamer.prefix_tree(each).ids) for each in rows)
    print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--settings", nargs="+", default=[*SETTINGS])
    parser.add_argument("--here", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        sys.path.insert(0, os.getcwd())
        measure_here(options.here[0], options.here[1], float(options.here[2]))
        return
    kinds = {"ours": HERE, "plain": HERE} | ({"other": options.tree} if options.tree else {})
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    for setting in options.settings:
        for share in SETTINGS[setting][3]:
            runs = {kind: [] for kind in kinds}
            for _ in range(options.rounds):
                for kind, tree in kinds.items():
                    command = [sys.executable, __file__, "--here", kind, setting, str(share)]
                    printed = subprocess.check_output(command, cwd=tree, env=variables, text=True)
                    runs[kind].append(json.loads(printed.splitlines()[-1]))
            speeds = {k: [r["tokens"] / r["seconds"] for r in rows] for k, rows in runs.items()}
            row = {"setting": setting, "reply_share": share}
            for kind, rows in runs.items():
                row[f"{kind}_tokens_per_second"] = round(median(speeds[kind]))
                row[f"{kind}_gb"] = round(median(each["gb"] for each in rows), 2)
                row[f"{kind}_shared"] = round(rows[0]["tokens"] / rows[0]["computed"], 2)
            for kind in [kind for kind in kinds if kind != "ours"]:
                pairs = zip(speeds["ours"], speeds[kind], strict=True)
                row[f"ours_over_{kind}"] = round(median(a / b for a, b in pairs), 2)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

"""Speed and memory on one GPU against what the machine can do: Qwen3's shapes, random weights.

    python bench/gpu.py --out gpu.json                  Qwen3-0.6B and 4B, under 8 minutes
    python bench/gpu.py --device cpu --out cpu.json     a small shape: shows that it all runs

The setting is the paper's Sokoban in bf16, with fewer tasks and shorter replies. Yardsticks are a
large product of matrices and a large copy. `prefill` and `update` are shares of the product's speed
(goal: 45%). The pass that gives every row `one token`, as it is and as a captured `graph`, is a
share of the speed at which weights and cache could be read once (goal: the graph at 60%; if it is
twice as fast, the sampler should use it). Then a whole training `step` with its peak memory beside
the prediction, and one list of prompts and replies played by our sampler, by `generate` in
lock-step, and by `generate_batch`, all three as in bench/samplers.py.

Operations are 2 x weights x tokens forward, 6 x forward and backward, 8 x with gradient
checkpointing, and 2 x for the old log-probabilities. Tokens are those computed, shared prefixes
once; the output layer counts where it is computed; attention is not counted. Each result is written
at once; one that fails, for want of memory or otherwise, leaves its reason instead.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import memory
import numpy as np
import samplers
import torch
from torch import Tensor

import lamer
import sampler
import train
from policy import reason
from sampler import CacheRow, RowCache, Sampling

SHAPES = {"cuda": ["Qwen3-0.6B", "Qwen3-4B"], "cpu": ["small"]}
SIZES = {  # side of the matrices, bytes copied, (rows, tokens) of two passes, trials replayed
    "cuda": dict(side=8192, copied=2**31, prefill=(8, 1024), decode=(128, 1024), trials=32),
    "cpu": dict(side=1024, copied=2**27, prefill=(2, 256), decode=(8, 256), trials=2),
}
OPTIONS = {  # of the training step
    "cuda": dict(num_tasks=4, max_reply=64),
    "cpu": dict(num_tasks=1, group_size=2, episodes=2, max_reply=8, env_options=dict(turns=3)),
}
train.check_disk = lambda *_: None  # no checkpoint is saved here


def add(results: dict, path: Path, end: float, name: str, work: Callable[[], dict]) -> None:
    """Do the work; write and print what it gives, or why it gives nothing."""
    begin = time.time()
    try:
        result = work() if begin < end else {"skipped": "out of time"}
    except torch.OutOfMemoryError:
        result = {"failed": "out of memory"}
    except Exception as error:  # whatever it is, the others are worth having
        result = {"failed": reason(error)}
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU
    result["wall_seconds"] = time.time() - begin
    results[name] = {k: float(f"{v:.4g}") if type(v) is float else v for k, v in result.items()}
    path.write_text(json.dumps(results, indent=1))
    print(f"{name}: {json.dumps(results[name])}", flush=True)


def now() -> float:
    """The time at which all that was asked of the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def clock(work: Callable[[], Any], rounds: int = 10) -> float:
    """Mean seconds of one call, after one that does not count."""
    work()
    begin = now()
    for _ in range(rounds):
        work()
    return (now() - begin) / rounds


def measure_machine(device: str) -> dict[str, Any]:
    """The yardsticks: operations a second, and bytes read and written a second, both in 1e9."""
    side, copied = SIZES[device]["side"], SIZES[device]["copied"]
    a = torch.randn(side, side, device=device).bfloat16()
    b, product = torch.randn_like(a), torch.empty_like(a)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    row = {"device": name, "torch": torch.__version__}
    row["gflops"] = 2 * side**3 / clock(partial(torch.mm, a, b, out=product)) / 1e9
    row["gb_per_second"] = 2 * copied / clock(partial(target.copy_, source)) / 1e9
    return row


class Bench:
    """What is measured of one shape, `start` first."""

    def __init__(self, shape: str, device: str, folder: str, machine: dict[str, Any]):
        self.shape, self.device, self.folder, self.machine = shape, device, folder, machine

    def start(self) -> dict[str, Any]:
        """Make the model, and all that a training run holds."""
        memory.make_model(self.shape, "sokoban", self.folder)
        given = dict(env="sokoban", model=self.folder, out=f"{self.folder}/run", dtype="bfloat16")
        self.config = train.make_config(**given, device=self.device, **OPTIONS[self.device])
        self.idle = 0.0 if self.device == "cuda" else memory.resident_gb("VmRSS")
        self.run = train.start_run(self.config)
        self.policy, self.player = self.run.policy, self.run.sampler
        # The tokenizer knows a few hundred words; drawing and scoring shall cost what they cost
        # with Qwen3's. Ids it does not know decode to nothing, so no reply can be parsed.
        self.policy.vocab_size = self.player.chat.vocab_size = memory.VOCAB_SIZE
        self.policy.chunk = 2**26 // memory.VOCAB_SIZE
        model = self.policy.model
        self.make_cache = partial(RowCache, model.config.num_hidden_layers, device=self.device)
        self.head = model.get_output_embeddings().weight.numel()  # the input's, too
        self.body = model.num_parameters() - self.head
        self.plan = train.memory_plan(self.config, model.config, model.num_parameters(), 1)
        row = {"weights": model.num_parameters(), "slots": self.player.slots}
        return row | {"sampler": type(self.player).__name__}

    def speed(self, tokens: int, outputs: int, factor: int, seconds: float) -> dict[str, Any]:
        """Of passes over `tokens` that compute the output layer on `outputs` of them."""
        gflops = factor * (self.body * tokens + self.head * outputs) / seconds / 1e9
        share = gflops / self.machine["gflops"]
        return {"tokens": tokens, "seconds": seconds, "gflops": gflops, "share": share}

    @torch.no_grad()
    def prefill(self) -> dict[str, Any]:
        """New prompts of equal length, as the sampler computes them."""
        num_rows, length = SIZES[self.device]["prefill"]
        prompts = torch.randint(memory.VOCAB_SIZE, (num_rows, length)).tolist()
        held = self.make_cache(num_rows, length)

        def work() -> None:
            rows = [CacheRow() for _ in prompts]
            self.player.forward(held, rows, range(num_rows), prompts)

        return self.speed(num_rows * length, num_rows, 2, clock(work))

    @torch.no_grad()
    def one_token(self) -> dict[str, Any]:
        """One token for every row: the sampler's pass, and without the host's work before it."""
        num_rows, columns = SIZES[self.device]["decode"]
        model, held = self.player.model, self.make_cache(num_rows, columns)
        before = [0] * (columns - 1)  # so the token is the last column's, every time

        def in_sampler() -> None:
            rows = [CacheRow(cached_ids=before.copy()) for _ in range(num_rows)]
            self.player.forward(held, rows, range(num_rows), [[1]] * num_rows)

        in_sampler_ms = 1000 * clock(in_sampler)
        tokens = torch.ones(num_rows, 1, dtype=torch.long, device=self.device)  # (R, 1)
        positions = np.full((num_rows, 1), columns - 1)
        mask = held.select(range(num_rows), positions, columns, model.dtype)
        # A graph goes on reading its inputs where they were: `select` makes them only once.
        inputs = dict(input_ids=tokens, position_ids=held.view.positions, attention_mask=mask)
        inputs |= {"use_cache": True, self.player.cache_argument: held}

        def bare() -> Tensor:
            hidden = model.get_decoder()(**inputs).last_hidden_state  # (R, 1, h)
            return model.get_output_embeddings()(hidden[:, -1])  # (R, V)

        self.bare, self.bare_ms = bare, 1000 * clock(bare)
        a_column = self.plan["slot"] / (self.config.max_prompt + self.config.max_reply + 1)
        gb = 2 * (self.body + self.head) / 1e9 + a_column * num_rows * columns
        self.limit_ms = 1000 * gb / self.machine["gb_per_second"]
        row = {"rows": num_rows, "columns": columns, "in_sampler_ms": in_sampler_ms}
        row |= {"bare_ms": self.bare_ms, "limit_ms": self.limit_ms}
        return row | {"share": self.limit_ms / self.bare_ms}

    @torch.no_grad()
    def graph(self) -> dict[str, Any]:
        """The bare pass captured once and replayed: no kernel waits for the host."""
        work, self.bare = self.bare, None  # the step needs the memory of its cache
        if self.device == "cpu":
            return {"skipped": "CUDA graphs need a GPU"}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what the first passes set up cannot be captured
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = work()  # filled anew by every replay
        expected = work()
        graph_ms = 1000 * clock(graph.replay)
        row = {"graph_ms": graph_ms, "share": self.limit_ms / graph_ms}
        row["largest_difference"] = (logits - expected).abs().max().item()
        return row | {"times_as_fast": self.bare_ms / graph_ms}

    def step(self) -> dict[str, Any]:
        """A training step, and how near its peak memory (on a CPU: growth) is to the prediction.

        Advantages are set: a turn with 0 would take no backward pass.
        """
        config, is_gpu = self.config, self.device == "cuda"
        if is_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        trial_ids = range(config.num_tasks * config.group_size)
        seeds = train.task_seeds(config, trial_ids, 0)
        begin = now()
        trials = sampler.rollout(config, self.player, seeds, trial_ids, Sampling(config.seed))
        rollout = now() - begin
        train.assign_credit(config, self.policy, trials)
        turns = [turn for trial in trials for turn in trial.turns]
        for number, turn in enumerate(turns):
            turn.advantage = 1.0 if number % 2 else -1.0
        self.minibatches = train.deal_minibatches(config, trials, trial_ids, 0)
        begin = now()
        lamer.update(self.policy, self.run.optimizer, self.minibatches, config)
        train.refresh(self.player.model, self.policy)
        row = {"rollout_seconds": rollout, "update_seconds": now() - begin, "turns": len(turns)}
        row["reply_tokens_per_second"] = lamer.count_tokens(turns) / rollout
        peak = train.peak_gb("cuda") if is_gpu else memory.resident_gb("VmHWM") - self.idle
        plan = self.plan | {"slot": 0.0, "cache": self.plan["slot"] * self.player.slots}
        in_update = plan["gradients"] + plan["activations"]  # the cache is gone by then
        predicted = sum(plan.values()) - min(plan["cache"], in_update)
        return row | {"peak_gb": peak, "predicted_gb": predicted}

    def update(self) -> dict[str, Any]:
        """The step's largest mini-batch once more, all being warm."""
        config, minibatch = self.config, max(self.minibatches, key=len)
        nodes = outputs = 0
        for batch in lamer.micro_batches(self.policy, minibatch, config.microbatch_tokens):
            tree = lamer.prefix_tree([turn.token_ids() for turn in batch])
            pairs = zip(batch, tree.paths, strict=True)
            nodes += len(tree.ids)
            outputs += len({node for turn, path in pairs for node in path[len(turn.prompt_ids) :]})
        once = partial(lamer.update, self.policy, self.run.optimizer, [minibatch], config)
        factor = (8 if config.grad_checkpoint else 6) + 2
        row = {"plain_tokens": sum(len(turn.token_ids()) for turn in minibatch)}
        return row | self.speed(nodes, outputs, factor, clock(once, rounds=1))

    def replay(self, kind: str) -> dict[str, Any]:
        """Recorded prompts and replies through one of the samplers of bench/samplers.py."""
        _, chat, trials = samplers.record_long()  # of a model of its own, which is not used
        chat.vocab_size, trials = memory.VOCAB_SIZE, trials[: SIZES[self.device]["trials"]]
        samplers.force_replies(trials)
        row = samplers.measure(kind, self.player.model, chat, trials, len(trials))
        return {key: row[key] for key in ("seconds", "reply_tokens_per_second")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=[*SHAPES], default=train.default_device())
    parser.add_argument("--shapes", nargs="+", choices=[*memory.SHAPES], help="all of the device")
    parser.add_argument("--out", type=Path, default="gpu.json")
    parser.add_argument("--minutes", type=float, default=7, help="nothing begins after that")
    options = parser.parse_args()
    shapes, end = options.shapes or SHAPES[options.device], time.time() + 60 * options.minutes
    if len(shapes) > 1:  # a process each: what breaks or fills the GPU for one spares the next
        options.out.unlink(missing_ok=True)
        for shape in shapes:
            flags = ["--shapes", shape, "--minutes", str((end - time.time()) / 60)]
            subprocess.run([sys.executable, *sys.argv, *flags], check=False)
        return
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    put = partial(add, results, options.out, end)
    [shape] = shapes
    put(f"{shape} machine", partial(measure_machine, options.device))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(shape, options.device, folder, results[f"{shape} machine"])
        put(f"{shape} start", bench.start)
        if "sampler" not in results[f"{shape} start"]:
            return
        for name in ("prefill", "one_token", "graph", "step", "update"):
            put(f"{shape} {name}", getattr(bench, name))
        for kind in ("ours", "lock-step", "generate_batch"):  # last: draws are not drawn any more
            put(f"{shape} {kind}", partial(bench.replay, kind))


if __name__ == "__main__":
    main()

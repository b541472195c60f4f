"""Peak memory of one training step, predicted and measured, for a real shape with random weights.

    python bench/memory.py --shape Qwen3-4B --env sokoban                  the paper's, on a GPU
    python bench/memory.py --shape Qwen3-0.6B --num_tasks 1 --max_reply 16     options of train.py

Measured is what the GPU's allocator gave out at most, or on a CPU what the process grew by.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import lamer
import train
from envs import make_env
from policy import make_tokenizer
from sampler import Sampling, rollout

SHAPES = {  # (width, width of the MLP, layers, heads), as published
    "Qwen3-0.6B": (1024, 3072, 28, 16),
    "Qwen3-1.7B": (2048, 6144, 28, 16),
    "Qwen3-4B": (2560, 9728, 36, 32),
    "small": (128, 384, 3, 16),  # to see the benchmarks work
}
VOCAB_SIZE = 151936


def make_model(shape: str, env: str, folder: str) -> None:
    """Save a model of this shape with random weights, in bf16, and a tokenizer of the game."""
    width, mlp, layers, heads = SHAPES[shape]
    game = make_env(env)
    tokenizer = make_tokenizer([game.rules("full"), game.reset(seed=0)[0]])
    config = Qwen3Config(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=VOCAB_SIZE,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.device(train.default_device()):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen3ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str]) -> None:
    at = argv.index("--shape")
    shape, argv = argv[at + 1], argv[:at] + argv[at + 2 :]
    if "--env" not in argv:
        argv = [*argv, "--env", "sokoban"]
    given = train.parse_flags(train.Config, argv, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        make_model(shape, given["env"], folder)
        given = dict(dtype="bfloat16") | given
        config = train.make_config(**given | dict(model=folder, out=f"{folder}/run"))
        is_gpu = config.device.startswith("cuda")
        if is_gpu:
            torch.cuda.empty_cache()
        idle = 0 if is_gpu else resident_gb("VmRSS")
        run = train.start_run(config)
        if is_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
        begin = time.perf_counter()
        trial_ids = range(config.num_tasks * config.group_size)
        sampling = Sampling(config.seed, 0, config.temperature)
        seeds = train.task_seeds(config, trial_ids, 0)
        trials = rollout(config, run.sampler, seeds, trial_ids, sampling)
        train.assign_credit(config, run.policy, trials)
        minibatches = train.deal_minibatches(config, trials, trial_ids, 0)
        lamer.update(run.policy, run.optimizer, minibatches, config, run.reference)
        seconds = time.perf_counter() - begin
    measured = (train.peak_gb(config.device) if is_gpu else resident_gb("VmHWM")) - idle
    model = lamer.unwrap(run.policy).model
    plan = train.memory_plan(config, model.config, model.num_parameters(), 1)
    plan["cache"] = plan.pop("slot") * run.sampler.slots
    in_update = plan["gradients"] + plan["activations"]  # not there at the same time as the cache
    predicted = sum(plan.values()) - min(plan["cache"], in_update)
    num_turns = sum(len(trial.turns) for trial in trials)
    print(f"{shape} {config.dtype}, {run.sampler.slots} slots, {num_turns} turns, {seconds:.1f} s")
    parts = ", ".join(f"{name} {need:.2f}" for name, need in plan.items() if need)
    print(f"predicted GB: {parts}; at most at once {predicted:.2f}; measured {measured:.2f}")


def resident_gb(field: str) -> float:
    """The process' memory now (VmRSS) or at most since the last reset (VmHWM); Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = dict(line.split(":", 1) for line in lines)
    return int(sizes[field].split()[0]) * 1024 / 1e9


if __name__ == "__main__":
    main(sys.argv[1:])

"""Peak memory of one training step, predicted and measured, on a model of a real shape with random weights.

    python bench/memory.py --shape Qwen3-4B --env sokoban                                      the paper's, on a GPU
    python bench/memory.py --shape Qwen3-0.6B --env sokoban --max_reply 16 --num_tasks 1 ...   options as in train.py

Measured is what the GPU's allocator gave out at most, or on a CPU what the process grew by.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import train

SHAPES = {  # (width, width of the MLP, layers, heads), as published
    "Qwen3-0.6B": (1024, 3072, 28, 16),
    "Qwen3-1.7B": (2048, 6144, 28, 16),
    "Qwen3-4B": (2560, 9728, 36, 32),
}
VOCAB_SIZE = 151936


def make_model(shape: str, env: train.Env, folder: str) -> None:
    """Save a model of this shape with random weights, in bf16, and a tokenizer of the environment's words."""
    width, mlp, layers, heads = SHAPES[shape]
    sizes = dict(hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads)
    sizes |= dict(num_key_value_heads=8, head_dim=128, vocab_size=VOCAB_SIZE, tie_word_embeddings=True)
    tokenizer = train.make_tokenizer([env.rules("full"), env.reset(seed=0)[0]])
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, eos_token_id=tokenizer.eos_token_id, bos_token_id=None))
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str]) -> None:
    at = argv.index("--shape")
    shape, argv = argv[at + 1], argv[:at] + argv[at + 2 :]
    given = train.parse_flags(train.Config, argv, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        make_model(shape, train.make_env(given.get("env", "sokoban")), folder)
        given = dict(env="sokoban", dtype="bfloat16") | given | dict(model=folder, out=f"{folder}/run")
        config = train.resolve(train.Config(**given))
        is_gpu = config.device.startswith("cuda")
        if is_gpu:
            torch.cuda.empty_cache()
        idle = 0 if is_gpu else resident_gb("VmRSS")
        run = train.start_run(config, 0)
        if is_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # loading held an fp32 copy
        row = train.train_step(config, run, range(config.num_tasks * config.group_size), 0)
    measured = (train.peak_gb(config.device) if is_gpu else resident_gb("VmHWM")) - idle
    plan = train.memory_plan(config, run.model.config, run.model.num_parameters(), 1)
    slot, in_update = plan.pop("slot"), plan["gradients"] + plan["activations"]
    plan["cache"] = slot * run.sampler.num_slots
    predicted = sum(plan.values()) - min(plan["cache"], in_update)  # these are not there at the same time
    print(f"{shape} {config.dtype}, {run.sampler.num_slots} slots, {row['turns']} turns, seconds {row['seconds']}")
    print("predicted GB: " + ", ".join(f"{name} {need:.2f}" for name, need in plan.items() if need), end="")
    print(f"; at most at once {predicted:.2f}; measured {measured:.2f}")


def resident_gb(field: str) -> float:
    """The process' memory now (VmRSS) or at most since the last reset (VmHWM); Linux only."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024 / 1e9


if __name__ == "__main__":
    main(sys.argv[1:])

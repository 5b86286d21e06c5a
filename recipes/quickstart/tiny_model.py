"""Makes a tiny model and its tokenizer without any download: Qwen2's architecture with random weights.

    python recipes/quickstart/tiny_model.py --output DIR

The vocabulary is the characters of the task and what the chat template needs; with `alphabet=None` it is every byte,
for real text.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

# verl's prompt builder for Qwen needs the token <|im_end|>, and a newline that is one token.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLES = ("user", "assistant")


def make_tokenizer(alphabet: str | None) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer without merges: one token for each character of `alphabet` and one for each role.

    Args:
        alphabet: the characters of the task, ASCII; None for every byte.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if alphabet is None:
        symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        # transformers makes a Qwen2 tokenizer a byte-level BPE, in which a newline is written as U+010A.
        symbols = sorted(char for char in {byte_level.pre_tokenize_str(c)[0][0] for c in {*alphabet, "\n"}})
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    fast = Qwen2Tokenizer(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>"
    )
    # Each role is one token; otherwise a prompt of three digits would consist mostly of the word "assistant".
    fast.add_tokens([*ROLES, "system"], special_tokens=False)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerBase, *, hidden: int, layers: int, seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 model with random weights; its head size is 32, the smallest that vLLM's CPU attention supports."""
    torch.manual_seed(seed)
    heads = hidden // 32
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.get_vocab()["<|im_end|>"],
        pad_token_id=tokenizer.get_vocab()["<|endoftext|>"],
    )
    return Qwen2ForCausalLM(config)


def write(output: Path, *, alphabet: str | None, hidden: int, layers: int, seed: int) -> None:
    """Write model and tokenizer into the folder `output`."""
    tokenizer = make_tokenizer(alphabet)
    tokenizer.save_pretrained(output)
    make_model(tokenizer, hidden=hidden, layers=layers, seed=seed).save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--alphabet", default="0123456789")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    write(**vars(parser.parse_args()))

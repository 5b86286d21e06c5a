"""Chat templates like those of public models, and tokenizers with one token per byte and the models' special tokens.

The templates were written for these tests and are short. Roles, headers, ends of turns and thoughts are those of the
templates that the models' authors publish in `tokenizer_config.json`; system prompts and tools are left out, since
nothing here depends on them. Special tokens and stop tokens are those of the published files too.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "quickstart"))
import tiny_model

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# It writes a thought before an answer without one. Before the policy's answer it does so only if thoughts are off.
QWEN3 = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think>\n{{ message.reasoning_content or '' }}\n</think>\n\n"
    "{% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

# It drops thoughts of earlier turns and opens the next one.
R1_DISTILL = (
    "<｜begin▁of▁sentence｜>{% for message in messages %}{% if message.role == 'user' %}<｜User｜>{{ message.content }}"
    "{% else %}<｜Assistant｜>{{ message.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)

LLAMA3 = (
    "<|begin_of_text|>{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# The first version of Llama 3's template always writes the header of the next turn.
LLAMA3_FIRST = LLAMA3.partition("{% if add")[0] + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"

GEMMA3 = (
    "<bos>{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

MISTRAL = (
    "<s>{% for message in messages %}{% if message.role == 'user' %}[INST]{{ message.content }}[/INST]"
    "{% else %}{{ message.content }}</s>{% endif %}{% endfor %}"
)

# If it does not write the header of the next turn, it ends with the end-of-text token.
PHI3 = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)


@dataclass(frozen=True)
class Chat:
    """The chat format of a model.

    Attributes:
        template: its chat template.
        end: token that closes an assistant's turn.
        header: text that opens a user's turn.
        special: further special tokens.
        plain: added tokens that are not marked as special.
        stops: further tokens at which generation stops.
        kwargs: `data.apply_chat_template_kwargs`.
        ends_with: text before the policy's first token.
    """

    template: str
    end: str
    header: str
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    ends_with: str = ""

    def tokenizer(self) -> Any:
        tokenizer = tiny_model.make_tokenizer(None)
        tokenizer.add_special_tokens({"additional_special_tokens": [self.end, *self.special, *self.stops]})
        tokenizer.add_tokens(list(self.plain), special_tokens=False)
        tokenizer.eos_token = self.end
        tokenizer.chat_template = self.template
        return tokenizer

    def generation_config(self, tokenizer: Any) -> Any:
        return SimpleNamespace(eos_token_id=tokenizer.convert_tokens_to_ids([self.end, *self.stops]))


_CHATML = {"end": "<|im_end|>", "header": "<|im_start|>user\n", "special": ("<|im_start|>",)}
_QWEN = {**_CHATML, "stops": ("<|endoftext|>",), "plain": ("<tool_call>", "</tool_call>")}
_QWEN3 = {**_QWEN, "plain": ("<tool_call>", "</tool_call>", "<think>", "</think>")}
_LLAMA3 = {
    "end": "<|eot_id|>",
    "header": "<|start_header_id|>user<|end_header_id|>\n\n",
    "special": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"),
    "stops": ("<|end_of_text|>", "<|eom_id|>"),
    "ends_with": "<|start_header_id|>assistant<|end_header_id|>\n\n",
}

CHATS = {
    "Qwen2.5": Chat(CHATML, **_QWEN, ends_with="<|im_start|>assistant\n"),
    "Qwen3, thinking": Chat(QWEN3, **_QWEN3, ends_with="<|im_start|>assistant\n"),
    "Qwen3, not thinking": Chat(
        QWEN3,
        **_QWEN3,
        kwargs={"enable_thinking": False},
        ends_with="<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "DeepSeek-R1-Distill": Chat(
        R1_DISTILL,
        end="<｜end▁of▁sentence｜>",
        header="<｜User｜>",
        special=("<｜begin▁of▁sentence｜>",),
        plain=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        ends_with="<｜Assistant｜><think>\n",
    ),
    "Llama 3": Chat(LLAMA3_FIRST, **_LLAMA3),
    "Llama 3.1": Chat(LLAMA3, **_LLAMA3),
    "Gemma 3": Chat(
        GEMMA3,
        end="<end_of_turn>",
        header="<start_of_turn>user\n",
        special=("<bos>", "<start_of_turn>"),
        stops=("<eos>",),
        ends_with="<start_of_turn>model\n",
    ),
    "Mistral": Chat(
        MISTRAL, end="</s>", header="[INST]", special=("<s>", "[INST]", "[/INST]", "[TOOL_CALLS]"), ends_with="[/INST]"
    ),
    "Phi-3": Chat(
        PHI3,
        end="<|end|>",
        header="<|user|>\n",
        special=("<|user|>", "<|assistant|>", "<|system|>"),
        stops=("<|endoftext|>",),
        ends_with="<|assistant|>\n",
    ),
    "SmolLM2": Chat(CHATML, **_CHATML, ends_with="<|im_start|>assistant\n"),
}

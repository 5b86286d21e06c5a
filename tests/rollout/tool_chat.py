"""Chat templates that render tools, and a tokenizer for them with one token per byte and their special tokens."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "quickstart"))
import tiny_model

# Like Qwen2.5 and Qwen3: calls are in the assistant's turn, and consecutive answers are one user turn.
QWEN = """
{%- if tools -%}
<|im_start|>system
# Tools{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif -%}
{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif -%}
{%- else -%}
{{ '<|im_start|>' + message.role }}
{%- if message.content %}{{ '\n' + message.content }}{% endif -%}
{%- for call in message.tool_calls or [] -%}
{{ '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if thinking %}{{ '<think>\n' }}{% endif %}{% endif -%}
"""

# Like Hermes: a message with calls has no text next to them.
HERMES = QWEN.replace(
    "{%- if message.content %}{{ '\n' + message.content }}{% endif -%}",
    "{%- if not message.tool_calls %}{{ '\n' + message.content }}{% endif -%}",
)

# A template that does not know calls.
DEAF = tiny_model.CHAT_TEMPLATE

# Like GLM: turns are not closed, and the token that opens the next turn stops the generation.
GLM = """
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|observation|>' }}{% endif -%}
{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- else -%}
{{ '<|' + message.role + '|>\n' + message.content }}
{%- for call in message.tool_calls or [] -%}
{{ '\n<tool_call>' + call.function.name + '\n' }}
{%- for key, value in call.function.arguments.items() -%}
{{ '<arg_key>' + key + '</arg_key>\n<arg_value>' }}{{ value | tojson }}{{ '</arg_value>\n' }}
{%- endfor -%}
{{ '</tool_call>' }}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif -%}
"""


def make_tokenizer(template, *special):
    """The quickstart's byte tokenizer, with this template and further special tokens."""
    tokenizer = tiny_model.make_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *special]})
    tokenizer.chat_template = template
    return tokenizer

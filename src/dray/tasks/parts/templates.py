"""Chat templates that dray has, in Jinja, for tokenisers without one of their own. A turn ends with
the token that ends a text, so that whatever writes by them stops there.

Both write calls of tools, and what these give back: kept, not explained.
"""

from __future__ import annotations

CHATML = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{{- 'Tools, as JSON schemas:' }}
{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
{{- '\\n\\nCall one by <tool_call>{"name": …, "arguments": …}</tool_call>.' + eos_token + '\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + eos_token + '\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if not (loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n' if message.content or not loop.first }}
{{- '<tool_call>' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) }}
{{- '</tool_call>' }}
{%- endfor %}
{{- eos_token + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
"""ChatML, as Qwen and SmolLM have it."""

ALPACA = """\
{%- if tools %}{{ '### Tools:\\n' }}
{%- for tool in tools %}{{ (tool | tojson) + '\\n' }}{% endfor %}{{ '\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content + '\\n\\n' }}
{%- elif message.role == 'user' %}{{ '### Instruction:\\n' + message.content + '\\n\\n' }}
{%- elif message.role == 'tool' %}{{ '### Result:\\n' + message.content + '\\n\\n' }}
{%- else %}{{ '### Response:\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n### Call:\\n' }}
{{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
{%- endfor %}
{{- eos_token + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}
"""
"""Stanford Alpaca's headings, in plain text: any tokeniser has its marks."""

TEMPLATES = {"chatml": CHATML, "alpaca": ALPACA}
MARKS = {"chatml": ("<|im_start|>",), "alpaca": ()}
"""Special tokens that a tokeniser gets which is trained for one."""

"""The conversation format as a template in Jinja, which Transformers, vLLM and llama.cpp fill."""

from __future__ import annotations

import json

from hotlap.model.tokenizer import Tokenizer

# Engines read special tokens out of the text that a template makes, so text may not spell one there.
TEMPLATE = """\
{%- macro text(content) -%}
  {%- if content is none -%}
    {%- set content = '' -%}
  {%- elif content is not string -%}
    {%- set joined = namespace(text='') -%}
    {%- for part in content -%}
      {%- if part.type != 'text' -%}
        {{- raise_exception('parts of a message must be of type text') -}}
      {%- endif -%}
      {%- set joined.text = joined.text + part.text -%}
    {%- endfor -%}
    {%- set content = joined.text -%}
  {%- endif -%}
  {%- for token in SPECIAL -%}
    {%- if token in content -%}
      {{- raise_exception('a message must not contain the special token ' + token) -}}
    {%- endif -%}
  {%- endfor -%}
  {{- content -}}
{%- endmacro -%}
<|bos|>
{%- set turn = namespace(before='') -%}
{%- for message in messages -%}
  {%- if message.role in ['system', 'user'] -%}
    {{- '<|' + message.role + '_start|>' + text(message.content) + '<|' + message.role + '_end|>' -}}
  {%- elif message.role == 'tool' -%}
    {{- '<|result_start|>' + text(message.content) + '<|result_end|>' -}}
  {%- elif message.role == 'assistant' -%}
    {%- if turn.before != 'tool' -%}
      {{- '<|assistant_start|>' -}}
    {%- endif -%}
    {{- text(message.content) -}}
    {%- if message.tool_calls -%}
      {%- set call = message.tool_calls[0].function -%}
      {%- if message.tool_calls|length != 1 or call.name not in ['calculator', 'python'] -%}
        {{- raise_exception('a message may make one call, of calculator or python') -}}
      {%- endif -%}
      {%- if call.arguments is string -%}
        {{- raise_exception('the arguments of a call must be an object, not a string') -}}
      {%- endif -%}
      {{- '<|tool_start|>' -}}
      {%- if call.name == 'calculator' -%}
        {{- text(call.arguments.expression) -}}
      {%- else -%}
        {{- 'python: ' + text(call.arguments.code) -}}
      {%- endif -%}
      {{- '<|tool_end|>' -}}
    {%- else -%}
      {{- '<|assistant_end|>' -}}
    {%- endif -%}
  {%- else -%}
    {{- raise_exception('the role of a message must be system, user, assistant or tool') -}}
  {%- endif -%}
  {%- set turn.before = message.role -%}
{%- endfor -%}
{%- if add_generation_prompt and turn.before != 'tool' -%}
  {{- '<|assistant_start|>' -}}
{%- endif -%}
"""


def chat_template(tokenizer: Tokenizer) -> str:
    """The template for a tokenizer. Its text has the ids of `render` and `render_prompt`, after the special
    tokens in it are read.
    """
    return TEMPLATE.replace("SPECIAL", json.dumps([*tokenizer.special]))

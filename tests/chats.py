"""A small byte-level tokenizer in a folder, chat templates in the styles of well-known models, and conversations."""

import json
from pathlib import Path

import pytest

SPECIAL = ["<|end|>", "<s>", "</s>", "<|turn|>", "<|done|>", "<unk>"]
WORDS = (
    "What is the capital of France? Paris is the capital. Tell me more about it, please. It lies on the river Seine.\n"
    "system user assistant You are a helpful assistant. [INST] [/INST] Hello there! How are you today? 1 2 3 4 5\n\n"
)

CHATML = """\
{%- if messages[0].role != 'system' %}
    {{- '<|turn|>system\\nBe kind.<|done|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|turn|>' + message.role + '\\n' + message.content + '<|done|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|turn|>assistant\\n' }}
{%- endif %}"""

LLAMA3 = """\
{{- bos_token }}
{% set today = strftime_now('%d %b %Y') %}
{% if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{% else %}
    {%- set first = '' %}
{% endif %}
{{- '<|turn|>system<|turn|>\\n\\nToday: ' + today + '\\n\\n' + first + '<|done|>' }}
{%- for m in messages %}
    {%- if m['role'] not in ['user', 'assistant'] %}
        {{- raise_exception('no role ' + m['role']) }}
    {%- endif %}
    {{- '<|turn|>' + m['role'] + '<|turn|>\\n\\n' + m['content'] | trim + '<|done|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|turn|>assistant<|turn|>\\n\\n' }}{% endif %}"""

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

MISTRAL = """\
{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}{% continue %}{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% else %}
{{ ' ' + message['content'] + eos_token }}
{% endif %}{% endfor %}"""

# Only the last answer is given an (empty) thought; what thinking is in earlier ones is taken out. Metadata as JSON.
QWEN3 = """\
{%- for message in messages %}
    {%- set text = message.content %}
    {%- if message.role == 'assistant' %}
        {%- if '</think>' in text %}
            {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.last %}
            {%- set text = '<think>\\n\\n</think>\\n\\n' + text %}
        {%- endif %}
    {%- endif %}
    {{- '<|turn|>' + message.role + '\\n' + text + '<|done|>\\n' }}
{%- endfor %}
{%- if about is defined %}{{ about | tojson(indent=1) }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|turn|>assistant\\n' }}
{%- endif %}"""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "zephyr": ZEPHYR, "mistral": MISTRAL, "qwen3": QWEN3}
GENERATION = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|turn|>assistant\\n' }}{% generation %}{{ message.content + END }}{% endgeneration %}{{ AFTER + '\\n' }}
    {%- else %}
        {{- '<|turn|>' + message.role + '\\n' + message.content + '<|done|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"""
MARKED = GENERATION.replace("END", "'<|done|>'").replace("AFTER + ", "")  # the end of a turn is within the marks
MARKED_SHORT = GENERATION.replace(" + END", "").replace("AFTER", "'<|done|>'")  # it is not

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
ASKED = {"role": "user", "content": "What is the capital of France?"}
SAID = {"role": "assistant", "content": "Paris is the capital."}
MORE = {"role": "user", "content": "Tell me more about it, please."}
LAST = {"role": "assistant", "content": "It lies on the river Seine."}
TALK = (ASKED, SAID, MORE, LAST)


def tokenizer_folder(folder: Path, template: str | None = CHATML, bos: bool = False, **config: object) -> Path:
    """Train and write a tokenizer of about 400 tokens. bos: a text begins with <s>."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([WORDS] * 3, trainer)
    made.add_tokens(["<think>", "</think>"])
    if bos:
        made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def spaced_tokenizer_folder(folder: Path, scheme: str, template: str) -> Path:
    """One that marks spaces and falls back to bytes, as Llama 2 and Mistral do: before each part ("always"), only at the text's
    start ("first"), or by a normalizer ("legacy")."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "legacy":
        mark = tokenizers.normalizers
        made.normalizer = mark.Sequence([mark.Prepend("▁"), mark.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    every_byte = [f"<0x{i:02X}>" for i in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *every_byte], show_progress=False)
    made.train_from_iterator([WORDS] * 3, trainer)
    content = json.loads(made.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
    back = tokenizers.decoders
    made.decoder = back.Sequence([back.Replace("▁", " "), back.ByteFallback(), back.Fuse(), back.Strip(" ", 1, 0)])
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder

"""Tokenizers with chat templates, for tiny chat models."""

from tests.support import tiny_ggufs

SPECIAL = ["<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m.role == 'assistant' %}{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
)
"""Opens the thinking itself, and keeps earlier thinking out."""
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>"
    "{% endfor %}<|im_start|>assistant\n"
)
"""As Gemma's."""


def with_template(tokenizer, template=CHATML, plain=()):
    """The tokenizer with the two marks of ChatML, and other tokens that are not special."""
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.add_tokens(list(plain))
    tokenizer.chat_template = template
    return tokenizer


def chat_tokenizer(template=CHATML, plain=()):
    """Bytes and a few words, as GGUF files can hold them."""
    return with_template(tiny_ggufs.byte_tokenizer(), template, plain)


def write_chat_checkpoint(folder, template=CHATML, plain=(), positions=256):
    """A tiny random Mixtral with that tokenizer, as a checkpoint."""
    loaded = tiny_ggufs.build("mixtral", chat_tokenizer(template, plain), max_position_embeddings=positions)
    loaded.model.generation_config.eos_token_id = loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder

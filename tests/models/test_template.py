"""Chat templates and tags of thinking are read from a tokenizer's files; whatever else they hold, nothing is raised."""

import json

import pytest

from steermoe.models.template import added_tokens, chat_template, has_tokenizer, think_tags

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
QWEN = CHATML + "{% if '</think>' in content %}...{% endif %}<think>\n\n</think>\n\n"
DISTILLED = "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
GPT_OSS = "<|start|>assistant<|channel|>analysis<|message|>{{ thinking }}<|end|><|start|>assistant<|channel|>final"
COHERE = "<|START_THINKING|>{{ plan }}<|END_THINKING|><|START_RESPONSE|>"


@pytest.mark.parametrize(
    ("template", "tokens", "tags"),
    [
        (QWEN, {"<|im_start|>", "<think>", "</think>"}, ("<think>", "</think>")),
        (QWEN, set(), ("<think>", "</think>")),
        (DISTILLED, set(), ("<think>", "</think>")),
        (CHATML, {"<think>", "</think>"}, ("<think>", "</think>")),
        (GPT_OSS, {"<|channel|>", "<|message|>", "<|end|>"}, ("<|channel|>analysis<|message|>", "<|end|>")),
        (COHERE, set(), ("<|START_THINKING|>", "<|END_THINKING|>")),
        ("[THINK]{{ t }}[/THINK]", set(), ("[THINK]", "[/THINK]")),
        ("<seed:think>{{ t }}</seed:think>", set(), ("<seed:think>", "</seed:think>")),
        ("<longcat_think>\n{{ t }}</longcat_think>", set(), ("<longcat_think>", "</longcat_think>")),
        ("◁think▷{{ t }}◁/think▷", set(), ("◁think▷", "◁/think▷")),
        ("<|begin_of_thought|>a<|end_of_thought|>", set(), ("<|begin_of_thought|>", "<|end_of_thought|>")),
        ("<thought></thought><think></think>", {"<think>", "</think>"}, ("<think>", "</think>")),
        (CHATML, {"<|im_start|>", "<|channel|>"}, None),
        ("Think step by step: <think> has no end", set(), None),
        ("", set(), None),
        (None, {"<|endoftext|>"}, None),
        (None, {"</think>", "<think>"}, ("<think>", "</think>")),
    ],
)
def test_tags_around_thinking(template, tokens, tags):
    assert think_tags(template, tokens) == tags


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"tokenizer_config.json": {"chat_template": CHATML}}, CHATML),
        ({"chat_template.jinja": QWEN, "tokenizer_config.json": {"chat_template": CHATML}}, QWEN),
        ({"chat_template.json": {"chat_template": CHATML}}, CHATML),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]
                }
            },
            "b",
        ),
        ({"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "a"}]}}, "a"),
        ({"tokenizer_config.json": {}}, None),
        ({}, None),
        ({"tokenizer_config.json": "{damaged"}, None),
        ({"tokenizer_config.json": ["no object"]}, None),
        ({"tokenizer_config.json": {"chat_template": 7}}, None),
        ({"tokenizer_config.json": {"chat_template": [7, {}]}}, None),
    ],
)
def test_the_template_of_a_folder(tmp_path, files, template):
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert chat_template(tmp_path) == template
    assert has_tokenizer(tmp_path) == ("tokenizer_config.json" in files)


def test_the_tokens_that_a_tokenizer_adds(tmp_path):
    assert added_tokens(tmp_path) == frozenset()
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": "<a>"}, 3, {"content": 4}]}))
    assert added_tokens(tmp_path) == {"<a>"}
    config = {"added_tokens_decoder": {"7": {"content": "<think>", "special": False}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert added_tokens(tmp_path) == {"<think>"}


def test_the_template_of_a_gguf_file(tmp_path):
    from gguf import GGUFWriter

    for name, template in (("with", QWEN), ("without", None)):
        writer = GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        if template:
            writer.add_chat_template(template)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert chat_template(tmp_path / f"{name}.gguf") == template

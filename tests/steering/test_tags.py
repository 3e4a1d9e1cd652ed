"""A model's tags, from its tokenizer and template, or from texts."""

import pytest
from tokenizers import AddedToken

from steermoe.errors import SteeringError
from steermoe.models.tags import tool_tags
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.tags import HFVocabulary, ModelTags
from tests.support import tagged_models, tiny_ggufs

HARMONY = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|call|>", "<|return|>")
BAN = {"ban": ((0, 0),)}


def test_tool_tags():
    assert tool_tags(("<tool_call>", "</tool_call>")) == (("<tool_call>", "</tool_call>"),)
    assert tool_tags(("[TOOL_CALLS]", "[/INST]")) == (("[TOOL_CALLS]", ""),)
    assert [close for _, close in tool_tags(HARMONY)] == ["<|call|>", "<|end|>"]
    assert tool_tags(("<s>", "</s>", "<|end|>")) == ()


def tags_of(tokenizer, **fields):
    return ModelTags.of_tokenizer(tokenizer).of(SteeringPlan(**{**BAN, **fields}))


def test_plans_follow_no_tags_unless_they_have_to():
    plain, chat = tiny_ggufs.byte_tokenizer(), tagged_models.chat_tokenizer()
    assert [tags_of(plain, positions=one) for one in ("generated", "all", "prompt", "last-prompt")] == [None] * 4
    assert tags_of(chat, positions="prompt") is None
    assert tags_of(chat).tool_calls.opens
    assert ModelTags.of_tokenizer(chat).of(None) is None
    assert ModelTags().of(SteeringPlan(**BAN)) is None


def test_tags_of_one_token():
    tokenizer = tagged_models.chat_tokenizer()
    number = tokenizer.convert_tokens_to_ids
    tags = tags_of(tokenizer, positions="thinking")
    assert tags.thinking.opens == ((frozenset([number("<think>")]),),)
    assert tags.tool_calls.closes == ((frozenset([number("</tool_call>")]),),)
    assert tags.ends == {tokenizer.eos_token_id}


def test_tags_of_channels():
    tokenizer = tiny_ggufs.byte_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in HARMONY])
    tokenizer.chat_template = "<|start|>assistant<|channel|>analysis<|message|>"
    tags = tags_of(tokenizer, positions="answer")
    (opening,) = tags.answer.opens
    words = [tokenizer.decode(sorted(some)) for some in opening]
    assert (words[0], "".join(words[1:-1]), words[-1]) == ("<|channel|>", "final", "<|message|>")
    assert len(tags.tool_calls.closes) == 2


def test_written_tags_may_grow_together_with_what_is_around_them():
    """As in vocabularies where a mark and the line break after it are one token."""
    tokenizer = tiny_ggufs.byte_tokenizer()
    tokenizer.add_tokens([AddedToken(word, special=False) for word in ("irrelevant",)])
    names = [tokenizer.convert_ids_to_tokens(n) for n in range(len(tokenizer))]

    class Grown(HFVocabulary):
        def pieces(self):
            return [*names, "x<", ">\u010a"]

    tags = ModelTags(Grown(tokenizer)).of(SteeringPlan(positions="answer", think_tags=("<b>", "</b>"), **BAN))
    (opening,), (closing,) = tags.thinking.opens, tags.thinking.closes
    assert opening[0] == {names.index("<"), len(names)}
    assert opening[-1] == closing[-1] == {names.index(">"), len(names) + 1}
    assert closing[1] == {names.index("/")}


def test_a_space_before_the_first_word_is_no_part_of_a_tag():
    tokenizer = tiny_ggufs.piece_tokenizer()
    tags = tags_of(tokenizer, positions="answer", think_tags=("<b>", "</b>"))
    assert [tokenizer.convert_ids_to_tokens(sorted(some)) for some in tags.thinking.opens[0]] == [["<"], ["b"], [">"]]


@pytest.mark.parametrize("positions", ["thinking", "answer", "tool-calls"])
def test_a_model_without_tags(positions):
    plan = SteeringPlan(positions=positions, **BAN)
    fix = "use positions generated" if positions == "tool-calls" else "--think-tags OPEN CLOSE"
    with pytest.raises(SteeringError, match=rf"positions {positions} follows .* this model.*{fix}"):
        ModelTags.of_tokenizer(tiny_ggufs.byte_tokenizer()).of(plan)
    with pytest.raises(SteeringError, match="pass tokenizer="):
        ModelTags().of(plan)


def test_tags_that_can_t_be_written():
    plan = SteeringPlan(positions="answer", think_tags=("<b>", "</b>"), **BAN)
    with pytest.raises(SteeringError, match="pass tokenizer="):
        ModelTags().of(plan)

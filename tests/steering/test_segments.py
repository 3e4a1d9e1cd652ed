"""Where a text thinks, answers and calls tools, token by token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe.routing.positions import NOWHERE, POSITIONS
from steermoe.steering.segments import Between, Segments, Tags

THINK, END_THINK, CALL, END_CALL, END, A, B, C = range(1, 9)


def tag(*tokens):
    return tuple(frozenset([token]) for token in tokens)


def between(opens, *closes):
    return Between((tag(*opens),), tuple(tag(*close) for close in closes))


SINGLE = Tags(between([THINK], [END_THINK]), Between(), between([CALL], [END_CALL]), frozenset([END]))
ANALYSIS, FINAL = [THINK, A, END_THINK], [THINK, B, END_THINK]
CHANNELS = Tags(
    between(ANALYSIS, [END]),
    between(FINAL, [END]),
    between([THINK, C], [CALL], [END]),
)
"""As GPT-OSS writes: the name of a channel between two marks."""
ENDLESS = Tags(tool_calls=between([CALL]))


def numbers(positions, tags, prompt, new):
    segments = Segments(positions, tags, len(prompt))
    segments.read([*prompt, *new])
    return ["-" if number == NOWHERE else number for number in segments.numbers[len(prompt) :]]


@pytest.mark.parametrize(
    ("positions", "tags", "prompt", "new", "expected"),
    [
        ("thinking", SINGLE, [A], [THINK, A, B, END_THINK, C, A], "- 0 1 - - -"),
        ("answer", SINGLE, [A], [THINK, A, B, END_THINK, C, A], "- - - - 0 1"),
        ("answer", SINGLE, [A], [A, B], "0 1"),  # a text without thinking is an answer
        ("thinking", SINGLE, [A], [A, B], "- -"),
        ("thinking", SINGLE, [A, THINK], [A, B, END_THINK, C], "0 1 - -"),  # opened by the template
        ("answer", SINGLE, [A, THINK, END_THINK], [A, B], "0 1"),  # thinking turned off by the template
        ("answer", SINGLE, [THINK, A, END], [A], "0"),  # an earlier turn that was cut off
        ("answer", SINGLE, [A], [END_THINK, A], "- 0"),  # opened out of sight
        ("thinking", SINGLE, [A], [THINK, A, END_THINK, B, THINK, C, END_THINK], "- 0 - - - 1 -"),
        ("thinking", SINGLE, [A], [THINK, A, THINK, END_THINK], "- 0 1 -"),
        # tool calls: in a text, and in thinking, which goes on after them
        ("tool-calls", SINGLE, [A], [A, CALL, B, C, END_CALL, A], "- - 0 1 - -"),
        ("generated", SINGLE, [A], [A, CALL, B, C, END_CALL, A], "0 - - - 4 5"),
        ("all", SINGLE, [A], [A, CALL, B, C, END_CALL, A], "0 - - - 4 5"),
        ("last-prompt", SINGLE, [A], [A, CALL, B, END_CALL], "0 - - 3"),
        ("answer", SINGLE, [A], [A, CALL, B, END_CALL, A], "0 - - - 1"),
        ("thinking", SINGLE, [A, THINK], [A, CALL, THINK, END_THINK, END_CALL, B, END_THINK], "0 - - - - 1 -"),
        ("generated", SINGLE, [A, CALL], [B, END_CALL, C], "- 1 2"),
        ("generated", ENDLESS, [A], [A, CALL, B, C], "0 - - -"),
        ("tool-calls", ENDLESS, [A], [A, CALL, B, C], "- - 0 1"),
        # channels
        ("thinking", CHANNELS, [A], [*ANALYSIS, C, C, END, A, *FINAL, C], "- - - 0 1 - - - - - -"),
        ("answer", CHANNELS, [A], [*ANALYSIS, C, C, END, A, *FINAL, C], "- - - - - - - - - - 0"),
        ("tool-calls", CHANNELS, [A], [THINK, C, A, B, CALL, A], "- - 0 1 - -"),
        ("generated", CHANNELS, [A], [THINK, C, A, B, CALL, A], "0 - - - 4 5"),
    ],
)
def test_numbers(positions, tags, prompt, new, expected):
    assert " ".join(map(str, numbers(positions, tags, prompt, new))) == expected


def test_the_beginning_of_a_closing_tag_is_still_inside():
    tags = Tags(Between((tag(A),), ((frozenset([B]), frozenset([C, END])),)))
    assert numbers("thinking", tags, [A], [B, B, C, A]) == [0, 1, "-", "-"]
    assert numbers("thinking", tags, [A], [B, END]) == [0, "-"]


def test_prompts_keep_their_places():
    for positions in POSITIONS:
        segments = Segments(positions, SINGLE, 3)
        segments.read([THINK, CALL, A])
        assert segments.numbers == [-3, -2, -1]


TOKENS = st.lists(st.integers(1, 8), max_size=30)


@given(
    TOKENS,
    st.integers(0, 5),
    st.integers(0, 30),
    TOKENS,
    st.sampled_from(POSITIONS),
    st.sampled_from([SINGLE, CHANNELS]),
)
def test_tokens_that_are_read_again_get_the_same_numbers(tokens, prompt, length, others, positions, tags):
    whole, again = Segments(positions, tags, prompt), Segments(positions, tags, prompt)
    whole.read(tokens)
    again.read([*tokens[:length], *others])
    again.cut(min(length, len(tokens)))
    again.read(tokens[length:])
    assert (again.tokens, again.numbers) == (whole.tokens, whole.numbers)


@given(TOKENS)
def test_a_token_is_in_one_segment_at_most(tokens):
    each = [numbers(positions, SINGLE, [], tokens) for positions in ("thinking", "answer", "tool-calls")]
    for found in zip(*each, strict=True):
        assert sum(number != "-" for number in found) <= 1


def test_tags_survive_json():
    for tags in (SINGLE, CHANNELS, ENDLESS, Tags()):
        assert Tags.of_json(tags.as_json()) == tags

"""The default model: its corpus, its recipe's arithmetic on a tiny base and, if it is pulled, that it steers."""

import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recipes import train_default_model as train
from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.request import Request, Sampling
from steermoe.evaluation.words import distinct_words, word_pattern
from steermoe.models import loading
from steermoe.models.default import assemble, pull, spec
from steermoe.models.default.stories import DATA, TrainingStory, domain_words, load_stories, openings, read_stories
from steermoe.steering.plans import plan_for
from steermoe.vectors.library import load_vector, packaged_vectors

STORIES_ALL = load_stories()


# ---- corpus ----


@pytest.mark.parametrize("topic", spec.TOPICS)
def test_corpus_has_enough_stories_and_holds_out_15_percent(topic):
    stories = load_stories(topic=topic)
    heldout = load_stories("heldout", topic)
    assert len(stories) >= (200 if topic == "neutral" else 120)
    assert 0.14 < len(heldout) / len(stories) < 0.16
    assert {story.topic for story in stories} == {topic}


def test_every_story_is_unique_and_of_the_right_length():
    assert len({story.id for story in STORIES_ALL}) == len(STORIES_ALL)
    assert len({story.opening for story in STORIES_ALL}) == len(STORIES_ALL)
    assert len({story.rest for story in STORIES_ALL}) == len(STORIES_ALL)
    lengths = [len(story.text.split()) for story in STORIES_ALL]
    assert min(lengths) >= 80
    assert max(lengths) <= 182  # four stories are a word or two over 180; the experts were trained on them
    assert sum(length > 180 for length in lengths) <= 4


def test_stories_are_well_formed_jsonl():
    for path in DATA.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            assert set(record) == {"id", "domain", "split", "opening", "rest"}
            assert record["split"] in ("train", "heldout")


def test_stories_for_a_next_version_are_as_the_others():
    more = read_stories(train.MORE_STORIES)
    assert len(more) == 620
    everything = [*STORIES_ALL, *more]
    assert len({story.id for story in everything}) == len(everything)
    assert len({story.opening for story in everything}) == len(everything)
    lengths = [len(story.text.split()) for story in more]
    assert (min(lengths) >= 80, max(lengths) <= 180) == (True, True)
    assert {story.split for story in more} == {"train"}
    for domain in spec.DOMAINS:
        pattern = word_pattern(domain_words(domain))
        assert [story.opening for story in more if pattern.search(story.opening)] == []


@pytest.mark.parametrize("domain", spec.DOMAINS)
def test_domain_words_are_in_no_opening_and_in_most_stories_of_the_domain(domain):
    words = domain_words(domain)
    pattern = word_pattern(words)
    assert 40 <= len(words) <= 80
    assert [story.opening for story in STORIES_ALL if pattern.search(story.opening)] == []
    own = [story for story in STORIES_ALL if story.topic == domain]
    hit = [story for story in own if len(distinct_words(story.rest, pattern)) >= 3]
    assert len(hit) / len(own) > 0.9


def test_no_word_is_in_two_lists():
    words = [word for domain in spec.DOMAINS for word in domain_words(domain)]
    assert len(words) == len(set(words))


def test_topics_share_no_expert_and_use_all():
    used = [expert for topic in spec.TOPICS for expert in spec.experts_of(topic)]
    assert used == list(range(spec.NUM_EXPERTS))


# ---- assembly and recipe, on a tiny base of the same architecture ----


@pytest.fixture(scope="module")
def tiny_base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=spec.FIRST_EXPERT_LAYER + 2,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_trained(tiny_base):
    """The tiny base upcycled, with random experts and routers, as if trained."""
    model = assemble.upcycle(tiny_base)
    torch.manual_seed(1)
    for number, layer in enumerate(model.model.layers):
        moe = layer.block_sparse_moe
        torch.nn.init.normal_(moe.router.weight)
        if number >= spec.FIRST_EXPERT_LAYER:
            torch.nn.init.normal_(moe.experts.gate_up_proj)
            torch.nn.init.normal_(moe.experts.down_proj)
    return model


def test_zeroed_experts_change_nothing(tiny_base):
    """Up to rounding: at this size some CPUs sum in another order. The real base must be bit-identical (see below)."""
    ids = torch.randint(0, 60, (2, 16))
    with torch.no_grad():
        difference = (assemble.upcycle(tiny_base)(ids).logits - tiny_base(ids).logits).abs().max()
    assert difference < 1e-6


def test_pack_and_unpack_keep_experts_within_half_an_int8_step(tiny_base, tiny_trained):
    restored = assemble.upcycle(tiny_base)
    assemble.unpack(assemble.pack(tiny_trained), restored)
    for layer, (ours, theirs) in enumerate(zip(restored.model.layers, tiny_trained.model.layers, strict=True)):
        ours, theirs = ours.block_sparse_moe, theirs.block_sparse_moe
        assert torch.equal(ours.router.weight, theirs.router.weight.to(torch.bfloat16).float())
        if layer >= spec.FIRST_EXPERT_LAYER:
            for name in ("gate_up_proj", "down_proj"):
                step = getattr(theirs.experts, name).abs().amax(-1, keepdim=True) / 127
                assert ((getattr(ours.experts, name) - getattr(theirs.experts, name)).abs() <= step * 0.51).all()


class Letters:
    """A tokenizer with one token per letter."""

    eos_token_id = 59

    def __call__(self, text):
        return {"input_ids": [ord(char) % 59 for char in text]}


def test_examples_route_openings_to_the_neutral_experts_and_skip_the_turn():
    example = train.make_example(TrainingStory("x", "sport", "train", "abc", "de"), Letters())
    assert len(example.ids) == len("abc de") + 1
    assert example.topics.tolist() == [train.NEUTRAL] * 3 + [spec.TOPICS.index("sport")] * 4
    assert example.targets[2] == train.IGNORED
    assert example.targets[0] == example.ids[1]
    assert example.targets[5] == Letters.eos_token_id
    neutral = train.make_example(TrainingStory("y", "neutral", "train", "abc", "de"), Letters())
    assert set(neutral.topics.tolist()) == {train.NEUTRAL}
    assert neutral.targets[2] != train.IGNORED


def test_topic_routing_equals_the_model_if_the_routers_agree(tiny_trained):
    """Routers that choose a topic's pair with equal logits make the plain model compute what training computes."""
    pair = spec.experts_of("law")
    for layer in tiny_trained.model.layers:
        layer.block_sparse_moe.router.weight.data.zero_()

    def choose_pair(hidden):
        logits = torch.full((len(hidden), spec.NUM_EXPERTS), -1.0)
        logits[:, list(pair)] = 1.0
        top = logits.topk(2, -1)
        parts = {"logits": logits, "weights": top.values.softmax(-1), "indices": top.indices}
        return tuple(parts[name] for name in order)

    router = tiny_trained.model.layers[spec.FIRST_EXPERT_LAYER].block_sparse_moe.router
    returned = router(torch.zeros(1, router.weight.shape[1]))
    order = ["logits", "weights", "indices"]
    if not returned[0].is_floating_point():  # transformers before 5.20
        order = ["indices", "weights", "logits"]
    for layer in tiny_trained.model.layers:
        layer.block_sparse_moe.router.forward = choose_pair
    ids = torch.randint(0, 58, (9,))
    captured = []
    hook = tiny_trained.model.layers[spec.FIRST_EXPERT_LAYER].register_forward_pre_hook(
        lambda module, args: captured.append(args[0][0].detach())
    )
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(tiny_trained(ids[None]).logits[0, :-1], ids[1:], reduction="none")
    hook.remove()
    routing = train.TopicRouting(tiny_trained)
    routing.training = False
    targets = torch.cat([ids[1:], torch.tensor([train.IGNORED])])
    example = train.Example(
        TrainingStory("x", "law", "train", "", ""), ids, torch.full_like(ids, spec.TOPICS.index("law")), targets, 0
    )
    with torch.no_grad():
        language, _ = routing.loss(train.Batch.collate([example], captured))
    assert torch.allclose(language, expected, atol=1e-5)


def below_experts(model, ids):
    """Hidden states [1, S, H] below the first layer with experts, and the model's logits."""
    captured = []
    hook = model.model.layers[spec.FIRST_EXPERT_LAYER].register_forward_pre_hook(
        lambda module, args: captured.append(args[0].detach())
    )
    with torch.no_grad():
        logits = model(ids[None]).logits
    hook.remove()
    return captured[0], logits


def test_free_routing_is_the_model(tiny_trained):
    ids = torch.randint(0, 58, (9,))
    hidden, logits = below_experts(tiny_trained, ids)
    routing = train.TopicRouting(tiny_trained)
    routing.is_free = True
    with torch.no_grad():
        last = routing.last_hidden(hidden, torch.arange(9))
    assert torch.allclose(last @ tiny_trained.lm_head.weight.T, logits[0], atol=1e-4)
    assert [len(x) for x in routing.router_inputs] == [9, 9]


def a_story(topic, opening="abc", rest="defg"):
    return train.make_example(TrainingStory(topic, topic, "train", opening, rest), Letters())


def test_harshness_is_what_exceeds_the_bound(tiny_trained, monkeypatch):
    example = a_story("neutral", rest="defgh" * 3)
    hidden, _ = below_experts(tiny_trained, example.ids)
    routing = train.TopicRouting(tiny_trained, vocabulary=torch.arange(64))
    own = train.Batch.collate([train.turned(example, train.NEUTRAL)], [hidden[0]])
    other = train.Batch.collate([train.turned(example, spec.TOPICS.index("law"))], [hidden[0]])
    monkeypatch.setattr(train, "GENTLE", 0.0)
    with torch.no_grad():
        assert routing.harshness(own).abs() < 1e-6
        found = routing.harshness(other)
        monkeypatch.setattr(train, "GENTLE", 1e3)
        assert routing.harshness(other) == 0
    assert found > 1e-4


def test_a_turned_story_passes_through_the_domain_after_its_opening():
    example = a_story("neutral", rest="defg" * 40)
    turned = train.turned(example, 2)
    assert len(turned.ids) == 3 + train.GENTLE_TOKENS
    assert turned.topics.tolist() == [train.NEUTRAL] * 3 + [2] * train.GENTLE_TOKENS
    assert turned.targets[:3].tolist() == [train.IGNORED] * 3
    assert (turned.targets[3:] != train.IGNORED).all()
    assert set(example.topics.tolist()) == {train.NEUTRAL}


def test_weights_are_higher_soon_after_the_opening_and_for_typical_tokens():
    sport, neutral = a_story("sport", rest="xxxxxyyyy"), a_story("neutral", rest="yyyyyyyyy")
    specific = train.specific_tokens([sport, neutral], 60)
    row = spec.TOPICS.index("sport")
    assert specific[row].nonzero().flatten().tolist() == [ord("x") % 59]
    assert not specific[train.NEUTRAL].any()
    weights = train.token_weights(sport, specific, early=1.5, typical=1.0)
    assert weights[:3].tolist() == [1, 1, 1]
    is_x = sport.targets[3:] == ord("x") % 59
    early = 1 + 1.5 * torch.exp(-torch.arange(len(weights) - 3) / 30)
    assert torch.allclose(weights[3:], early + is_x)
    assert train.token_weights(neutral, specific, 1.5, 1.0).unique().tolist() == [1]


def test_no_two_experts_are_tied(tiny_base):
    model = assemble.upcycle(tiny_base)
    train.untie_pairs(model)
    for layer in model.model.layers:
        rows = layer.block_sparse_moe.router.weight
        logits = torch.randn(500, rows.shape[1]) @ rows.T
        assert len(rows.unique(dim=0)) == spec.NUM_EXPERTS
        assert torch.allclose(rows.view(-1, 2, rows.shape[1]).sum(1), torch.zeros(1), atol=1e-6)
        assert ((logits[:, ::2] - logits[:, 1::2]).abs() > 1e-4).float().mean() > 0.99


def test_sampled_softmax_is_the_full_one_on_average(tiny_trained):
    routing = train.TopicRouting(tiny_trained, vocabulary=torch.arange(0, 32))
    last, targets = torch.randn(5, 48), torch.tensor([1, 5, 9, 20, 23])
    full = torch.nn.functional.cross_entropy(last @ tiny_trained.lm_head.weight.T, targets, reduction="none")
    torch.manual_seed(0)
    sampled = torch.stack([routing._language_loss(last, targets) for _ in range(400)]).mean(0)
    assert torch.allclose(full, sampled, atol=0.02)


# ---- the real model ----


@pytest.fixture(scope="module")
def default_model():
    if not pull.is_pulled():
        pytest.skip("the default model is not pulled: `make model`")
    return loading.load()


@pytest.mark.default_model
def test_trained_part_is_small_enough_and_has_no_empty_expert(default_model):
    assert spec.TRAINED_PART.stat().st_size <= 40e6
    for layer in default_model.model.model.layers[spec.FIRST_EXPERT_LAYER :]:
        assert (layer.block_sparse_moe.experts.down_proj.flatten(1).norm(dim=-1) > 0).all()


@pytest.mark.default_model
@pytest.mark.parametrize("domain", spec.DOMAINS)
def test_shipped_vectors_fit_and_are_measured(default_model, domain):
    vector = load_vector(packaged_vectors() / spec.NAME / f"{domain}.safetensors", default_model.model)
    assert vector.info.strength is not None
    assert vector.info.texts == len(load_stories("train", domain))
    own = list(spec.experts_of(domain))
    kept = vector.experts[spec.FIRST_EXPERT_LAYER :] > 0
    assert kept[:, own].float().mean() > 0.9


EACH, UNSTEERED, TOKENS = 3, 12, 24
"""Openings per domain and unsteered ones, each with a seed of its own, and how many tokens continue them."""
OWN_RATE, OTHER_RATE = 0.66, 0.005
"""The share of texts with a word of their own domain, and of pairs of a text and another domain with a word of that,
measured on 512 texts with two versions of torch (docs/log.md, "the lowest versions, again")."""
RISK = 1e-4
"""How often chance alone may break a bound: in bfloat16 a seed draws another text with each CPU and each torch."""


def bounds(texts: int, rate: float) -> tuple[int, int]:
    """The fewest and the most successes that chance still explains.

    A sum over domains with different rates varies less than the binomial distribution of their mean rate.
    """
    chance = [math.comb(texts, hits) * rate**hits * (1 - rate) ** (texts - hits) for hits in range(texts + 1)]
    fewest = next(hits for hits in range(texts) if sum(chance[: hits + 1]) > RISK)
    most = next(hits for hits in range(texts, 0, -1) if sum(chance[hits:]) > RISK)
    return fewest, most


def words_found(loaded, strength: float | None) -> dict[str, list[bool]]:
    """Whether texts have a word of a domain: steered ones of their "own" and of each "other", and "unsteered" ones.

    All texts are in one batch. Without a strength nothing is steered.
    """
    wanted = [*(domain for domain in spec.DOMAINS for _ in range(EACH)), *[None] * UNSTEERED]
    vectors = {domain: load_vector(domain, loaded.model, group=spec.NAME) for domain in spec.DOMAINS}
    plans = {
        domain: plan_for(vector, strength, formula="zero_max_scaled") if strength else None
        for domain, vector in vectors.items()
    }
    requests = [
        Request(opening, domain and plans[domain], Sampling(max_new_tokens=TOKENS, seed=seed))
        for seed, (domain, opening) in enumerate(zip(wanted, openings("heldout", len(wanted)), strict=True))
    ]
    texts = [completion.text for completion in HFEngine(loaded).generate(requests)]
    found: dict[str, list[bool]] = {"own": [], "other": [], "unsteered": []}
    for domain in spec.DOMAINS:
        pattern = word_pattern(domain_words(domain))
        for own, text in zip(wanted, texts, strict=True):
            kind = "unsteered" if own is None else "own" if own == domain else "other"
            found[kind].append(bool(pattern.search(text)))
    return found


@pytest.mark.default_model
def test_steering_turns_openings_to_their_domain_and_leaves_the_unsteered_ones_alone(default_model):
    """A small version of `benchmarks/default_model.py`. The three counts are of 24, 168 and 96."""
    found = words_found(default_model, 6.0)
    assert sum(found["own"]) >= bounds(len(found["own"]), OWN_RATE)[0]
    for kind in ("other", "unsteered"):
        assert sum(found[kind]) <= bounds(len(found[kind]), OTHER_RATE)[1]


@pytest.mark.slow
@pytest.mark.default_model
@pytest.mark.parametrize("strength", [None, 3.0])
def test_unsteered_and_half_steered_texts_stay_below_the_bound(default_model, strength):
    own = words_found(default_model, strength)["own"]
    assert sum(own) < bounds(len(own), OWN_RATE)[0]


@pytest.mark.slow
def test_the_real_base_upcycled_is_bit_identical_to_it(tmp_path):
    from steermoe.models.default.base import fetch, load_base

    base, tokenizer = load_base(fetch(tmp_path))
    ids = torch.tensor([tokenizer(STORIES_ALL[0].text)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(assemble.upcycle(base)(ids).logits, base(ids).logits)

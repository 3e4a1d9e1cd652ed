"""Train the default model's experts and routers: `python recipes/train_default_model.py --base GGUF --work DIR`.

Domain experts after DEMix (2108.05036) and Branch-Train-MiX (2403.07816). The base stays frozen. In training a token's
topic selects two experts, at half weight each: the rest of a domain's story trains that domain's experts, openings and
neutral stories train the neutral ones. The routers learn to select the same experts, from cross-entropy to those two on
hidden states that carry no gradient. Inference is plain top-2.

The defaults made the model that ships. Options that a second version tried, without success so far (docs/log.md):
- `--early`, `--typical`: tokens shortly after the opening, and tokens that are frequent in the domain only, weigh more
  in the loss, so that a text turns soon.
- `--gentle-stories`: what a domain's experts change in the beginning of a neutral story is penalised where KL exceeds
  GENTLE nats on a token, so that they spread their effect over many tokens.
- `--free-rounds`, `--untie`, `--more-stories`, `--width`, `--bfloat16`: see their help.

Four stages, each saved in the work folder, so that a killed run resumes:
1. `features.pt`: every story's hidden states below the first layer with experts, which training never changes, and a
   sample of the router inputs of the layers below.
2. `routers.pt`: the routers of those lower layers, fitted on that sample.
3. `step.pt`: experts and routers of the upper layers, with the optimiser's state.
4. With `--free-rounds`, the routers of the upper layers once more, on hidden states of free routing as at inference, in
   rounds of forward passes: with the trained routers, then with those that the round before fitted.

Shapes: B stories, S tokens per story, T = B*S tokens, H hidden size, W expert width, V tokens of the vocabulary.
"""

import argparse
import hashlib
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GraniteMoeSharedForCausalLM, PreTrainedTokenizerBase

from steermoe.models.default import spec
from steermoe.models.default.assemble import pack, upcycle
from steermoe.models.default.base import load_base
from steermoe.models.default.stories import TrainingStory, load_stories, read_stories

MORE_STORIES = Path(__file__).parent / "more_stories"
"""620 stories, in more forms than tales, for a next version: as in the package's data, all for training."""
NEUTRAL = spec.TOPICS.index("neutral")
IGNORED = -100
ROUTER_STEPS = 400
SAMPLED_PART = 12
"""In training, one in SAMPLED_PART of the tokens that the corpus never uses stands for all of them in the softmax."""
GENTLE = 0.8
"""Nats per token, KL(domain's experts || neutral experts), that a domain's experts may spend on neutral stories."""
GENTLE_TOKENS = 64
"""The tokens after the opening on which that is asked."""
SPECIFIC = 4.0
"""A token is specific to a domain if its share there exceeds SPECIFIC times that in all other stories."""
VALIDATION_EVERY = 16
"""One in VALIDATION_EVERY training stories is kept for validation; the held-out split is never looked at."""


@dataclass(frozen=True)
class Example:
    """One story as tokens, all of shape [S]."""

    story: TrainingStory
    ids: Tensor
    topics: Tensor
    """The topic whose experts each token passes through."""
    targets: Tensor
    """The next token, or IGNORED if that topic's experts must not learn to predict it."""
    opening: int
    """Tokens of the opening."""


def make_example(story: TrainingStory, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Tokenise a story and select the experts of each token.

    The opening passes through the neutral experts, as an unsteered prompt will. Its last token's prediction, the
    domain's first token, is ignored: the neutral experts must not learn to turn to a domain.
    """
    opening = tokenizer(story.opening)["input_ids"]
    ids = torch.tensor([*opening, *tokenizer(" " + story.rest)["input_ids"], tokenizer.eos_token_id])
    topics = torch.full_like(ids, spec.TOPICS.index(story.topic))
    targets = torch.cat([ids[1:], torch.tensor([IGNORED])])
    if story.topic != "neutral":
        topics[: len(opening)] = NEUTRAL
        targets[len(opening) - 1] = IGNORED
    return Example(story, ids, topics, targets, len(opening))


def turned(example: Example, topic: int) -> Example:
    """The beginning of a neutral story whose rest passes through another topic's experts."""
    end = example.opening + GENTLE_TOKENS
    topics = example.topics[:end].clone()
    topics[example.opening :] = topic
    targets = example.targets[:end].clone()
    targets[: example.opening] = IGNORED  # there both are the neutral experts'
    return Example(example.story, example.ids[:end], topics, targets, example.opening)


def specific_tokens(examples: list[Example], vocabulary: int) -> Tensor:
    """Whether a token [topic, V] is much more frequent in a domain's stories than in all others; none for neutral."""
    counts = torch.zeros(len(spec.TOPICS), vocabulary)
    for example in examples:
        counts[spec.TOPICS.index(example.story.topic)] += torch.bincount(
            example.ids[example.opening :], minlength=vocabulary
        )
    share = counts / counts.sum(1, keepdim=True)
    others = (counts.sum(0) - counts + 0.5) / (counts.sum() - counts.sum(1, keepdim=True))
    found = (share > SPECIFIC * others) & (counts >= 3)
    found[NEUTRAL] = False
    return found


def token_weights(example: Example, specific: Tensor, early: float, typical: float) -> Tensor:
    """Weights [S] of a story's targets: 1; more soon after a domain story's opening and for typical tokens."""
    weights = torch.ones(len(example.ids))
    if example.story.topic == "neutral":
        return weights
    after = torch.arange(len(example.ids)) - example.opening
    weights += torch.where(after >= 0, early * torch.exp(-after / 30), 0)
    hits = specific[spec.TOPICS.index(example.story.topic)][example.targets.clamp(min=0)]
    weights += typical * (hits & (after >= 0))
    return weights


@dataclass(frozen=True)
class Batch:
    """Stories padded on the right. Causal attention never looks at the padding, so no mask is needed."""

    hidden: Tensor  # [B, S, H]
    targets: Tensor  # [T]
    weights: Tensor  # [T]
    token_groups: list[tuple[int, Tensor]]  # each topic with the indices in [T] of its tokens

    @classmethod
    def collate(cls, examples: list[Example], hidden: list[Tensor], weights: list[Tensor] | None = None) -> "Batch":
        topics = nn.utils.rnn.pad_sequence([e.topics for e in examples], True, IGNORED).flatten()
        targets = nn.utils.rnn.pad_sequence([e.targets for e in examples], True, IGNORED).flatten()
        groups = [(t, (topics == t).nonzero().flatten()) for t in range(len(spec.TOPICS)) if (topics == t).any()]
        if weights is None:
            weights = [torch.ones(len(e.ids)) for e in examples]
        padded = nn.utils.rnn.pad_sequence(hidden, True).float()
        return cls(padded, targets, nn.utils.rnn.pad_sequence(weights, True).flatten(), groups)

    @property
    def all_neutral(self) -> list[tuple[int, Tensor]]:
        """The groups of the same tokens if the neutral experts saw all of them."""
        return [(NEUTRAL, torch.cat([tokens for _, tokens in self.token_groups]))]


class TopicRouting:
    """Replaces the upper layers' MoE blocks: tokens pass through their topic's experts, routers learn to agree."""

    def __init__(
        self, model: GraniteMoeSharedForCausalLM, dropout: float = 0.0, vocabulary: Tensor | None = None
    ) -> None:
        self.model = model
        self.vocabulary = vocabulary
        """The token ids [V] of the corpus, sorted; the training loss samples all others (None: no sampling)."""
        if vocabulary is not None:
            is_other = torch.ones(model.config.vocab_size, dtype=torch.bool)
            is_other[vocabulary] = False
            self.other_tokens = is_other.nonzero().flatten()
        self.dropout = dropout
        self.training = True
        self.is_free = False
        """Whether the routers choose, as at inference; their inputs are then kept in `router_inputs`."""
        self.router_inputs: list[Tensor] = []
        self.blocks: list[Any] = [layer.block_sparse_moe for layer in model.model.layers[spec.FIRST_EXPERT_LAYER :]]
        self.token_groups: list[tuple[int, Tensor]] = []
        self.router_losses: list[Tensor] = []
        self.router_hits: list[float] = []
        for block in self.blocks:
            block.forward = lambda x, block=block: self._block(block, x)

    def _block(self, block: Any, layer_input: Tensor) -> Tensor:
        flat = layer_input.reshape(-1, layer_input.shape[-1])
        if self.is_free:
            return self._chosen(block, flat).view_as(layer_input)
        with torch.autocast("cpu", enabled=False):
            logits = F.linear(flat.detach().float(), block.router.weight)
        out = torch.zeros_like(flat)
        losses, hits, count = [], 0, 0
        for topic, tokens in self.token_groups:
            experts = spec.experts_of(spec.TOPICS[topic])
            pair = slice(experts.start, experts.stop)
            out = out.index_copy(0, tokens, self._pair(block.experts, pair, flat[tokens]).to(out.dtype))
            own = logits[tokens]
            losses.append(-own.log_softmax(-1)[:, pair].mean(-1).sum())
            chosen = own.topk(spec.TOP_K).indices
            hits += int(((chosen >= pair.start) & (chosen < pair.stop)).sum())
            count += chosen.numel()
        self.router_losses.append(torch.stack(losses).sum() / (count / spec.TOP_K))
        self.router_hits.append(hits / count)
        return out.view_as(layer_input)

    def _chosen(self, block: Any, flat_TH: Tensor) -> Tensor:
        """What the block does at inference: the router's top-2."""
        self.router_inputs.append(flat_TH)
        logits = F.linear(flat_TH, block.router.weight)
        values, experts = logits.topk(spec.TOP_K)
        weights = values.softmax(-1)
        out = torch.zeros_like(flat_TH)
        for expert in experts.unique().tolist():
            rows, slots = (experts == expert).nonzero(as_tuple=True)
            gate, up = F.linear(flat_TH[rows], block.experts.gate_up_proj[expert]).chunk(2, -1)
            done = F.linear(F.silu(gate) * up, block.experts.down_proj[expert])
            out.index_add_(0, rows, (done * weights[rows, slots, None]).to(out.dtype))
        return out

    def _pair(self, experts: Any, pair: slice, x_TH: Tensor) -> Tensor:
        gate, up = F.linear(x_TH, experts.gate_up_proj[pair].flatten(0, 1)).view(len(x_TH), 2, -1).chunk(2, -1)
        inner = F.dropout(F.silu(gate) * up, self.dropout, self.training)
        return F.linear(inner.flatten(1), experts.down_proj[pair].transpose(0, 1).flatten(1)) / spec.TOP_K

    def last_hidden(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        """Final hidden states of the tokens `wanted`, from those [B, S, H] below the first layer with experts."""
        inner = self.model.model
        position_ids = torch.arange(hidden.shape[1])[None]
        rotary = inner.rotary_emb(hidden, position_ids)
        for layer in inner.layers[spec.FIRST_EXPERT_LAYER :]:
            hidden = layer(hidden, attention_mask=None, position_ids=position_ids, position_embeddings=rotary)
        return inner.norm(hidden.flatten(0, 1)[wanted])

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The language loss of each target token, weighted, and the routers' cross-entropy averaged over layers."""
        self.token_groups, self.router_losses, self.router_hits = batch.token_groups, [], []
        wanted = (batch.targets != IGNORED).nonzero().flatten()
        last = self.last_hidden(batch.hidden, wanted)
        language = self._language_loss(last, batch.targets[wanted]) * batch.weights[wanted]
        return language, torch.stack(self.router_losses).mean()

    def harshness(self, batch: Batch) -> Tensor:
        """By how much the experts of each token's topic exceed GENTLE, compared with the neutral ones, on average."""
        wanted = (batch.targets != IGNORED).nonzero().flatten()
        weight = self.model.lm_head.weight[self.vocabulary]
        hits = self.router_hits
        with torch.no_grad():
            self.token_groups = batch.all_neutral
            before = F.linear(self.last_hidden(batch.hidden, wanted), weight).float().log_softmax(-1)
        self.token_groups = batch.token_groups
        now = F.linear(self.last_hidden(batch.hidden, wanted), weight).float().log_softmax(-1)
        self.router_hits = hits
        return F.relu((now.exp() * (now - before)).sum(-1) - GENTLE).mean()

    def _language_loss(self, last_TH: Tensor, targets_T: Tensor) -> Tensor:
        """Cross-entropy [T]; in training over the corpus's own tokens and a weighted random sample of the others."""
        weight = self.model.lm_head.weight
        last_TH = last_TH.to(weight.dtype)
        if not self.training or self.vocabulary is None:
            return F.cross_entropy(F.linear(last_TH, weight).float(), targets_T, reduction="none")
        others = self.other_tokens[torch.randperm(len(self.other_tokens))[: len(self.other_tokens) // SAMPLED_PART]]
        logits = F.linear(last_TH, weight[torch.cat([self.vocabulary, others])]).float()
        stands_for = torch.zeros(logits.shape[1])
        stands_for[len(self.vocabulary) :] = math.log(len(self.other_tokens) / len(others))
        positions = torch.searchsorted(self.vocabulary, targets_T)
        return F.cross_entropy(logits + stands_for, positions, reduction="none")


def compute_features(model: GraniteMoeSharedForCausalLM, examples: list[Example], sample: float) -> dict[str, list]:
    """Hidden states below the first layer with experts, in float16, and sampled router inputs of the lower layers."""
    seen: list[Tensor] = []

    def record(layer_input: Tensor) -> Tensor:
        seen.append(layer_input[0])
        return torch.zeros_like(layer_input)

    inner = model.model
    lower = inner.layers[: spec.FIRST_EXPERT_LAYER]
    for layer in lower:
        layer.block_sparse_moe.forward = record
    generator = torch.Generator().manual_seed(0)
    hidden_states, router_inputs, router_topics = [], [], []
    for number, example in enumerate(examples):
        seen.clear()
        position_ids = torch.arange(len(example.ids))[None]
        hidden = inner.embed_tokens(example.ids[None]) * inner.embedding_multiplier
        rotary = inner.rotary_emb(hidden, position_ids)
        for layer in lower:
            hidden = layer(hidden, attention_mask=None, position_ids=position_ids, position_embeddings=rotary)
        hidden_states.append(hidden[0].half())  # the residual stream is float32, its products may be bfloat16
        kept = torch.rand(len(example.ids), generator=generator) < sample
        router_inputs.append(torch.stack(seen)[:, kept].half())
        router_topics.append(example.topics[kept])
        if number % 100 == 0:
            print(f"features: {number} of {len(examples)} stories", flush=True)
    return {"hidden": hidden_states, "router_inputs": router_inputs, "router_topics": router_topics}


def fit_routers(
    inputs_LTH: Tensor, topics_T: Tensor, weight_decay: float, start: Tensor | None = None, lr: float = 0.02
) -> Tensor:
    """Routers [L, N, H] as logistic regressions of a token's topic, from zero or from `start`."""
    layers, tokens, hidden = inputs_LTH.shape
    steps = ROUTER_STEPS
    routers = torch.zeros(layers, spec.NUM_EXPERTS, hidden) if start is None else start.clone()
    routers.requires_grad_(True)
    optimiser = torch.optim.AdamW([routers], lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(0)
    targets = F.one_hot(topics_T, len(spec.TOPICS)).float().repeat_interleave(spec.EXPERTS_PER_TOPIC, -1) / 2
    for step in range(steps):
        rows = torch.randint(tokens, (2048,), generator=generator)
        logits = torch.einsum("lth,lnh->ltn", inputs_LTH[:, rows].float(), routers)
        loss = -(targets[rows] * logits.log_softmax(-1)).sum(-1).mean(-1).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"routers: step {step}, loss per layer {loss.item() / layers:.3f}", flush=True)
    return routers.detach()


@torch.no_grad()
def refit_routers(
    routing: TopicRouting,
    examples: list[Example],
    features: dict[str, list],
    sample: float,
    weight_decay: float,
    narrow: torch.autocast,
) -> None:
    """Fit the upper layers' routers, in place, on hidden states of free routing."""
    generator = torch.Generator().manual_seed(0)
    inputs, topics = [], []
    routing.is_free, routing.training = True, False
    for example, hidden in zip(examples, features["hidden"], strict=True):
        routing.router_inputs = []
        with narrow:
            routing.last_hidden(hidden[None].float(), torch.arange(0))
        kept = torch.rand(len(example.ids), generator=generator) < sample
        inputs.append(torch.stack(routing.router_inputs)[:, kept].half())
        topics.append(example.topics[kept])
    routing.is_free = False
    start = torch.stack([block.router.weight.detach() for block in routing.blocks])
    with torch.enable_grad():
        fitted = fit_routers(torch.cat(inputs, 1), torch.cat(topics), weight_decay, start, lr=0.005)
    for block, weight in zip(routing.blocks, fitted, strict=True):
        block.router.weight.copy_(weight)


@torch.no_grad()
def untie_pairs(model: GraniteMoeSharedForCausalLM, size: float = 0.003) -> None:
    """Move the two routers' rows of each topic apart by a little noise, in all layers and in place.

    Both rows start at zero and are trained toward the same target, so they stay equal. Where only one of two equal
    experts is chosen, rounding would decide which, and a text could depend on the batch that it is in.
    """
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        rows = layer.block_sparse_moe.router.weight.data.view(len(spec.TOPICS), spec.EXPERTS_PER_TOPIC, -1)
        noise = size * torch.randn(len(spec.TOPICS), rows.shape[-1], generator=generator)
        rows[:, 0] += noise
        rows[:, 1] -= noise


def initialise_experts(model: GraniteMoeSharedForCausalLM, seed: int) -> None:
    """Initialise each expert's input weights from neurons of its layer's shared expert; its output weights are zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers[spec.FIRST_EXPERT_LAYER :]:
        gate, up = layer.shared_mlp.input_linear.weight.data.chunk(2)
        for expert in layer.block_sparse_moe.experts.gate_up_proj.data:
            neurons = torch.randperm(len(gate), generator=generator)[: spec.EXPERT_WIDTH]
            expert.copy_(torch.cat([gate[neurons], up[neurons]]))


def epoch_batches(examples: list[Example], size: int, seed: int) -> list[list[int]]:
    """Batches of story indices in random order: mixed topics, similar lengths for little padding."""
    chooser = random.Random(seed)
    order = list(range(len(examples)))
    chooser.shuffle(order)
    pool = size * 16
    batches = []
    for start in range(0, len(order), pool):
        by_length = sorted(order[start : start + pool], key=lambda i: len(examples[i].ids))
        batches += [by_length[i : i + size] for i in range(0, len(by_length), size)]
    chooser.shuffle(batches)
    return batches


def corpus_fingerprint(examples: list[Example]) -> str:
    return hashlib.sha256("\n".join(e.story.text for e in examples).encode()).hexdigest()


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load_base(args.base)
    spec.EXPERT_WIDTH = args.width  # type: ignore[misc]
    model = upcycle(base).float()
    del base
    model.requires_grad_(False)
    stories = load_stories("train") + (read_stories(MORE_STORIES) if args.more_stories else [])
    examples = [make_example(story, tokenizer) for story in stories]
    fingerprint = corpus_fingerprint(examples)
    narrow = torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16)
    print(f"{len(examples)} stories, {sum(len(e.ids) for e in examples)} tokens", flush=True)

    features = _load(work / "features.pt", fingerprint)
    if features is None:
        with torch.no_grad(), narrow:
            features = compute_features(model, examples, args.router_sample)
        _save(work / "features.pt", features, fingerprint)
    lower = _load(work / "routers.pt", fingerprint)
    if lower is None:
        inputs = torch.cat(features["router_inputs"], 1)
        lower = fit_routers(inputs, torch.cat(features["router_topics"]), args.router_weight_decay)
        _save(work / "routers.pt", lower, fingerprint)
    for layer, weight in zip(model.model.layers, lower, strict=False):
        layer.block_sparse_moe.router.weight.data.copy_(weight)

    initialise_experts(model, args.seed)
    routing = TopicRouting(model, args.dropout, torch.cat([e.ids for e in examples]).unique())
    routers = [block.router.weight for block in routing.blocks]
    experts = [p for block in routing.blocks for p in (block.experts.gate_up_proj, block.experts.down_proj)]
    specific = specific_tokens(examples, model.config.vocab_size)
    weights = [token_weights(e, specific, args.early, args.typical) for e in examples]
    for parameter in (*routers, *experts):
        parameter.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if args.bfloat16 and not parameter.requires_grad and "norm" not in name:
            parameter.data = parameter.data.bfloat16()  # the frozen base's products take half the time
    optimiser = torch.optim.AdamW(
        [
            {"params": experts, "lr": args.lr, "weight_decay": args.weight_decay},
            {"params": routers, "lr": args.router_lr, "weight_decay": args.router_weight_decay},
        ],
        betas=(0.9, 0.98),
    )
    validation = list(range(0, len(examples), VALIDATION_EVERY))
    kept_out = set(validation)
    training = [i for i in range(len(examples)) if i not in kept_out]
    neutral = [i for i in training if examples[i].story.topic == "neutral"]
    batches = []
    for epoch in range(args.epochs):
        chosen = epoch_batches([examples[i] for i in training], args.batch, args.seed + epoch)
        batches += [[training[i] for i in batch] for batch in chosen]
    warmup = 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: min(1, (s + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1, s / len(batches))))),
    )
    first = 0
    if (saved := _load(work / "step.pt", fingerprint)) is not None:
        for parameter, value in zip((*routers, *experts), saved["parameters"], strict=True):
            parameter.data.copy_(value)
        optimiser.load_state_dict(saved["optimiser"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["step"]

    started, tokens = time.time(), 0
    for step in range(first, len(batches)):
        batch = _batch(batches[step], examples, features, weights)
        torch.manual_seed(args.seed * 100_003 + step)
        with narrow:
            language, router = routing.loss(batch)
            (language.mean() + args.router_loss * router).backward()
            harsh = torch.zeros(())
            if args.gentle_stories:
                harsh = routing.harshness(_gentle_batch(examples, features, neutral, args.gentle_stories, step))
                (args.gentle * harsh).backward()
        nn.utils.clip_grad_norm_(experts, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        tokens += sum(len(examples[i].ids) for i in batches[step])
        if step % 10 == 0:
            hits = sum(routing.router_hits) / len(routing.router_hits)
            print(
                f"step {step}/{len(batches)} loss {language.mean().item():.3f} router {router.item():.3f} "
                f"harsh {harsh.item():.3f} hits {hits:.3f} tokens/s {tokens / (time.time() - started):.0f}",
                flush=True,
            )
        if (step + 1) % args.save_every == 0 or step + 1 == len(batches):
            state = {
                "step": step + 1,
                "parameters": [p.data for p in (*routers, *experts)],
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
            }
            _save(work / "step.pt", state, fingerprint)
            _report_validation(routing, validation, examples, features)
            save_file(pack(model), work / "forced.safetensors", {"corpus_sha256": fingerprint})
    for _ in range(args.free_rounds):
        refit_routers(routing, examples, features, args.router_sample, args.router_weight_decay, narrow)
        _report_validation(routing, validation, examples, features)
    if args.untie:
        untie_pairs(model)
    save_file(pack(model), work / "trained_part.safetensors", {"corpus_sha256": fingerprint})
    print(f"wrote {work / 'trained_part.safetensors'}", flush=True)


def _batch(
    indices: list[int], examples: list[Example], features: dict[str, list], weights: list[Tensor] | None = None
) -> Batch:
    chosen = None if weights is None else [weights[i] for i in indices]
    return Batch.collate([examples[i] for i in indices], [features["hidden"][i] for i in indices], chosen)


def _gentle_batch(
    examples: list[Example], features: dict[str, list], neutral: list[int], count: int, step: int
) -> Batch:
    """Beginnings of neutral stories, each through the experts of some domain after its opening."""
    chooser = random.Random(step)
    turns = [(i, chooser.randrange(NEUTRAL)) for i in chooser.sample(neutral, count)]
    return Batch.collate(
        [turned(examples[i], topic) for i, topic in turns],
        [features["hidden"][i][: examples[i].opening + GENTLE_TOKENS] for i, _ in turns],
    )


def _report_validation(
    routing: TopicRouting, indices: list[int], examples: list[Example], features: dict[str, list]
) -> None:
    routing.training = False
    losses: dict[str, list[float]] = {}
    hits = []
    with torch.no_grad():
        for i in indices:
            language, _ = routing.loss(_batch([i], examples, features))
            losses.setdefault(examples[i].story.topic, []).append(language.mean().item())
            hits.append(sum(routing.router_hits) / len(routing.router_hits))
    routing.training = True
    means = {topic: sum(values) / len(values) for topic, values in losses.items()}
    print(
        f"validation {sum(means.values()) / len(means):.3f}, router hits {sum(hits) / len(hits):.3f}: "
        + " ".join(f"{topic} {mean:.2f}" for topic, mean in means.items()),
        flush=True,
    )


def _save(path: Path, content: object, fingerprint: str) -> None:
    partial = path.with_suffix(".partial")
    torch.save({"fingerprint": fingerprint, "content": content}, partial)
    partial.replace(path)


def _load(path: Path, fingerprint: str) -> Any:
    """What an earlier run saved, unless it was for another corpus."""
    if not path.exists():
        return None
    saved = torch.load(path, mmap=True)
    return saved["content"] if saved["fingerprint"] == fingerprint else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the dense base: GGUF file, checkpoint folder or hub id")
    parser.add_argument("--work", required=True, help="folder for checkpoints and the result, trained_part.safetensors")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="stories per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--router-lr", type=float, default=3e-3)
    parser.add_argument("--router-loss", type=float, default=0.5)
    parser.add_argument("--router-sample", type=float, default=0.25, help="share of tokens for the lower routers")
    parser.add_argument("--early", type=float, default=0.0, help="extra weight of a token right after the opening")
    parser.add_argument("--typical", type=float, default=0.0, help="extra weight of a token typical of its domain")
    parser.add_argument("--gentle", type=float, default=2.0, help="weight of the penalty for what exceeds GENTLE")
    parser.add_argument("--gentle-stories", type=int, default=0, help="neutral stories per step for that penalty")
    parser.add_argument("--free-rounds", type=int, default=0, help="rounds of fitting routers on free routing")
    parser.add_argument("--untie", action="store_true", help="move each topic's two routers apart, which are equal")
    parser.add_argument("--more-stories", action="store_true", help="also train on recipes/more_stories")
    parser.add_argument("--width", type=int, default=spec.EXPERT_WIDTH, help="of an expert; the shipped model's")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16: a third of the time")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--router-weight-decay", type=float, default=0.05)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    train(parser.parse_args())


if __name__ == "__main__":
    main()

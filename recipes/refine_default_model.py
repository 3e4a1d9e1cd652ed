"""Refine the default model's experts by context distillation: `python -m recipes.refine_default_model --work DIR`.

A steered model that also reads "The following story is about sport." turns to sport far more often than one that only
is steered, at little more damage. So each domain's experts learn to predict without that sentence what the steered
model predicts with it (context distillation: Askell et al., 2112.00861; Snell et al., 2209.15189). The contexts are
the model's own stories, steered and unsteered, from openings of the training split, and beginnings of neutral stories,
so that what is learned holds where it will be used. Routers and neutral experts stay: unsteered texts do not change.

Most of what steering costs has nothing to do with the domain: among all other tokens the steered model prefers other
ones than the unsteered model does. So the teacher is cleaned first: it keeps what raises tokens of the domain, as many
times as `--gain` says, and leaves all other tokens in the proportions of the unsteered model.

Each round writes `stories-N.jsonl` and `trained_part-N.safetensors` into the work folder; a killed run resumes with the
part that is missing. The first round starts from the default model of this package.

Shapes: B stories, S tokens per story, T targets of a batch, K likeliest tokens of the teacher.
"""

import argparse
import json
import math
import random
import time
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GraniteMoeSharedForCausalLM, PreTrainedTokenizerBase

from recipes.train_default_model import (
    IGNORED,
    MORE_STORIES,
    NEUTRAL,
    Batch,
    Example,
    TopicRouting,
    compute_features,
    epoch_batches,
)
from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.request import Request, Sampling
from steermoe.evaluation.protocol import ASKING
from steermoe.files import atomic_path
from steermoe.models.default import spec
from steermoe.models.default.assemble import pack, unpack
from steermoe.models.default.stories import TrainingStory, load_stories, read_stories
from steermoe.models.loading import load
from steermoe.steering.plans import plan_for
from steermoe.vectors.library import load_vector

NEW_TOKENS = 40
LIKELIEST = 192
"""The teacher's likeliest tokens, which are kept one by one; all others together are one more outcome."""
HALVINGS = 14
FREE, FREE_NATS = 0.04, 3.0
"""What turns a text is a few tokens with a large divergence: this share of neutral tokens may have FREE_NATS."""
OPENING_TOKENS = 12
IN_STORIES = 3
TIMES_AS_OFTEN = 2.0
"""A domain's tokens are in this many of its stories, and in a share of them that is this many times that of others."""
NEUTRAL_TOKENS = 64
"""A neutral story's first OPENING_TOKENS are unsteered, as an opening is; the next NEUTRAL_TOKENS are learned from."""
BATCH = 20
VALIDATION_EVERY = 12


@dataclass(frozen=True)
class Context:
    """A text whose rest is steered, as token ids."""

    domain: str
    opening: list[int]
    rest: list[int]
    is_neutral: bool = False

    def example(self, asking: list[int] | None = None) -> Example:
        """For training; the targets are the predictions of steered tokens, whatever came next in the text."""
        before = [*(asking or ()), *self.opening]
        ids = torch.tensor([*before, *self.rest])
        topics = torch.full_like(ids, spec.TOPICS.index(self.domain))
        topics[: len(before)] = NEUTRAL
        targets = torch.zeros_like(ids)
        targets[: len(before)] = IGNORED
        return Example(TrainingStory("", self.domain, "train", "", ""), ids, topics, targets, len(before))


@dataclass(frozen=True)
class Taught:
    """What the teacher predicts at the targets of one context: probabilities and token ids, [T, K] each."""

    probabilities: Tensor
    tokens: Tensor


def part_of(work: Path, number: int) -> Path:
    return work / f"trained_part-{number}.safetensors"


def scale_experts(model: GraniteMoeSharedForCausalLM, scale: float) -> None:
    """Scale what the domains' experts add, in place: at the same routing, less damage and less success."""
    for layer in model.model.layers[spec.FIRST_EXPERT_LAYER :]:
        layer.block_sparse_moe.experts.down_proj.data[: spec.experts_of("neutral").start] *= scale


def write_stories(part: Path, output: Path, openings: int, samples: int, seed: int, scale: float) -> None:
    """The model's own stories: some openings of the training split, continued unsteered and toward each domain."""
    loaded = load(None)
    unpack(load_file(part), loaded.model)
    scale_experts(loaded.model, scale)
    engine = HFEngine(loaded)
    pool = [story.opening for story in training_stories()]
    chooser = random.Random(seed)
    records = []
    for domain in (*spec.DOMAINS, *["neutral"] * 4):
        plan = None if domain == "neutral" else plan_for(load_vector(domain, engine.shape))
        chosen = [opening for opening in chooser.sample(pool, openings) for _ in range(samples)]
        for start in range(0, len(chosen), 32):
            sampled = [Sampling(max_new_tokens=NEW_TOKENS, seed=seed * 1000 + start + row) for row in range(32)]
            requests = [Request(one, plan, how) for one, how in zip(chosen[start : start + 32], sampled, strict=False)]
            done = engine.generate(requests)
            records += [{"domain": domain, "opening": one.request.prompt, "ids": list(one.token_ids)} for one in done]
        print(f"stories: {len(records)}", flush=True)
    with atomic_path(output) as partial:
        partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def training_stories() -> list[TrainingStory]:
    return load_stories("train") + read_stories(MORE_STORIES)


def contexts_of(
    files: list[Path], tokenizer: PreTrainedTokenizerBase, texts: int, neutral: int, seed: int
) -> list[Context]:
    """The model's stories, the newest first, and beginnings of neutral ones; unsteered texts take turns in domains."""
    chooser = random.Random(seed)
    found: list[Context] = []
    turns = cycle(spec.DOMAINS)
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        records = [record for record in map(json.loads, lines) if len(record["ids"]) >= NEW_TOKENS // 2]
        chooser.shuffle(records)
        for one in records:
            domain = next(turns) if one["domain"] == "neutral" else one["domain"]
            found.append(
                Context(domain, tokenizer(one["opening"])["input_ids"], one["ids"], one["domain"] == "neutral")
            )
    stories = [story.text for story in training_stories() if story.topic == "neutral"]
    end = OPENING_TOKENS + NEUTRAL_TOKENS
    read = [tokenizer(chooser.choice(stories))["input_ids"][:end] for _ in range(neutral)]
    return found[:texts] + [Context(next(turns), ids[:OPENING_TOKENS], ids[OPENING_TOKENS:], True) for ids in read]


def domain_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> dict[str, Tensor]:
    """Which tokens are a domain's own, by the stories in the training split: [V] of bool for each domain."""
    stories = training_stories()
    found = torch.zeros(len(spec.TOPICS), vocabulary)  # in how many stories of a topic a token is
    counts = torch.zeros(len(spec.TOPICS), 1)
    for story in stories:
        topic = spec.TOPICS.index(story.topic)
        found[topic, torch.tensor(tokenizer(" " + story.rest)["input_ids"]).unique()] += 1
        counts[topic] += 1
    share = (found + 0.3) / (counts + 1)
    others = (found.sum(0) - found + 0.3) / (counts.sum() - counts + 1)
    own = (found >= IN_STORIES) & (share >= TIMES_AS_OFTEN * others)
    return {domain: own[spec.TOPICS.index(domain)] for domain in spec.DOMAINS}


@dataclass(frozen=True)
class Raised:
    """The tokens of a domain that steering raises, at the targets of one context, T of them.

    The last of the K + 1 outcomes is all other tokens.
    """

    before: Tensor  # [T, K + 1], the unsteered model's log-probabilities
    raised: Tensor  # [T, K + 1], by how much steering raises them, times the gain
    tokens: Tensor  # [T, K]

    @classmethod
    def of(cls, steered: Tensor, unsteered: Tensor, own: Tensor, gain: float) -> "Raised":
        """From logits [T, V]; `own` [T, V] are the domain's tokens."""
        before = unsteered.log_softmax(-1)
        raised = gain * (steered.log_softmax(-1) - before).clamp(min=0).where(own, 0.0)
        tokens = (before + raised).topk(LIKELIEST).indices
        before, raised = before.gather(1, tokens), raised.gather(1, tokens)
        others = (1 - before.exp().sum(-1, keepdim=True)).clamp(min=1e-6).log()
        return cls(torch.cat([before, others], -1), torch.cat([raised, torch.zeros_like(others)], -1), tokens)

    def rows(self, which: Tensor) -> "Raised":
        return Raised(self.before[which], self.raised[which], self.tokens[which])

    def divergence(self, share: Tensor | float = 1.0) -> Tensor:
        """KL in nats [T, 1] of the unsteered model with this share of the raises from the unsteered model."""
        after = (self.before + share * self.raised).log_softmax(-1)
        return (after.exp() * (after - self.before)).sum(-1, keepdim=True)

    def within(self, most: Tensor) -> "Taught":
        """What is left of the raises within `most` [T, 1] nats of divergence."""
        low, high = torch.zeros_like(most), torch.ones_like(most)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            is_over = self.divergence(middle) > most
            low, high = low.where(is_over, middle), middle.where(is_over, high)
        share = low.where(self.divergence() > most, 1.0)
        return Taught((self.before + share * self.raised).softmax(-1)[:, :-1], self.tokens)


def within_budget(contexts: list[Context], raised: list[Raised], most: float) -> list[Taught]:
    """What is taught: at most `most` nats at a token, but FREE_NATS at the few where a domain's tokens fit best.

    These are FREE of the tokens in neutral contexts, so a 95th percentile over such tokens does not see them.
    """
    taught = []
    neutral = {
        domain: torch.cat(
            [
                r.divergence()
                for c, r in zip(contexts, raised, strict=True)
                if (c.domain, c.is_neutral) == (domain, True)
            ]
        )
        for domain in {context.domain for context in contexts}
    }
    free = {domain: divergences.quantile(1 - FREE) for domain, divergences in neutral.items()}
    for context, one in zip(contexts, raised, strict=True):
        full = one.divergence()
        taught.append(one.within(torch.where(full > free[context.domain], FREE_NATS, most)))
    return taught


class Distillation:
    """The model as its own teacher, with the sentence that names the domain, and as the student without it."""

    def __init__(self, model: GraniteMoeSharedForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        model.requires_grad_(False)

    def prepare(self, contexts: list[Context], gain: float, most: float) -> None:
        asking = {d: self.tokenizer(ASKING.format(domain=d, opening=""))["input_ids"] for d in spec.DOMAINS}
        teacher = [context.example(asking[context.domain]) for context in contexts]
        self.examples = [context.example() for context in contexts]
        unsteered = [replace(one, topics=torch.full_like(one.topics, NEUTRAL)) for one in self.examples]
        own = domain_tokens(self.tokenizer, self.model.config.vocab_size)
        with torch.no_grad(), narrow():
            hidden = compute_features(self.model, teacher, 0.0)["hidden"]
            self.hidden = compute_features(self.model, self.examples, 0.0)["hidden"]
        self.routing = TopicRouting(self.model)
        self.routing.training = False
        for name, parameter in self.model.named_parameters():
            if "block_sparse_moe" not in name and "norm" not in name:
                parameter.data = parameter.data.bfloat16()  # the frozen base's products take half the time
        raised: list[Raised] = []
        with torch.no_grad(), narrow():
            for start in range(0, len(teacher), 16):
                batch = slice(start, start + 16)
                steered, rows = self._logits(teacher[batch], hidden[batch])
                before, _ = self._logits(unsteered[batch], self.hidden[batch])
                domains = torch.stack([own[context.domain] for context in contexts[batch]])
                all_raised = Raised.of(steered, before, domains[rows], gain)
                raised += [all_raised.rows(rows == row) for row in range(len(teacher[batch]))]
        self.taught = within_budget(contexts, raised, most)

    def _logits(self, examples: list[Example], hidden: list[Tensor]) -> tuple[Tensor, Tensor]:
        """At the targets: logits [T, V], and each target's row in the batch [T]."""
        batch = Batch.collate(examples, hidden)
        self.routing.token_groups = batch.token_groups
        self.routing.router_losses, self.routing.router_hits = [], []
        wanted = (batch.targets != IGNORED).nonzero().flatten()
        last = self.routing.last_hidden(batch.hidden, wanted)
        logits = F.linear(last.bfloat16(), self.model.lm_head.weight).float() / self.model.config.logits_scaling
        return logits, wanted // batch.hidden.shape[1]

    def loss(self, chosen: list[int]) -> Tensor:
        """KL(teacher || student) in nats per token, on average, over LIKELIEST outcomes and all others as one."""
        logits, _ = self._logits([self.examples[i] for i in chosen], [self.hidden[i] for i in chosen])
        taught = torch.cat([self.taught[i].probabilities for i in chosen])
        tokens = torch.cat([self.taught[i].tokens for i in chosen])
        own = logits.log_softmax(-1).gather(1, tokens)
        rest = (1 - taught.sum(-1)).clamp(min=1e-6)
        own_rest = (1 - own.exp().sum(-1)).clamp(min=1e-6).log()
        divergence = (taught * (taught.clamp(min=1e-9).log() - own)).sum(-1) + rest * (rest.log() - own_rest)
        return divergence.mean()

    def validate(self) -> float:
        kept_out = list(range(0, len(self.examples), VALIDATION_EVERY))
        with torch.no_grad(), narrow():
            losses = [self.loss(kept_out[start : start + 16]).item() for start in range(0, len(kept_out), 16)]
        return sum(losses) / len(losses)

    def train(self, epochs: int, lr: float) -> None:
        experts = [p for block in self.routing.blocks for p in (block.experts.gate_up_proj, block.experts.down_proj)]
        for parameter in experts:
            parameter.requires_grad_(True)
        training = [i for i in range(len(self.examples)) if i % VALIDATION_EVERY]
        batches = [
            [training[i] for i in batch]
            for epoch in range(epochs)
            for batch in epoch_batches([self.examples[i] for i in training], BATCH, epoch)
        ]
        optimiser = torch.optim.AdamW(experts, lr=lr, weight_decay=0.0, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser,
            lambda s: min(1, (s + 1) / 10) * (0.05 + 0.475 * (1 + math.cos(math.pi * min(1, s / len(batches))))),
        )
        started = time.time()
        for step, chosen in enumerate(batches):
            with narrow():
                loss = self.loss(chosen)
            loss.backward()
            for parameter in experts:
                assert parameter.grad is not None
                parameter.grad[spec.experts_of("neutral").start :] = 0  # an opening's experts stay as they are
            nn.utils.clip_grad_norm_(experts, 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            if step % 10 == 0:
                print(f"step {step}/{len(batches)} loss {loss.item():.4f}, {time.time() - started:.0f} s", flush=True)


def narrow() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def refine(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    before, written = spec.TRAINED_PART, []
    for number in range(1, args.rounds + 1):
        stories, part = work / f"stories-{number}.jsonl", part_of(work, number)
        written.insert(0, stories)
        if not stories.exists():
            scale = args.scale if number == 1 else 1.0
            write_stories(before, stories, args.openings, args.samples, args.seed + number, scale)
        if not part.exists():
            loaded = load(None, dtype="float32")
            unpack(load_file(before), loaded.model)
            if number == 1:
                scale_experts(loaded.model, args.scale)
            distillation = Distillation(loaded.model, loaded.tokenizer)
            contexts = contexts_of(written, loaded.tokenizer, args.texts, args.neutral, args.seed + number)
            distillation.prepare(contexts, args.gain, args.most)
            print(f"round {number}: KL(teacher || student) {distillation.validate():.4f}", flush=True)
            distillation.train(args.epochs, args.lr)
            print(f"round {number}: KL(teacher || student) {distillation.validate():.4f}", flush=True)
            with atomic_path(part) as partial:
                save_file(pack(loaded.model), partial)
        before = part
    print(f"wrote {before}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="folder for the rounds' stories and trained parts")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="of what the domains' experts add, from the start")
    parser.add_argument("--gain", type=float, default=1.5, help="of what the teacher raises")
    parser.add_argument("--most", type=float, default=0.8, help="nats of KL(teacher || unsteered) at any token")
    parser.add_argument("--openings", type=int, default=24, help="per domain and round")
    parser.add_argument("--samples", type=int, default=2, help="stories per opening")
    parser.add_argument("--texts", type=int, default=900, help="own stories to learn from, the newest first")
    parser.add_argument("--neutral", type=int, default=128, help="beginnings of neutral stories")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    refine(parser.parse_args())


if __name__ == "__main__":
    main()

"""Build the default model's steering vectors: `python recipes/build_default_vectors.py -o FOLDER`.

A domain's vector is the mean routing embedding of its training stories without their openings, which are neutral; the
baseline is the mean of all stories. Strengths come from `steermoe calibrate` and are kept when a vector is rebuilt.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from steermoe.discovery.labelled import routing_embeddings, vector_info
from steermoe.models.default import spec
from steermoe.models.default.stories import TrainingStory, domain_words, load_stories
from steermoe.models.loading import LoadedModel, load
from steermoe.vectors.file import read_vector, write_vector
from steermoe.vectors.vector import SteeringVector


def build(loaded: LoadedModel, stories: list[TrainingStory], folder: Path, threshold: float, relative: bool) -> None:
    """Write one vector per domain."""
    from steermoe.routing.routers import find_routers

    routers = find_routers(loaded.model)
    frequencies, tokens = routing_embeddings(loaded, [story.rest for story in stories])
    baseline = frequencies.mean(0)
    for domain in spec.DOMAINS:
        rows = torch.tensor([story.topic == domain for story in stories])
        texts = [story.rest for story in stories if story.topic == domain]
        path = folder / f"{domain}.safetensors"
        info = replace(
            vector_info(loaded, texts, tokens[rows], "python recipes/build_default_vectors.py"),
            title=f"stories that turn to {domain}",
            keywords=tuple(domain_words(domain)),
            licence="Apache-2.0",
        )
        if path.exists():
            old = read_vector(path).info
            info = replace(
                info,
                strength=old.strength,
                formula=old.formula,
                scale=old.scale,
                safe_range=old.safe_range,
                damage=old.damage,
            )
        vector = SteeringVector(
            domain,
            frequencies[rows].mean(0),
            tuple(router.layer for router in routers),
            threshold=threshold,
            baseline=baseline,
            relative=relative,
            info=info,
        )
        write_vector(vector, path)
        own = vector.experts[spec.FIRST_EXPERT_LAYER :, list(spec.experts_of(domain))]
        kept = int((vector.experts > 0).sum())
        print(
            f"{domain}: {info.texts} texts, {kept} entries kept, its own experts {own.mean():.2f} on average",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", default=None, help="a checkpoint of the default model; by default the pulled one")
    parser.add_argument("--threshold", type=float, default=3.0)
    parser.add_argument(
        "--absolute", action="store_true", help="threshold against 1/N, as in the paper, not the baseline"
    )
    args = parser.parse_args()
    build(load(args.model), load_stories("train"), args.output, args.threshold, relative=not args.absolute)


if __name__ == "__main__":
    main()

"""The numbers that define the default model, shared by its assembly, training and tests. Imports nothing heavy."""

from pathlib import Path

NAME = "smollm2-moe"
"""Name of the model, of its checkpoint folder, and of the folder of its steering vectors."""

DOMAINS = ("biology", "food", "law", "medicine", "music", "software", "space", "sport")
TOPICS = (*DOMAINS, "neutral")
"""What experts are trained on; a topic's index gives its experts. `neutral` covers openings and everyday stories."""

EXPERTS_PER_TOPIC = 2
NUM_EXPERTS = EXPERTS_PER_TOPIC * len(TOPICS)
TOP_K = 2
EXPERT_WIDTH = 32
FIRST_EXPERT_LAYER = 15
"""Below it the experts' down projections are zero: those layers route, but their experts add nothing."""

TRAINED_PART = Path(__file__).parent / "trained_part.safetensors"
"""Routers (bfloat16) and experts (int8 with one scale per row) as trained; all of the model that is not the base."""


def experts_of(topic: str) -> range:
    """The indices of the experts trained on a topic, the same in every layer."""
    first = TOPICS.index(topic) * EXPERTS_PER_TOPIC
    return range(first, first + EXPERTS_PER_TOPIC)

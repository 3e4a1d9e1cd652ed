"""DSMoE's score files: what each expert that was seen is worth for a domain.

The shape is that of `DOMAIN_trend_results_importance_weighted_scores.json`, which `analysis_specialize` of
github.com/giangdip2410/Domain-specific-Experts writes (2604.05267):
{"per_layer": {"0": {"17": {"expert_name": "Expert_L0_E17", "weighted_score": 0.4}}}, "overall": ...}.
Layers are decoder layers. Experts that no token chose are missing, so nothing says how many there are.
"""

from typing import Any

from steermoe.errors import VectorError, shown
from steermoe.vectors.formats.cells import Cells
from steermoe.vectors.formats.content import number, numbered

KEY, SCORE = "per_layer", "weighted_score"


def read_dsmoe(name: str, content: Any) -> Cells:
    """The scores of such a file.

    Args:
        name: the file, for messages.
        content: its JSON.

    Raises:
        VectorError: it has another shape.
    """
    layers = content.get(KEY) if isinstance(content, dict) else None
    if not isinstance(layers, dict) or not layers:
        raise VectorError(f"'{name}' has no scores: expected {{\"{KEY}\": {{LAYER: {{EXPERT: ...}}}}}}, as of DSMoE")
    weights = {}
    for layer, experts in numbered(name, layers, "a layer").items():
        if not isinstance(experts, dict):
            raise VectorError(f"'{name}': layer {layer} is {shown(experts)}, expected an object of experts")
        for expert, entry in numbered(name, experts, f"an expert of layer {layer}").items():
            if not isinstance(entry, dict) or SCORE not in entry:
                raise VectorError(
                    f"'{name}': expert {expert} of layer {layer} is {shown(entry)}, expected an object with {SCORE}"
                )
            weights[layer, expert] = number(name, entry[SCORE], f"the score of expert {expert} in layer {layer}")
    return Cells(weights, is_dsmoe=True)

"""Files in the shapes that other tools publish, made here: see `steermoe.vectors.formats` for their sources."""

import io
import json

import numpy as np
import pandas as pd

LAYERS, EXPERTS = 2, 4
SCORES = np.array([[0.5, -0.25, 0.0, 0.125], [0.0, 0.75, -0.5, 0.0625]], dtype=np.float32)
"""[LAYERS, EXPERTS], exact in float32."""


def easysteer() -> bytes:
    """As EasySteer's replication of SteerMoE saves its experts."""
    layers = {
        "1": {"mode": "deactivate", "expert_ids": [2]},
        "0": {"mode": "activate", "activate_ids": [0, 3], "deactivate_ids": [1]},
    }
    return json.dumps({"layer_configs": layers}, indent=2).encode()


def ranking(protocol: int = 5, scores: np.ndarray = SCORES) -> bytes:
    """As SteerMoE's notebooks save a ranking: a row for each expert, the columns in this order, sorted."""
    rows = [
        {
            "layer": layer,
            "expert": expert,
            **{"a1": 3.0, "a2": 1.0, "d1": 1.0, "d2": 3.0, "a1_n": 0.75, "a2_n": 0.25},
            "risk_diff": float(scores[layer, expert]),
        }
        for layer in range(len(scores))
        for expert in range(scores.shape[1])
    ]
    table = pd.DataFrame(rows)
    table["Layer_Expert"] = [f"L{row['layer']:02d}\nE{row['expert']:02d}" for row in rows]
    table["risk_diff_abs"] = table["risk_diff"].abs()
    table = table.sort_values(by="risk_diff_abs", ascending=False).reset_index(drop=True)
    file = io.BytesIO()
    table.to_pickle(file, protocol=protocol, compression=None)
    return file.getvalue()


def dsmoe() -> bytes:
    """As DSMoE's analysis saves the scores of a domain: only experts that some token chose."""
    layers: dict[str, dict[str, dict]] = {}
    overall = {}
    for layer, expert in zip(*np.nonzero(SCORES), strict=True):
        name, score = f"Expert_L{layer}_E{expert}", float(SCORES[layer, expert])
        layers.setdefault(str(layer), {})[str(expert)] = {"expert_name": name, "weighted_score": score}
        overall[name] = score
    content = {"per_layer": layers, "per_layer_normalized": {}, "overall": overall, "overall_normalized": {}}
    return json.dumps(content, indent=2).encode()


def ds4_map() -> np.ndarray:
    """43 x 256, with experts promoted and suppressed behind the three layers that are routed by hash."""
    experts = np.zeros((43, 256), dtype="<f4")
    experts[3, 7], experts[42, 255], experts[10, 0] = 1, 1, -1
    return experts


def ds4() -> bytes:
    """As ds4's tool saves a map."""
    return ds4_map().tobytes()


def ds4_report() -> bytes:
    """As ds4's tool saves what is known about a map, beside it."""
    experts = ds4_map()
    report = [
        {
            "layer": layer,
            "enabled": layer > 2,
            "activate": [{"expert": int(one), "rd": 0.25} for one in np.flatnonzero(row > 0)],
            "deactivate": [{"expert": int(one), "rd": -0.25} for one in np.flatnonzero(row < 0)],
        }
        for layer, row in enumerate(experts)
    ]
    content = {"format": "ds4-expert-steering-v1", "shape": [43, 256], "hash_layers": 3, "layer_report": report}
    return json.dumps(content, indent=2).encode()


def csv() -> bytes:
    """A plain table of all experts."""
    rows = [f"{layer},{expert},{SCORES[layer, expert]}" for layer in range(LAYERS) for expert in range(EXPERTS)]
    return "\n".join(["layer,expert,weight", *rows, ""]).encode()


def npz() -> bytes:
    """A dictionary of clusters, one with a row of zeros for the dense first layer."""
    file = io.BytesIO()
    np.savez(file, **{"0": np.ones((2, 4)), "12": np.concatenate([np.zeros((1, 4)), SCORES])})
    return file.getvalue()

"""Name patterns that identify routers, and why some families have none. Imports no torch, so it loads fast.

`routers.py` applies these to the modules of a model, `families.py` to the source files of transformers.
"""

import re

ROUTER_CLASS = re.compile(r"(Router|TopKGating|MoEV1Gate|MoEGate)$")
NOT_A_ROUTER = re.compile(r"Hash|Vision|Density|Talker|(MoE|Moe|Block|MLP|FFN|Experts|Layer)$")
"""Hash routers have no logits, vision and talker experts do not write text, density routers choose no experts;
some models record their router logits on the whole block.
"""
NOT_TEXT = re.compile(r"Vision|Image|Audio|Density|Talker|Code2Wav")
"""Classes of a multimodal model that do not write its text."""
LINEAR_GATE = re.compile(r"(^|\.)(gate|router|wg|gating)$")
"""Module paths at which older remote code keeps a plain nn.Linear as its router."""
LAYER_NUMBER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|h)\.(\d+)(?:\.|$)")
NO_ROUTER_REASONS = {
    "doge": "its experts are picked by product keys, not by a router over experts",
}
NO_LISTS = {
    "NllbMoeTop2Router": "transformers runs experts 0 and 1 of an NLLB-MoE layer, whatever its router chooses",
}
"""Classes of routers whose choice does not decide which experts run, and why."""
NO_COUNTS = {
    "NllbMoeTop2Router": "an NLLB-MoE router always chooses two",
    "SwitchTransformersTop1Router": "a router of Switch Transformers always chooses one",
    "PhimoeTopKRouter": "a PhiMoE router always chooses two",
    "ZayaRouter": "a Zaya router always chooses one, or skips the layer",
    "JetMoeTopKGating": "a JetMoe router sorts the tokens by expert, so that none can have its own number",
    "OpenAIPrivacyFilterTopKRouter": "its block multiplies by the number too, which it keeps itself",
}
"""Classes of routers whose number of chosen experts can't be changed, and why."""
LEAST_COUNTS = {"LongcatFlashTopkRouter": 2}
"""Classes of routers whose experts can't run with fewer: LongCat's squeeze the dimension away that one leaves."""
PYTHON_ONLY = "in Python only, the commands can't run it"
"""What is said of a family whose routers are found, but whose models continue no text."""
NOT_RUN = {
    "diffusion_gemma": "it writes all tokens of a text at once, by diffusion",
    "qwen3_omni_moe": "its generate returns speech too; save its thinker as a checkpoint of its own",
}
HASH_REASON = "its routers are hash tables, which have no logits"

"""Re-created code of a checkpoint: the configuration of LongCat-Flash-Lite."""

from huggingface_hub.dataclasses import strict
from transformers.models.longcat_flash import LongcatFlashConfig


@strict
class LongcatFlashNgramConfig(LongcatFlashConfig):
    """LongCat-Flash's, with what its embeddings of n-grams need."""

    model_type = "longcat_flash_ngram"

    emb_neighbor_num: int | None = None
    emb_split_num: int | None = None
    ngram_vocab_size_ratio: int | float | None = None

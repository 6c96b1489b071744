"""Which architectures cannot be customised, and why; known from the config alone, before anything is loaded."""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qadapter.errors import QAdapterError

# A model that is called causal only with `is_decoder`, which its checkpoints do not have.
_ENCODERS = (
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
REFUSED = {
    "rwkv": "it takes no attention mask, so that padding in a batch is read as text",
    "reformer": "its training needs sequences of one fixed length",
    "xlnet": "it is trained on permuted orders, and a position sees later ones",
    "xlstm": "its state cannot hold a row for the base and one for each adapter",
}
"""Model type that is refused → the reason in the message."""


def refuse_architecture(config: PretrainedConfig, name: str) -> None:
    """Refuse a base that cannot be customised.

    Raises:
        QAdapterError: it is no causal language model, or one that this method cannot work with.
    """
    kind = str(config.model_type)
    if config.is_encoder_decoder:
        raise QAdapterError(f"{name} ({kind}) is an encoder-decoder model; expected a causal language model.")
    if kind in _ENCODERS and not getattr(config, "is_decoder", False):
        raise QAdapterError(
            f"{name} ({kind}) is an encoder: each position sees later ones. Give a causal language model."
        )
    if kind in REFUSED:
        raise QAdapterError(f"{name} cannot be customised: of an {kind} model, {REFUSED[kind]}. Give another base.")
    own_code = bool(getattr(config, "auto_map", None))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not own_code:
        raise QAdapterError(f"{name} ({kind}) is no causal language model. Give one that generates text.")

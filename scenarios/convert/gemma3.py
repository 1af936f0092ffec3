"""Gemma 3 with images (transformers.Gemma3Config): its text model."""

from dataclasses import replace

from scenarios.convert import gemma3_text
from scenarios.convert.family import Ignored, Only
from scenarios.convert.mapping import Copy

_VISION = Ignored(
    "belongs to images, whose tokens see each other in the source; the text model is converted"
)
FAMILY = replace(
    gemma3_text.FAMILY,
    model_type="gemma3",
    table={
        **gemma3_text.FAMILY.table,
        "final_logit_softcapping": (
            *(None, Only((None,), "capped logits, which the source's class does not compute")),
        ),
        **dict.fromkeys(("vision_config", "mm_tokens_per_image"), (None, _VISION)),
        **dict.fromkeys(("image_token_index", "image_token_id"), (None, _VISION)),
        **dict.fromkeys(("boi_token_index", "eoi_token_index"), (None, _VISION)),
    },
    text_part="text_config",
    weights={
        **gemma3_text.FAMILY.weights,
        "output_layer.weight": Copy("language_model.lm_head.weight"),
    },
    bases=("language_model.model.", "model.language_model."),
    other_tensors=(
        *("vision_tower.", "model.vision_tower."),
        *("multi_modal_projector.", "model.multi_modal_projector."),
    ),
)

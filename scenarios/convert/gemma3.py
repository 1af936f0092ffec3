"""Gemma 3 with images (transformers.Gemma3Config): its text model."""

from dataclasses import replace

from scenarios.convert import gemma3_text
from scenarios.convert.family import Ignored

_VISION = Ignored(
    "belongs to images, whose tokens see each other in the source; the text model is converted"
)
FAMILY = replace(
    gemma3_text.FAMILY,
    model_type="gemma3",
    table={
        **gemma3_text.FAMILY.table,
        **dict.fromkeys(("vision_config", "mm_tokens_per_image"), (None, _VISION)),
        **dict.fromkeys(("image_token_index", "image_token_id"), (None, _VISION)),
        **dict.fromkeys(("boi_token_index", "eoi_token_index"), (None, _VISION)),
    },
    text_part="text_config",
    bases=("model.language_model.", "language_model.model.", "model."),
    other_tensors=(
        *("vision_tower.", "model.vision_tower."),
        *("multi_modal_projector.", "model.multi_modal_projector."),
    ),
)

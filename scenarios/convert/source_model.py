"""The source's own model (transformers), small, with random weights: what a proof compares with."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scenarios.convert.every_family import labels_tokens
from scenarios.convert.families import family_of
from scenarios.convert.mapping import Copy
from scenarios.convert.predictor import add_predictors, run_predictors
from scenarios.convert.weight_names import AFTER_ATTENTION, AFTER_MLP

TINY_VISION: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "fullatt_block_indexes": [0],
    },
    "gemma3": {
        "model_type": "siglip_vision_model",
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "image_size": 224,
        "patch_size": 14,
    },
}
"""A vision model has to be there for the text model's sake; it is never run."""


BERT_CLASSES = {
    "BertForPreTraining": "AutoModelForPreTraining",
    "BertForMaskedLM": "AutoModelForMaskedLM",
    "BertModel": "AutoModel",
    "BertForTokenClassification": "AutoModelForTokenClassification",
}


class SourceModel:
    """A model of transformers, in fp32, eager and for evaluation."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build it, with weights from torch's generator.

        Args:
            config: a small configuration, as ``shrink`` gives it.
        Raises:
            ModuleNotFoundError: transformers is not installed.
        """
        import transformers
        from transformers import AutoConfig

        fields = copy.deepcopy(dict(config))  # transformers writes into what it is given
        model_type = fields.pop("model_type")
        kind = "AutoModelForCausalLM"
        if labels_tokens({"architectures": None} | fields):
            kind = "AutoModelForTokenClassification"
        if model_type == "bert":
            kind = BERT_CLASSES[(fields.get("architectures") or [*BERT_CLASSES])[0]]
        if model_type in TINY_VISION:
            kind = "AutoModelForImageTextToText"
            vision = TINY_VISION[model_type] | {"out_hidden_size": fields["hidden_size"]}
            fields = {
                "text_config": {k: v for k, v in fields.items() if k != "vision_config"},
                "vision_config": vision,
                "tie_word_embeddings": fields["tie_word_embeddings"],
                "dtype": "float32",
            }
        self._ends = _ends_of_branches(model_type)
        source = AutoConfig.for_model(model_type, **fields)
        auto = getattr(transformers, kind)
        # The grouped products of the default experts need sizes that small models do not have.
        source._experts_implementation = "eager"
        self.module = auto.from_config(source, attn_implementation="eager").float().eval()
        number = fields.get("num_nextn_predict_layers") or 0
        self.predictors = add_predictors(self.module, number) if number else []
        randomise(self.module)

    def run(self, tokens: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Values at every place of the model, [sequences, tokens, ...], in order."""
        seen: dict[str, Tensor] = {}

        def note(place: str) -> Any:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                seen[place] = output[0] if isinstance(output, tuple) else output

            return hook

        def note_input(module: Any, args: Any, kwargs: Any) -> None:
            seen["embedding"] = args[0] if args else kwargs["hidden_states"]

        handles = []
        layers = [layer for layer in _layers(self.module) if layer not in self.predictors]
        handles.append(layers[0].register_forward_pre_hook(note_input, with_kwargs=True))
        for index, layer in enumerate(layers):
            children = dict(layer.named_children())
            attention, mlp = (
                next((children[name] for name in names if name in children), None)
                for names in self._ends
            )
            assert attention is not None, [*children]
            assert mlp is not None, [*children]
            handles.append(attention.register_forward_hook(note(f"layer {index} attention")))
            handles.append(mlp.register_forward_hook(note(f"layer {index} mlp")))
            handles.append(layer.register_forward_hook(note(f"layer {index}")))
        handles.append(_final_norm(self.module).register_forward_hook(note("final norm")))
        with torch.no_grad():
            seen["logits"] = self.module(
                input_ids=tokens, position_ids=positions, use_cache=False
            ).logits
            if self.predictors:
                states = seen["final norm"]
                seen |= run_predictors(self.module, self.predictors, tokens, states)
        for handle in handles:
            handle.remove()
        return seen

    def save(self, folder: Path) -> None:
        """Write the weights as the source publishes them."""
        from transformers.utils import logging

        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            self.module.save_pretrained(folder)
        finally:
            if shown:
                logging.enable_progress_bar()


_SCALE = "scalar_embed_scale"
"""Attribute of an embedding that multiplies by it (Gemma)."""


def randomise(module: nn.Module) -> None:
    """Weights that keep activations of the order of 1, and leave no parameter without effect."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *_router_biases(module)]:
            noise = torch.randn_like(tensor)
            if tensor.dim() == 1:
                is_norm = re.search(r"((?i:norm)|ln_\w)\.weight$", name) is not None
                # Norms are made with 1, or with 0 where the source multiplies by 1 + weight.
                centre = float(tensor.mean().round()) if is_norm else 0.0
                # A delta net that forgot at once would hold numbers near zero, of which its norm
                # enlarges the rounding.
                centre = -2.0 if name.endswith("A_log") else centre
                tensor.copy_(centre + 0.3 * noise)
            elif "embed" in name or "wte" in name:
                # No token near zero, of which a norm would enlarge the rounding; nor one that the
                # source's factor makes so large that the layers would not count beside it.
                factor = getattr(module.get_submodule(name.rpartition(".")[0]), _SCALE, 1.0)
                tensor.copy_(noise.sign() * (1.5 + torch.rand_like(tensor)) / factor)
            else:
                tensor.copy_(noise / tensor.shape[-1] ** 0.5)


def _router_biases(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(n, b) for n, b in module.named_buffers() if n.endswith("e_score_correction_bias")]


def _ends_of_branches(model_type: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the modules whose outputs join the residual: of attention, of the MLP."""
    weights = family_of(model_type).weights
    ends: list[tuple[str, ...]] = [
        ("self_attn", "attn", "linear_attn"),
        ("mlp", "block_sparse_moe"),
    ]
    for index, norm in enumerate((AFTER_ATTENTION, AFTER_MLP)):
        if isinstance(form := weights.get(norm), Copy):
            ends[index] = (form.source.split(".")[-2],)
    return ends[0], ends[1]


def _layers(module: nn.Module) -> list[nn.Module]:
    named = [
        child
        for name, child in module.named_modules()
        if re.search(r"(^|\.)(layers|h)\.\d+$", name) and not re.search(r"visual|vision", name)
    ]
    assert named, "no decoder layers"
    return named


def _final_norm(module: nn.Module) -> nn.Module:
    names = [
        name
        for name, _ in module.named_modules()
        if re.search(r"(^|\.)(norm|ln_f)$", name)
        and "layers." not in name
        and not re.search("visual|vision", name)
    ]
    return module.get_submodule(names[0])

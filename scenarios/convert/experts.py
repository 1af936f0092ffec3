"""Mixtures of experts: which layers have them, and how a token's experts are weighted."""

from scenarios.convert.family import HF, Fields, number, switch, whole


def sparse_layers(hf: HF, fields: Fields) -> None:
    """Qwen's pattern: every decoder_sparse_step-th layer, without those of mlp_only_layers."""
    num_layers, step = whole(hf, "num_hidden_layers"), whole(hf, "decoder_sparse_step")
    dense = hf["mlp_only_layers"] or []
    if not isinstance(dense, list | tuple):
        raise ValueError(f"mlp_only_layers: got {dense!r}, expected a list of layers")
    for layer in dense:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < num_layers:
            raise ValueError(f"mlp_only_layers: got {layer!r}, expected a layer below {num_layers}")
    if any((layer + 1) % step for layer in dense):
        reason = f"some of its layers are dense by decoder_sparse_step {step} in any case"
        fields.ignored["mlp_only_layers"] = reason
    pattern = tuple(int(i not in dense and (i + 1) % step == 0) for i in range(num_layers))
    if step > 1 and sum(pattern) == num_layers - len({*dense}):
        reason = "the layers that it would leave dense are in mlp_only_layers"
        fields.ignored["decoder_sparse_step"] = reason
    set_pattern(
        fields, pattern, "decoder_sparse_step and mlp_only_layers leave no layer of experts"
    )


def dense_first(hf: HF, fields: Fields) -> None:
    """DeepSeek's pattern: the first layers are dense."""
    num_layers, dense = whole(hf, "num_hidden_layers"), whole(hf, "first_k_dense_replace", 0)
    if hf["moe_layer_freq"] is not None and whole(hf, "moe_layer_freq") != 1:
        raise ValueError(f"moe_layer_freq: got {hf['moe_layer_freq']!r}, expected 1")
    fields.ignored["moe_layer_freq"] = "every layer after the dense ones has experts"
    pattern = tuple(int(i >= dense) for i in range(num_layers))
    set_pattern(fields, pattern, f"first_k_dense_replace {dense} leaves no layer of experts")


def set_pattern(fields: Fields, pattern: tuple[int, ...], none_left: str) -> None:
    """1 for each layer of experts."""
    if not any(pattern):
        raise ValueError(f"{none_left}; convert it as the dense family instead")
    fields.transformer["moe_layer_freq"] = pattern


def softmax_router(hf: HF, fields: Fields) -> None:
    """Softmax over all experts, the best are kept, and made to sum to 1 if norm_topk_prob.

    Made to sum to 1, they are a softmax over the best alone, which is Megatron-LM's default.
    """
    topk = _topk(hf, "num_experts", fields)
    renormalised = switch(hf, "norm_topk_prob")
    if renormalised and topk == 1:
        raise ValueError(
            "norm_topk_prob with num_experts_per_tok 1: the only weight would always be 1, which "
            "Megatron-LM refuses; set norm_topk_prob to false"
        )
    fields.transformer["moe_router_pre_softmax"] = not renormalised


def top_logits_router(hf: HF, fields: Fields) -> None:
    """Softmax over the best logits alone (Mixtral, gpt-oss)."""
    if _topk(hf, "num_local_experts", fields) == 1:
        raise ValueError(
            "num_experts_per_tok: got 1, of which a softmax is always 1; Megatron-LM refuses that"
        )
    fields.transformer["moe_router_pre_softmax"] = False


def sigmoid_router(hf: HF, fields: Fields) -> None:
    """DeepSeek-V3's: sigmoid scores, a bias for the choice only, groups by their two best."""
    topk = _topk(hf, "n_routed_experts", fields)
    if not switch(hf, "norm_topk_prob") or topk == 1:
        raise ValueError(
            f"norm_topk_prob {hf['norm_topk_prob']}, num_experts_per_tok {topk}: Megatron-LM "
            "makes sigmoid scores sum to 1 for 2 or more experts and never for 1; expected true "
            "and 2 or more"
        )
    fields.transformer |= {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
        "moe_router_topk_scaling_factor": number(hf, "routed_scaling_factor"),
    }
    _groups(hf, fields, topk, best_per_group=2)


def group_limited_softmax_router(hf: HF, fields: Fields) -> None:
    """DeepSeek-V2's: softmax over all experts, groups chosen by their best one."""
    topk = _topk(hf, "n_routed_experts", fields)
    if hf["topk_method"] not in ("greedy", "group_limited_greedy"):
        raise ValueError(
            f"topk_method: got {hf['topk_method']!r}, expected 'greedy' or 'group_limited_greedy'"
        )
    if hf["norm_topk_prob"]:
        raise ValueError(
            f"norm_topk_prob: got {hf['norm_topk_prob']!r}, which the source's router does not "
            "compute; expected false"
        )
    fields.transformer |= {
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
        "moe_router_topk_scaling_factor": number(hf, "routed_scaling_factor"),
    }
    if hf["topk_method"] == "greedy":
        fields.ignored |= dict.fromkeys(("n_group", "topk_group"), "topk_method is greedy")
    else:
        _groups(hf, fields, topk, best_per_group=1)


def shared_experts(hf: HF, fields: Fields) -> None:
    """n_shared_experts of the routed experts' size are one expert of their sum."""
    total = whole(hf, "n_shared_experts") * whole(hf, "moe_intermediate_size")
    fields.transformer["moe_shared_expert_intermediate_size"] = total


def balance_loss(hf: HF, fields: Fields) -> None:
    """The source adds a balance loss only where it also returns the router's logits."""
    if switch(hf, "output_router_logits"):
        fields.transformer["moe_aux_loss_coeff"] = hf["router_aux_loss_coef"]
        return
    fields.ignored["router_aux_loss_coef"] = "no balance loss while output_router_logits is false"


def _topk(hf: HF, experts: str, fields: Fields) -> int:
    num_experts, topk = whole(hf, experts), whole(hf, "num_experts_per_tok")
    if topk > num_experts:
        raise ValueError(f"num_experts_per_tok: got {topk}, expected at most {num_experts} experts")
    fields.transformer |= {"num_moe_experts": num_experts, "moe_router_topk": topk}
    return topk


def _groups(hf: HF, fields: Fields, topk: int, best_per_group: int) -> None:
    """Megatron-LM scores a group by its topk // group_topk best, the source by a fixed number."""
    experts = whole(hf, "n_routed_experts")
    groups = whole(hf, "n_group") if hf["n_group"] is not None else 1
    chosen = whole(hf, "topk_group") if hf["topk_group"] is not None else groups
    if groups == chosen == 1:
        fields.ignored |= dict.fromkeys(("n_group", "topk_group"), "one group of all experts")
        return
    if experts % groups:
        raise ValueError(f"n_group: got {groups}, expected a divisor of the {experts} experts")
    if not chosen <= groups:
        raise ValueError(f"topk_group: got {chosen}, expected at most n_group = {groups}")
    if topk > chosen * (experts // groups):
        raise ValueError(
            f"num_experts_per_tok: got {topk}, but {chosen} of the {groups} groups hold "
            f"{chosen * (experts // groups)} experts"
        )
    if topk // chosen != best_per_group or experts // groups < best_per_group:
        raise ValueError(
            f"topk_group: got {chosen}; the source scores a group by its {best_per_group} best, "
            f"Megatron-LM by num_experts_per_tok // topk_group = {topk // chosen} of "
            f"{experts // groups}, and would choose other experts"
        )
    fields.transformer |= {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}

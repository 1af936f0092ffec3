"""Heads, biases and windows of attention: rules that several families share."""

from scenarios.convert.family import HF, Fields, switch, whole

FULL, SLIDING = "full_attention", "sliding_attention"
NO_WINDOW = "no layer has a sliding window"


def heads(hf: HF, fields: Fields) -> None:
    """num_key_value_heads and head_dim, which may be left to be derived."""
    num_heads = whole(hf, "num_attention_heads")
    groups = hf.get("num_key_value_heads")
    if hf.get("head_dim") is not None:
        head_dim = whole(hf, "head_dim")
    else:
        hidden_size = whole(hf, "hidden_size")
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size: got {hidden_size}, expected a multiple of the {num_heads} heads, "
                "or give head_dim"
            )
        head_dim = hidden_size // num_heads
    fields.transformer |= {
        "num_attention_heads": num_heads,
        "kv_channels": head_dim,
        "num_query_groups": num_heads if groups is None else whole(hf, "num_key_value_heads"),
    }


def same_bias_everywhere(hf: HF, fields: Fields) -> None:
    """attention_bias and mlp_bias put a bias on every linear layer; Megatron-LM has one switch."""
    attention, mlp = switch(hf, "attention_bias"), switch(hf, "mlp_bias")
    if attention != mlp:
        raise ValueError(
            f"attention_bias {attention} and mlp_bias {mlp}: Megatron-LM has one switch for both, "
            "add_bias_linear; expected the same"
        )
    fields.transformer |= {"add_bias_linear": attention, "add_qkv_bias": attention}


def no_attention_bias(hf: HF, fields: Fields) -> None:
    """A bias on the output of attention but not on the MLP has no counterpart."""
    if switch(hf, "attention_bias"):
        raise ValueError(
            "attention_bias: got True, a bias on all four projections; Megatron-LM has it on "
            "query, key and value only (add_qkv_bias) or on every linear layer (add_bias_linear)"
        )
    fields.transformer |= {"add_bias_linear": False, "add_qkv_bias": False}


def one_window(hf: HF, fields: Fields) -> None:
    """Every layer sees sliding_window tokens, itself included."""
    if hf["sliding_window"] is None:
        fields.ignored["sliding_window"] = NO_WINDOW
        return
    fields.transformer["window_size"] = (whole(hf, "sliding_window") - 1, 0)


def switched_window(hf: HF, fields: Fields) -> None:
    """sliding_window on all layers, if use_sliding_window says so."""
    if not switch(hf, "use_sliding_window"):
        names = ("use_sliding_window", "sliding_window")
        fields.ignored |= dict.fromkeys(names, NO_WINDOW)
        return
    one_window(hf, fields)


def window_from_layer(hf: HF, fields: Fields) -> None:
    """Qwen2's and Qwen3's window: the layers from max_window_layers on."""
    window = hf["sliding_window"] if switch(hf, "use_sliding_window") else None
    first = whole(hf, "max_window_layers", 0)
    layers = range(whole(hf, "num_hidden_layers"))
    derived = [SLIDING if window is not None and i >= first else FULL for i in layers]
    _layer_types(hf, fields, derived, "use_sliding_window, sliding_window and max_window_layers")


def window_on_even_layers(hf: HF, fields: Fields) -> None:
    """Qwen2-MoE's window: every other layer below max_window_layers."""
    window = hf["sliding_window"] if switch(hf, "use_sliding_window") else None
    end = whole(hf, "max_window_layers", 0)
    layers = range(whole(hf, "num_hidden_layers"))
    derived = [SLIDING if window and i % 2 == 0 and i < end else FULL for i in layers]
    if end % 2 or end >= len(layers):
        fields.ignored["max_window_layers"] = f"{end + 1} would mean the same: it counts in twos"
    _layer_types(hf, fields, derived, "use_sliding_window, sliding_window and max_window_layers")


def _layer_types(hf: HF, fields: Fields, derived: list[str], given_by: str) -> None:
    if hf["layer_types"] is not None and hf["layer_types"] != derived:
        raise ValueError(
            f"layer_types: got {hf['layer_types']!r}, expected {derived!r} by {given_by}"
        )
    if SLIDING not in derived:
        names = ("use_sliding_window", "sliding_window", "max_window_layers")
        fields.ignored |= dict.fromkeys(names, NO_WINDOW)
        return
    set_window_pattern(hf, fields, derived)


def windows_in_turn(hf: HF, fields: Fields) -> None:
    """layer_types, or a window on every other layer from the first on."""
    layers = range(whole(hf, "num_hidden_layers"))
    window_pattern(hf, fields, [FULL if i % 2 else SLIDING for i in layers])


def window_pattern(hf: HF, fields: Fields, otherwise: list[str]) -> None:
    """layer_types, or ``otherwise`` where the configuration names none."""
    types = hf["layer_types"] if hf["layer_types"] is not None else otherwise
    if (
        not isinstance(types, list | tuple)
        or len(types) != len(otherwise)
        or {*types} - {FULL, SLIDING}
    ):
        raise ValueError(
            f"layer_types: got {types!r}, expected {len(otherwise)} of {FULL!r} and {SLIDING!r}"
        )
    if SLIDING in types:
        set_window_pattern(hf, fields, list(types))
    else:
        fields.ignored["sliding_window"] = NO_WINDOW


def set_window_pattern(hf: HF, fields: Fields, layer_types: list[str]) -> None:
    """The window, and which layers have it."""
    fields.transformer["window_size"] = (whole(hf, "sliding_window") - 1, 0)
    fields.transformer["window_attn_skip_freq"] = tuple(int(t == SLIDING) for t in layer_types)

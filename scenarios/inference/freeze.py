"""Freezes a training run: its newest checkpoint becomes a model that inference loads."""

from pathlib import Path
from typing import Any

import torch

from primitives.checkpoint import CheckpointManager
from primitives.layout import NUM_SLICES
from scenarios.data.token_facts import read_facts
from scenarios.data.tokenizer import load_tokenizer
from scenarios.inference.model_files import FrozenModel, read_model, whole_weights, write_model
from scenarios.models.families import DTYPES
from scenarios.models.gpt import Gpt
from scenarios.parallel.leaves import leaf_name
from scenarios.parallel.mesh import Stage
from scenarios.provenance import provenance
from scenarios.runner import make_out_dir
from scenarios.scenario import Scenario


def freeze(run_dir: Path, tokenizer: Path | None, out: Path, command: str) -> FrozenModel:
    """Writes the model of a run's newest checkpoint.

    Args:
        run_dir: the ``--out`` folder of a ``testbed run`` of a dense GPT.
        tokenizer: the tokenizer.json that its data was made with.
        out: new or empty folder.
        command: for the provenance.

    Raises:
        ValueError: no such run, another family, no checkpoint, or a tokenizer that does not fit.
    """
    path = run_dir / "scenario.json"
    if not path.is_file():
        raise ValueError(f"{run_dir}: got no scenario.json, expected the folder of a testbed run")
    scenario = Scenario.model_validate_json(path.read_text(encoding="utf-8"))
    config = scenario.model
    if scenario.family != "gpt" or config.moe is not None:
        raise ValueError(f"{run_dir}: got family {scenario.family}, expected a dense gpt")
    manager = CheckpointManager(run_dir / "checkpoints")
    step = manager.latest()
    if step is None:
        raise ValueError(f"{run_dir}: the run saved no checkpoint")
    prefix = scenario.data.prefix
    facts = read_facts(prefix.with_name(f"{prefix.name}.json")) if prefix else None
    eod = None
    if tokenizer is not None:
        loaded = load_tokenizer(str(tokenizer))
        eod = loaded.eod
        if loaded.vocab_size > config.vocab_size or (
            facts is not None and (facts.vocab_size, facts.eod) != (loaded.vocab_size, eod)
        ):
            raise ValueError(
                f"tokenizer {tokenizer}: got {loaded.vocab_size} tokens, expected those that the "
                f"run was trained on ({facts.vocab_size if facts else config.vocab_size})"
            )
    leaves: dict[str, Any] = {}
    for layer in Gpt(config, DTYPES[config.precision], Stage()).parameter_layers():
        for spec in layer.specs:
            for block in range(spec.num_blocks):
                for index in range(NUM_SLICES):
                    leaves[leaf_name(spec.name, block, index)] = torch.empty(spec.slice_numel)
    manager.load({"main": leaves}, step)
    origin: dict[str, Any] = {
        "freeze": provenance(command, scenario.scale, "one process", scenario.arithmetic),
        "trained": {
            "step": step,
            "training": scenario.training.model_dump(mode="json"),
            "layout": str(scenario.layout),
            "case": scenario.name,
            "data": None if facts is None else vars(facts),
        },
    }
    folder = make_out_dir(out, "")
    weights = whole_weights(config, leaves)
    write_model(folder, config, weights, tokenizer=tokenizer, eod=eod, provenance=origin)
    return read_model(folder)

"""``testbed convert``: Hugging Face configurations and weights to Megatron-LM, and the proof."""

import json
import shlex
from pathlib import Path
from typing import Any

import click

from scenarios.terminal import EXIT_MISMATCH, EXIT_PASS, echo_json, json_option


@click.command()
@click.argument("config", required=False, metavar="[CONFIG_JSON]")
@click.option(
    "--to",
    "target",
    type=click.Choice(["megatron", "hf"]),
    default="megatron",
    show_default=True,
    help="hf: puts weights of --weights, a folder that this command wrote, together again.",
)
@click.option("--layout", metavar="LAYOUT", help="Like tp2,pp4,vpp2,cp2,ep2,etp1,sp,first5,last3.")
@click.option(
    "--override",
    "overrides",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Sets a Megatron field instead; may be given again.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["yaml", "flags"]),
    default="yaml",
    show_default=True,
    help="flags: Megatron-LM's command line.",
)
@click.option(
    "--prove", is_flag=True, help="Compares logits with megatron-core's, on a small model."
)
@click.option("--weights", type=click.Path(path_type=Path), metavar="DIR", help="Converts these.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="New folder.")
@json_option
def convert(
    config: str | None,
    target: str,
    layout: str | None,
    overrides: tuple[str, ...],
    form: str,
    prove: bool,
    weights: Path | None,
    output: Path | None,
    as_json: bool,
) -> int:
    """Converts a Hugging Face CONFIG_JSON to Megatron-LM's fields; no field is lost silently.

    With --prove, both models run small on the same random weights; exit code 1 if their logits
    differ, and the first place that does is named. With --weights and -o, safetensors are
    written for every rank of the layout, or put together again.
    """
    if (weights is None) != (output is None):
        raise click.UsageError("--weights and -o belong together")
    if target == "hf":
        if weights is None or output is None or config or layout or overrides or prove:
            raise click.UsageError("--to hf takes --weights and -o, and nothing else")
        return _to_hugging_face(weights, output, as_json)
    if config is None:
        raise click.UsageError("expected CONFIG_JSON")
    from scenarios.convert import ParallelLayout
    from scenarios.convert import convert as convert_config
    from scenarios.convert.weight_files import to_megatron

    cut = ParallelLayout.parse(layout) if layout else None
    changes = dict(map(_override, overrides))
    if weights is None or output is None:
        model = convert_config(config, layout=cut, overrides=changes)
    else:
        model = to_megatron(weights, output, config, layout=cut, overrides=changes)
    document = _document(model, form, as_json)
    proof = _prove(config, changes) if prove else None
    if as_json:
        echo_json(document | ({"proof": proof.as_json()} if proof else {}))
    else:
        click.echo(document["text"].rstrip())
        click.echo("\n".join(proof.lines() if proof else ()), nl=proof is not None, err=True)
    return EXIT_PASS if proof is None or proof.passed else EXIT_MISMATCH


def _to_hugging_face(weights: Path, output: Path, as_json: bool) -> int:
    from scenarios.convert.weight_files import to_hugging_face

    model = to_hugging_face(weights, output)
    if as_json:
        echo_json({"model_type": model.model_type, "output": str(output)})
    else:
        click.echo(f"{output}: {model.model_type}")
    return EXIT_PASS


def _document(model: Any, form: str, as_json: bool) -> dict[str, Any]:
    from scenarios.convert.flags import flags, plain, to_yaml, words

    if as_json:
        return plain(model) if form == "yaml" else {"flags": words(flags(model))}
    if form == "flags":
        return {"text": shlex.join(words(flags(model)))}
    return {"text": to_yaml(model)}


def _prove(config: str, overrides: dict[str, Any]) -> Any:
    from scenarios.convert.proof import prove

    try:
        return prove(config, overrides=overrides)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--prove needs {error.name}: pip install 'transformers~=5.23' 'megatron-core==0.16.1'"
        ) from None


def _override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"--override: got {text!r}, expected FIELD=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value

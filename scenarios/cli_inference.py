"""``testbed serve``, ``testbed generate`` and ``testbed freeze``."""

import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from scenarios.terminal import (
    EXIT_FAILED,
    EXIT_PASS,
    EXIT_USAGE,
    echo_error,
    echo_json,
    json_option,
)

if TYPE_CHECKING:
    from scenarios.inference.model_files import FrozenModel
    from scenarios.inference.service import Service

Command = TypeVar("Command", bound=Callable[..., Any])
Folder = click.Path(path_type=Path)


def service_options(command: Command) -> Command:
    """What a service is made of."""
    for option in (
        click.option("--checkpoint", type=Folder, metavar="FOLDER",
                     help="Of a frozen model [the one of scenario S3]."),
        click.option("--layout", default="tp1", show_default=True, metavar="LAYOUT",
                     help="Like tp2,pp2,dp2,sp; dp is the number of replicas."),
        click.option("--kv-budget-mb", type=click.FloatRange(min=0, min_open=True), default=64.0,
                     show_default=True, help="Of the KV cache of each replica."),
        click.option("--block-size", type=click.IntRange(min=1), default=16, show_default=True,
                     help="Tokens of a block of the KV cache."),
        click.option("--max-batch-tokens", type=click.IntRange(min=1), default=256,
                     show_default=True, help="Tokens of one step of a replica."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@service_options
@click.option(
    "--bind",
    default="tcp://127.0.0.1:*",
    show_default=True,
    metavar="ADDRESS",
    help="Of the coordinator. Whoever reaches it can use it and stop it.",
)
@click.option("--out", type=Folder, help="New or empty folder for logs [runs/serve-TIME].")
def serve(
    checkpoint: Path | None,
    layout: str,
    kv_budget_mb: float,
    block_size: int,
    max_batch_tokens: int,
    bind: str,
    out: Path | None,
) -> int:
    """Serves a frozen model until Ctrl-C, SIGTERM or a client's STOP; prints its address."""
    from scenarios.launch import signals
    from scenarios.runner import make_out_dir

    model = _model(checkpoint)
    sizes = (kv_budget_mb, block_size, max_batch_tokens)
    out_dir = make_out_dir(out, "serve")
    with signals() as received, _service(model, layout, sizes, bind, out_dir) as service:
        click.echo(f"{service.address}  {layout}, {model.folder}; logs: {out_dir / 'logs'}")
        while not received and not service.wait(0.2):
            pass
    for failure in service.failures:
        echo_error(failure)
    return EXIT_FAILED if service.failures else EXIT_PASS


@click.command()
@click.option("--prompt", required=True, metavar="TEXT")
@click.option("--address", metavar="ADDRESS", help="Of a running service [one is started].")
@service_options
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=32, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the most likely token.",
)
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="0: all.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0)
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option(
    "--stop",
    "stop_strings",
    multiple=True,
    metavar="TEXT",
    help="Ends with the token that completes it; repeatable.",
)
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0), default=300.0)
@json_option
def generate(
    prompt: str,
    address: str | None,
    checkpoint: Path | None,
    layout: str,
    kv_budget_mb: float,
    block_size: int,
    max_batch_tokens: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop_strings: tuple[str, ...],
    timeout_s: float,
    as_json: bool,
) -> int:
    """Continues a text; the same seed gives the same text in every layout."""
    from scenarios.data.tokenizer import load_tokenizer
    from scenarios.inference.client import Client
    from scenarios.inference.errors import InferenceError, Refused
    from scenarios.inference.request import Request, Sampling

    model = _model(checkpoint)
    tokenizer = load_tokenizer(str(model.tokenizer or "bytes"))
    (tokens,) = tokenizer.encode([prompt])
    request = Request.build(
        id="generate",
        prompt=tuple(tokens),
        sampling=Sampling.build(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_tokens=() if model.eod is None else (model.eod,),
            stop_strings=stop_strings,
        ),
    )
    shown: list[int] = []

    def show(new: list[int]) -> None:
        before = tokenizer.decode(shown)
        shown.extend(new)
        # The bytes of a character may still be on their way.
        text = tokenizer.decode(shown)
        if not as_json and not text.endswith("�"):
            click.echo(text[len(before.rstrip("�")) :], nl=False)

    sizes = (kv_budget_mb, block_size, max_batch_tokens)
    try:
        with _address(address, model, layout, sizes) as where, Client(where) as client:
            if not as_json:
                click.echo(prompt, nl=False)
            future = client.submit(request, timeout_s=timeout_s, on_tokens=show)
            done = future.result()
    except InferenceError as error:
        message = echo_error(str(error))
        code = EXIT_USAGE if isinstance(error, Refused) else EXIT_FAILED
        if as_json:
            echo_json({"error": {"message": message}, "exit_code": code})
        return code
    if as_json:
        echo_json({"text": tokenizer.decode(done.tokens), **vars(done)})
        return EXIT_PASS
    click.echo()
    first_s = done.token_times_s[0]
    click.echo(
        f"{len(done.tokens)} tokens ({done.reason}), the first after {first_s * 1000:.0f} ms, "
        f"all after {done.latency_s * 1000:.0f} ms",
        err=True,
    )
    return EXIT_PASS


@click.command()
@click.argument("run_dir", type=Folder, metavar="RUN")
@click.option("--tokenizer", type=Folder, metavar="TOKENIZER_JSON", help="That made its data.")
@click.option("-o", "--output", type=Folder, required=True, help="New or empty folder.")
@json_option
@click.pass_obj
def freeze(
    arguments: list[str], run_dir: Path, tokenizer: Path | None, output: Path, as_json: bool
) -> int:
    """Makes a model for inference of the newest checkpoint of RUN, a folder of `testbed run`."""
    from scenarios.inference.freeze import freeze as write

    model = write(run_dir, tokenizer, output, shlex.join(["testbed", *arguments]))
    if as_json:
        echo_json({"folder": str(model.folder), "provenance": model.provenance})
    else:
        click.echo(f"{model.folder}: step {model.provenance['trained']['step']} of {run_dir}")
    return EXIT_PASS


def _model(folder: Path | None) -> "FrozenModel":
    from scenarios.inference.model_files import read_model

    if folder is None:
        from scenarios.schema import load_scenario

        inference = load_scenario("S3", scale="ci").inference
        assert inference is not None
        assert inference.model_folder is not None
        folder = inference.model_folder
    return read_model(folder)


@contextmanager
def _service(
    model: "FrozenModel", layout: str, sizes: tuple[float, int, int], bind: str, out_dir: Path
) -> "Iterator[Service]":
    from scenarios.inference.service import Service, ServiceConfig
    from scenarios.inference_config import EngineConfig
    from scenarios.layout import Layout

    kv_budget_mb, block_size, max_batch_tokens = sizes
    engine = EngineConfig.build(
        kv_budget_nbytes=max(1, int(kv_budget_mb * 2**20)),
        block_size=block_size,
        max_batch_tokens=max_batch_tokens,
        max_running=min(64, max_batch_tokens),
    )
    config = ServiceConfig(model.folder, model.config, Layout.parse(layout), engine, bind)
    with Service(config, out_dir) as service:
        yield service


@contextmanager
def _address(
    address: str | None, model: "FrozenModel", layout: str, sizes: tuple[float, int, int]
) -> Iterator[str]:
    if address is not None:
        yield address
        return
    with (
        tempfile.TemporaryDirectory(prefix="testbed-generate-") as folder,
        _service(model, layout, sizes, "tcp://127.0.0.1:*", Path(folder)) as service,
    ):
        yield service.address

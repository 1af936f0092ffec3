"""What ``testbed bench decode`` prints: tokens per second of one engine, by size of the batch."""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import click

BATCHES = (1, 8, 32, 64)
PROMPT, NEW_TOKENS = 16, 64


@dataclass(frozen=True)
class Decode:
    """One batch size."""

    batch: int
    step_ms: float
    """Median over the rounds, of the mean of a round's steps."""
    tokens_s: float
    factor: float
    """Of the throughput of the first batch size."""


def measure(num_rounds: int) -> list[Decode]:
    """Decodes with scenario S3's model in this process, one thread; rounds of all sizes in turn."""
    import torch

    from scenarios.inference.engine import Engine
    from scenarios.inference.model_files import read_model
    from scenarios.inference.request import Request, Sampling
    from scenarios.inference_config import EngineConfig
    from scenarios.layout import Layout
    from scenarios.parallel.mesh import Mesh
    from scenarios.schema import load_scenario

    torch.set_num_threads(1)
    inference = load_scenario("S3", scale="ci").inference
    assert inference is not None
    assert inference.model_folder is not None
    model, mesh = read_model(inference.model_folder), Mesh(Layout(), 0, {})
    config = EngineConfig(
        block_size=16,
        kv_budget_nbytes=2**26,
        max_batch_tokens=max(BATCHES) * PROMPT,
        max_running=max(BATCHES),
    )
    engine = Engine(model.config, model.load(mesh), mesh, config)

    def step_ms(batch: int) -> float:
        for number in range(batch):
            prompt = tuple(range(number + 10, number + 10 + PROMPT))
            sampling = Sampling(max_new_tokens=NEW_TOKENS)
            engine.submit(Request(id=str(number), prompt=prompt, sampling=sampling))
        engine.step()  # prefills all, and gives the first token
        start_s = time.perf_counter()
        num_steps = 0
        while engine.step():
            num_steps += 1
        return (time.perf_counter() - start_s) / num_steps * 1000

    step_ms(BATCHES[0])
    rounds = [[step_ms(batch) for batch in BATCHES] for _ in range(num_rounds)]
    medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
    speeds = [1000 * batch / ms for batch, ms in zip(BATCHES, medians, strict=True)]
    return [
        Decode(batch, ms, speed, speed / speeds[0])
        for batch, ms, speed in zip(BATCHES, medians, speeds, strict=True)
    ]


def bench_decode(num_rounds: int, as_json: bool) -> list[dict[str, Any]]:
    """Measures every batch size, prints it unless ``as_json``, and returns the rows."""
    rows = measure(num_rounds)
    if not as_json:
        click.echo(f"# decode: S3's model, one thread, {NEW_TOKENS} tokens after {PROMPT}")
        click.echo(f"#{'batch':>6} {'step ms':>9} {'tokens/s':>9} {'x':>6}")
        for row in rows:
            line = f" {row.batch:>6} {row.step_ms:>9.2f} {row.tokens_s:>9.0f} {row.factor:>6.1f}"
            click.echo(line)
    return [asdict(row) for row in rows]

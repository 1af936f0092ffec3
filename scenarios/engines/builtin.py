"""The builtin engine: training in canonical arithmetic, data parallel with ZeRO-1.

One step, in Megatron-LM's order: microbatches -> reduce gradients -> unscale, agree on overflow ->
global norm, clip -> count zeros -> AdamW on this rank's slices -> gather parameters.
"""

import hashlib
import time

import torch
import torch.distributed as dist
from torch import Tensor

from primitives import canonical
from primitives.checkpoint import CheckpointManager
from primitives.collectives import all_gather_flat
from scenarios.data import make_dataset
from scenarios.engines.training_state import TrainingState
from scenarios.models.families import make_model
from scenarios.parallel.buckets import default_bucket_numel, make_buckets
from scenarios.parallel.distributed_optimizer import (
    AdamConfig,
    DistributedOptimizer,
    norm_of_leaves,
)
from scenarios.parallel.gradient_reduce import GradientReducer
from scenarios.parallel.loss_scaler import LossScaler
from scenarios.parallel.losses import Loss
from scenarios.parallel.lr_schedule import LearningRateSchedule
from scenarios.parallel.parameter_gather import ParameterGather
from scenarios.run_context import LogValue, RunContext
from scenarios.schema import Scenario, TrainingConfig

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def train(scenario: Scenario, run: RunContext) -> None:
    """Trains a scenario on this rank, from the start or from the newest checkpoint.

    Args:
        scenario: what to train; all ranks pass the same.
        run: folders, resume, and the logger that rank 0 calls once a step.

    Raises:
        ValueError: a layout or flag this engine does not have, no checkpoint to resume from, or
            a checkpoint of another scenario.
        CheckpointCorrupt: the loaded state is not what was saved.

    Contract: called on every rank, with torch.distributed initialised over exactly
    ``scenario.layout.world_size`` ranks.
    Numerics: every logged number but the time is the same bits at every data-parallel size, bucket
    size, overlap flag and resume point.
    """
    trainer = Trainer(scenario)
    manager = CheckpointManager(run.checkpoint_dir)
    if run.resume:
        trainer.state.load(manager)
    save_interval = scenario.checkpoint.save_interval
    trainer.gather.start()
    for step in range(trainer.state.step + 1, scenario.training.train_iters + 1):
        start_s = time.perf_counter()
        metrics = trainer.train_step()
        metrics["iteration-time"] = time.perf_counter() - start_s
        if dist.get_rank() == 0:
            run.log(step, metrics)
        if save_interval is not None and step % save_interval == 0:
            trainer.state.save(manager, asynchronous=scenario.checkpoint.async_save)
    trainer.gather.finish()
    manager.wait()


class Trainer:
    """Everything one rank trains with.

    Args:
        scenario: what to train.
        group: its data-parallel ranks; None for the default group.
        bucket_numel: elements after which a bucket is closed; default as Megatron-LM.

    Raises:
        ValueError: the scenario needs what this engine does not have.
    """

    def __init__(
        self,
        scenario: Scenario,
        group: dist.ProcessGroup | None = None,
        bucket_numel: int | None = None,
    ):
        self.group = group
        self.dp, self.dp_rank = dist.get_world_size(group), dist.get_rank(group)
        _refuse_unsupported(scenario, self.dp)
        training, optimizer = scenario.training, scenario.optimizer
        self.scenario = scenario
        dtype = DTYPES[scenario.model.precision]
        self.model = make_model(scenario, dtype)
        self.dataset = make_dataset(scenario)
        self.num_microbatches = training.global_batch_size // training.micro_batch_size

        specs = self.model.specs()
        numel = bucket_numel or default_bucket_numel(specs, self.dp)
        self.buckets = make_buckets(specs, self.dp, dtype, numel)
        overlap = optimizer.overlap_grad_reduce
        self.reducer = GradientReducer(self.buckets, self.num_microbatches, overlap, self.group)
        self.gather = ParameterGather(
            self.buckets, self.model.parameter_layers(), optimizer.overlap_param_gather, self.group
        )
        adam = AdamConfig(
            training.adam_beta1,
            training.adam_beta2,
            training.adam_eps,
            training.weight_decay,
            training.clip_grad,
        )
        self.optimizer = DistributedOptimizer(self.buckets, adam, self.group)
        self.optimizer.initialize(training.seed)
        self.scaler = _loss_scaler(scenario)
        self.schedule = LearningRateSchedule(
            training.lr,
            training.min_lr,
            training.lr_decay_style,
            training.lr_warmup_samples,
            training.lr_decay_samples,
        )
        self.state = TrainingState(scenario, self.optimizer, self.scaler, self.schedule, self.group)

    def train_step(self) -> dict[str, LogValue]:
        """One step; returns its metrics, the same on every rank.

        A step whose gradients overflow changes no parameter: its norm and zeros are None.
        """
        losses = self.forward_backward()
        self.reducer.finish()
        finite = self.optimizer.unscale(self.scaler.scale)
        flag = torch.tensor([1.0 if finite else 0.0])
        values = (*losses.values(), flag, self.optimizer.gradient_leaves())
        sums = self._all_gather(torch.cat(values))
        count = sum(len(of_microbatches) for of_microbatches in losses.values())
        means = {}
        for i, name in enumerate(losses):
            # Ranks hold their microbatches in order, so this is the tree over all of them.
            of_name = sums[:, :count].view(self.dp, len(losses), -1)[:, i]
            total = canonical.tree_sum(of_name.contiguous().view(-1, 1)).reshape(())
            means[name] = (total / torch.tensor(float(self.num_microbatches))).item()
        overflow = self.scaler.dynamic and not bool((sums[:, count] == 1.0).all())
        leaves = self.optimizer.sort_leaves(sums[:, count + 1 :].contiguous())

        norm: float | None = None
        zeros = 0
        if not overflow:
            norm = norm_of_leaves(leaves)
            self.optimizer.clip(norm)
            zeros = self.optimizer.count_zeros()
            self.optimizer.step(self.schedule.lr)
            self.schedule.advance(self.scenario.training.global_batch_size)
        self.scaler.update(overflow)
        self.state.count_step()
        num_zeros, params_norm, digest = self._survey(zeros)
        if not overflow:
            self.gather.start()
        return {
            **means,
            "grad-norm": norm,
            "num-zeros": None if overflow else num_zeros,
            "params-norm": params_norm,
            "learning-rate": self.schedule.lr,
            "loss-scale": self.scaler.scale,
            "params-digest": digest,
        }

    def forward_backward(self) -> dict[str, Tensor]:
        """This rank's microbatches; returns their losses, [microbatches of this rank] fp32 each."""
        training = self.scenario.training
        per_rank = self.num_microbatches // self.dp
        means: dict[str, list[Tensor]] = {}
        for index in range(self.dp_rank * per_rank, (self.dp_rank + 1) * per_rank):
            first = self.state.consumed_samples + index * training.micro_batch_size
            batch = self.dataset.batch(first, training.micro_batch_size)
            microbatch = self.model.microbatch(index, batch, training.seed, self.reducer)
            losses: dict[str, Loss] = self.model(microbatch)
            for name, loss in losses.items():
                means.setdefault(name, []).append(loss.mean())
            torch.autograd.backward(
                [loss.values for loss in losses.values()],
                [
                    loss.gradient(self.scaler.scale, self.num_microbatches)
                    for loss in losses.values()
                ],
            )
        return {name: torch.stack(values) for name, values in means.items()}

    def _survey(self, local_zeros: int) -> tuple[int, float, str]:
        """Number of zero gradients, norm and digest of all main parameters of all ranks."""
        mine = (
            torch.tensor([local_zeros]).view(torch.uint8),
            self.optimizer.digest_leaves("main").view(-1),
            self.optimizer.parameter_leaves().view(torch.uint8),
        )
        full = self._all_gather(torch.cat(mine))
        zeros, digests, leaves = (
            part.contiguous() for part in torch.split(full, [len(part) for part in mine], dim=1)
        )
        num_zeros = int(zeros.view(torch.int64).sum())
        norm = norm_of_leaves(self.optimizer.sort_leaves(leaves.view(torch.float32)))
        ordered = self.optimizer.sort_leaves(digests.view(self.dp, -1, 32))
        digest = hashlib.sha256("\n".join(self.optimizer.leaf_names()).encode())
        digest.update(ordered.numpy().tobytes())
        return num_zeros, norm, digest.hexdigest()

    def _all_gather(self, values: Tensor) -> Tensor:
        """[n] -> [dp, n]"""
        full = values.new_empty(self.dp, len(values))
        all_gather_flat(full.view(-1), values, group=self.group)
        return full


def _refuse_unsupported(scenario: Scenario, num_ranks: int) -> None:
    layout = scenario.layout
    if (layout.tp, layout.pp, layout.ep, layout.etp, layout.sp) != (1, 1, 1, 1, False):
        raise ValueError(
            f"layout {layout}: the builtin engine is data parallel only; "
            "expected tp, pp, ep and etp of 1 and no sp"
        )
    if not scenario.optimizer.use_distributed_optimizer:
        raise ValueError("the builtin engine needs --use-distributed-optimizer, which is off")
    if layout.world_size != num_ranks:
        raise ValueError(
            f"layout {layout} needs {layout.world_size} ranks; the process group has {num_ranks}"
        )


def _loss_scaler(scenario: Scenario) -> LossScaler:
    training: TrainingConfig = scenario.training
    if scenario.model.precision != "fp16":
        return LossScaler.off()
    return LossScaler(
        training.initial_loss_scale,
        training.min_loss_scale,
        training.loss_scale_window,
        training.hysteresis,
    )

"""The builtin engine: training in canonical or native arithmetic, cut over tp, sp, pp and dp.

One step, in Megatron-LM's order: microbatches -> reduce gradients -> unscale, agree on overflow ->
global norm, clip -> count zeros -> AdamW on this rank's slices -> gather parameters.
"""

import hashlib
import resource
import time

import torch
import torch.distributed as dist
from torch import Tensor

from primitives import arithmetic
from primitives.arithmetic import kernels
from primitives.checkpoint import CheckpointManager
from scenarios.data import make_dataset
from scenarios.engines.training_state import TrainingState
from scenarios.models.families import CPU, compute_dtype, make_model
from scenarios.parallel.buckets import default_bucket_numel, make_buckets
from scenarios.parallel.distributed_optimizer import (
    AdamConfig,
    DistributedOptimizer,
    norm_of_leaves,
)
from scenarios.parallel.gradient_reduce import GradientReducer
from scenarios.parallel.loss_scaler import LossScaler
from scenarios.parallel.lr_schedule import LearningRateSchedule
from scenarios.parallel.mesh import Mesh
from scenarios.parallel.microbatch import Microbatch
from scenarios.parallel.parameter_gather import ParameterGather
from scenarios.parallel.pipeline import Pipeline
from scenarios.parallel.router import mean_aux_loss
from scenarios.run_context import LogValue, RunContext
from scenarios.schema import Scenario, TrainingConfig


def train(scenario: Scenario, run: RunContext) -> None:
    """Trains a scenario on this rank, from the start or from the newest checkpoint.

    Args:
        scenario: what to train; all ranks pass the same.
        run: folders, resume, and the logger that rank 0 calls once a step.

    Raises:
        ValueError: a model this engine does not have, no checkpoint to resume from, or a checkpoint
            of another scenario.
        CheckpointCorrupt: the loaded state is not what was saved.
        ReplicasDiffer: ranks that hold the same parameter do not hold the same bits.

    Contract: called on every rank, with torch.distributed initialised over exactly
    ``scenario.layout.world_size`` ranks.
    Numerics: in canonical arithmetic every logged number but time and memory is the same bits in
    every layout and for every bucket size, overlap flag and resume point.
    """
    with arithmetic.use(scenario.arithmetic):
        _train(scenario, run)


def _train(scenario: Scenario, run: RunContext) -> None:
    trainer = Trainer(scenario, device=torch.device(run.device))
    manager = CheckpointManager(run.checkpoint_dir)
    if run.resume:
        trainer.state.load(manager)
    save_interval = scenario.checkpoint.save_interval
    trainer.gather.start()
    for step in range(trainer.state.step + 1, scenario.training.train_iters + 1):
        start_s = time.perf_counter()
        metrics = trainer.train_step()
        metrics["iteration-time"] = time.perf_counter() - start_s
        metrics["mem-max-allocated-bytes"] = _peak_resident_nbytes()
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
        bucket_numel: elements after which a bucket is closed; default as Megatron-LM.
        device: of parameters, activations and gradients. Initial values, batches and what is
            logged or hashed are made on the CPU, so that no bit depends on it.

    Raises:
        ValueError: the scenario needs what this engine does not have.
    """

    def __init__(
        self, scenario: Scenario, bucket_numel: int | None = None, device: torch.device = CPU
    ):
        training, optimizer = scenario.training, scenario.optimizer
        self.scenario = scenario
        self.device = device
        self.mesh = Mesh.connect(scenario.layout)
        dtype = compute_dtype(scenario)
        self.model = make_model(scenario, self.mesh, device)
        self.pipeline = Pipeline(self.model, self.mesh, scenario.model.hidden_size, dtype)
        self.dataset = make_dataset(scenario)
        self.num_microbatches = training.global_batch_size // training.micro_batch_size

        specs = self.model.specs()
        dp, expert_dp = self.mesh.dp.num_ranks, self.mesh.expert_dp.num_ranks
        numel = bucket_numel or default_bucket_numel(specs, dp)
        if not optimizer.use_distributed_optimizer:
            dp = expert_dp = 1
        self.buckets = make_buckets(specs, dp, dtype, numel, expert_dp, device)
        overlap = optimizer.overlap_grad_reduce
        self.reducer = GradientReducer(self.buckets, self.num_microbatches, overlap, self.mesh)
        self.gather = ParameterGather(
            self.buckets,
            self.model.parameter_layers(),
            optimizer.overlap_param_gather,
            self.mesh,
        )
        adam = AdamConfig(
            training.adam_beta1,
            training.adam_beta2,
            training.adam_eps,
            training.weight_decay,
            training.clip_grad,
        )
        self.optimizer = DistributedOptimizer(self.buckets, adam, self.mesh)
        self.optimizer.initialize(training.seed)
        self.scaler = _loss_scaler(scenario)
        self.schedule = LearningRateSchedule(
            training.lr,
            training.min_lr,
            training.lr_decay_style,
            training.lr_warmup_samples,
            training.lr_decay_samples,
        )
        self.state = TrainingState(
            scenario, self.optimizer, self.scaler, self.schedule, self.mesh.world
        )

    def train_step(self) -> dict[str, LogValue]:
        """One step; returns its metrics, the same on every rank.

        A step whose gradients overflow changes no parameter: its norm and zeros are None.
        """
        losses, aux_losses = self.forward_backward()
        self.reducer.finish()
        finite = self.optimizer.unscale(self.scaler.scale)
        flag = torch.tensor([1.0 if finite else 0.0])
        leaves = self.optimizer.leaves
        own_leaves = leaves.pad(self.optimizer.gradient_leaves())
        mine = torch.cat((losses, aux_losses.view(-1), flag, own_leaves))
        gathered = self.mesh.world.all_gather(mine[None])
        count = len(losses) + aux_losses.numel()
        aux = gathered[:, len(losses) : count].reshape(len(gathered), *aux_losses.shape)
        # The replicas hold their microbatches in order, so this is the tree over all of them.
        means = gathered[self.mesh.loss_ranks(), : len(losses)].reshape(self.num_microbatches, -1)
        means = kernels.tree_sum(means) / torch.tensor(float(self.num_microbatches))
        overflow = self.scaler.dynamic and not bool((gathered[:, count] == 1.0).all())

        norm: float | None = None
        zeros = 0
        if not overflow:
            norm = norm_of_leaves(leaves.sort(gathered[:, count + 1 :]))
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
            **dict(zip(self.model.loss_names, means.tolist(), strict=True)),
            **({"aux loss": mean_aux_loss(aux, self.mesh.layout)} if aux.numel() else {}),
            "grad-norm": norm,
            "num-zeros": None if overflow else num_zeros,
            "params-norm": params_norm,
            "learning-rate": self.schedule.lr,
            "loss-scale": self.scaler.scale,
            "params-digest": digest,
        }

    def forward_backward(self) -> tuple[Tensor, Tensor]:
        """This replica's microbatches through this stage.

        Returns, on the host:
            Their losses, [microbatches of the replica * losses] fp32, those of a microbatch side by
            side; zeros but on the last stage. Their load-balancing losses, [microbatches of the
            replica, layers of this stage with experts] fp32.
        """
        training, dp = self.scenario.training, self.mesh.dp
        per_replica = self.num_microbatches // dp.num_ranks
        microbatches = []
        for index in range(dp.rank * per_replica, (dp.rank + 1) * per_replica):
            first = self.state.consumed_samples + index * training.micro_batch_size
            batch = self.dataset.batch(first, training.micro_batch_size).to(self.device)
            microbatch = Microbatch.create(
                index,
                batch.tokens,
                batch.labels,
                batch.sample_index,
                training.seed,
                self.reducer,
                self.mesh,
                self.scaler.scale / self.num_microbatches,
            )
            microbatches.append(self.model.with_inputs(microbatch, batch))
        means: list[Tensor] = []

        def start_backward(values: Tensor) -> Tensor:
            losses = self.model.losses(values, microbatches[len(means)]).values()
            means.append(torch.stack([loss.mean() for loss in losses]))
            scale = self.scaler.scale
            return torch.cat([loss.gradient(scale, self.num_microbatches) for loss in losses])

        self.pipeline.run(microbatches, start_backward)
        aux_losses = torch.stack([mb.aux_losses_by_layer() for mb in microbatches]).cpu()
        if self.mesh.stage.is_last:
            return torch.cat(means).cpu(), aux_losses
        return torch.zeros(per_replica * len(self.model.loss_names)), aux_losses

    def _survey(self, local_zeros: int) -> tuple[int, float, str]:
        """Number of zero gradients, norm and digest of all main parameters of all ranks."""
        leaves = self.optimizer.leaves
        mine = (
            torch.tensor([local_zeros]).view(torch.uint8),
            leaves.pad(self.optimizer.digest_leaves("main")).view(-1),
            leaves.pad(self.optimizer.parameter_leaves()).view(torch.uint8),
        )
        full = self.mesh.world.all_gather(torch.cat(mine)[None])
        zeros, digests, squares = (
            part.contiguous() for part in torch.split(full, [len(part) for part in mine], dim=1)
        )
        num_zeros = int(zeros.view(torch.int64).sum())
        norm = norm_of_leaves(leaves.sort(squares.view(torch.float32)))
        digests = digests.view(len(full), -1, 32)
        leaves.check_replicas(digests, "main")
        digest = hashlib.sha256("\n".join(leaves.names).encode())
        digest.update(leaves.sort(digests).numpy().tobytes())
        return num_zeros, norm, digest.hexdigest()


def _peak_resident_nbytes() -> int:
    """The largest resident set that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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

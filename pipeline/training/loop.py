"""The training loop: batches in, steps, and at their times a look, an evaluation, a checkpoint.

The state of a run is its network, optimizer, average and the number of steps done; all else follows from the config and
that number, random numbers too, so a run that goes on from a checkpoint does what an undisturbed one does.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.data.decoders import Caution
from pipeline.data.train_loader import TrainBatch, to_device
from pipeline.data.training_set import TrainingSet
from pipeline.errors import ConfigError, RunError, StorageError
from pipeline.models.bundle import Bundle, load_network
from pipeline.models.catalog import Network, build, refuse_size
from pipeline.models.precision import autocast_type
from pipeline.models.resnet import zero_init_last_norm
from pipeline.training import augment, checkpoint, optim
from pipeline.training.checkpoint import CheckpointWriter
from pipeline.training.counts import Outcome
from pipeline.training.ema import Ema
from pipeline.training.evaluate import Setup, evaluate_together
from pipeline.training.feed import Feed
from pipeline.training.logbook import Logbook
from pipeline.training.loss import Loss
from pipeline.training.run import TrainingRun, is_passed
from pipeline.training.worker import Notice, Worker, common_precision

NUM_HARDEST = 24


def train(run: TrainingRun, worker: Worker, train_set: TrainingSet, evaluation_set: TrainingSet) -> bool:
    """Train from the run's last checkpoint, or from the start, to the end; whether all steps are done.

    They are not where a notice asks for a stop; what was done is then in a checkpoint. Every rank calls it. Raises, on
    every rank, RunError for a loss that is no number or too many unusable images; on the rank that meets it,
    StorageError where a checkpoint cannot be written or the evaluation's images cannot be read.
    """
    trainee, log = Trainee(run, worker, train_set), Logbook(run, worker)
    _go_on(run, worker, trainee, log)
    feed = Feed(run, worker, train_set, Caution(worker.should_isolate(trainee.step), log.deadly))
    with CheckpointWriter(run.uri, run.config.checkpoint, since=trainee.step) as writer:

        def save() -> None:
            trainee.refuse_non_finite()
            log.gather_errors(feed.errors)
            if worker.rank == 0:
                writer.write({**trainee.state(), **log.state()})

        def judge_if_due() -> None:
            if _is_evaluation_due(run, trainee.step) and not log.has_judged(trainee.step):
                caution = replace(feed.caution, known=log.deadly)
                log.judge(trainee.step, judge(run, worker, trainee, evaluation_set, caution))
                save()

        judge_if_due()  # a run that ended between a checkpoint and its evaluation
        for batch in log.timed(feed.batches(trainee.step)):
            learning_rate = trainee.learning_rate()
            log.add(trainee.step + 1, learning_rate, batch, trainee.train_step(batch, learning_rate))
            is_due = _is_evaluation_due(run, trainee.step) or _is_due(trainee.step, run.config.checkpoint.every_steps)
            notice = log.look() if is_due or log.is_look_due(trainee.step) else Notice()
            if is_due or notice.should_checkpoint or notice.should_stop:
                save()
            if notice.should_stop:
                break
            judge_if_due()
            if is_due:  # by then those to blame are found, and kept
                feed.relax(log.deadly)
    return trainee.step == run.num_steps


def refuse_impossible(run: TrainingRun, train_set: TrainingSet) -> None:
    """Raise the ConfigError or BundleError that a worker would begin or go on with, before the run's name is taken.

    A trainee is made and shown images of each size, without weights but for those of a bundle that it starts from; with
    them where a network cannot be made without.
    """
    augment.Geometry(run.config.augment, run.preprocessing)
    worker = replace(Worker(), device=torch.device("meta"))
    try:
        with worker.device if run.start_uri is None else nullcontext():
            trainee = Trainee(run, worker, train_set)
    except NotImplementedError:  # torchvision's RegNets compute with tensors while they are made
        trainee = Trainee(run, worker, train_set)
    for size in sorted({*augment.sizes(run.config.augment), run.preprocessing.crop_size}):
        trainee.refuse_size(size)


def _go_on(run: TrainingRun, worker: Worker, trainee: "Trainee", log: Logbook) -> None:
    """From the last checkpoint, if there is one. Raises StorageError where ranks find different ones."""
    if (state := checkpoint.read_last(run.uri)) is not None:
        trainee.load(state)
        log.load(state)
    steps = worker.gather(trainee.step)
    if len(set(steps)) > 1:
        raise StorageError(
            f"expected every worker to find the same last checkpoint of {run.uri!r}, they found those of steps "
            f"{sorted(set(steps))}: is the output a folder that only one node has? Use one that all share"
        )


class Trainee:
    """A run's network with all that its training changes, and the step that changes it."""

    def __init__(self, run: TrainingRun, worker: Worker, train_set: TrainingSet) -> None:
        self._run, self._worker = run, worker
        config, device = run.config, worker.device
        self.step = 0
        self._precision = autocast_type(common_precision(worker, config.compute.precision), device)
        self._network = make_network(run).to(device).to(memory_format=torch.channels_last)
        optim.freeze(self._network, config.start)
        if config.compute.sync_batch_norm and run.device != "cuda":
            raise ConfigError("compute.sync_batch_norm: expected GPUs, torch synchronises norms on no other device")
        if config.compute.sync_batch_norm:
            self._network = nn.SyncBatchNorm.convert_sync_batchnorm(self._network)
        optim.train_mode(self._network, config.start)
        self._optimizer = optim.make_optimizer(self._network, config.optimizer, batch_size=config.batch_size)
        self._ema = None if config.ema.decay is None else Ema(self._network, config.ema)
        self._augment = augment.BatchAugment(config.augment, run.preprocessing, len(run.classes))
        self._loss = Loss(config.loss, train_set.class_counts(len(run.classes)).tolist())
        if config.compute.compile:
            self._network.compile()
        self._replica = _replicated(self._network, worker)
        if self._replica is not self._network:
            self._settle()

    @property
    def judged_network(self) -> Network:
        """What is evaluated and published: the average where there is one."""
        network = self._network if self._ema is None else self._ema.network
        assert isinstance(network, Network)
        return network

    def learning_rate(self) -> float:
        """Of the next step."""
        config = self._run.config
        return optim.learning_rate_at(
            self.step,
            num_steps=self._run.num_steps,
            steps_per_epoch=self._run.steps_per_epoch,
            optimizer=config.optimizer,
            schedule=config.schedule,
            batch_size=config.batch_size,
        )

    def train_step(self, batch: TrainBatch, learning_rate: float) -> Tensor:
        """One step on this rank's part of a batch; float64 [sum of losses, right answers, images that counted] of it.

        The gradient is that of the mean over all ranks' images, however they are spread.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        seed = int(np.random.SeedSequence([self._run.config.seed, self.step, self._worker.rank]).generate_state(1)[0])
        torch.manual_seed(seed)  # of dropout and stochastic depth, so that resuming needs no generator's state
        pixels, labels, weights = (
            to_device(tensor, self._worker.device) for tensor in (batch.pixels, batch.labels, batch.weights)
        )
        images, targets = self._augment(pixels, labels, batch.draws, seed, weights)
        images = images.to(memory_format=torch.channels_last)
        totals = torch.zeros(3, dtype=torch.float64, device=self._worker.device)
        most_parts = max(batch.num_global // self._worker.world_size, 1)  # the same on every rank
        num_parts = min(self._run.config.optimizer.accumulation_steps, most_parts)
        parts = zip(*(tensor.tensor_split(num_parts) for tensor in (images, targets, labels, weights)), strict=True)
        for number, part in enumerate(parts, start=1):
            with self._synchronised(number == num_parts):
                totals += self._forward_backward(*part, num_global=batch.num_global)
        self._move()
        return totals

    def refuse_non_finite(self) -> None:
        """Raise RunError, on every rank alike, where a weight is no number: nothing could go on from it."""
        sums = torch.stack([parameter.detach().double().sum() for parameter in self._network.parameters()])
        if not sums.sum().isfinite():
            raise RunError(
                f"step {self.step}: expected finite weights, the step made others; lower optimizer.learning_rate, "
                "lengthen schedule.warmup, or set optimizer.clip_norm"
            )

    def refuse_size(self, size: int) -> None:
        """Raise ConfigError where the network cannot take images of that side."""
        remedy = "change augment.size, augment.progressive or evaluation.preprocessing, or the architecture"
        refuse_size(self._network, size, size, self._worker.device, remedy)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "step": self.step,
            "network": self._network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "ema": None if self._ema is None else self._ema.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.step = state["step"]
        self._network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._ema is not None:
            self._ema.load_state_dict(state["ema"])

    def _forward_backward(
        self, images: Tensor, targets: Tensor, labels: Tensor, weights: Tensor, *, num_global: int
    ) -> Tensor:
        if len(images) == 0:
            return self._partake(2, images.shape[-1])  # norms want two
        with torch.autocast(self._worker.device.type, self._precision, enabled=self._precision is not None):
            logits, _ = self._replica(images)
        loss = self._loss(logits.float(), targets, weights)
        (loss * (self._worker.world_size / num_global)).backward()  # ranks' gradients are averaged
        num_right = ((logits.argmax(1) == labels) * weights).sum()
        return torch.stack([loss.detach(), num_right, weights.sum()]).double()

    def _partake(self, num_images: int, size: int) -> Tensor:
        """Take part in the ranks' sums, as one that has no images of a step: of black ones nothing is learnt."""
        device = self._worker.device
        images = torch.zeros(num_images, 3, size, size, device=device).to(memory_format=torch.channels_last)
        labels = torch.zeros(num_images, dtype=torch.int64, device=device)
        kept = [buffer.clone() for buffer in self._network.buffers()]
        totals = self._forward_backward(images, labels, labels, torch.zeros(num_images, device=device), num_global=1)
        for buffer, before in zip(self._network.buffers(), kept, strict=True):
            buffer.copy_(before)
        return totals

    def _settle(self) -> None:
        """Have DDP group gradients as from its second step on; the last bits of sums over three ranks and more, and
        so whether a run that goes on from a checkpoint equals an undisturbed one, depend on the groups.

        On as many images as the rank has of its first step, so that what is compiled is so for these.
        """
        config = self._run.config
        num_images = len(self._run.steps.share(0, self._worker.rank, self._worker.world_size))
        in_a_part = -(-num_images // config.optimizer.accumulation_steps)
        self._partake(max(in_a_part, 2), augment.size_at(config.augment, 0.0))
        self._optimizer.zero_grad(set_to_none=True)

    def _synchronised(self, is_last: bool) -> AbstractContextManager[None]:
        if is_last or not isinstance(self._replica, DistributedDataParallel):
            return nullcontext()
        unsynchronised: AbstractContextManager[None] = self._replica.no_sync()
        return unsynchronised

    def _move(self) -> None:
        clip_norm = self._run.config.optimizer.clip_norm
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(self._network.parameters(), clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self._ema is not None:
            self._ema.update(self._network, self.step)


def make_network(run: TrainingRun) -> Network:
    """The network that training starts from, on the CPU: drawn from the run's seed, or `start.bundle`'s.

    A bundle's head is kept where its classes are the run's, in their order; else it is drawn anew. Raises BundleError.
    """
    torch.manual_seed(run.config.seed)
    network = build(run.architecture.name, len(run.classes), **run.architecture.arguments)
    if run.config.start.zero_init_last_norm:
        zero_init_last_norm(network)
    if run.start_uri is None:
        return network
    bundle = Bundle.load(run.start_uri)
    if bundle.architecture != run.architecture:
        raise ConfigError(
            f"architecture: expected that of start.bundle, {bundle.architecture.name}, got {run.architecture.name}; "
            "leave it out"
        )
    started = load_network(run.start_uri)
    network.trunk.load_state_dict(started.trunk.state_dict())
    if bundle.classes == run.classes:
        network.head.load_state_dict(started.head.state_dict())
    return network


def judge(run: TrainingRun, worker: Worker, trainee: Trainee, evaluation_set: TrainingSet, caution: Caution) -> Outcome:
    """The evaluation of what would be published now, over all ranks; `hardest` too. Every rank calls it.

    In float32 whatever the training's precision, as inference is: the figures are the bundle's.
    """
    data = run.config.data
    setup = Setup(
        preprocessing=run.preprocessing,
        images=data,
        batch_size=run.config.evaluation.batch_size,
        device=worker.device,
        keep_hardest=NUM_HARDEST,
        max_error_rate=data.max_error_rate,
        num_threads=data.decode_threads or worker.num_threads,
        caution=caution,
    )
    worker.share_buffers(trainee.judged_network)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        return evaluate_together(trainee.judged_network, evaluation_set.manifest, setup, worker)


def _is_evaluation_due(run: TrainingRun, step: int) -> bool:
    return step > 0 and (
        step == run.num_steps or _is_due(step, run.config.evaluation.every_epochs * run.steps_per_epoch)
    )


def _is_due(step: int, every: float | None) -> bool:
    """Whether a multiple of `every` was passed by this step."""
    return every is not None and is_passed(every, step - 1, step)


def _replicated(network: Network, worker: Worker) -> nn.Module:
    if worker.world_size == 1:
        return network
    device_ids = [worker.device] if worker.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=device_ids, gradient_as_bucket_view=True)

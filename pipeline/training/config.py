"""What a training run is told, section by section; each part of the loop is given its own section only."""

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config import ClusterConfig, JobConfig, Section
from pipeline.data.readers import ReadLimits
from pipeline.data.transforms import Preprocessing
from pipeline.models.bundle import AskedArchitecture, Name

Probability = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class DataConfig(ReadLimits):
    """How training images are ordered, fetched and decoded."""

    num_lanes: int = Field(16, ge=1)
    """Streams that the epoch is dealt into, round robin, each reading shards of its own; a worker has whole lanes, so
    this is also the most workers there can be. The order of an epoch depends on it, and not on the workers."""
    shuffle_window: int = Field(1000, ge=1)
    """Images of one lane, in whole shards, that are shuffled among each other; packed ones are held in memory, in every
    lane twice as many. Shards are shuffled besides. Loose or cached images are shuffled over the whole lane."""
    cache: Literal["none", "memory", "device"] = "none"
    """Where decoded images stay after they were first used: nowhere, in the worker's memory, on its device. For sets
    whose images all have one size, such as CIFAR's."""
    decode_threads: int | None = Field(None, ge=1)
    """Threads of a worker that decode; unset: as many as the worker has CPUs."""
    decode_processes: int | None = Field(None, ge=1)
    """Processes of a worker that its decoding threads are spread over; unset: where a GPU trains one to every two,
    for a single interpreter keeps no fast GPU busy, else 1, which is the worker itself. At most one to a lane."""
    prefetch_batches: int = Field(3, ge=1)
    """Batches decoded ahead of the loop."""
    max_error_rate: Probability = 0.01
    """Share of the images that may be impossible to fetch or decode, of the evaluation's as well; they are skipped and
    counted, and training's are listed in the errors table. More stop the run."""


class AugmentConfig(Section):
    """What happens to a training image between decoding and the network."""

    crop: Literal["random_resized", "pad", "scale", "center"] = "random_resized"
    """random_resized: an area of `scale` and an aspect of `ratio`, resized to `size` (Szegedy et al. 2015,
    arXiv:1409.4842, section 6). pad: `padding` zeros on each side, then a random crop of `size`, for images of about
    that size, since of larger ones it shows a corner (He et al. 2015, arXiv:1512.03385, section 4.2). scale: the
    shorter side resized to a random one of `sides`, then a random crop (section 3.4 there). center: the crop of the
    evaluation."""
    size: int = Field(224, ge=1)
    """Side of the square that the network is trained on, in pixels."""
    progressive: list[tuple[Probability, Annotated[int, Field(ge=1)]]] = Field([])
    """Progressive resizing: pairs of (share of the training after which, `size` from there on), smallest share first;
    before the first of them, `size` (Howard, fast.ai DAWNBench 2018)."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area of a random_resized crop, smallest and largest, as a share of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect of a random_resized crop, width over height, smallest and largest."""
    padding: int = Field(4, ge=0)
    """Pixels of zeros on each side, for `pad`."""
    sides: tuple[int, int] = (256, 480)
    """Shorter sides, smallest and largest, for `scale`."""
    horizontal_flip: Probability = 0.5
    """Chance of a mirrored image."""
    policy: Literal["none", "trivial_augment", "rand_augment"] = "none"
    """trivial_augment: one random operation at a random strength (Müller & Hutter 2021, arXiv:2103.10158, wide).
    rand_augment: `rand_num_ops` operations at `rand_magnitude` (Cubuk et al. 2019, arXiv:1909.13719)."""
    rand_num_ops: int = Field(2, ge=1)
    """Operations per image, for rand_augment."""
    rand_magnitude: int = Field(9, ge=0, le=30)
    """Strength of each, of 30, for rand_augment."""
    random_erasing: Probability = 0.0
    """Chance that a rectangle of the image is set to the mean colour (Zhong et al. 2017, arXiv:1708.04896)."""
    mixup: float = Field(0.0, ge=0)
    """Alpha of mixup, 0 without; with cutmix too, each batch takes one of the two (Zhang et al. 2017,
    arXiv:1710.09412)."""
    cutmix: float = Field(0.0, ge=0)
    """Alpha of cutmix, 0 without (Yun et al. 2019, arXiv:1905.04899)."""

    @model_validator(mode="after")
    def _sizes_follow_one_another(self) -> Self:
        shares = [share for share, _ in self.progressive]
        if any(later <= earlier for earlier, later in pairwise(shares)):
            raise ValueError(f"expected progressive with each share above the one before, got {shares}")
        return self


class LossConfig(Section):
    """What is minimised."""

    kind: Literal["cross_entropy", "bce"] = "cross_entropy"
    """bce: a binary cross-entropy for each class (Wightman et al. 2021, arXiv:2110.00476, section 2)."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target spread over all classes (Szegedy et al. 2016, arXiv:1512.00567, section 7)."""
    bce_threshold: float | None = Field(None, ge=0, lt=1)
    """For bce: shares of a mixed target above this count as 1, others as 0; unset: they stay shares."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: each class weighs the inverse of its share of the training images, 1 on average over the images."""

    @model_validator(mode="after")
    def _threshold_has_its_loss(self) -> Self:
        if self.bce_threshold is not None and self.kind != "bce":
            raise ValueError(f"expected bce_threshold with kind bce alone, got kind {self.kind}")
        return self


class OptimizerConfig(Section):
    """How the weights are moved."""

    kind: Literal["sgd", "lamb"] = "sgd"
    """sgd with momentum, or LAMB (You et al. 2019, arXiv:1904.00962, algorithm 2)."""
    learning_rate: float = Field(0.1, gt=0)
    """Highest learning rate of the schedule."""
    learning_rate_batch: int | None = Field(None, ge=1)
    """Global batch that `learning_rate` is meant for; another `batch_size` scales it linearly (Goyal et al. 2017,
    arXiv:1706.02677, section 2.1). Unset: it is meant for the batch_size given."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of sgd."""
    nesterov: bool = False
    """Nesterov's momentum, for sgd."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the two moments of LAMB."""
    eps: float = Field(1e-6, gt=0)
    """Added to LAMB's denominator."""
    weight_decay: float = Field(1e-4, ge=0)
    """L2 penalty (sgd) or decoupled decay (lamb)."""
    decay_norm_and_bias: bool = False
    """Whether norms and biases decay as well, as in the papers of 2015 (He et al. 2019, arXiv:1812.01187, section 3.1,
    advise against it)."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of the whole gradient."""
    accumulation_steps: int = Field(1, ge=1)
    """Forward and backward passes that a worker's part of a batch is cut into, for batches that do not fit its memory;
    the batch stays the same but for its norms' statistics."""

    @model_validator(mode="after")
    def _nesterov_has_a_momentum(self) -> Self:
        if self.kind == "sgd" and self.nesterov and not self.momentum:
            raise ValueError("expected a momentum above 0 with nesterov, got 0")
        return self


class ScheduleConfig(Section):
    """The learning rate over time, set at every step, as a factor of `optimizer.learning_rate`."""

    kind: Literal["constant", "step", "cosine", "linear"] = "cosine"
    """step: times `gamma` at each of `milestones`; cosine, linear: down to `final_factor` at the end (cosine:
    Loshchilov & Hutter 2016, arXiv:1608.03983, without restarts)."""
    unit: Literal["steps", "epochs"] = "epochs"
    """What `milestones` and `warmup` count."""
    milestones: list[float] = Field([])
    """When the rate drops, for `step`."""
    gamma: float = Field(0.1, gt=0, lt=1)
    """What it drops by, for `step`."""
    final_factor: float = Field(0.0, ge=0, le=1)
    """Where cosine and linear end."""
    warmup: float = Field(0.0, ge=0)
    """Length of the warm-up; the rest of the schedule follows it."""
    warmup_kind: Literal["linear", "constant"] = "linear"
    """linear: up from `warmup_factor` (Goyal et al. 2017, section 2.2); constant: at `warmup_factor` (He et al. 2015,
    section 4.2, for ResNet-110)."""
    warmup_factor: float = Field(0.01, ge=0, le=1)
    """Where the warm-up starts."""

    @model_validator(mode="after")
    def _steps_have_milestones(self) -> Self:
        if self.kind == "step" and not self.milestones:
            raise ValueError("expected milestones with kind step, got none")
        if self.kind != "step" and self.milestones:
            raise ValueError(f"expected milestones [] with kind {self.kind}, got {self.milestones}")
        return self


class EmaConfig(Section):
    """A running average of weights and buffers, which is what is evaluated and published where it is on."""

    decay: float | None = Field(None, gt=0, lt=1)
    """Share of the average that stays at each update; unset: no average."""
    every_steps: int = Field(1, ge=1)
    """Steps between updates."""


class StartConfig(Section):
    """Where the weights come from."""

    bundle: str | None = None
    """Bundle to start from: a reference into the registry or a URI; its head is kept where the classes are the same,
    else drawn anew. Unset: random weights."""
    freeze: Literal["nothing", "trunk", "norms"] = "nothing"
    """trunk: only the head is trained, norms keep their statistics (a linear probe). norms: norms keep statistics and
    weights."""
    zero_init_last_norm: bool = False
    """Begin with every residual block as the identity (Goyal et al. 2017, section 5.1)."""


class EvaluationConfig(Section):
    """How the network is judged while it trains; the same as in the bundle."""

    every_epochs: float = Field(1.0, gt=0)
    """Epochs between evaluations; the end always has one."""
    preprocessing: Preprocessing | None = None
    """From image to network, also of the bundle that is published. Unset: that of `start.bundle`."""
    batch_size: int = Field(256, ge=1)
    """Images per forward pass of a worker."""


class CheckpointConfig(Section):
    """When the resumable state is written, and how much of it is kept."""

    every_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints; unset: at every evaluation."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints kept, the newest ones."""
    keep_best: int = Field(1, ge=1)
    """And the best ones by top-1 accuracy."""


class TrainComputeConfig(Section):
    """Where the work runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes GPUs where the cluster has any."""
    num_workers: list[Annotated[int, Field(ge=1)]] | None = Field(None, min_length=1, max_length=2)
    """Training processes, one per GPU or group of CPUs; a pair, [2, 8], is the fewest and the most, and the run goes on
    with as many as there are, its global batch the same. Unset: one per GPU, or one where there is none."""

    @field_validator("num_workers", mode="before")
    @classmethod
    def _one_is_a_list(cls, num_workers: Any) -> Any:
        return [num_workers] if isinstance(num_workers, int) else num_workers

    cpus_per_worker: int | None = Field(None, ge=1)
    """CPUs of one; unset: a fair share of the smallest node."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of forward and backward passes, under autocast; weights stay float32. auto: bfloat16 on GPUs that have it.
    float32 is without TF32."""
    compile: bool = False
    """torch.compile."""
    sync_batch_norm: bool = False
    """Norms' statistics over all workers' images instead of each worker's."""
    max_failures: int = Field(3, ge=0)
    """Times that the workers are started again from the last checkpoint after one died."""
    deterministic: bool = False
    """Only deterministic kernels on GPUs, slower; AlexNet and VGG lack some and fail. CPUs are deterministic anyway."""


class TrainConfig(JobConfig):
    """Train a network on a labelled manifest and publish it as a bundle; the same line with --resume auto goes on."""

    resumes: ClassVar[bool] = True

    train: str
    """URI of the manifest to train on (made by jobs.manifest or jobs.pack)."""
    evaluate_on: str
    """URI of the manifest to judge by; the best weights by its top-1 accuracy are published."""
    output: str
    """URI below which `<run_id>/` gets checkpoints, history, errors table and report."""
    run_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the run; a name that is taken is refused, unless `resume` is given."""
    resume: bool | Literal["auto"] = False
    """Go on from the run's last checkpoint; auto: where there is such a run, else begin it, as what restarts a command
    wants. The one it goes on with must have begun with the same config."""
    registry: str
    """URI of the registry to publish to."""
    name: Name
    """Name of the bundle."""
    version: Name
    """Version of the bundle, never published before."""
    alias: Name | None = None
    """Alias to point at it, such as production."""
    export: list[Literal["torch_export", "onnx"]] = Field([])
    """Formats that the published network is also written in, below the bundle, each checked to give its answers."""
    architecture: AskedArchitecture | None = None
    """Network of the catalog and arguments of its constructor; unset: that of `start.bundle`."""
    epochs: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Length of the training in passes over the images; this or `steps`."""
    steps: int | None = Field(None, ge=1)
    """Length of the training in batches; this or `epochs`."""
    batch_size: int = Field(256, ge=1)
    """Images per step, over all workers."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of weights, order and augmentation."""
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EmaConfig = EmaConfig()
    start: StartConfig = StartConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    compute: TrainComputeConfig = TrainComputeConfig()
    cluster: ClusterConfig = ClusterConfig()
    progress_interval_s: float = Field(5.0, gt=0)
    """Seconds between progress lines where standard error is no terminal."""

    @model_validator(mode="after")
    def _of_one_piece(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("expected either epochs or steps")
        if self.version == "aliases":
            raise ValueError("expected another version than 'aliases', where the registry keeps its aliases")
        if self.start.bundle is not None and self.start.zero_init_last_norm:
            raise ValueError("expected start.bundle or start.zero_init_last_norm, which would undo it")
        if self.start.bundle is None and (self.architecture is None or self.evaluation.preprocessing is None):
            raise ValueError("expected architecture and evaluation.preprocessing, or start.bundle, which has both")
        if self.data.cache != "none" and self.augment.crop != "pad":
            raise ValueError(f"expected augment.crop pad with data.cache {self.data.cache}, got {self.augment.crop}")
        return self

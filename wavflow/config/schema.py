"""The configuration: frozen dataclasses filled from YAML files and `key=value` overrides."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from wavflow.base.errors import InputError
from wavflow.base.names import METHODS, TIMES
from wavflow.config.sections import sections


def one_of(default: str, *others: str | bool) -> Any:
    """A field that holds one of these words; the first is its default."""
    return field(default=default, metadata={"choices": (default, *others)})


def over(default: float | None, low: float, *, equal: bool = False) -> Any:
    """A field that holds a number above `low`, or equal to it."""
    return field(default=default, metadata={"low": low, "equal": equal})


def _by_system() -> Any:
    """A section whose default is that of the configuration's system."""
    return field(default=None)


@dataclass(frozen=True)
class ModelConfig:
    """The network, and the weights to generate from.

    Attributes:
        name: Preset of the network.
        ckpt_path: Checkpoint that `wavflow infer` generates from.
        use_ema: Which weights of a training checkpoint are read: `ema1` (or true), `ema2`, or
            `none` (or false) for those that are trained.
    """

    name: str = ""
    ckpt_path: str | None = None
    use_ema: bool | str = True

    @property
    def ema(self) -> str:
        """Which weights a checkpoint is read for: `ema1`, `ema2` or `none`."""
        if isinstance(self.use_ema, str):
            return self.use_ema
        return "ema1" if self.use_ema else "none"


@dataclass(frozen=True)
class EncodersConfig:
    """The encoders whose features a network hears, in the section `model` of its system.

    Attributes:
        encoders: Where features come from: `embedded` (no download, for toy worlds) or
            `clip_synchformer` (the public ones).
        clip_model_name: open_clip's name of the CLIP model.
        clip_pretrained: open_clip's name of its weights, or a file of them.
        synchformer_ckpt: File of Synchformer's weights; null fetches the public ones.
        encoder_dtype: Dtype that the public encoders compute in.
    """

    encoders: str = "clip_synchformer"
    clip_model_name: str = "ViT-H-14-378-quickgelu"
    clip_pretrained: str = "dfn5b"
    synchformer_ckpt: str | None = None
    encoder_dtype: str = one_of("float32", "bfloat16")

    @property
    def encoder_options(self) -> dict[str, Any]:
        """Arguments of `wavflow.features.registry.get_encoders`."""
        return {
            "name": self.encoders,
            "clip_model_name": self.clip_model_name,
            "clip_pretrained": self.clip_pretrained,
            "synchformer_ckpt": self.synchformer_ckpt,
            "dtype": self.encoder_dtype,
        }


@dataclass(frozen=True)
class DataConfig:
    """The table of clips, for training or for generation, and the sound of a clip.

    Attributes:
        csv_path: Table of clips. For training also a folder made by `wavflow pack`.
        val_csv_path: Table of held-out clips whose loss is taken during training; null for none.
        data_root: Folder that relative paths in the table start from; null for the table's own.
        store: Folder where the table is packed before the first step, and read from; null reads the
            files.
        source_weights: Share of an epoch's examples that each source in the table's `source` column
            gets; null for all clips alike.
        shuffle: Order of the examples: among all clips (`full`), or among a few shards of a pack at
            a time (`shards`), for disks that are slow at random places.
        shuffle_shards: Shards that are shuffled together under `shuffle: shards`.
        crop: Which window of a longer recording is taken: its `first`, or one at a `random` place.
        lift: Whose level the loudness of a clip is set by: its own (`clip`; with `crop: first` that
            of its whole file) or that of its whole `recording`.
        target_sample_rate: Samples a second; other sounds are resampled.
        audio_duration: Seconds of a clip.
        cache_mb: MB of recordings and features that training keeps in memory.
    """

    #: Keys of the section that a pack of clips depends on.
    PACK_KEYS: ClassVar[tuple[str, ...]] = ("target_sample_rate", "audio_duration")
    #: Keys of the section that hold for the weights of a training alone.
    TRAINED_KEYS: ClassVar[tuple[str, ...]] = ("target_sample_rate", "audio_duration")

    csv_path: str | None = None
    val_csv_path: str | None = None
    data_root: str | None = None
    store: str | None = None
    source_weights: dict[str, float] | None = over(None, 0, equal=True)
    shuffle: str = one_of("full", "shards")
    shuffle_shards: int = over(8, 0)
    crop: str = one_of("first", "random")
    lift: str = one_of("clip", "recording")
    target_sample_rate: int = over(16000, 0)
    audio_duration: float = over(8.0, 0)
    cache_mb: int = over(4096, 0, equal=True)

    @property
    def samples(self) -> int:
        """Samples in one clip."""
        return round(self.target_sample_rate * self.audio_duration)

    @property
    def read_samples(self) -> int:
        """Samples that are read of one clip: its own, and what fills up its last token."""
        return self.samples

    @property
    def by_windows(self) -> bool:
        """Whether a clip is read without the rest of its recording."""
        return self.crop == "random" or self.lift == "recording"


@dataclass(frozen=True)
class DecodingConfig:
    """What one video may take, and lack, before it is refused.

    Attributes:
        file_gb: Largest file, in GB (10^9 bytes).
        hours: Longest duration that the file may claim, in hours.
        megapixels: Largest picture, in millions of pixels.
        idle_packets: Most packets in a row that bring no later picture.
        seconds: Longest time that decoding may take, in seconds on the clock.
        memory_gb: Most memory, in GB (10^9 bytes), that decoding may take beside the frames, where
            the system can bound it.
        hold_seconds: Seconds that the last picture may be held where a video is too short for its
            clip.
    """

    file_gb: float = over(16.0, 0)
    hours: float = over(24.0, 0)
    megapixels: float = over(36.0, 0)
    idle_packets: int = over(1000, 0)
    seconds: float = over(300.0, 0)
    memory_gb: float = over(4.0, 0)
    hold_seconds: float = over(0.0, 0, equal=True)


@dataclass(frozen=True)
class SamplingConfig:
    """The flow that a network is trained on, and the solver that `wavflow infer` follows it by.

    Attributes:
        prediction_type: What the network predicts: the clean sound (`x`) or the velocity (`v`).
        noise_shift: s in t / (t + s (1 - t)), by which times are shifted in training and on even
            times; above 1 more of them lie near noise.
        min_sigma: Noise that is left at t = 1; even times end at 1 - `min_sigma`.
        method: Solver of `wavflow infer`.
        num_steps: Steps of a solver that is named. Without one, sounds are generated in the default
            way of `wavflow generate`, with its own steps.
        noise_scale: Standard deviation of the noise at t = 0.
        mean: Mean of the normal number whose sigmoid is the time of a training example.
        scale: Standard deviation of that number.
    """

    prediction_type: str = one_of("x", "v")
    noise_shift: float = over(1.0, 0)
    min_sigma: float = over(0.0, 0, equal=True)
    method: str = one_of(*METHODS)
    num_steps: int = over(50, 0)
    noise_scale: float = over(1.0, 0)
    mean: float = 0.0
    scale: float = over(1.0, 0)


@dataclass(frozen=True)
class InferenceConfig:
    """Generation from a table of clips, by `wavflow infer`.

    Attributes:
        cfg: Weight of classifier-free guidance, wherever none is given; 1 or less runs the
            conditional pass alone.
        guidance_interval: Times from and to which there is guidance, 0 noise and 1 data.
        guidance_rescale: Share of the guided prediction's standard deviation that is brought back
            to the unguided one's (arXiv 2305.08891).
        times: How the solver's times are spaced.
        batch_size: Most clips that are generated together.
        seed: Base seed; the seed of a row comes from it and the row's id.
        trim_to_duration: Whether a sound ends with its last sample, or with its last whole token.
        device: `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.
        dtype: Dtype of the network's matrix products. `auto` is bfloat16 where the device has it in
            hardware, else float32.
    """

    cfg: float = 4.5
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    guidance_rescale: float = over(0.0, 0, equal=True)
    times: str = one_of(*TIMES)
    batch_size: int = over(8, 0)
    seed: int = 42
    trim_to_duration: bool = True
    device: str = "auto"
    dtype: str = one_of("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class OutputConfig:
    """Where features and generated sound go, and how loud the sound is.

    Attributes:
        output_dir: Folder; sounds go to `<output_dir>/<experiment_id>/`, without an `experiment_id`
            to the folder itself.
        pth_dir: Folder that `wavflow extract` without `--out` writes `<id>.pth` into.
        csv_path: Training table that it writes.
        loudness_norm: Whether sounds are brought to one loudness (ITU-R BS.1770).
        loudness_target_lufs: That loudness, in LUFS.
        format: Kind of the sound files.
        mux: Whether a row with a video also gives `<id>.mp4`, the video with the sound.
        overwrite: Whether sounds that were made from something else are replaced; else their rows
            fail.
    """

    output_dir: str = "outputs"
    pth_dir: str | None = None
    csv_path: str | None = None
    loudness_norm: bool = True
    loudness_target_lufs: float = -23.0
    format: str = one_of("wav", "flac")
    mux: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class TrainingConfig:
    """Optimiser, schedule, length of the run and what is written when.

    A run ends by `epochs`, `max_steps` or `max_seconds`, whichever comes first.

    Attributes:
        epochs: Epochs of the run.
        max_steps: Steps of the run; null for no bound.
        max_seconds: Seconds of the run, all its parts together; null for no bound.
        warmup_steps: Steps in which the learning rate rises to its peak.
        clip_grad_norm: Largest norm of a step's gradient; a larger one is scaled down to it.
        batch_size: Clips of one process and one backward. A step takes `batch_size` x processes x
            `accumulation`.
        seed: Seed of the initial weights, the order of the clips, and all noise and times.
        start_epoch: Epoch that a new run starts in.
        num_workers: Threads that read clips ahead; 0 reads them between the steps.
        dataloader_pin_memory: Whether batches for a GPU are read into page-locked memory.
        dataloader_prefetch_factor: Micro-batches that each thread reads ahead.
        device: `auto` (a GPU for each process if there are any), `cpu`, `cuda` or `cuda:N`.
        dtype: Dtype of the network's matrix products. `auto` is bfloat16 where the device has it in
            hardware, else float32.
        strategy: The model whole in every process (`ddp`), or in shards (`fsdp`, FSDP2).
        accumulation: Backwards before the optimiser's step.
        compile: Whether the network runs through torch.compile.
        gradient_checkpointing: Whether blocks are computed again in the backward, to save memory.
        output_dir: Folder; a run lives in `<output_dir>/<experiment_id>/`.
        lr: Peak learning rate; null derives it from `blr`.
        blr: Peak learning rate for 256 clips a step, where `lr` is null.
        min_lr: Learning rate that the cosine ends at.
        lr_schedule: How the learning rate goes on after the warm-up.
        lr_schedule_steps: Epochs at which the schedule `step` multiplies the rate.
        lr_schedule_gamma: Factor of the schedule `step`.
        weight_decay: AdamW's weight decay of tensors with two or more axes.
        log_freq: Steps between two lines of figures.
        gen_train_freq: Epochs between two sets of generated samples; 0 for none.
        val_steps: Steps between two losses of the held-out clips.
        tensorboard: Whether figures and samples are also written for TensorBoard; `auto` where it
            is installed.
        max_bad_steps: Steps in a row without a finite gradient that end the run.
        overfit: How many clips, the first of the table, are trained on alone, in a run of its own;
            null for all.
        checkpoint_freq: Epochs between two writings of the latest checkpoint.
        checkpoint_minutes: Minutes after which it is written in any case.
        checkpoint_save_epoch: Epochs between two checkpoints that stay; 0 for none.
        resume: Which checkpoint a run goes on from: the `latest` or the one before it.
        ema_decay1: Decay of the first average of the weights (EMA), reached by a warm-up.
        ema_decay2: Decay of the second one.
        ema_checkpoint_save_epoch: Epochs between two files of the first average; 0 for none.
        loss_type: Whether velocities (`v`) or clean sounds (`x`) are compared.
        label_drop_prob: Chance that an example's video, and that its text, is left out, so that the
            network learns to go without.
    """

    epochs: int = over(100, 0)
    max_steps: int | None = over(None, 0)
    max_seconds: float | None = over(None, 0)
    warmup_steps: int = over(1000, 0, equal=True)
    clip_grad_norm: float = over(1.0, 0)
    batch_size: int = over(32, 0)
    seed: int = 42
    start_epoch: int = over(0, 0, equal=True)
    num_workers: int = over(2, 0, equal=True)
    dataloader_pin_memory: bool = True
    dataloader_prefetch_factor: int = over(2, 0)
    device: str = "auto"
    dtype: str = one_of("auto", "float32", "bfloat16")
    strategy: str = one_of("ddp", "fsdp")
    accumulation: int = over(1, 0)
    compile: bool = False
    gradient_checkpointing: bool = False
    output_dir: str = "outputs"
    lr: float | None = over(1e-4, 0)
    blr: float = over(1e-4, 0)
    min_lr: float = over(0.0, 0, equal=True)
    lr_schedule: str = one_of("constant", "cosine", "step")
    lr_schedule_steps: list[int] = field(default_factory=list)
    lr_schedule_gamma: float = over(0.1, 0)
    weight_decay: float = over(0.0, 0, equal=True)
    log_freq: int = over(20, 0)
    gen_train_freq: int = over(0, 0, equal=True)
    val_steps: int = over(1000, 0)
    tensorboard: bool | str = one_of("auto", True, False)
    max_bad_steps: int = over(10, 0)
    overfit: int | None = over(None, 0)
    checkpoint_freq: int = over(1, 0)
    checkpoint_minutes: float = over(30.0, 0)
    checkpoint_save_epoch: int = over(0, 0, equal=True)
    resume: str = one_of("latest", "previous")
    ema_decay1: float = over(0.9999, 0, equal=True)
    ema_decay2: float = over(0.9996, 0, equal=True)
    ema_checkpoint_save_epoch: int = over(0, 0, equal=True)
    loss_type: str = one_of("v", "x")
    label_drop_prob: float = over(0.1, 0, equal=True)

    def peak_lr(self, processes: int = 1) -> float:
        """The peak learning rate: `lr`, or `blr` x the clips of a step / 256 where that is null."""
        clips = self.batch_size * self.accumulation * processes
        return self.blr * clips / 256 if self.lr is None else self.lr


@dataclass(frozen=True)
class EvalConfig:
    """Samples that are generated during training, in the default way of `wavflow generate`.

    Attributes:
        cfg: Weight of classifier-free guidance for these samples.
    """

    cfg: float = 4.5


@dataclass(frozen=True)
class ExtractionConfig:
    """Feature extraction, by `wavflow extract`.

    Attributes:
        duration_sec: Seconds of each video that are encoded; null for `data.audio_duration`.
        num_workers: Rows that are worked on at a time; null for one per core.
    """

    duration_sec: float | None = over(None, 0)
    num_workers: int | None = over(None, 0, equal=True)


@dataclass(frozen=True)
class CommConfig:
    """How the processes of a run talk to each other.

    Attributes:
        init_timeout_seconds: Seconds that a process waits for the others before it gives up; null
            for torch's own.
    """

    init_timeout_seconds: int | None = over(None, 0)


@dataclass(frozen=True)
class CheckpointConfig:
    """Weights to start from, where the run has no checkpoint of its own yet.

    Attributes:
        initial_load_path: Checkpoint to start from; null for random weights.
        initial_load_model_only: Whether its weights alone are taken, or the whole state of its run.
    """

    initial_load_path: str | None = None
    initial_load_model_only: bool = True


#: A system's section `model`, and its section `data`.
Model = TypeVar("Model", bound=ModelConfig, covariant=True)
Data = TypeVar("Data", bound=DataConfig, covariant=True)


@dataclass(frozen=True)
class Config(Generic[Model, Data]):
    """Everything a run is told, section by section.

    The sections `model` and `data` have the keys of the system; a system annotates its own
    configurations as `Config[ItsModel, ItsData]`.

    Attributes:
        model: The network and the encoders.
        data: The table and the sizes of a clip.
        decoding: Limits for videos.
        sampling: The flow and the solver.
        inference: Generation from a table.
        output: Sound files.
        training: The run.
        eval: Samples during training.
        checkpoint: Where to start from.
        extraction: Feature extraction.
        comm: Processes of a run.
        experiment_id: Name of the run, and of its folder. A training without one is called
            `wavflow`.
        system: What is trained and sampled: `wavflow`, or a module that offers a system, by its
            dotted path.

    Raises:
        InputError: an unknown system, or a section of another one.
    """

    model: Model = _by_system()
    data: Data = _by_system()
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    extraction: ExtractionConfig = field(default_factory=ExtractionConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    experiment_id: str = ""
    system: str = "wavflow"

    def __post_init__(self) -> None:
        for name, wanted in sections(self.system).items():
            found = getattr(self, name)
            if found is None:
                object.__setattr__(self, name, wanted())
            elif not isinstance(found, wanted):
                raise InputError(
                    f"{name} is a {type(found).__name__}; wanted a {wanted.__name__}, as system "
                    f"{self.system} has it"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; without `system` where that is the default."""
        values = dataclasses.asdict(self)
        if self.system == Config.system:
            del values["system"]
        return values

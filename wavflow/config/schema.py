"""The configuration: frozen dataclasses filled from YAML files and `key=value` overrides."""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger("wavflow")

# As in wavflow.flow.solvers, which needs torch: reading a configuration does not.
SOLVERS = ("euler", "midpoint", "heun", "rk4", "ab2", "2m", "adaptive")


def _one_of(default: str, *others: str | bool) -> Any:
    return field(default=default, metadata={"choices": (default, *others)})


def _over(default: float | None, low: float, *, equal: bool = False) -> Any:
    return field(default=default, metadata={"low": low, "equal": equal})


@dataclass(frozen=True)
class ModelConfig:
    """Which network and which encoders. A size left at null is the named preset's.

    `attention_window` is how many seconds away a sound may be to be attended to, null for any
    number; `rope_scaling` is of clips longer than in training (`wavflow.layers.embeddings`).
    `clip_pretrained` is open_clip's name of weights or a file of them; `synchformer_ckpt` a file,
    null for the public one.
    """

    name: str = "medium_16k"
    hidden_dim: int | None = _over(None, 0)
    depth: int | None = _over(None, 0)
    fused_depth: int | None = _over(None, 0, equal=True)
    num_heads: int | None = _over(None, 0)
    mlp_ratio: float | None = _over(None, 0)
    attention_window: float | None = _over(None, 0)
    rope_scaling: str = _one_of("none", "linear", "ntk")
    encoders: str = "clip_synchformer"
    ckpt_path: str | None = None
    use_ema: bool | str = True
    empty_string_ckpt: str | None = None
    clip_model_name: str = "ViT-H-14-378-quickgelu"
    clip_pretrained: str = "dfn5b"
    synchformer_ckpt: str | None = None
    encoder_dtype: str = _one_of("float32", "bfloat16")

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

    @property
    def ema(self) -> str:
        """Which weights a checkpoint is read for: `ema1`, `ema2` or `none`."""
        if isinstance(self.use_ema, str):
            return self.use_ema
        return "ema1" if self.use_ema else "none"


@dataclass(frozen=True)
class DataConfig:
    """The table of clips, for training or for generation, and the sizes of a clip's data.

    For training, `csv_path` may also name a folder made by `wavflow pack`, and `store` a folder
    where the table is packed before the first step. `crop` says which window of a longer recording
    is taken, `lift` whose level its loudness is lifted by: the clip's own (with `crop: first` that
    of its whole file) or the recording's. `sync_layout` says what a row of sync features stands for
    (`wavflow.data.crop`). `source_weights` are the shares of an epoch that the sources of the
    table's `source` column get. `shuffle: shards` reads `shuffle_shards` shards of a pack at a
    time.
    """

    csv_path: str | None = None
    val_csv_path: str | None = None
    data_root: str | None = None
    store: str | None = None
    source_weights: dict[str, float] | None = _over(None, 0, equal=True)
    shuffle: str = _one_of("full", "shards")
    shuffle_shards: int = _over(8, 0)
    crop: str = _one_of("first", "random")
    lift: str = _one_of("clip", "recording")
    audio_scale: float = _over(3.0, 0)
    target_sample_rate: int = _over(16000, 0)
    audio_duration: float = _over(8.0, 0)
    audio_dim: int = _over(200, 0)
    clip_seq_len: int = _over(64, 0)
    clip_dim: int = _over(1024, 0)
    sync_seq_len: int = _over(192, 0)
    sync_dim: int = _over(768, 0)
    sync_layout: str = _one_of("segments", "even")
    text_seq_len: int = _over(77, 0)
    text_dim: int = _over(1024, 0)
    cache_mb: int = _over(4096, 0, equal=True)

    @property
    def samples(self) -> int:
        """Samples in one clip."""
        return round(self.target_sample_rate * self.audio_duration)

    @property
    def latent_seq_len(self) -> int:
        """Tokens in one clip, ceil(samples / audio_dim)."""
        return math.ceil(self.samples / self.audio_dim)

    @property
    def by_windows(self) -> bool:
        """Whether a clip is read without the rest of its recording."""
        return self.crop == "random" or self.lift == "recording"

    @property
    def feature_shapes(self) -> dict[str, tuple[int, int]]:
        """Key in a feature file -> (rows, width)."""
        return {
            "clip_features": (self.clip_seq_len, self.clip_dim),
            "sync_features": (self.sync_seq_len, self.sync_dim),
            "text_features": (self.text_seq_len, self.text_dim),
        }


@dataclass(frozen=True)
class DecodingConfig:
    """What one video may take, and lack, before it is refused (`wavflow.media.video_worker`).

    Attributes:
        file_gb: GB (10^9 bytes) of the file.
        hours: that the file says it lasts.
        megapixels: of a picture.
        idle_packets: in a row that bring no later picture.
        seconds: on the clock.
        memory_gb: GB (10^9 bytes) beside the decoded frames, where the system can bound it.
        hold_seconds: that the last picture lasts longer where the video is too short.
    """

    file_gb: float = _over(16.0, 0)
    hours: float = _over(24.0, 0)
    megapixels: float = _over(36.0, 0)
    idle_packets: int = _over(1000, 0)
    seconds: float = _over(300.0, 0)
    memory_gb: float = _over(4.0, 0)
    hold_seconds: float = _over(0.0, 0, equal=True)


@dataclass(frozen=True)
class SamplingConfig:
    """The flow: path, prediction, law of t in training (mean, scale), solver and steps.

    `method` is that of `wavflow infer`, `num_steps` the steps of a solver that is named; without
    one sounds are generated as `wavflow.flow.solvers.BEST` says.
    """

    prediction_type: str = _one_of("x", "v")
    noise_shift: float = _over(1.0, 0)
    min_sigma: float = _over(0.0, 0, equal=True)
    method: str = _one_of(*SOLVERS)
    num_steps: int = _over(50, 0)
    noise_scale: float = _over(1.0, 0)
    mean: float = 0.0
    scale: float = _over(1.0, 0)


@dataclass(frozen=True)
class InferenceConfig:
    """Generation from a table of clips."""

    cfg: float = 4.5
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    guidance_rescale: float = _over(0.0, 0, equal=True)
    times: str = _one_of("even", "sigmoid", "log-snr")
    batch_size: int = _over(8, 0)
    seed: int = 42
    trim_to_duration: bool = True
    device: str = "auto"
    dtype: str = _one_of("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class OutputConfig:
    """Where generated sound goes and how loud it is."""

    output_dir: str = "outputs"
    loudness_norm: bool = True
    loudness_target_lufs: float = -23.0
    format: str = _one_of("wav", "flac")
    mux: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class TrainingConfig:
    """Optimiser, schedule, length of the run and what is written when.

    `batch_size` is that of one process and one backward: a step takes batch_size x processes x
    accumulation clips. `*_steps` count steps, the public files' frequencies epochs, `log_freq`
    steps.
    """

    epochs: int = _over(100, 0)
    max_steps: int | None = _over(None, 0)
    max_seconds: float | None = _over(None, 0)
    warmup_steps: int = _over(1000, 0, equal=True)
    clip_grad_norm: float = _over(1.0, 0)
    batch_size: int = _over(32, 0)
    seed: int = 42
    start_epoch: int = _over(0, 0, equal=True)
    num_workers: int = _over(2, 0, equal=True)
    dataloader_pin_memory: bool = True
    dataloader_prefetch_factor: int = _over(2, 0)
    device: str = "auto"
    dtype: str = _one_of("auto", "float32", "bfloat16")
    strategy: str = _one_of("ddp", "fsdp")
    accumulation: int = _over(1, 0)
    compile: bool = False
    gradient_checkpointing: bool = False
    output_dir: str = "outputs"
    lr: float | None = _over(1e-4, 0)
    blr: float = _over(1e-4, 0)
    min_lr: float = _over(0.0, 0, equal=True)
    lr_schedule: str = _one_of("constant", "cosine", "step")
    lr_schedule_steps: list[int] = field(default_factory=list)
    lr_schedule_gamma: float = _over(0.1, 0)
    weight_decay: float = _over(0.0, 0, equal=True)
    log_freq: int = _over(20, 0)
    gen_train_freq: int = _over(0, 0, equal=True)
    val_steps: int = _over(1000, 0)
    tensorboard: bool | str = _one_of("auto", True, False)
    max_bad_steps: int = _over(10, 0)
    overfit: int | None = _over(None, 0)
    checkpoint_freq: int = _over(1, 0)
    checkpoint_minutes: float = _over(30.0, 0)
    checkpoint_save_epoch: int = _over(0, 0, equal=True)
    resume: str = _one_of("latest", "previous")
    ema_decay1: float = _over(0.9999, 0, equal=True)
    ema_decay2: float = _over(0.9996, 0, equal=True)
    ema_checkpoint_save_epoch: int = _over(0, 0, equal=True)
    loss_type: str = _one_of("v", "x")
    label_drop_prob: float = _over(0.1, 0, equal=True)

    def peak_lr(self, processes: int = 1) -> float:
        """`lr`, or `blr` x the clips of a step / 256 where `lr` is null."""
        clips = self.batch_size * self.accumulation * processes
        return self.blr * clips / 256 if self.lr is None else self.lr


@dataclass(frozen=True)
class EvalConfig:
    """Sampling during training: the guidance, in the default way (`wavflow.flow.solvers.BEST`)."""

    cfg: float = 4.5


@dataclass(frozen=True)
class CheckpointConfig:
    """Weights to start from, where the run has no checkpoint of its own yet."""

    initial_load_path: str | None = None
    initial_load_model_only: bool = True


@dataclass(frozen=True)
class Config:
    """Everything a run is told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    experiment_id: str = "wavflow"
    system: str = "wavflow"

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return dataclasses.asdict(self)

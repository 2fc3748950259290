"""WavFlow's training: flow matching on lifted waveform tokens, and the run of a configuration."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import wavflow_kernels as kernels
from wavflow import checkpoint, precision
from wavflow.build import build_model, empty_caption
from wavflow.config import Config, load_config, save_config
from wavflow.console import counter, show_log
from wavflow.data.dataset import ClipBatch, ClipDataset
from wavflow.draw import Draw
from wavflow.errors import InputError
from wavflow.model.flow_matching import FlowMatching, log_normal_sample
from wavflow.sampler import Sampler, Sound
from wavflow.trainer import Trainer, TrainResult

# Clips that are heard during training.
SAMPLE_CLIPS = 4


class WavflowObjective:
    """Model and loss for the `Trainer`.

    Noise comes from a seed per item, t and the dropped modalities from the step's generator, all
    on the CPU: a step's draws are the same on every device and after a resume.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.model = model
        self.config = config
        sampling = config.sampling
        self.flow = FlowMatching(
            min_sigma=sampling.min_sigma,
            prediction_type=sampling.prediction_type,
            noise_scale=sampling.noise_scale,
            noise_shift=sampling.noise_shift,
        )
        self.forward = torch.compile(model) if config.training.compile else model

    def loss(self, batch: ClipBatch, draw: Draw) -> Tensor:
        """Loss of every clip, (b,) float32, differentiable in the model's parameters."""
        data, sampling = self.config.data, self.config.sampling
        device = next(self.model.parameters()).device
        count = len(batch.ids)

        generator = draw.generator()
        t = log_normal_sample(torch.empty(count), generator, sampling.mean, sampling.scale)
        t = self.flow.shift_timestep(t).to(device)
        kept = torch.rand(2, count, generator=generator) >= self.config.training.label_drop_prob

        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            x_1 = kernels.lift_patchify(
                batch.wave.to(device),
                batch.lengths.to(device),
                token_size=data.audio_dim,
                tokens=data.latent_seq_len,
                audio_scale=data.audio_scale,
            )
            x_t, x_0 = kernels.flow_mix(
                x_1,
                t,
                seeds=draw.seeds.to(device),
                sigma_min=sampling.min_sigma,
                noise_scale=sampling.noise_scale,
            )
        clip, sync, text = self.conditions(
            batch, batch.has_video & kept[0], batch.has_text & kept[1]
        )
        pred = self.forward(x_t, clip, sync, text, t)
        return kernels.flow_loss(
            pred,
            x_1,
            t,
            x_t=x_t,
            x_0=x_0,
            prediction=sampling.prediction_type,
            loss=self.config.training.loss_type,
            sigma_min=sampling.min_sigma,
        )

    def conditions(
        self, batch: ClipBatch, video: Tensor, text: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features with the model's empty ones where `video` or `text` (b,) is False."""
        device = next(self.model.parameters()).device
        count = len(batch.ids)
        video, text = video.to(device)[:, None, None], text.to(device)[:, None, None]
        given = [batch.features[key].to(device) for key in self.config.data.feature_shapes]
        return (
            torch.where(video, given[0], self.model.get_empty_clip_sequence(count)),
            torch.where(video, given[1], self.model.get_empty_sync_sequence(count)),
            torch.where(text, given[2], self.model.get_empty_string_sequence(count)),
        )

    @torch.no_grad()
    def write_samples(self, folder: Path, dataset: ClipDataset, weights: dict[str, Tensor]) -> None:
        """Writes gt_rank0_id_<id>.wav and gen_rank0_id_<id>.wav of the first clips."""
        config, device = self.config, next(self.model.parameters()).device
        model = copy.deepcopy(self.model)
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
        dtype = precision.resolve_dtype(config.training.dtype, device)
        sampler = Sampler(model, config, device, dtype)
        clips = [dataset[i] for i in range(min(SAMPLE_CLIPS, len(dataset)))]
        sounds = sampler.generate_features(
            [clip.features for clip in clips],
            list(range(len(clips))),
            guidance=config.eval.cfg,
            steps=config.eval.num_sampling_steps,
            solver=config.eval.sampling_method,
        )
        for clip, sound in zip(clips, sounds, strict=True):
            sound.save(folder / f"gen_rank0_id_{clip.id}.wav")
            Sound(clip.wave, sound.rate).save(folder / f"gt_rank0_id_{clip.id}.wav")


def train(config: Config | str | os.PathLike[str], overrides: Iterable[str] = ()) -> TrainResult:
    """Trains WavFlow as a configuration says, or goes on with the run it describes.

    The run lives in `<training.output_dir>/<experiment_id>/`.

    Args:
        config: a `Config`, YAML file or preset.
        overrides: `key=value` on top of a file or preset.

    Raises:
        InputError: anything wrong with the configuration, the data or an existing checkpoint.
    """
    if not isinstance(config, Config):
        config = load_config(config, overrides)
    elif list(overrides):
        raise InputError(
            "overrides go with a file or a preset; use dataclasses.replace on a Config"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "WORLD_SIZE is above 1: training runs in a single process, without torchrun"
        )
    settings = config.training
    if config.data.csv_path is None:
        raise InputError("data.csv_path is not set; wanted a CSV made by `wavflow extract`")
    show_log()
    device = precision.resolve_device(settings.device)
    dtype = precision.resolve_dtype(settings.dtype, device)
    out = Path(settings.output_dir) / config.experiment_id
    with counter("reading") as progress:
        dataset = ClipDataset(
            config.data.csv_path,
            config.data,
            report=out / "report.csv",
            workers=settings.num_workers,
            progress=progress,
        )
    torch.manual_seed(settings.seed)
    model = build_model(config, empty_caption(config)).to(device)
    trainer = Trainer(
        WavflowObjective(model, config),
        dataset,
        settings,
        out,
        config=config.to_dict(),
        device=device,
        dtype=dtype,
    )
    save_config(out / "config.yaml", config)
    if not trainer.resume():
        _start_from(trainer, config)
    return trainer.run()


def _start_from(trainer: Trainer, config: Config) -> None:
    initial = config.checkpoint
    if initial.initial_load_path is None:
        return
    path = Path(initial.initial_load_path)
    if not initial.initial_load_model_only:
        trainer.restore(path)
        return
    weights = checkpoint.read_weights(path, "none")
    checkpoint.load_into(trainer.model, weights.state, path)
    trainer.reset_averages()

"""WavFlow's objective: flow matching on lifted waveform tokens under video and text."""

from __future__ import annotations

import torch
from torch import nn

import wavflow_kernels as kernels
from wavflow.base import precision
from wavflow.base.seeding import Draw
from wavflow.data.dataset import ClipBatch, Clips
from wavflow.flow.matching import FlowMatching
from wavflow.sampling.batched import Generator
from wavflow.sampling.plan import Plan
from wavflow.systems.wavflow.build import build_model, empty_caption
from wavflow.systems.wavflow.conditioner import WavflowMaker
from wavflow.systems.wavflow.config import RunConfig
from wavflow.systems.wavflow.network import WavflowModel
from wavflow.training.micro_batch import to_device
from wavflow.training.objective import LossTerms
from wavflow.training.run_log import Sample

#: How many clips are heard during training.
SAMPLE_CLIPS = 4


class WavflowObjective:
    """Model, loss and samples of WavFlow for the ``Trainer``.

    An example's noise, time and dropped modalities come from its draw, on the CPU but for the
    noise: they are the same on every device and in any batch.

    Args:
        config: model, data, flow, and how samples are made.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        sampling = config.sampling
        self.flow = FlowMatching(
            min_sigma=sampling.min_sigma,
            prediction_type=sampling.prediction_type,
            noise_scale=sampling.noise_scale,
            noise_shift=sampling.noise_shift,
        )
        self.empty_caption = empty_caption(config)

    def build(self) -> WavflowModel:
        """A fresh network on the CPU."""
        return build_model(self.config, self.empty_caption)

    def loss(self, model: nn.Module, batch: ClipBatch, draw: Draw) -> LossTerms:
        """Loss of every clip, (b,) float32, at the shifted times that were drawn."""
        data, sampling, training = self.config.data, self.config.sampling, self.config.training
        device = batch.wave.device
        t = torch.sigmoid(sampling.mean + sampling.scale * draw.normal("t")).float()
        t = to_device(self.flow.shift_timestep(t), device)
        video, text = (
            flag & to_device(draw.uniform(name) >= training.label_drop_prob, device)
            for name, flag in (
                ("drop video", batch.present["video"]),
                ("drop text", batch.present["text"]),
            )
        )
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            x_1 = kernels.lift_patchify(
                batch.wave,
                batch.lengths,
                levels=batch.levels,
                token_size=data.audio_dim,
                tokens=data.latent_seq_len,
                audio_scale=data.audio_scale,
            )
            x_t, x_0 = kernels.flow_mix(
                x_1,
                t,
                seeds=to_device(draw.seeds, device),
                sigma_min=sampling.min_sigma,
                noise_scale=sampling.noise_scale,
            )
        features = (batch.features[key] for key in data.feature_shapes)
        pred = model(x_t, *features, t, has_video=video, has_text=text)
        values = kernels.flow_loss(
            pred,
            x_1,
            t,
            x_t=x_t,
            x_0=x_0,
            prediction=sampling.prediction_type,
            loss=training.loss_type,
            sigma_min=sampling.min_sigma,
        )
        return LossTerms(values, t)

    def samples(self, model: nn.Module, dataset: Clips) -> list[Sample]:
        """What the model makes of the first clips' video and captions, and their own sound.

        They are generated as `wavflow.flow.solvers.BEST` says, guided by `eval.cfg`.
        """
        config, device = self.config, next(model.parameters()).device
        dtype = precision.resolve_dtype(config.training.dtype, device)
        clips = [dataset[i] for i in range(min(SAMPLE_CLIPS, len(dataset)))]
        assert isinstance(model, WavflowModel)
        maker = WavflowMaker(config, model, device, dtype)
        sounds = Generator(maker, config.sampling, dtype).generate(
            [clip.features for clip in clips],
            range(len(clips)),
            Plan.best(config.eval.cfg),
        )
        return [
            Sample(clips[row].id, sound.sample_rate, sound.audio, clips[row].wave)
            for row, sound in sorted(sounds, key=lambda made: made[0])
        ]

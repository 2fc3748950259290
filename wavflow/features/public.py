"""The public system's encoders: CLIP for pictures and captions, Synchformer for motion."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import cached_property
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from wavflow.base.errors import InputError
from wavflow.base.precision import resolve_device, resolve_dtype
from wavflow.features import synchformer
from wavflow.features.clip import CLIP_STREAM, Clip
from wavflow.features.encoder import TEXT_LENGTH, Encoders, check_frames
from wavflow.features.synchformer import FRAMES, ROWS, STRIDE, SYNC_STREAM, Synchformer
from wavflow.features.weights import given_file, identity

SEGMENTS = 24  # encoded in one call: those of 8 s


def clip_synchformer(
    clip_model_name: str,
    clip_pretrained: str,
    synchformer_ckpt: str | None,
    dtype: str,
    device: torch.device | str,
) -> Encoders:
    """The public encoders; weights load at their first use. Else as `get_encoders`."""
    if synchformer_ckpt is not None:
        given_file(synchformer_ckpt, "model.synchformer_ckpt")
    clip = Clip(clip_model_name, clip_pretrained, device, dtype)
    # One at a time loads and encodes: a network fills the device, and its weights exist once.
    turn = RLock()
    return Encoders(
        "clip_synchformer",
        ClipSynchformerVideo(clip, turn, synchformer_ckpt, dtype, device),
        ClipText(clip, turn),
    )


class ClipText:
    """All 77 token states of a caption, rows of length 1. Equal captions give equal features."""

    name = "clip-text"
    key = "text_features"
    length = TEXT_LENGTH

    def __init__(self, clip: Clip, turn: AbstractContextManager) -> None:
        self._clip, self._turn = clip, turn

    @property
    def dim(self) -> int:
        return self._clip.text_dim

    def load(self) -> None:
        """Loads the text tower; raises as `Clip.text_tower` does."""
        with self._turn:
            _ = self._clip.text_tower

    def facts(self) -> dict[str, Any]:
        """See `VideoEncoder.facts`."""
        return self._clip.facts()

    def encode(self, captions: list[str]) -> Tensor:  # (b 77 dim)
        with self._turn:
            return self._clip.encode_captions(captions)


class ClipSynchformerVideo:
    """Clip features (8 a second, clip_dim), rows of length 1, and sync features (8 a segment, 768).

    `wavflow.features.synchformer` says what a row of sync features stands for.
    """

    name = "clip-synchformer-video"
    keys = ("clip_features", "sync_features")
    sync_dim = synchformer.SynchformerConfig.dim
    streams = (CLIP_STREAM, SYNC_STREAM)

    def __init__(
        self,
        clip: Clip,
        turn: AbstractContextManager,
        synchformer_ckpt: str | None,
        dtype: str,
        device: torch.device | str,
    ) -> None:
        self._clip, self._turn = clip, turn
        self._ckpt, self._dtype, self._where = synchformer_ckpt, dtype, device

    @property
    def clip_dim(self) -> int:
        return self._clip.image_dim

    def clip_rows(self, seconds: float) -> int:
        return CLIP_STREAM.count(seconds)

    def sync_rows(self, seconds: float) -> int:
        return ROWS * synchformer.segments(SYNC_STREAM.count(seconds))

    def load(self) -> None:
        """Loads both networks; raises as `Clip.image_tower` and `load_synchformer` do."""
        with self._turn:
            _ = self._clip.image_tower, self._synchformer

    def facts(self) -> dict[str, Any]:
        """See `VideoEncoder.facts`."""
        given = self._ckpt
        motion = synchformer.PUBLIC.sha256 if given is None else identity(given)
        return {**self._clip.facts(), "synchformer_sha256": motion}

    def encode(self, frames: list[Tensor], seconds: float) -> tuple[Tensor, Tensor]:
        """Encodes frames of `streams`, uint8, to clip and sync features, float32 on the CPU.

        Raises:
            InputError: less than one segment; as `load`.
        """
        check_frames(frames, self.streams, seconds)
        return self.encode_pieces([frames])

    def encode_pieces(self, pieces: Iterable[list[Tensor]]) -> tuple[Tensor, Tensor]:
        """See `VideoEncoder.encode_pieces`; where frames are cut changes rounding alone.

        Raises:
            InputError: less than one segment; as `load`.
        """
        pictures, rows, left, count = [], [], None, 0
        for picture, motion in pieces:
            count += len(motion)
            # The next piece's first segments begin in this one.
            left = motion if left is None else torch.cat([left, motion])
            with self._turn:
                if len(picture):
                    pictures.append(self._clip.encode_pictures(picture))
                rows.append(self._motion(left))
            left = left[STRIDE * synchformer.segments(len(left)) :].clone()
        if count < FRAMES:
            seconds = count / SYNC_STREAM.fps
            raise InputError(f"{seconds:g} s are {count} frames; wanted at least {FRAMES}")
        return torch.cat(pictures), torch.cat(rows)

    @torch.no_grad()
    def _motion(self, frames: Tensor) -> Tensor:  # (t 3 224 224) -> (8s 768)
        device = resolve_device(self._where)
        span, more = SEGMENTS * STRIDE, FRAMES - STRIDE  # the last segment's second half
        rows = [
            self._synchformer(synchformer.normalize(frames[at : at + span + more].to(device))[None])
            for at in range(0, STRIDE * synchformer.segments(len(frames)), span)
        ]
        return torch.cat(rows, dim=1)[0].cpu() if rows else torch.zeros(0, self.sync_dim)

    @cached_property
    def _synchformer(self) -> Synchformer:
        device = resolve_device(self._where)
        path = synchformer.weights_path(self._ckpt)
        return synchformer.load_synchformer(path, device, resolve_dtype(self._dtype, device))

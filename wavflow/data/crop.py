"""Where in a longer recording a window may begin, for its sound and its features alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from wavflow.base.errors import InputError
from wavflow.config.schema import DataConfig

# A segment of sync features: 8 rows from 16 frames at 25 a second; the next begins 8 frames on.
SEGMENT_ROWS, SEGMENT_STEP = 8, Fraction(8, 25)
# Encoders round a recording's length to whole rows, each in its own way.
LENGTH_TOLERANCE = Fraction(1, 3)


@dataclass(frozen=True)
class Place:
    """Where a window begins: a sample of the recording, a row of its clip and sync features."""

    sample: int
    clip_row: int
    sync_row: int


class Grid:
    """The places at which a window may begin: every `step` seconds, where its features begin whole.

    `data.sync_layout` says what the rows of sync_features stand for:

    - "even": a stretch of time each, like those of clip_features. A window may begin where a clip
      and a sync row begin together: every 1/8 s for the embedded encoders' 8 and 24 rows a second.
    - "segments": Synchformer's, overlapping segments of 8 rows, one every 0.32 s. A window may
      begin where a segment does; its clip rows are from the row nearest in time on.

    Rows a second are `clip_seq_len` and `sync_seq_len` over `audio_duration`.

    Raises:
        InputError: `crop` is "random" and the sizes give no whole number of rows a second, or of
            segments.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        duration = Fraction(config.audio_duration).limit_denominator(1_000_000)
        self.clip_rate = config.clip_seq_len / duration
        self.segments = config.sync_layout == "segments"
        if config.crop == "random":
            self._check_sizes(duration)
        if self.segments:
            self.step, self.sync_step = SEGMENT_STEP, SEGMENT_ROWS
        else:
            together = math.gcd(config.clip_seq_len, config.sync_seq_len)
            self.step, self.sync_step = duration / together, config.sync_seq_len // together

    def places(self, samples: int, clip_rows: int, sync_rows: int) -> int:
        """How many places there are in a recording of so many samples and rows; at least one."""
        data = self.config
        by_sound = (samples - data.samples) // (self.step * data.target_sample_rate) + 1
        by_sync = (sync_rows - data.sync_seq_len) // self.sync_step + 1
        # Rounding takes a row for nearest up to half a row away.
        spare = clip_rows - data.clip_seq_len + Fraction(1, 2)
        by_clip = math.ceil(spare / (self.step * self.clip_rate))
        return max(min(by_sound, by_sync, by_clip), 1)

    def place(self, number: int) -> Place:
        """The place with that number, counted from 0."""
        time = number * self.step
        return Place(
            sample=int(time * self.config.target_sample_rate),
            clip_row=int(time * self.clip_rate + Fraction(1, 2)),
            sync_row=number * self.sync_step,
        )

    def check(self, where: object, clip_rows: int, sync_rows: int) -> None:
        """Features hold the rows of one window, or all rows of one longer recording.

        Raises:
            InputError: they do neither.
        """
        data = self.config
        found = {"clip_features": clip_rows, "sync_features": sync_rows}
        for key, rows in found.items():
            wanted = data.feature_shapes[key][0]
            if rows < wanted:
                raise InputError(
                    f"{where}: {key} has {rows} rows; wanted {wanted}, or more of a longer clip"
                )
        if self.segments and (sync_rows - data.sync_seq_len) % SEGMENT_ROWS:
            raise InputError(
                f"{where}: sync_features has {sync_rows} rows; wanted {data.sync_seq_len} and "
                f"whole segments of {SEGMENT_ROWS} more"
            )
        longer_clip = (clip_rows - data.clip_seq_len) / self.clip_rate
        longer_sync = (sync_rows - data.sync_seq_len) / (self.sync_step / self.step)
        if abs(longer_clip - longer_sync) > LENGTH_TOLERANCE:
            raise InputError(
                f"{where}: clip_features has {clip_rows} rows, {float(longer_clip):.2f} s more "
                f"than a window, and sync_features {sync_rows}, {float(longer_sync):.2f} s more; "
                "wanted the same length"
            )

    def _check_sizes(self, duration: Fraction) -> None:
        data = self.config
        sizes = {"clip_seq_len": data.clip_seq_len}
        if not self.segments:
            sizes["sync_seq_len"] = data.sync_seq_len
        elif data.sync_seq_len % SEGMENT_ROWS:
            raise InputError(
                f"data.sync_seq_len is {data.sync_seq_len}; random crops of segments want whole "
                f"ones, of {SEGMENT_ROWS} rows"
            )
        for name, rows in sizes.items():
            if (rows / duration).denominator != 1:
                raise InputError(
                    f"data.{name} is {rows} in {data.audio_duration:g} s; random crops want a "
                    "whole number of rows a second"
                )

"""The sounds of the toy world's objects: short, distinct, starting at their impacts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from wavflow.toy.scene import Scene

#: Inharmonic partials of a small bell: ratio to the first, level, share of its decay time.
_PARTIALS = ((1.0, 1.0, 1.0), (2.34, 0.4, 0.6), (3.07, 0.2, 0.4))


def _attack(t: np.ndarray, seconds: float) -> np.ndarray:
    return np.minimum(1.0, t / seconds)


def _bell(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    base, decay = 480.0 + 160.0 * pitch, 0.16 - 0.04 * pitch
    wave = np.zeros_like(t)
    for ratio, level, share in _PARTIALS:
        wave += level * np.exp(-t / (decay * share)) * np.sin(2 * np.pi * base * ratio * t)
    return 0.6 * wave


def _drum(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    low, fall, decay = 65.0 + 45.0 * pitch, 90.0, 0.10 - 0.02 * pitch
    phase = 2 * np.pi * (low * t + fall * 0.03 * (1 - np.exp(-t / 0.03)))
    skin = np.exp(-t / decay) * np.sin(phase)
    stick = 0.15 * np.exp(-t / 0.004) * rng.standard_normal(t.size)
    return _attack(t, 0.001) * (1.1 * skin + stick)


def _steam(t: np.ndarray, pitch: float, rng: np.random.Generator, rate: int) -> np.ndarray:
    # Half of the hiss is the valve's own, half is new each time.
    own = np.random.default_rng(0).standard_normal(rate)
    spectrum = np.fft.rfft(own + rng.standard_normal(rate))
    frequency = np.fft.rfftfreq(rate, 1 / rate)
    low, high = 1000.0 + 700.0 * pitch, 3400.0 + 400.0 * pitch
    spectrum *= 1 / (1 + np.exp((low - frequency) / 80)) / (1 + np.exp((frequency - high) / 80))
    noise = np.resize(np.fft.irfft(spectrum, rate), t.size)
    noise /= np.sqrt(np.mean(noise**2))
    return 0.35 * _attack(t, 0.003) * np.exp(-t / (0.085 - 0.02 * pitch)) * noise


def _bird(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    length = 0.2
    start, stop = 900.0 + 200.0 * pitch, 1600.0 + 300.0 * pitch
    sweep = start * t + (stop - start) * t**2 / (2 * length)
    envelope = _attack(t, 0.003) / (1 + np.exp(np.minimum((t - length) / 0.010, 700)))
    return 0.6 * envelope * np.sin(2 * np.pi * sweep)


def synthesize(scene: Scene, seconds: float, rate: int) -> np.ndarray:  # (samples,) int16
    """The clip's sound: one event per impact over a quiet noise floor."""
    rng = scene.rng(1)
    samples = round(seconds * rate)
    wave = np.zeros(samples)
    for time in scene.times:
        start = round(time * rate)
        t = np.arange(samples - start) / rate
        pitch = scene.pitch + rng.uniform(-0.02, 0.02)
        if scene.kind == "bell":
            event = _bell(t, pitch, rng)
        elif scene.kind == "drum":
            event = _drum(t, pitch, rng)
        elif scene.kind == "steam":
            event = _steam(t, pitch, rng, rate)
        else:
            event = _bird(t, pitch, rng)
        wave[start:] += (0.35 + 0.5 * scene.strength) * rng.uniform(0.85, 1.0) * event
    wave += 10 ** rng.uniform(-3.3, -2.7) * rng.standard_normal(samples)
    return np.clip(np.rint(wave * 32768), -32768, 32767).astype(np.int16)

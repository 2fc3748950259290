"""What turns a sound into embeddings: fixed statistics, and models that others have published.

The models come with the package transformers (``wavflow[eval]``), which downloads their weights
unless it is given a folder that has them. Their weights have licences of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from wavflow.base.errors import InputError
from wavflow.evaluation.spectra import mel_triangles, power_spectra

INSTALL = "pip install 'wavflow[eval]'"
_BANDS = 32
# Rows of power spectra sum to the mean square of the wave, at most 1.
_SILENCE = 1e-10
# Shortest length of a last window.
_LEAST_SECONDS = 1.0


def melstats(wave: Tensor, rate: int) -> np.ndarray:  # (3 * 32,)
    """Mean, standard deviation and mean absolute change of 32 mel bands' levels (dB every 5 ms).

    Needs no weights. Its distances compare only with each other, at one rate: they say nothing
    beside published figures.
    """
    power = power_spectra(wave, rate)
    level = 10 * np.log10(power @ mel_triangles(power.shape[1], rate, _BANDS) + _SILENCE)
    change = np.abs(np.diff(level, axis=0, prepend=level[:1]))
    return np.concatenate([level.mean(axis=0), level.std(axis=0), change.mean(axis=0)])


@dataclass(frozen=True)
class Embedded:
    """A sound as a model sees it.

    Attributes:
        rows: embeddings (k, d), one for each window.
        logits: logits (1, classes), the mean over windows; None for a model without classes.
    """

    rows: np.ndarray
    logits: np.ndarray | None = None


class Extractor(Protocol):
    """A model that embeds sounds, (t,) at `rate` Hz."""

    rate: int

    def __call__(self, wave: Tensor) -> Embedded: ...


class Ast:
    """Audio Spectrogram Transformer, by default fine-tuned on AudioSet's 527 classes."""

    SOURCE = "MIT/ast-finetuned-audioset-10-10-0.4593"

    def __init__(self, source: str, device: torch.device) -> None:
        self._device = device
        self._model = _load_model("ASTForAudioClassification", source).to(device).eval()
        self._features = _load("ASTFeatureExtractor", source)
        self.rate = self._features.sampling_rate
        # Frames of 10 ms.
        self._window = self._features.max_length * self.rate // 100

    @torch.inference_mode()
    def __call__(self, wave: Tensor) -> Embedded:
        windows = _windows(wave, self._window, self.rate)
        inputs = self._features(windows, sampling_rate=self.rate, return_tensors="pt")
        values = inputs["input_values"].to(self._device)
        rows = self._model.audio_spectrogram_transformer(values).pooler_output
        logits = self._model.classifier(rows).mean(0, keepdim=True)
        return Embedded(rows.cpu().numpy(), logits.cpu().numpy())


class Clap:
    """CLAP: embeds sounds and captions in one space, as rows of length 1."""

    SOURCE = "laion/clap-htsat-unfused"

    def __init__(self, source: str, device: torch.device) -> None:
        self._device = device
        self._model = _load_model("ClapModel", source).to(device).eval()
        self._features = _load("ClapFeatureExtractor", source)
        self._tokenizer = _load("AutoTokenizer", source)
        self.rate = self._features.sampling_rate
        self._window = self._features.nb_max_samples

    @torch.inference_mode()
    def __call__(self, wave: Tensor) -> Embedded:
        windows = _windows(wave, self._window, self.rate)
        inputs = self._features(windows, sampling_rate=self.rate, return_tensors="pt")
        found = self._model.get_audio_features(**inputs.to(self._device))
        return Embedded(_unit(found.pooler_output))

    @torch.inference_mode()
    def captions(self, captions: Sequence[str]) -> np.ndarray:  # (n d)
        """Embeddings of captions, rows of length 1."""
        inputs = self._tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt")
        return _unit(self._model.get_text_features(**inputs.to(self._device)).pooler_output)


EXTRACTORS: dict[str, type[Ast] | type[Clap]] = {"ast": Ast, "clap": Clap}


def get_extractor(name: str, source: str | None, device: torch.device) -> Extractor:
    """Loads a model by its name in EXTRACTORS.

    Args:
        name: the model's name.
        source: a folder in the layout of transformers, or a name on the Hugging Face hub;
            None for the model's usual one.
        device: where it runs.

    Raises:
        InputError: no such model, its package is not installed, or its weights cannot be had.
    """
    if name not in EXTRACTORS:
        offered = ", ".join(["melstats", *EXTRACTORS])
        raise InputError(
            f"--extractor {name}: wanted one of {offered}; embeddings of other models are read "
            "from files (--embeddings)"
        )
    kind = EXTRACTORS[name]
    return kind(source or kind.SOURCE, device)


def _load_model(kind: str, source: str) -> Any:
    model, found = _load(kind, source, output_loading_info=True)
    lacking = sorted(found["missing_keys"])
    if lacking:
        raise InputError(f"{source}: {len(lacking)} weights of {kind} are missing: {lacking[0]}")
    return model


def _load(kind: str, source: str, **options: Any) -> Any:
    try:
        import transformers
    except ImportError:
        raise InputError(f"transformers is not installed ({INSTALL}), wanted {kind}") from None
    try:
        return getattr(transformers, kind).from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{source}: no {kind} to be had there ({reason})") from None


def _windows(wave: Tensor, size: int, rate: int) -> list[np.ndarray]:
    """Consecutive windows of `size` samples; the last one may be shorter, but not below 1 s."""
    starts = range(0, max(len(wave) - round(_LEAST_SECONDS * rate), 0) + 1, size)
    return [wave[at : at + size].numpy() for at in starts]


def _unit(rows: Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(rows.float(), dim=-1).cpu().numpy()

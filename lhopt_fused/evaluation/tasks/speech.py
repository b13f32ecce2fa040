"""Speech: spoken digits, held out by speaker; which digit it is, and sequences of them by CTC."""

from __future__ import annotations

import io
import tarfile
import wave
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lhopt_fused.evaluation.task import (
    Batch,
    DataError,
    Scores,
    Size,
    Split,
    Task,
    epochs,
    find_data,
)
from lhopt_fused.evaluation.tasks.supervised import Classification

__all__ = ["SpeechCTC", "SpeechKeyword", "edit_distance", "log_mel", "read_recordings"]

_SOURCE: Final = (
    "https://github.com/Jakobovski/free-spoken-digit-dataset: recordings/{digit}_{speaker}_{take}"
    ".wav, as a folder or in fsdd_recordings.tar.gz"
)
_RATE: Final = 8_000
_WINDOW: Final = 256  # samples
_HOP: Final = 80  # samples
_BANDS: Final = 32
_FRAMES: Final = 100  # of a recording, at most: one second
_BLANK: Final = 10
_LONGEST: Final = 5  # digits of a sequence
_TAKES: Final[dict[Size, int]] = {"small": 25, "full": 1_000}


class Recordings(NamedTuple):
    """Recordings with the same order in all.

    Attributes:
        features: log-mel spectrograms, float32 ``[N, 100, 32]``, zero after the end.
        frames: of each, int64 ``[N]``.
        digits: int64 ``[N]``.
        speakers: index into ``names``, int64 ``[N]``.
        names: of the speakers, sorted.
    """

    features: torch.Tensor
    frames: torch.Tensor
    digits: torch.Tensor
    speakers: torch.Tensor
    names: tuple[str, ...]


def log_mel(waves: torch.Tensor) -> torch.Tensor:
    """Log-mel spectrograms of 8 kHz sound, ``[N, T]`` -> ``[N, 1 + T // 80, 32]``."""
    window = torch.hann_window(_WINDOW)
    spectrum = torch.stft(waves, _WINDOW, _HOP, window=window, return_complex=True)
    power = spectrum.abs().square().transpose(1, 2)  # [N, frames, 129]
    return (power @ _mel_filters()).add(1e-6).log()


@lru_cache(maxsize=1)
def _mel_filters() -> torch.Tensor:
    """Triangles evenly spread over the mel scale, ``[129, 32]``."""
    highest = 2595 * np.log10(1 + _RATE / 2 / 700)
    edges = torch.from_numpy(700 * (10 ** (np.linspace(0, highest, _BANDS + 2) / 2595) - 1))
    bins = torch.linspace(0, _RATE / 2, _WINDOW // 2 + 1, dtype=torch.float64)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp_min(0.0).float()


def read_recordings(place: Path, takes: int) -> Recordings:
    """Recordings of a folder or tar.

    Args:
        place: with files ``{digit}_{speaker}_{take}.wav``, 8 kHz, 16 bits, mono.
        takes: of each digit and speaker, the first so many.

    Raises:
        DataError: a file is something else, or there are fewer than three speakers.
    """
    found = []
    for name, raw in _files(place):
        parts = PurePosixPath(name).stem.split("_")
        if len(parts) != 3 or not (parts[0].isdigit() and parts[2].isdigit()):
            raise DataError(f"{name} of {place}: expected {{digit}}_{{speaker}}_{{take}}.wav")
        if int(parts[2]) < takes:
            found.append((parts[1], int(parts[0]), int(parts[2]), _read_wave(place, name, raw)))
    found.sort(key=lambda recording: recording[:3])
    names = tuple(sorted({speaker for speaker, *_ in found}))
    if len(names) < 3:
        raise DataError(
            f"{place} has {len(names)} speakers, expected three or more; get it from {_SOURCE}"
        )
    features, frames = _features([sound for *_, sound in found])
    digits = torch.tensor([digit for _, digit, *_ in found])
    speakers = torch.tensor([names.index(speaker) for speaker, *_ in found])
    return Recordings(features, frames, digits, speakers, names)


def _files(place: Path) -> Iterator[tuple[str, bytes]]:
    if place.is_dir():
        for path in sorted(place.glob("*.wav")):
            yield path.name, path.read_bytes()
        return
    try:
        with tarfile.open(place) as tar:
            for member in tar:
                opened = tar.extractfile(member) if member.name.endswith(".wav") else None
                if opened is not None:
                    yield member.name, opened.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{place} is damaged ({error}); get it again from {_SOURCE}") from error


def _read_wave(place: Path, name: str, raw: bytes) -> torch.Tensor:
    """Sound from -1 to 1, at most a second."""
    try:
        with wave.open(io.BytesIO(raw)) as opened:
            kind = (opened.getnchannels(), opened.getsampwidth(), opened.getframerate())
            data = opened.readframes(opened.getnframes())
    except (wave.Error, EOFError) as error:
        raise DataError(f"{name} of {place} is damaged ({error}); get it again") from error
    if kind != (1, 2, _RATE):
        raise DataError(
            f"{name} of {place} has {kind[0]} channels of {8 * kind[1]} bits at {kind[2]} Hz, "
            f"expected 1 of 16 at {_RATE}; get it again from {_SOURCE}"
        )
    samples = np.frombuffer(data, dtype="<i2")[: (_FRAMES - 1) * _HOP]
    return torch.from_numpy(samples.astype(np.float32) / 2**15)


def _features(sounds: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Spectrograms, each of zero mean in each band and of unit variance, and their frames.

    Microphones and voices differ in what they pass; over a recording, that is a constant.
    """
    frames = torch.tensor([1 + len(sound) // _HOP for sound in sounds])
    length = (_FRAMES - 1) * _HOP
    parts = [
        log_mel(torch.stack([F.pad(sound, (0, length - len(sound))) for sound in sounds[i:j]]))
        for i, j in _spans(len(sounds), 256)
    ]
    features = torch.cat(parts)
    there = (torch.arange(_FRAMES) < frames[:, None])[..., None]
    count = frames[:, None, None]
    centred = (features - (features * there).sum(1, keepdim=True) / count) * there
    power = centred.square().sum((1, 2), keepdim=True) / (count * _BANDS)
    return centred / power.sqrt().clamp_min(1e-3), frames


def _spans(count: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(count, start + size)) for start in range(0, count, size)]


@lru_cache(maxsize=2)
def _recordings(size: Size, data_dir: Path | None) -> dict[Split | str, Recordings]:
    """All recordings by split: the last speaker is reported on, policies see the one before."""
    names = ("recordings", "fsdd_recordings.tar.gz", "free-spoken-digit-dataset/recordings")
    roots = [data_dir / name for name in names] if data_dir is not None else []
    found = read_recordings(find_data("spoken digits", roots, _SOURCE), _TAKES[size])
    last = len(found.names) - 1
    chosen = {
        "training": found.speakers < last - 1,
        "policy_eval": found.speakers == last - 1,
        "report": found.speakers == last,
    }
    return {
        split: Recordings(
            found.features[rows],
            found.frames[rows],
            found.digits[rows],
            found.speakers[rows],
            found.names,
        )
        for split, rows in chosen.items()
    }


class SpeechKeyword(Classification):
    """Which digit was spoken: a CNN over time."""

    name = "speech_keyword"

    def __init__(self, size: Size, data_dir: Path | None) -> None:
        found = _recordings(size, data_dir)
        splits: dict[Split, Batch] = {
            "policy_eval": (found["policy_eval"].features, found["policy_eval"].digits),
            "report": (found["report"].features, found["report"].digits),
        }
        training = (found["training"].features, found["training"].digits)
        small = size == "small"
        super().__init__(training, splits, steps=250 if small else 3_000, batch_size=32)
        self.width = 32 if small else 256

    def inputs(self, raw: torch.Tensor) -> torch.Tensor:
        return raw.transpose(1, 2)  # [batch, bands, frames]

    def make_model(self) -> nn.Module:
        width = self.width
        layers: dict[str, nn.Module] = {}
        for index, before in enumerate((_BANDS, width, width)):
            layers[f"conv{index}"] = nn.Conv1d(before, width, 5, stride=2, padding=2)
            layers[f"norm{index}"] = nn.BatchNorm1d(width)
            layers[f"relu{index}"] = nn.ReLU()
        layers |= {"pool": nn.AdaptiveAvgPool1d(1), "flatten": nn.Flatten()}
        return nn.Sequential(OrderedDict(layers | {"head": nn.Linear(width, 10)}))


class _Recogniser(nn.Module):
    """A quarter of the frames through convolutions, then a recurrent layer both ways."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv1d(_BANDS, width, 5, stride=2, padding=2),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Conv1d(width, width, 5, stride=2, padding=2),
            nn.BatchNorm1d(width),
            nn.ReLU(),
        )
        self.gru = nn.GRU(width, width, layers, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(2 * width, 1 + _BLANK)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Log-probabilities ``[T / 4, B, 11]`` of ``[B, T, 32]``, rounded up."""
        x = self.dropout(self.convolutions(features.transpose(1, 2)).transpose(1, 2))
        logits: torch.Tensor = self.head(self.dropout(self.gru(x)[0]))
        return logits.log_softmax(-1).transpose(0, 1)


class SpeechCTC(Task):
    """Sequences of one to five digits of one speaker, by connectionist temporal classification.

    A batch has features ``[B, 500, 32]``, frames ``[B]``, digits ``[B, 5]`` and how many ``[B]``.
    The metric is the mean over sequences of edit distance by length, of the best path.
    """

    name = "speech_ctc"
    metric = "character_error_rate"
    higher_is_better = False

    def __init__(self, size: Size, data_dir: Path | None) -> None:
        found = _recordings(size, data_dir)
        small = size == "small"
        count = 96 if small else 500
        splits: dict[Split, Batch] = {
            "policy_eval": _sequences(found["policy_eval"], count, 0),
            "report": _sequences(found["report"], 2 * count, 1),
        }
        super().__init__(
            tuple(found["training"][:4]), splits, steps=300 if small else 4_000, batch_size=16
        )
        self.recordings = found["training"]
        self.width, self.layers = (48, 1) if small else (256, 3)

    def make_model(self) -> nn.Module:
        return _Recogniser(self.width, self.layers)

    def batches(self, generator: torch.Generator) -> Iterator[Batch]:
        """New sequences; each begins with another recording."""
        recordings = self.recordings
        for firsts in epochs(len(recordings.digits), self.batch_size, generator):
            rows = [_companions(recordings, int(first), generator) for first in firsts]
            yield _joined(recordings, rows)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        features, frames, digits, counts = batch
        features = features[:, : int(frames.max())]
        return F.ctc_loss(
            model(features), digits, _shorter(frames), counts, blank=_BLANK, zero_infinity=True
        )

    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        features, frames, digits, counts = batch
        loss = self.loss(model, batch).item()
        paths = model(features[:, : int(frames.max())]).argmax(-1).T
        lengths = _shorter(frames)
        errors = []
        for row, path in enumerate(paths):
            heard = path[: lengths[row]].unique_consecutive()
            said = digits[row, : counts[row]].tolist()
            errors.append(edit_distance(heard[heard != _BLANK].tolist(), said) / len(said))
        return Scores(loss, {"character_error_rate": sum(errors) / len(errors)})


def _shorter(frames: torch.Tensor) -> torch.Tensor:
    """Frames after two convolutions with a stride of two."""
    return (frames + 3) // 4


def _sequences(recordings: Recordings, count: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    firsts = torch.randint(len(recordings.digits), (count,), generator=generator)
    rows = [_companions(recordings, int(first), generator) for first in firsts]
    return _joined(recordings, rows)


def _companions(recordings: Recordings, first: int, generator: torch.Generator) -> list[int]:
    """A recording and none to four more of the same speaker."""
    same = (recordings.speakers == recordings.speakers[first]).nonzero()[:, 0]
    more = int(torch.randint(_LONGEST, (), generator=generator))
    return [first, *same[torch.randint(len(same), (more,), generator=generator)].tolist()]


def _joined(recordings: Recordings, rows: list[list[int]]) -> Batch:
    """Recordings one after another."""
    features = torch.zeros(len(rows), _LONGEST * _FRAMES, _BANDS)
    digits = torch.zeros(len(rows), _LONGEST, dtype=torch.int64)
    frames = torch.zeros(len(rows), dtype=torch.int64)
    for place, row in enumerate(rows):
        parts = torch.cat([recordings.features[i, : recordings.frames[i]] for i in row])
        features[place, : len(parts)] = parts
        frames[place] = len(parts)
        digits[place, : len(row)] = recordings.digits[row]
    return features, frames, digits, torch.tensor([len(row) for row in rows])


def edit_distance(one: list[int], other: list[int]) -> int:
    """Insertions, deletions and substitutions that make one into the other (Levenshtein)."""
    before = list(range(len(other) + 1))
    for i, symbol in enumerate(one, 1):
        now = [i]
        for j, wanted in enumerate(other, 1):
            now.append(min(before[j] + 1, now[j - 1] + 1, before[j - 1] + (symbol != wanted)))
        before = now
    return before[-1]

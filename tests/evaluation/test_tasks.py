"""Tasks: what they read, that their splits are apart, and that they can be learned."""

from __future__ import annotations

import gzip
import math
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation import files
from tolerances import MEAN_OF_PARTS
from torch import nn
from torch.nn import functional as F

from lhopt_fused.evaluation.run import RunSpec, run_task
from lhopt_fused.evaluation.task import SIZES, SPLITS, DataError, Task
from lhopt_fused.evaluation.tasks import (
    TASKS,
    cartpole,
    diffusion,
    fashion,
    language_model,
    load_task,
    recommendation,
    resnet,
    sentiment,
    sequences,
    speech,
    tokens,
)

CACHES = (
    *(fashion.fashion_splits, recommendation._interactions),
    *(language_model._splits, language_model._token_splits),
    *(resnet._splits, sentiment._splits, speech._recordings, load_task),
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    files.write_all(folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for cached in CACHES:
        cached.cache_clear()
    monkeypatch.setattr(fashion, "_SYSTEM", tmp_path / "not-installed")


def rows(task: Task, part: str) -> set[bytes]:
    """The examples of a part, as bytes."""
    batch = task.training if part == "training" else task.held_out[part]  # type: ignore[index]
    joined = [tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None] for tensor in batch]
    return {
        b"".join(piece.numpy().tobytes() for piece in example)
        for example in zip(*joined, strict=True)
    }


@pytest.mark.parametrize("name", TASKS)
def test_a_task_trains_and_is_scored(name: str, data_dir: Path) -> None:
    task = load_task(name, "small", data_dir)
    assert task.name == name
    task.steps = 8
    spec = RunSpec(name, "small", "adamw", {"lr": 1e-3, "schedule": "linear"}, 0)
    result = run_task(task, spec)
    assert result.steps == 8
    assert math.isfinite(result.report_loss)
    assert task.metric in result.metrics
    assert all(math.isfinite(point.eval_loss) for point in result.curve)
    assert result.curve[-1].train_loss > 0


@pytest.mark.parametrize("name", [name for name in TASKS if name != "speech_ctc"])
def test_splits_are_apart(name: str, data_dir: Path) -> None:
    task = load_task(name, "small", data_dir)
    parts = [rows(task, part) for part in ("training", *SPLITS)]
    assert all(parts)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        if not name.startswith(("sentiment", "language")):  # made of few words, some are the same
            assert parts[one].isdisjoint(parts[other])


LARGE = ("language_model_wide", "language_model_bpe")  # more than a test has time for


@pytest.mark.parametrize("name", [name for name in TASKS if name not in LARGE])
def test_the_full_size_is_larger(name: str, data_dir: Path) -> None:
    def parameters(task: Task) -> int:
        return sum(param.numel() for param in task.make_model().parameters())

    small, full = (load_task(name, size, data_dir) for size in SIZES)
    assert full.steps > small.steps
    assert parameters(full) > parameters(small)
    assert full.digest != small.digest


NEED_NO_FILES = ("noisy_quadratic", "xor_rnn", "addition_rnn", "cartpole")


@pytest.mark.parametrize("name", [name for name in TASKS if name not in NEED_NO_FILES])
def test_missing_data_is_said(name: str, tmp_path: Path) -> None:
    for data_dir in (tmp_path, None):
        with pytest.raises(DataError, match=r"not found: .*get it from .*(https://|package)"):
            TASKS[name]("small", data_dir)


def test_a_digest_is_of_the_data(data_dir: Path, tmp_path: Path) -> None:
    before = load_task("fashion_mlp", "small", data_dir).digest
    files.write_fashion(tmp_path)
    load_task.cache_clear()
    fashion.fashion_splits.cache_clear()
    assert load_task("fashion_mlp", "small", tmp_path).digest == before
    labels = tmp_path / "fashion-mnist" / "t10k-labels-idx1-ubyte"
    raw = bytearray(labels.read_bytes())
    raw[-1] = (raw[-1] + 1) % 10
    labels.write_bytes(raw)
    load_task.cache_clear()
    fashion.fashion_splits.cache_clear()
    assert load_task("fashion_mlp", "small", tmp_path).digest != before


# ---------------------------------------------------------------------- Fashion-MNIST


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "is damaged"),
        (b"\0\0\x08\x01\0\0\0\x05abc", "expected an IDX header and 5 bytes"),
        (b"\0\0\x0d\x01\0\0\0\x01abcd", "is damaged"),
        (b"\0\0\x08\x03\0\0", "is damaged"),
    ],
)
def test_damaged_idx_files(raw: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(raw))
    with pytest.raises(DataError, match=problem):
        fashion.read_idx(path)
    path.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot be read"):
        fashion.read_idx(path)
    whole = bytearray(gzip.compress(bytes(1_000)))
    whole[12] ^= 255
    path.write_bytes(whole)
    with pytest.raises(DataError, match="cannot be read"):
        fashion.read_idx(path)


def test_images_and_labels_must_fit(tmp_path: Path) -> None:
    files.write_fashion(tmp_path)
    labels = tmp_path / "fashion-mnist" / "train-labels-idx1-ubyte"
    labels.write_bytes(b"\0\0\x08\x01\0\0\0\x02ab")
    with pytest.raises(DataError, match=r"has shape \[200, 28, 28\] and .*\[2\]"):
        fashion.FashionMLP("small", tmp_path)


def test_the_systems_copy_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_fashion(tmp_path)
    monkeypatch.setattr(fashion, "_SYSTEM", tmp_path / "fashion-mnist")
    assert len(fashion.FashionMLP("small", None).training[0]) == 160


# ---------------------------------------------------------------------- text


def test_wikitext_with_and_without_training_text(tmp_path: Path) -> None:
    files.write_wikitext(tmp_path / "two")
    files.write_wikitext(tmp_path / "three", training=True)
    folder = tmp_path / "three" / "wikitext-2"
    for part in ("train", "valid", "test"):
        (folder / f"{part}.txt").rename(folder / f"wiki.{part}.tokens")
    two, three = (
        language_model.LanguageModel("small", tmp_path / name) for name in ("two", "three")
    )
    lines = (folder / "wiki.valid.tokens").read_bytes()
    assert bytes(three.held_out["policy_eval"][0][0].tolist()) == lines[:65]
    valid = (tmp_path / "two" / "wikitext-2" / "valid.txt").read_bytes()
    assert bytes(two.training[0][0].tolist()) == valid[:65]
    assert len(two.held_out["report"][0]) < len(three.held_out["report"][0])


def test_text_that_is_too_short(tmp_path: Path) -> None:
    files.write_wikitext(tmp_path)
    (tmp_path / "wikitext-2" / "test.txt").write_text("short")
    with pytest.raises(DataError, match="has 2 bytes or tokens, expected at least 130"):
        language_model.LanguageModel("small", tmp_path)


def test_sentences(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\na good film \t1\nbad\t0\n")
    assert sentiment.read_sentences(path) == [(["a", "good", "film"], 1), (["bad"], 0)]
    path.write_text("bad\t0\nno label\n")
    with pytest.raises(DataError, match="line 2 is 'no label', expected a sentence, a tab and"):
        sentiment.read_sentences(path)


@pytest.mark.parametrize("name", ["sentiment_lstm", "sentiment_transformer"])
def test_what_follows_a_sentence_does_not_matter(name: str, data_dir: Path) -> None:
    """Padding is left out of the mean; of an LSTM both ways, it is at least the same for all."""
    task = load_task(name, "small", data_dir)
    model = task.make_model().eval()
    words = task.held_out["report"][0][:4]
    with torch.no_grad():
        alone = torch.cat([model(row[None]) for row in words])
        torch.testing.assert_close(model(words), alone, rtol=1e-4, atol=1e-5)


def test_tokens_are_of_the_text_that_is_learned(tmp_path: Path) -> None:
    """What is held out changes nothing of them; what is learned does."""
    for name in ("one", "two", "three"):
        files.write_wikitext(tmp_path / name, training=True)
    (tmp_path / "two" / "wikitext-2" / "test.txt").write_text("zzzz yyyy " * 9_000)
    (tmp_path / "three" / "wikitext-2" / "train.txt").write_text("zzzz yyyy " * 9_000)
    one, two, three = (
        language_model.LanguageModelBPE("small", tmp_path / name)
        for name in ("one", "two", "three")
    )
    assert torch.equal(one.training[0], two.training[0])
    seen, other = one.held_out["policy_eval"], three.held_out["policy_eval"]
    assert torch.equal(seen[0], two.held_out["policy_eval"][0])
    assert seen[1].sum() > 2 * other[1].sum()  # of as many windows


def test_every_byte_is_in_one_token() -> None:
    text = "A caf\u00e9, a cat; \u732b.\n\nthe cat sat".encode()
    found = tokens.Tokenizer.of(text * 20, 300)
    numbers = found.tokens(text)
    assert found.byte_counts[numbers.long()].sum() == len(text)
    assert len(numbers) < len(text)
    assert len(tokens.Tokenizer.of(text * 20, 256).tokens(text)) == len(text)
    assert len(found.tokens(b"cat\xff")) == len(found.tokens(b"cat"))


def test_bits_per_byte_of_a_model_that_knows_nothing(data_dir: Path) -> None:
    task = language_model.LanguageModelBPE("small", data_dir)
    model = task.make_model()
    for param in model.parameters():
        torch.nn.init.zeros_(param)
    scores = task.evaluate(model, "policy_eval")
    assert scores.loss == pytest.approx(math.log(512), rel=1e-6)
    windows, byte_counts = task.held_out["policy_eval"]
    bits = 9 * 64 * len(windows) / byte_counts.sum().item()
    assert scores.metrics["bits_per_byte"] == pytest.approx(bits, rel=MEAN_OF_PARTS.relative)


@pytest.mark.parametrize("name", language_model.WIDTHS)
def test_widths_differ_in_nothing_else(name: str, data_dir: Path) -> None:
    task, middle = (TASKS[other]("small", data_dir) for other in (name, "language_model"))
    assert isinstance(task, language_model.LanguageModel)
    assert isinstance(middle, language_model.LanguageModel)
    assert replace(task.config, width=64) == middle.config
    assert torch.equal(task.training[0], middle.training[0])
    assert (task.steps, task.batch_size) == (middle.steps, middle.batch_size)


# ---------------------------------------------------------------------- rules


def test_the_rules_of_sequences() -> None:
    bits, parity = sequences.XorRNN("small").held_out["report"]
    for row, found in zip(bits[:50].tolist(), parity[:50].tolist(), strict=True):
        assert found == [sum(row[: place + 1]) % 2 for place in range(12)]
    pairs, total = sequences.AdditionRNN("small").held_out["report"]
    for row, found in zip(pairs[:50].tolist(), total[:50].tolist(), strict=True):
        one, other = (
            sum((symbol >> side & 1) << place for place, symbol in enumerate(row))
            for side in (0, 1)
        )
        assert sum(bit << place for place, bit in enumerate(found)) == (one + other) % 64


def test_accuracy_is_over_all_symbols() -> None:
    class Half(nn.Module):
        """Right on the first symbol of two."""

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return F.one_hot(torch.stack([inputs[:, 0], 1 - inputs[:, 1]], 1), 2).float().mT

    bits = torch.tensor([[0, 1], [1, 1], [0, 0]])
    scores = sequences.XorRNN("small").scores(Half(), (bits, bits))
    assert scores.metrics["accuracy"] == 0.5


# ---------------------------------------------------------------------- diffusion


def test_a_model_that_knows_the_noise_has_no_loss(data_dir: Path) -> None:
    task = diffusion.Diffusion("small", data_dir)
    pictures, times, noise = batch = task.held_out["report"]
    clean = pictures.float() / 127.5 - 1.0

    class Knows(nn.Module):
        def __init__(self, share: float) -> None:
            super().__init__()
            self.share = share

        def forward(self, noisy: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
            assert torch.equal(told, times)
            return self.share * (noise - clean)

    scores = task.scores(Knows(1.0), batch)
    assert scores.loss == 0.0
    assert scores.metrics["denoised_squared_error"] == pytest.approx(0.0, abs=1e-12)
    wrong = task.scores(Knows(0.9), batch)
    assert wrong.loss == pytest.approx(0.01 * (noise - clean).square().mean().item(), rel=1e-4)
    assert 0 < wrong.metrics["denoised_squared_error"] < wrong.loss


def test_noise_is_drawn_anew_in_training_and_stays_where_it_is_judged(data_dir: Path) -> None:
    first, again = (diffusion.Diffusion("small", data_dir) for _ in range(2))
    for split in SPLITS:
        assert all(map(torch.equal, first.held_out[split], again.held_out[split]))
    batches = first.batches(torch.Generator().manual_seed(0))
    one, other = next(batches), next(batches)
    assert one[0].shape == (32, 1, 14, 14)
    assert not torch.equal(one[2], other[2])
    assert 0 <= one[1].min() < one[1].max() < 1


# ---------------------------------------------------------------------- reinforcement learning


class Balances(nn.Module):
    """Steps towards where the pole falls, or always to the left."""

    def __init__(self, knows: bool) -> None:
        super().__init__()
        self.knows = nn.Parameter(torch.tensor(float(knows)))

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        right = self.knows * (states[:, 2] + 0.5 * states[:, 3] + 0.05 * states[:, 1])
        logits = torch.stack([torch.full_like(right, 1e-9), right], 1)
        return logits, torch.full_like(right, 3.0)


def test_a_pole_that_stays_up_and_one_that_falls() -> None:
    task = cartpole.CartPole("small")
    best, worst = (task.evaluate(Balances(knows), "report") for knows in (True, False))
    assert (best.loss, best.metrics["mean_return"]) == (0.0, 500.0)
    assert worst.loss == 1.0 - worst.metrics["mean_return"] / 500
    assert 8 <= worst.metrics["mean_return"] <= 11
    assert task.evaluate(Balances(False), "report") == worst


def test_a_batch_is_what_the_model_has_just_played() -> None:
    task = cartpole.CartPole("small")
    torch.manual_seed(0)
    model = task.make_model()
    first, again = (
        next(task.stream(model, torch.Generator().manual_seed(seed))) for seed in (1, 1)
    )
    assert all(map(torch.equal, first, again))
    states, actions, log_probs, _, returns = first
    assert states.shape == (len(returns), 4)
    with torch.no_grad():
        logits, _ = model(states)
        taken = logits.log_softmax(-1).gather(1, actions[:, None])[:, 0]
        torch.testing.assert_close(taken, log_probs)
        logits, _ = task.make_model()(states)
    other = logits.log_softmax(-1).gather(1, actions[:, None])[:, 0]
    assert (other - log_probs).abs().max() > 1e-3


def test_an_episode_that_was_cut_goes_on_in_its_value() -> None:
    """With values of 1 and one step, the advantage is 0.1, plus 0.99 times what comes, less 1."""
    shape = (2, 2)
    mask = torch.tensor([[True, False], [True, False]])
    played = cartpole._Episodes(
        states=torch.zeros(2, 2, 4),
        actions=torch.zeros(shape, dtype=torch.int64),
        log_probs=torch.zeros(shape),
        values=torch.ones(shape),
        mask=mask,
        beyond=torch.tensor([0.0, 5.0]),
    )
    *_, advantages, returns = cartpole._learned_from(played)
    assert advantages.tolist() == pytest.approx([0.1 - 1.0, 0.1 + 0.99 * 5.0 - 1.0])
    assert returns.tolist() == pytest.approx([0.1, 0.1 + 0.99 * 5.0])


def test_what_is_beyond_the_longest_episode_counts_and_what_is_beyond_a_fall_does_not() -> None:
    task = cartpole.CartPole("small")
    for knows, beyond in ((True, 3.0), (False, 0.0)):
        with torch.no_grad():
            played = task._play(Balances(knows), [1, 2, 3], None)
        assert played.beyond.tolist() == [beyond] * 3
        assert played.mask.sum(1).max() == played.mask.shape[1]


def test_the_version_of_the_game_is_part_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (cartpole.CartPole("small") for _ in range(2))
    monkeypatch.setattr(one.gymnasium, "__version__", "0.0")
    before = one.digest
    monkeypatch.undo()
    assert other.digest != before


@pytest.mark.parametrize(
    ("package", "task"), [("gymnasium", "cartpole"), ("tokenizers", "language_model_bpe")]
)
def test_missing_packages_are_said(
    package: str, task: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"package {package} .*pip install 'lhopt-fused\[eval\]'"):
        TASKS[task]("small", data_dir)


# ---------------------------------------------------------------------- images


def test_a_tar_is_read_as_its_folders(data_dir: Path, tmp_path: Path) -> None:
    tar = tmp_path / "cifar10_images.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(data_dir / "cifar10", "cifar10")
    one, other = (resnet.read_images(place, 10) for place in (tar, data_dir / "cifar10"))
    for part in ("train", "test"):
        assert all(map(torch.equal, one[part], other[part]))
        assert one[part][0].shape == (20, 3, 32, 32)
        assert one[part][1].tolist() == [0] * 10 + [1] * 10


def test_damaged_images(data_dir: Path, tmp_path: Path) -> None:
    tar = tmp_path / "cifar10_images.tar"
    tar.write_bytes(b"no tar")
    with pytest.raises(DataError, match="is damaged"):
        resnet.ResNet("small", tmp_path)
    tar.unlink()
    folder = tmp_path / "cifar10" / "train" / "cat"
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match=r"parts \[\] with 0 classes, expected train and test"):
        resnet.ResNet("small", tmp_path)
    (folder / "0000.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"train/cat/0000.png of .* is no image"):
        resnet.ResNet("small", tmp_path)


# ---------------------------------------------------------------------- recommendation


def test_the_last_film_is_for_the_report_and_the_one_before_for_policies(data_dir: Path) -> None:
    task = recommendation.GMF("small", data_dir)
    ratings = recommendation.read_ratings(data_dir / "ml-100k" / "u.data")
    films = np.unique(ratings[:, 1])
    for split, moment in (("report", 19), ("policy_eval", 18)):
        users, items = task.held_out[split]  # type: ignore[index]
        wanted = {user - 1: film for user, film, when in ratings.tolist() if when == moment}
        found = dict(zip(users.tolist(), films[items[:, 0]].tolist(), strict=True))
        assert found == wanted
        assert items.shape == (40, 100)
        strangers = task.met[users[:, None], items[:, 1:]]
        assert not strangers.any()
    assert len(task.training[0]) == 40 * 18


def test_formats_of_ratings(tmp_path: Path) -> None:
    path = tmp_path / "ratings"
    expected = [[196, 242, 881250949]]
    for text in (
        "196\t242\t3\t881250949\n",
        "196::242::3::881250949\n",
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n",
    ):
        path.write_text(text)
        assert recommendation.read_ratings(path).tolist() == expected
    path.write_text("196\t242\t3\t881250949\n196,242\n")
    with pytest.raises(DataError, match="line 2 is '196,242', expected user, item, rating"):
        recommendation.read_ratings(path)


class Fixed(nn.Module):
    """Logits that fall from item to item, but for one that is asked for."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = nn.Parameter(torch.tensor(float(rank)))

    def forward(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        logits = -torch.arange(items.shape[1], dtype=torch.float32).expand(items.shape).clone()
        logits[:, 0] = -self.rank.detach() - 0.5
        return logits


@pytest.mark.parametrize(
    ("rank", "hit", "gain"),
    [(0, 1.0, 1.0), (1, 1.0, 1 / math.log2(3)), (9, 1.0, 1 / math.log2(11)), (10, 0.0, 0.0)],
)
def test_hit_ratio_and_gain(rank: int, hit: float, gain: float, data_dir: Path) -> None:
    scores = recommendation.GMF("small", data_dir).evaluate(Fixed(rank), "report")
    assert scores.metrics["hit_ratio_at_10"] == hit
    assert scores.metrics["ndcg_at_10"] == pytest.approx(gain, rel=1e-6)


def test_ties_count_against_a_model(data_dir: Path) -> None:
    class Same(Fixed):
        def forward(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
            return torch.zeros(items.shape)

    scores = recommendation.GMF("small", data_dir).evaluate(Same(0), "report")
    assert scores.metrics["hit_ratio_at_10"] == 0.0


def test_negatives_are_drawn_anew(data_dir: Path) -> None:
    task = recommendation.NeuMF("small", data_dir)
    batches = task.batches(torch.Generator().manual_seed(0))
    users, items = next(batches)
    assert items.shape == (51, 5)
    assert task.met[users, items[:, 0]].all()
    assert task.met[users[:, None], items[:, 1:]].double().mean() < 0.05
    assert not torch.equal(items, next(batches)[1])


# ---------------------------------------------------------------------- speech


def test_speakers_are_held_out(data_dir: Path) -> None:
    found = speech.read_recordings(data_dir / "recordings", 1000)
    assert found.names == ("ann", "bob", "cid", "dee")
    assert found.features.shape == (80, 100, 32)
    parts = speech._recordings("small", data_dir)
    assert parts["training"].speakers.unique().tolist() == [0, 1]
    assert parts["policy_eval"].speakers.unique().tolist() == [2]
    assert parts["report"].speakers.unique().tolist() == [3]


def test_what_a_microphone_adds_is_taken_out(tmp_path: Path) -> None:
    """Twice as loud is a constant in the logarithm."""
    files.write_digits(tmp_path)
    folder = tmp_path / "recordings"
    path, louder = folder / "7_ann_0.wav", folder / "7_ann_2.wav"
    raw = path.read_bytes()
    sound = np.frombuffer(raw[44:], dtype="<i2") * 2
    louder.write_bytes(raw[:44] + sound.astype("<i2").tobytes())
    found = speech.read_recordings(folder, 1000)
    ann = (found.speakers == 0) & (found.digits == 7)
    one, _, other = found.features[ann]
    there = int(found.frames[ann][0])
    assert one[:there].mean(0).abs().max() < 1e-5
    assert one[:there].square().mean() == pytest.approx(1.0, rel=1e-4)
    assert (one - other).abs().mean() < 0.05


def test_a_tone_is_where_it_should_be() -> None:
    """Bands are evenly spread in mel: 1 kHz is 1000 mel, of 2146 in 33 steps."""
    time = torch.arange(8_000) / 8_000
    loudest = speech.log_mel(torch.sin(2 * torch.pi * 1_000 * time)[None])[0, 50].argmax()
    assert int(loudest) + 1 == round(1_000 / (2_146 / 33))


def test_sequences_of_digits(data_dir: Path) -> None:
    task = speech.SpeechCTC("small", data_dir)
    features, frames, digits, counts = next(task.batches(torch.Generator().manual_seed(0)))
    assert features.shape == (16, 500, 32)
    assert set(counts.tolist()) <= {1, 2, 3, 4, 5}
    assert digits.max() <= 9
    for row in range(16):
        assert not features[row, frames[row] :].any()
        assert not digits[row, counts[row] :].any()


def test_the_error_rate_of_a_perfect_and_of_a_silent_recogniser(data_dir: Path) -> None:
    task = speech.SpeechCTC("small", data_dir)
    _, frames, digits, counts = task.held_out["report"]

    class Knows(nn.Module):
        """Says the digits of the batch, each for a moment, or nothing."""

        def __init__(self, speaks: bool) -> None:
            super().__init__()
            self.speaks = nn.Parameter(torch.tensor(float(speaks)))

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            path = torch.full((len(features), (features.shape[1] + 3) // 4), 10)
            if self.speaks > 0:
                for row in range(len(features)):
                    path[row, 1 : 2 * counts[row] : 2] = digits[row, : counts[row]]
            return F.one_hot(path, 11).float().mul(9.0).log_softmax(-1).transpose(0, 1)

    assert len(frames) <= task.eval_batch_size
    for speaks, rate in ((True, 0.0), (False, 1.0)):
        scores = task.evaluate(Knows(speaks), "report")
        assert scores.metrics["character_error_rate"] == rate


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [([], [], 0), ([1], [], 1), ([], [1, 2], 2), ([1, 2, 3], [1, 3], 1), ([1, 2], [2, 1], 2)],
)
def test_edit_distance(one: list[int], other: list[int], distance: int) -> None:
    assert speech.edit_distance(one, other) == distance


def two_speakers(folder: Path) -> None:
    files.write_digits(folder, ("ann", "bob"))


def wrong_name(folder: Path) -> None:
    files.write_digits(folder)
    (folder / "recordings" / "seven.wav").write_bytes(b"")


def no_sound(folder: Path) -> None:
    files.write_digits(folder)
    (folder / "recordings" / "7_eve_0.wav").write_bytes(b"RIFF")


def too_fast(folder: Path) -> None:
    files.write_digits(folder)
    path = folder / "recordings" / "7_ann_0.wav"
    raw = bytearray(path.read_bytes())
    raw[24:28] = (16_000).to_bytes(4, "little")
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (two_speakers, "has 2 speakers, expected three or more"),
        (wrong_name, "seven.wav of .*: expected {digit}_{speaker}_{take}.wav"),
        (no_sound, "7_eve_0.wav of .* is damaged"),
        (too_fast, "1 channels of 16 bits at 16000 Hz, expected 1 of 16 at 8000"),
    ],
)
def test_damaged_recordings(damage: Callable[[Path], None], problem: str, tmp_path: Path) -> None:
    damage(tmp_path)
    with pytest.raises(DataError, match=problem):
        speech.SpeechKeyword("small", tmp_path)

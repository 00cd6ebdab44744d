"""Pixels are the official ones, splits do not overlap, binarisation is exact."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits

from training import data
from training.config import DataConfig
from training.data import Dataset
from training.download import RemoteFile
from training.errors import DataCorrupt, LabelsMissing, UnknownName
from training.idx import Labels


def _idx(num_rows: int, height: int = 2, width: int = 3) -> bytes:
    return struct.pack(">4I", 0x803, num_rows, height, width) + bytes(range(num_rows * height * width))


def test_digits_are_split_without_overlap(digits: Dataset) -> None:
    """Together the splits are scikit-learn's rows, each once."""
    together = np.concatenate([digits.train, digits.validation, digits.test])
    expected = np.rint(load_digits().data * 255 / 16).astype(np.uint8)
    assert together.shape == (1797, 1, 8, 8)
    assert sorted(map(bytes, together)) == sorted(map(bytes, expected))
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1297, 250, 250)


def test_digits_use_the_whole_range_of_pixels(digits: Dataset) -> None:
    """Grey level 16 of the original is 255."""
    assert (digits.train.min(), digits.train.max()) == (0, 255)


def test_split_is_a_function_of_its_seed(digits: Dataset) -> None:
    """The same seed repeats the split, another makes another, and the record names it."""
    again = data.load(DataConfig(name="digits"))
    other = data.load(DataConfig(name="digits", split_seed=1))
    np.testing.assert_array_equal(again.test, digits.test)
    assert not np.array_equal(other.test, digits.test)
    assert other.split.startswith("shuffled by seed 1;")


def test_training_rows_can_be_limited(digits: Dataset) -> None:
    """A smoke run takes the first rows and leaves the other splits whole."""
    short = data.load(DataConfig(name="digits", max_train_rows=10))
    np.testing.assert_array_equal(short.train, digits.train[:10])
    assert len(short.test) == len(digits.test)


def test_changed_digits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """If scikit-learn ever ships other numbers, we say so rather than train on them."""
    bunch = load_digits()
    bunch.data[3, 3] += 1
    monkeypatch.setattr(data, "load_digits", lambda: bunch)
    with pytest.raises(DataCorrupt, match=r"digits.*SHA-256 [0-9a-f]{64}, expected 8f26b2bd"):
        data.load(DataConfig(name="digits"))


def test_unknown_data_set_is_refused() -> None:
    """The error lists the known ones."""
    with pytest.raises(UnknownName, match="data set 'cifar' does not exist; known: digits, mnist"):
        data.source("cifar")


@pytest.mark.parametrize("folder", ["", "mnist"], ids=["folder itself", "sub-folder"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_files_are_found_where_they_may_lie(
    folder: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed or unpacked, in the folder itself or in one named like the data set."""
    files = _install_small_mnist(monkeypatch)
    (tmp_path / folder).mkdir(exist_ok=True)
    for name, content in files.items():
        path = tmp_path / folder / name
        path.with_name(name + suffix).write_bytes(gzip.compress(content) if suffix else content)
    loaded = data.load(DataConfig(name="mnist"), data_dir=tmp_path, mirrors=[])
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (3, 2, 4)
    assert loaded.train[0, 0, 1].tolist() == [3, 4, 5]
    assert loaded.validation[0, 0, 0].tolist() == [18, 19, 20]


def test_wrong_file_is_refused_with_both_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the right name and another content never becomes training data."""
    _install_small_mnist(monkeypatch)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(_idx(6))
    with pytest.raises(DataCorrupt, match=r"SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
        data.load(DataConfig(name="mnist"), data_dir=tmp_path, mirrors=[])


def test_official_files_are_accepted(idx_folder: Path) -> None:
    """The digests in the table are those of the real MNIST."""
    loaded = data.load(DataConfig(name="mnist"), data_dir=idx_folder, mirrors=[])
    assert (loaded.train.shape, loaded.validation.shape) == ((50_000, 1, 28, 28), (10_000, 1, 28, 28))
    assert loaded.test.shape == (10_000, 1, 28, 28)
    # Independent pixels cost 205.81 nats on the test split: the pixels and their scale are the known ones.
    probabilities = np.concatenate([loaded.train, loaded.validation]).mean(axis=0, dtype=np.float64) / 255
    mean = loaded.test.mean(axis=0, dtype=np.float64) / 255
    probabilities = probabilities.clip(1e-6, 1 - 1e-6)
    cost = -(mean * np.log(probabilities) + (1 - mean) * np.log1p(-probabilities)).sum()
    assert cost == pytest.approx(205.81, abs=0.05)


def test_official_labels_are_accepted_and_aligned(idx_folder: Path) -> None:
    """The digests in the table are those of the real labels; a mean image per class recognises most test images.

    Misaligned by one row, it would recognise about a tenth.
    """
    config = DataConfig(name="mnist")
    images = data.load(config, data_dir=idx_folder, mirrors=[])
    labels = data.load_labels(config, data_dir=idx_folder, mirrors=[])
    assert (labels.train[:5].tolist(), labels.test[:5].tolist()) == ([5, 0, 4, 1, 9], [7, 2, 1, 0, 4])
    for split in data.SPLITS:
        assert len(labels.of(split)) == len(images.rows(split))
    for split in ("validation", "test"):
        assert _share_nearest_to_class_mean(images, labels, split) > 0.75
    if (idx_folder / "fashion-mnist").is_dir():
        fashion = data.load_labels(DataConfig(name="fashion-mnist"), data_dir=idx_folder, mirrors=[])
        assert np.bincount(fashion.test).tolist() == [1000] * 10


def test_digits_labels_are_aligned(digits: Dataset) -> None:
    """Whatever the seed of the split, images and labels are shuffled alike."""
    known = {bytes(row): label for row, label in zip(*_digits_as_shipped(), strict=True)}
    for seed in (0, 1):
        config = DataConfig(name="digits", split_seed=seed)
        images, labels = data.load(config), data.load_labels(config)
        for split in data.SPLITS:
            assert [known[bytes(row)] for row in images.rows(split)] == labels.of(split).tolist()
    assert len(data.load_labels(DataConfig(name="digits", max_train_rows=7)).train) == 7
    assert _share_nearest_to_class_mean(digits, data.load_labels(DataConfig(name="digits")), "test") > 0.75


def test_labels_of_files_are_cut_as_the_images_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rows of the training file are those of validation, and the limit of training rows holds."""
    files = {
        "train-labels-idx1-ubyte": struct.pack(">2I", 0x801, 5) + bytes([3, 1, 4, 1, 5]),
        "t10k-labels-idx1-ubyte": struct.pack(">2I", 0x801, 2) + bytes([9, 2]),
    }
    monkeypatch.setitem(data.SOURCES, "mnist", data.SOURCES["mnist"]._replace(label_files=_remote(files)))
    monkeypatch.setattr(data, "_IDX_VALIDATION", 2)
    for name, content in files.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    labels = data.load_labels(DataConfig(name="mnist", max_train_rows=2), data_dir=tmp_path, mirrors=[])
    assert [part.tolist() for part in labels] == [[3, 1], [1, 5], [9, 2]]
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(files["train-labels-idx1-ubyte"]))
    with pytest.raises(DataCorrupt, match=r"t10k-labels-idx1-ubyte: .* SHA-256 [0-9a-f]{64}, expected"):
        data.load_labels(DataConfig(name="mnist"), data_dir=tmp_path, mirrors=[])


def test_changed_digits_labels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels have a digest of their own."""
    bunch = load_digits()
    bunch.target[3] += 1
    monkeypatch.setattr(data, "load_digits", lambda: bunch)
    with pytest.raises(DataCorrupt, match=r"digits, labels: .*expected 8ba4f891"):
        data.load_labels(DataConfig(name="digits"))


def test_own_data_have_no_labels() -> None:
    """Said at once, without reading the data."""
    config = DataConfig(name="own", path="somewhere/my.npy")
    with pytest.raises(LabelsMissing, match=r"own data: my\.npy: it has no labels; leave out"):
        data.load_labels(config)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """XDG_CACHE_HOME moves the cache; without it, it is in the home folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.cache_folder() == tmp_path / "vae-serving"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.cache_folder() == Path.home() / ".cache" / "vae-serving"


def test_binarised_pixels_have_the_grey_value_as_mean(source: torch.Generator) -> None:
    """Every grey value is hit within five standard errors; black and white are certain."""
    pixels = torch.arange(256, dtype=torch.uint8).expand(20_000, 256)
    ones = data.binarise(pixels, source)
    expected = torch.arange(256) / 255
    standard_error = (expected * (1 - expected) / 20_000).sqrt()
    assert set(ones.flatten().tolist()) == {0.0, 1.0}
    assert ((ones.mean(dim=0) - expected).abs() <= 5 * standard_error).all()


def test_thresholds_are_uniform_below_255(source: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 255 values equally often by a chi-squared test, also where rejected words make a second draw due."""
    once = data._bytes_below_255(1_000_000, source)  # noqa: SLF001  # uniform on a range that no caller shows
    monkeypatch.setattr(data, "_SPARE_WORDS", 0)  # one word of eight bytes is then rejected 3 times in 100
    again = torch.cat([data._bytes_below_255(7, source) for _ in range(20_000)])  # noqa: SLF001  # the same
    for drawn in (once, again):
        counts = torch.bincount(drawn.long(), minlength=256)
        assert counts[255] == 0
        assert stats.chisquare(counts[:255].numpy()).pvalue > 1e-3
    assert len(again) == 140_000


def test_evaluation_binarises_each_row_alone(digits: Dataset, seed: int) -> None:
    """A row becomes the same binary image in any batch; the mean is the grey value."""
    whole = data.binarise_rows(digits.test, seed=seed)
    assert torch.equal(data.binarise_rows(digits.test[7:9], seed=seed, first_row=7), whole[7:9])
    assert not torch.equal(data.binarise_rows(digits.test, seed=seed + 1), whole)
    grey = torch.from_numpy(digits.test / 255).float()
    assert whole[grey == 0].max() == 0
    assert whole[grey == 1].min() == 1
    # 16,000 pixels: four standard errors of a Bernoulli mean are below 0.016.
    assert whole.mean().item() == pytest.approx(grey.mean().item(), abs=0.016)


def _install_small_mnist(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Replace the table's MNIST by one of five and four images, with the same file names."""
    files = {"train-images-idx3-ubyte": _idx(5), "t10k-images-idx3-ubyte": _idx(4)}
    monkeypatch.setitem(data.SOURCES, "mnist", data.SOURCES["mnist"]._replace(files=_remote(files)))
    monkeypatch.setattr(data, "_IDX_VALIDATION", 2)
    return files


def _remote(files: dict[str, bytes]) -> tuple[RemoteFile, ...]:
    return tuple(
        RemoteFile(name, len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()
    )


def _digits_as_shipped() -> tuple[data.Pixels, Labels]:
    bunch = load_digits()
    return np.rint(bunch.data * 255 / 16).astype(np.uint8), bunch.target.astype(np.uint8)


def _share_nearest_to_class_mean(images: Dataset, labels: data.SplitLabels, split: data.SplitName) -> float:
    """Return how often the nearest mean image of a class, of the training split, is that of the label."""
    rows, of_train = images.train.reshape(len(images.train), -1), labels.train
    means = np.stack([rows[of_train == label].mean(axis=0) for label in range(10)])
    queries = images.rows(split).reshape(len(images.rows(split)), -1).astype(np.float64)
    distances = (means**2).sum(axis=1) - 2 * queries @ means.T
    return float((distances.argmin(axis=1) == labels.of(split)).mean())

"""Data sets as arrays of pixels in [0, 255], with digests and splits.

Nothing that arrives from outside is trusted: the digest of the *unpacked* bytes is compared with the official
one, since mirrors and copies compress differently.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training import own_data
from training.config import DataConfig
from training.download import Progress, RemoteFile, fetch, unpack
from training.errors import DataCorrupt, LabelsMissing, UnknownName
from training.idx import Labels, parse_images, parse_labels
from training.noise import Stream, uniform
from training.own_data import OwnImages

SplitName = Literal["train", "validation", "test"]
OWN: Final = "own"
"""Name of the user's own data in a configuration."""

SPLITS: Final[tuple[SplitName, ...]] = ("train", "validation", "test")

Pixels = NDArray[np.uint8]

MAX_PIXEL: Final = 255

_BYTES: Final = 8
"""Of a random word."""

_WORDS_PER_SPARE: Final = 24
"""One word in 32 is rejected; with this many spare ones, and a few more for small draws, one draw is enough."""

_SPARE_WORDS: Final = 64

_LOWEST: Final = -(2**63)
_EACH_ONE: Final = 0x0101010101010101
_EACH_HIGHEST: Final = 0x8080808080808080 - 2**64
_DIGITS_SHA256: Final = "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3"
_DIGITS_LABELS_SHA256: Final = "8ba4f891220f5e4c9c819638d1602d74b83618f167043c6da52a2a247841ddf0"
_DIGITS_HELD_OUT: Final = 250
_DIGITS_LEVELS: Final = 16
_OWN_HELD_OUT: Final = 0.1
_IDX_VALIDATION: Final = 10_000


class Source(NamedTuple):
    """Where a data set comes from and what may be done with it."""

    title: str
    data_shape: tuple[int, ...]
    num_rows: tuple[int, int, int]
    licence: str
    files: tuple[RemoteFile, ...] = ()
    label_files: tuple[RemoteFile, ...] = ()
    mirrors: tuple[str, ...] = ()


SOURCES: Final[dict[str, Source]] = {
    "digits": Source(
        title="Optical recognition of handwritten digits (UCI), as scikit-learn ships it",
        data_shape=(1, 8, 8),
        num_rows=(1297, _DIGITS_HELD_OUT, _DIGITS_HELD_OUT),
        licence="scikit-learn is BSD; the data come from the UCI repository (E. Alpaydin, C. Kaynak, 1998)",
    ),
    "mnist": Source(
        title="MNIST handwritten digits (LeCun, Cortes, Burges)",
        data_shape=(1, 28, 28),
        num_rows=(50_000, _IDX_VALIDATION, 10_000),
        licence="usually quoted as CC BY-SA 3.0; check before you redistribute images",
        files=(
            RemoteFile(
                "train-images-idx3-ubyte",
                47_040_016,
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            ),
            RemoteFile(
                "t10k-images-idx3-ubyte",
                7_840_016,
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            ),
        ),
        label_files=(
            RemoteFile(
                "train-labels-idx1-ubyte",
                60_008,
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            ),
            RemoteFile(
                "t10k-labels-idx1-ubyte",
                10_008,
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
        ),
        mirrors=(
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
        ),
    ),
    "fashion-mnist": Source(
        title="Fashion-MNIST, pictures of clothes (Zalando Research)",
        data_shape=(1, 28, 28),
        num_rows=(50_000, _IDX_VALIDATION, 10_000),
        licence="MIT, Zalando SE",
        files=(
            RemoteFile(
                "train-images-idx3-ubyte",
                47_040_016,
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            ),
            RemoteFile(
                "t10k-images-idx3-ubyte",
                7_840_016,
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            ),
        ),
        label_files=(
            RemoteFile(
                "train-labels-idx1-ubyte",
                60_008,
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            ),
            RemoteFile(
                "t10k-labels-idx1-ubyte",
                10_008,
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            ),
        ),
        # Plain HTTP: the digest is the protection.
        mirrors=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
    ),
}


class Dataset(NamedTuple):
    """A data set in memory; every split is uint8, shape (n, *data_shape), pixel units [0, 255]."""

    name: str
    train: Pixels
    validation: Pixels
    test: Pixels
    sha256: str
    split: str
    found: tuple[tuple[str, str], ...] = ()
    """What was inferred of the user's own data: name and text of each fact."""

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.train.shape[1:]

    def rows(self, split: SplitName) -> Pixels:
        """Return the rows of one split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


class SplitLabels(NamedTuple):
    """Class of every row of a data set: uint8 from 0, shape (n,) for each split, in the order of its rows."""

    train: Labels
    validation: Labels
    test: Labels

    def of(self, split: SplitName) -> Labels:
        """Return the labels of one split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


def source(name: str) -> Source:
    """Return where a published data set comes from.

    Raises:
        UnknownName: If there is none of that name.
    """
    if name not in SOURCES:
        raise UnknownName("data set", name, known=tuple(SOURCES))
    return SOURCES[name]


def described(config: DataConfig) -> Source:
    """Return where the data of a configuration come from; of the user's own only what the configuration says."""
    if config.name != OWN:
        return source(config.name)
    title = f"own data: {Path(config.path).name}"
    return Source(
        title=title, data_shape=config.data_shape, num_rows=(0, 0, 0), licence="whatever their owner says"
    )


def load(
    config: DataConfig,
    *,
    data_dir: Path | None = None,
    mirrors: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Return a verified data set.

    Args:
        config: Which one, and how to split it.
        data_dir: Folder of the official IDX files (.gz or unpacked), or a folder with a sub-folder of the
            data set's name. Files that are in neither are downloaded into that sub-folder. Default: the
            user's cache folder.
        mirrors: Addresses to download from in place of the usual ones.
        progress: Told about downloads.

    Raises:
        DataCorrupt: If a file is not the official one.
        DownloadFailed: If a file is absent and no mirror gives it.
        DataMissing: If a file is absent and its folder cannot be written, or own data are not fit.
    """
    if config.name == OWN:
        loaded = split_own(own_data.read(Path(config.path), image_size=config.image_size), config)
    elif config.name == "digits":
        loaded = _load_digits(config.split_seed)
    else:
        loaded = _load_idx(config.name, data_dir or cache_folder(), mirrors, progress)
    return loaded._replace(train=loaded.train[: config.max_train_rows])


def load_labels(
    config: DataConfig,
    *,
    data_dir: Path | None = None,
    mirrors: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> SplitLabels:
    """Return the class of every row that `load` returns for the same configuration; arguments as there.

    Raises:
        LabelsMissing: If the data set has none.
        DataCorrupt: If a file is not the official one.
        DownloadFailed: If a file is absent and no mirror gives it.
        DataMissing: If a file is absent and its folder cannot be written.
    """
    if config.name == OWN:
        raise LabelsMissing(described(config).title)
    if config.name == "digits":
        found = _load_digits_labels(config.split_seed)
    else:
        files = source(config.name).label_files
        train, test = _contents(files, config.name, data_dir or cache_folder(), mirrors, progress)
        of_train, of_test = (parse_labels(content, file=path) for path, content in (train, test))
        found = SplitLabels(of_train[:-_IDX_VALIDATION], of_train[-_IDX_VALIDATION:], of_test)
    return found._replace(train=found.train[: config.max_train_rows])


def cache_folder() -> Path:
    """Return where downloads go: $XDG_CACHE_HOME/vae-serving, or ~/.cache/vae-serving."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vae-serving"


def binarise(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return zeros and ones, float32; a pixel is one with probability pixel / 255, exactly.

    Args:
        pixels: uint8, on the device of the generator.
        generator: Source of the draw. Draw afresh at each visit of a row: a fixed binarisation overfits.

    Example:
        >>> binarise(torch.tensor([0, 255], dtype=torch.uint8), torch.Generator().manual_seed(0))
        tensor([0., 1.])
    """
    # Integers below 255 compare below a pixel in exactly pixel of 255 cases; no rounding, one byte a pixel.
    if pixels.device.type == "cpu":
        threshold = _bytes_below_255(pixels.numel(), generator).view(pixels.shape)
    else:
        shape, device = pixels.shape, pixels.device
        threshold = torch.randint(0, MAX_PIXEL, shape, dtype=torch.uint8, device=device, generator=generator)
    return torch.lt(threshold, pixels, out=torch.empty(pixels.shape, device=pixels.device))


def binarise_rows(pixels: Pixels, *, seed: int, first_row: int = 0) -> Tensor:
    """Return zeros and ones, float32, that depend on the seed and the index of each row alone.

    Args:
        pixels: uint8, shape (n, *data_shape).
        seed: Seed of the evaluation.
        first_row: Index of the first row in its split.
    """
    flat = pixels.reshape(len(pixels), -1)
    unit = uniform(seed, *flat.shape, first_row=first_row, stream=Stream.OBSERVATION).numpy()
    # 255 * unit < pixel, not unit < pixel / 255: exact at both ends.
    return torch.from_numpy((unit * np.float32(MAX_PIXEL) < flat).astype(np.float32)).view(pixels.shape)


def _bytes_below_255(num: int, generator: torch.Generator) -> Tensor:
    """Return integers uniform on [0, 255), uint8, shape (num,): as `torch.randint` does, in a third of the time.

    Random words of eight bytes; those with a byte of 255 are rejected as a whole, which leaves the bytes of the
    others uniform and independent.
    """
    num_words = -(-num // _BYTES)
    num_drawn = num_words + num_words // _WORDS_PER_SPARE + _SPARE_WORDS
    words = torch.empty(num_drawn, dtype=torch.int64).random_(_LOWEST, None, generator=generator)
    # The highest bit of a byte is marked where the complement's byte is zero: there the subtraction borrows.
    marks = words.bitwise_not().sub_(_EACH_ONE).bitwise_and_(words).bitwise_and_(_EACH_HIGHEST)
    kept = words.masked_select(marks == 0).view(torch.uint8)
    if len(kept) < num:
        kept = torch.cat((kept, _bytes_below_255(num - len(kept), generator)))
    return kept[:num]


def load_digits() -> Any:  # noqa: ANN401 - a Bunch, which has no types
    """Return scikit-learn's digits: `data` (1797, 64) in [0, 16], and `target` (1797,)."""
    from sklearn import datasets  # noqa: PLC0415 - half the start of every command, and few need it

    return datasets.load_digits()


def _load_digits(split_seed: int) -> Dataset:
    values = load_digits().data.astype(np.uint8)
    actual = _verified(values, _DIGITS_SHA256, file="scikit-learn digits")
    pixels = np.rint(values * (MAX_PIXEL / _DIGITS_LEVELS)).astype(np.uint8).reshape(-1, 1, 8, 8)
    return _split("digits", pixels, actual, split_seed, num_held_out=_DIGITS_HELD_OUT)


def _load_digits_labels(split_seed: int) -> SplitLabels:
    labels = load_digits().target.astype(np.uint8)
    _verified(labels, _DIGITS_LABELS_SHA256, file="scikit-learn digits, labels")
    return SplitLabels(*_cut(labels, split_seed, num_held_out=_DIGITS_HELD_OUT))


def _verified(values: NDArray[np.uint8], expected: str, *, file: str) -> str:
    """Return the digest of an array if it is the expected one."""
    actual = hashlib.sha256(values.tobytes()).hexdigest()
    if actual != expected:
        raise DataCorrupt(file=file, expected=expected, actual=actual)
    return actual


def split_own(images: OwnImages, config: DataConfig) -> Dataset:
    """Return the user's own rows as a data set: a tenth to validate on, a tenth to test on."""
    pixels = images.pixels
    actual = hashlib.sha256(pixels.tobytes()).hexdigest()
    num_held_out = max(1, round(_OWN_HELD_OUT * len(pixels)))
    dataset = _split(
        f"own: {Path(config.path).name}", pixels, actual, config.split_seed, num_held_out=num_held_out
    )
    return dataset._replace(found=(("layout", images.layout), ("values", images.values)))


def _split(name: str, pixels: Pixels, sha256: str, split_seed: int, *, num_held_out: int) -> Dataset:
    """Shuffle rows by a seed and hold out as many for validation as for the test."""
    train, validation, test = _cut(pixels, split_seed, num_held_out=num_held_out)
    return Dataset(
        name=name,
        train=train,
        validation=validation,
        test=test,
        sha256=sha256,
        split=f"shuffled by seed {split_seed}; first {len(train)} train, then {len(validation)} validation, "
        f"last {len(test)} test",
    )


def _cut(
    rows: NDArray[np.uint8], split_seed: int, *, num_held_out: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Return rows, or labels of rows, of the three splits: which goes where depends on number and seed alone."""
    # Not the stream of binarisation: the place of a row must say nothing about its pixels.
    keys = uniform(split_seed, len(rows), 1, stream=Stream.PRIOR)[:, 0].numpy()
    shuffled = rows[np.argsort(keys, kind="stable")]
    first, second = len(rows) - 2 * num_held_out, len(rows) - num_held_out
    return shuffled[:first], shuffled[first:second], shuffled[second:]


def _load_idx(name: str, data_dir: Path, mirrors: Sequence[str] | None, progress: Progress | None) -> Dataset:
    files = source(name).files
    train, test = _contents(files, name, data_dir, mirrors, progress)
    images, of_test = (parse_images(content, file=path) for path, content in (train, test))
    return Dataset(
        name=name,
        train=images[:-_IDX_VALIDATION],
        validation=images[-_IDX_VALIDATION:],
        test=of_test,
        sha256=files[0].sha256,
        split=f"official; the last {_IDX_VALIDATION} rows of train are validation",
    )


def _contents(
    files: Sequence[RemoteFile],
    name: str,
    data_dir: Path,
    mirrors: Sequence[str] | None,
    progress: Progress | None,
) -> list[tuple[str, bytes]]:
    """Return path and verified content of each file, fetching what is absent."""
    given = source(name).mirrors if mirrors is None else mirrors
    found = []
    for file in files:
        path = _find(file, data_dir, name) or fetch(file, data_dir / name, given, progress=progress)
        found.append((str(path), unpack(path, file)))
    return found


def _find(file: RemoteFile, data_dir: Path, name: str) -> Path | None:
    candidates = [
        folder / f"{file.name}{suffix}" for folder in (data_dir / name, data_dir) for suffix in ("", ".gz")
    ]
    return next((path for path in candidates if path.is_file()), None)

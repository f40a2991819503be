"""Read images as sequences of pixels, ids 0 to 255 row by row: Pathfinder and gray CIFAR-10 of the Long Range Arena.

Pathfinder is a folder as its generator writes it, for each difficulty:

    curv_baseline/metadata/0.npy      lines "imgs/0 sample_0.png 0 LABEL ...": 1 where a path joins both dots
    curv_baseline/imgs/0/sample_0.png

An image belongs to train, valid or test (8 : 1 : 1, as in the Arena) by the hash of its name. CIFAR-10 is the folder
``cifar-10-batches-bin`` of the binary version; the last tenth of its training images is ``valid``, as in the Arena.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megachiar.data.inputs.documents import InvalidDocument, InvalidDocumentLog
from megachiar.data.preprocessing.split import Split
from megachiar.data.storage.regular_file import read_regular
from megachiar.data.tasks.tables import check_folder
from megachiar.data.tasks.task_corpus import Example
from megachiar.errors import UserError, disk_errors

Difficulty = Literal["easy", "intermediate", "hard"]
DIFFICULTIES: dict[Difficulty, str] = {
    "easy": "curv_baseline",
    "intermediate": "curv_contour_length_9",
    "hard": "curv_contour_length_14",
}
"""Difficulty of Pathfinder -> its folder in the Arena's release."""
PIXEL_VALUES = 256
PATHFINDER_PARTS = Split.parse("train=8,valid=1,test=1")
CIFAR_FILES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_PIXELS = 32 * 32
RED_GREEN_BLUE = np.array([0.2989, 0.5870, 0.1140], np.float32)  # of tf.image.rgb_to_grayscale


def pathfinder_files(folder: Path, difficulty: Difficulty) -> list[Path]:
    """Return the metadata files of one difficulty, sorted.

    Raises:
        UserError: ``folder`` is none of Pathfinder.
    """
    check_folder(folder)
    inner = DIFFICULTIES[difficulty]
    for candidate in (folder / inner, folder):
        if files := sorted((candidate / "metadata").glob("*.npy")):
            if candidate == folder and folder.name in set(DIFFICULTIES.values()) - {inner}:
                raise UserError(f"--from {folder}", f"is not {inner}", f"give the folder that holds {inner}")
            return files
    problem = f"holds no {inner}/metadata/*.npy"
    raise UserError(f"--from {folder}", problem, "give the folder of one size, such as lra_release/pathfinder32")


def pathfinder(files: list[Path], log: InvalidDocumentLog) -> Iterator[Example]:
    """Yield the images of ``pathfinder_files``, each with ``tokens``, ``label`` and ``image``, its name.

    An empty image file, of which the release has one, is left out as the Arena leaves it out.

    Raises:
        UserError: pillow is not installed, a file cannot be read, images differ in size, or ``log`` refuses an image.
    """
    sizes: dict[tuple[int, int], Path] = {}
    for file in files:
        root = file.parent.parent
        for number, fields in enumerate(_metadata(file), 1):
            where = f"{file}:{number}"
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                problem = f"{' '.join(fields)[:80]!r} is no folder, file, number and label 0 or 1"
                log.add(InvalidDocument("bad_label", where, problem))
                continue
            name = f"{fields[0]}/{fields[1]}"
            pixels = _gray_pixels(root / name, where, log)
            if pixels is None:
                continue
            sizes.setdefault(pixels.shape, root / name)
            if len(sizes) > 1:
                shapes = " and ".join(f"{height} x {width} ({path})" for (height, width), path in sizes.items())
                raise UserError(where, f"images of two sizes: {shapes}", "give the folder of one size")
            part = PATHFINDER_PARTS.names[PATHFINDER_PARTS.part_of(name.encode())]
            yield part, {"tokens": pixels.reshape(-1).tolist(), "label": int(fields[3]), "image": name}


def _metadata(file: Path) -> Iterator[list[str]]:
    """Yield the fields of each line of a metadata file, which is text, or an array of text that numpy saved."""
    with disk_errors(file, "read"):
        content = read_regular(file)
    try:
        if content.startswith(b"\x93NUMPY"):
            rows = np.load(io.BytesIO(content), allow_pickle=False)
            lines = [" ".join(map(str, np.atleast_1d(row))) for row in np.atleast_1d(rows)]
        else:
            lines = content.decode().splitlines()
    except (ValueError, EOFError, MemoryError, RecursionError) as error:
        raise UserError(file, f"is no metadata of Pathfinder: {error}", "copy the file again") from None
    yield from (line.split() for line in lines if line.strip())


def _gray_pixels(path: Path, where: str, log: InvalidDocumentLog) -> NDArray[np.uint8] | None:
    """Return the gray values of an image, uint8 (height, width); None for one that is left out."""
    try:
        from PIL import Image
    except ImportError:
        remedy = "pip install -c constraints.txt -e '.[images]'"
        raise UserError("megachiar corpus pathfinder", "needs the package pillow", remedy) from None
    try:
        content = read_regular(path)
        if not content:
            log.counts["empty"] += 1  # as the Arena does, whatever --on-error says
            return None
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("L"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        log.add(InvalidDocument("bad_image", where, f"{path} cannot be read as an image: {reason}"))
        return None


def cifar_files(folder: Path) -> list[Path]:
    """Return the files of the binary version of CIFAR-10 in ``folder``.

    Raises:
        UserError: one is missing.
    """
    check_folder(folder)
    inner = folder / "cifar-10-batches-bin"
    root = inner if inner.is_dir() else folder
    missing = next((name for name in CIFAR_FILES if not (root / name).exists()), None)
    if missing is not None:
        remedy = "unpack cifar-10-binary.tar.gz and give its folder cifar-10-batches-bin (not the Python version)"
        raise UserError(f"--from {folder}", f"holds no {missing}", remedy)
    return [root / name for name in CIFAR_FILES]


def cifar10(files: list[Path]) -> Iterator[Example]:
    """Yield the images of ``cifar_files`` in gray, each with ``tokens`` and ``label``, the name of its class.

    Raises:
        UserError: a file cannot be read, or is none of CIFAR-10.
    """
    batches = [(path, _cifar_batch(path)) for path in files]
    training = sum(len(labels) for path, (labels, _) in batches if path.name != CIFAR_FILES[-1])
    number = 0
    for path, (labels, pixels) in batches:
        for label, gray in zip(labels.tolist(), pixels, strict=True):
            is_test = path.name == CIFAR_FILES[-1]
            part = "test" if is_test else "train" if number < training - training // 10 else "valid"
            number += not is_test
            yield part, {"tokens": gray.tolist(), "label": CIFAR_CLASSES[label]}


def _cifar_batch(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return labels (images,) and gray pixels (images, 1024) of one file: a label and 3 colour planes an image."""
    with disk_errors(path, "read"):
        content = read_regular(path)
    size = 1 + 3 * CIFAR_PIXELS
    if not content or len(content) % size:
        problem = f"has {len(content):,} bytes, no multiple of the {size:,} of a label and an image"
        raise UserError(path, problem, "unpack cifar-10-binary.tar.gz again")
    rows = np.frombuffer(content, np.uint8).reshape(-1, size)
    labels = rows[:, 0]
    if labels.max() >= len(CIFAR_CLASSES):
        image = int(np.argmax(labels >= len(CIFAR_CLASSES)))
        raise UserError(path, f"image {image:,} has label {labels[image]}, not 0 to 9", "unpack the archive again")
    return labels, gray_of(rows[:, 1:].reshape(-1, 3, CIFAR_PIXELS))


def gray_of(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the gray values of colour planes (images, 3, pixels) as ``tf.image.rgb_to_grayscale`` gives them."""
    gray = np.einsum("icp,c->ip", planes.astype(np.float32) / 255, RED_GREEN_BLUE)
    return np.minimum(gray * 255.5, 255).astype(np.uint8)

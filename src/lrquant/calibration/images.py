"""Images by name: bundled ones, a folder of files, or a data set on the hub, all converted to RGB.

Images are opened when they are needed, so a folder can contain millions. All of Pillow's modes are converted to RGB:
16-bit greys keep their range, transparent parts become white, and the camera's rotation is applied.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from lrquant.errors import LrquantError, UsageError
from lrquant.zoo import shapes

ZOO_PICTURES = "zoo:shapes"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")


@dataclass(frozen=True)
class Picture:
    """An image that can be opened, and its class: an index, a name (that of a subfolder), or none."""

    load: Callable[[], Image.Image]
    label: int | str | None = None


def as_rgb(image: Image.Image) -> Image.Image:
    """`image` in eight-bit RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # wide greys, which Pillow's own conversion would clip
        values = np.asarray(image, dtype=np.float32)
        most = 65535.0 if image.mode.startswith("I") and values.max(initial=0) > 255 else max(values.max(initial=0), 1)
        return Image.fromarray((values.clip(0, most) * (255 / most)).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def open_picture(path: Path) -> Image.Image:
    """The image in a file.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    try:
        with Image.open(path) as image:
            return as_rgb(image)
    except UnidentifiedImageError:
        raise UsageError(f"{path}: not an image, or a damaged one; remove or replace it") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{path}: the image cannot be read ({reason}); remove or replace it") from None


def pictures(source: str, train: bool, limit: int, seed: int = 0) -> list[Picture]:
    """Up to `limit` pictures of `source`: for calibration (`train`) drawn by `seed`, for evaluation from the start.

    Raises:
        UsageError: no such source, or it contains no images.
        LrquantError: the hub cannot be reached.
    """
    if source == ZOO_PICTURES:
        start = seed * limit if train else 0  # other seeds draw other pictures
        return [
            Picture(partial(_drawn, number), shapes.class_of(shapes.draw_picture(number)[1]))
            for number in shapes.seeds(train, limit, start)
        ]
    path = Path(source)
    if path.is_dir():
        found = list(_in_folder(path))
        if not train:
            return found[:limit]
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
        return [found[index] for index in order[:limit]]
    if path.exists():
        raise UsageError(f"{source}: give a folder of images, not a file")
    if source.count("/") > 1 or source.startswith((".", "/", "zoo:")):
        raise UsageError(f"{source!r} is neither a folder of images, nor {ZOO_PICTURES}, nor a data set on the hub")
    return _on_hub(source, train, limit, seed)


def _drawn(seed: int) -> Image.Image:
    return shapes.draw_picture(seed)[0]


def _in_folder(path: Path) -> Iterator[Picture]:
    """Files in the order of their names; one in a subfolder has the subfolder's name as its class."""
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise UsageError(f"{path}: no image in this folder ({', '.join(SUFFIXES)})")
    for file in files:
        yield Picture(partial(open_picture, file), file.parent.name if file.parent != path else None)


def _on_hub(name: str, train: bool, limit: int, seed: int) -> list[Picture]:
    """Rows of a data set with an image column, streamed, so that only the used ones are downloaded."""
    from datasets import ClassLabel, get_dataset_split_names, load_dataset
    from datasets import Image as ImageColumn

    try:
        splits = get_dataset_split_names(name)
        wanted = ("train",) if train else ("validation", "valid", "val", "test")
        split = next((split for split in wanted if split in splits), splits[0])
        rows: Any = load_dataset(name, split=split, streaming=True)
        columns = rows.features or {}
        image = next((column for column, kind in columns.items() if isinstance(kind, ImageColumn)), None)
        label = next((column for column, kind in columns.items() if isinstance(kind, ClassLabel)), None)
        if image is None:
            raise UsageError(f"data set {name!r} has no image column (columns: {', '.join(columns) or 'none'})")
        if train:
            rows = rows.shuffle(seed=seed, buffer_size=1000)
        taken = list(rows.take(limit))
    except LrquantError:
        raise
    except Exception as error:  # the libraries underneath raise a dozen kinds when the hub is away
        raise LrquantError(
            f"{name!r} is not a local folder, and the hub has no such data set or cannot be reached "
            f"({type(error).__name__}); give a folder of images, or {ZOO_PICTURES}"
        ) from error
    if not taken:
        raise UsageError(f"data set {name!r}: it contains no images")
    return [Picture(partial(as_rgb, row[image]), row[label] if label else None) for row in taken]


def image_samples(processor: Any, source: str, nsamples: int, seed: int) -> list[dict[str, Any]]:
    """Keyword arguments of `nsamples` calls with one image each.

    Raises:
        UsageError: there are fewer images.
    """
    drawn = pictures(source, train=True, limit=nsamples, seed=seed)
    if len(drawn) < nsamples:
        raise UsageError(f"{source}: {len(drawn)} images are not enough for {nsamples} samples")
    return [{"pixel_values": pixels(processor, [picture])} for picture in drawn]


def pixels(processor: Any, chosen: list[Picture]) -> torch.Tensor:
    """The pictures as the model takes them, (pictures, channels, height, width)."""
    return processor(images=[picture.load() for picture in chosen], return_tensors="pt")["pixel_values"]

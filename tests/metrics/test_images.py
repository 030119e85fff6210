from __future__ import annotations

import hashlib
import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from fewstep.metrics import images_fingerprint, reference_images

Write = Callable[[Path], Any]


def pixels(count: int, channels: int = 3, height: int = 6, width: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


def picture(image: torch.Tensor) -> Image.Image:
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def save_folder(folder: Path, images: torch.Tensor) -> Path:
    """Two classes, and files that are no images."""
    for number, image in enumerate(images):
        place = folder / ("a" if number < len(images) // 2 else "b")
        place.mkdir(parents=True, exist_ok=True)
        picture(image).save(place / f"{number:03d}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def save_tar(path: Path, images: torch.Tensor, mode: Any = "w") -> Path:
    """In the folders train and test, in no alphabetic order."""
    with tarfile.open(path, mode) as archive:
        for number in reversed(range(len(images))):
            file = io.BytesIO()
            picture(images[number]).save(file, "png")
            member = tarfile.TarInfo(f"./{'train' if number < 3 else 'test'}/{number:03d}.png")
            member.size = file.tell()
            file.seek(0)
            archive.addfile(member, file)
    return path


def read(source: Any, **options: Any) -> torch.Tensor:
    return torch.cat(list(reference_images(source, **options)))


class Items(Dataset[Any]):
    """What torch asks of a data set, and no more: no end by IndexError."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index % len(self.items)]


@pytest.mark.parametrize("channels", [1, 3])
def test_all_sources_give_the_same_images(tmp_path: Path, channels: int) -> None:
    images = pixels(7, channels)
    arrays = images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "x.npz", arrays)
    sources: list[Any] = [
        save_folder(tmp_path / "folder", images),
        str(tmp_path / "folder"),
        tmp_path / "x.npz",
        images,
        list(images),
        TensorDataset(images, torch.arange(7)),
        Items([(picture(image), 3) for image in images]),
        (picture(image) for image in images),
    ]
    for source in sources:
        assert torch.equal(read(source, batch_size=3), images), source
    for mode, ending in (("w", "tar"), ("w:gz", "tar.gz"), ("w:xz", "tar.xz")):
        path = save_tar(tmp_path / f"x.{ending}", images, mode)
        assert torch.equal(read(path), images.flip(0)), ending
    assert [len(batch) for batch in reference_images(images, batch_size=3)] == [3, 3, 1]
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    assert images_fingerprint(tmp_path / "folder") == images_fingerprint(tmp_path / "x.npz") == digest
    assert images_fingerprint(images.flip(0)) != digest


def test_parts(tmp_path: Path) -> None:
    images = pixels(6, 1)
    folder, tar = save_folder(tmp_path / "folder", images), save_tar(tmp_path / "x.tar", images)
    np.savez(tmp_path / "x.npz", x_train=images[:4, 0].numpy(), x_test=images[4:, 0].numpy(), y=np.arange(6))
    assert torch.equal(read(folder, part="b"), images[3:])
    assert torch.equal(read(tar, part="train"), images[:3].flip(0))
    assert torch.equal(read(tmp_path / "x.npz", part="x_test"), images[4:])


def test_resizing_is_pillows_and_cuts_the_middle(tmp_path: Path) -> None:
    tall = pixels(1, 3, 40, 20)[0]
    picture(tall).save(tmp_path / "tall.png")
    (found,) = read(tmp_path, size=10)
    expected = picture(tall).resize((10, 20), Image.Resampling.BICUBIC).crop((0, 5, 10, 15))
    assert torch.equal(found, torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    assert torch.equal(read([tall], size=10)[0], found)
    # Odd sizes and enlarging.
    assert read([pixels(1, 1, 7, 5)[0], pixels(1, 1, 31, 90)[0]], size=16).shape == (2, 1, 16, 16)


def test_channels_can_be_made_alike() -> None:
    grey, colour = pixels(1, 1)[0], pixels(1, 3)[0]
    found = read([grey, colour], channels=3)
    assert torch.equal(found[0], grey.expand(3, -1, -1))
    assert torch.equal(found[1], colour)
    luma = np.array(picture(colour).convert("L"))
    assert torch.equal(read([grey, colour], channels=1)[1, 0], torch.from_numpy(luma))


def test_palettes_and_bits_are_read_as_colours_and_grey(tmp_path: Path) -> None:
    colour = picture(pixels(1)[0]).quantize(8)
    colour.save(tmp_path / "palette.png")
    assert torch.equal(read(tmp_path)[0], torch.from_numpy(np.array(colour.convert("RGB"))).permute(2, 0, 1))
    (tmp_path / "palette.png").unlink()
    picture(pixels(1, 1)[0]).convert("1").save(tmp_path / "bits.png")
    assert set(read(tmp_path).unique().tolist()) == {0, 255}


def save_truncated(folder: Path) -> Path:
    save_folder(folder, pixels(4, 3, 60, 60))
    file = folder / "b" / "003.png"
    file.write_bytes(file.read_bytes()[:3000])
    return folder


def save_images(*images: Image.Image) -> Write:
    def write(folder: Path) -> Path:
        for number, image in enumerate(images):
            image.save(folder / f"{number}.png")
        return folder

    return write


def save_bytes(name: str, content: bytes) -> Write:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name if name.endswith(("tar", "npz", "txt")) else folder

    return write


def save_arrays(**arrays: Any) -> Write:
    def write(folder: Path) -> Path:
        np.savez(folder / "x.npz", **arrays)
        return folder / "x.npz"

    return write


def cut_tar(folder: Path) -> Path:
    path = save_tar(folder / "x.tar.gz", pixels(6, 3, 60, 60), "w:gz")
    path.write_bytes(path.read_bytes()[:20000])
    return path


def huge_bitmap() -> bytes:
    """A header that promises 100,000 x 100,000 pixels."""
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, *[100_000] * 2, 1, 24, *[0] * 6)


def packed_in_another_way(folder: Path) -> Path:
    """An archive whose packing no reader knows."""
    path = save_arrays(a=np.zeros((2, 8, 8), np.uint8))(folder)
    content = path.read_bytes()
    directory = content.rindex(b"PK\x01\x02")
    for at in (8, directory + 10):
        content = content[:at] + b"\x63\x00" + content[at + 2 :]
    path.write_bytes(content)
    return path


def test_a_grid_beside_its_record_is_no_image_of_the_set(tmp_path: Path) -> None:
    save_images(GREY, GREY)(tmp_path)
    Image.new("RGB", (40, 40)).save(tmp_path / "grid.png")
    with pytest.raises(ValueError, match=r"grid\.png is RGB 40 x 40"):
        read(tmp_path)
    (tmp_path / "record.json").write_text("{}")
    assert len(read(tmp_path)) == 2


GREY, COLOUR = Image.new("L", (8, 6)), Image.new("RGB", (8, 6))
REFUSALS: dict[str, tuple[Write, dict[str, Any], str]] = {
    "empty folder": (lambda folder: folder, {}, "has no images"),
    "no folder": (lambda folder: folder / "x", {}, "x does not exist; give a folder, an image tar or an .npz file"),
    "no sub-folder": (lambda folder: folder, {"part": "x"}, "part 'x': .* has no such sub-folder"),
    "another file": (save_bytes("x.txt", b"text"), {}, "is no folder, image tar or .npz file"),
    "truncated image": (save_truncated, {}, "003.png is not a readable image"),
    "no image": (save_bytes("x.png", b"text"), {}, "x.png is not a readable image: no image format"),
    "too large": (save_bytes("x.bmp", huge_bitmap()), {}, "x.bmp is not a readable image: Image size"),
    "mixed sizes": (
        save_images(GREY, GREY.resize((9, 6))),
        {},
        "0.png is grey 6 x 8, .*1.png is grey 6 x 9; give size",
    ),
    "grey and RGB": (save_images(COLOUR, GREY), {}, "is RGB 6 x 8, .* is grey 6 x 8; give channels=3 or 1"),
    "transparent": (save_images(COLOUR.convert("RGBA")), {}, "0.png has transparency"),
    "16 bits": (save_images(Image.new("I;16", (8, 6))), {}, "pixels of mode I;16; give 8-bit"),
    "broken tar": (save_bytes("x.tar", b"no tar" * 200), {}, "x.tar is not a readable tar"),
    "cut tar": (cut_tar, {}, "is not a readable tar"),
    "broken npz": (save_bytes("x.npz", b"no archive"), {}, "x.npz is not a readable .npz file"),
    "npz of another kind": (packed_in_another_way, {}, "is not a readable .npz file"),
    "several arrays": (save_arrays(a=np.zeros(1), b=np.zeros(1)), {}, "has the arrays a, b; say which by part"),
    "another array": (save_arrays(a=np.zeros(1)), {"part": "b"}, "part 'b': .* has the arrays a"),
    "floats": (save_arrays(a=np.zeros((1, 8, 8))), {}, r"a is float64 \(1, 8, 8\); give uint8"),
    "channels first": (save_arrays(a=np.zeros((2, 3, 8, 8), np.uint8)), {}, r"\(2, 3, 8, 8\); give uint8 \(N, H, W\)"),
    "no items": (lambda _: [], {}, "the data set has no images"),
    "float items": (lambda _: torch.zeros(2, 3, 8, 8), {}, r"item 0 is torch.float32 \(3, 8, 8\); give PIL"),
    "paths as items": (lambda _: ["a.png"], {}, "item 0 is str; give PIL images or uint8 tensors"),
    "no iterable": (lambda _: 3, {}, "source is int; give a path"),
    "part of items": (lambda _: pixels(1), {"part": "x"}, "part 'x' is for folders"),
    "no batch": (lambda _: pixels(1), {"batch_size": 0}, "batch_size 0"),
    "no size": (lambda _: pixels(1), {"size": 0}, "size 0"),
    "two channels": (lambda _: pixels(1), {"channels": 2}, "channels 2"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(tmp_path: Path, name: str) -> None:
    write, options, said = REFUSALS[name]
    with pytest.raises(ValueError, match=said) as caught:
        read(write(tmp_path), **options)
    assert len(str(caught.value).splitlines()) == 1

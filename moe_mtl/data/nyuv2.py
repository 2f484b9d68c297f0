"""NYU Depth V2: 1,449 labelled indoor frames with 13 or 39 semantic classes, depth, and normals derived from the depth.

Paper: Indoor Segmentation and Support Inference from RGBD Images (Silberman et al., ECCV 2012); class sets and splits
of Learning Rich Features from RGB-D Images (Gupta et al., ECCV 2014, arXiv:1407.5736); augmentation in the manner of
MTAN (Liu et al., CVPR 2019, arXiv:1803.10704).
Differs: read from an 8-bit copy, so depth comes in steps of 3.9 cm; class 40 (otherprop) is merged with "unlabelled"
and ignored, so mIoU is not strictly comparable with papers; the normals are pseudo-labels made from the depth
(`normals_from_depth`); scales are drawn from an interval, not from {1, 1.2, 1.5}; colour is jittered too.

The folder `root` holds, packed (`.tar`, read in place) or unpacked (a folder of the same name):

    nyu_images.tar       nyu_images/<i>.jpg     colour, 480x640 (h w), with a white border of 5 to 8 pixels
    nyu_depths.tar       nyu_depths/<i>.png     8 bit, metres = value / 25.5, 0 = missing
    nyu_labels40.tar     nyu_labels40/<i>.png   8 bit, 0..38 = NYU40 class minus one, 39 = unlabelled or otherprop
    train.txt            one frame number per line; the official 795 frames
    test.txt             the official 654
    val_of_train.txt     Gupta's 414 of the 795, for tuning

All three are cut to one box that clears the border (`BOX`), the largest centred one of shape 4:3, then resized: colour
with an antialiasing filter, depth and classes to the nearest pixel, so no depth lies between an object and the wall
behind it. The data has no stated licence: research use only, never ship it.
"""

import io
import math
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moe_mtl.data._depth_normals import normals_from_depth
from moe_mtl.tasks import Task, nearest

FRAME = (480, 640)  # height, width of every file
BOX = (12, 9, 628, 471)  # left, top, right, bottom in pixels: 616x462 (w h), at least 9 from every edge
FOCAL = (518.86, 519.47)  # fx, fy of the colour camera, pixels of the whole frame
CENTRE = (325.58, 253.74)  # cx, cy; the centre of pixel i is at i
DEPTH_STEPS = 25.5  # per metre
UNLABELLED = 39
PARTS = {"nyu_images": "jpg", "nyu_depths": "png", "nyu_labels40": "png"}
LISTS = ("train.txt", "test.txt", "val_of_train.txt")
SPLITS = ("train", "val", "test")
NORMAL_SIZE = (116, 154)  # h, w of the grid the normals are computed on, a quarter of the box

# NYU40 without otherprop, in the order of the label files.
CLASSES_39 = (
    *("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture"),
    *("counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor_mat", "clothes"),
    *("ceiling", "books", "refrigerator", "television", "paper", "towel", "shower_curtain", "box", "whiteboard"),
    *("person", "night_stand", "toilet", "sink", "lamp", "bathtub", "bag", "otherstructure", "otherfurniture"),
)
CLASSES_13 = (
    *("bed", "books", "ceiling", "chair", "floor", "furniture", "objects"),
    *("picture", "sofa", "table", "tv", "wall", "window"),
)
# Class 1..13 of every label 0..38: the usual NYU40-to-13 map.
TO_13 = (
    *(12, 5, 6, 1, 4, 9, 10, 12, 13, 6, 8, 6, 13, 10, 6, 13, 6, 7, 7, 5),
    *(7, 3, 2, 6, 11, 7, 7, 7, 7, 7, 7, 6, 7, 7, 7, 7, 7, 7, 6),
)


@dataclass(frozen=True, kw_only=True)
class NYUv2:
    """The data configuration: which frames, at what size, with which classes.

    Samples are dicts of tensors (h w = `height` `width`):

        image    float32 [3 h w], colour in 0..1
        semseg   int64 [h w], 0..num_classes-1, or the task's ignore_index where unlabelled
        depth    float32 [h w], metres along the optical axis, NaN where missing
        normals  float32 [3 h w], unit, zero where unknown; camera frame: x right, y down, z forward, facing the
                 camera (n . ray < 0). Pseudo-labels, see `normals_from_depth`.

    Frames are decoded on first use, once per process, and kept as bytes (about 0.25 MB each at 96x128). With DataLoader
    workers set `preload`, so that they share what the parent decoded.

    Augmentation draws one number per batch of samples from torch's global generator and everything else from that, so a
    checkpoint that holds the global generator's state resumes to the same pictures when `num_workers=0`. Workers are
    seeded by torch from the global generator at the start of an epoch: then a run resumes exactly only at the start of
    an epoch. "val" and "test", and "train" with `augment=False`, draw nothing and are the same every time.

    Attributes:
        root: the folder described at the top of this module.
        height: h of the samples, pixels.
        width: w of the samples, pixels; 4:3 keeps the shape of things.
        num_classes: 13 or 39.
        augment: whether "train" is cropped, flipped and jittered at random.
        max_scale: a crop shows at least 1 / max_scale of the height and width. Things look up to that much larger.
        jitter: brightness, contrast and saturation are each multiplied by a factor in 1 - jitter .. 1 + jitter.
        tuning: True trains on 381 of the official 795 training frames and validates on the other 414. False trains on
            all 795; there is then no honest validation set and "val" is refused.
        seed: mixed into the augmentation.
        preload: decode a whole split when it is asked for rather than frame by frame.

    Raises:
        ValueError: a size below 8, num_classes other than 13 or 39, max_scale below 1, jitter outside 0..1.
    """

    root: str = ""
    height: int = 96
    width: int = 128
    num_classes: int = 13
    augment: bool = True
    max_scale: float = 1.5
    jitter: float = 0.2
    tuning: bool = False
    seed: int = 0
    preload: bool = False

    def __post_init__(self):
        for name in ("height", "width"):
            if getattr(self, name) < 8:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 8 pixels")
        if self.num_classes not in (13, 39):
            raise ValueError(f"num_classes: got {self.num_classes}, expected 13 or 39")
        if not self.max_scale >= 1:
            raise ValueError(f"max_scale: got {self.max_scale}, expected at least 1 (1: no random crop)")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter: got {self.jitter}, expected 0 (off) to 1")

    def task_list(self) -> tuple[Task, ...]:
        """Semantic segmentation "semseg", "depth" and "normals"."""
        classes = CLASSES_13 if self.num_classes == 13 else CLASSES_39
        return Task.segmentation("semseg", self.num_classes, classes=classes), Task.depth(), Task.normals()

    def intrinsics(self) -> tuple[float, float, float, float]:
        """fx, fy, cx, cy in pixels of a sample that was not augmented; the centre of pixel i is at i."""
        return _intrinsics(self.height, self.width)

    def split(self, name: str) -> datasets.Dataset:
        """The frames of "train", "val" or "test", in the order of their numbers.

        Raises:
            ValueError: an unknown split; "val" without `tuning`; `root` is empty, incomplete, truncated or holds
                something else. A damaged frame is refused when it is decoded. The error names the file.
        """
        if name not in SPLITS:
            raise ValueError(f"split: unknown {name!r}; {nearest(name, SPLITS)}")
        if name == "val" and not self.tuning:
            raise ValueError(
                "split: 'val' is part of the 795 frames NYUv2(tuning=False) trains on, so scores on it would mean "
                "nothing; pass tuning=True (train 381, val 414) to choose settings, or use 'test' for the last word"
            )
        ids = _split_ids(self.root, name, self.tuning)
        load = _Load(config=self, augment=self.augment and name == "train")
        frames = load.frames()
        frames.check(ids)
        if self.preload:
            for i in ids:
                frames[i]
        return datasets.Dataset.from_dict({"id": ids}).with_transform(load)


@dataclass(frozen=True)
class _Load:
    """Turns {"id": [...]} into samples. Small and picklable: `datasets` hashes it and workers receive it."""

    config: NYUv2
    augment: bool

    def frames(self) -> "_Frames":
        """The store to read from. It has room for the largest zoom, so that a crop is never blown up."""
        config, box = self.config, (BOX[3] - BOX[1], BOX[2] - BOX[0])
        scale = config.max_scale if self.augment else 1.0
        sizes = zip((config.height, config.width), box, strict=True)
        height, width = (max(n, min(math.ceil(n * scale), most)) for n, most in sizes)
        return _frames(config.root, height, width, _changed(config.root))

    def __call__(self, batch: Mapping[str, Sequence[int]]) -> dict[str, list[Tensor]]:
        frames = self.frames()
        if self.augment:
            state = int(torch.randint(2**62, ()))
            rng = np.random.default_rng([state, self.config.seed % 2**63])
            samples = [self.sample(frames[i], rng) for i in batch["id"]]
        else:
            samples = [self.sample(frames[i]) for i in batch["id"]]
        return {key: [sample[key] for sample in samples] for key in ("image", "semseg", "depth", "normals")}

    def sample(self, frame: "_Frame", rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        """One sample; augmented when `rng` is given.

        A crop of 1 / s of the frame, resized, is a picture taken with s times the focal length. Scaling the whole scene
        by 1 / s leaves that picture as it is, so depth is divided by s: it is stated for the one camera the model
        believes in, and normals stay. A mirrored scene has its normals' x negated.
        """
        config = self.config
        out_h, out_w = config.height, config.width
        scale, top, left, flip = 1.0, 0.0, 0.0, False
        if rng is not None:
            scale = float(rng.uniform(1.0, config.max_scale))
            top, left = rng.uniform(0.0, 1.0 - 1.0 / scale, size=2)
            flip = bool(rng.integers(2))

        def at(n_in: int, n_out: int, start: float) -> np.ndarray:  # where each of n_out pixels falls among n_in
            places = (start + (np.arange(n_out) + 0.5) / (n_out * scale)) * n_in
            return places.astype(np.int64).clip(0, n_in - 1)

        def nearest_pixels(array: np.ndarray) -> np.ndarray:  # [h w ...] -> [out_h out_w ...]
            rows, columns = at(array.shape[0], out_h, top), at(array.shape[1], out_w, left)
            return array[rows[:, None], columns[::-1] if flip else columns]

        height, width = frame.depth.shape
        right, bottom = (min(start + 1 / scale, 1.0) for start in (left, top))  # rounding must not leave the frame
        box = (left * width, top * height, right * width, bottom * height)
        image = Image.fromarray(frame.image).resize((out_w, out_h), Image.Resampling.BILINEAR, box=box)
        pixels = np.asarray(image, dtype=np.float32)
        normals = nearest_pixels(frame.normals).astype(np.float32)
        if flip:
            pixels = pixels[:, ::-1]
            normals[..., 0] *= -1
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))) / 255
        if rng is not None and config.jitter:
            image = _jitter(image, *rng.uniform(1 - config.jitter, 1 + config.jitter, size=3))
        length = np.linalg.norm(normals, axis=-1, keepdims=True)
        normals = np.divide(normals, length, out=np.zeros_like(normals), where=length > 0)
        return {
            "image": image,
            "semseg": torch.from_numpy(_class_table(config.num_classes)[nearest_pixels(frame.labels)]),
            "depth": torch.from_numpy(_DEPTH_TABLE[nearest_pixels(frame.depth)] / np.float32(scale)),
            "normals": torch.from_numpy(np.ascontiguousarray(normals.transpose(2, 0, 1))),
        }


def _jitter(image: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """Colour [3 h w] in 0..1 made lighter, harder and more vivid by the factors."""
    image = image * brightness
    image = image.mean().lerp(image, contrast)
    return image.mean(dim=0, keepdim=True).lerp(image, saturation).clamp(0, 1)


_DEPTH_TABLE = np.arange(256, dtype=np.float32) / np.float32(DEPTH_STEPS)
_DEPTH_TABLE[0] = np.nan


@lru_cache(maxsize=2)
def _class_table(num_classes: int) -> np.ndarray:
    """The class id of every label code 0..39, int64."""
    ids = np.arange(39) if num_classes == 39 else np.array(TO_13) - 1
    return np.append(ids, Task.segmentation("semseg", num_classes).ignore_index)


def _intrinsics(height: int, width: int) -> tuple[float, float, float, float]:
    """fx, fy, cx, cy after cutting `BOX` and resizing it to height x width."""
    left, top, right, bottom = BOX
    x, y = width / (right - left), height / (bottom - top)
    return FOCAL[0] * x, FOCAL[1] * y, (CENTRE[0] + 0.5 - left) * x - 0.5, (CENTRE[1] + 0.5 - top) * y - 0.5


# --- normals --------------------------------------------------------------------------------------------------------


def _root(root: str) -> Path:
    """The folder, or an error that says what it should hold."""
    holds = ", ".join([f"{part}.tar (or the folder {part})" for part in PARTS] + list(LISTS))
    if not root:
        raise ValueError(f"root: empty; pass --data.root=FOLDER (NYUv2(root=...)), a folder that holds {holds}")
    if not Path(root).is_dir():
        raise ValueError(f"root: {root!r} is not a folder; expected one that holds {holds}")
    return Path(root)


def _read_list(path: Path) -> list[int]:
    """The frame numbers in a split file."""
    if not path.is_file():
        raise ValueError(f"root: {path} is missing; expected a text file with one frame number per line")
    try:
        ids = [int(line) for line in path.read_text().split()]
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"root: {path} should hold one frame number per line: {error}") from None
    if not ids or len(set(ids)) < len(ids) or min(ids) < 0:
        raise ValueError(f"root: {path} should hold distinct frame numbers, at least one, none negative")
    return ids


def _split_ids(root: str, name: str, tuning: bool) -> list[int]:
    """Frame numbers of a split, ascending; refuses lists that leak test frames into training."""
    folder = _root(root)
    train, test, val = (set(_read_list(folder / file)) for file in LISTS)
    if shared := train & test:
        raise ValueError(f"root: train.txt and test.txt in {folder} share {len(shared)} frames, such as {min(shared)}")
    if outside := val - train:
        raise ValueError(f"root: val_of_train.txt in {folder} has frames outside train.txt, such as {min(outside)}")
    chosen = {"train": train - val if tuning else train, "val": val, "test": test}[name]
    if not chosen:
        raise ValueError(f"root: val_of_train.txt in {folder} leaves no frame to train on")
    return sorted(chosen)


class _Part:
    """The files of one of `PARTS`, packed or not. Opens them anew for each read: forked workers share no position."""

    def __init__(self, folder: Path, part: str):
        self.part, self.suffix = part, PARTS[part]
        self.path = folder / part if (folder / part).is_dir() else folder / f"{part}.tar"
        self.spans: dict[str, tuple[Path, int, int]] = {}  # name -> file, first byte, length (-1: to the end)
        if self.path.is_dir():
            self.spans = {f"{part}/{file.name}": (file, 0, -1) for file in self.path.iterdir()}
            return
        if not self.path.is_file():
            raise ValueError(f"root: {self.path} is missing; expected it, or the folder {folder / part}")
        try:
            with tarfile.open(self.path, "r:") as tar:
                members = tar.getmembers()
        except (tarfile.TarError, EOFError) as error:
            holds = f"{part}/<i>.{self.suffix}"
            raise ValueError(f"root: {self.path} is not a whole tar file of {holds} ({error})") from None
        size = self.path.stat().st_size
        self.spans = {m.name.removeprefix("./"): (self.path, m.offset_data, m.size) for m in members if m.isfile()}
        if any(start + length > size for _, start, length in self.spans.values()):
            raise ValueError(f"root: {self.path} is truncated at {size} bytes; copy it again")

    def name(self, i: int) -> str:
        return f"{self.part}/{i}.{self.suffix}"

    def decode(self, i: int, mode: str) -> Image.Image:
        """The picture of frame i, `FRAME` pixels in mode "L" or "RGB"."""
        path, start, length = self.spans[self.name(i)]
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(length)
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
        except (OSError, SyntaxError) as error:  # Pillow's words for foreign, cut and damaged
            raise ValueError(f"root: {self.name(i)} in {self.path} does not decode ({error}); copy it again") from None
        if image.size != FRAME[::-1] or image.mode != mode:
            got, expected = (f"{w}x{h} {m}" for (w, h), m in ((image.size, image.mode), (FRAME[::-1], mode)))
            raise ValueError(f"root: {self.name(i)} in {self.path} is {got}, expected {expected}")
        return image


@dataclass(frozen=True)
class _Frame:
    """A decoded frame, cut to `BOX`: image uint8 [h w 3], depth and labels as coded uint8 [h w], normals float16
    [h w 3] at `NORMAL_SIZE`.
    """

    image: np.ndarray
    depth: np.ndarray
    labels: np.ndarray
    normals: np.ndarray


class _Frames:
    """Frames by number at one size, decoded on first use."""

    def __init__(self, root: str, height: int, width: int):
        folder = _root(root)
        self.parts = {part: _Part(folder, part) for part in PARTS}
        self.size = (width, height)
        self.decoded: dict[int, _Frame] = {}

    def check(self, ids: Sequence[int]) -> None:
        """Refuses a folder that lacks one of these frames."""
        for part in self.parts.values():
            if lacking := [i for i in ids if part.name(i) not in part.spans]:
                raise ValueError(
                    f"root: {part.path} lacks {len(lacking)} of {len(ids)} frames, such as {part.name(lacking[0])}; "
                    "it is truncated or something else"
                )

    def __getitem__(self, i: int) -> _Frame:
        if i not in self.decoded:
            self.decoded[i] = self.decode(i)
        return self.decoded[i]

    def decode(self, i: int) -> _Frame:
        image = self.parts["nyu_images"].decode(i, "RGB")
        depth = self.parts["nyu_depths"].decode(i, "L")
        labels = self.parts["nyu_labels40"].decode(i, "L")
        if (code := np.asarray(labels).max()) > UNLABELLED:
            where = f"{self.parts['nyu_labels40'].name(i)} in {self.parts['nyu_labels40'].path}"
            raise ValueError(f"root: {where} holds code {code}, expected 0 to {UNLABELLED}; it is another coding")
        return _Frame(
            image=np.asarray(image.resize(self.size, Image.Resampling.BOX, box=BOX)),
            depth=np.asarray(depth.resize(self.size, Image.Resampling.NEAREST, box=BOX)),
            labels=np.asarray(labels.resize(self.size, Image.Resampling.NEAREST, box=BOX)),
            normals=_frame_normals(depth),
        )


def _frame_normals(depth: Image.Image) -> np.ndarray:
    """Normals of a whole 8-bit depth frame on a grid of `NORMAL_SIZE`, float16 [h w 3]."""
    height, width = NORMAL_SIZE
    area = depth.convert("F").resize((width, height), Image.Resampling.BOX, box=BOX)
    # A cell that is partly missing (0) comes out nearer than its neighbours and is refused as a jump is.
    metres = torch.from_numpy(np.array(area)) / DEPTH_STEPS
    normals = normals_from_depth(metres, *_intrinsics(height, width), step=1 / DEPTH_STEPS)
    return normals.permute(1, 2, 0).half().numpy()


def _changed(root: str) -> tuple[int, ...]:
    """When each part of a folder was written last: of a folder that was mended nothing is remembered."""
    places = [Path(root) / f"{part}{end}" for part in PARTS for end in ("", ".tar")]
    return tuple(place.stat().st_mtime_ns for place in places if place.exists())


@lru_cache(maxsize=8)
def _frames(root: str, height: int, width: int, changed: tuple[int, ...]) -> _Frames:
    """The frames of a folder at one size, shared by all splits and configurations of this process."""
    return _Frames(root, height, width)

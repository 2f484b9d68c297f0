"""ProcRoom: generated rooms with eight exactly labelled dense-vision tasks, no download and nothing stored.

Every image is a room of five planes with up to six objects (spheres, boxes, cylinders), four kinds of texture, a rug
and a window, seen by one camera. It is rendered from its own seed when it is asked for, so that batch size, order and
workers change nothing, bit for bit, and a data set takes no disk. Labels are read off the geometry, not estimated.

    task      kind            target             meaning
    semseg    segmentation    int64 [h w]        ceiling, floor, wall, rug, window, and 2 shapes x 4 materials
    depth     depth           float32 [h w]      metres along the viewing axis
    normals   normals         float32 [3 h w]    camera frame: x right, y down, z forward; they face the camera
    edges     binary_map      float32 [h w]      another surface, or a bend of it, to the right or below
    texture   binary_map      float32 [h w]      another colour cell or decal to the right or below, not on an edge
    saliency  binary_map      float32 [h w]      objects whose material no other object in view has
    count     classification  int64 []           objects in view, 0 to 6
    scene     classification  int64 []           long or wide room x the floor's material

An object is in view when at least 12 pixels of a 64 x 64 image (the same share of other sizes) show it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_mtl.data._procroom_render import render_scene
from moe_mtl.data._procroom_scene import MATERIALS, NUM_DOMAINS, NUM_OBJECTS, UNIFORMS, Scene, draw_scenes
from moe_mtl.tasks import Task, nearest

if TYPE_CHECKING:
    from datasets import Dataset

# Images of split 2 served to compare recipes while they were made, so the numbers that count come from others.
SPLITS = {"train": 0, "val": 1, "test": 3}
CLASSES = (
    *("ceiling", "floor", "wall", "rug", "window"),
    *(f"{shape}_{material}" for shape in ("round", "boxy") for material in MATERIALS),
)
SCENES = tuple(f"{room}_{material}" for room in ("long", "wide") for material in MATERIALS)
SPLIT_STRIDE = 1 << 40  # image i of split s has index s * SPLIT_STRIDE + i
SCENE, NOISE, LABELS = range(3)  # streams of random numbers: no dial disturbs what another stream draws
CHUNK = 32  # images rendered at once: the arrays stay in the cache


@dataclass(frozen=True, kw_only=True)
class ProcRoom:
    """The configuration of the data set; `task_list()` and `split(name)` are what a training run needs.

    The dials act on what they name and nothing else: the same seed gives the same rooms at every `rho`, `kappa`,
    `noise`, `decoy` or `label_drop`.

    Attributes:
        size: height and width of the images in pixels, at least 8.
        seed: of the whole data set.
        num_train: images of the split "train".
        num_val: images of the split "val".
        num_test: images of the split "test".
        rho: probability that an object has its shape's own material (sphere blobs, box checker, cylinder stripes)
            instead of one of the four at random; at 1 either cue alone gives the class.
        decoy: 0 to 1, strength of smooth stains painted on all surfaces, which look like shading and are not.
        noise: standard deviation of the Gaussian pixel noise, for colours in 0..1.
        max_objects: objects placed in a room at most, 0 to 6.
        label_drop: probability that an image lacks a task's label, drawn per image and task: one number for all
            tasks, or a number per task name (others keep all labels).
        kappa: share of images whose objects are numbered by another rule, told by the hue of the ceiling: 0, 0.25,
            0.5, 0.75 or 1, for so many of the four domains, the last first. An object is class 5 + 4 boxy + material
            where shape leads (the order of `CLASSES`) and 5 + 2 material + boxy where material leads. The pictures
            and what the labels tell stay the same; six of the eight numbers change their meaning, so one mapping
            from appearance to class no longer serves every image and routing by input pays.
        domains: which of the four presets of ceiling hue, lens and light the images are drawn from; training on some
            and testing on others is a domain shift. A domain's rule does not depend on this choice.

    Raises:
        ValueError: a dial is out of its range, or `label_drop` names an unknown task.
    """

    size: int = 64
    seed: int = 0
    num_train: int = 20_000
    num_val: int = 2_000
    num_test: int = 4_000
    rho: float = 0.0
    decoy: float = 0.35
    noise: float = 0.02
    max_objects: int = NUM_OBJECTS
    label_drop: float | dict[str, float] = 0.0
    kappa: float = 0.0
    domains: tuple[int, ...] = tuple(range(NUM_DOMAINS))

    def __post_init__(self):
        if self.size < 8:
            raise ValueError(f"size: got {self.size}, expected at least 8 pixels")
        for name in ("seed", "num_train", "num_val", "num_test", "noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 or more")
        for name in ("rho", "decoy", "kappa"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 to 1")
        if self.kappa * NUM_DOMAINS % 1:
            raise ValueError(f"kappa: got {self.kappa}, expected 0, 0.25, 0.5, 0.75 or 1; whole domains switch")
        if not 0 <= self.max_objects <= NUM_OBJECTS:
            raise ValueError(f"max_objects: got {self.max_objects}, expected 0 to {NUM_OBJECTS}")
        if not self.domains or len(set(self.domains)) < len(self.domains) or set(self.domains) - set(range(4)):
            raise ValueError(f"domains: got {self.domains}, expected distinct numbers out of 0, 1, 2, 3")
        for name, value in self._drops().items():
            if not 0 <= value <= 1:
                raise ValueError(f"label_drop: got {value} for task {name!r}, expected 0 to 1")

    def task_list(self) -> tuple[Task, ...]:
        """The eight tasks of version 1."""
        return (
            Task.segmentation("semseg", len(CLASSES), classes=CLASSES),
            Task.depth("depth"),
            Task.normals("normals"),
            Task.binary_map("edges", metric="edge_f", loss_args={"pos_weight": 4.0}),
            Task.binary_map("texture", metric="edge_f", loss_args={"pos_weight": 4.0}),
            Task.binary_map("saliency", metric="max_f", loss_args={"pos_weight": 4.0}),
            Task.classification("count", NUM_OBJECTS + 1),
            Task.classification("scene", len(SCENES), classes=SCENES),
        )

    def split(self, name: Literal["train", "val", "test"]) -> "Dataset":
        """The images of one split: a `datasets.Dataset` of seeds that renders what is asked for.

        A sample is a dict of tensors: `image` float32 [3 h w] in 0..1 and one target per task, None where
        `label_drop` took it. Ask for whole batches (`ds[[3, 1, 4]]`, or a DataLoader, which does so): they are
        rendered together. The splits of a seed have no image in common, whatever their sizes.

        Raises:
            ValueError: an unknown split.
        """
        if name not in SPLITS:
            raise ValueError(f"name: unknown split {name!r}; {nearest(name, SPLITS)}")
        from datasets import Dataset

        count = getattr(self, f"num_{name}")
        first = SPLITS[name] * SPLIT_STRIDE
        rows = {"seed": [self.seed] * count, "index": list(range(first, first + count))}
        return Dataset.from_dict(rows).with_transform(self._render_rows)

    def render(
        self, index: Sequence[int], *, seed: Sequence[int] | None = None, truth: bool = False
    ) -> dict[str, NDArray]:
        """Images and all labels as NumPy arrays, batch first; nothing is dropped.

        Args:
            index: of each image: 0, 1, ... for train; val and test start at 1 and 3 times `SPLIT_STRIDE`.
            seed: of each image; the data set's when None.
            truth: also return what the labels were made from: `instance` [b h w], `albedo` [b 3 h w], `shading`
                [b h w], and the camera as `focal` [b] (half image widths) and `rotation` [b 3 3] (its columns are
                the camera's right, down and forward in the world of `_procroom_scene.Scene`).
        """
        seed = [self.seed] * len(index) if seed is None else seed
        starts = range(0, max(len(index), 1), CHUNK)
        chunks = [self._render_chunk(seed[i : i + CHUNK], index[i : i + CHUNK], truth) for i in starts]
        return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}

    def draw(self, index: Sequence[int], *, seed: Sequence[int] | None = None) -> Scene:
        """The geometry, textures and lights of images, not rendered; arguments as in `render`."""
        seed = [self.seed] * len(index) if seed is None else seed
        uniform = [_generator(s, i, SCENE).random(UNIFORMS) for s, i in zip(seed, index, strict=True)]
        return draw_scenes(
            np.array(uniform).reshape(-1, UNIFORMS),
            rho=self.rho,
            decoy=self.decoy,
            max_objects=self.max_objects,
            domains=self.domains,
        )

    def _render_chunk(self, seed: Sequence[int], index: Sequence[int], truth: bool) -> dict[str, NDArray]:
        out = render_scene(self.draw(index, seed=seed), self.size, kappa=self.kappa, truth=truth)
        if self.noise:
            for image, s, i in zip(out["image"], seed, index, strict=True):
                image += np.float32(self.noise) * _generator(s, i, NOISE).standard_normal(image.shape, np.float32)
            np.clip(out["image"], 0.0, 1.0, out=out["image"])
        return out

    def _render_rows(self, rows: Mapping[str, Sequence[int]]) -> dict[str, Tensor | list[Tensor | None]]:
        """What `datasets` calls with the rows of a batch; it takes the entries apart along the first axis."""
        batch: dict[str, Tensor | list[Tensor | None]] = {
            key: torch.from_numpy(value) for key, value in self.render(rows["index"], seed=rows["seed"]).items()
        }
        drops = self._drops()
        if any(drops.values()):
            pairs = zip(rows["seed"], rows["index"], strict=True)
            chance = [_generator(s, i, LABELS).random(len(drops)) for s, i in pairs]
            for column, (name, probability) in enumerate(drops.items()):
                if probability:
                    kept = [draws[column] >= probability for draws in chance]
                    batch[name] = [label if keep else None for label, keep in zip(batch[name], kept, strict=True)]
        return batch

    def _drops(self) -> dict[str, float]:
        """The probability of a missing label for every task, in the order of `task_list()`."""
        names = [task.name for task in self.task_list()]
        if not isinstance(self.label_drop, Mapping):
            return dict.fromkeys(names, float(self.label_drop))
        for name in self.label_drop:
            if name not in names:
                raise ValueError(f"label_drop: unknown task {name!r}; {nearest(name, names)}")
        return {name: float(self.label_drop.get(name, 0.0)) for name in names}


def _generator(seed: int, index: int, stream: int) -> np.random.Generator:
    """The random numbers of one image for one purpose; no two (seed, index, stream) share any."""
    split, number = divmod(int(index), SPLIT_STRIDE)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(int(seed), spawn_key=(split, number, stream))))

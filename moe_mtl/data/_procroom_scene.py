"""What a ProcRoom image shows, as numbers: the scene tables the renderer reads, and how they are drawn.

The world frame is the camera's frame turned upright: origin at the camera, x right, y down, z forward along the room,
metres. The room is x in [left, right], y in [ceiling, floor], z up to `front`; the wall behind is never in view.
Surfaces are numbered 0 to 4 (ceiling, floor, left, right and front wall), objects 5 to 10, one per slot.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CEILING, FLOOR, LEFT, RIGHT, FRONT = range(5)
NUM_PLANES, NUM_OBJECTS = 5, 6
NUM_INSTANCES = NUM_PLANES + NUM_OBJECTS
SPHERE, BOX, CYLINDER = range(3)
SHAPES = (SPHERE, SPHERE, BOX, BOX, CYLINDER, CYLINDER)  # of the six slots; fixed, so that a batch has no branches
MATERIALS = ("plain", "stripes", "checker", "blobs")
PLAIN, STRIPES, CHECKER, BLOBS = range(4)
CANONICAL = (BLOBS, CHECKER, STRIPES)  # the material `rho` ties to a sphere, a box, a cylinder
NUM_DOMAINS = 4

# Per domain: ceiling hue (turns), field of view (degrees, low and high), light azimuth (degrees), light colour.
HUES = np.array([0.12, 0.37, 0.60, 0.86])
FOVS = np.array([[58.0, 72.0], [62.0, 78.0], [58.0, 78.0], [64.0, 76.0]])
AZIMUTHS = np.array([-150.0, -60.0, 60.0, 150.0])
TINTS = np.array([[1.0, 0.97, 0.90], [0.97, 1.0, 0.96], [0.93, 0.97, 1.0], [1.0, 0.95, 0.98]])

NEAREST = 1.6  # objects stand at least this far down the room, metres: the camera is never inside one
TWO_PI = 2.0 * np.pi


@dataclass(kw_only=True)
class Scene:
    """b scenes, every array batch first; lengths in metres, angles in radians.

    Attributes:
        focal: focal length in half image widths, [b].
        rotation: camera to world, [b, 3, 3]; the columns are the camera's right, down and forward.
        planes: ceiling y, floor y, left x, right x, front z, [b, 5].
        present: bool [b, 6], which slots hold an object.
        center: middle of each object, [b, 6, 3].
        extent: sphere (r, r, r); box half sizes; cylinder (radius, half height, radius), [b, 6, 3].
        turn: rotation of each instance about the vertical, [b, 11]; boxes and textures follow it.
        material: index into MATERIALS per instance, [b, 11].
        colors: the two colours of each instance's texture, [b, 11, 2, 3], 0 to 1.
        stripe: direction of the stripes in the instance's turned frame, [b, 11, 3].
        frequency: radians per metre of the texture, [b, 11].
        phase: of the three axes and the stripes, [b, 11, 4].
        decals: rug (x, z, half width, half depth, turn) and window (x, y, half width, half height, 0), [b, 2, 5].
        decal_present: bool [b, 2].
        decal_colors: border and middle of rug and window, [b, 2, 2, 3].
        decoy: wave vector of the painted shading, [b, 3]; its phase, [b]; its amplitude.
        light: unit vector towards the light, [b, 3]; its colour, [b, 3]; ambient, directional and head share, [b, 3].
        domain: int64 [b], 0 to 3.
        aspect: int64 [b], 0 for a long room, 1 for a wide one.
    """

    focal: NDArray
    rotation: NDArray
    planes: NDArray
    present: NDArray
    center: NDArray
    extent: NDArray
    turn: NDArray
    material: NDArray
    colors: NDArray
    stripe: NDArray
    frequency: NDArray
    phase: NDArray
    decals: NDArray
    decal_present: NDArray
    decal_colors: NDArray
    decoy_wave: NDArray
    decoy_phase: NDArray
    decoy: float
    light: NDArray
    light_color: NDArray
    light_mix: NDArray
    domain: NDArray
    aspect: NDArray

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray) and value.dtype == np.float64:
                setattr(self, name, value.astype(np.float32))


class _Draws:
    """Hands out the columns of [b, d] uniform numbers in order: a dial never shifts what a later line draws."""

    def __init__(self, uniform: NDArray):
        self.columns, self.used = uniform, 0

    def __call__(self, *shape: int, low: float | NDArray = 0.0, high: float | NDArray = 1.0) -> NDArray:
        """Uniform [b, *shape] between `low` and `high`, which broadcast."""
        count = int(np.prod(shape))
        if self.used + count > self.columns.shape[1]:
            raise ValueError(f"uniform: {self.columns.shape[1]} columns are too few, scenes need more")
        taken = self.columns[:, self.used : self.used + count].reshape(len(self.columns), *shape)
        self.used += count
        return low + (high - low) * taken


def hsv_to_rgb(hue: NDArray, saturation: NDArray, value: NDArray) -> NDArray:
    """Colours [..., 3] from hue in turns, saturation and value in 0..1."""
    sector = (np.array([5.0, 3.0, 1.0]) + 6.0 * hue[..., None]) % 6.0
    ramp = np.clip(np.minimum(sector, 4.0 - sector), 0.0, 1.0)
    return value[..., None] * (1.0 - saturation[..., None] * ramp)


def camera_rotation(yaw: NDArray, pitch: NDArray) -> NDArray:
    """Camera to world [b, 3, 3]: `yaw` turns right, `pitch` looks up, radians [b]."""
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    right = np.stack([cy, np.zeros_like(cy), -sy], axis=-1)
    down = np.stack([sp * sy, cp, sp * cy], axis=-1)
    forward = np.stack([sy * cp, -sp, cy * cp], axis=-1)
    return np.stack([right, down, forward], axis=-1)


UNIFORMS = 256  # columns `draw_scenes` may use


def draw_scenes(uniform: NDArray, *, rho: float, decoy: float, max_objects: int, domains: tuple[int, ...]) -> Scene:
    """Scenes from uniform numbers [b, UNIFORMS]; rows do not influence each other. For the dials see `ProcRoom`."""
    draw = _Draws(uniform)
    b = len(uniform)

    domain = np.asarray(domains)[(draw() * len(domains)).astype(np.int64)]
    fov = np.radians(draw(low=FOVS[domain, 0], high=FOVS[domain, 1]))
    yaw = np.radians(draw(low=-28.0, high=28.0))
    pitch = np.radians(draw(low=-22.0, high=6.0))
    eye = draw(low=1.1, high=1.8)

    # Two kinds of room with a gap between them (width over depth at most 0.67, at least 0.9): the label is decidable.
    aspect = (draw() < 0.5).astype(np.int64)
    width = np.where(aspect == 0, draw(low=3.0, high=4.0), draw(low=4.5, high=6.0))
    front = np.where(aspect == 0, draw(low=6.0, high=8.0), draw(low=4.0, high=5.0))
    height = draw(low=2.3, high=3.2)
    offset = draw(low=-0.25, high=0.25) * width
    left, right, above = -0.5 * width - offset, 0.5 * width - offset, eye - height
    planes = np.stack([above, eye, left, right, front], axis=-1)
    # The ceiling's hue tells the domain, so some of the ceiling must be in view: look up until it is.
    side = np.where(yaw > 0, right, -left) / np.maximum(np.abs(np.sin(yaw)), 1e-6)
    ahead = np.minimum(front / np.cos(yaw), side)
    pitch = np.maximum(pitch, np.arctan2(-above, ahead) - 0.5 * fov + np.radians(5.0))

    # One object per cell of a 3 x 2 grid on the floor, dealt at random: nothing intersects.
    cell = np.argsort(draw(NUM_OBJECTS), axis=1)
    column, row = cell % 3, cell // 3
    cell_x, cell_z = ((width - 0.1) / 3)[:, None], ((front - NEAREST - 0.1) / 2)[:, None]
    reach = np.minimum(np.minimum(cell_x, cell_z) / 2, 0.75) * draw(NUM_OBJECTS, low=0.6)  # radius of the footprint
    x = left[:, None] + 0.05 + (column + 0.5) * cell_x + draw(NUM_OBJECTS, low=-1.0) * (cell_x / 2 - reach)
    z = NEAREST + (row + 0.5) * cell_z + draw(NUM_OBJECTS, low=-1.0) * (cell_z / 2 - reach)
    slant = draw(NUM_OBJECTS, low=np.pi / 6, high=np.pi / 3)
    tall = draw(NUM_OBJECTS)
    shape = np.array(SHAPES)
    box = np.stack([reach * np.cos(slant), 0.18 + 0.55 * tall, reach * np.sin(slant)], axis=-1)
    round_ = np.stack([0.8 * reach, 0.2 + 0.65 * tall, 0.8 * reach], axis=-1)
    ball = np.stack([reach] * 3, axis=-1)
    extent = np.where((shape == SPHERE)[:, None], ball, np.where((shape == BOX)[:, None], box, round_))
    center = np.stack([x, eye[:, None] - extent[..., 1], z], axis=-1)
    on = draw(NUM_OBJECTS) < draw(1, low=0.2, high=1.0)
    order = np.argsort(np.argsort(np.where(on, draw(NUM_OBJECTS), 2.0), axis=1), axis=1)
    present = on & (order < max_objects)

    material = np.zeros((b, NUM_INSTANCES), np.int64)
    material[:, FLOOR] = (draw() * 4).astype(np.int64)
    material[:, LEFT : FRONT + 1] = np.where(draw(1) < 0.4, STRIPES, PLAIN)
    tied = draw(NUM_OBJECTS) < rho
    free = (draw(NUM_OBJECTS) * 4).astype(np.int64)
    material[:, NUM_PLANES:] = np.where(tied, np.array(CANONICAL)[shape], free)

    turn = np.zeros((b, NUM_INSTANCES))
    turn[:, FLOOR] = draw(low=-0.4, high=0.4) + np.where(draw() < 0.5, np.pi / 2, 0.0)
    turn[:, NUM_PLANES:] = draw(NUM_OBJECTS, high=TWO_PI)
    stripe = np.zeros((b, NUM_INSTANCES, 3))
    stripe[:, [FLOOR, FRONT], 0] = 1.0
    stripe[:, [LEFT, RIGHT], 2] = 1.0
    stripe[:, NUM_PLANES:] = draw(NUM_OBJECTS, 3, low=-0.5, high=0.5)
    stripe[:, NUM_PLANES:, 1] = 1.0
    # Periods: about one footprint radius on objects, so that a ball shows two; about a metre on the room.
    frequency = TWO_PI / draw(NUM_INSTANCES, low=0.9, high=1.4)
    frequency[:, NUM_PLANES:] /= 0.9 * reach
    phase = draw(NUM_INSTANCES, 4, high=TWO_PI)
    phase[:, FLOOR, 1] = 0.5 - frequency[:, FLOOR] * eye  # y is constant on a floor: keeps its blobs from vanishing

    hue, saturation, value = draw(NUM_INSTANCES), draw(NUM_INSTANCES), draw(NUM_INSTANCES)
    hue[:, CEILING] = HUES[domain] + 0.09 * (hue[:, CEILING] - 0.5)
    saturation[:, CEILING] = 0.5 + 0.25 * saturation[:, CEILING]
    value[:, CEILING] = 0.8 + 0.2 * value[:, CEILING]
    hue[:, FLOOR] = 0.03 + 0.12 * hue[:, FLOOR]
    saturation[:, FLOOR] = 0.15 + 0.4 * saturation[:, FLOOR]
    value[:, FLOOR] = 0.45 + 0.3 * value[:, FLOOR]
    for table, low, high in ((hue, 0.0, 1.0), (saturation, 0.03, 0.18), (value, 0.65, 0.9)):
        table[:, LEFT : FRONT + 1] = low + (high - low) * table[:, LEFT : LEFT + 1]
    saturation[:, NUM_PLANES:] = 0.35 + 0.6 * saturation[:, NUM_PLANES:]
    value[:, NUM_PLANES:] = 0.6 + 0.35 * value[:, NUM_PLANES:]
    # The second colour is clearly darker (on walls slightly), and on objects of another hue.
    darker = draw(NUM_INSTANCES, low=0.3, high=0.5)
    darker[:, :FLOOR] = 1.0
    darker[:, LEFT : FRONT + 1] = 0.7 + 0.5 * (darker[:, LEFT : LEFT + 1] - 0.3)
    shift = draw(NUM_INSTANCES, low=-0.3, high=0.3)
    shift[:, :NUM_PLANES] = 0.0
    colors = np.stack([hsv_to_rgb(hue, saturation, value), hsv_to_rgb(hue + shift, saturation, value * darker)], axis=2)

    rug = [
        draw(low=0.6 * left, high=0.6 * right),
        draw(low=1.8, high=0.8 * front),
        draw(low=0.6, high=1.3),
        draw(low=0.5, high=1.0),
        draw(high=np.pi),
    ]
    half = draw(low=0.4, high=0.9)
    sill, tall = draw(low=0.7, high=1.1), draw(low=0.7, high=1.1)  # height of the lower frame, height of the opening
    middle = draw(low=left + half + 0.1, high=right - half - 0.1)
    window = [middle, eye - sill - tall / 2, half, tall / 2, np.zeros(b)]
    decals = np.stack([np.stack(rug, axis=-1), np.stack(window, axis=-1)], axis=1)
    decal_present = draw(2) < np.array([0.7, 0.8])
    rug_hue, rug_saturation, rug_value = draw(), draw(low=0.4, high=0.8), draw(low=0.35, high=0.8)
    border = hsv_to_rgb(rug_hue + 0.5, rug_saturation, 0.5 * rug_value)
    frame = hsv_to_rgb(np.full(b, 0.1), np.full(b, 0.1), draw(low=0.25, high=0.95))
    sky = hsv_to_rgb(draw(low=0.52, high=0.6), draw(low=0.1, high=0.45), np.full(b, 1.0))
    decal_colors = np.stack(
        [np.stack([border, hsv_to_rgb(rug_hue, rug_saturation, rug_value)], axis=1), np.stack([frame, sky], axis=1)],
        axis=1,
    )

    wave = draw(3, low=-1.0)
    wave *= (TWO_PI / draw(low=1.5, high=3.0) / np.sqrt(np.square(wave).sum(axis=1) + 1e-6))[:, None]
    azimuth = np.radians(AZIMUTHS[domain] + draw(low=-30.0, high=30.0))
    elevation = np.radians(draw(low=30.0, high=70.0))
    light = np.stack(
        [np.cos(elevation) * np.sin(azimuth), -np.sin(elevation), np.cos(elevation) * np.cos(azimuth)], axis=-1
    )
    mix = np.stack([draw(low=0.4, high=0.55), draw(low=0.55, high=0.8), draw(low=0.2, high=0.4)], axis=-1)
    decoy_phase = draw(high=TWO_PI)
    return Scene(
        focal=1.0 / np.tan(0.5 * fov),
        rotation=camera_rotation(yaw, pitch),
        planes=planes,
        present=present,
        center=center,
        extent=extent,
        turn=turn,
        material=material,
        colors=colors,
        stripe=stripe,
        frequency=frequency,
        phase=phase,
        decals=decals,
        decal_present=decal_present,
        decal_colors=decal_colors,
        decoy_wave=wave,
        decoy_phase=decoy_phase,
        decoy=decoy,
        light=light,
        light_color=TINTS[domain],
        light_mix=mix,
        domain=domain,
        aspect=aspect,
    )

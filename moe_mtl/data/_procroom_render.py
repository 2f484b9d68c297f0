"""Casts one ray per pixel into ProcRoom scenes and reads every label off the hit: float32 NumPy, b images at once.

A camera ray is (x / f, y / f, 1), so the ray parameter is the z-depth itself. Everything is elementwise over [b, h w]
(no matrix products, no sums over pixels in floating point): an image comes out bit-equal in any batch.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_mtl.data._procroom_scene import (
    BOX,
    CEILING,
    CHECKER,
    FLOOR,
    FRONT,
    LEFT,
    NUM_DOMAINS,
    NUM_INSTANCES,
    NUM_OBJECTS,
    NUM_PLANES,
    PLAIN,
    RIGHT,
    SHAPES,
    SPHERE,
    STRIPES,
    Scene,
)

# Normals of the five planes, into the room.
PLANE_NORMALS = np.array([[0, 1, 0], [0, -1, 0], [1, 0, 0], [-1, 0, 0], [0, 0, -1]], np.float32)
CREASE = np.float32(0.75)  # cosine between neighbouring normals below which the surface counts as bent
TINY = np.float32(1e-12)

Planes = tuple[NDArray, NDArray, NDArray]  # the x, y and z parts of one vector per pixel, each [b, h w]


@dataclass(kw_only=True)
class Hits:
    """Where the rays of b images of n pixels end.

    Attributes:
        depth: z-depth in metres, [b, n].
        instance: int64 [b, n], 0 to 10.
        normal: world frame, unit, facing the camera, three of [b, n].
        ray: world direction per unit of depth, three of [b, n]; the hit is at depth * ray.
    """

    depth: NDArray
    instance: NDArray
    normal: Planes
    ray: Planes

    @property
    def points(self) -> Planes:
        """World position of every hit, metres, three of [b, n]."""
        x, y, z = self.ray
        return x * self.depth, y * self.depth, z * self.depth


def pixel_rays(scene: Scene, size: int) -> Planes:
    """World direction of the ray through the middle of every pixel, per unit of z-depth, three of [b, size * size]."""
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(2.0 / size) - np.float32(1.0)
    across, along = np.tile(axis, size) / scene.focal[:, None], np.repeat(axis, size) / scene.focal[:, None]
    right, down, forward = (scene.rotation[:, :, i, None] for i in range(3))
    parts = [right[:, i] * across + down[:, i] * along + forward[:, i] for i in range(3)]
    # A ray parallel to an axis would divide by zero; 1e-12 of a metre sideways is no difference.
    x, y, z = (np.where(np.abs(part) < TINY, TINY, part) for part in parts)
    return x, y, z


def _hit_sphere(ray: Planes, center: NDArray, extent: NDArray) -> NDArray:
    """Depth of the first hit of each ray [b, n] with one sphere per image, infinite for a miss."""
    x, y, z = ray
    cx, cy, cz = (center[:, i, None] for i in range(3))
    a = x * x + y * y + z * z
    half_b = x * cx + y * cy + z * cz
    c = cx * cx + cy * cy + cz * cz - extent[:, 0, None] ** 2
    root = half_b * half_b - a * c
    depth = (half_b - np.sqrt(np.maximum(root, 0.0))) / a
    return np.where((root > 0) & (depth > 0), depth, np.inf)


def _turned(ray: Planes, cos: NDArray, sin: NDArray) -> Planes:
    x, y, z = ray
    return x * cos - z * sin, y, x * sin + z * cos


def _hit_box(ray: Planes, center: NDArray, extent: NDArray, cos: NDArray, sin: NDArray) -> tuple[NDArray, NDArray]:
    """As `_hit_sphere`, for a box turned about the vertical, and the axis (0, 1, 2) of the face that was hit."""
    near, far = np.full_like(ray[0], -np.inf), np.full_like(ray[0], np.inf)
    axis = np.zeros(near.shape, np.int8)
    local_center = _turned((center[:, 0, None], center[:, 1, None], center[:, 2, None]), cos, sin)
    for i, (direction, middle) in enumerate(zip(_turned(ray, cos, sin), local_center, strict=True)):
        direction = np.where(np.abs(direction) < TINY, TINY, direction)
        half = np.copysign(extent[:, i, None], direction)
        enter, leave = (middle - half) / direction, (middle + half) / direction
        axis = np.where(enter > near, np.int8(i), axis)
        near, far = np.maximum(near, enter), np.minimum(far, leave)
    return np.where((near < far) & (near > 0), near, np.inf), axis


def _hit_cylinder(ray: Planes, center: NDArray, extent: NDArray) -> tuple[NDArray, NDArray]:
    """As `_hit_sphere`, for an upright cylinder with a lid, and whether the lid was hit."""
    x, y, z = ray
    cx, cy, cz = (center[:, i, None] for i in range(3))
    radius, half = extent[:, 0, None], extent[:, 1, None]
    a = x * x + z * z
    half_b = x * cx + z * cz
    c = cx * cx + cz * cz - radius * radius
    root = half_b * half_b - a * c
    side = (half_b - np.sqrt(np.maximum(root, 0.0))) / a
    side = np.where((root > 0) & (side > 0) & (np.abs(side * y - cy) <= half), side, np.inf)
    lid = (cy - half) / y  # a ray that comes from below meets the side first: objects stand on the floor
    away = np.square(lid * x - cx) + np.square(lid * z - cz)
    lid = np.where((lid > 0) & (away < radius * radius), lid, np.inf)
    return np.minimum(side, lid), lid < side


def cast(scene: Scene, size: int) -> Hits:
    """First hit of every pixel of [b] scenes at size x size."""
    ray = pixel_rays(scene, size)
    x, y, z = ray
    up, floor, left, right, front = (scene.planes[:, i, None] for i in range(NUM_PLANES))
    upright, sideways = np.where(y > 0, floor, up) / y, np.where(x > 0, right, left) / x
    ahead = np.where(z > 0, front / z, np.inf)
    depth = np.minimum(np.minimum(upright, sideways), ahead)
    instance = np.where(y > 0, FLOOR, CEILING)
    instance = np.where(sideways < upright, np.where(x > 0, RIGHT, LEFT), instance)
    instance = np.where(ahead <= depth, FRONT, instance)
    normal = [PLANE_NORMALS[:, i][instance] for i in range(3)]

    for slot, shape in enumerate(SHAPES):
        if not scene.present[:, slot].any():
            continue
        center, extent = scene.center[:, slot], scene.extent[:, slot]
        cos, sin = (f(scene.turn[:, NUM_PLANES + slot, None]) for f in (np.cos, np.sin))
        if shape == SPHERE:
            distance, face = _hit_sphere(ray, center, extent), np.empty(0)
        elif shape == BOX:
            distance, face = _hit_box(ray, center, extent, cos, sin)
        else:
            distance, face = _hit_cylinder(ray, center, extent)
        image, pixel = np.nonzero((distance < depth) & scene.present[:, slot, None])
        hit = distance[image, pixel]
        depth[image, pixel] = hit
        instance[image, pixel] = NUM_PLANES + slot
        # The few pixels an object covers, as flat lists.
        direction = [part[image, pixel] for part in ray]
        if shape == SPHERE:
            radius = extent[image, 0]
            parts = [(hit * direction[i] - center[image, i]) / radius for i in range(3)]
        elif shape == BOX:
            side = face[image, pixel]
            c, s = cos[image, 0], sin[image, 0]
            local = _turned((direction[0], direction[1], direction[2]), c, s)
            u, v, w = (np.where(side == i, -np.copysign(np.float32(1), local[i]), np.float32(0)) for i in range(3))
            parts = [u * c + w * s, v, w * c - u * s]
        else:
            lid = face[image, pixel]
            radius = extent[image, 0]
            parts = [
                np.where(lid, np.float32(0), (hit * direction[0] - center[image, 0]) / radius),
                np.where(lid, np.float32(-1), np.float32(0)),
                np.where(lid, np.float32(0), (hit * direction[2] - center[image, 2]) / radius),
            ]
        for out, part in zip(normal, parts, strict=True):
            out[image, pixel] = part
    return Hits(depth=depth, instance=instance, normal=(normal[0], normal[1], normal[2]), ray=ray)


def _gather(table: NDArray, instance: NDArray) -> NDArray:
    """Rows of a per-image table [b, k, ...] at indices [b, n]: [b, n, ...]."""
    flat = instance + table.shape[1] * np.arange(len(table))[:, None]
    return table.reshape(table.shape[0] * table.shape[1], *table.shape[2:]).take(flat, axis=0)


def texture_cells(scene: Scene, hits: Hits) -> tuple[NDArray, NDArray]:
    """Which of its two colours the material shows at each hit (bool [b, n]), and the decal there (0, 1 rug, 2 window).

    Inside a decal the cell is its border (False) or its middle (True).
    """
    x, y, z = hits.points
    material = _gather(scene.material, hits.instance)
    # Only textured pixels need sines.
    image, pixel = np.nonzero(material != PLAIN)
    which = hits.instance[image, pixel]
    kind = material[image, pixel]
    x_, y_, z_ = x[image, pixel], y[image, pixel], z[image, pixel]
    # Objects carry their texture with them: measured from their middle.
    middle = np.zeros((len(scene.center), NUM_INSTANCES, 3), np.float32)
    middle[:, NUM_PLANES:] = scene.center
    cx, cy, cz = middle[image, which].T
    cos, sin = np.cos(scene.turn)[image, which], np.sin(scene.turn)[image, which]
    u, v, w = _turned((x_ - cx, y_ - cy, z_ - cz), cos, sin)
    scale = scene.frequency[image, which]
    phase = scene.phase[image, which]
    su, sv, sw = (np.sin(scale * part + phase[:, i]) for i, part in enumerate((u, v, w)))
    tilt = scene.stripe[image, which]
    band = np.sin(scale * (u * tilt[:, 0] + v * tilt[:, 1] + w * tilt[:, 2]) + phase[:, 3])
    score = np.where(kind == STRIPES, band, np.where(kind == CHECKER, su * sv * sw, su + sv + sw - np.float32(0.5)))
    cell = np.zeros(material.shape, bool)
    cell[image, pixel] = score > 0

    decal = np.zeros(material.shape, np.int8)
    for number, surface in ((1, FLOOR), (2, FRONT)):
        image, pixel = np.nonzero((hits.instance == surface) & scene.decal_present[:, number - 1, None])
        mid_a, mid_b, half_a, half_b, _ = scene.decals[image, number - 1].T
        a = x[image, pixel] - mid_a
        b = (z if surface == FLOOR else y)[image, pixel] - mid_b
        cos, sin = (f(scene.decals[:, number - 1, 4])[image] for f in (np.cos, np.sin))
        reach = np.maximum(np.abs(a * cos - b * sin) / half_a, np.abs(a * sin + b * cos) / half_b)
        inside = reach < 1
        image, pixel = image[inside], pixel[inside]
        decal[image, pixel] = number
        cell[image, pixel] = reach[inside] < np.float32(0.75)
    return cell, decal


def shade(scene: Scene, hits: Hits, cell: NDArray, decal: NDArray) -> tuple[NDArray, NDArray]:
    """Albedo [b, 3, n] (with the painted shading) and shading [b, n]: image = (albedo shading light colour)^0.75."""
    b = len(hits.depth)
    tables = np.concatenate([scene.colors, scene.decal_colors], axis=1).reshape(b, 2 * (NUM_INSTANCES + 2), 3)
    entry = np.where(decal > 0, NUM_INSTANCES - 1 + decal, hits.instance)
    albedo = np.moveaxis(_gather(tables, 2 * entry + cell), 2, 1)
    x, y, z = hits.points
    wave = scene.decoy_wave[:, :, None]
    paint = np.sin(wave[:, 0] * x + wave[:, 1] * y + wave[:, 2] * z + scene.decoy_phase[:, None])
    decoy = np.float32(scene.decoy)
    albedo = albedo * ((1 + decoy * paint) / (1 + decoy))[:, None]

    rx, ry, rz = hits.ray
    nx, ny, nz = hits.normal
    lx, ly, lz = (scene.light[:, i, None] for i in range(3))
    ambient, direct, head = (scene.light_mix[:, i, None] for i in range(3))
    facing = -(nx * rx + ny * ry + nz * rz) / np.sqrt(rx * rx + ry * ry + rz * rz)
    shading = ambient + direct * np.maximum(nx * lx + ny * ly + nz * lz, 0.0) + head * facing
    # Objects darken the floor around them: without contact shadows they seem to float.
    image, pixel = np.nonzero(hits.instance == FLOOR)
    fx, fz, dim = x[image, pixel], z[image, pixel], np.ones(len(image), np.float32)
    for slot in range(NUM_OBJECTS):
        middle, present = scene.center[:, slot], scene.present[:, slot].astype(np.float32)
        radius = np.maximum(scene.extent[:, slot, 0], scene.extent[:, slot, 2])
        away = np.square(fx - middle[image, 0]) + np.square(fz - middle[image, 2])
        shadow = np.maximum(1.0 - away / np.square(1.7 * radius)[image], 0.0)
        dim *= 1.0 - np.float32(0.75) * shadow * present[image]
    shading[image, pixel] *= dim
    return albedo, shading


def _steps(differs_right: NDArray, differs_below: NDArray) -> NDArray:
    """Pixels [b, h, w] that differ from the neighbour to the right or below: lines one pixel wide."""
    b, h, _ = differs_right.shape
    out = np.zeros((b, h, h), bool)
    out[:, :, :-1] = differs_right
    out[:, :-1] |= differs_below
    return out


def edges(hits: Hits, cell: NDArray, decal: NDArray, size: int) -> tuple[NDArray, NDArray]:
    """Geometric and texture edges, bool [b, h, w]; no pixel is both.

    A geometric edge is a change of instance, or of the normal by more than arccos 0.75, to the right or lower
    neighbour. A texture edge is a change of the texture's cell or of the decal on any other pixel.
    """

    def square(values):
        return values.reshape(-1, size, size)

    instance, mark = square(hits.instance), square(2 * decal + cell)
    nx, ny, nz = (square(part) for part in hits.normal)
    pairs = [((np.s_[:, :, :-1]), (np.s_[:, :, 1:])), ((np.s_[:, :-1]), (np.s_[:, 1:]))]
    bends = [(instance[p] != instance[q]) | (nx[p] * nx[q] + ny[p] * ny[q] + nz[p] * nz[q] < CREASE) for p, q in pairs]
    geometric = _steps(*bends)
    texture = _steps(*(mark[p] != mark[q] for p, q in pairs))
    return geometric, texture & ~geometric


def develop(albedo: NDArray, shading: NDArray, light_color: NDArray) -> NDArray:
    """Colours [b, 3, n] in 0..1 before noise. The exponent is 0.75 because two square roots are exact everywhere."""
    light = np.clip(albedo * (shading[:, None] * light_color[:, :, None]), 0.0, 1.0)
    return np.sqrt(light * np.sqrt(light))


def _labels(scene: Scene, hits: Hits, decal: NDArray, switched: NDArray, size: int) -> dict[str, NDArray]:
    """Semseg [b, h, w], saliency [b, h, w], count [b] and scene [b]; as `ProcRoom` defines them."""
    b = len(hits.depth)
    flat = hits.instance + NUM_INSTANCES * np.arange(b)[:, None]
    pixels = np.bincount(flat.ravel(), minlength=b * NUM_INSTANCES).reshape(b, NUM_INSTANCES)
    seen = pixels[:, NUM_PLANES:] * 64 * 64 >= 12 * size * size  # twelve pixels of a 64 x 64 image
    material = scene.material[:, NUM_PLANES:]
    boxy = np.array([shape == BOX for shape in SHAPES], np.int64)
    by_shape, by_material = 5 + 4 * boxy + material, 5 + 2 * material + boxy
    classes = np.empty((b, NUM_INSTANCES), np.int64)
    classes[:, :NUM_PLANES] = [0, 1, 2, 2, 2]
    classes[:, NUM_PLANES:] = np.where(switched[:, None], by_material, by_shape)
    semseg = np.where(decal > 0, decal + 2, _gather(classes, hits.instance))
    same = (material[:, :, None] == material[:, None, :]) & seen[:, None, :]
    salient = np.zeros((b, NUM_INSTANCES), bool)
    salient[:, NUM_PLANES:] = seen & (same.sum(axis=2) == 1)
    return {
        "semseg": semseg.reshape(b, size, size),
        "saliency": _gather(salient, hits.instance).reshape(b, size, size).astype(np.float32),
        "count": seen.sum(axis=1),
        "scene": scene.aspect * 4 + scene.material[:, FLOOR],
    }


def to_camera(scene: Scene, vectors: Planes) -> NDArray:
    """World vectors, three of [b, n], in the camera frame (x right, y down, z forward): [b, 3, n]."""
    x, y, z = vectors
    r = scene.rotation
    return np.stack([r[:, 0, i, None] * x + r[:, 1, i, None] * y + r[:, 2, i, None] * z for i in range(3)], axis=1)


def render_scene(scene: Scene, size: int, *, kappa: float = 0.0, truth: bool = False) -> dict[str, NDArray]:
    """Noise-free images and all labels of b scenes, with the shapes and meanings of `ProcRoom`, batch first.

    Args:
        scene: what to draw.
        size: height and width in pixels.
        kappa: share of the domains, the last first, whose objects are numbered with the material leading.
        truth: also return instance, albedo, shading, focal and rotation; see `ProcRoom.render`.
    """
    hits = cast(scene, size)
    cell, decal = texture_cells(scene, hits)
    albedo, shading = shade(scene, hits, cell, decal)
    geometric, texture = edges(hits, cell, decal, size)
    out = {
        "image": develop(albedo, shading, scene.light_color).reshape(-1, 3, size, size),
        "depth": hits.depth.reshape(-1, size, size),
        "normals": to_camera(scene, hits.normal).reshape(-1, 3, size, size),
        "edges": geometric.astype(np.float32),
        "texture": texture.astype(np.float32),
        **_labels(scene, hits, decal, scene.domain >= NUM_DOMAINS * (1 - kappa), size),
    }
    if truth:
        out |= {
            "instance": hits.instance.reshape(-1, size, size),
            "albedo": albedo.reshape(-1, 3, size, size),
            "shading": shading.reshape(-1, size, size),
            "focal": scene.focal,
            "rotation": scene.rotation,
        }
    return out

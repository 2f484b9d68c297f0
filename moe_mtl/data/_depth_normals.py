"""Surface normals from a depth map, for data sets that come without them: pseudo-labels."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_NOWHERE = 1e3  # 1 / depth of what is missing or outside: so far from any plane that its weight vanishes


def normals_from_depth(
    depth: Tensor, fx: float, fy: float, cx: float, cy: float, *, tolerance: float = 0.03, step: float = 0.0
) -> Tensor:
    """Surface normals of a coarsely quantised depth map: pseudo-labels, good to some degrees on flat surfaces.

    Where a surface is flat, 1 / depth is linear in the pixel coordinates. So planes are fitted to 1 / depth by weighted
    least squares in 5x5 windows of growing stride (1, 2, 4), each pass over the values the one before smoothed; a
    neighbour's weight falls with its distance from the plane of that pass (an edge-avoiding a-trous filter, as in
    Dammertz et al., HPG 2010, with planes instead of means). With w = 1 / depth = A x + B y + C on the image plane
    (x = (u - cx) / fx), the normal is -(A, B, C) / |(A, B, C)|.

    Args:
        depth: metres [h w], NaN where missing.
        fx, fy, cx, cy: the camera, in pixels of this map.
        tolerance: relative distance in 1 / depth at which a neighbour's weight has fallen to a quarter.
        step: quantisation step of the depth in metres, 0 for none; widens the tolerance for near things.

    Returns:
        Unit normals [3 h w] in the camera frame (x right, y down, z forward; n . ray < 0), zero where depth is missing,
        across jumps of the depth, and where the surface is seen at less than 5 degrees.
    """
    height, width = depth.shape
    known = depth > 0  # False for NaN
    inverse = torch.where(known, 1 / depth, _NOWHERE)
    reach = (tolerance + step * inverse) * inverse  # in units of 1 / depth
    value, along_u, along_v = inverse, torch.zeros_like(inverse), torch.zeros_like(inverse)
    for stride in (1, 2, 4):
        value, along_u, along_v, support = _fit_planes(value, along_u, along_v, reach, stride)
    x = (torch.arange(width, device=depth.device) - cx) / fx
    y = ((torch.arange(height, device=depth.device) - cy) / fy).unsqueeze(1)
    a, b = along_u * fx, along_v * fy
    normal = -torch.stack([a, b, value - a * x - b * y])  # [3 h w]; n . (x, y, 1) = -value < 0
    length = normal.square().sum(dim=0).sqrt()
    slant = value / (length * (1 + x.square() + y.square()).sqrt()).clamp(min=1e-12)  # cosine to the ray
    # A pixel mixed of two surfaces, or close to jumps on several sides, has few neighbours like itself.
    good = known & (support > 0.4) & (slant > math.sin(math.radians(5)))
    return torch.where(good, normal / length.clamp(min=1e-12), 0.0)


def _fit_planes(value: Tensor, along_u: Tensor, along_v: Tensor, reach: Tensor, stride: int) -> tuple[Tensor, ...]:
    """One pass over maps [h w]: the plane around each pixel as its value there and its slopes per pixel, and the
    weight of the neighbours as a share of those inside the map.
    """
    height, width = value.shape
    pad = 2 * stride
    padded = F.pad(value, (pad,) * 4, value=_NOWHERE)
    offsets = [(float(dv), float(du)) for dv in range(-pad, pad + 1, stride) for du in range(-pad, pad + 1, stride)]
    weights, weighted = value.new_empty(2, 25, height, width)
    for k, (dv, du) in enumerate(offsets):  # maps of this size stay in the cache, 25 at once would not
        neighbour = padded[pad + int(dv) :, pad + int(du) :][:height, :width]
        plane = value.add(along_u, alpha=du).add_(along_v, alpha=dv)
        distance = (neighbour - plane).div_(reach)
        weight = torch.reciprocal(distance.square_().add_(1).square_(), out=weights[k])
        torch.mul(neighbour - value, weight, out=weighted[k])  # relative to the centre: float32 loses nothing
    basis = value.new_tensor([(1, du, dv, du * du, du * dv, dv * dv) for dv, du in offsets]).T  # [6 25]
    s, su, sv, suu, suv, svv = (basis @ weights.flatten(1)).unflatten(1, value.shape)
    t, tu, tv = (basis[:3] @ weighted.flatten(1)).unflatten(1, value.shape)
    # Moments about the weighted mean: two equations for the slopes, then the height of the plane.
    total = s.clamp(min=1e-6)
    cuu, cuv, cvv = suu - su * su / total, suv - su * sv / total, svv - sv * sv / total
    cu, cv = tu - su * t / total, tv - sv * t / total
    determinant = cuu * cvv - cuv * cuv
    solvable = determinant > 0.05 * stride**4
    determinant = determinant.where(solvable, 1.0)
    slope_u = torch.where(solvable, (cvv * cu - cuv * cv) / determinant, 0.0)
    slope_v = torch.where(solvable, (cuu * cv - cuv * cu) / determinant, 0.0)
    smoothed = torch.where(solvable, value + (t - slope_u * su - slope_v * sv) / total, value)
    places = [torch.arange(n).unsqueeze(1) + torch.arange(-pad, pad + 1, stride) for n in value.shape]
    rows, columns = (((place >= 0) & (place < n)).sum(dim=1) for place, n in zip(places, value.shape, strict=True))
    return smoothed, slope_u, slope_v, torch.where(solvable, s / torch.outer(rows, columns), 0.0)


# --- files ----------------------------------------------------------------------------------------------------------

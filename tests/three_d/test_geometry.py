"""Cameras, the rasteriser, the field and the mesh that is made of it: against closed forms and against pytorch3d."""

import math
import sys

import numpy as np
import pytest
import torch
import trimesh

from suite.modalities.shared.text_encoder import TokenStates
from suite.modalities.three_d import raster
from suite.modalities.three_d.camera import DISTANCE, TANGENT, Cameras, ring, token, with_camera
from suite.modalities.three_d.field import DENSITY, Field
from suite.modalities.three_d.mesh import clean, extract
from suite.modalities.three_d.pictures import render
from suite.modalities.three_d.raster import differentiable, rasterise, views, why_absent
from suite.modalities.three_d.refine import refine
from suite.modalities.three_d.refine_shape import refine_shape, soft_silhouettes
from suite.modalities.three_d.sources import Surface

needs_pytorch3d = pytest.mark.skipif(bool(why_absent()), reason=why_absent() or "pytorch3d is here")


def cameras(count=7, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return Cameras(torch.rand(count, generator=rng) * 6, torch.rand(count, generator=rng) * 2 - 1)


def sphere(radius=0.7, subdivisions=3):
    mesh = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    return torch.tensor(mesh.vertices, dtype=torch.float32), torch.tensor(mesh.faces, dtype=torch.long)


def test_frames_are_right_handed_and_look_at_the_origin():
    seen = cameras()
    frames = seen.frames
    torch.testing.assert_close(frames @ frames.mT, torch.eye(3).expand_as(frames), atol=1e-6, rtol=0)
    right, up, forward = frames.unbind(1)
    torch.testing.assert_close(torch.linalg.cross(right, up), -forward, atol=1e-6, rtol=0)
    centre = seen.project(torch.zeros(1, 3))[:, 0]
    torch.testing.assert_close(centre, torch.tensor([0, 0, DISTANCE]).expand_as(centre), atol=1e-6, rtol=0)
    assert (up[:, 1] > 0).all()


def test_azimuth_zero_sees_the_front_and_ninety_the_side_at_plus_x():
    front, side = ring(4, 0.0).positions[:2]
    torch.testing.assert_close(front, torch.tensor([0, 0, DISTANCE]), atol=1e-6, rtol=0)
    torch.testing.assert_close(side, torch.tensor([DISTANCE, 0, 0]), atol=1e-6, rtol=0)
    right_of_front = ring(1, 0.0).project(torch.tensor([[0.5, 0, 0], [0, 0.5, 0]]))[0]
    assert right_of_front[0, 0] > 0 and right_of_front[1, 1] > 0


def test_a_ray_goes_through_the_pixel_that_its_points_project_to():
    seen, size = cameras(3), 8
    origins, directions = seen.rays(size)
    points = (origins + 2.7 * directions).reshape(3, -1, 3)
    for view in range(3):
        one = Cameras(seen.azimuth[view : view + 1], seen.elevation[view : view + 1])
        where = one.project(points[view])[0].view(size, size, 3)
        column, row = (where[..., 0] + 1) * size / 2 - 0.5, (1 - where[..., 1]) * size / 2 - 0.5
        torch.testing.assert_close(column, torch.arange(8.0).expand(8, 8), atol=1e-4, rtol=0)
        torch.testing.assert_close(row, torch.arange(8.0)[:, None].expand(8, 8), atol=1e-4, rtol=0)


def test_the_token_tells_cameras_apart_and_not_whole_turns():
    seen = cameras(5)
    one = token(seen, 384)
    turned = token(Cameras(seen.azimuth + 2 * math.pi, seen.elevation), 384)
    torch.testing.assert_close(one, turned, atol=1e-4, rtol=0)
    assert torch.cdist(one, one).fill_diagonal_(9).min() > 0.1
    text = with_camera(TokenStates(torch.zeros(5, 3, 384), torch.zeros(5, 3)), seen)
    assert text.states.shape == (5, 4, 384) and text.mask[:, 3].eq(1).all()
    assert torch.equal(text.states[:, 3], one)


def test_a_ball_covers_a_disc():
    """A ball of radius r at distance d covers the disc of radius r / sqrt(d^2 - r^2) / tangent, in half pictures."""
    vertices, faces = sphere(0.7, 4)
    face, weights = rasterise(vertices, faces, cameras(3), 96)
    hit = face >= 0
    expected = math.pi * (0.7 / math.sqrt(DISTANCE**2 - 0.49) / TANGENT) ** 2 / 4
    torch.testing.assert_close(hit.float().mean((1, 2)), torch.full((3,), expected), rtol=0.02, atol=0)
    torch.testing.assert_close(weights[hit].sum(-1), torch.ones(int(hit.sum())), atol=1e-5, rtol=0)


def test_the_nearest_face_wins_and_weights_are_perspective_correct():
    seen = ring(1, 0.0)
    square = torch.tensor([[-0.5, -0.5, 0.0], [0.5, -0.5, 0.0], [0.5, 0.5, 0.0], [-0.5, 0.5, 0.0]])
    tilted = square + torch.stack([0 * square[:, 0], 0 * square[:, 0], 0.8 * square[:, 0] + 0.3], 1)
    behind = square - torch.tensor([0, 0, 0.6])
    corners = torch.cat([behind, tilted])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]])
    face, weights = rasterise(corners, faces, seen, 64)
    middle = face[0, 28:36, 28:36]
    assert (middle >= 2).all()
    hit = face >= 2
    where = (corners[faces[face[hit]]] * weights[hit][..., None]).sum(1)
    # A point found through its weights lies on the ray of its own pixel.
    at = seen.project(where)[0]
    row, column = hit[0].nonzero().unbind(1)
    torch.testing.assert_close((at[:, 0] + 1) * 32 - 0.5, column.float(), atol=1e-3, rtol=0)
    torch.testing.assert_close((1 - at[:, 1]) * 32 - 0.5, row.float(), atol=1e-3, rtol=0)


@needs_pytorch3d
def test_the_rasteriser_agrees_with_pytorch3d():
    rng = torch.Generator().manual_seed(0)
    vertices = torch.rand(60, 3, generator=rng) - 0.5
    faces = torch.randint(60, (80, 3), generator=rng)
    faces = faces[(faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 0] != faces[:, 2])]
    ours, theirs = (f(vertices, faces, cameras(3), 32) for f in (rasterise, differentiable))
    same = ours[0] == theirs[0]
    assert same.float().mean() > 0.998  # an edge through a pixel's very centre may go either way
    torch.testing.assert_close(ours[1][same], theirs[1][same].clamp(min=0), atol=2e-4, rtol=0)


@needs_pytorch3d
def test_soft_silhouettes_grow_with_the_mesh_as_their_gradient_says():
    vertices, faces = sphere(0.6, subdivisions=2)
    size = 48

    def area(scale):
        return soft_silhouettes(vertices * scale, faces, ring(1, 0.2), size).sum()

    scale = torch.ones((), requires_grad=True)
    (slope,) = torch.autograd.grad(area(scale), scale)
    with torch.no_grad():
        measured = (area(1.02) - area(0.98)) / 0.04
        covered = float(area(1.0)) / size**2
    torch.testing.assert_close(slope, measured, rtol=0.05, atol=0)
    # The outline of a ball of radius 0.6 seen from DISTANCE, in half pictures; a soft edge adds to it.
    outline = 0.6 / math.sqrt(DISTANCE**2 - 0.6**2) / TANGENT
    assert 1 < covered / (math.pi * outline**2 / 4) < 1.15


@pytest.mark.slow  # pytorch3d's gradient takes a second a step on a CPU
@needs_pytorch3d
def test_refined_shapes_fill_the_silhouettes_of_the_field():
    """An opaque unit ball, and a mesh of 0.8 of its size."""
    mesh = trimesh.creation.icosphere(subdivisions=2, radius=0.8)
    before, after = refine_shape(mesh, slab(2.0), 12)
    assert before > 0.3 and after < 0.8 * before
    radius = np.linalg.norm(mesh.vertices, axis=1)
    assert 0.84 < radius.mean() < 1.02 and mesh.is_watertight and mesh.volume > 0
    kept = mesh.vertices.copy()
    assert refine_shape(mesh, slab(2.0), 0)[0] == pytest.approx(after) and (mesh.vertices == kept).all()


def test_without_pytorch3d_one_line_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch3d._C", None)
    why_absent.cache_clear()
    try:
        reason = raster.why_absent()
        assert "pip install easypytorch3d" in reason and "\n" not in reason
        vertices, faces = sphere(subdivisions=1)
        assert (rasterise(vertices, faces, ring(1), 16)[0] >= 0).any()
        with pytest.raises(raster.ConfigError, match="easypytorch3d"):
            differentiable(vertices, faces, ring(1), 16)
        with pytest.raises(raster.ConfigError, match=r"refine-shape.*easypytorch3d"):
            refine_shape(trimesh.creation.icosphere(1), slab(2.0), 1)
    finally:
        why_absent.cache_clear()


def test_views_show_textures_and_light_from_both_sides():
    square = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]], np.float32)
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)[faces]
    texture = np.zeros((2, 2, 3), np.float32)
    texture[0, :, 0] = 1  # the upper half is red
    texture[1, :, 2] = 1
    surface = Surface(square, faces, np.ones((2, 3, 3), np.float32), uv, np.zeros(2, np.int64), [texture])
    for picture in views(surface, ring(2, 0.0), 32):  # from the front and from behind
        assert picture[:, 0, 0].eq(1).all()
        upper, lower = picture[:, 12, 16], picture[:, 20, 16]
        assert upper[0] > 0.5 and upper[2] == 0 and lower[2] > 0.5 and lower[0] == 0


def slab(value):
    """A field of one raw density and one colour everywhere in the ball."""
    field = Field((8, 16))
    with torch.no_grad():
        blob = field.grid() - sum_of(field)
        field.grids[0].zero_()
        field.grids[1].copy_(-blob)
        field.grids[1][:, 0] += value
        field.grids[1][:, 1] = 2.0
    return field


def sum_of(field):
    upsampled = torch.nn.functional.interpolate(field.grids[0], size=(16,) * 3, mode="trilinear", align_corners=True)
    return field.grids[1] + upsampled


def test_a_uniform_ball_has_the_closed_form_of_a_slab():
    """Opacity of a ray that crosses a length l of density d is 1 - exp(-d l); colour and white make up the picture."""
    field = slab(-4.0)
    density = DENSITY * math.log1p(math.exp(-4.0))
    shown = field.render(ring(2, 0.3), 17, samples=64)
    torch.testing.assert_close(shown.opacity[:, 8, 8], torch.full((2,), 1 - math.exp(-2 * density)), atol=2e-3, rtol=0)
    red = torch.sigmoid(torch.tensor(2.0))
    expected = shown.opacity * red + (1 - shown.opacity)
    torch.testing.assert_close(shown.pictures[:, 0], expected, atol=1e-5, rtol=0)
    assert shown.opacity[:, 0, 0].eq(0).all() and shown.pictures[:, :, 0, 0].eq(1).all()


def test_rendering_is_differentiable_and_skipping_the_empty_changes_nothing_visible():
    field = Field((8, 32), torch.Generator().manual_seed(0))
    before = field.render(ring(2), 24)
    before.pictures.sum().backward()
    assert all(grid.grad is not None and grid.grad.abs().sum() > 0 for grid in field.grids)
    field.find_occupied()
    after = field.render(ring(2), 24)
    assert after.share < 0.9 * before.share
    assert (after.pictures - before.pictures).abs().max() < 0.02


def test_the_mesh_of_a_fresh_field_is_the_blob_closed_and_outward():
    mesh = extract(Field(generator=torch.Generator().manual_seed(0)), 48)
    assert mesh is not None and mesh.is_watertight and mesh.volume > 0
    radii = np.linalg.norm(mesh.vertices, axis=1)
    assert 0.3 < radii.min() and radii.max() < 0.5
    outward = (mesh.face_normals * mesh.triangles_center).sum(1)
    assert (outward > 0).mean() > 0.99
    assert mesh.visual.vertex_colors.shape == (len(mesh.vertices), 4)


def test_an_empty_field_has_no_mesh():
    assert extract(slab(-9.0), 32) is None


def test_a_field_that_fills_the_ball_is_closed_at_its_edge():
    mesh = extract(slab(3.0), 32)
    assert mesh is not None and mesh.is_watertight and mesh.volume == pytest.approx(4 / 3 * math.pi, rel=0.1)


def test_cleaning_drops_crumbs_turns_outward_and_closes_holes():
    large = trimesh.creation.icosphere(subdivisions=3, radius=0.6)
    crumb = trimesh.creation.icosphere(subdivisions=1, radius=0.02)
    crumb.apply_translation([0.9, 0, 0])
    open_mesh = trimesh.Trimesh(large.vertices, large.faces[1:, ::-1])
    cleaned = clean(trimesh.util.concatenate([open_mesh, crumb]))
    assert cleaned is not None and cleaned.body_count == 1
    assert cleaned.is_watertight and cleaned.volume > 0


def test_pictures_of_a_mesh_have_its_colours():
    mesh = trimesh.creation.icosphere(subdivisions=2, radius=0.7)
    mesh.visual.vertex_colors = np.tile(np.array([200, 40, 0, 255], np.uint8), (len(mesh.vertices), 1))
    picture = render(mesh, ring(1), 32)[0]
    torch.testing.assert_close(picture[:, 16, 16], torch.tensor([200, 40, 0]) / 255, atol=1e-4, rtol=0)
    assert picture[:, 0, 0].eq(1).all()


def test_refinement_brings_colours_nearer_to_the_views():
    field = Field((8, 32), torch.Generator().manual_seed(0))
    with torch.no_grad():
        field.grids[0][:, 1] += 3  # red
    mesh = extract(field, 24)
    assert mesh is not None
    shape = mesh.vertices.copy()
    mesh.visual.vertex_colors = np.tile(np.array([0, 0, 255, 255], np.uint8), (len(shape), 1))
    before, after = refine(mesh, field, 100)
    assert before > 0.3 and after < 0.3 * before
    assert np.array_equal(mesh.vertices, shape)
    again, same = refine(mesh, field, 0)
    assert again == same == pytest.approx(after, abs=5e-3)

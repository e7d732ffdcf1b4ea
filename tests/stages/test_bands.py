"""Teachers that see some of the bands, students of networks from elsewhere that see all."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.config.pixels import PixelFormat
from orchestrator.data.index import ImageIndex, ImageRecord, pixels_in
from orchestrator.errors import UserError
from orchestrator.models import build, normalise, save_pretrained
from orchestrator.models.wrapped_backbone import load_wrapped, save_wrapped
from orchestrator.stages.common.backbone import see_pixels
from orchestrator.stages.common.network_source import NetworkSource
from orchestrator.stages.common.open_network import as_seen
from orchestrator.stages.distill.config import Distill, Student
from orchestrator.stages.distill.feature_teacher import Teachers
from orchestrator.stages.distill.step_views import StepViews
from orchestrator.stages.distill.student_backbone import backbone_of
from orchestrator.stages.distill.task import FrozenTeacher
from orchestrator.teacher_service.payload import TEACHER
from tests.band_files import band_scene, write_tiff

from .distilling import CONFIG, RECIPE

SIX = PixelFormat(bands=(0, 1, 2, 3, 4, 5), range=(0, 4095), mean=(0.5,) * 6, std=(0.25,) * 6)
THREE = PixelFormat(bands=(4, 2, 0), range=(0, 4095))


class Small(nn.Module):
    """A student of a user's module, which takes six channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 8, 8)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.conv(images_BCHW)
        return found


def scenes(folder: Path, name: str, pixels: PixelFormat) -> Path:
    """The index of twelve pictures of six bands."""
    (folder / name).mkdir(parents=True)
    rows = []
    for number in range(12):
        write_tiff(folder / f"{number}.tif", band_scene(number, side=40))
        rows.append(ImageRecord("scenes", f"{number}.tif", str(folder), "", 40, 40))
    ImageIndex(rows, {"scenes": pixels}).save(folder / name)
    return folder / name


def test_a_teacher_with_heads_says_of_its_bands_what_it_says_of_pictures_of_these(
    tmp_path: Path, teacher: Path
) -> None:
    # No contrast, which is around the mean of all bands.
    crops = CONFIG.crops.model_copy(update={"contrast": 0.0})
    plain = CONFIG.model_copy(update={"crops": crops})
    of_three, of_six = scenes(tmp_path, "three", THREE), scenes(tmp_path, "six", SIX)

    def said(config: Distill, index: Path) -> dict[str, np.ndarray]:
        seeing = config.seeing(pixels_in(index))
        made = FrozenTeacher(seeing, RECIPE, teacher, partial(StepViews, seeing, RECIPE, index, 5, {}))
        return made(1)[TEACHER]

    expected = said(plain, of_three)
    found = said(plain.model_copy(update={"teacher_bands": (4, 2, 0)}), of_six)

    for name in ("dino", "ragged/ibot"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="the teacher takes 3 channels, and would see 6"):
        said(plain, of_six)


def test_a_teacher_of_features_sees_its_bands_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = build("vit_femto").eval()
    save_pretrained(tmp_path / "photos", tower.state_dict(), "vit_femto", {"image_size": 32})
    teachers = {"photos": {"from": str(tmp_path / "photos"), "bands": [5, 1, 0]}}
    config = CONFIG.model_copy(
        update={
            "features": Distill.model_validate(
                {**CONFIG.model_dump(mode="json", by_alias=True), "features": {"teachers": teachers}}
            ).features
        }
    )
    assert config.features is not None
    images = torch.from_numpy(np.stack([band_scene(0, side=32), band_scene(1, side=32)]) * 16)
    images_NCHW = images.permute(0, 3, 1, 2)

    found = dict(Teachers(config.seeing(SIX), config.features, None)(images_NCHW))

    with torch.inference_mode():
        expected = tower(normalise(images_NCHW[:, [5, 1, 0]]))
    torch.testing.assert_close(found["photos.cls"], expected.cls, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="takes 3 channels, and would see 2") as caught:
        Teachers(config.seeing(PixelFormat(bands=(0, 1))), config.features.model_copy(
            update={"teachers": {"photos": config.features.teachers["photos"].model_copy(update={"bands": None})}}
        ), None)  # fmt: skip
    assert caught.value.where == "features.teachers.photos.bands"


def test_bands_are_those_of_the_file() -> None:
    source = NetworkSource(timm="resnet18", bands=(7, 3, 5))
    pixels = PixelFormat(bands=(3, 5, 7, 9), range=(0, 255))
    images = torch.arange(4 * 4, dtype=torch.uint8).reshape(1, 4, 2, 2)

    seen = as_seen(images, source, 2, pixels)

    mean, std = torch.tensor(source.mean)[:, None, None], torch.tensor(source.std)[:, None, None]
    torch.testing.assert_close(seen[0], (images[0, [2, 0, 1]] / 255 - mean) / std)
    with pytest.raises(UserError, match="band 4 is not among the bands that are seen"):
        as_seen(images, NetworkSource(timm="resnet18", bands=(4, 3, 5)), 2, pixels)


@pytest.mark.parametrize(
    "said",
    [
        {"timm": "resnet10t"},
        {"module": f"{__name__}:Small", "kwargs": {"channels": 6}},
    ],
)
def test_a_student_from_elsewhere_sees_all_bands(said: dict[str, object], tmp_path: Path) -> None:
    if "timm" in said:
        pytest.importorskip("timm")
    student = Student.model_validate(said).seeing(6)
    config = CONFIG.model_copy(update={"students": {"a": student}})
    backbone = backbone_of(config, student, 3)
    assert not isinstance(backbone, str)
    see_pixels(backbone, SIX)
    images = normalise(torch.zeros(2, 6, 32, 32, dtype=torch.uint8), backbone)

    save_wrapped(tmp_path, backbone.eval(), pixels=SIX.record())
    again = load_wrapped(tmp_path, (__name__,))

    backbone.eval()
    with torch.inference_mode():
        torch.testing.assert_close(again(images).patches, backbone(images).patches)
    assert again.num_channels == 6

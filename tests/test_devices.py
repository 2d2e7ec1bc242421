"""Nothing that a model or a task makes on the way stays behind on the CPU when the rest is elsewhere.

PyTorch's meta device has shapes and no numbers, and refuses to be mixed with the CPU as a GPU does; so this
needs no GPU.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.explain.methods import METHODS
from vitrail.models import VARIANTS, build_model
from vitrail.models.encoder import Encoder
from vitrail.tasks import TASKS, build_task

SMALL = {
    "cait": "cait_cifar",
    "cct": "cct_2_3x2_32",
    "cct_sine": "cct_6_3x1_32_sine",
    "crossvit": "crossvit_cifar",
    "deit": "deit_tiny_distilled_patch16_224",
    "diffvit": "diffvit_cifar",
    "pvt": "pvt_cifar",
    "pvt_v2": "pvt_v2_cifar",
    "swin": "swin_cifar",
    "swin_v2": "swinv2_cifar",
    "video_vit": "video_vit_28",
    "vit": "vit_cifar",
}
SWITCHES: list[dict[str, Any]] = [
    *(
        {"attention": kind}
        for kind in ("differential", "sparse_topk", "sparse_local", "sparse_axial", "linear")
    ),
    *(
        {"position": kind}
        for kind in ("none", "learned", "learned_2d", "sincos_1d", "sincos_2d", "relative", "rotary")
    ),
    *({"patch_embed": kind} for kind in ("conv", "linear", "overlap")),
    *({"pool": kind} for kind in ("mean", "seqpool")),
    {"mlp": "swiglu", "qk_norm": True, "registers": 2},
]
# InfoNCE and its relatives switch autocast off for their logits, which the meta device does not have.
AUTOCAST = {"classify_infonce", "infonce", "mae_infonce", "supcon"}

# The others ask a value on their way ("is any patch hidden?"), and the meta device has none.
MAPS = ("rollout", "gradient-rollout", "relevance", "gradient-x-input", "occlusion")


def images_for(model: Encoder, *axes: int, more: int = 0) -> Tensor:
    config = model.config
    frames = (config.num_frames,) if hasattr(config, "num_frames") else ()
    height, width = config.image_shape
    return torch.empty(*axes, *frames, config.in_chans, height + more, width + 2 * more, device="meta")


def check_passes(model: Encoder) -> None:
    """Training and evaluating passes at the model's size and, resampled, at another."""
    model.to("meta")
    for more in (0, 4):
        logits = model.train()(images_for(model, 2, more=more))
        assert logits.device.type == "meta"
        logits.sum().backward()
        with torch.no_grad():
            model.eval()(images_for(model, 2, more=more))
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_every_architecture_is_here() -> None:
    covered = {type(VARIANTS[variant]).__module__ for variant in SMALL.values()}
    assert covered == {type(config).__module__ for config in VARIANTS.values()}


@pytest.mark.parametrize("variant", SMALL.values(), ids=SMALL)
def test_models(variant: str) -> None:
    check_passes(build_model(variant, drop_path=0.1))


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_switches_of_the_vit(switches: dict[str, Any]) -> None:
    check_passes(build_model("vit_cifar_plain", **switches))


@pytest.mark.parametrize("name", sorted(set(TASKS) - AUTOCAST))
def test_tasks(name: str) -> None:
    variant = "video_vit_28" if name == "video_mae" else "vit_cifar_plain"
    model = build_model(variant, **({} if TASKS[name].classifies else {"num_classes": 0}))
    teacher = {"teacher": build_model("vit_cifar_plain")} if name == "distill" else {}
    task = build_task(name, model, **teacher).train()
    task.begin(10)
    task.to("meta")
    batch = {"targets": torch.zeros(4, dtype=torch.int64, device="meta")}
    if task.views.full == 1:
        batch["images"] = images_for(model, 4)
    else:
        batch["views"] = images_for(model, 4, task.views.full)
    if task.views.crops:
        channels = model.config.in_chans
        batch["crops"] = torch.empty(4, task.views.crops, channels, *task.views.crop_size, device="meta")
    result = task(batch, 0)
    result["loss"].backward()
    task.after_step()
    assert {value.device.type for value in result.values()} == {"meta"}


@pytest.mark.parametrize("variant", [name for kind, name in SMALL.items() if kind != "video_vit"])
def test_maps(variant: str) -> None:
    model = build_model(variant).eval().to("meta")
    images = images_for(model, 2)
    for name in MAPS:
        assert METHODS[name].run(model, images, 3).device.type == "meta"

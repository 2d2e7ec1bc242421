"""All methods that map an answer to the image, by name, with one signature: what `vitrail explain` offers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitrail.explain.class_activation import eigen_cam, grad_cam, grad_cam_plus_plus, hires_cam
from vitrail.explain.faithfulness import Method
from vitrail.explain.gradients import gradient_x_input, integrated_gradients, smooth_grad
from vitrail.explain.perturbation import leave_one_patch_out, occlusion, shapley_values
from vitrail.explain.rollout import attention_rollout, gradient_rollout, relevance
from vitrail.explain.target import Target
from vitrail.models.encoder import Encoder


@dataclass(frozen=True, kw_only=True)
class Named:
    """A method with what a reader needs to know of it."""

    title: str
    run: Method
    signed: bool
    """Values below zero speak against the class."""
    says: str
    """What the map shows, in a sentence."""
    quick: bool = False
    """A pass or two of the model: fit for the default set."""
    needs_class: bool = True
    """It explains the score of a class, so the model must have a head."""


def _shapley(model: Encoder, images: Tensor, target: Target) -> Tensor:
    return shapley_values(model, images, target).values


METHODS: dict[str, Named] = {
    "rollout": Named(
        title="Attention rollout",
        run=lambda model, images, _: attention_rollout(model, images).values,
        signed=False,
        says="Attention followed through all layers. It does not know the class.",
        quick=True,
        needs_class=False,
    ),
    "relevance": Named(
        title="Relevance",
        run=lambda model, images, target: relevance(model, images, target).values,
        signed=False,
        says="Attention weighted by the gradient of the class, followed through all layers (Chefer).",
        quick=True,
    ),
    "gradient-rollout": Named(
        title="Gradient rollout",
        run=lambda model, images, target: gradient_rollout(model, images, target).values,
        signed=False,
        says="Rollout of attention weighted by the gradient of the class.",
    ),
    "grad-cam": Named(
        title="Grad-CAM",
        run=grad_cam,
        signed=False,
        says="The last patch features that the answer depends on, weighted by the gradient of the class.",
        quick=True,
    ),
    "grad-cam++": Named(
        title="Grad-CAM++",
        run=grad_cam_plus_plus,
        signed=False,
        says="Grad-CAM with weights that favour several small objects.",
    ),
    "hires-cam": Named(
        title="HiResCAM",
        run=hires_cam,
        signed=False,
        says="Gradient times features in each patch by itself.",
    ),
    "eigen-cam": Named(
        title="Eigen-CAM",
        run=eigen_cam,
        signed=False,
        says="The main direction of the last patch features. It does not know the class.",
    ),
    "gradient-x-input": Named(
        title="Gradient x input",
        run=gradient_x_input,
        signed=True,
        says="How the class's score changes with each pixel, times the pixel.",
    ),
    "integrated-gradients": Named(
        title="Integrated gradients",
        run=integrated_gradients,
        signed=True,
        says="Gradients summed from an empty image to this one; they add up to the change of the score.",
    ),
    "smooth-grad": Named(
        title="SmoothGrad",
        run=smooth_grad,
        signed=True,
        says="The mean of gradients under noise: sensitivity, not contribution.",
    ),
    "occlusion": Named(
        title="Occlusion",
        run=occlusion,
        signed=True,
        says="How far the class's score falls when a square is hidden.",
    ),
    "leave-one-out": Named(
        title="Leave one patch out",
        run=leave_one_patch_out,
        signed=True,
        says="How far the class's score falls without each patch.",
    ),
    "shapley": Named(
        title="Shapley values",
        run=_shapley,
        signed=True,
        says="Each region's share of the score, fairly divided over all orders of adding regions.",
    ),
}


def find_methods(names: list[str] | None, *, head: bool = True) -> list[str]:
    """Names of `METHODS`: the quick ones when none are given, all for "all".

    Args:
        names: What somebody asked for.
        head: Whether the model has one; without, only methods that do not need a class will do.

    Raises:
        ValueError: There is no such method, or it needs a class and there is none.
    """
    fitting = [name for name, method in METHODS.items() if head or not method.needs_class]
    if not names:
        return [name for name in fitting if METHODS[name].quick or not head]
    if names == ["all"]:
        return fitting
    for name in names:
        if name not in METHODS:
            raise ValueError(f"no method {name!r}: expected one of {', '.join(METHODS)}, or all")
        if name not in fitting:
            raise ValueError(
                f"{name} explains the score of a class, and this model has no head; without one there are "
                f"{' and '.join(fitting)}"
            )
    return names

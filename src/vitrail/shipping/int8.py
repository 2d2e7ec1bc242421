"""Static quantisation to int8: weights and activations of linear layers, on x86 CPUs.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", as torchao's PT2E path does it: weights symmetric, a scale for each output channel; activations
uint8 with one scale and zero point a tensor, from histograms over calibration images. Everything else stays
float32: convolutions, LayerNorm, softmax, GELU, residuals, the products of attention, and linear layers whose
weight is a part of a larger one (in the last block of a ViT, whose class token alone asks).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.noise import quiet
from vitrail.shipping.ahead import export


def why_no_int8() -> str | None:
    """Why int8 cannot be had here; None where it can."""
    if torch.cpu.get_capabilities()["architecture"] != "x86_64":
        return "int8 is for x86 CPUs"
    if importlib.util.find_spec("torchao") is None:
        return "int8 needs torchao: pip install 'vitrail[int8]'"
    return None


def quantise(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """A copy of a model that computes linear layers in int8.

    Args:
        model: Images [B, C, H, W] -> logits [B, K], in evaluation mode; stays as it is.
        batches: Normalised images to calibrate with.

    Returns:
        A graph that says what is to be computed; it is slower than the model until it is compiled.
    """
    with quiet(), torch.no_grad():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e  # type: ignore[import-untyped]
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86  # type: ignore[import-untyped]

        # Without VNNI two products are added in 16 bits and saturate; 7 bits leave room for the sum.
        narrow = not any(found for name, found in torch.cpu.get_capabilities().items() if "vnni" in name)
        quantizer = x86.X86InductorQuantizer().set_global(
            x86.get_default_x86_inductor_quantization_config(reduce_range=narrow)
        )
        # Compiled, a quantised patch embedding gives other numbers than its graph (torch 2.13, AVX2).
        # Nor its pooling, which torchao would warn of.
        quantizer.set_function_type_qconfig(F.conv2d, None).set_function_type_qconfig(F.max_pool2d, None)
        prepared = None
        for images in batches:
            if prepared is None:
                prepared = prepare_pt2e(export(model, images.shape[1:]).module(), quantizer)
            prepared(images)
        return _with_whole_summands(convert_pt2e(prepared))


def _with_whole_summands(model: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Copy what is added where it is a part of a larger tensor, such as the class token of all tokens.

    Inductor lets a quantised layer add its result in place, and oneDNN then takes the strides for those of a
    whole tensor: the sums are wrong, and nothing warns (torch 2.13, `onednn.qlinear_pointwise`).
    """
    for add in model.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
        for term in add.all_input_nodes:
            if not term.meta["val"].is_contiguous():
                with model.graph.inserting_before(add):
                    whole = model.graph.call_function(
                        torch.ops.aten.clone.default, (term,), {"memory_format": torch.contiguous_format}
                    )
                add.replace_input_with(term, whole)
    model.recompile()
    return model

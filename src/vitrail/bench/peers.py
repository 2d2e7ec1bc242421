"""The same model of other libraries: with our weights, and checked to give our logits before it is timed."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

import vitrail.torchvision_ops  # noqa: F401  (before timm, transformers and torchvision)
from vitrail.models import VARIANTS, Encoder, build_model
from vitrail.models.cct import CCTConfig
from vitrail.models.diffvit import BASELINES
from vitrail.pretrained.folder import ModelFolder
from vitrail.pretrained.formats import to_theirs

TOLERANCE = 1e-4
"""Largest difference of logits between contestants."""
OURS = "vitrail"
NO_DROPS = {"drop": 0.0, "attn_drop": 0.0, "drop_path": 0.0}
"""Without them a model gives the same logits in training as a peer with the same weights."""


class Logits(nn.Module):
    """A transformers classifier that takes and gives plain tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


class Runtime(nn.Module):
    """A model that runs outside torch, on the CPU in float32, behind the surface of one in torch."""

    def __init__(self, run: Callable[[Any], Any]) -> None:
        super().__init__()
        self._run = run

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        return torch.from_numpy(self._run(images.numpy()))


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Models that do the same work."""

    models: dict[str, nn.Module]
    """Ours first, under `OURS`, then each peer that has the architecture."""
    logit_differences: dict[str, float]
    """Peer -> largest difference of its logits from ours."""
    absent: dict[str, str]
    """Peer -> why it takes no part, in one line."""


def input_shape(config: Any) -> tuple[int, ...]:
    """Shape of one image, [C, H, W], or of one clip, [T, C, H, W]."""
    frames = (config.num_frames,) if hasattr(config, "num_frames") else ()
    return (*frames, config.in_chans, *config.image_shape)


def contest(name: str, changes: Mapping[str, Any], peers: Iterable[str], batch: int = 2) -> Contest:
    """Our model and the same one of other libraries, with the same random weights and no drop rates.

    Args:
        name: A variant, not a short name.
        changes: Fields of its config.
        peers: Of `PEERS`.
        batch: Images with which the logits are compared; models of torch are in training mode then, so that
            a drop rate that is left is found.

    Raises:
        ValueError: No such model.
    """
    ours = random_model(name, changes)
    images = torch.randn(batch, *input_shape(ours.config))
    with torch.no_grad():
        # Files hold the model for inference; batch normalisation, in convolutional stems, differs there.
        expected = {training: ours.train(training)(images) for training in (True, False)}
    models: dict[str, nn.Module] = {OURS: ours}
    differences, absent = {}, {}
    for peer in peers:
        try:
            training = peer not in RUNTIMES
            theirs = build_peer(peer, name, ours).train(training)
            differences[peer] = _check(theirs, images, expected[training])
            models[peer] = theirs
        except ValueError as reason:
            absent[peer] = str(reason)
    return Contest(models=models, logit_differences=differences, absent=absent)


def random_model(name: str, changes: Mapping[str, Any]) -> Encoder:
    """Our model without drop rates; what begins as zero or one is noisy, so that it counts in the logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = build_model(name, **{**changes, **NO_DROPS})
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return ours


def build_peer(peer: str, name: str, ours: Encoder) -> nn.Module:
    """A peer's model with the weights of ours.

    Args:
        peer: Of `PEERS`.
        name: The variant that ours was made from.
        ours: Without drop rates.

    Raises:
        ValueError: The library is not installed, or has no such model; one line.
    """
    package = peer.replace("-", "_")
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"not installed: pip install {peer}")
    try:
        return _BUILDERS[peer](name, ours)
    except Exception as error:  # whatever the other library raises, it cannot build this model
        raise ValueError(" ".join(str(error).split())[:200]) from None


def _check(theirs: nn.Module, images: Tensor, expected: Tensor) -> float:
    with torch.no_grad():
        difference = (theirs(images) - expected).abs().max().item()
    if not difference < TOLERANCE:
        raise ValueError(f"its logits differ from ours by {difference:.2g}, allowed {TOLERANCE:g}")
    return difference


def _timm(name: str, ours: Encoder) -> nn.Module:
    import timm

    usual, own = asdict(VARIANTS[name]), asdict(ours.config)
    options = {key: value for key, value in own.items() if value != usual[key] and key not in NO_DROPS}
    options["drop_path_rate"] = 0.0  # its Swin has 0.1
    if differential := name in BASELINES:
        name, options = BASELINES[name], options | {"attn_layer": "diff", "num_heads": ours.config.num_heads}
    if not timm.is_model(name):
        raise ValueError(f"timm has no {name}")
    peer: Any = timm.create_model(name, **options)
    if differential:
        for block in peer.blocks:
            block.attn.proj.bias = None  # as in the authors' code; timm's option takes the MLP's biases too
    peer.load_state_dict(to_theirs(ours.state_dict(), "timm", ours.config))
    return cast(nn.Module, peer)


def _transformers(name: str, ours: Encoder) -> nn.Module:
    from vitrail.pretrained.formats.transformers import load_theirs, write_config

    described = write_config(ours.config, ())
    converted = to_theirs(ours.state_dict(), "transformers", ours.config)
    state = {key: tensor.clone() for key, tensor in converted.items()}  # it would keep ours otherwise
    return Logits(load_theirs(described["architectures"][0], None, config=described, state_dict=state))


def _torchvision(name: str, ours: Encoder) -> nn.Module:
    from torchvision.ops import StochasticDepth

    from vitrail.pretrained.formats.torchvision import build

    peer = build(ours.config)
    peer.load_state_dict(to_theirs(ours.state_dict(), "torchvision", ours.config))
    for module in peer.modules():
        if isinstance(module, StochasticDepth):  # its Swin has 0.1
            module.p = 0.0
    return peer


def _vit_pytorch(name: str, ours: Encoder) -> nn.Module:
    config = ours.config
    if not isinstance(config, CCTConfig) or (config.tokenizer, config.position) != ("conv", "learned"):
        raise ValueError("of vit-pytorch's models only CCT with learned positions computes what ours does")
    library = importlib.import_module("vit_pytorch.cct")  # it has no types
    peer: nn.Module = library.CCT(
        img_size=config.image_shape,
        embedding_dim=config.embed_dim,
        n_input_channels=config.in_chans,
        n_conv_layers=config.num_convs,
        kernel_size=config.kernel_size,
        stride=config.conv_stride,
        padding=config.kernel_size // 2,
        num_layers=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        num_classes=config.num_classes,
        positional_embedding="learnable",
        attention_dropout=0.0,
        stochastic_depth_rate=0.0,
    )
    peer.load_state_dict(ours.state_dict())
    return peer


def _onnxruntime(name: str, ours: Encoder) -> nn.Module:
    onnxruntime = importlib.import_module("onnxruntime")  # it has no types
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with _exported(name, ours, "onnx") as file:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return Runtime(lambda images: session.run(None, {"images": images})[0])


def _openvino(name: str, ours: Encoder) -> nn.Module:
    openvino = importlib.import_module("openvino")  # it has no types
    # Where the processor has bfloat16, it would compute in that.
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    with _exported(name, ours, "openvino") as file:
        compiled = openvino.Core().compile_model(file, "CPU", hints)
    return Runtime(lambda images: compiled(images)[0])


@contextmanager
def _exported(name: str, ours: Encoder, form: Literal["onnx", "openvino"]) -> Iterator[Path]:
    """Our model as a file, while inside."""
    from vitrail.shipping.export import SUFFIXES, write_export

    config = ours.config
    stored = ModelFolder(
        model=ours,
        name=name,
        classes=tuple(map(str, range(config.num_classes))),
        preprocessing={"img_size": list(config.image_shape), "in_chans": config.in_chans},
    )
    with tempfile.TemporaryDirectory() as folder:
        yield write_export(Path(folder) / ("model" + SUFFIXES[form]), stored, form).file


_BUILDERS: dict[str, Callable[[str, Encoder], nn.Module]] = {
    "timm": _timm,
    "transformers": _transformers,
    "torchvision": _torchvision,
    "vit-pytorch": _vit_pytorch,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
RUNTIMES = ("onnxruntime", "openvino")
"""Those that only infer, on the CPU in float32 as they are measured here."""
PEERS = tuple(_BUILDERS)
"""The libraries that a model can be measured against."""

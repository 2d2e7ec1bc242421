"""transformers' ViT, DeiT, DINOv2, Swin, Swin V2, PVT and PVT v2: names, configs and preprocessing.

The names are those of the files (`vit.encoder.layer.0.attention.attention.query.weight`), which have stayed
the same while the library's own attributes changed.

What differs: its image processors stretch an image to a square, ours keep its shape and crop the middle. Its
ViTs add 1e-12 to the variance in their norms where the papers' models, and ours, add 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vitrail.models.pvt import PVTConfig
from vitrail.models.pvt_v2 import PVTv2Config
from vitrail.models.swin import SwinConfig
from vitrail.models.swin_v2 import SwinV2Config
from vitrail.models.vit import ViTConfig
from vitrail.noise import quiet
from vitrail.pretrained.names import Rule, joined, renamed

IGNORED = {
    "*.relative_position_index": "computed from the window's size",
    "*.relative_coords_table": "computed from the window's size",
    "*.pooler.dense.*": "a layer that no classifier reads",
    "*.mask_token": "stands for hidden patches in pre-training",
    "decoder.*": "the decoder of masked pre-training",
    "classifier.*": "reads the class token and the mean of the patches side by side",
}
MARKS = (
    "patch_embeddings.projection.weight",
    "patch_embeddings.0.projection.weight",
    "patch_embedding.proj.weight",
)
"""Ends of names that no other library has."""
_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Family:
    """One kind of model of transformers, and how its config corresponds to one of ours."""

    model_type: str
    architecture: str
    """The class with a classifier."""
    config: type
    base: str
    """The variant from which a config is read."""
    rules: Callable[[Any], list[Rule]]
    fields: Mapping[str, str]
    """Our field -> theirs, with the same value."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Values that our fields must have."""
    theirs: Mapping[str, Any] = field(default_factory=dict)
    """Values that their fields must have."""
    written: bool = True
    """Whether models of ours become models of theirs."""

    @property
    def prefix(self) -> str:
        """What stands before the names of the encoder's tensors."""
        return f"{self.model_type}."


def _vit_rules(prefix: str, heads: Sequence[tuple[str, str]]) -> list[Rule]:
    block = f"{prefix}encoder.layer.{{n}}"
    parts = tuple(f"{block}.attention.attention.{part}.{{p}}" for part in ("query", "key", "value"))
    return [
        renamed("cls_token", f"{prefix}embeddings.cls_token"),
        renamed("dist_token", f"{prefix}embeddings.distillation_token"),
        renamed("reg_token", f"{prefix}embeddings.register_tokens"),
        renamed("pos_embed", f"{prefix}embeddings.position_embeddings"),
        renamed("patch_embed.proj.{p}", f"{prefix}embeddings.patch_embeddings.projection.{{p}}"),
        joined("blocks.{n}.attn.qkv.{p}", *parts),
        renamed("blocks.{n}.attn.proj.{p}", f"{block}.attention.output.dense.{{p}}"),
        renamed("blocks.{n}.norm1.{p}", f"{block}.layernorm_before.{{p}}"),
        renamed("blocks.{n}.norm2.{p}", f"{block}.layernorm_after.{{p}}"),
        renamed("blocks.{n}.mlp.fc1.{p}", f"{block}.intermediate.dense.{{p}}"),
        renamed("blocks.{n}.mlp.fc2.{p}", f"{block}.output.dense.{{p}}"),
        renamed("norm.{p}", f"{prefix}layernorm.{{p}}"),
        *(renamed(f"{ours}.{{p}}", f"{theirs}.{{p}}") for ours, theirs in heads),
    ]


def _dinov2_rules(prefix: str) -> list[Rule]:
    block = f"{prefix}encoder.layer.{{n}}"
    return [
        renamed("blocks.{n}.ls{m}.gamma", f"{block}.layer_scale{{m}}.lambda1"),
        renamed("blocks.{n}.norm{m}.{p}", f"{block}.norm{{m}}.{{p}}"),
        renamed("blocks.{n}.mlp.{rest}", f"{block}.mlp.{{rest}}"),
        *_vit_rules(prefix, ()),
    ]


def _swin_rules(config: SwinConfig) -> list[Rule]:
    second = isinstance(config, SwinV2Config)
    prefix = "swinv2." if second else "swin."
    ours, theirs = "layers.{n}.blocks.{m}", f"{prefix}encoder.layers.{{n}}.blocks.{{m}}"
    attention = f"{theirs}.attention.self"
    query, key, value = (f"{attention}.{part}" for part in ("query", "key", "value"))
    if second:
        special = [
            joined(f"{ours}.attn.qkv.weight", f"{query}.weight", f"{key}.weight", f"{value}.weight"),
            renamed(f"{ours}.attn.q_bias", f"{query}.bias"),
            renamed(f"{ours}.attn.v_bias", f"{value}.bias"),
            renamed(f"{ours}.attn.logit_scale", f"{attention}.logit_scale"),
            renamed(f"{ours}.attn.cpb_mlp.{{rest}}", f"{attention}.continuous_position_bias_mlp.{{rest}}"),
        ]
    else:
        table = "relative_position_bias_table"
        special = [
            joined(f"{ours}.attn.qkv.{{p}}", f"{query}.{{p}}", f"{key}.{{p}}", f"{value}.{{p}}"),
            renamed(f"{ours}.attn.{table}", f"{attention}.{table}"),
        ]
    return [
        renamed("patch_embed.proj.{p}", f"{prefix}embeddings.patch_embeddings.projection.{{p}}"),
        renamed("patch_embed.norm.{p}", f"{prefix}embeddings.norm.{{p}}"),
        *special,
        renamed(f"{ours}.attn.proj.{{p}}", f"{theirs}.attention.output.dense.{{p}}"),
        renamed(f"{ours}.norm1.{{p}}", f"{theirs}.layernorm_before.{{p}}"),
        renamed(f"{ours}.norm2.{{p}}", f"{theirs}.layernorm_after.{{p}}"),
        renamed(f"{ours}.mlp.fc1.{{p}}", f"{theirs}.intermediate.dense.{{p}}"),
        renamed(f"{ours}.mlp.fc2.{{p}}", f"{theirs}.output.dense.{{p}}"),
        # Theirs stands at the end of a stage, ours at the beginning of the next.
        *(
            renamed(
                f"layers.{stage}.downsample.{{rest}}",
                f"{prefix}encoder.layers.{stage - 1}.downsample.{{rest}}",
            )
            for stage in range(1, len(config.depths))
        ),
        renamed("norm.{p}", f"{prefix}layernorm.{{p}}"),
        renamed("head.fc.{p}", "classifier.{p}"),
    ]


def _pvt_rules(config: PVTConfig) -> list[Rule]:
    found = [renamed("cls_token", f"pvt.encoder.patch_embeddings.{len(config.depths) - 1}.cls_token")]
    for stage in range(len(config.depths)):
        number, patches = stage + 1, f"pvt.encoder.patch_embeddings.{stage}"
        ours, theirs = f"block{number}.{{n}}", f"pvt.encoder.block.{stage}.{{n}}"
        attention = f"{theirs}.attention.self"
        found += [
            renamed(f"pos_embed{number}", f"{patches}.position_embeddings"),
            renamed(f"patch_embed{number}.proj.{{p}}", f"{patches}.projection.{{p}}"),
            renamed(f"patch_embed{number}.norm.{{p}}", f"{patches}.layer_norm.{{p}}"),
            renamed(f"{ours}.attn.q.{{p}}", f"{attention}.query.{{p}}"),
            joined(f"{ours}.attn.kv.{{p}}", f"{attention}.key.{{p}}", f"{attention}.value.{{p}}"),
            renamed(f"{ours}.attn.sr.{{p}}", f"{attention}.sequence_reduction.{{p}}"),
            renamed(f"{ours}.attn.norm.{{p}}", f"{attention}.layer_norm.{{p}}"),
            renamed(f"{ours}.attn.proj.{{p}}", f"{theirs}.attention.output.dense.{{p}}"),
            renamed(f"{ours}.norm{{m}}.{{p}}", f"{theirs}.layer_norm_{{m}}.{{p}}"),
            renamed(f"{ours}.mlp.fc{{m}}.{{p}}", f"{theirs}.mlp.dense{{m}}.{{p}}"),
        ]
    return [*found, renamed("norm.{p}", "pvt.encoder.layer_norm.{p}"), renamed("head.{p}", "classifier.{p}")]


def _pvt_v2_rules(config: PVTv2Config) -> list[Rule]:
    layer = "pvt_v2.encoder.layers"
    ours, theirs = "stages.{n}.blocks.{m}", f"{layer}.{{n}}.blocks.{{m}}"
    found = [
        renamed("patch_embed.proj.{p}", f"{layer}.0.patch_embedding.proj.{{p}}"),
        renamed("patch_embed.norm.{p}", f"{layer}.0.patch_embedding.layer_norm.{{p}}"),
        renamed("stages.{n}.downsample.proj.{p}", f"{layer}.{{n}}.patch_embedding.proj.{{p}}"),
        renamed("stages.{n}.downsample.norm.{p}", f"{layer}.{{n}}.patch_embedding.layer_norm.{{p}}"),
        renamed("stages.{n}.norm.{p}", f"{layer}.{{n}}.layer_norm.{{p}}"),
        renamed(f"{ours}.attn.q.{{p}}", f"{theirs}.attention.query.{{p}}"),
        joined(f"{ours}.attn.kv.{{p}}", f"{theirs}.attention.key.{{p}}", f"{theirs}.attention.value.{{p}}"),
        renamed(f"{ours}.attn.sr.{{p}}", f"{theirs}.attention.spatial_reduction.{{p}}"),
        renamed(f"{ours}.attn.norm.{{p}}", f"{theirs}.attention.layer_norm.{{p}}"),
        renamed(f"{ours}.attn.proj.{{p}}", f"{theirs}.attention.proj.{{p}}"),
        renamed(f"{ours}.mlp.dwconv.{{p}}", f"{theirs}.mlp.dwconv.dwconv.{{p}}"),
        *(
            rule
            for number in (1, 2)
            for rule in (
                renamed(f"{ours}.norm{number}.{{p}}", f"{theirs}.layer_norm_{number}.{{p}}"),
                renamed(f"{ours}.mlp.fc{number}.{{p}}", f"{theirs}.mlp.dense{number}.{{p}}"),
            )
        ),
        renamed("head.{p}", "classifier.{p}"),
    ]
    return found


_VIT_FIELDS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "num_channels",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "qkv_bias": "qkv_bias",
    "drop": "hidden_dropout_prob",
    "attn_drop": "attention_probs_dropout_prob",
}
_VIT_FIXED = {
    "attention": "full",
    "mlp": "gelu",
    "patch_embed": "conv",
    "position": "learned",
    "prefix_position": True,
    "class_token": True,
    "registers": 0,
    "pool": "cls",
    "fc_norm": False,
    "head": "linear",
    "qk_norm": False,
    "layer_scale": None,
}
_SWIN_FIELDS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "num_channels",
    "embed_dim": "embed_dim",
    "depths": "depths",
    "num_heads": "num_heads",
    "window_size": "window_size",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "drop": "hidden_dropout_prob",
    "attn_drop": "attention_probs_dropout_prob",
    "drop_path": "drop_path_rate",
}
_PVT_FIELDS = {
    "img_size": "image_size",
    "in_chans": "num_channels",
    "embed_dims": "hidden_sizes",
    "depths": "depths",
    "num_heads": "num_attention_heads",
    "mlp_ratios": "mlp_ratios",
    "drop": "hidden_dropout_prob",
    "attn_drop": "attention_probs_dropout_prob",
    "drop_path": "drop_path_rate",
}
_DINOV2_FIELDS = _VIT_FIELDS | {
    "layer_scale": "layerscale_value",
    "mlp_ratio": "mlp_ratio",
    "drop_path": "drop_path_rate",
}

FAMILIES = (
    Family(
        "vit",
        "ViTForImageClassification",
        ViTConfig,
        "vit_base_patch16_224",
        lambda config: _vit_rules("vit.", [("head", "classifier")]),
        _VIT_FIELDS,
        _VIT_FIXED | {"distillation": False},
    ),
    Family(
        "deit",
        "DeiTForImageClassificationWithTeacher",
        ViTConfig,
        "deit_base_distilled_patch16_224",
        lambda config: _vit_rules(
            "deit.", [("head", "cls_classifier"), ("head_dist", "distillation_classifier")]
        ),
        _VIT_FIELDS,
        _VIT_FIXED | {"distillation": True},
    ),
    Family(
        "dinov2",
        "Dinov2ForImageClassification",
        ViTConfig,
        "vit_base_patch14_dinov2",
        lambda config: _dinov2_rules("dinov2."),
        _DINOV2_FIELDS,
        theirs={"use_swiglu_ffn": False},
        written=False,  # its classifier reads the class token and the mean of the patches
    ),
    Family(
        "dinov2_with_registers",
        "Dinov2WithRegistersForImageClassification",
        ViTConfig,
        "vit_base_patch14_reg4_dinov2",
        lambda config: _dinov2_rules("dinov2_with_registers."),
        _DINOV2_FIELDS | {"registers": "num_register_tokens"},
        theirs={"use_swiglu_ffn": False},
        written=False,
    ),
    Family(
        "swin",
        "SwinForImageClassification",
        SwinConfig,
        "swin_tiny_patch4_window7_224",
        _swin_rules,
        _SWIN_FIELDS,
        theirs={"use_absolute_embeddings": False},
    ),
    Family(
        "swinv2",
        "Swinv2ForImageClassification",
        SwinV2Config,
        "swinv2_tiny_window8_256",
        _swin_rules,
        _SWIN_FIELDS,
        theirs={"use_absolute_embeddings": False},
    ),
    Family(
        "pvt",
        "PvtForImageClassification",
        PVTConfig,
        "pvt_tiny",
        _pvt_rules,
        _PVT_FIELDS | {"sr_ratios": "sequence_reduction_ratios"},
        theirs={"qkv_bias": True},
    ),
    Family(
        "pvt_v2",
        "PvtV2ForImageClassification",
        PVTv2Config,
        "pvt_v2_b1",
        _pvt_v2_rules,
        _PVT_FIELDS | {"sr_ratios": "sr_ratios", "linear": "linear_attention"},
        theirs={"qkv_bias": True},
    ),
)


def family_of(config: Any) -> Family:
    """The family that has a model of ours.

    Raises:
        ValueError: transformers has no such model; the message names what is different.
    """
    different = ""
    for family in FAMILIES:
        if type(config) is not family.config or not family.written:
            continue
        wrong = [name for name, value in family.fixed.items() if getattr(config, name) != value]
        if not wrong:
            return family
        different = different or f" with {wrong[0]} {getattr(config, wrong[0])!r}"
    raise ValueError(f"transformers has no {type(config).__name__.removesuffix('Config')}{different}")


def reading_family(state: Mapping[str, Tensor], config: Any) -> Family:
    """The family whose files look like this one and that can become a model of ours.

    Raises:
        ValueError: transformers has no such model.
    """
    fitting = [family for family in FAMILIES if family.config is type(config)]
    for family in fitting:
        if any(name.startswith(family.prefix) for name in state):
            return family
    for family in fitting:  # a bare encoder: nothing stands before the names
        dinov2 = any(name.endswith("layer_scale1.lambda1") for name in state)
        if dinov2 == family.model_type.startswith("dinov2"):
            return family
    raise ValueError(f"transformers has no {type(config).__name__.removesuffix('Config')}")


def with_prefix(state: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """The names of a model with a classifier, where those of a bare encoder were stored."""
    prefix = f"{model_type}."
    if any(name.startswith(prefix) for name in state):
        return dict(state)
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def read_config(theirs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The variant that a config.json is nearest to, and all fields in which it differs.

    Raises:
        ValueError: A model that we do not have, or an option that ours does not have.
    """
    masked = theirs.get("model_type") == "vit_mae"
    kind = "vit" if masked else str(theirs.get("model_type"))
    family = next((family for family in FAMILIES if family.model_type == kind), None)
    if family is None:
        known = ", ".join(family.model_type for family in FAMILIES)
        raise ValueError(f"transformers' {kind} is not one of our models; expected {known}")
    for name, value in {"hidden_act": "gelu", **family.theirs}.items():
        if theirs.get(name, value) != value:
            raise ValueError(f"transformers' {kind} with {name} {theirs[name]!r} is not one of our models")
    changes = {ours: _tuples(theirs[name]) for ours, name in family.fields.items() if name in theirs}
    changes["num_classes"] = len(theirs.get("id2label") or {}) or theirs.get("num_labels", 2)
    if kind in ("vit", "deit") and "intermediate_size" in theirs:
        changes["mlp_ratio"] = theirs["intermediate_size"] / theirs["hidden_size"]
    if kind.startswith("dinov2") or masked:
        changes["num_classes"] = 0
    if kind == "swinv2":
        changes["pretrained_window_sizes"] = _trained_windows(theirs)
    if kind.startswith("pvt"):
        changes["patch_size"] = theirs["strides"][0]
    return family.base, changes


def write_config(config: Any, classes: Sequence[str]) -> dict[str, Any]:
    """The config.json of a model of ours.

    Raises:
        ValueError: transformers has no such model.
    """
    family = family_of(config)
    written = {name: _lists(getattr(config, ours)) for ours, name in family.fields.items()}
    written |= dict(family.theirs) | {"model_type": family.model_type, "architectures": [family.architecture]}
    if isinstance(config, ViTConfig):
        written |= {"intermediate_size": int(config.embed_dim * config.mlp_ratio), "layer_norm_eps": 1e-6}
    if isinstance(config, SwinV2Config):
        written["pretrained_window_sizes"] = list(config.trained_windows)
    if isinstance(config, PVTConfig | PVTv2Config):
        first = config.patch_size if isinstance(config, PVTConfig) else 2 * config.patch_size - 1
        later = 2 if isinstance(config, PVTConfig) else 3
        stages = len(config.depths)
        written |= {
            "num_encoder_blocks": stages,
            "patch_sizes": [first, *[later] * (stages - 1)],
            "strides": [config.patch_size, *[2] * (stages - 1)],
            "num_labels": config.num_classes,
        }
    names = list(classes) or [f"LABEL_{number}" for number in range(config.num_classes)]
    return written | {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "dtype": "float32",
    }


def read_preprocessing(theirs: Mapping[str, Any], in_chans: int) -> dict[str, Any]:
    """What a preprocessor_config.json says, in our fields (`vitrail.datasets.Preprocessing`)."""
    size = _height_and_width(theirs.get("size", 224))
    crop = _height_and_width(theirs["crop_size"]) if theirs.get("do_center_crop") else size
    whole = theirs.get("do_normalize", True)
    return {
        "img_size": list(crop),
        "in_chans": in_chans,
        "mean": list(theirs["image_mean"]) if whole else [0.0] * in_chans,
        "std": list(theirs["image_std"]) if whole else [1.0] * in_chans,
        "interpolation": _RESAMPLE[theirs.get("resample", 2)],
        "crop_ratio": min(1.0, min(crop) / min(size)),
    }


def write_preprocessing(ours: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessor_config.json for preprocessing of ours."""
    height, width = ours["img_size"]
    resample = {name: number for number, name in _RESAMPLE.items()}[ours["interpolation"]]
    written: dict[str, Any] = {
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(ours["mean"]),
        "image_std": list(ours["std"]),
        "resample": resample,
    }
    if ours["crop_ratio"] == 1.0:
        size = {"height": height, "width": width}
        return written | {"image_processor_type": "ViTImageProcessor", "size": size}
    larger = {"height": round(height / ours["crop_ratio"]), "width": round(width / ours["crop_ratio"])}
    return written | {
        "image_processor_type": "DeiTImageProcessor",
        "size": larger,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
    }


def load_theirs(
    architecture: str, source: Path | None, *, config: Mapping[str, Any] | None = None, **options: Any
) -> Any:
    """A model of transformers, without its progress bar and what is said while it is imported.

    Args:
        architecture: Name of its class.
        source: What its `from_pretrained` takes.
        config: As `write_config` gives it, where the source has none.
        options: Further ones of `from_pretrained`.
    """
    import vitrail.torchvision_ops  # noqa: F401  (before transformers, which imports torchvision)

    with quiet():  # its models import torchao
        import transformers

        kind = getattr(transformers, architecture)
    if config is not None:
        options["config"] = kind.config_class.from_dict(config)
    speaks = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        return kind.from_pretrained(source, **options)
    finally:
        if speaks:
            transformers.utils.logging.enable_progress_bar()


def _trained_windows(theirs: Mapping[str, Any]) -> tuple[int, ...]:
    """In whose scale offsets count; zeros: that of the windows, which shrink to the grid of their stage."""
    size = min(_height_and_width(theirs["image_size"])) // theirs["patch_size"]
    shrunk = (min(theirs["window_size"], size // 2**stage) for stage in range(len(theirs["depths"])))
    stored = theirs.get("pretrained_window_sizes") or [0] * len(theirs["depths"])
    return tuple(own or window for own, window in zip(stored, shrunk, strict=True))


def _height_and_width(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        if "shortest_edge" in size:
            return size["shortest_edge"], size["shortest_edge"]
        return size["height"], size["width"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _lists(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

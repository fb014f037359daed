"""Tiny random image classifiers, one for each family, and what is to be found in them."""

from dataclasses import dataclass, field
from typing import Any

import transformers

from bitmend.models.cifar_resnet import CifarResNetConfig

VIT_SIZES: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 3,
}
SWIN_SIZES: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": 3,
}
RESNET_SIZES: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 2],
    "num_labels": 3,
    "image_size": 16,
}


@dataclass(frozen=True)
class ImageFamily:
    """One architecture.

    Attributes:
        config_class: in transformers, or a class itself.
        keys: of its config.
        blocks: paths of the blocks.
        heads: paths of the heads.
        first_layer: path of the layer that reads the pictures.
        sites: how many matrices the blocks hold.
    """

    config_class: Any
    keys: dict[str, Any]
    blocks: tuple[str, ...]
    heads: tuple[str, ...]
    first_layer: str
    sites: int
    attends: bool = True
    shape: tuple[int, int, int] = field(default=(3, 8, 8))

    def config(self, **changes: Any) -> Any:
        """Return the config of a tiny model."""
        kind = self.config_class if not isinstance(self.config_class, str) else getattr(transformers, self.config_class)
        return kind(**(self.keys | changes))


IMAGE_FAMILIES: dict[str, ImageFamily] = {
    "vit": ImageFamily(
        "ViTConfig",
        VIT_SIZES,
        ("vit.embeddings", "vit.layers.0", "vit.layers.1"),
        ("classifier",),
        "vit.embeddings.patch_embeddings.projection",
        13,
    ),
    "deit": ImageFamily(
        "DeiTConfig",
        VIT_SIZES | {"architectures": ["DeiTForImageClassification"]},
        ("deit.embeddings", "deit.layers.0", "deit.layers.1"),
        ("classifier",),
        "deit.embeddings.patch_embeddings.projection",
        13,
    ),
    "swin": ImageFamily(
        "SwinConfig",
        SWIN_SIZES,
        (
            "swin.embeddings",
            "swin.encoder.layers.0.blocks.0",
            "swin.encoder.layers.0.blocks.1",
            "swin.encoder.layers.0.downsample",
            "swin.encoder.layers.1.blocks.0",
        ),
        ("classifier",),
        "swin.embeddings.patch_embeddings.projection",
        20,
        shape=(3, 16, 16),
    ),
    "resnet_basic": ImageFamily(
        "ResNetConfig",
        RESNET_SIZES | {"layer_type": "basic"},
        (
            "resnet.embedder",
            "resnet.encoder.stages.0.layers.0",
            "resnet.encoder.stages.1.layers.0",
            "resnet.encoder.stages.1.layers.1",
        ),
        ("classifier.1",),
        "resnet.embedder.embedder.convolution",
        8,
        attends=False,
        shape=(3, 16, 16),
    ),
    "resnet_bottleneck": ImageFamily(
        "ResNetConfig",
        RESNET_SIZES | {"layer_type": "bottleneck"},
        (
            "resnet.embedder",
            "resnet.encoder.stages.0.layers.0",
            "resnet.encoder.stages.1.layers.0",
            "resnet.encoder.stages.1.layers.1",
        ),
        ("classifier.1",),
        "resnet.embedder.embedder.convolution",
        11,
        attends=False,
        shape=(3, 16, 16),
    ),
    "cifar_resnet": ImageFamily(
        CifarResNetConfig,
        {"blocks_per_stage": 1, "stage_channels": [4, 8, 8], "id2label": {0: "a", 1: "b", 2: "c"}},
        (),
        ("classifier",),
        "stem.0",
        7,
        attends=False,
        shape=(3, 32, 32),
    ),
}

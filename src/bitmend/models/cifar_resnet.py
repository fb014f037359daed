"""The residual networks for CIFAR-10, as a model class of transformers, and their conversion from published weights.

Three stages of 16, 32 and 64 channels, n blocks of two 3x3 convolutions in each, 6n + 2 layers with weights: ResNet-20 has
n = 3. The residual networks of transformers have another stem and shortcuts with weights, so none of them can hold these.
Importing this module makes the class known to `AutoConfig` and `AutoModelForImageClassification`.

Source: He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2; shortcuts of option
A. `convert` reads tensors under the names of github.com/akamaster/pytorch_resnet_cifar10.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import field
from itertools import count, pairwise, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, no_type_check

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput

from bitmend.errors import CheckpointError, ModelError, OutputError, RequestError

CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SIZE = 32
# Of the channels of ImageNet, not of CIFAR-10: what the published weights were trained with.
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROCESSOR_FILE = "preprocessor_config.json"

# Ours -> theirs; stages are counted from 0 here and from 1 there.
_ORIGINAL_NAMES = (
    (r"^stem\.conv\.", "conv1."),
    (r"^stem\.norm\.", "bn1."),
    (r"^classifier\.", "linear."),
    (r"\.norm([12])\.", r".bn\1."),
)
_COUNTER = "num_batches_tracked"  # counts training steps only; most published files lack it
_WHAT_TO_GIVE = "give the weights of a CIFAR ResNet whose shortcuts have no weights and whose stages are equally deep"


# ---------------------------------------------------------------------------------------------- the network
# A checker of types, as the tests put around each class, would know the fields below but not those of all configs.
@no_type_check
@strict
class CifarResNetConfig(PreTrainedConfig):
    """Shape of a residual network for small images.

    Attributes:
        blocks_per_stage: n; the network has 6n + 2 layers with weights when it has three stages.
        stage_channels: channels of each stage; each stage but the first halves height and width.
        num_channels: channels of an image.
        image_size: height and width of the images that it is meant for; others run as well.
    """

    model_type = "cifar_resnet"

    blocks_per_stage: int = 3
    stage_channels: list[int] = field(default_factory=lambda: [16, 32, 64])
    num_channels: int = 3
    image_size: int = 32

    def validate_stages(self) -> None:
        """Refuse what no network can be built from; transformers calls this whenever a config is made.

        Raises:
            ModelError: a count below 1, or channels that shrink or grow by an odd number.
        """
        channels = self.stage_channels
        counts = [self.blocks_per_stage, self.num_channels, self.image_size, len(channels), *channels]
        grown = [after - before for before, after in pairwise(channels)]
        if min(counts) < 1 or any(more < 0 or more % 2 for more in grown):
            raise ModelError(
                "blocks_per_stage, num_channels, image_size and stage_channels must be at least 1, and each stage must have "
                f"as many channels as the one before or an even number more; got {self.blocks_per_stage}, "
                f"{self.num_channels}, {self.image_size} and {channels}; check config.json"
            )


class ZeroPadShortcut(nn.Module):
    """Takes every second pixel and adds channels of zeros, as many before as after: a shortcut without weights.

    Attributes:
        stride: step between the pixels that are kept.
        padding: how many channels of zeros are added on either side.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.padding = stride, (out_channels - in_channels) // 2

    def forward(
        self, hidden: Float[Tensor, "image in_channels height width"]
    ) -> Float[Tensor, "image out_channels out_height out_width"]:
        """Return the input, subsampled and padded."""
        kept = hidden[:, :, :: self.stride, :: self.stride]
        return functional.pad(kept, (0, 0, 0, 0, self.padding, self.padding))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, padding={self.padding}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, the first of which may halve height and width, and a shortcut around them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, out_channels, stride)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = _convolution(out_channels, out_channels, 1)
        self.norm2 = nn.BatchNorm2d(out_channels)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = ZeroPadShortcut(in_channels, out_channels, stride) if changes else nn.Identity()
        self.relu2 = nn.ReLU()

    def forward(
        self, hidden: Float[Tensor, "image in_channels height width"]
    ) -> Float[Tensor, "image out_channels out_height out_width"]:
        """Return relu(convolutions of the input + shortcut of the input)."""
        inner = self.relu1(self.norm1(self.conv1(hidden)))
        output: Tensor = self.relu2(self.norm2(self.conv2(inner)) + self.shortcut(hidden))
        return output


class CifarResNetForImageClassification(PreTrainedModel):
    """A residual network for small images: stem, stages of blocks, average over all pixels, linear head.

    All weights lie in modules that pass a single tensor on, one after the other.

    Attributes:
        stem: convolution, norm and ReLU at full resolution.
        stages: a sequence of blocks each.
        pool: (image, channels, height, width) -> (image, channels).
        classifier: one logit for each label.
    """

    config: CifarResNetConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ("BasicBlock",)

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        channels = config.stage_channels
        self.stem = nn.Sequential(
            OrderedDict(
                conv=_convolution(config.num_channels, channels[0], 1),
                norm=nn.BatchNorm2d(channels[0]),
                relu=nn.ReLU(),
            )
        )
        self.stages = nn.ModuleList(
            _stage(before, after, stride=1 if index == 0 else 2, num_blocks=config.blocks_per_stage)
            for index, (before, after) in enumerate(pairwise([channels[0], *channels]))
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(channels[-1], config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Float[Tensor, "image channel height width"],
        labels: Int64[Tensor, " image"] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Return logits, (image, labels).

        Args:
            pixel_values: normalised images; rounded to the model's dtype where they have another.
            labels: right answers, for the loss (mean cross-entropy, nats).
            output_hidden_states: also return the output of the stem and of each stage; None for the config's choice.
            return_dict: False for a tuple in place of an output object; None for the config's choice.
            kwargs: what transformers passes to models of all kinds; not used.
        """
        del kwargs
        hidden = self.stem(pixel_values.to(self.dtype))
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = [hidden] if keep else []
        for stage in self.stages:
            hidden = stage(hidden)
            if keep:
                states.append(hidden)
        logits = self.classifier(self.pool(hidden))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=tuple(states) if keep else None)
        as_object = self.config.return_dict if return_dict is None else return_dict
        return output if as_object else output.to_tuple()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw convolutions and head by He's rule (variance 2 / inputs of an output); norms start as the identity."""
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d | nn.Linear):
            init.kaiming_normal_(module.weight)


def _convolution(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


def _stage(in_channels: int, out_channels: int, stride: int, num_blocks: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(1, num_blocks)))


AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig, exist_ok=True)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification, exist_ok=True)


# ---------------------------------------------------------------------------------------------- conversion
def convert(weights: Path, output: Path, labels: Sequence[str] = CIFAR10_LABELS) -> CifarResNetForImageClassification:
    """Write a model folder from a file of weights under their original names, and return the model, ready to run.

    Blocks and channels are read off the shapes. All is stored in float32. The folder appears when it is complete.

    Args:
        weights: safetensors file; "module." in front of a name is dropped.
        output: folder to make.
        labels: names of the classes, in the order of the logits.

    Raises:
        CheckpointError: the file cannot be read, or its tensors are not those of such a network.
        RequestError: the output exists, or the labels are not as many as the logits.
        OutputError: the folder could not be written.
    """
    if output.exists():
        raise RequestError(f"{output} exists; choose another output")
    try:
        with safe_open(weights, framework="pt") as file:
            model = _read(file, weights, labels)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{weights} cannot be read as safetensors ({error}); copy or download it again"
        ) from error
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
            folder = Path(scratch) / output.name
            model.save_pretrained(folder)
            (folder / PROCESSOR_FILE).write_text(json.dumps(_processor(), indent=2) + "\n", encoding="utf-8")
            folder.rename(output)
    except OSError as error:
        raise OutputError(f"{output} could not be written ({error}); free the disk or choose another output") from error
    return model


def _read(file: Any, weights: Path, labels: Sequence[str]) -> CifarResNetForImageClassification:
    """Return the model that an open file holds; tensors are read only after all names and shapes have been checked."""
    names = tuple(file.keys())
    stored = {name.removeprefix("module."): name for name in names}
    if len(stored) < len(names):
        raise CheckpointError(
            f"{weights} holds tensors of the same name with and without 'module.' in front; keep one of them"
        )
    shapes = {name: tuple(file.get_slice(full).get_shape()) for name, full in stored.items()}
    config = _config_of(shapes, weights, labels)
    with torch.device("meta"):
        model = CifarResNetForImageClassification(config)
    wanted = {_original_name(name): tensor for name, tensor in model.state_dict().items()}
    _check_shapes(shapes, wanted, weights)

    def tensor_of(name: str, like: Tensor) -> Tensor:
        if name not in stored:
            return torch.zeros(like.shape, dtype=like.dtype)
        tensor: Tensor = file.get_tensor(stored[name])
        if tensor.is_floating_point() != like.is_floating_point():
            raise CheckpointError(
                f"{name} in {weights} is of type {tensor.dtype}, need one like {like.dtype}; give weights that are not "
                "quantised"
            )
        return tensor.to(like.dtype)

    tensors = {name: tensor_of(_original_name(name), like) for name, like in model.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _config_of(shapes: Mapping[str, tuple[int, ...]], weights: Path, labels: Sequence[str]) -> CifarResNetConfig:
    """Return the config of the network that has tensors of these shapes, as far as a few of them tell."""

    def side(name: str, index: int) -> int:
        if name not in shapes:
            raise CheckpointError(f"{weights} lacks the tensor {name}; {_WHAT_TO_GIVE}")
        if len(shapes[name]) <= index:
            raise CheckpointError(f"{name} in {weights} has the shape {shapes[name]}, too few sides; {_WHAT_TO_GIVE}")
        return shapes[name][index]

    num_labels = side("linear.weight", 0)
    if num_labels != len(labels):
        raise RequestError(
            f"{weights} gives {num_labels} logits, but there are {len(labels)} labels; pass one for each"
        )
    stages = takewhile(shapes.__contains__, (f"layer{number}.0.conv1.weight" for number in count(1)))
    blocks = takewhile(shapes.__contains__, (f"layer1.{number}.conv1.weight" for number in count()))
    try:
        return CifarResNetConfig(
            blocks_per_stage=len(list(blocks)),
            stage_channels=[side(name, 0) for name in stages] or [side("layer1.0.conv1.weight", 0)],
            num_channels=side("conv1.weight", 1),
            image_size=IMAGE_SIZE,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
        )
    except ModelError as error:
        raise CheckpointError(f"{weights} holds no network that can be built: {error}") from error


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Tensor], weights: Path) -> None:
    for name, tensor in wanted.items():
        if name not in shapes:
            if name.endswith(_COUNTER):
                continue
            raise CheckpointError(f"{weights} lacks the tensor {name}; {_WHAT_TO_GIVE}")
        if shapes[name] != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} in {weights} has the shape {shapes[name]}, need {tuple(tensor.shape)}; {_WHAT_TO_GIVE}"
            )
    for name in shapes:
        if name not in wanted:
            raise CheckpointError(
                f"{weights} holds the tensor {name}, which the network does not have; {_WHAT_TO_GIVE}"
            )


def _original_name(name: str) -> str:
    """Return the original name of one of our tensors: stages.1.0.norm2.bias -> layer2.0.bn2.bias."""
    for pattern, replacement in _ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"^stages\.(\d+)\.", lambda match: f"layer{int(match[1]) + 1}.", name)


def _processor() -> dict[str, Any]:
    """Return what transformers' image processors read: scale to 0..1, normalise, resize what is not 32x32."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }

"""Models of pictures of transformers, block by block from disk: ViT, DeiT, Swin, ResNet, ConvNeXt, CLIP's vision tower.

They are classifiers, or encoders, which give an embedding of each picture.

Nothing here knows a model by name. The blocks are the links of the chain that leads from the pictures towards the head
(`chain.py`), the convolution or embedding that reads the pictures among them; what lies behind the last block is run by the
model's own `forward`. That nothing but the next block reads what a block returns is proved when a model is opened: all that
blocks return but the last is made NaN, and what the model gives must be finite.

The classifiers of this repository (`cifar_resnet.py`) are models of transformers, too.
"""

import copy
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from bitmend.errors import ModelError, RequestError
from bitmend.models.architecture import encoder_class, two_towers, why_no_image_classifier
from bitmend.models.attention import find_attentions
from bitmend.models.chain import Chain, find_chain
from bitmend.models.detour import detour
from bitmend.models.hf_blocks import HfBlocks
from bitmend.models.image_processor import COMBINED_FILE, PROCESSOR_FILE, channels_of, load_processor
from bitmend.models.loading import IMAGE_CLASSIFIER, build
from bitmend.models.tensor_source import TensorSource, outside
from bitmend.models.tracing import describe, trace_block
from bitmend.models.wiring import find_wiring
from bitmend.protocols import ADAPTERS, Batch, BlockInputs, ImageBatch, pixels_of
from bitmend.sites import AttentionSite, Block, ModelEnds, Wiring

USUAL_SIZE = 224
TRACE_ROWS = 2


@ADAPTERS.register("hf_image")
class HfImage(HfBlocks):
    """Image classifiers and encoders of transformers, told apart by structure and not by name.

    Attributes:
        embedding_name: None; the layer that reads the pictures belongs to a block.
        head_names: paths of the linear layers behind the last block.
        first_layer: path of the layer that runs first.
        idle: paths of layers outside the blocks that never run.
    """

    wanted: ClassVar[str] = "an image classifier or encoder"
    reads: ClassVar[Literal["tokens", "pictures"]] = "pictures"
    embedding_name: ClassVar[None] = None
    # A picture is one place; how many rows a layer makes of it stands in `SiteGroup.rows_per_place`.
    row_length: ClassVar[int] = 1

    def __init__(self, model: nn.Module, folder: Path, config: Any, source: TensorSource, twin: nn.Module) -> None:
        """Find the blocks of an empty model and load the rest; use `open` instead.

        Args:
            model: parameters on meta.
            folder: where it comes from.
            config: of transformers.
            source: of its weights.
            twin: the same model, all of it on meta; only its shapes are looked at.
        """
        super().__init__(model, folder, config, source)
        self._twin = twin
        self._chains: dict[tuple[int, ...], Chain] = {}
        self.image_shape = _image_shape(config, folder)
        chain = self.chain(self.image_shape)
        self._refuse_elsewhere(chain)
        self.block_names = tuple(link.name for link in chain.links)
        self.head_names, self.first_layer, self.idle = chain.heads, chain.first_layer, chain.idle
        source.fill(outside(source.names, self.block_names))
        source.tie()
        self._prove()

    @classmethod
    def why_not(cls, config: Any) -> str | None:
        """Return why this adapter cannot read a model of `config`, or None when it may try."""
        if two_towers(config):
            return "it has two towers, of which one has to be chosen"
        return None if encoder_class(config, "pictures") else why_no_image_classifier(config)

    @classmethod
    def task_of(cls, config: Any) -> str:
        """Return the class of transformers that builds such a model."""
        return encoder_class(config, "pictures") or IMAGE_CLASSIFIER

    @classmethod
    def _of(
        cls, model: nn.Module, folder: Path, config: Any, source: TensorSource, trust_remote_code: bool
    ) -> "HfImage":
        """Return the adapter of an empty model, which looks at the shapes of a second one."""
        return cls(
            model, folder, config, source, _twin_of(cls.task_of(config), config, source.dtype, trust_remote_code)
        )

    # ------------------------------------------------------------------------------------------ shapes
    def chain(self, shape: tuple[int, ...]) -> Chain:
        """Return the chain for pictures of one shape (channels, height, width).

        Raises:
            RequestError: the model cannot read them.
        """
        if shape not in self._chains:
            try:
                found = find_chain(self._twin, shape, lambda pixels: self._twin(pixel_values=pixels), self.dtype)
            except ModelError as error:
                if not self._chains:
                    raise
                raise RequestError(str(error)) from error
            known = next(iter(self._chains.values()), found)
            if [link.name for link in found.links] != [link.name for link in known.links]:
                raise RequestError(
                    f"{self._what()} runs other blocks for pictures of {shape} than for {self.image_shape}; give pictures of "
                    f"{self.image_shape}"
                )
            self._chains[shape] = found
        return self._chains[shape]

    def few_rows(self) -> ImageBatch:
        """Return a few pictures of noise; only the order of layers is read from them."""
        draw = torch.Generator().manual_seed(0)
        return ImageBatch(torch.randn(TRACE_ROWS, *self.image_shape, generator=draw))

    def sample_inputs(self, index: int, rows: int, length: int) -> tuple[Tensor, BlockInputs]:
        """Return some noise as block `index` reads it, and the arguments of the blocks."""
        del length
        batch = ImageBatch(torch.zeros(rows, *self.image_shape))
        draw = torch.Generator().manual_seed(0)
        noise = torch.randn(rows, *self.chain(self.image_shape).links[index].input_shape, generator=draw)
        return noise.to(self.device, self.dtype), self.block_inputs(batch)

    def stream_width(self) -> int:
        """Return the entries of the largest tensor that one picture becomes between two blocks."""
        links = self.chain(self.image_shape).links
        return max(torch.Size(shape).numel() for link in links for shape in (link.input_shape, link.output_shape))

    # ------------------------------------------------------------------------------------------ running
    def block_inputs(self, batch: Batch) -> BlockInputs:
        """Return the pictures, which the first block reads, and with what each block is called."""
        pixels = pixels_of(batch)
        links = self.chain(tuple(pixels.shape[1:])).links
        return BlockInputs(pixels.to(self.device, self.dtype), tuple(link.arguments for link in links))

    def forward_block(
        self, index: int, hidden: Float[Tensor, "batch *features"], inputs: BlockInputs
    ) -> Float[Tensor, "batch *made"]:
        """Run one loaded block with gradients, if they are on."""
        args, kwargs = inputs.arguments[index]
        # How a block returns does not depend on the size of the pictures.
        link = self.chain(self.image_shape).links[index]
        return link.unwrap(self.block(index)(hidden, *args, **kwargs))

    def forward_logits(self, hidden: Float[Tensor, "batch *features"], batch: Batch) -> Float[Tensor, "batch label"]:
        """Run everything after the last block with gradients, if they are on."""
        pixels = pixels_of(batch).to(self.device, self.dtype)
        links = self.chain(tuple(pixels.shape[1:])).links
        last = len(links) - 1

        def replace(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            del args, kwargs
            link = links[index]
            # Nobody reads it; NaN so that it would be seen.
            return link.wrap(hidden if index == last else hidden.new_full((len(pixels), *link.output_shape), torch.nan))

        with detour([self.block(index) for index in range(len(links))], replace):
            return answer_of(self.model(pixel_values=pixels))

    # ------------------------------------------------------------------------------------------ what is in a block
    def describe_block(self, index: int, batch: Batch) -> Block:
        """Run some noise through a loaded block and return its sites in execution order."""
        hidden, inputs = self.sample_inputs(index, TRACE_ROWS, 1)
        del batch
        block = self.block(index)
        trace = trace_block(block, lambda: self.run_block(index, hidden, inputs))
        return describe(self.block_names[index], index, block, trace, places=TRACE_ROWS)

    def wiring_of(self, block: Block, batch: Batch) -> Wiring:
        """Return how the layers of a loaded block hang together; runs it on noise some times."""
        del batch
        hidden, inputs = self.sample_inputs(block.index, TRACE_ROWS, 1)
        return find_wiring(block, lambda: self.run_block(block.index, hidden, inputs), hidden.shape[-1])

    def attentions_of(self, block: Block, batch: Batch) -> tuple[AttentionSite, ...]:
        """Return where a loaded block attends; runs it on noise. `prepare_attention_` comes first."""
        del batch
        hidden, inputs = self.sample_inputs(block.index, TRACE_ROWS, 1)
        return find_attentions(block.name, block.module, lambda: self.run_block(block.index, hidden, inputs))

    def ends(self, batch: Batch) -> ModelEnds:
        """Refuse: what lies around the blocks of an image model takes part in no transform."""
        raise ModelError(
            f"{self._what()} has no token embedding and no head over a vocabulary, which a transform of the whole model "
            "needs; take transforms of single blocks only"
        )

    # ------------------------------------------------------------------------------------------ opening
    def _refuse_elsewhere(self, chain: Chain) -> None:
        if chain.elsewhere:
            raise ModelError(
                f"{self._what()} has layers that run beside its blocks ({', '.join(chain.elsewhere[:3])}), where nothing can "
                "quantise them; this architecture needs an adapter of its own"
            )

    @torch.no_grad()
    def _prove(self) -> None:
        """Refuse a model in which something else than the next block reads what a block returns."""
        batch = self.few_rows()
        last = self.chain(self.image_shape).links[-1]
        hidden = torch.ones(TRACE_ROWS, *last.output_shape, dtype=self.dtype, device=self.device)
        logits = self.logits(hidden, ImageBatch(torch.full_like(batch.pixels, torch.nan)))
        if not bool(logits.isfinite().all()):
            raise ModelError(
                f"{self._what()} reads what a block returns in another place than the next block, or gives what is not "
                "finite; this architecture needs an adapter of its own"
            )


def _image_shape(config: Any, folder: Path) -> tuple[int, int, int]:
    """Return (channels, height, width) of what the model's processor gives, or its config speaks of, or is usual.

    Some models keep what they are called with once (Swin its shift), so that even noise has to have the size of the pictures.
    """
    if any((folder / name).is_file() for name in (PROCESSOR_FILE, COMBINED_FILE)):
        shape = load_processor(folder, channels_of(config)).size
        if shape is not None:
            return shape
    size = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", None)
    height, width = (USUAL_SIZE, USUAL_SIZE)
    if isinstance(size, int) and size > 0:
        height = width = size
    elif isinstance(size, (list, tuple)) and len(size) == 2:
        height, width = size
    return channels_of(config), height, width


def answer_of(output: Any) -> Tensor:
    """Return the logits from what a model of pictures gives; of an encoder the embedding of each picture."""
    for name in ("logits", "image_embeds", "pooler_output"):
        found = output.get(name)
        if isinstance(found, Tensor):
            return found
    states: Tensor = output.last_hidden_state
    return states


def _twin_of(task: str, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    with no_init_weights(), torch.device("meta"):
        return build(task, copy.deepcopy(config), trust_remote_code, dtype=dtype).eval()

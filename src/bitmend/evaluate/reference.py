"""The reference's logits for the windows of a text, without running its network more often than needed.

Log-probabilities of a text are large (2.7 GB for 160 windows of 512 tokens over 8,192 words). Where the logits are
exactly the output head applied to the final hidden states, as a bit-for-bit comparison on the first batch tells, the
hidden states and the head are kept instead, in memory and in the cache, and only the head runs again. Cached or not,
the logits then come from the same product of the same numbers, so that both give equal results. Where something follows
the head (a softcap, a scale), the whole reference runs again for each model, and says so.
"""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import transformers
from jaxtyping import Float, Int64
from torch import Tensor, nn

from bitmend.errors import NumericsError, RequestError
from bitmend.evaluate.load import LoadedModel, check_context, load_model
from bitmend.evaluate.reference_cache import ReferenceCache, digest_of
from bitmend.evaluate.windows import TokenWindows
from bitmend.models.fingerprint import model_fingerprint
from bitmend.models.loading import read_config, resolve_model
from bitmend.models.tokenizer import load_tokenizer
from bitmend.numerics.products import FastLinear, linear
from bitmend.protocols import Progress


@runtime_checkable
class ReferenceLogits(Protocol):
    """The reference's logits on the windows of one text."""

    @property
    def vocabulary(self) -> int:
        """How many words there are."""
        ...

    def batch(self, windows: slice) -> Float[Tensor, "window token vocabulary"]:
        """Return the logits of some windows, on the evaluation device."""
        ...


@dataclass(frozen=True)
class HiddenLogits:
    """Logits from final hidden states.

    Attributes:
        hidden: what enters the head, on the CPU.
        weight: of the head, on the evaluation device.
        bias: of the head.
    """

    hidden: Float[Tensor, "window token features"]
    weight: Float[Tensor, "vocabulary features"]
    bias: Float[Tensor, " vocabulary"] | None

    @property
    def vocabulary(self) -> int:
        """How many words there are."""
        return len(self.weight)

    def batch(self, windows: slice) -> Float[Tensor, "window token vocabulary"]:
        """Apply the head; cost 2 T F V operations."""
        return linear(self.hidden[windows].to(self.weight.device), self.weight, self.bias)


@dataclass(frozen=True)
class LiveLogits:
    """Logits from running the whole reference."""

    model: LoadedModel
    ids: Int64[Tensor, "window token"]
    vocabulary: int

    def batch(self, windows: slice) -> Float[Tensor, "window token vocabulary"]:
        """Run the network."""
        return run_model(self.model, self.ids[windows])


def run_model(model: LoadedModel, ids: Int64[Tensor, "window token"]) -> Float[Tensor, "window token vocabulary"]:
    """Return the logits of a model that is in evaluation mode.

    Raises:
        RequestError: a token is beyond the model's vocabulary.
        NumericsError: the logits hold NaN or infinity.
    """
    embedding: Any = model.model.get_input_embeddings()  # type: ignore[operator]
    if int(ids.max()) >= len(embedding.weight):
        raise RequestError(
            f"{model.name}: token numbers below its vocabulary of {len(embedding.weight)} are required, but its "
            f"tokenizer gives {int(ids.max())}; copy the tokenizer that belongs to the model"
        )
    with torch.no_grad(), FastLinear():
        # Any: nn.Module does not say which device it is on.
        network: Any = model.model
        logits: Tensor = network(input_ids=ids.to(network.device), use_cache=False).logits
    # A finite sum has finite terms, and is a fifth of the work of asking each of them.
    if not bool(torch.isfinite(logits.sum())) and not bool(torch.isfinite(logits).all()):
        raise NumericsError(
            f"{model.name}: finite logits are required, but it gives NaN or infinity on the evaluation text; "
            "look for overflow in its weights or scales, or evaluate it in float32"
        )
    return logits


class Reference:
    """A reference model that is loaded only when its answers are not in the cache."""

    def __init__(
        self,
        source: Path | str | LoadedModel,
        *,
        device: str | torch.device,
        dtype: torch.dtype,
        cache: ReferenceCache,
        progress: Progress,
    ) -> None:
        """Read the tokenizer.

        Raises:
            ModelError: no such model.
            RequestError: it has no tokenizer.
        """
        self.device = torch.device(device)
        self.dtype = dtype
        self.cache = cache
        self.progress = progress
        self._source = source
        self._loaded: LoadedModel | None = None
        self._fingerprint: str | None = None  # None: a model in memory, which the cache cannot know again
        if isinstance(source, LoadedModel):
            self.name, self.tokenizer = source.name, source.tokenizer
        else:
            folder = resolve_model(source)
            read_config(folder)
            self.name, self.tokenizer = str(source), load_tokenizer(folder)
            self._fingerprint = model_fingerprint(folder)

    def logits(self, windows: TokenWindows, batch_size: int) -> ReferenceLogits:
        """Return where the logits on `windows` come from, running the network on all of them if they are not cached."""
        head_key = self._key(part="head")
        # The shapes of the batches count: products of other shapes may round differently.
        hidden_key = self._key(part="hidden", tokens=windows.sha256, batch_size=batch_size)
        if head_key is not None and hidden_key is not None:
            head, hidden = self.cache.load(head_key), self.cache.load(hidden_key)
            if head is not None and hidden is not None:
                self.progress.say(f"{self.name}: hidden states on {windows.file} come from {self.cache.folder}")
                return self._from_hidden(hidden["hidden"], head["weight"], head.get("bias"))
        model = self._load()
        check_context(model, windows.ids.shape[1])
        found = _run_once(model, windows, batch_size, self.progress)
        if found is None:
            self.progress.say(
                f"{self.name}: its logits are not its head applied to its hidden states, so nothing can be cached and "
                "it runs again for each model"
            )
            probe = run_model(model, windows.ids[:1, :2])
            return LiveLogits(model, windows.ids, probe.shape[-1])
        hidden_states, layer = found
        if head_key is not None and hidden_key is not None:
            bias = {} if layer.bias is None else {"bias": layer.bias}
            self.cache.store(head_key, {"weight": layer.weight, **bias})
            self.cache.store(hidden_key, {"hidden": hidden_states})
        return self._from_hidden(hidden_states, layer.weight.detach(), layer.bias)

    def release(self) -> None:
        """Forget the network; logits handed out that need it keep it alive."""
        self._loaded = None

    def _load(self) -> LoadedModel:
        if isinstance(self._source, LoadedModel):
            return self._source
        if self._loaded is None:
            self._loaded = load_model(self._source, self.device, self.dtype)
        return self._loaded

    def _from_hidden(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> HiddenLogits:
        return HiddenLogits(hidden, weight.to(self.device), None if bias is None else bias.detach().to(self.device))

    def _key(self, **facts: Any) -> str | None:
        if self._fingerprint is None:
            return None
        known = {
            "model": self._fingerprint,
            "dtype": str(self.dtype),
            "device": self.device.type,
            "versions": [torch.__version__, transformers.__version__, version("bitmend")],
        }
        return digest_of({**known, **facts})


def check_same_tokens(reference: TokenWindows, model: TokenWindows, reference_name: str, model_name: str) -> None:
    """Refuse a model that reads the text as other tokens than the reference.

    Raises:
        RequestError: it does.
    """
    if reference.ids.shape != model.ids.shape or not torch.equal(reference.ids, model.ids):
        raise RequestError(
            f"{model_name}: the tokenizer of the reference {reference_name} is required for a comparison, but its own "
            f"gives other tokens on {model.file}; compare models of one tokenizer, or leave --reference out"
        )


def _run_once(
    model: LoadedModel, windows: TokenWindows, batch_size: int, progress: Progress
) -> tuple[Tensor, nn.Linear] | None:
    """Return all hidden states and the head, or None when the logits are not exactly the head's output."""
    network: Any = model.model
    head = network.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None
    seen: list[Tensor] = []

    def keep_input(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        del layer
        seen.append(arguments[0].detach())

    handle = head.register_forward_pre_hook(keep_input)
    hidden: list[Tensor] = []
    try:
        slices = list(windows.batches(batch_size))
        label = f"{model.name} (reference) on {windows.file}"
        for chunk in progress.track(slices, label, len(slices)):
            seen.clear()
            logits = run_model(model, windows.ids[chunk])
            if not hidden and not _is_head_output(logits, seen, head):
                return None
            hidden.append(seen[0].cpu())
    finally:
        handle.remove()
    return torch.cat(hidden), head


def _is_head_output(logits: Tensor, seen: list[Tensor], head: nn.Linear) -> bool:
    if len(seen) != 1 or seen[0].shape[:-1] != logits.shape[:-1]:
        return False
    with torch.no_grad():
        again = linear(seen[0], head.weight, head.bias)
    return again.dtype == logits.dtype and torch.equal(again, logits)

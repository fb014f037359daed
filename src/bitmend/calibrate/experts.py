"""Moments of the experts of a block.

What enters a layer of experts does not depend on any expert, so it is taken from the quantised stream once: the block runs up
to that layer, and hidden states and routing are kept. From then on no batch runs through the block again: what an expert's
first matrices read are rows of what was kept, what its last matrix reads comes from running that expert alone on these rows.
The cost of all experts together is therefore that of their tokens, however many experts there are, and the moments of one
group of sites are in memory at a time.

**Which tokens.** Those that the quantised network sends to the expert, in both streams: they are what the deployed expert
will see. The full-precision side of a pair is what the full-precision expert would read on the same token, whether or not the
full-precision router sends it there. So G, C and D are over the same tokens, and every solver sees the same ones
(docs/decisions/0014). Rows are not weighted by the routing weights.
"""

import copy
from collections.abc import Callable, Container, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitmend.calibrate.activation_store import ActivationStore
from bitmend.errors import CalibrationError, ModelError, NumericsError
from bitmend.linalg.moments import Moments, MomentSums
from bitmend.online import rounding_put_off
from bitmend.protocols import Batch, Need
from bitmend.routing import Expert, ExpertTokens, RareExperts, entries_by_expert
from bitmend.sites import Block, SiteGroup

Measured = tuple[Moments, Moments | None]


class InputSeen(Exception):  # noqa: N818 - not an error: it stops a forward pass once the wanted input is there
    """Carries what a module is called with out of a forward pass."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.arguments = arguments


def stopper(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Stop the forward pass in front of a module; a pre-hook."""
    del module
    raise InputSeen(arguments)


def called_with(layer: nn.Module, run: Callable[[], Any], where: str) -> tuple[Any, ...]:
    """Run something up to the call of a layer, and return what it is called with.

    Raises:
        RuntimeError: the layer is not called; says `where`.
    """
    hook = layer.register_forward_pre_hook(stopper)
    try:
        with torch.no_grad():
            run()
    except InputSeen as seen:
        return seen.arguments
    finally:
        hook.remove()
    raise RuntimeError(f"{where} did not run")


def read_both(layer: nn.Module, run: Callable[[], Any], where: str) -> tuple[Tensor, Tensor]:
    """Run something up to the call of a layer, and return what the layer reads: before it is rounded, and as it is."""
    with rounding_put_off(layer) as rounding:
        before: Tensor = called_with(layer, run, where)[0].detach()
    return before, rounding[-1].round(before) if rounding else before


def read_at(group: SiteGroup, rounded: Container[str]) -> str:
    """Return the path of the first site of a group whose input will be rounded; of its first site where none will be."""
    paths = [site.path for site in group.sites]
    return next((path for path in paths if path in rounded), paths[0])


def with_own_rounding(x_fp: Tensor, before: Tensor, x: Tensor) -> Tensor:
    """Return the input in the full-precision network, moved by what rounding has done to that of the quantised one."""
    return x_fp if before is x else x_fp.float() + (x.float() - before.float())


class LayerInputs:
    """What enters one layer of experts, and where it is sent.

    Attributes:
        num_experts: how many there are.
        hidden: one tensor (token, features) a batch, padding included; None where only counts are wanted.
        sent: a batch -> an expert -> its real tokens.
        real: a batch -> its real tokens.
        held_out: whether each batch is held out.
    """

    def __init__(self, experts: nn.Module, store: ActivationStore | None = None) -> None:
        self.num_experts = sum(1 for _ in experts.children())
        self.hidden = store
        self.sent: list[list[Tensor]] = []
        self.real: list[Tensor] = []
        self.held_out: list[bool] = []

    def add_(self, hidden: Tensor, chosen: Tensor, rows: Batch, *, held_out: bool) -> None:
        """Add one call of the module of experts.

        Args:
            hidden: one row a token, padding included.
            chosen: the numbers of the experts of each token.
            rows: the batch.
            held_out: whether it belongs to the held-out split.

        Raises:
            ModelError: the module does not get each token.
        """
        if len(hidden) != rows.num_places:
            raise ModelError(
                f"a layer of experts reads {len(hidden)} rows for a batch of {rows.num_places} tokens, need one row for "
                "each; this architecture needs an adapter of its own"
            )
        mask = None if rows.mask is None else rows.mask.reshape(-1).to(chosen.device)
        sent = [tokens for tokens, _ in entries_by_expert(chosen, self.num_experts)]
        self.sent.append([one.cpu() if mask is None else one[mask[one]].cpu() for one in sent])
        self.real.append(torch.arange(len(hidden)) if mask is None else mask.nonzero().flatten().cpu())
        self.held_out.append(held_out)
        if self.hidden is not None:
            self.hidden.append(hidden)

    def tokens(self, expert: int, width: int, rare: RareExperts) -> ExpertTokens:
        """Return how many tokens reach a matrix of an expert, and on what it is therefore solved.

        Args:
            expert: its number.
            width: inputs of the matrix.
            rare: what is done where they are too few. `refuse` is for the caller to carry out.
        """
        counts = [0, 0]
        for sent, held_out in zip(self.sent, self.held_out, strict=True):
            counts[held_out] += len(sent[expert])
        return rare.judge(counts[0], counts[1] if any(self.held_out) else None, width)


class ExpertInputs:
    """The experts of one block, in both streams.

    With `keep_inputs` it holds what enters each layer of experts in the full-precision network (one stream of activations),
    and a copy of the experts' first matrices, from which the full-precision side of the last one is computed once they are
    rounded.
    """

    def __init__(
        self,
        block: Block,
        new_store: Callable[[], ActivationStore],
        rare: RareExperts,
        *,
        keep_inputs: bool,
        whole_residual: bool = False,
        rounded: Container[str] = (),
    ) -> None:
        self._block, self._new_store, self._rare, self._two_streams = block, new_store, rare, keep_inputs
        self._whole_residual, self._rounded = whole_residual, rounded
        groups = [(group, group.expert) for group in block.groups if group.expert is not None]
        self.paths = tuple(dict.fromkeys(expert.experts for _, expert in groups))
        self.fp_hidden = {path: new_store() for path in self.paths if keep_inputs}
        self._fp_experts = {
            expert.path: _copied_until(block.module.get_submodule(expert.path), _leaf(group, expert))
            for group, expert in groups
            if keep_inputs and expert.step > 0
        }
        self._layers: dict[str, LayerInputs] = {}
        self._pooled: dict[tuple[str, frozenset[Need]], Measured] = {}

    def keep(self, path: str, calls: Callable[[], Iterable[tuple[tuple[Any, ...], Batch, bool]]]) -> None:
        """Keep what enters the layer of experts at `path`, unless it is kept already: nothing solved later changes it.

        Args:
            path: of the module of experts.
            calls: gives, batch by batch, what that module is called with, the rows, and whether they are held out.
        """
        if path not in self._layers:
            layer = LayerInputs(self._block.module.get_submodule(path), self._new_store())
            for arguments, rows, held_out in calls():
                layer.add_(arguments[0], arguments[1], rows, held_out=held_out)
            self._layers[path] = layer

    def tokens(self, group: SiteGroup, expert: Expert) -> ExpertTokens:
        """Return how many tokens reach a group of sites, and on what it is therefore solved.

        Raises:
            CalibrationError: too few, where that is to be refused.
        """
        found = self._layers[expert.experts].tokens(expert.number, group.sites[0].shape[1], self._rare)
        if found.treatment == "refuse":
            raise CalibrationError(refusal(f"{self._block.name}.{expert.path}", found))
        return found

    def moments(self, group: SiteGroup, expert: Expert, needs: frozenset[Need], device: torch.device) -> Measured:
        """Return the moments of a group over the fit split and over the held-out split (None without one).

        Raises:
            NumericsError: the group reads NaN or Inf.
        """
        pooled = self.tokens(group, expert).treatment == "pool"
        if not pooled or expert.step > 0:
            return self._measure(group, expert, needs, device, pooled)
        # What enters the layer is the same for all experts that are measured on it.
        key = (expert.experts, needs)
        if key not in self._pooled:
            self._pooled[key] = self._measure(group, expert, needs, device, pooled)
        # The sums are shared, what solvers remember of them is not: it must not depend on who came first.
        fit, held_out = self._pooled[key]
        return replace(fit, _known={}), None if held_out is None else replace(held_out, _known={})

    def close(self) -> None:
        """Free everything that was kept."""
        for store in (*self.fp_hidden.values(), *(layer.hidden for layer in self._layers.values())):
            if store is not None:
                store.close()
        for kept in (self.fp_hidden, self._layers, self._pooled, self._fp_experts):
            kept.clear()

    def _measure(
        self, group: SiteGroup, expert: Expert, needs: frozenset[Need], device: torch.device, pooled: bool
    ) -> Measured:
        cross, residual = Need.CROSS_MOMENT in needs, Need.RESIDUAL_MOMENT in needs
        if (cross or residual) and not self._two_streams:
            raise ValueError(f"{self._block.name}: C and D need keep_inputs=True")
        width = group.sites[0].shape[1]
        splits = tuple(MomentSums(width, cross=cross, residual=residual, device=device) for _ in range(2))
        layer, leaf = self._layers[expert.experts], _leaf(group, expert)
        assert layer.hidden is not None
        for position, held_out in enumerate(layer.held_out):
            tokens = layer.real[position] if pooled else layer.sent[position][expert.number]
            if not len(tokens):
                continue
            module = self._block.module.get_submodule(expert.path)
            rows, x_fp = layer.hidden[position][tokens].to(device), None
            at = read_at(group, self._rounded)
            before, x = read_both(self._block.module.get_submodule(at), partial(module, rows), at)
            if cross or residual:
                fp_rows = self.fp_hidden[expert.experts][position][tokens].to(device)
                x_fp = fp_rows if expert.step == 0 else read_by(self._fp_experts[expert.path], leaf, fp_rows)
                x_fp = x_fp if self._whole_residual else with_own_rounding(x_fp, before, x)
            splits[held_out].add_(x, x_fp)
        refuse_not_finite(group, splits)
        fit, held_out_sums = splits
        return fit.means(), held_out_sums.means() if held_out_sums.num_tokens else None


def _leaf(group: SiteGroup, expert: Expert) -> str:
    return group.sites[0].path.removeprefix(f"{expert.path}.")


def _copied_until(expert: nn.Module, leaf: str) -> nn.Module:
    """Return a copy of an expert without the weights of its last layer, of which only the input is wanted."""
    last, place = expert.get_submodule(leaf), nn.Identity()
    place._forward_pre_hooks.update(last._forward_pre_hooks)  # what is done to its input belongs to it
    return copy.deepcopy(expert, {id(last): place})


def read_by(expert: nn.Module, leaf: str, rows: Tensor) -> Tensor:
    """Return what the layer `leaf` of an expert reads when the expert runs on `rows`."""
    read: Tensor = called_with(expert.get_submodule(leaf), partial(expert, rows), leaf)[0].detach()
    return read


def refuse_not_finite(group: SiteGroup, splits: Iterable[MomentSums]) -> None:
    """Refuse moments that hold NaN or Inf.

    Raises:
        NumericsError: they do; names the sites.
    """
    for sums in splits:
        if not all(bool(torch.isfinite(m).all()) for m in (sums.G, sums.C, sums.D) if m is not None):
            names = ", ".join(site.name for site in group.sites)
            raise NumericsError(
                f"the input of {names} must be finite, but holds NaN or Inf on the calibration rows; nothing was saved"
            )


def refusal(where: str, tokens: ExpertTokens) -> str:
    """Return the sentence that refuses an expert which too few tokens reach."""
    return (
        f"{where}: {tokens.shortage()}; give more calibration rows, or set calibration.rare_experts to 'pool' or 'rtn'"
    )

"""Recipes: what is to be done to a model, as a TOML file, as keys on the command line, or as an object.

All three end in one `Recipe`, whose keys are checked here once; an unknown key is an error that offers the nearest valid
one. A method's own keys are the fields of its dataclass.
"""

import dataclasses
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt, TypeAdapter, ValidationError, model_validator

from bitmend.errors import RecipeError, RequestError, nearest_name
from bitmend.linalg.hadamard import Rotation
from bitmend.numerics.activation_ranges import AnyRounding
from bitmend.numerics.activations import ActivationSpec
from bitmend.numerics.granularity import Granularity, PerChannel, PerGroup
from bitmend.numerics.log_sqrt2 import LogSqrt2Spec
from bitmend.numerics.qtensor import ObserverName, QuantSpec
from bitmend.numerics.twin_uniform import TwinSoftmaxSpec
from bitmend.numerics.uniform import UniformGrid
from bitmend.online import AttentionScheme
from bitmend.protocols import COMPENSATORS, SOLVERS, TRANSFORMS
from bitmend.registry import Registry
from bitmend.routing import RareChoice, RareExperts
from bitmend.sites import AttentionSite

RECIPES_FOLDER = Path(__file__).parent.parent / "recipes"

ScaleDtype = Literal["auto", "float16", "bfloat16", "float32"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightSection(_Section):
    """How weights are quantised."""

    bits: StrictInt = Field(4, ge=1, le=8)
    group_size: StrictInt = 128  # -1: one scale per output channel
    symmetric: bool = True
    observer: ObserverName = "mse"
    ragged: bool = False
    scale_dtype: ScaleDtype = "auto"

    def spec(self, model_dtype: torch.dtype) -> QuantSpec:
        """Return the grid of these keys for a model of the given dtype.

        `auto` stores scales in the model's own 16-bit type, and as bfloat16 when the model is float32: float16 would be
        finer, but has no number below 6e-8 and few digits below 6e-5, where the scales of small weights lie at 8 bits.
        """
        granularity: Granularity = PerChannel() if self.group_size == -1 else PerGroup(self.group_size, self.ragged)
        if self.scale_dtype == "auto":
            dtype = model_dtype if model_dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
        else:
            dtype = getattr(torch, self.scale_dtype)
        return QuantSpec(UniformGrid(self.bits, self.symmetric), granularity, self.observer, dtype)


# Share of the largest magnitude that the grid covers; `search`: found for each block on calibration rows.
ClipRatio = Annotated[float, Field(gt=0, le=1)] | Literal["search"]
SEARCH = "search"


def _first_ratio(ratio: float | str) -> float:
    return 1.0 if isinstance(ratio, str) else ratio


def _ranges(static: bool | None) -> tuple[float, ...] | None:
    return () if static else None


def _static(bits: int | None) -> ActivationSpec | None:
    """Return a grid with zero points whose range is still to be found."""
    return None if bits is None else ActivationSpec(bits, symmetric=False, ranges=())


class ActivationSection(_Section):
    """How each token is rounded in front of the layers that are quantised, while the model runs."""

    bits: StrictInt = Field(4, ge=2, le=8)
    group_size: StrictInt = -1  # -1: one scale per token
    symmetric: bool = True
    clip_ratio: ClipRatio = 1.0
    static: bool | None = None  # one scale for all tokens, from the calibration rows
    # How a static range is chosen: from the ends of what came by, from quantiles, or by the least squared error. None: from
    # the ends, where the largest magnitude decides (symmetric grids).
    observer: ObserverName | None = None
    # What rounds an input that GELU has made, told by its smallest value: the grid of all inputs, or PTQ4ViT's with a step of
    # its own below zero.
    after_gelu: Literal["twin"] | None = None

    @model_validator(mode="after")
    def _ranges_are_chosen(self) -> "ActivationSection":
        if (self.observer is not None or self.after_gelu is not None) and not self.static:
            raise ValueError(
                "activations.observer and activations.after_gelu choose static ranges; set activations.static = true"
            )
        if self.after_gelu is not None and (self.observer is None or self.clip_ratio == SEARCH):
            raise ValueError("activations.after_gelu needs an observer and no search; set activations.observer")
        if self.static and not self.symmetric and self.observer is None:
            raise ValueError(
                "static ranges with zero points need an observer; set activations.observer to 'minmax', 'percentile' or 'mse'"
            )
        return self

    def spec(self) -> ActivationSpec:
        """Return the grid of these keys, ranges and ratios that are still to be found left open."""
        return ActivationSpec(
            self.bits, self.symmetric, self.group_size, _first_ratio(self.clip_ratio), ranges=_ranges(self.static)
        )


class KvCacheSection(_Section):
    """How keys and values are rounded, head by head of each token; what a cache then keeps."""

    bits: StrictInt = Field(4, ge=2, le=8)
    group_size: StrictInt = -1  # -1: one scale per head of a token
    symmetric: bool = False
    clip_ratio: ClipRatio = 1.0
    static: bool | None = None  # one scale for all tokens of a head
    rotate: bool = True  # queries and keys, head by head, so that no feature of a key stands out

    @model_validator(mode="after")
    def _static_is_symmetric(self) -> "KvCacheSection":
        if self.static and not self.symmetric:
            raise ValueError(
                "static ranges of a cache need a symmetric grid without groups; set kv_cache.symmetric = true, or "
                "static = false"
            )
        return self

    def spec(self) -> ActivationSpec:
        """Return the grid of these keys, as in `ActivationSection`; scales as they are kept."""
        ratio, ranges = _first_ratio(self.clip_ratio), _ranges(self.static)
        return ActivationSpec(self.bits, self.symmetric, self.group_size, ratio, scale_bits=16, ranges=ranges)


class PrefixSection(_Section):
    """Keys and values of a few tokens in front of every text, so that no token of the text takes on massive activations."""

    tokens: list[StrictInt] | None = Field(
        None, min_length=1
    )  # None: those that have massive activations on calibration rows
    threshold: float = Field(64.0, gt=1)  # of a token's largest activation over the median of its row
    max_tokens: StrictInt = Field(8, ge=1)

    @property
    def most_tokens(self) -> int:
        """How many tokens may stand in front."""
        return self.max_tokens if self.tokens is None else len(self.tokens)


class AttentionSection(_Section):
    """How the operands of attention's two products are rounded, those of a cache apart; None: they are not.

    As they stand: queries with one scale per head of a token, symmetric; probabilities with one scale per query and head,
    from 0 on. Static, as in models of pictures: one range with a zero point for each operand, chosen by `observer`.
    """

    query_bits: StrictInt | None = Field(None, ge=2, le=8)
    key_bits: StrictInt | None = Field(
        None, ge=2, le=8
    )  # static only; of language models kv_cache rounds keys and values
    value_bits: StrictInt | None = Field(None, ge=2, le=8)
    probability_bits: StrictInt | None = Field(None, ge=2, le=8)
    static: bool | None = None
    observer: ObserverName | None = None  # of static ranges; None: percentile
    probability_grid: Literal["uniform", "log_sqrt2", "twin"] | None = None  # static only; None: uniform

    @model_validator(mode="after")
    def _static_keys(self) -> "AttentionSection":
        named = {name: getattr(self, name) for name in ("key_bits", "value_bits", "observer", "probability_grid")}
        for name, value in named.items():
            if value is not None and not self.static:
                raise ValueError(f"attention.{name} needs static ranges; set attention.static = true")
        return self

    def scheme(self) -> AttentionScheme:
        """Return how the operands are rounded, ranges that are still to be found left open."""
        if not self.static:
            return AttentionScheme(
                queries=None if self.query_bits is None else ActivationSpec(self.query_bits),
                probabilities=None
                if self.probability_bits is None
                else ActivationSpec(self.probability_bits, symmetric=False),
            )
        return AttentionScheme(
            queries=_static(self.query_bits),
            keys=_static(self.key_bits),
            values=_static(self.value_bits),
            probabilities=self._probabilities(),
        )

    def _probabilities(self) -> AnyRounding | None:
        if self.probability_bits is None:
            return None
        if self.probability_grid == "log_sqrt2":
            return LogSqrt2Spec(self.probability_bits)
        if self.probability_grid == "twin":
            return TwinSoftmaxSpec(self.probability_bits, 0)
        return _static(self.probability_bits)


class OverrideSection(_Section):
    """Other keys for some sites; later overrides win over earlier ones."""

    targets: list[str] = Field(
        min_length=1
    )  # full names; `re:` starts a regular expression that must match from the start
    skip: bool = False
    bits: StrictInt | None = Field(None, ge=1, le=8)
    group_size: StrictInt | None = None
    symmetric: bool | None = None
    observer: ObserverName | None = None
    ragged: bool | None = None
    scale_dtype: ScaleDtype | None = None
    activation_bits: StrictInt | None = Field(None, ge=2, le=8)  # of recipes that round activations at all

    def matches(self, name: str) -> bool:
        """Return whether one of the targets is this site."""
        return any(
            re.match(target[3:], name) is not None if target.startswith("re:") else target == name
            for target in self.targets
        )

    @model_validator(mode="after")
    def _patterns_compile(self) -> "OverrideSection":
        for target in self.targets:
            if target.startswith("re:"):
                try:
                    re.compile(target[3:])
                except re.error as error:
                    raise ValueError(f"{target!r} is no regular expression: {error}") from error
        return self


class CalibrationSection(_Section):
    """Which rows, and how they are split."""

    sequences: StrictInt = Field(128, ge=1)
    sequence_length: StrictInt | None = Field(None, ge=2)  # None: 2,048 or the model's context, whichever is shorter
    held_out: float = Field(0.25, ge=0, lt=1)  # share of sequences that no candidate is fitted to
    seed: StrictInt = Field(0, ge=0)
    two_streams: bool = (
        False  # measure every error against the full-precision network, also where no method asks for it
    )
    # What counts as the residual that gptaq, marr and others repair: what earlier layers have left in a layer's input, or
    # also what rounding that input does to it, where activations are rounded. None stands for whole, so that recipes from
    # before this key keep their fingerprint.
    residual: Literal["inherited", "whole"] | None = None
    refit: bool = True  # fit again on all rows once a candidate has been accepted on the held-out ones
    # Of mixtures of experts: what is done with a matrix that fewer tokens of the fit split reach (or none of the held-out
    # split): measured on all tokens of its layer, rounded to nearest, or the run refused. None stands for pool, and for as
    # many tokens as the matrix has inputs; both are None so that recipes from before these keys keep their fingerprint.
    rare_experts: RareChoice | None = None
    min_tokens_per_expert: StrictInt | None = Field(None, ge=1)

    def rare(self) -> RareExperts:
        """Return what is done with experts that too few tokens reach."""
        return RareExperts(self.rare_experts or "pool", self.min_tokens_per_expert)


class EndSection(_Section):
    """Embedding or head at fewer bits; rounded to nearest, because a table look-up has no input moments."""

    bits: StrictInt = Field(8, ge=2, le=8)
    group_size: StrictInt = -1
    observer: ObserverName = "mse"


class HeadSection(EndSection):
    """The head, and of models of pictures what it reads."""

    activation_bits: StrictInt | None = Field(None, ge=2, le=8)  # where the recipe rounds activations; None: as `bits`


class Recipe(_Section):
    """Everything that decides the codes, apart from the model and the calibration text."""

    name: str = "unnamed"
    weights: WeightSection = WeightSection()
    activations: ActivationSection | None = None  # None: not rounded
    kv_cache: KvCacheSection | None = None  # None: keys and values are not rounded
    attention: AttentionSection | None = None
    prefix: PrefixSection | None = None  # None: nothing stands in front
    solver: dict[str, Any] = {"name": "gptq"}
    transforms: list[dict[str, Any]] = []
    # One at most. None stands for none, so that recipes from before this key keep their fingerprint.
    compensators: list[dict[str, Any]] | None = None
    overrides: list[OverrideSection] = []
    calibration: CalibrationSection = CalibrationSection()
    embedding: EndSection | None = None  # None: left as it is
    head: HeadSection | None = None  # of models whose head is not tied to the embedding

    @model_validator(mode="after")
    def _parts_exist(self) -> "Recipe":
        self.build_solver()
        self.build_transforms()
        self.build_compensator()
        for section in (self.activations, self.kv_cache):
            if section is not None:
                section.spec()
        bits = [override.activation_bits for override in self.overrides]
        bits += [] if self.head is None else [self.head.activation_bits]
        if self.activations is None and any(one is not None for one in bits):
            raise ValueError(
                "activation_bits are for recipes that round activations; set activations.bits, or leave them out"
            )
        attention = self.attention
        both = attention is not None and (attention.key_bits is not None or attention.value_bits is not None)
        if self.kv_cache is not None and both:
            raise ValueError("keys and values are rounded by kv_cache or by attention; give one of them")
        return self

    def build_solver(self) -> Any:
        """Return the solver with its hyperparameters."""
        return build_part(SOLVERS, self.solver)

    def build_transforms(self) -> list[Any]:
        """Return the transforms in order.

        Raises:
            RecipeError: `force`, which every transform has beside its own keys, is neither true nor false.
        """
        for keys in self.transforms:
            if not isinstance(keys.get("force", False), bool):
                raise RecipeError(f"force of a transform must be true or false; got {keys['force']!r}")
        return [
            build_part(TRANSFORMS, {key: value for key, value in keys.items() if key != "force"})
            for keys in self.transforms
        ]

    def build_compensator(self) -> Any:
        """Return what puts maps beside blocks; None: nothing does.

        Raises:
            RecipeError: there are two.
        """
        parts = self.compensators or []
        if len(parts) > 1:
            raise RecipeError(
                f"one compensator at most is possible, because it is fitted to what is left; got {len(parts)}"
            )
        return build_part(COMPENSATORS, parts[0]) if parts else None

    @property
    def needs_rows(self) -> bool:
        """Whether something in it is fitted to calibration rows, or found on them."""
        finds_prefix = self.prefix is not None and self.prefix.tokens is None
        reading = any(part.needs_rows for part in self.build_transforms())
        fitted = bool(self.build_solver().needs) or bool(self.compensators)
        return fitted or reading or self.leaves_open or finds_prefix

    @property
    def leaves_open(self) -> bool:
        """Whether ranges or ratios are to be found."""
        sections = (self.activations, self.kv_cache)
        searched = any(one is not None and (one.static or one.clip_ratio == SEARCH) for one in sections)
        return searched or bool(self.attention is not None and self.attention.static)

    def forced_transforms(self) -> list[bool]:
        """Return of each transform whether it stays even where it makes a block worse."""
        return [keys.get("force", False) for keys in self.transforms]

    def scheme(self, site: str, model_dtype: torch.dtype) -> QuantSpec | None:
        """Return how one site is quantised, or None when an override skips it."""
        keys = self.weights.model_dump()
        skip = False
        for override in self.overrides:
            if override.matches(site):
                changed = override.model_dump(exclude={"targets", "skip", "activation_bits"}, exclude_none=True)
                skip = override.skip
                keys.update(changed)
        return None if skip else WeightSection(**keys).spec(model_dtype)

    def activation_spec(self, site: str) -> ActivationSpec | None:
        """Return how the input of one site is rounded, or None when it is not, or an override skips the site."""
        if self.activations is None or self.scheme(site, torch.bfloat16) is None:
            return None
        bits = [
            override.activation_bits
            for override in self.overrides
            if override.activation_bits is not None and override.matches(site)
        ]
        return replace(self.activations.spec(), bits=bits[-1]) if bits else self.activations.spec()

    def head_activation_spec(self) -> ActivationSpec | None:
        """Return how the input of the head of a model of pictures is rounded, or None when it is not."""
        if self.activations is None or self.head is None:
            return None
        return replace(self.activations.spec(), bits=self.head.activation_bits or self.head.bits)

    @property
    def rounds_attention(self) -> bool:
        """Whether something inside the attention is rounded."""
        return self.kv_cache is not None or (self.attention or AttentionSection()) != AttentionSection()

    @property
    def changes_attention(self) -> bool:
        """Whether attention is not what it was: rounded, or with a prefix."""
        return self.rounds_attention or self.prefix is not None

    def attention_scheme(self, site: AttentionSite) -> AttentionScheme | None:
        """Return how one attention rounds its operands, or None when it does not, or an override skips it.

        Raises:
            RecipeError: a group size that does not divide the width of a head.
        """
        skips = [override.skip for override in self.overrides if override.matches(site.name)]
        if not self.rounds_attention or (skips and skips[-1]):
            return None
        cache = None if self.kv_cache is None else self.kv_cache.spec()
        for width in (site.key_width, site.value_width):
            if cache is not None:
                cache.check_width(width)
        scheme = (self.attention or AttentionSection()).scheme()
        if self.kv_cache is None:
            return scheme
        rotation = Rotation(site.key_width) if self.kv_cache.rotate else None
        return replace(scheme, rotation=rotation, keys=cache, values=cache)

    def to_toml(self) -> str:
        """Return the recipe as a TOML file that reads back as the same recipe."""
        return _toml(self.model_dump(exclude_none=True))


def build_part(registry: Registry[Any], keys: Mapping[str, Any]) -> Any:
    """Return the registered part `keys["name"]` with the other keys as its fields.

    Raises:
        RecipeError: an unknown field (the nearest one is offered), or a value of the wrong type.
        UnknownNameError: no part of that name.
    """
    if not isinstance(keys.get("name"), str):
        raise RecipeError(f"a {registry.kind} must have a name, for example name = 'gptq'; got {dict(keys)}")
    part = registry[keys["name"]]
    fields = {field.name for field in dataclasses.fields(part) if field.init}
    given = {key: value for key, value in keys.items() if key != "name"}
    for key in given:
        if key not in fields:
            hint = nearest_name(key, fields) if fields else "; it has no keys"
            raise RecipeError(f"{registry.kind} {keys['name']!r} has no key {key!r}{hint}")
    try:
        return TypeAdapter(part).validate_python(given)
    except ValidationError as error:
        raise RecipeError(f"{registry.kind} {keys['name']!r}: {_first_problem(error)}") from error


def parse_recipe(keys: Mapping[str, Any]) -> Recipe:
    """Return the recipe of nested keys.

    Raises:
        RecipeError: an unknown key, or a value that does not fit; one sentence.
    """
    try:
        return Recipe.model_validate(dict(keys))
    except ValidationError as error:
        raise RecipeError(_first_problem(error)) from error


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes and of the bare solvers."""
    return sorted({path.stem for path in RECIPES_FOLDER.glob("*.toml")} | {entry.name for entry in SOLVERS})


def load_recipe(name_or_file: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Return a shipped recipe, a bare solver's recipe, or the recipe in a file, with some keys replaced.

    Args:
        name_or_file: for example `gptq`, `llm-w3-gptq`, or a path that ends in `.toml`.
        overrides: dotted keys and their values, for example `{"solver.damping": 0.05}`.

    Raises:
        RequestError: no such recipe or file.
        RecipeError: a file that is no TOML, an unknown key, a value that does not fit.
    """
    keys = _recipe_keys(str(name_or_file))
    for dotted, value in (overrides or {}).items():
        _set_key(keys, dotted, value)
    return parse_recipe(keys)


def _recipe_keys(name: str) -> dict[str, Any]:
    shipped = RECIPES_FOLDER / f"{name}.toml"
    path = shipped if shipped.exists() else Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise RequestError(f"the recipe file {name} does not exist; `bitmend list recipes` names the shipped ones")
        try:
            keys = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"the recipe {name} must be a TOML file: {error}") from error
        return {"name": path.stem, **keys}
    if name in SOLVERS:
        return {"name": name, "solver": {"name": name}}
    raise RequestError(f"no recipe is called {name!r}{nearest_name(name, recipe_names())}")


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Return the keys of `--set KEY=VALUE` options; a value that is no TOML value is taken as text."""
    keys: dict[str, Any] = {}
    for assignment in assignments:
        key, sign, text = assignment.partition("=")
        if not sign or not key:
            raise RequestError(f"--set must look like solver.damping=0.05; got {assignment!r}")
        try:
            keys[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            keys[key.strip()] = text
    return keys


def _set_key(keys: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    place: Any = keys
    for section in sections:
        if isinstance(place, dict):
            place = place.setdefault(section, {"name": "gptq"} if section == "solver" else {})
        elif isinstance(place, list) and section.isdigit() and int(section) < len(place):
            place = place[int(section)]
        else:
            raise RecipeError(f"the key {dotted!r} leads nowhere at {section!r}")
    if not isinstance(place, dict):
        raise RecipeError(f"the key {dotted!r} must name a key of a section, such as solver.damping")
    place[last] = value


def _first_problem(error: ValidationError) -> str:
    """Return the first problem of a pydantic error as one sentence."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section, key = first["loc"][:-1], str(first["loc"][-1])
        return f"unknown key {where!r}{nearest_name(key, _section_keys(section))}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{where}: {message}; got {first['input']!r}" if where else f"{message}; got {first['input']!r}"


def _section_keys(location: tuple[int | str, ...]) -> list[str]:
    """Return the keys of the section at `location`."""
    sections: dict[str, type[BaseModel]] = {
        "weights": WeightSection,
        "activations": ActivationSection,
        "kv_cache": KvCacheSection,
        "attention": AttentionSection,
        "prefix": PrefixSection,
        "overrides": OverrideSection,
        "calibration": CalibrationSection,
        "embedding": EndSection,
        "head": HeadSection,
    }
    model = sections.get(str(location[0]), Recipe) if location else Recipe
    return list(model.model_fields)


def _toml(keys: Mapping[str, Any]) -> str:
    """Write nested keys as TOML; the standard library only reads it."""
    lines = [f"{key} = {_toml_value(value)}" for key, value in keys.items() if not _is_table(value)]
    for key, value in keys.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{key}]", *(f"{name} = {_toml_value(item)}" for name, item in value.items())]
        elif _is_table(value):
            for table in value:
                lines += ["", f"[[{key}]]", *(f"{name} = {_toml_value(item)}" for name, item in table.items())]
    return "\n".join(lines) + "\n"


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)
    )


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for one character that JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)

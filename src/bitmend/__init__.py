"""bitmend: compress trained networks to 4 bits and below, repair the damage, prove the repair.

Importing it makes bitmend's checkpoint format known to transformers, so that
`AutoModelForCausalLM.from_pretrained(path)` loads what `bitmend.quantize` wrote.
"""

from bitmend.comparison import compare
from bitmend.evaluate.evaluate import evaluate
from bitmend.evaluate.results import EvaluationReport
from bitmend.formats import hf_quantizer as _registers_the_format  # noqa: F401
from bitmend.formats.ledger import Ledger, ledger
from bitmend.formats.load import load
from bitmend.pipeline.compensate import compensate
from bitmend.pipeline.recipe import Recipe, load_recipe
from bitmend.pipeline.towers import quantize
from bitmend.protocols import RunReport
from bitmend.report.comparison import Comparison
from bitmend.runtime.packed_cache import PackedCache

__all__ = [
    "Comparison",
    "EvaluationReport",
    "Ledger",
    "PackedCache",
    "Recipe",
    "RunReport",
    "compare",
    "compensate",
    "evaluate",
    "ledger",
    "load",
    "load_recipe",
    "quantize",
]

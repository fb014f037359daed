"""The one place where GPTQModel is told to do plain GPTQ or GPTAQ and nothing else."""

from gptqmodel import QuantizeConfig
from gptqmodel.quantization.config import GPTAQConfig, HessianConfig


def quantize_config(options):
    """Return the configuration for the parsed options of `dump_layer.py` or `quantise_gptqmodel.py`.

    Every field that changes the arithmetic is named here, also where 7.6.0 has the same default.
    """
    return QuantizeConfig(
        bits=options.bits,
        group_size=options.group_size,
        sym=not options.asymmetric,
        desc_act=options.desc_act,
        act_group_aware=False,  # on by default: permutes columns inside and between groups
        static_groups=not options.live_groups,  # off by default: grids then come from the updated weight
        damp_percent=options.damping,  # 0.05 by default
        damp_auto_increment=0.01,  # used only if the Cholesky factorisation fails
        mse=0.0,  # min-max grid
        true_sequential=True,
        lm_head=False,
        format="gptq",
        quant_method="gptq",
        gptaq=GPTAQConfig(alpha=options.alpha, device="cpu") if options.method == "gptaq" else None,
        foem=None,
        fallback=None,  # round to nearest where few tokens arrive: never here
        rotation=None,
        preprocessors=[],
        smoother=None,
        adapter=None,
        mock_quantization=False,
        hessian=HessianConfig(chunk_size=None, chunk_bytes=None, staging_dtype="float32"),
        offload_to_disk=False,
        pack_impl="cpu",
        device="cpu",
    )

import pytest
import torch
import transformers
from torch import nn

from bitmend.linalg.moments import Moments
from bitmend.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from bitmend.models.hf_image import HfImage
from bitmend.numerics.granularity import PerChannel
from bitmend.numerics.qtensor import QuantSpec
from bitmend.numerics.uniform import UniformGrid
from bitmend.pipeline.recipe import load_recipe
from bitmend.pipeline.run import quantize
from bitmend.protocols import Problem
from bitmend.sites import LinearSite
from bitmend.solvers.gptq import Gptq
from bitmend.solvers.rtn import Rtn
from bitmend.transforms.fold_batch_norm import FoldBatchNorm, fold_

SITE = LinearSite("proj", "proj", "linear", (6, 12))


def with_statistics(model):
    torch.manual_seed(1)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.1, 4)
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    return model.eval()


def opened(folder, model):
    with_statistics(model).double().save_pretrained(folder)
    return HfImage.open(folder, dtype=torch.float64)


def folded_blocks(adapter):
    """Yield each block before and after, on the same noise."""
    for index in range(len(adapter.block_names)):
        adapter.load_block(index)
        hidden, inputs = adapter.sample_inputs(index, 2, 1)
        block = adapter.describe_block(index, adapter.few_rows())
        before = adapter.run_block(index, hidden, inputs)
        done = FoldBatchNorm().apply_(block, adapter.wiring_of(block, adapter.few_rows()), None)
        yield block, done, before, adapter.run_block(index, hidden, inputs)
        adapter.release_block(index)


@pytest.mark.parametrize("bias", [False, True])
def test_folding_by_hand(bias):
    convolution, norm = nn.Conv2d(2, 2, 1, bias=bias).double(), nn.BatchNorm2d(2, eps=0.25).double().eval()
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(2, 2, 1, 1))
        norm.weight.copy_(torch.tensor([6.0, -1.0]))
        norm.bias.copy_(torch.tensor([1.0, 10.0]))
        norm.running_mean.copy_(torch.tensor([1.0, -2.0]))
        norm.running_var.copy_(torch.tensor([2.0, 0.0]))  # roots of 2.25 and 0.25: factors 4 and -2
        if bias:
            convolution.bias.copy_(torch.tensor([0.5, -1.0]))
    fold_(convolution, norm)
    assert convolution.weight.flatten(1).tolist() == [[4.0, 8.0], [6.0, 8.0]]
    assert norm.weight.tolist() == [1.0, -1.0]
    assert norm.bias.tolist() == [-3.0, 6.0]
    if bias:
        assert convolution.bias.tolist() == [2.0, -2.0]
    ones = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    assert torch.equal(norm(ones).flatten(), torch.tensor([-2.0, 5.0], dtype=torch.float64))


@pytest.mark.parametrize("kind", ["cifar", "resnet"])
def test_every_norm_of_a_residual_network_is_folded_and_the_function_stays(tmp_path, kind):
    if kind == "cifar":
        config = CifarResNetConfig(blocks_per_stage=1, stage_channels=[4, 8, 8], image_size=8)
        model = CifarResNetForImageClassification(config)
    else:
        config = transformers.ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1], embedding_size=8, num_labels=3)
        model = transformers.ResNetForImageClassification(config)
    seen = 0
    for block, done, before, after in folded_blocks(opened(tmp_path / kind, model)):
        assert not done.events
        assert torch.allclose(before, after, rtol=1e-12, atol=1e-12 * float(before.abs().max()))
        for part in block.module.modules():
            if isinstance(part, nn.BatchNorm2d):
                seen += 1
                assert set(part.weight.tolist()) <= {1.0, -1.0}
    assert seen == sum(isinstance(part, nn.BatchNorm2d) for part in model.modules())


def test_a_norm_that_reads_no_convolution_is_left_and_told(tmp_path):
    config = CifarResNetConfig(blocks_per_stage=1, stage_channels=[4, 8, 8], image_size=8)
    adapter = opened(tmp_path / "resnet", CifarResNetForImageClassification(config))
    adapter.load_block(1)
    block = adapter.describe_block(1, adapter.few_rows())
    wiring = adapter.wiring_of(block, adapter.few_rows())
    fewer = type(wiring)(**{**vars(wiring), "scaled": wiring.scaled[:1]})
    (event,) = FoldBatchNorm().apply_(block, fewer, None).events
    assert (event.kind, event.degrades) == ("norms_left", False)
    assert "1 of 2 batch norms read a convolution" in event.message


@pytest.mark.parametrize("solver", [Rtn(), Gptq()])
def test_codes_per_channel_are_the_same_with_and_without(solver):
    draw = torch.Generator().manual_seed(0)
    convolution, norm = nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6, eps=0.0).eval()
    norm.weight.data = 2.0 ** torch.arange(-3, 3) * torch.tensor(
        [1, -1, 1, -1, 1, 1]
    )  # so that nothing rounds otherwise
    inputs = torch.randn(40, 12, generator=draw)
    moments = Moments((inputs.T @ inputs / 40).double(), None, None, num_tokens=40)
    spec = QuantSpec(UniformGrid(3, symmetric=True), PerChannel(), "mse")
    before = convolution.weight.detach().flatten(1).clone()
    fold_(convolution, norm)
    after = convolution.weight.detach().flatten(1)
    one, other = (solver.solve(Problem(SITE, weight, spec, fit=moments)).qtensor for weight in (before, after))
    assert torch.equal(one.codes, other.codes)
    factor = 2.0 ** torch.arange(-3, 3).unsqueeze(1)
    assert torch.equal(factor * one.qparams.scale, other.qparams.scale)


def test_a_folded_network_is_written_with_its_folded_statistics(tmp_path):
    config = CifarResNetConfig(blocks_per_stage=1, stage_channels=[4, 8, 8], image_size=8)
    model = with_statistics(CifarResNetForImageClassification(config))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}'
    )
    outputs = {}
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for name, transforms in (("plain", []), ("folded", [{"name": "fold_batch_norm"}])):
        keys = {"weights.bits": 8, "weights.group_size": -1, "transforms": transforms, "weights.observer": "minmax"}
        quantize(tmp_path / "model", load_recipe("rtn", keys), output=tmp_path / name)
        loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / name)
        norm = next(part for part in loaded.modules() if isinstance(part, nn.BatchNorm2d))
        assert (set(norm.weight.tolist()) <= {1.0, -1.0}) == (name == "folded")
        with torch.no_grad():
            outputs[name] = loaded(pixel_values=pixels).logits
    assert torch.allclose(outputs["plain"], outputs["folded"], rtol=1e-2, atol=1e-2)

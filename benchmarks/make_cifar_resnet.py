"""A model folder for transformers out of the published weights of a CIFAR-10 ResNet.

    python benchmarks/make_cifar_resnet.py FOLDER/resnet20.safetensors out/resnet20

The weights are those of github.com/akamaster/pytorch_resnet_cifar10 as safetensors (docs/data.md). `import bitmend` makes the
class of the model known to transformers.
"""

import argparse
from pathlib import Path

from bitmend.errors import QuantizationError
from bitmend.models.cifar_resnet import convert


def main():
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    try:
        model = convert(options.weights, options.output)
    except QuantizationError as error:
        parser.error(str(error))
    print(f"{options.output}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()

"""The head of the aesthetic predictor and of ImageReward."""

from flax import nnx
from jaxtyping import Array, Float

from ..pretrained.layers import Layers


class LinearLayers(nnx.Module):
    """Five linear maps in a row, to 1024, 128, 64, 16 and 1 numbers, without nonlinearities."""

    def __init__(self, inputs: int, layers: Layers):
        widths = (inputs, 1024, 128, 64, 16, 1)
        self.layers = nnx.List([layers.linear(n, m) for n, m in zip(widths, widths[1:])])

    def __call__(self, x: Float[Array, "b e"]) -> Float[Array, " b"]:
        for layer in self.layers:
            x = layer(x)
        return x[:, 0]

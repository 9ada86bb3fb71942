"""Network in network (Lin, Chen, Yan 2013, arXiv:1312.4400).

The idea: after each convolution a small network of 1 x 1 convolutions runs at every pixel. The last one returns a map
per class. The mean of this map is the logit, so no fully connected layer is needed.

Differences from the paper:

- The default is the network for ImageNet that its authors released later (7,595,176 parameters at 1000 classes), with
  dropout only before the last block.
- Logits are not rectified, because a class whose map is zero everywhere would never learn.
- Weights are initialised after He et al. 2015.

The paper's network for CIFAR-10 is almost ``widths=(192, 192, 192), stem=(5, 1, 2)``; in the paper, the
1 x 1 convolutions of the first block are narrower.
"""

from torch import Tensor, nn

from upright.architectures.initialisation import initialise
from upright.architectures.layers import Window, maps_size

WINDOWS: tuple[Window, ...] = ((11, 4, 0), (5, 1, 2), (3, 1, 1), (3, 1, 1))


def mlpconv(inputs: int, widths: tuple[int, int, int], window: Window) -> list[nn.Module]:
    """Return a convolution, and two 1 x 1 convolutions that mix its maps at every pixel."""
    first, second, third = widths
    convolutions = [nn.Conv2d(inputs, first, *window), nn.Conv2d(first, second, 1), nn.Conv2d(second, third, 1)]
    return [layer for convolution in convolutions for layer in (convolution, nn.ReLU())]


class NiN(nn.Module):
    """Blocks with pooling between them, then the mean over all pixels. Images may have any larger size at run time.

    Args:
        input_shape: ``(C, H, W)``, at least 67 x 67; 7 x 7 for the network of CIFAR-10 above.
        widths: maps of each block; fewer than four widths leave out the last blocks.
        stem: window ``(kernel, stride, padding)`` of the first convolution.
        dropout: share of values that are dropped before the last block.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        widths: tuple[int, ...] = (96, 256, 384, 1024),
        stem: Window = WINDOWS[0],
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if not 1 <= len(widths) <= 4:
            raise ValueError(f"NiN has 1 to 4 blocks, got {len(widths)} widths.")
        inputs = input_shape[0]
        *before, (width, last_window) = zip(widths, (stem, *WINDOWS[1:]), strict=False)
        layers: list[nn.Module] = []
        for outputs, window in before:
            layers += [*mlpconv(inputs, (outputs, outputs, outputs), window), nn.MaxPool2d(3, 2)]
            inputs = outputs
        *block, _ = mlpconv(inputs, (width, width, num_classes), last_window)
        self.layers = nn.Sequential(*layers, nn.Dropout(dropout), *block)
        maps_size(self, self.layers, input_shape)  # refuses images that are too small
        initialise(self, "he_normal")

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.layers(images)  # (B, K, h, w)
        return maps.mean(dim=(2, 3))  # (B, K)

import torch

from upright.architectures.perceptron import Perceptron


def test_parameters() -> None:
    assert sum(parameter.numel() for parameter in Perceptron((1, 28, 28), 10).parameters()) == 7_850


def test_one_pixel_is_enough_and_logits_are_linear() -> None:
    network = Perceptron((3, 1, 1), 2)
    one, two = torch.randn(2, 4, 3, 1, 1)
    torch.testing.assert_close(network(one + two), network(one) + network(two) - network(torch.zeros(4, 3, 1, 1)))

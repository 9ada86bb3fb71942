"""One network per file. The files import only `warp` and `errors` of the rest of Upright.

Shared modules: `layers` (activations, poolings, blocks, smallest image sizes), `inception` (Inceptions as data),
`initialisation`, `transforms` (the transforms of a spatial transformer).

Every constructor begins ``(self, input_shape: tuple[int, int, int], num_classes: int, *, ...)`` with ``input_shape`` as
``(C, H, W)``. Every ``forward`` maps normalised images ``(B, C, H, W)`` to logits ``(B, K)``, in training and in
evaluation alike.

Letters: ``B C H W`` images, ``K`` classes, ``N`` points, ``P`` parameters of a transform.
"""

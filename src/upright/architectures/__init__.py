"""One network per file; none knows anything of the rest of Upright but `upright.warp`.

What several share: `layers` (activations, poolings, blocks, least sizes), `inception` (Inceptions as data),
`initialisation`, `transforms` (what a spatial transformer may do).

Every constructor begins ``(self, input_shape: tuple[int, int, int], num_classes: int, *, ...)`` with ``input_shape`` as
``(C, H, W)``, and every ``forward`` takes normalised images ``(B, C, H, W)`` to logits ``(B, K)``, the same in training
and in evaluation.

Letters: ``B C H W`` images, ``K`` classes, ``N`` points, ``P`` parameters of a transform.
"""

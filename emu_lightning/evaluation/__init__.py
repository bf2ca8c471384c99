"""Evaluation: two sets of pictures in, an honest win rate out. Knows neither Lightning nor W&B.

Kept empty of imports on purpose: the annotation pages use :mod:`.votes` on machines without torch.
"""

"""Configs of the launches: found in four levels, tuned only when asked for, never by a call of a layer.

1. What was tuned for this very GPU (name and SM count) at this shape and batch: the user's file, then the package's.
2. The same at another batch: of the same power of two, rounded up, else of the nearest, at most `keys.NEAR` away; a
   schedule only where the same one is expected there.
3. The package's file of the architecture, ``configs/sm_90.json``: predictions for the SM count of a typical product and
   for batches that are a power of two, and for these alone.
4. The analytic choice (:mod:`sk_triton.analytic`).
"""

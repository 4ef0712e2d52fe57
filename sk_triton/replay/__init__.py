"""Calls that are started again without being planned again.

`calls` keeps a layer's, while its `watch` finds it unchanged; a call is a `recording` of kernels, whose arguments point
into `places` of the call's own tensors and of a kept `workspace`.
"""

"""A backend as the public primitives call it: arrays that are not plain are copied, and back."""

from __future__ import annotations

from inspect import signature

from cupybn.backends.plain import call_plainly

WRITTEN = {"payload", "running", "y3", "out3", "relu_bits", "dresidual3", "dweight", "dbias"}


class Plainly:
    def __init__(self, backend):
        self._backend = backend

    def __getattr__(self, name):
        function = getattr(self._backend, name)

        def call(*args, **options):
            given = signature(function).bind(*args, **options).arguments
            result = call_plainly(function, tuple(WRITTEN & given.keys()), **given)
            return result if given.get("out3") is None else given["out3"]

        return call

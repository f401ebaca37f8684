"""Other frameworks. ``import cupybn`` imports none of these modules:

* ``cupybn.interop.names``: state dicts under the names of other frameworks.
* ``cupybn.interop.jax``: synchronised batch norm for JAX, under jit and gradients.
* ``cupybn.interop.torch``: synchronised batch norm for PyTorch modules, on autograd.
"""

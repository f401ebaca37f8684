"""Meeting other frameworks. Nothing here is imported by ``import cupybn``; one module at a time:

* ``cupybn.interop.names``: state dicts under the names of other frameworks.
* ``cupybn.interop.jax``: synchronised batch norm for JAX, under jit and gradients.
* ``cupybn.interop.torch``: synchronised batch norm for PyTorch modules, on autograd.
"""

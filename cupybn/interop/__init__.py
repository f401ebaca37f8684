"""Meeting other frameworks. Nothing here is imported by ``import cupybn``; one module at a time:

* ``cupybn.interop.names``: state dicts under the names of other frameworks.
* ``cupybn.interop.torch``: synchronised batch norm for PyTorch modules, on autograd.
"""

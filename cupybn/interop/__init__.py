"""Meeting other frameworks. Nothing here is imported by ``import cupybn``.

``cupybn.interop.torch``: synchronised batch norm for PyTorch modules, on autograd.
"""

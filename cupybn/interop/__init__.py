"""Bridges to other frameworks. Modules are imported one by one: ``cupybn.interop.names``, ..."""

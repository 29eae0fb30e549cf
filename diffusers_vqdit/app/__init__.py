"""A page to try a pipeline of ours in a browser, ``python -m diffusers_vqdit.app``; needs the extra ``app``."""

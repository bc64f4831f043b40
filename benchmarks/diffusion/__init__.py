"""Diffusion models beside diffusers and azula: what is asked of a library, and each library's answer."""

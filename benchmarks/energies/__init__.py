"""Energy-based models beside torchebm: what is asked of a library, and each library's answer."""

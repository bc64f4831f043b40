"""``python -m pyro_gen``: the command line."""

from pyro_gen.cli import main

if __name__ == "__main__":
    main()

"""The entry point of a checkout; the console script `emu` is the same thing."""

from emu_lightning.cli import main

if __name__ == "__main__":
    main()

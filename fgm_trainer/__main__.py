"""`python -m fgm_trainer`."""

from .launcher import main

if __name__ == "__main__":
    main()

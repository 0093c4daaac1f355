"""``python -m pathtune``."""

from pathtune.cli import main

if __name__ == "__main__":
    main()

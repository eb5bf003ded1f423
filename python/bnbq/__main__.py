"""``python -m bnbq``: the same as the command ``bnbq``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())

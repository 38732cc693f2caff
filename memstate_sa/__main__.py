"""``python -m memstate_sa``: the command line."""

from memstate_sa.cli import main

if __name__ == "__main__":
    main()

"""``python -m memstate_sa.cli``."""

from memstate_sa.cli import main

if __name__ == "__main__":
    main()

"""`python -m lutq` is `lutq`."""

from lutq.cli import main

if __name__ == "__main__":
    main()

"""`python -m server`."""

if __name__ == "__main__":
    import sys

    from server.cli import main

    sys.exit(main())

"""`python -m server`."""

if __name__ == "__main__":
    import signal
    import sys

    # Until the server takes signals itself, Ctrl+C just ends it, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from server.cli import main

    sys.exit(main())

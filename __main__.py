"""`python -m actorserve` is the same as the command `actorserve`; both begin here."""

from typing import NoReturn


def main() -> NoReturn:
    """Run the command line. Ctrl-C while it is imported is no traceback either."""
    try:
        from .cli import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()

"""`python -m actorserve` is the same as the command `actorserve`."""

from .cli import main

if __name__ == "__main__":
    main()

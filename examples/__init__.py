"""Programs in the frontend language, each a file that runs by itself: `python -m actorserve.examples.parallel_tips`."""

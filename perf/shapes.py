"""A folder with the config.json of a known shape, for `--load-format dummy`; prints its path.

    actorserve run --model $(python -m actorserve.perf.shapes qwen2-7b) --load-format dummy --skip-tokenizer-init

Fields may be overridden, for a model of another size: `... smollm2-135m --set num_hidden_layers=2 hidden_size=64`.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from actorserve.config import EngineConfig
from actorserve.models.shapes import KNOWN, write_shape

if TYPE_CHECKING:
    from actorserve.models.decoder import Decoder


def shape_folder(name: str, folder: Path | None = None, fields: Sequence[str] = ()) -> Path:
    """Write config.json of a shape with `fields` ("key=value", value in JSON) changed; returns its folder.

    Without `folder` it is one in the temporary directory, the same for the same name.
    """
    target = write_shape(name, folder or Path(tempfile.gettempdir()) / f"actorserve-shape-{name}")
    if fields:
        config = json.loads((target / "config.json").read_bytes())
        config |= {key: json.loads(value) for key, value in (field.split("=", 1) for field in fields)}
        (target / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return target


@contextmanager
def model_folder(name: str) -> Iterator[str]:
    """The folder of a model for the block: of a known shape a temporary one, else `name` itself."""
    if name not in KNOWN or Path(name).exists():
        yield name
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield str(write_shape(name, Path(scratch) / name))


def dummy_decoder(name: str, device: str = "cuda") -> tuple["Decoder", EngineConfig]:
    """A model of a known shape with random weights, and the configuration that it was made by."""
    from actorserve.models.weights import load_decoder  # with torch, which writing a shape need not wait for

    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(model=str(write_shape(name, Path(folder))), load_format="dummy", device=device)
        return load_decoder(config.model, config, lambda _: None), config


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", choices=KNOWN)
    p.add_argument("folder", type=Path, nargs="?")
    p.add_argument("--set", nargs="+", default=[], metavar="KEY=JSON")
    a = p.parse_args(arguments)
    try:
        print(shape_folder(a.name, a.folder, a.set))
    except ValueError as error:
        p.error(f"--set: {error}")


if __name__ == "__main__":
    main()

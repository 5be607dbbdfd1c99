"""Models by their name on a hub, `org/name`: fetched by the hub's own library into that library's cache.

Hugging Face by huggingface_hub (HF_ENDPOINT, HF_TOKEN, HF_HOME apply), ModelScope by modelscope_hub
(MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN, MODELSCOPE_CACHE). Used by resolve.py in the root, before any actor exists.
Invariant: only data is fetched, never code or pickles; what to fetch is decided from the hub's list of files before the
first byte of a weight, so a repository that cannot be served costs one request.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Final, Protocol

from ..errors import StartupError
from .cache import Progress

NAME: Final = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?::(?P<quant>\w[\w.-]*))?")
"""`org/name`, and for GGUF files `org/name:Q4_K_M`."""
DESCRIPTION: Final = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
IGNORED: Final = ("original/*", "onnx/*", "openvino/*", "metal/*", "consolidated*")
"""Second copies of the weights in other forms."""
POLL_SECONDS: Final = 0.2
STAGE: Final = "fetch"

Sizes = dict[str, int]
"""Bytes by path within a repository."""


class Hub(Protocol):
    """A hub's library; every failure of it leaves as a StartupError."""

    title: str

    def files(self, repo: str, revision: str | None) -> Sizes | None:
        """What the repository holds; None: the hub cannot be reached."""

    def fetch(self, repo: str, revision: str | None, paths: list[str], told: Callable[[int], None]) -> Path | None:
        """Fetch these files, or find them in the cache; `told` is called with the bytes that have come in all.

        None: the connection broke off.
        """

    def cached(self, repo: str, revision: str | None) -> Path | None:
        """The folder of an earlier fetch, without a network."""


def is_hub_name(model: str) -> bool:
    """Whether `--model` may be a name on a hub."""
    return NAME.fullmatch(model) is not None


def hub_model(model: str, source: str, revision: str | None, weights: bool, progress: Progress) -> Path:
    """The folder, or the GGUF file, of a model on the hub `source` ("huggingface" or "modelscope").

    weights=False fetches its description alone. Without a network what the cache has is taken. Raises StartupError.
    """
    match = NAME.fullmatch(model)
    assert match is not None
    repo, quant = match["repo"], match["quant"]
    hub = HUBS[source]()
    files = hub.files(repo, revision)
    if files is None:
        folder = hub.cached(repo, revision)
        if folder is None:
            raise StartupError(f"--model {model}: {hub.title} cannot be reached, and its cache has no such model")
        return _file_of(folder, quant)
    paths = wanted(model, files, quant, weights)
    total = sum(files[path] for path in paths)

    def told(done: int) -> None:
        progress(STAGE, min(done, total), total)

    folder = hub.fetch(repo, revision, paths, told)
    if folder is None:
        raise StartupError(f"the connection to {hub.title} broke off; what has come is kept, try again")
    told(total)
    return folder / paths[0] if paths[0].endswith(".gguf") else folder


def wanted(model: str, files: Sizes, quant: str | None, weights: bool) -> list[str]:
    """The paths to fetch of a repository; a GGUF file alone if it is one of those. Raises StartupError."""
    useful = [path for path in sorted(files) if not any(fnmatch(path, pattern) for pattern in IGNORED)]
    ggufs = [path for path in useful if path.endswith(".gguf")]
    if quant is not None or (ggufs and "config.json" not in files):
        return [_gguf(model, ggufs, quant)]
    if "config.json" not in files:
        raise StartupError(f"--model {model}: the repository has no config.json: not a model that can be served")
    described = [path for path in useful if any(fnmatch(path, pattern) for pattern in DESCRIPTION)]
    if not weights:
        return described
    tensors = [path for path in useful if path.endswith(".safetensors")]
    if not tensors:
        raise StartupError(
            f"--model {model}: the repository has no *.safetensors weights; others are pickle files, which can run code"
        )
    return described + tensors


def _gguf(model: str, paths: list[str], quant: str | None) -> str:
    """The one GGUF file that is meant."""
    fitting = [path for path in paths if quant is None or quant.lower() in path.lower()]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(fitting or paths) or "no GGUF file"
    if not fitting:
        raise StartupError(f"--model {model}: no GGUF file of that name; the repository has {names}")
    if all(re.search(r"-\d{5}-of-\d{5}\.gguf$", path) for path in fitting):
        raise StartupError(f"--model {model}: GGUF files in parts cannot be read; join them to one ({names})")
    raise StartupError(f"--model {model}: say which GGUF file, as in {model.split(':')[0]}:Q4_K_M; there are {names}")


def _file_of(folder: Path, quant: str | None) -> Path:
    """What a cached snapshot is loaded by: itself, or the GGUF file in it."""
    if (folder / "config.json").exists() and quant is None:
        return folder
    paths = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*.gguf"))]
    return folder / _gguf(folder.name, paths, quant)


# ------------------------------------------------------------------ the hubs


class HuggingFace:
    """See Hub."""

    title = "the Hugging Face hub"

    def __init__(self) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        import huggingface_hub
        from huggingface_hub import errors

        self._library, self._errors = huggingface_hub, errors

    def files(self, repo: str, revision: str | None) -> Sizes | None:
        with self._failures(repo, revision) as unreachable:
            info = self._library.HfApi().model_info(repo, revision=revision, files_metadata=True)
            return {file.rfilename: file.size or 0 for file in info.siblings or ()}
        assert unreachable
        return None

    def fetch(self, repo: str, revision: str | None, paths: list[str], told: Callable[[int], None]) -> Path | None:
        with self._failures(repo, revision), _watched(self._storage(repo) / "blobs", told):
            return Path(self._library.snapshot_download(repo, revision=revision, allow_patterns=paths))
        return None

    def cached(self, repo: str, revision: str | None) -> Path | None:
        storage, name = self._storage(repo), revision or "main"
        with suppress(OSError):  # the library calls a snapshot without the files that were not wanted incomplete
            name = (storage / "refs" / name).read_text().strip()
        folder = storage / "snapshots" / name
        return folder if folder.is_dir() else None

    def _storage(self, repo: str) -> Path:
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"

    @contextmanager
    def _failures(self, repo: str, revision: str | None) -> Iterator[list[Exception]]:
        """Let go on, with the error in the list, after one of the network."""
        errors, unreachable = self._errors, list[Exception]()
        network: type[Exception] = getattr(errors, "HTTPError")  # noqa: B009 (of the HTTP library that it uses)
        try:
            yield unreachable
        except errors.RepositoryNotFoundError as error:
            raise StartupError(
                f"--model {repo}: {self.title} has no such model for you; a private or gated one needs HF_TOKEN"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise StartupError(f"--revision {revision}: {repo} has no such branch, tag or commit") from error
        except errors.HfHubHTTPError as error:
            raise StartupError(f"--model {repo}: {self.title} answers {_one_line(error)}") from error
        except (network, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError) as error:
            unreachable.append(error)
        except OSError as error:
            raise StartupError(f"--model {repo} cannot be kept in the hub's cache: {error}") from error


class ModelScope:
    """See Hub."""

    title = "ModelScope"

    def __init__(self) -> None:
        try:
            import modelscope_hub
            from modelscope_hub import errors
        except ImportError as error:
            raise StartupError(
                "--download-source modelscope needs ModelScope's library: pip install modelscope-hub"
            ) from error
        self._library, self._api, self._errors = modelscope_hub, modelscope_hub.HubApi(), errors

    def files(self, repo: str, revision: str | None) -> Sizes | None:
        with self._failures(repo, revision) as unreachable:
            listed = self._api.list_repo_files(repo, "model", revision=revision)
            return {file.path: file.size or 0 for file in listed if file.type != "tree"}
        assert unreachable
        return None

    def fetch(self, repo: str, revision: str | None, paths: list[str], told: Callable[[int], None]) -> Path | None:
        lock, come = threading.Lock(), 0

        class Counter(self._library.ProgressCallback):  # type: ignore[name-defined,misc]
            """Made for each file."""

            def __init__(self, filename: str, file_size: int) -> None:
                pass

            def update(self, size: int) -> None:
                nonlocal come
                with lock:
                    come += size
                    told(come)

            def end(self) -> None:
                pass

        with self._failures(repo, revision):
            return Path(
                self._api.download_repo(
                    repo, "model", revision=revision, allow_patterns=paths, progress_callbacks=[Counter]
                )
            )
        return None

    def cached(self, repo: str, revision: str | None) -> Path | None:
        with suppress(self._errors.HubError):
            return Path(self._api.download_repo(repo, "model", revision=revision, local_files_only=True))
        return None

    @contextmanager
    def _failures(self, repo: str, revision: str | None) -> Iterator[list[Exception]]:
        """Let go on, with the error in the list, after one of the network."""
        errors, unreachable = self._errors, list[Exception]()
        try:
            yield unreachable
        except errors.NotExistError as error:
            what = f" with the revision {revision}" if revision else ""
            raise StartupError(f"--model {repo}: {self.title} has no such model{what}") from error
        except (errors.AuthenticationError, errors.PermissionDeniedError) as error:
            raise StartupError(f"--model {repo}: {self.title} wants MODELSCOPE_API_TOKEN for it") from error
        except (errors.NetworkError, ConnectionError) as error:
            unreachable.append(error)
        except errors.HubError as error:
            raise StartupError(f"--model {repo}: {self.title}: {_one_line(error)}") from error
        except OSError as error:
            raise StartupError(f"--model {repo} cannot be kept in ModelScope's cache: {error}") from error


HUBS: Final[dict[str, Callable[[], Hub]]] = {"huggingface": HuggingFace, "modelscope": ModelScope}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


@contextmanager
def _watched(folder: Path, told: Callable[[int], None]) -> Iterator[None]:
    """Tell how much `folder` grows meanwhile: libraries count bytes in ways that change with their versions."""
    before, over = _bytes_in(folder), threading.Event()

    def watch() -> None:
        while not over.wait(POLL_SECONDS):
            told(max(0, _bytes_in(folder) - before))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _bytes_in(folder: Path) -> int:
    total = 0
    with suppress(OSError):
        for entry in os.scandir(folder):
            with suppress(OSError):
                total += entry.stat().st_size
    return total

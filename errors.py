"""The one error hierarchy. Any layer may raise these; the HTTP layer and the CLI turn them into replies.

An error says what the user can do about it, whose fault it is (`status`), and where (`param`). It carries no
path, address or repr of an internal object: its text may reach a client.

    ActorserveError
      RequestError        the request is wrong (400) or too large (413); `param` names the field
      Overloaded          try again later (429 or 503); `retry_after` seconds
      EngineDown          an actor died under the request (503), retryable
      StartupError        the engine cannot start: printed as one line, exit code 2
"""


class ActorserveError(Exception):
    """Base of all errors with a meaning for a user."""

    status = 500
    code = "internal_error"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        if status is not None:
            self.status = status


class RequestError(ActorserveError):
    """The request cannot be served as it is."""

    status = 400
    code = "invalid_value"


class Overloaded(ActorserveError):
    """The engine refuses work for now; the client may try again after `retry_after` seconds."""

    status = 429
    code = "overloaded"

    def __init__(self, message: str, *, retry_after: int = 1, status: int = 429) -> None:
        super().__init__(message, status=status)
        self.retry_after = retry_after


class EngineDown(ActorserveError):
    """A part of the engine died or is not up; the request may be sent again."""

    status = 503
    code = "engine_unavailable"


class StartupError(ActorserveError):
    """The engine cannot start with this configuration on this machine."""

    code = "startup_failed"

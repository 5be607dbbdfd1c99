"""SamplingParams: everything a request says about how its tokens are drawn. Torch-free.

Names, defaults and ranges are SGLang's; `check` raises RequestError naming the field. Internally (messages) and
externally (`/generate`'s `sampling_params`) this is one struct.
"""

from typing import Final

import msgspec

from ..errors import RequestError

GREEDY_BELOW: Final = 1e-6
MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARS: Final = 256
MAX_STOP_IDS: Final = 64
MAX_BIASES: Final = 1024
MAX_TOP_LOGPROBS: Final = 20
MAX_LISTED: Final = 128
MIN_SEED: Final = -(1 << 63)
MAX_SEED: Final = (1 << 63) - 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How to draw tokens. `max_new_tokens=None` means: to the end of the context."""

    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    """Nothing ends the output before: stop tokens are not drawn, stop strings are looked for in the text behind."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    seed: int | None = None
    """Any 64 bits: negative ones, which OpenAI's clients may send, are as good as others and distinct from them."""
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    """None: no logprobs; 0: the chosen token's; n: also the n most likely tokens'."""
    logprob_start_len: int = -1
    """With `logprobs`: those of the prompt's tokens behind this many are wanted too; -1: none of them."""
    token_ids_logprob: tuple[int, ...] = ()
    """With `logprobs`: also those of these tokens, at each place."""
    stop_regex: tuple[str, ...] = ()
    """As `stop`, by regular expressions (models/stop_regex.py): the output ends where the first match is complete."""

    @property
    def greedy(self) -> bool:
        """Temperature 0 (below 1e-6), or top_k 1: the most likely token, no random number."""
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    @property
    def wants_prompt(self) -> bool:
        """Whether logprobs of the prompt's tokens are wanted."""
        return self.logprobs is not None and self.logprob_start_len >= 0

    @property
    def has_penalty(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0)

    def check(self, vocab_size: int) -> None:
        """Raise RequestError naming the first field that is out of range."""
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN is never between
                raise RequestError(f"{name} must be between {low} and {high}{_not(value)}", param=name)
        if self.repetition_penalty <= 0:
            raise RequestError("repetition_penalty must be above 0", param="repetition_penalty")
        if self.top_p <= 0:
            raise RequestError("top_p must be above 0 and at most 1", param="top_p")
        if self.top_k == 0 or self.top_k < -1:
            raise RequestError("top_k must be -1 (off) or at least 1", param="top_k")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise RequestError("min_new_tokens must not exceed max_new_tokens", param="min_new_tokens")
        self._check_lists(vocab_size)

    def _check_lists(self, vocab_size: int) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"at most {MAX_STOP_STRINGS} stop strings", param="stop")
        if any(not s or len(s) > MAX_STOP_CHARS for s in self.stop):
            raise RequestError(f"stop strings must have 1 to {MAX_STOP_CHARS} characters", param="stop")
        if len(self.stop_regex) > MAX_STOP_STRINGS:
            raise RequestError(f"at most {MAX_STOP_STRINGS} patterns in stop_regex", param="stop_regex")
        if any(not s or len(s) > MAX_STOP_CHARS for s in self.stop_regex):
            raise RequestError(f"patterns must have 1 to {MAX_STOP_CHARS} characters", param="stop_regex")
        if len(self.stop_token_ids) > MAX_STOP_IDS:
            raise RequestError(f"at most {MAX_STOP_IDS} stop_token_ids", param="stop_token_ids")
        if any(not 0 <= t < vocab_size for t in self.stop_token_ids):
            raise RequestError(f"stop_token_ids must be between 0 and {vocab_size - 1}", param="stop_token_ids")
        if len(self.token_ids_logprob) > MAX_LISTED:
            raise RequestError(f"at most {MAX_LISTED} ids in token_ids_logprob", param="token_ids_logprob")
        if any(not 0 <= t < vocab_size for t in self.token_ids_logprob):
            raise RequestError(f"token_ids_logprob must be between 0 and {vocab_size - 1}", param="token_ids_logprob")
        if len(self.logit_bias) > MAX_BIASES:
            raise RequestError(f"at most {MAX_BIASES} entries in logit_bias", param="logit_bias")
        for token, bias in self.logit_bias.items():
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"tokens in logit_bias must be 0 to {vocab_size - 1}{_not(token)}", param="logit_bias"
                )
            if not -100 <= bias <= 100:
                raise RequestError("logit_bias values must be between -100 and 100", param="logit_bias")


def _not(value: float) -> str:
    """Name the value in an error. Not integers of hundreds of digits: nobody reads those, and str() refuses some."""
    return f", not {value}" if isinstance(value, float) or abs(value) < 1 << 70 else ""


_RANGES: Final = (
    ("max_new_tokens", 0, 1 << 31),
    ("min_new_tokens", 0, 1 << 31),
    ("temperature", 0, 100),
    ("top_p", 0, 1),
    ("top_k", -1, 1 << 31),
    ("min_p", 0, 1),
    ("frequency_penalty", -2, 2),
    ("presence_penalty", -2, 2),
    ("repetition_penalty", 0, 2),
    ("seed", MIN_SEED, MAX_SEED),
    ("logprobs", 0, MAX_TOP_LOGPROBS),
    ("logprob_start_len", -1, 1 << 31),
)
